"""What every weight format states about itself."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    """How the weights of a config's `dtype` are stored."""

    name: str  #: the dtype's name in a config
    values: np.dtype  #: dtype of the arrays that users see and files hold
    storage: np.dtype  #: dtype under which kernels read the same memory
    accepts: Callable  #: whether arrays of a dtype can be encoded
    encode: Callable  #: array of such a dtype -> C-contiguous array of `values`, itself if it is one
    error: float  #: bound on abs(stored - weight) / abs(weight) for normal numbers
