"""Tokens in a file, read a batch at a time."""

import contextlib
import math
import os
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
    kinds = {".npy": _open_npy, ".safetensors": _open_safetensors}
    if path.suffix not in kinds:
        raise CheckpointError(f"{path}: the name must end in .npy or .safetensors")
    with contextlib.ExitStack() as on_failure:
        try:
            tokens = kinds[path.suffix](path, on_failure)
        except (OSError, ValueError) as error:  # ValueError: a character that no name of a file has
            raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        on_failure.pop_all()
    return tokens


class Tokens:
    """An array of shape (..., H) in a file, from the byte `offset` on; never loaded whole.

    A context that closes `file`, which has been open since its header was read: replacing it changes nothing.
    """

    def __init__(self, path, file, shape, dtype, offset, fortran=False):
        if len(shape) == 0 or shape[-1] == 0 or min(shape) < 0:
            raise CheckpointError(f"{path}: has shape {shape}, but must have shape (..., width of a token)")
        if fortran and len(shape) > 2:
            raise CheckpointError(f"{path}: is in Fortran order, which must be of at most two dimensions")
        size = offset + math.prod(shape) * dtype.itemsize
        there = os.fstat(file.fileno()).st_size
        if there < size:
            raise CheckpointError(f"{path}: is truncated, {there} of {size} bytes")
        self.shape = shape
        self._dtype = dtype
        self._offset = offset
        self._by_column = fortran and len(shape) == 2
        self._file = file

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


def _open_npy(path, on_failure):
    """The Tokens of a .npy file of floats; no other, so never a pickle."""
    file = on_failure.enter_context(open_regular(path))
    try:
        shape, fortran, dtype = _read_npy_header(file)
    except Exception as error:  # NumPy's parser raises whatever the damage leads to
        raise CheckpointError(f"{path}: is no .npy file ({error!s:.200})") from None
    if not is_float(dtype):
        raise CheckpointError(f"{path}: holds {dtype!s:.80}, but must hold float16, float32 or float64")
    return Tokens(path, file, shape, dtype, file.tell(), fortran)


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


def _open_safetensors(path, on_failure):
    """The Tokens of the one tensor of a safetensors file, or of the one called hidden_states."""
    tensors = Safetensors(path)
    names = list(tensors.entries)
    if len(names) != 1 and "hidden_states" not in names:
        raise CheckpointError(f"{path}: must hold one tensor or one called hidden_states, but holds {f'{names}':.200}")
    dtype, shape, offset = tensors.place(names[0] if len(names) == 1 else "hidden_states")
    file = on_failure.enter_context(os.fdopen(os.dup(tensors.fileno()), "rb"))
    return Tokens(path, file, shape, dtype, offset)
