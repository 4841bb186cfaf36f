"""Compilation: when, how often, and what the cache does."""

import shutil

import pytest
from helpers import PACKAGE, run_python

from moe_numba import _jit

pytestmark = pytest.mark.jit

COUNT_COMPILATIONS = """
from numba.core import event
class Count(event.Listener):
    compiled = 0
    def on_start(self, event_): Count.compiled += 1
    def on_end(self, event_): pass
event.register("numba:compile", Count())
"""

SMALL_FORWARD = """
import numpy as np
from moe_numba import MoeConfig, MoeLayer
y, _ = MoeLayer(MoeConfig(3, 1, None, input_dim=4, hidden_dim=5))(np.ones((2, 4)))
assert y.shape == (2, 4)
"""


def test_importing_compiles_nothing():
    printed, _ = run_python(COUNT_COMPILATIONS + "import moe_numba\nprint(Count.compiled)")
    assert printed == "0\n"


MANY_KINDS_OF_INPUT = """
import copy, itertools, pickle
import ml_dtypes, numpy as np, moe_numba
from moe_numba import *
from moe_numba import _jit, threads
from moe_numba.config import ACTIVATIONS

def read_only(a):
    a = np.array(a)
    a.flags.writeable = False
    return a

def unaligned(a):
    view = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view

rng = np.random.default_rng(0)
dtypes = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
layouts = (np.array, np.asfortranarray, lambda a: a[::-1], lambda a: a[::2, ::-1][:, ::-1], read_only, unaligned)
for threads.SERIAL_BELOW in (0, 10**18):
    for activation, bias in itertools.product(ACTIVATIONS, (True, False)):
        MoeLayer(MoeConfig(3, 2, None, 0.0, 4, 5, activation=activation, bias=bias))(np.ones((3, 4)))
    for capacity, noise, overflow, k in itertools.product((None, 0.5, 1e9), (0.0, 1.0), ("next", "drop"), (1, 3)):
        MoeLayer(MoeConfig(3, k, capacity, noise, 4, 5, overflow=overflow))(np.ones((9, 4)))
    layer = MoeLayer(MoeConfig(3, 2, None, 0.0, 4, 5))
    for dtype, layout in itertools.product(dtypes, layouts):
        x = layout(rng.standard_normal((6, 4)).astype(dtype))
        layer(x), layer(x[:0]), layer(x[:1]), layer(x[0]), layer(x[:, None]), layer.router.route(x)
        layer.experts[1].forward_batch(x), softmax_rows(x)
    arrays = {
        "router_weight": rng.standard_normal((3, 4)),
        "up_proj": rng.standard_normal((3, 5, 4)),
        "down_proj": rng.standard_normal((3, 4, 5)),
        "up_bias": rng.standard_normal((3, 5)),
        "down_bias": rng.standard_normal((3, 4)),
    }
    for dtype, layout in itertools.product(dtypes, (np.array, np.asfortranarray, read_only, unaligned)):
        converted = {name: layout(a.astype(dtype)) for name, a in arrays.items()}
        MoeLayer.from_weights(layer.config, **converted)(np.ones((3, 4)))
    %(extra)s

for kernel in _jit.KERNELS:
    print(kernel.__name__, len(kernel.serial.signatures), len(kernel.parallel.signatures))
"""

