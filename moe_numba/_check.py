"""Arguments at the boundary: what users pass in, checked once and brought into one form.

Each function returns the checked value or raises MoeValueError with the argument's name, what
it was and what it must be.
"""

import math
from collections.abc import Collection

import numpy as np

from ._aligned import converted
from .errors import MoeValueError

_FLOAT32, _INT64 = np.dtype(np.float32), np.dtype(np.int64)


def fail(name, was, rule):
    raise MoeValueError(f"{name} was {was}, but must be {rule}")


def instance(name, value, kind):
    if not isinstance(value, kind):
        fail(name, repr(value), f"a {kind.__name__}")
    return value


def integer(name, value, minimum):
    """An int of at least `minimum` that fits 64 bits; NumPy integers are accepted, booleans are not."""
    valid = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not (valid and minimum <= value < 2**63):
        fail(
            name,
            _shown(value),
            f"an integer of at least {minimum}" + (" and below 2**63" if valid and value >= 2**63 else ""),
        )
    return int(value)


def number(name, value, rule, accept):
    """A finite float for which `accept` holds; `rule` says so in words."""
    valid = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    try:
        number = float(value) if valid else math.nan
    except OverflowError:  # an integer beyond 1e308
        number = math.inf
    if not (math.isfinite(number) and accept(number)):
        fail(name, _shown(value), rule)
    return number


def _shown(value):
    try:
        return repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "an integer of thousands of digits"


def float32_number(name, value, rule, accept):
    """`number`, of which the same holds once it is a float32, as which kernels compute with it."""
    result = number(name, value, rule, accept)
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.float32(result)
    if not (np.isfinite(rounded) and accept(rounded)):
        fail(name, repr(value), f"{rule}, as a float32 too")
    return result


def choice(name, value, allowed: Collection[str]):
    if not isinstance(value, str) or value not in allowed:
        fail(name, repr(value), "one of " + ", ".join(map(repr, allowed)))
    return value


def describe(array) -> str:
    return f"an array of shape {array.shape} and dtype {array.dtype}"


def is_float(dtype) -> bool:
    """float16, float32, float64, and ml_dtypes' bfloat16 (which NumPy calls kind V)."""
    return (dtype.kind == "f" and dtype.itemsize <= 8) or dtype.name == "bfloat16"


def float_dtype(name, value):
    """A floating-point dtype of at most 64 bits, for an output."""
    try:
        dtype = np.dtype(value)
    except Exception:  # what NumPy's parser of such texts raises
        dtype = None
    if dtype is None or not is_float(dtype):
        fail(name, repr(value), "float32, float16, float64 or bfloat16")
    return dtype


def array(name, value, rule="an array, or nested lists of equal lengths"):
    """`value` as a NumPy array; lists of integers become float32."""
    if type(value) is np.ndarray:  # nearly always; looking up the classes below takes 3 us with cold caches
        return value
    if isinstance(value, np.ndarray) and not isinstance(value, (np.ma.MaskedArray, np.matrix)):
        return value
    result = _as_array(name, value, rule)
    return result.astype(np.float32) if isinstance(value, (list, tuple)) and result.dtype.kind in "iu" else result


def _as_array(name, value, rule):
    if isinstance(value, np.ma.MaskedArray):
        fail(name, "a masked array", f"{rule}, without a mask")
    try:
        return np.asarray(value)
    except ValueError:  # nested lists of unequal lengths
        fail(name, f"{value!r:.60}", rule)
    except (RuntimeError, TypeError) as error:  # a tensor of torch that needs a gradient, or of a dtype of its own
        fail(name, f"a {type(value).__name__} that is no array to NumPy ({error!s:.100})", rule)


def floats(name, value, shape, wanted=None):
    """`value` as a C-contiguous, aligned float32 array, itself if it is one already.

    shape: lengths, with None where any length will do. wanted: the shape in words.
    """
    if is_ready(value, shape, _FLOAT32):
        return value
    return converted(shaped(name, value, shape, is_float, wanted), np.float32)


def is_ready(value, shape, dtype):
    """Whether `value` is a C-contiguous, aligned array of a shape (see `floats`) and a dtype: nothing is to be done.

    0.5 us of a call, where all of `floats` takes 3.
    """
    if type(value) is not np.ndarray or value.dtype != dtype or not _fits(value.shape, shape):
        return False
    flags = value.flags
    return flags.c_contiguous and flags.aligned


def shaped(name, value, shape, accepts, wanted=None):
    """`value` as an array of a shape (see `floats`) and of a dtype that accepts(dtype) takes."""
    value = array(name, value, wanted or _rule(shape))
    if not accepts(value.dtype):
        fail(name, describe(value), "an array of float32, float16, float64 or bfloat16")
    if not _fits(value.shape, shape):
        fail(name, describe(value), wanted or _rule(shape))
    return value


def _rule(shape):
    return "of shape " + str(shape).replace("None", "any")


def integers(name, value, shape):
    """`value` as a C-contiguous, aligned int64 array of exactly this shape."""
    if is_ready(value, shape, _INT64):
        return value
    value = _as_array(name, value, f"integers of shape {shape}")
    if value.dtype.kind not in "iu" or value.shape != shape:
        fail(name, describe(value), f"integers of shape {shape}")
    return converted(value, _INT64)


def assign(name, view, value):
    """Write `value` into a live view of weights."""
    if not view.flags.writeable:
        fail(name, "assigned", "left alone: these weights are read-only")
    view[...] = floats(name, value, view.shape)


def _fits(shape, wanted):
    if len(shape) != len(wanted):
        return False
    for i, n in enumerate(wanted):  # noqa: SIM110 - `zip` takes twice as long, `all` of a generator 0.5 us more
        if n is not None and n != shape[i]:
            return False
    return True


def writable(array):
    """The array itself, or a copy of it if it cannot be written. See `read_only`."""
    return array if array.flags.writeable else array.copy()


def read_only(array):
    """The array itself, or a view of it that cannot be written.

    Kernels are compiled for read-only inputs alone: Numba compiles once more for an array that
    happens to be writable.
    """
    if not array.flags.writeable:
        return array
    view = array.view()
    view.setflags(False)  # write=False; with the keyword the call takes 0.3 instead of 0.1 us
    return view
