"""Tokens in a file, read a batch at a time."""

import math
from pathlib import Path

import numpy as np

from ._check import is_float
from .errors import CheckpointError


def open_tokens(path):
    """The token file at `path`, by its suffix: .npy or .safetensors. Raises CheckpointError."""
    path = Path(path)
    kinds = {".npy": NpyTokens, ".safetensors": SafetensorsTokens}
    if path.suffix not in kinds:
        raise CheckpointError(f"{path}: the name must end in .npy or .safetensors")
    try:
        return kinds[path.suffix](path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


class NpyTokens:
    """A .npy file of float16, float32 or float64 values, shape (..., H); mapped, never loaded whole."""

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            try:
                header = self._read_header(file)
            except Exception as error:  # NumPy's parser raises whatever the damage leads to
                raise CheckpointError(f"{path}: is no .npy file ({error})") from None
            self._offset = file.tell()
        self.shape, self._fortran, self.dtype = header
        size = self._offset + math.prod(self.shape) * self.dtype.itemsize
        _check_tokens(path, self.shape, is_float(self.dtype), str(self.dtype))
        if path.stat().st_size < size:
            raise CheckpointError(f"{path}: is truncated, {path.stat().st_size} of {size} bytes")
        if self._fortran and len(self.shape) > 2:
            raise CheckpointError(f"{path}: is in Fortran order, which must be of at most two dimensions")

    @staticmethod
    def _read_header(file):
        """(shape, Fortran order, dtype)"""
        match np.lib.format.read_magic(file):
            case (1, 0):
                return np.lib.format.read_array_header_1_0(file)
            case (2, 0):
                return np.lib.format.read_array_header_2_0(file)
            case version:
                raise ValueError(f"version {version} of the format is not known")

    def read(self, first, end):
        """Tokens first <= t < end of shape (end - first, H).

        Mapped anew for each batch, so that pages already read do not count as memory in use.
        """
        width = self.shape[-1]
        item = self.dtype.itemsize
        if self._fortran and len(self.shape) == 2:
            return np.memmap(self.path, self.dtype, "r", self._offset, self.shape, order="F")[first:end]
        return np.memmap(self.path, self.dtype, "r", self._offset + first * width * item, (end - first, width))


class SafetensorsTokens:
    """The one tensor of a safetensors file, or the one called hidden_states; shape (..., H)."""

    def __init__(self, path):
        self.path = path
        with self._open() as file:
            names = list(file.keys())
            if len(names) != 1 and "hidden_states" not in names:
                raise CheckpointError(f"{path}: must hold one tensor or one called hidden_states, but holds {names}")
            self._name = names[0] if len(names) == 1 else "hidden_states"
            tensor = file.get_slice(self._name)
            self.shape = tuple(tensor.get_shape())
            _check_tokens(path, self.shape, tensor.get_dtype() in ("F16", "F32", "F64"), tensor.get_dtype())

    def _open(self):
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, framework="numpy")
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: cannot be read as safetensors ({error})") from None

    def read(self, first, end):
        """Tokens first <= t < end of shape (end - first, H)."""
        width = self.shape[-1]
        with self._open() as file:
            if len(self.shape) == 1:
                return file.get_tensor(self._name)[None][first:end]
            tensor = file.get_slice(self._name)
            run = self.shape[-2]  # tokens that lie in one piece of the last two axes
            pieces = [
                tensor[(*self._entry(start // run), slice(start % run, min(start % run + end - start, run)))]
                for start in [first, *range((first // run + 1) * run, end, run)]
            ]
        return np.concatenate([piece.reshape(-1, width) for piece in pieces])

    def _entry(self, i):
        """Slices that choose entry i, in C order, of all axes but the last two."""
        return [slice(j, j + 1) for j in map(int, np.unravel_index(i, self.shape[:-2]))] if self.shape[:-2] else []


def _check_tokens(path, shape, is_float, dtype):
    if not is_float:
        raise CheckpointError(f"{path}: holds {dtype}, but must hold float16, float32 or float64")
    if len(shape) == 0 or shape[-1] == 0 or min(shape) < 0:
        raise CheckpointError(f"{path}: has shape {shape}, but must have shape (..., width of a token)")
