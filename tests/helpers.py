"""What several tests need: layers with every weight random, comparisons, other processes."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import moe_numba
from moe_numba import MoeConfig, MoeLayer, reference
from moe_numba.config import ACTIVATIONS

PACKAGE = Path(moe_numba.__file__).parent
ALL_ACTIVATIONS = sorted(ACTIVATIONS)
TOLERANCE = 2e-5


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


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Equal shapes, and differences below `tolerance` times the largest magnitude."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    scale = max(np.abs(expected).max(initial=0.0), 1e-30)
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


def run_python(code, package_root=PACKAGE.parent, **environment):
    """Run `code` in a fresh process, with failures shown; return what it printed, and its stderr."""
    env = os.environ | {"PYTHONPATH": str(package_root)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=package_root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    return done.stdout, done.stderr
