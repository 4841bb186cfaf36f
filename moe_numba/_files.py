"""Files that are whole or absent, and tensors in them."""

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path

import numpy as np

from ._aligned import aligned_copy
from .errors import CheckpointError


@contextlib.contextmanager
def replacing(path):
    """An open binary file beside `path` that takes its place when the block ends without an exception.

    Otherwise it is removed and `path` is left as it was. Raises CheckpointError if it cannot be
    written.
    """
    path = Path(os.path.realpath(path))  # the file behind a link, not the link
    temporary = None
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        name = path.with_name(f".{secrets.token_hex(8)}.part")
        with open(name, "xb") as file:
            temporary = name
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_tensors(path, tensors, metadata):
    """Write arrays by name, and text by name, as a safetensors file."""
    from safetensors.numpy import save

    with replacing(path) as file:
        file.write(save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, metadata))


def read_tensors(path):
    """(arrays by name, metadata) of a safetensors file. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118
                array = file.get_tensor(name)
                tensors[name] = aligned_copy(array, array.dtype)
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from None
