"""Activation functions on vectors against reference.FUNCTIONS."""

import numpy as np
import pytest
from helpers import compiled, fewer

from moe_numba import reference
from moe_numba.config import ACTIVATIONS
from moe_numba.kernels.activations import CODES, activate
from moe_numba.simd.target import LANES
from moe_numba.simd.vector import load, pointer, store

pytestmark = pytest.mark.plain

FUNCTIONS = sorted(reference.FUNCTIONS)


@compiled
def _apply(code, x, out):
    for i in range(0, x.size, LANES):
        n = min(LANES, x.size - i)
        store(activate(code, load(pointer(x, 0), i, n)), pointer(out, 0), i, n)


def _on_array(name, x):
    out = np.empty_like(x)
    _apply(CODES[name], x, out)
    return out


def test_every_activation_has_a_function_and_a_code():
    assert sorted(CODES) == FUNCTIONS
    assert {activation.function for activation in ACTIVATIONS.values()} == set(FUNCTIONS)
    assert len(set(CODES.values())) == len(CODES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation(name):
    x = np.linspace(-30, 30, fewer(60_000) + 1, dtype=np.float32)
    expected = reference.FUNCTIONS[name](x.astype(np.float64))
    error = np.abs(_on_array(name, x) - expected)
    assert (error / np.maximum(np.abs(x), 1e-6)).max() < 5e-7 * (np.abs(x).max() if name == "relu2" else 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_large_values_and_nan(name):
    x = np.float32([1e4, -1e4, 1e15, -1e15, np.inf, np.nan, 0.0])
    with np.errstate(over="ignore"):
        expected = reference.FUNCTIONS[name](x.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(_on_array(name, x), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_small_values_keep_their_relative_precision(name):
    x = np.float32([1e-3, 1e-10, -1e-3, -1e-10, 1e-30])
    expected = reference.FUNCTIONS[name](x.astype(np.float64))
    np.testing.assert_allclose(_on_array(name, x), expected, rtol=1e-6, atol=1e-45)
