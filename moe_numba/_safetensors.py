"""Safetensors files read by ourselves: checked before a byte is believed, and only what is asked for.

A file is eight bytes of length, a JSON object of that length that says where each tensor lies, and the
tensors, end to end. https://huggingface.co/docs/safetensors
"""

import json
import math
import weakref

import ml_dtypes
import numpy as np

from ._aligned import aligned_empty
from ._files import open_regular, read_into
from .errors import CheckpointError

#: NumPy's dtype of each of the format's floating-point dtypes.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
#: Bytes that a header or a JSON file may have. Those of published models have up to 10 MB.
MOST_JSON = 16 * 2**20
#: Axes of a tensor, and its values if those axes that are 0 were 1, at most: less than NumPy refuses.
MOST_AXES, MOST_VALUES = 32, 2**59
#: Bytes of JSON whose entries may be as short as they like.
LEAST_DENSE = 2**20


class Entry:
    """Where a tensor lies in its file."""

    __slots__ = ("dtype", "offset", "shape", "size")

    def __init__(self, fields, data, size):
        self.dtype = str(fields["dtype"])
        self.shape = tuple(fields["shape"])
        if len(self.shape) > MOST_AXES:
            raise ValueError(f"a shape of {len(self.shape)} axes")
        begin, end = fields["data_offsets"]
        numbers = (*self.shape, begin, end)
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or not begin <= end <= size:
            raise ValueError(f"shape {self.shape!s:.80}, bytes {begin} to {end} of {size}")
        if math.prod(max(n, 1) for n in self.shape) > MOST_VALUES:
            raise ValueError(f"shape {self.shape!s:.80}")
        self.offset, self.size = data + begin, end - begin


class Safetensors:
    """The header of a file: `entries` by name, and `metadata`. Raises CheckpointError.

    The file is open as long as this object is there, so that all tensors are of the same file if it is replaced.
    """

    def __init__(self, path):
        self.path = path
        try:
            self._file = file = open_regular(path)
            weakref.finalize(self, file.close)
            total = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, MOST_JSON):
                raise ValueError(f"a header of {length} bytes in a file of {total}")
            header = parse_json(file.read(length))
            metadata = header.pop("__metadata__", None)
            self.metadata = metadata if isinstance(metadata, dict) else {}
            data = 8 + length
            self.entries = {name: Entry(fields, data, total - data) for name, fields in header.items()}
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: is no safetensors file, or a damaged one ({error!s:.200})") from None
        self._check_places(data, total)

    def _check_places(self, end, total):
        """Tensors must fill the file, one after the other."""
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].offset, item[1].size)):
            if entry.offset != end:
                where = "overlaps the one before it" if entry.offset < end else "leaves a gap after the one before it"
                raise CheckpointError(f"{self.path}: tensor {name:.200} {where}")
            end = entry.offset + entry.size
        if end != total:
            raise CheckpointError(
                f"{self.path}: is no safetensors file, or a damaged one ({total - end} bytes after the last tensor)"
            )

    def fileno(self):
        """Descriptor of the open file."""
        return self._file.fileno()

    def place(self, name):
        """(dtype, shape, place of the first byte) of a tensor, which must be of a floating-point dtype."""
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            known = ", ".join(DTYPES)
            raise CheckpointError(
                f"{self.path}: tensor {name:.200} has dtype {entry.dtype:.20}, but must have one of {known}"
            )
        if math.prod(entry.shape) * dtype.itemsize != entry.size:
            shape = f"{entry.shape!s:.80}"
            raise CheckpointError(f"{self.path}: tensor {name:.200} of {dtype} {shape} has {entry.size} bytes")
        return dtype, entry.shape, entry.offset

    def read(self, name):
        """A copy of a tensor that begins on a cache line."""
        dtype, shape, offset = self.place(name)
        array = aligned_empty(shape, dtype)
        read_into(array, self._file, offset)
        return array

    def map(self, name):
        """The tensor as a read-only array mapped from its file."""
        dtype, shape, offset = self.place(name)
        if 0 in shape:
            return np.empty(shape, dtype)
        try:
            return np.memmap(self._file, dtype, "r", offset, shape)
        except (OSError, ValueError) as error:  # a file system that cannot, or a file that has become shorter
            raise CheckpointError(f"{self.path}: cannot be mapped ({error!s:.200})") from None


def parse_json(text):
    """The values of JSON in which no object says anything twice. Raises ValueError or RecursionError."""
    # An entry of a header or an index has a name and takes about a hundred bytes; megabytes of `{},` or
    # `0,` would become gigabytes of Python objects.
    if len(text) > LEAST_DENSE and (text.count(b",") > len(text) // 16 or text.count(b"{") > len(text) // 32):
        raise ValueError(f"{len(text)} bytes of JSON with entries of a few bytes each")
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs):
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object with {next(n for n in names if names.count(n) > 1)!r:.80} twice")
    return values
