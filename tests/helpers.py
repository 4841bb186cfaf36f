"""What several tests need: layers with every weight random, comparisons, other processes."""

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numba
import numpy as np
from numba import njit

import moe_numba
from moe_numba import MoeConfig, MoeLayer, reference
from moe_numba.config import ACTIVATIONS

PACKAGE = Path(moe_numba.__file__).parent
ALL_ACTIVATIONS = sorted(ACTIVATIONS)
TOLERANCE = 2e-5


def compiled(function):
    """`function` compiled by Numba; without the JIT as silent about infinities as compiled code."""
    return np.errstate(all="ignore")(njit(function))


def fewer(n):
    """n, and without the JIT, where each takes a hundred times as long, a twentieth of it."""
    return n // 20 if numba.config.DISABLE_JIT else n


def random_array(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def random_layer(seed=0, **config):
    """A layer whose biases are random too (fresh ones are zero)."""
    layer = MoeLayer(MoeConfig(**config), seed=seed)
    rng = np.random.default_rng(seed)
    if layer.config.bias:
        for bias in (layer.experts.up_bias, layer.experts.down_bias):
            bias[...] = random_array(rng, *bias.shape)
    return layer


def experts_reference(experts, x, indices, weights, used):
    """reference.experts_forward with the weights of an Experts."""
    up, biases = np.concatenate(experts.projections, axis=1), (None, None)
    if experts.up_bias is not None:
        biases = (np.concatenate(experts.projection_biases, axis=1), experts.down_bias)
    options = {name: experts._options[f"swiglu_{name}"] for name in ("limit", "alpha", "beta")}
    swiglu = options if experts.activation == "swiglu" else {}
    return reference.experts_forward(
        x, indices, weights, used, experts.activation, up, experts.down_projection, *biases, **swiglu
    )


def layer_reference(layer, x, routing):
    """What `layer` must give for x (T, H), given the routing that it chose."""
    return experts_reference(
        layer.experts, x, routing.expert_indices, routing.expert_weights.astype(np.float64), routing.slots_used
    )


def block_reference(layer, x, routing, operand=lambda x: x):
    """The whole block in float64, given the routing; `operand` rounds what experts multiply, as their format does."""
    config = layer.config
    indices, weights = routing.expert_indices, np.float64(routing.expert_weights)
    if config.apply_router_weight_on_input:
        slots = (
            experts_reference(
                layer.experts,
                operand(x * weights[:, k : k + 1]),
                indices[:, k : k + 1],
                np.ones((len(x), 1)),
                np.ones(len(x), int),
            )
            for k in range(config.top_k)
        )
        lost = np.arange(config.top_k) >= routing.slots_used[:, None]
        y = sum(np.where(lost[:, k : k + 1], 0, slot) for k, slot in enumerate(slots))
    else:
        y = layer_reference(layer, operand(x), routing)
    for k in range(config.top_k):
        identity = indices[:, k] >= config.num_experts
        y[identity] += weights[identity, k : k + 1] * x[identity]
    if layer.shared_experts is not None:
        zeros, ones = np.zeros((len(x), 1), int), np.ones(len(x), int)
        gate = np.ones((len(x), 1))
        if layer.shared_gate is not None:
            gate = reference.sigmoid(np.float64(x) @ np.float64(layer.shared_gate.weight[0]))[:, None]
        y += experts_reference(layer.shared_experts, operand(x), zeros, gate, ones)
    return y


def as_bfloat16(x):
    """x rounded to bfloat16, as float32."""
    return np.float32(x).astype(ml_dtypes.bfloat16).astype(np.float32)


def assert_close(actual, expected, tolerance=TOLERANCE, least=1e-30):
    """Equal shapes, and differences below `tolerance` times the largest magnitude, but at least `least`."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    scale = max(np.abs(expected).max(initial=0.0), least)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def assert_same_bits(actual, expected):
    """Equal to the last bit, NaN included."""
    actual, expected = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)
    if not np.isnan(actual).any():  # which NaN is not part of the promise
        assert actual.tobytes() == expected.tobytes()


def assert_routing(result, top_k, capacity_factor, overflow):
    """`result` is what reference.select makes of the very probabilities in it."""
    tokens, experts = result.routing_probs.shape
    capacity = None
    if capacity_factor is not None:
        capacity = reference.capacity_limit(tokens, top_k, experts, capacity_factor)
    indices, weights, counts, used = reference.select(result.routing_probs, top_k, capacity, overflow)
    np.testing.assert_array_equal(result.expert_indices, indices)
    np.testing.assert_array_equal(result.slots_used, used)
    np.testing.assert_array_equal(result.expert_counts, counts)
    np.testing.assert_allclose(result.expert_weights, weights, rtol=1e-6, atol=0)
    assert result.num_dropped == (0 if capacity is None else np.count_nonzero(used == 0))


def assert_same_routing(result, expected):
    """`result` is what the specification says: choices and counts exactly, weights and scores rounded."""
    for name in ("expert_indices", "slots_used", "expert_counts", "num_dropped"):
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name))
    for name in ("expert_weights", "routing_probs"):
        np.testing.assert_allclose(getattr(result, name), getattr(expected, name), rtol=1e-5, atol=1e-9)


def guarded_copy(array):
    """A copy whose last byte is the last of a page, with a page behind it that cannot be read."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    no_access = 0
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), no_access) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


def unaligned(x):
    memory = np.empty(x.nbytes + 1, np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def off_the_cache_line(x):
    memory = np.empty(x.size + 1, x.dtype)
    memory[1:] = x.ravel()
    return memory[1:].reshape(x.shape)


def read_only(x):
    copy = x.copy()
    copy.flags.writeable = False
    return copy


def mapped(x):
    """A copy in a file without a name, mapped read-only."""
    if x.size == 0:  # a file of no bytes cannot be mapped
        return x
    with tempfile.TemporaryFile() as file:
        file.write(x.tobytes())
        file.flush()
        return np.memmap(file, x.dtype, "r", shape=x.shape)


#: Ways in which an array of at least one dimension may lie in memory.
LAYOUTS = {
    "fortran": np.asfortranarray,
    "every second row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "every second column": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "negative strides": lambda x: np.flip(np.flip(x).copy()),
    "read-only": read_only,
    "unaligned": unaligned,
    "off the cache line": off_the_cache_line,
    "at the end of memory": guarded_copy,
    "mapped": mapped,
}


#: From here on, Count.compiled says how often Numba compiled something.
COUNT_COMPILATIONS = """
from numba.core import event
class Count(event.Listener):
    compiled = 0
    def on_start(self, event_): Count.compiled += 1
    def on_end(self, event_): pass
event.register("numba:compile", Count())
"""


def run_python(code, package_root=PACKAGE.parent, timeout=300, **environment):
    """Run `code` in a fresh process, with failures shown; return what it printed, and its stderr."""
    env = os.environ | {"PYTHONPATH": str(package_root)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=package_root, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    return done.stdout, done.stderr
