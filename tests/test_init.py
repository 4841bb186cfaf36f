"""First weights: Glorot's variance, entrenar's sines, seeds."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from moe_numba import Expert, MoeConfig, MoeLayer

SIZES = {"num_experts": 6, "top_k": 2, "input_dim": 5, "hidden_dim": 7}


def _arrays(layer):
    experts = layer.experts
    return [layer.router.weight, experts.up, experts.down]


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_xavier_has_glorots_variance(activation):
    layer = MoeLayer(MoeConfig(16, 2, input_dim=200, hidden_dim=100, activation=activation), seed=1)
    for array, fan_sum in zip(_arrays(layer), (216, 300, 300), strict=True):
        assert array.dtype == np.float32
        assert array.std() == pytest.approx(math.sqrt(2 / fan_sum), rel=0.05)
        assert abs(array.mean()) < 0.05 * array.std()
        assert len(np.unique(array)) > 0.9 * array.size


def test_xavier_is_repeated_by_its_seed():
    config = MoeConfig(**SIZES)
    for a, b, other in zip(*(_arrays(MoeLayer(config, seed=seed)) for seed in (4, 4, 5)), strict=True):
        assert_array_equal(a, b)
        assert not np.isclose(a, other).any()


def test_biases_start_at_zero():
    for init in ("xavier", "sine"):
        experts = MoeLayer(MoeConfig(**SIZES), init=init).experts
        assert not experts.up_bias.any()
        assert not experts.down_bias.any()


def _sines(rows, columns, frequency, fan_sum):
    """The formula, one entry at a time."""
    scale = math.sqrt(2 / fan_sum)
    return [[math.sin((i * columns + j) * frequency) * scale for j in range(columns)] for i in range(rows)]


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_sine_is_entrenars_formula(activation):
    layer = MoeLayer(MoeConfig(**SIZES, activation=activation), init="sine")
    assert_allclose(layer.router.gate_weight, _sines(5, 6, 0.4567, 11), atol=1e-7)
    for expert in layer.experts:
        assert_allclose(expert.w1, _sines(5, 7, 0.3141, 12), atol=1e-7)
        assert_allclose(expert.w2, _sines(7, 5, 0.2718, 12), atol=1e-7)


def test_sine_expert_alone_is_that_of_a_layer():
    alone, within = Expert(5, 7, init="sine"), MoeLayer(MoeConfig(**SIZES), init="sine").experts[3]
    assert_array_equal(alone.w1, within.w1)
    assert_array_equal(alone.w2, within.w2)


@pytest.mark.parametrize("init", ["xavier", "sine"])
def test_experts_differ_unless_they_are_sines(init):
    experts = MoeLayer(MoeConfig(**SIZES), init=init).experts
    assert np.array_equal(experts[0].w1, experts[1].w1) == (init == "sine")
