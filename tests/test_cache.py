"""Compiled kernels on disk: found again, never stale, and nothing that befalls a file reaches a result."""

import errno
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from helpers import COUNT_COMPILATIONS, PACKAGE, run_python
from numba.core import caching

from moe_numba import _cache

pytestmark = pytest.mark.jit

#: route, experts_forward, and the product that two of them call
FORWARD = """
import numpy as np
from moe_numba import MoeConfig, MoeLayer
y, _ = MoeLayer(MoeConfig(3, 1, None, input_dim=4, hidden_dim=5))(np.ones((2, 4)))
assert y.shape == (2, 4)
"""
#: A kernel that compiles quickly, serial and parallel.
SOFTMAX = """
import numpy as np
from moe_numba import softmax_rows
for tokens in (1, 20_000):
    np.testing.assert_array_equal(softmax_rows(np.zeros((tokens, 4))), np.full((tokens, 4), 0.25))
"""


# ---- the stamp ----


@pytest.fixture
def package_copy(tmp_path):
    """The package's sources alone, elsewhere."""
    return shutil.copytree(PACKAGE, tmp_path / "moe_numba", ignore=shutil.ignore_patterns("__pycache__"))


def test_stamp_covers_every_source_file(package_copy, monkeypatch):
    def stamp():
        return _cache.package_stamp.__wrapped__()

    original = stamp()
    monkeypatch.setattr(_cache, "__file__", str(package_copy / "_cache.py"))
    assert stamp() == original  # of the contents, not of the place
    sources = sorted(package_copy.rglob("*.py"))
    assert len(sources) > 20
    for path in sources:
        text = path.read_bytes()
        path.write_bytes(text + b"\n# changed\n")
        assert stamp() != original, path
        path.write_bytes(text)
    (package_copy / "added.py").touch()
    assert stamp() != original
    (package_copy / "added.py").unlink()
    sources[0].rename(sources[0].with_name("renamed.py"))
    assert stamp() != original


# ---- the package's own kernels ----

COUNT_CACHED = """
from moe_numba import _jit
hits = misses = 0
for kernel in _jit.KERNELS:
    for twin in (kernel.serial, kernel.parallel):
        hits += sum(twin.stats.cache_hits.values())
        misses += sum(twin.stats.cache_misses.values())
print(hits, misses)
"""


def _run(package, code=SOFTMAX, **environment):
    """(hits, misses, what was said) of a new process."""
    printed, stderr = run_python(code + COUNT_CACHED, package.parent, **environment)
    hits, misses = map(int, printed.split())
    return hits, misses, stderr


COMPILES_NOTHING = COUNT_COMPILATIONS + FORWARD + "assert Count.compiled == 0\n"


def test_second_process_compiles_nothing(tmp_path):
    package = shutil.copytree(PACKAGE, tmp_path / "moe_numba")  # with what other tests have compiled: 20 s less
    cache = {"NUMBA_CACHE_DIR": ""}  # the package's own directories
    _run(package, FORWARD, **cache)
    assert _run(package, COMPILES_NOTHING, **cache) == (2, 0, "")
    # What kernels call by its address is compiled without them.
    for product in package.rglob("projection.project-apart.*.nbc"):
        product.write_bytes(_half(product.read_bytes()))
    assert _run(package, COUNT_COMPILATIONS + FORWARD + "assert Count.compiled > 0\n", **cache) == (2, 0, "")
    assert _run(package, COMPILES_NOTHING, **cache) == (2, 0, "")


def test_a_changed_source_is_compiled(package_copy, tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert _run(package_copy, **cache) == (0, 2, "")
    # A helper in another file than the kernels that contain it.
    with open(package_copy / "simd" / "math.py", "a") as file:
        file.write("\n# changed\n")
    assert _run(package_copy, **cache) == (0, 2, "")
    assert _run(package_copy, **cache) == (2, 0, "")


def _without_own_cache_directories(package):
    """As in an installation that the user cannot write to (file modes do not stop root)."""
    for folder in (package, *(p for p in package.iterdir() if p.is_dir())):
        (folder / "__pycache__").touch()


def test_read_only_installation_uses_the_users_cache(package_copy, tmp_path):
    _without_own_cache_directories(package_copy)
    environment = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path / "home")}
    assert _run(package_copy, **environment) == (0, 2, "")
    assert _run(package_copy, **environment) == (2, 0, "")


