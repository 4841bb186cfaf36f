"""Directories in Hugging Face format: config.json and safetensors files, of which only what is asked for is read."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from .errors import CheckpointError

#: NumPy's dtype of each of the format's floating-point dtypes.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
#: Bytes that a header or a JSON file may have. Those of published models have up to 10 MB.
MOST_JSON = 32 * 2**20
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a directory by name, and its config.

    path: directory with config.json, and model.safetensors or model.safetensors.index.json with the files
    that it names, which must lie in the directory. Raises CheckpointError.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        if (self.path / INDEX).exists():
            self._files = self._read_index()
        else:
            names = read_header(self.path / SINGLE)
            self._files = dict.fromkeys(names, SINGLE)
        self._headers = {}

    def _read_index(self):
        """File of each tensor."""
        path = self.path / INDEX
        files = read_json(path).get("weight_map")
        if not isinstance(files, dict):
            raise CheckpointError(f"{path}: must hold an object weight_map")
        for name, file in files.items():
            if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
                raise CheckpointError(f"{path}: tensor {name} is said to be in {file!r}, which is no file beside it")
        return files

    def __contains__(self, name):
        return name in self._files

    def __iter__(self):
        return iter(self._files)

    def tensor(self, name):
        """The tensor as a read-only array mapped from its file. It must be of a floating-point dtype."""
        path = self.path / self._files[name]
        if path not in self._headers:
            self._headers[path] = read_header(path)
        entry = self._headers[path].get(name)
        if entry is None:
            raise CheckpointError(f"{path}: has no tensor {name}, though the index says so")
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            known = ", ".join(DTYPES)
            raise CheckpointError(f"{path}: tensor {name} has dtype {entry.dtype}, but must have one of {known}")
        if math.prod(entry.shape) * dtype.itemsize != entry.size:
            raise CheckpointError(f"{path}: tensor {name} of {dtype} {entry.shape} has {entry.size} bytes")
        if 0 in entry.shape:
            return np.empty(entry.shape, dtype)
        return np.memmap(path, dtype, "r", entry.offset, entry.shape)


class Entry:
    """Where a tensor lies in its file."""

    __slots__ = ("dtype", "offset", "shape", "size")

    def __init__(self, fields, data, size):
        self.dtype = str(fields["dtype"])
        self.shape = tuple(fields["shape"])
        begin, end = fields["data_offsets"]
        numbers = (*self.shape, begin, end)
        if not all(type(n) is int and n >= 0 for n in numbers) or not begin <= end <= size:
            raise ValueError(f"shape {self.shape}, bytes {begin} to {end} of {size}")
        self.offset, self.size = data + begin, end - begin


def read_header(path):
    """Entry of each tensor of a safetensors file. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            total = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, MOST_JSON):
                raise ValueError(f"a header of {length} bytes in a file of {total}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        data = 8 + length
        entries = {name: Entry(fields, data, total - data) for name, fields in header.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no whole safetensors file ({error!s:.200})") from None
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset < end:
            raise CheckpointError(f"{path}: tensor {name} overlaps the one before it")
        end = entry.offset + entry.size
    return entries


def read_json(path):
    """The object in a JSON file. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_JSON + 1)
        if len(text) > MOST_JSON:
            raise ValueError(f"more than {MOST_JSON} bytes")
        values = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON ({error!s:.200})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return values
