"""Files that are whole or absent, and tensors in them."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from pathlib import Path

import numpy as np

from .errors import CheckpointError


def output_path(path):
    """The file that an output is to become: of a link the one behind it. CheckpointError if it can be none."""
    try:
        path = Path(os.path.realpath(path))
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return path
    except (OSError, ValueError) as error:  # ValueError: a character that no name of a file has
        raise CheckpointError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(kind):  # a device or a pipe would be replaced, too
        raise CheckpointError(f"{path}: cannot be written ({'is a directory' if stat.S_ISDIR(kind) else 'is no file'})")
    return path


@contextlib.contextmanager
def replacing(path):
    """An open binary file beside `path` that takes its place when the block ends without an exception.

    Otherwise it is removed and `path` is left as it was. Raises CheckpointError if it cannot be
    written.
    """
    path = output_path(path)
    temporary = None
    try:
        # Named before it is there: a signal may come between any two lines.
        temporary = path.with_name(f".{secrets.token_hex(8)}.part")
        with open(temporary, "xb") as file:
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


def open_regular(path):
    """A file opened for reading. OSError if it is a pipe or a device, which may wait or never end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is no regular file")
    return file


def read_into(array, file, offset):
    """Fill a C-contiguous array with the bytes of a file from `offset` on.

    Read and not mapped: of a file that has become shorter this is an error, where touching a mapped page
    would end the process. Raises CheckpointError.
    """
    memory = array.reshape(-1).view(np.uint8)
    try:
        file.seek(offset)
        found = file.readinto(memory)
    except OSError as error:
        raise CheckpointError(f"{file.name}: cannot be read ({error.strerror or error})") from None
    if found != memory.size:
        raise CheckpointError(
            f"{file.name}: has become shorter, {offset + found} of {offset + memory.size} bytes are left"
        )