def test_without_any_cache_it_works_and_says_so_once(package_copy):
    _without_own_cache_directories(package_copy)
    nowhere = "/dev/null/none"
    _, _, stderr = _run(package_copy, NUMBA_CACHE_DIR="", XDG_CACHE_HOME=nowhere, HOME=nowhere)
    assert stderr.count("compiled kernels cannot be cached") == 1
    assert "NUMBA_CACHE_DIR" in stderr


def test_damaged_files_cost_a_compilation_only(package_copy, tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert _run(package_copy, **cache) == (0, 2, "")
    files = sorted((tmp_path / "cache").rglob("*.nbc"))
    assert len(files) == 2
    for path, damage in zip(files, (_half, _one_bit), strict=True):
        path.write_bytes(damage(path.read_bytes()))
    assert _run(package_copy, **cache) == (0, 2, "")
    assert _run(package_copy, **cache) == (2, 0, "")


# ---- a kernel that compiles quickly ----

SOURCE = """
from numba import prange

from moe_numba._jit import Kernel


def double(x):
    for i in prange(x.shape[0]):
        x[i] *= 2


kernel = Kernel(double)
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file with a kernel, whose cache is a directory of its own; warnings come as in a new process."""
    path = tmp_path / "package" / "double.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_cache, "_warned", False)
    return path


def _call(source, dtype=np.float32, twin="serial"):
    """(hits, misses) of a first call, as a new process makes it, that gives the right result."""
    kernel = getattr(runpy.run_path(str(source))["kernel"], twin)
    x = np.arange(5, dtype=dtype)
    kernel(x)
    np.testing.assert_array_equal(x, [0, 2, 4, 6, 8])
    return sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values())


def _files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.suffix != ".pyc")


def _half(content):
    return content[: len(content) // 2]


def _garbage(content):
    return bytes(np.random.default_rng(0).integers(0, 256, len(content), np.uint8))


def _one_bit(content):
    at = len(content) * 2 // 3
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def _no_pickle(content):
    """Whole, as far as the digest tells."""
    return _cache._digest(b"no pickle") + b"no pickle"


def _of_another(content):
    body = _cache.dumps(("another key", "another kernel"))
    return _cache._digest(body) + body


@pytest.mark.parametrize("twin", ["serial", "parallel"])
@pytest.mark.parametrize("damage", [_half, _garbage, _one_bit, _no_pickle, _of_another, lambda content: b""])
def test_a_damaged_file_is_written_anew(source, tmp_path, damage, twin):
    assert _call(source, twin=twin) == (0, 1)
    (path,) = _files(tmp_path / "cache")
    path.write_bytes(damage(path.read_bytes()))
    assert _call(source, twin=twin) == (0, 1)
    assert _call(source, twin=twin) == (1, 0)
    assert _files(tmp_path / "cache") == [path]


@pytest.mark.parametrize("option", ["OPT", "BOUNDSCHECK", "SLP_VECTORIZE"])
def test_options_that_change_the_code_have_their_own_files(source, monkeypatch, option):
    assert _call(source) == (0, 1)
    with monkeypatch.context() as changed:
        changed.setattr(numba.config, option, 1)
        assert _call(source) == (0, 1)
        assert _call(source) == (1, 0)
    assert _call(source) == (1, 0)


def test_signatures_and_twins_have_their_own_files(source, tmp_path):
    """However many processes save at once: there is no index that they share."""
    for dtype in (np.float32, np.int64):
        for twin in ("serial", "parallel"):
            assert _call(source, dtype, twin) == (0, 1)
    assert len(_files(tmp_path / "cache")) == 4
    for dtype in (np.float32, np.int64):
        for twin in ("serial", "parallel"):
            assert _call(source, dtype, twin) == (1, 0)


def test_two_versions_side_by_side_keep_their_files_and_old_ones_go(source, tmp_path, monkeypatch):
    versions = [f"version {i}" for i in range(_cache.KEPT + 3)]
    for age, version in enumerate(reversed(versions)):
        monkeypatch.setattr(_cache, "package_stamp", lambda version=version: version)
        assert _call(source) == (0, 1)
        newest = max(_files(tmp_path / "cache"), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (age, age))
    assert len(_files(tmp_path / "cache")) == 1 + _cache.KEPT
    for version in versions[:2] * 2:
        monkeypatch.setattr(_cache, "package_stamp", lambda version=version: version)
        assert _call(source) == (1, 0)


def _full_disk(path, content):
    with open(path, "wb") as file:
        file.write(content[:1000])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _interrupted(path, content):
    path.touch()
    raise KeyboardInterrupt


def test_a_full_disk_is_one_warning_and_no_file(source, tmp_path, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", _full_disk)
        with pytest.warns(RuntimeWarning, match="cannot be cached.*No space left"):
            assert _call(source) == (0, 1)
        assert _call(source, np.int64) == (0, 1)  # without a warning, which would be an error
    assert _files(tmp_path / "cache") == []
    assert _call(source) == (0, 1)
    assert _call(source) == (1, 0)


def test_an_interrupted_save_leaves_no_file(source, tmp_path, monkeypatch):
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Path, "write_bytes", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            _call(source)
    assert _files(tmp_path / "cache") == []
    assert _call(source) == (0, 1)


@pytest.mark.parametrize("what", ["file", "below a file", "missing"])
def test_an_odd_cache_directory(source, tmp_path, monkeypatch, what):
    """Created if it can be; otherwise the kernel's own directory serves."""
    (tmp_path / "file").write_text("here first")
    odd = {"file": "file", "below a file": "file/cache", "missing": "a/b/c"}[what]
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / odd))
    assert _call(source) == (0, 1)
    assert _call(source) == (1, 0)
    assert (tmp_path / "file").read_text() == "here first"
    used = tmp_path / odd if what == "missing" else source.parent / "__pycache__"
    assert len(_files(used)) == 1


