"""Tokens in a file, read a batch at a time."""

import math
from pathlib import Path

import numpy as np

from ._check import is_float
from ._files import open_regular, read_into
from ._safetensors import Safetensors
from .errors import CheckpointError

#: Bytes that the header of a .npy file may have. Those that NumPy writes have 128.
MOST_HEADER = 2**16


def open_tokens(path) -> "Tokens":
    """The token file at `path`, by its suffix: .npy or .safetensors. Raises CheckpointError."""
    path = Path(path)
    kinds = {".npy": _find_npy, ".safetensors": _find_safetensors}
    if path.suffix not in kinds:
        raise CheckpointError(f"{path}: the name must end in .npy or .safetensors")
    try:
        return Tokens(path, *kinds[path.suffix](path))
    except (OSError, ValueError) as error:  # ValueError: a character that no name of a file has
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


class Tokens:
    """An array of shape (..., H) in a file, from the byte `offset` on; never loaded whole.

    A context: the file is open from the beginning to the end, and replacing it meanwhile changes nothing.
    """

    def __init__(self, path, shape, dtype, offset, fortran=False):
        if len(shape) == 0 or shape[-1] == 0 or min(shape) < 0:
            raise CheckpointError(f"{path}: has shape {shape}, but must have shape (..., width of a token)")
        if fortran and len(shape) > 2:
            raise CheckpointError(f"{path}: is in Fortran order, which must be of at most two dimensions")
        size = offset + math.prod(shape) * dtype.itemsize
        if path.stat().st_size < size:
            raise CheckpointError(f"{path}: is truncated, {path.stat().st_size} of {size} bytes")
        self.shape = shape
        self._dtype = dtype
        self._offset = offset
        self._by_column = fortran and len(shape) == 2
        self._file = open_regular(path)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def read(self, first, end):
        """Tokens first <= t < end of shape (end - first, H)."""
        width, item = self.shape[-1], self._dtype.itemsize
        if not self._by_column:
            tokens = np.empty((end - first, width), self._dtype)
            read_into(tokens, self._file, self._offset + first * width * item)
            return tokens
        columns = np.empty((width, end - first), self._dtype)
        for i, column in enumerate(columns):
            read_into(column, self._file, self._offset + (i * self.shape[0] + first) * item)
        return columns.T


def _find_npy(path):
    """(shape, dtype, offset, Fortran order) of a .npy file of floats; no other, so never a pickle."""
    with open_regular(path) as file:
        try:
            shape, fortran, dtype = _read_npy_header(file)
        except Exception as error:  # NumPy's parser raises whatever the damage leads to
            raise CheckpointError(f"{path}: is no .npy file ({error!s:.200})") from None
        if not is_float(dtype):
            raise CheckpointError(f"{path}: holds {dtype!s:.80}, but must hold float16, float32 or float64")
        return shape, dtype, file.tell(), fortran


def _read_npy_header(file):
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): (2, np.lib.format.read_array_header_1_0), (2, 0): (4, np.lib.format.read_array_header_2_0)}
    if version not in readers:
        raise ValueError(f"version {version} of the format is not known")
    digits, read = readers[version]
    start = file.tell()
    length = int.from_bytes(file.read(digits), "little")
    if length > MOST_HEADER:  # NumPy would read all of it first
        raise ValueError(f"a header of {length} bytes")
    file.seek(start)
    return read(file)


def _find_safetensors(path):
    """(shape, dtype, offset) of the one tensor of a safetensors file, or of the one called hidden_states."""
    file = Safetensors(path)
    names = list(file.entries)
    if len(names) != 1 and "hidden_states" not in names:
        raise CheckpointError(f"{path}: must hold one tensor or one called hidden_states, but holds {f'{names}':.200}")
    dtype, shape, offset = file.place(names[0] if len(names) == 1 else "hidden_states")
    return shape, dtype, offset
