"""Compilation: when and how often."""

import numpy as np
import pytest
from helpers import COUNT_COMPILATIONS, run_python
from numba import njit, types

from moe_numba import _jit
from moe_numba.simd.calls import call
from moe_numba.simd.vector import Floats, load, pointer, splat, store

pytestmark = pytest.mark.jit


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
print("project", _jit._compiled_apart.cache_info().currsize, 0)
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
        "experts_forward_amx_transposed": (0, 0),
        "project": (1, 0),  # called by its address
        "route": (1, 1),
        "softmax_rows": (1, 1),
    }


_WARM = """
import numpy as np
from moe_numba import MoeConfig, MoeLayer, _warmup
_warmup.warmup()
warm = _warmup._loaded()
for options in ({}, {"dtype": "bfloat16"}, {"transposed": True}, {"logit_softcap": 3.0, "router_bias": True}):
    layer = MoeLayer(MoeConfig(**options))
    for tokens in (1, 3000):
        layer.forward(np.ones((tokens, 64), np.float32))
assert _warmup._loaded() == warm
assert _warmup.warmup() == 0
"""
#: The shared gate has a router with rules, and the least to do.
_PREPARED = """
import numpy as np
from moe_numba import MoeConfig, MoeLayer, _warmup, threads
threads.SERIAL_BELOW = _warmup.SERIAL_BELOW = 10_000
layer = MoeLayer(MoeConfig(shared_hidden_dim=32, shared_gate=True, capacity_factor=0.5, overflow="drop"))
for tokens in (1, 300):
    _warmup.prepare(layer, tokens)
    prepared = _warmup._loaded()
    layer.forward(np.random.default_rng(1).standard_normal((tokens, 64), np.float32))
    assert _warmup._loaded() == prepared
"""


@pytest.mark.parametrize("code", [_WARM, _PREPARED], ids=["warmup", "prepare"])
def test_what_is_compiled_ahead_is_all_that_is_wanted(code):
    run_python(code)


# ---- calls by address ----


@_jit.helper
def _add_to_first(x, n, m):
    store(load(x, 0, 1) + splat(np.float32(n + 10 * m)), x, 0, 1)


@njit
def _call_twice(address, x, n):
    call(address, pointer(x, 0), n, 1)
    call(address, pointer(x, 1), 2 * n, n)


def test_a_helper_is_called_by_its_address():
    address = _jit.address_of(_add_to_first, Floats, types.int64, types.int64)
    assert address == _jit.address_of(_add_to_first, Floats, types.int64, types.int64)
    x = np.zeros(3, np.float32)
    _call_twice(address, x, np.int32(3))  # every integer is passed as int64
    np.testing.assert_array_equal(x, [13, 36, 0])


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


def test_other_functions_compile_beside_the_package_whatever_their_module():
    """One made by `exec` has none; whoever tells the user of compilations is told of this one, too."""
    code = """
import numba, moe_numba
made = {}
exec("def double(x): return 2 * x", {"__builtins__": {}}, made)
assert made["double"].__module__ is None
print(numba.njit(made["double"])(21))
"""
    assert run_python(code)[0] == "42\n"