def _cannot_write(*args, **kwargs):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_an_image_warmed_up_by_root_serves_a_user_who_can_write_nowhere(source, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    assert _call(source) == (0, 1)
    monkeypatch.setattr(caching.tempfile, "TemporaryFile", _cannot_write)  # what Numba tries in a directory
    assert _call(source) == (1, 0)
    kernel = runpy.run_path(str(source))["kernel"]
    assert kernel.serial.stats.cache_path is None
    with pytest.warns(RuntimeWarning, match="cannot be cached.*Permission denied"):
        assert _call(source, np.int64) == (0, 1)  # which the image lacks


def test_an_image_warmed_up_by_root_serves_a_user_with_a_cache(source, tmp_path, monkeypatch):
    with monkeypatch.context() as root:
        root.setattr(numba.config, "CACHE_DIR", "")
        assert _call(source) == (0, 1)
    assert _call(source) == (1, 0)
    assert _call(source, np.int64) == (0, 1)
    assert len(_files(tmp_path / "cache")) == 1


def test_recompiling_forgets_the_files(source, tmp_path):
    assert _call(source) == (0, 1)
    kernel = runpy.run_path(str(source))["kernel"].serial
    kernel(np.ones(1, np.float32))
    kernel._cache.flush()
    assert _files(tmp_path / "cache") == []


def test_many_processes_that_start_cold_at_once(source, tmp_path):
    """Half of them want another signature first; what any of them saved serves the next one."""
    code = """
import sys, numpy as np
from double import kernel
kernel = kernel.serial
for dtype in sys.argv[1:]:
    x = np.arange(5, dtype=dtype)
    kernel(x)
    assert x.tolist() == [0, 2, 4, 6, 8]
print(sum(kernel.stats.cache_hits.values()))
"""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(source.parent)]),
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-c", code]
    orders = [("f4", "i8"), ("i8", "f4")] * 3
    processes = [subprocess.Popen([*command, *order], env=environment, stdout=subprocess.PIPE) for order in orders]
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0] * len(orders)
    assert len(_files(tmp_path / "cache")) == 2
    for order in orders[:2]:
        assert subprocess.check_output([*command, *order], env=environment, text=True) == "2\n"