#: What else users do with the same kernels; each in the loop above.
EXTRAS = {
    "nothing else": "pass",
    "copies": "copy.deepcopy(layer)(np.ones((3, 4))); pickle.loads(pickle.dumps(layer))(np.ones((3, 4)))",
    "own routing": """
    own_layouts = (np.array, np.asfortranarray, read_only, unaligned)
    for layout, ids in itertools.product(own_layouts, ("int32", "int64", "uint64")):
        weights = layout(rng.random((6, 2)).astype(np.float32))
        chosen = layout(rng.integers(0, 3, (6, 2)).astype(ids))
        x = rng.standard_normal((6, 4))
        fused_experts(x, layer.experts.up, layer.experts.down, weights, chosen, "relu")
""",
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_kernel_is_compiled_once_whatever_the_input(extra):
    printed, _ = run_python(MANY_KINDS_OF_INPUT % {"extra": EXTRAS[extra]})
    signatures = {name: (int(serial), int(parallel)) for name, serial, parallel in map(str.split, printed.splitlines())}
    assert signatures == {
        "experts_forward": (1, 1),
        "experts_forward_amx": (0, 0),  # of bfloat16 weights
        "plan_rows": (1, 0),  # never parallel
        "route": (1, 1),
        "softmax_rows": (1, 1),
    }


# ---- the stamp ----


@pytest.fixture
def package_copy(tmp_path):
    """The package's sources alone, elsewhere."""
    root = tmp_path / "moe_numba"
    shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def test_stamp_covers_every_source_file(package_copy, monkeypatch):
    def stamp():
        return _jit.package_stamp.__wrapped__()

    original = stamp()
    monkeypatch.setattr(_jit, "__file__", str(package_copy / "_jit.py"))
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


@pytest.mark.parametrize("option", ["OPT", "BOUNDSCHECK"])
def test_stamp_covers_options_that_change_the_code(monkeypatch, option):
    original = _jit.package_stamp.__wrapped__()
    monkeypatch.setattr(_jit.config, option, 7)
    assert _jit.package_stamp.__wrapped__() != original


# ---- the cache ----

COUNT_CACHED = """
from moe_numba import _jit
hits = misses = 0
for kernel in _jit.KERNELS:
    for twin in (kernel.serial, kernel.parallel):
        hits += sum(twin.stats.cache_hits.values())
        misses += sum(twin.stats.cache_misses.values())
print(hits, misses)
"""


def _forward(package, **environment):
    printed, stderr = run_python(SMALL_FORWARD + COUNT_CACHED, package.parent, **environment)
    hits, misses = map(int, printed.split())
    return hits, misses, stderr


def test_second_process_compiles_nothing_until_a_source_changes(package_copy, tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    hits, misses, _ = _forward(package_copy, **cache)
    assert hits == 0
    assert misses == 3  # route, plan_rows, experts_forward
    assert _forward(package_copy, **cache)[:2] == (3, 0)
    # A helper in another file than the kernels that contain it.
    with open(package_copy / "simd" / "math.py", "a") as file:
        file.write("\n# changed\n")
    assert _forward(package_copy, **cache)[:2] == (0, 3)


def _without_own_cache_directories(package):
    """As in an installation that the user cannot write to (file modes do not stop root)."""
    for folder in (package, *(p for p in package.iterdir() if p.is_dir())):
        (folder / "__pycache__").touch()


def test_read_only_installation_uses_the_users_cache(package_copy, tmp_path):
    _without_own_cache_directories(package_copy)
    environment = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path / "home")}
    assert _forward(package_copy, **environment) == (0, 3, "")
    assert _forward(package_copy, **environment) == (3, 0, "")


def test_without_any_cache_it_works_and_says_so_once(package_copy):
    _without_own_cache_directories(package_copy)
    nowhere = "/dev/null/none"
    _, _, stderr = _forward(package_copy, NUMBA_CACHE_DIR="", XDG_CACHE_HOME=nowhere, HOME=nowhere)
    assert stderr.count("compiled kernels cannot be cached") == 1
    assert "NUMBA_CACHE_DIR" in stderr


# ---- the twins ----


def test_kernels_keep_their_names_and_documentation():
    names = [kernel.__name__ for kernel in _jit.KERNELS]
    assert len(names) == len(set(names))
    for kernel in _jit.KERNELS:
        assert kernel.__doc__
        assert kernel.serial.py_func is kernel.parallel.py_func
        for twin in (kernel.serial, kernel.parallel):
            assert twin.targetoptions["nogil"] is True
            assert twin.targetoptions["fastmath"] is False
