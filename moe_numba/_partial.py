"""An output that may be continued: what is written so far, and a record of how far that is."""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

from ._files import output_path
from .errors import CheckpointError

_RECORD = "record.json"


def _directory_of(path):
    return path.with_name(path.name + ".part")


def is_kept(path):
    """Whether a run has left something to continue beside the output `path`."""
    return (_directory_of(Path(os.path.realpath(path))) / _RECORD).exists()


class Partial:
    """The directory OUTPUT.part, which holds `data` and `record.json` until the output is whole.

    identity: a dict of what the output is made from. Entering raises CheckpointError if the directory was
    begun with another. `progress` is what was last saved, or None; `file` is open at the place where it
    was. Leaving without an exception puts the data in the output's place and removes the directory; with
    one, or if the process is killed, the directory stays as it was last saved.
    """

    def __init__(self, path, identity):
        self.path = output_path(path)
        self.directory = _directory_of(self.path)
        self._record = self.directory / _RECORD
        self._identity = identity
        self.progress = None

    def __enter__(self):
        with self._errors(), contextlib.ExitStack() as on_failure:
            self.directory.mkdir(exist_ok=True)
            self.file = open(os.open(self.directory / "data", os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            on_failure.callback(self.file.close)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however
            except OSError:
                raise CheckpointError(f"{self.directory}: another run is writing there") from None
            if not self._is_ours():
                raise CheckpointError(f"{self.directory}: another run has just ended there")
            self.file.truncate(self._continue() if self._record.exists() else 0)
            self.file.seek(0, os.SEEK_END)
            on_failure.pop_all()
        return self

    def _is_ours(self):
        """Whether the file that we hold is still the data, and not the output that another run has made of it."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.directory / "data"))
        except FileNotFoundError:
            return False

    def _continue(self):
        """Take the record up; return the size of the data that it vouches for."""
        there = self.file.seek(0, os.SEEK_END)
        if there == 0:  # a run was killed after its data had become the output, and before the record was removed
            self._record.unlink()
            return 0
        try:
            record = json.loads(self._record.read_text())
            size, self.progress, known = record["size"], dict(record["progress"]), dict(record["identity"])
            if type(size) is not int or size <= 0:
                raise ValueError(f"size {size!s:.20}")
            if size > there:
                raise ValueError("the data is shorter than it says")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self.damaged(error) from None
        for name, value in self._identity.items():
            if known.get(name) != value:
                raise CheckpointError(
                    f"{self.directory}: belongs to another run, whose {name} was {known.get(name)!s:.80} "
                    f"and not {value!s:.80}; {self._remedy}"
                )
        return size

    @property
    def _remedy(self):
        return f"run with what it was begun with, or remove {self.directory} to begin anew"

    def damaged(self, why):
        """The error to raise of a record that makes no sense."""
        return CheckpointError(f"{self._record}: is damaged ({why!s:.80}); {self._remedy}")

    def refuse(self, what):
        """Say that the data was made from something else after all."""
        raise CheckpointError(f"{self.directory}: belongs to another run, whose {what} differs; {self._remedy}")

    def save(self, progress):
        """Vouch for what is written so far. The data reaches the disk before the record that speaks of it."""
        with self._errors():
            self.file.flush()
            os.fsync(self.file.fileno())
            record = {"identity": self._identity, "size": self.file.tell(), "progress": progress}
            new = self._record.with_suffix(".new")
            with open(new, "w") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self._record)

    def __exit__(self, kind, error, trace):
        with self._errors(), self.file:
            if kind is not None:
                if not self._record.exists():  # before others may begin here
                    self._remove()
                with contextlib.suppress(OSError):  # a full disk; the record does not speak of these bytes
                    self.file.close()
                if isinstance(error, OSError):
                    raise error
                return
            self.file.flush()
            os.fsync(self.file.fileno())
            if self.path.exists():
                shutil.copymode(self.path, self.directory / "data")
            os.replace(self.directory / "data", self.path)
            self._remove()

    def _remove(self):
        """Remove what is ours, and the directory if that was all."""
        with contextlib.suppress(OSError):
            for name in ("data", self._record.name, self._record.with_suffix(".new").name):
                (self.directory / name).unlink(missing_ok=True)
            self.directory.rmdir()

    @contextlib.contextmanager
    def _errors(self):
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({error.strerror or error})") from error
