"""bfloat16: the upper half of a float32, rounded to nearest, ties to even.

Arrays of ml_dtypes.bfloat16, or of uint16 with the same bits. Activations are rounded to
bfloat16 too; products and sums are float32.
"""

import ml_dtypes
import numpy as np

from .._aligned import converted
from .._check import is_float
from .format import Format

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_UINT16 = np.dtype(np.uint16)


def _accepts(dtype):
    return dtype == _UINT16 or is_float(dtype)


def _encode(array):
    if array.dtype == _UINT16:
        array = array.view(_BFLOAT16)
    return converted(array, _BFLOAT16)


BFLOAT16 = Format("bfloat16", _BFLOAT16, _UINT16, _accepts, _encode, error=2**-8)
