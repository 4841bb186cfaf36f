"""Compiled kernels on disk: where they lie, how a file is known to be whole and current.

Numba's own files (`numba.core.caching.IndexDataCacheFile`) do not fit, as its source shows (Numba 0.68): a
truncated file raises from the call that wanted the kernel, a changed byte crashes it, a full disk raises although the
kernel has been compiled, helpers in other files are not part of the stamp, and processes that save different
signatures of a kernel at once can give both the same name, so that one loads the other's machine code.
"""

import contextlib
import hashlib
import os
import pickle
import secrets
import warnings
from functools import lru_cache
from pathlib import Path

import llvmlite
import numba
from numba import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, InTreeCacheLocator
from numba.core.serialize import dumps

#: Files of other versions of the package that are kept beside this one's: a kernel has one signature or two (float32
#: and bfloat16), serial and parallel apart, so some versions.
KEPT = 8
DIGEST_SIZE = 16


@lru_cache
def package_stamp() -> str:
    """Hash of every source file of the package.

    The machine code of a kernel contains the helpers that it calls from other files.
    """
    root = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build_key() -> tuple:
    """What else changes machine code, beside sources, signature and processor."""
    options = ("OPT", "BOUNDSCHECK", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT")
    values = tuple(getattr(config, name, None) for name in options)
    return (numba.__version__, llvmlite.__version__, *values)


class _NowhereToWrite(InTreeCacheLocator):
    """The package's own directory although it cannot be written: an image may have been warmed up in it."""

    @classmethod
    def from_function(cls, py_func, py_file):
        return cls(py_func, py_file) if os.path.exists(py_file) else None


class _Impl(CompileResultCacheImpl):
    _locator_classes = (*CompileResultCacheImpl._locator_classes, _NowhereToWrite)


class KernelCache(FunctionCache):
    """The cache of one twin of a kernel. What goes wrong in it costs a compilation, never a result."""

    _impl_class = _Impl

    def __init__(self, function, twin):
        super().__init__(function)
        source = Path(function.__code__.co_filename)
        of_file = self._impl.locator.get_source_stamp()  # tests and benchmarks have kernels outside the package
        self._cache_file = _KernelFiles(
            [Path(self._cache_path), source.parent / "__pycache__"],
            f"{source.stem}.{function.__name__}-{twin}",
            _digest(f"{package_stamp()} {of_file}".encode()).hex(),
            function.__code__.co_firstlineno,
        )

    @property
    def cache_path(self):
        """Directory to which kernels are written, or None."""
        return None if isinstance(self._impl.locator, _NowhereToWrite) else self._cache_path

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever a pickle can raise: compiled again, it is written over
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:
            warn_uncached(error)


class _KernelFiles:
    """A file for every (version of the sources, signature, processor): a digest, then what Numba pickled.

    directories: where files are looked for; they are written to the first.
    """

    def __init__(self, directories, name, stamp, line):
        self._directories = directories
        self._name = name
        self._stamp = stamp
        self._line = line  # two functions of one name may have the same bytecode

    def _file_name(self, key):
        digest = _digest(repr((key, build_key(), self._line)).encode())
        return f"{self._name}.{self._stamp}-{digest.hex()}.nbc"

    def load(self, key):
        """What was saved under `key`, or None."""
        for directory in self._directories:
            with contextlib.suppress(OSError):
                content = (directory / self._file_name(key)).read_bytes()
                digest, body = content[:DIGEST_SIZE], content[DIGEST_SIZE:]
                if digest == _digest(body):
                    saved_under, data = pickle.loads(body)
                    if saved_under == key:
                        return data
        return None

    def save(self, key, data):
        """Save under `key`; raises OSError."""
        body = dumps((key, data))
        path = self._directories[0] / self._file_name(key)
        part = path.with_suffix(f".{secrets.token_hex(8)}.part")
        try:
            part.write_bytes(_digest(body) + body)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self._remove_old(path.parent)

    def _remove_old(self, directory):
        """Remove files of this kernel that belong to versions of the sources long gone."""
        current = f"{self._name}.{self._stamp}"
        dated = []
        for path in directory.glob(f"{self._name}.*"):
            with contextlib.suppress(OSError):  # another process may have removed it
                if not path.name.startswith(current):
                    dated.append((path.stat().st_mtime, path))
        for _, path in sorted(dated, reverse=True)[KEPT:]:
            with contextlib.suppress(OSError):
                path.unlink()

    def flush(self):
        """Remove everything of this kernel; Numba's `recompile` asks for it."""
        for path in self._directories[0].glob(f"{self._name}.*"):
            path.unlink(missing_ok=True)


def _digest(body):
    return hashlib.blake2b(body, digest_size=DIGEST_SIZE).digest()


_warned = False


def warn_uncached(reason):
    """Say once that kernels cannot be saved, whichever they are."""
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"moe_numba: compiled kernels cannot be cached, every process will compile them again ({reason}); "
        "set NUMBA_CACHE_DIR to a directory that can be written",
        RuntimeWarning,
        stacklevel=2,
    )
