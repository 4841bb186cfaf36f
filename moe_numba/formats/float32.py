"""IEEE 754 binary32: stored as it is."""

import numpy as np

from .._aligned import converted
from .._check import is_float
from .format import Format

_FLOAT32 = np.dtype(np.float32)


def _encode(array):
    return converted(array, _FLOAT32)


FLOAT32 = Format("float32", _FLOAT32, _FLOAT32, is_float, _encode, error=0.0)
