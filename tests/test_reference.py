"""The specification itself: examples worked out by hand, and entrenar's unit tests.

Functions that exist twice, as specification and as product, are tested side by side.
"""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import moe_numba
from moe_numba import reference
from moe_numba.reference import Routing

BOTH_CAPACITIES = pytest.mark.parametrize("capacity_limit", [reference.capacity_limit, moe_numba.capacity_limit])
BOTH_SOFTMAXES = pytest.mark.parametrize("softmax_rows", [reference.softmax_rows, moe_numba.softmax_rows])
BOTH_BALANCES = pytest.mark.parametrize("balance_loss", [reference.balance_loss, moe_numba.balance_loss])

# ---- capacity ----


@BOTH_CAPACITIES
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor", "expected"),
    [
        (8, 2, 4, 1.0, 4),  # entrenar
        (7, 2, 4, 1.0, 4),  # entrenar: 3.5 is rounded up
        (1, 1, 100, 0.01, 1),  # entrenar: never below 1
        (8, 1, 4, 1.5, 3),  # entrenar
        (0, 2, 4, 1.0, 1),
        (10, 1, 10, 1.1, 2),  # 1.1 in float32 is a little more than 1.1
        (5, 1, 1, 0.1, 1),
        (10, 1, 1, 0.7, 7),  # 0.7 in float32 is less than 0.7
        (5, 3, 4, None, 15),
        (0, 3, 4, None, 1),
    ],
)
def test_capacity_limit(capacity_limit, tokens, top_k, experts, factor, expected):
    assert capacity_limit(tokens, top_k, experts, factor) == expected


# ---- softmax ----


@BOTH_SOFTMAXES
def test_softmax_by_hand(softmax_rows):
    logits = np.log(np.float32([[1, 3], [2, 2], [9, 1]]))
    assert_allclose(softmax_rows(logits), [[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]], rtol=1e-6)


@BOTH_SOFTMAXES
def test_softmax_rows_sum_to_one_and_follow_the_logits(softmax_rows):
    logits = np.float32([[1, 2, 3, 4], [-50, 0, 50, 1], [1000, 1001, 999, 0]])
    probs = softmax_rows(logits)
    assert_allclose(probs.sum(axis=1), 1, rtol=1e-6)
    assert_array_equal(probs.argmax(axis=1), logits.argmax(axis=1))
    assert np.isfinite(probs).all()


# ---- selection ----

PROBS = np.array([[0.5, 0.3, 0.2]] * 3)


def test_select_without_limit():
    indices, weights, counts, used = reference.select(PROBS, 2)
    assert_array_equal(indices, [[0, 1]] * 3)
    assert_allclose(weights, [[0.625, 0.375]] * 3)
    assert_array_equal(counts, [3, 3, 0])
    assert_array_equal(used, [2, 2, 2])


def test_select_next_passes_over_full_experts():
    indices, weights, counts, used = reference.select(PROBS, 2, capacity=1, overflow="next")
    assert_array_equal(indices, [[0, 1], [2, 2], [0, 0]])
    assert_allclose(weights, [[0.625, 0.375], [1, 0], [0, 0]])
    assert_array_equal(counts, [1, 1, 1])
    assert_array_equal(used, [2, 1, 0])


def test_select_drop_loses_the_slot():
    probs = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.35, 0.25]])
    indices, weights, counts, used = reference.select(probs, 2, capacity=1, overflow="drop")
    assert_array_equal(indices, [[0, 1], [2, 2], [0, 0]])
    assert_allclose(weights, [[0.625, 0.375], [1, 0], [0, 0]])
    assert_array_equal(counts, [1, 1, 1])
    assert_array_equal(used, [2, 1, 0])


def test_select_gives_ties_to_the_lower_index():
    indices, *_ = reference.select(np.array([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4]]), 3)
    assert_array_equal(indices, [[0, 1, 2], [1, 3, 0]])


def test_select_shares_equally_when_the_chosen_have_probability_zero():
    probs = np.array([[1.0, 0.0, 0.0]] * 2)
    indices, weights, _, used = reference.select(probs, 1, capacity=1)
    assert_array_equal(indices, [[0], [1]])
    assert_array_equal(weights, [[1], [1]])
    assert_array_equal(used, [1, 1])


def test_select_gives_a_nan_token_no_room_under_a_limit():
    probs = np.array([[np.nan, np.nan], [0.9, 0.1]])
    _, weights, counts, used = reference.select(probs, 1, capacity=1)
    assert_array_equal(used, [0, 1])
    assert_array_equal(counts, [1, 0])
    assert np.isnan(weights[0]).all()


def test_route_by_hand():
    x = np.array([[math.log(3), 0.0], [0.0, math.log(9)]])
    result = reference.route(x, np.eye(2), top_k=1, capacity_factor=None)
    assert_allclose(result.routing_probs, [[0.75, 0.25], [0.1, 0.9]])
    assert_array_equal(result.expert_indices, [[0], [1]])
    assert_array_equal(result.expert_counts, [1, 1])
    assert result.num_dropped == 0


def test_route_keeps_experts_within_capacity_as_entrenar_tests():
    """8 tokens, 4 experts, one expert each: no expert takes more than 2."""
    x = np.sin(np.arange(64).reshape(8, 8) * 1.23)
    gate = np.sin(np.arange(32).reshape(8, 4) * 0.4567) * math.sqrt(2 / 12)
    result = reference.route(x, gate, top_k=1, capacity_factor=1.0)
    assert result.expert_counts.max() <= 2
    assert result.expert_counts.sum() == 8


def test_route_of_nothing():
    result = reference.route(np.zeros((0, 3)), np.zeros((3, 4)), top_k=2, capacity_factor=1.0)
    assert [np.shape(field) for field in result[:4]] == [(0, 2), (0, 2), (0, 4), (4,)]
    assert result.num_dropped == 0


# ---- experts ----


@pytest.mark.parametrize(
    ("name", "at_minus_1", "at_2"),
    [
        ("identity", -1, 2),
        ("relu", 0, 2),
        ("relu2", 0, 4),
        ("silu", -0.2689414213699951, 1.7615941559557649),
        ("gelu", -0.15865525393145707, 1.9544997361036416),
        ("gelu_tanh", -0.15880800939172324, 1.954597694087775),
    ],
)
def test_functions(name, at_minus_1, at_2):
    assert_allclose(reference.FUNCTIONS[name](np.array([-1.0, 2.0])), [at_minus_1, at_2], rtol=1e-12)


def test_relu_expert_by_hand():
    up, up_bias = np.array([[1.0, 2.0], [-1.0, 0.0]]), np.array([0.5, 0.5])
    down, down_bias = np.array([[2.0, 5.0], [1.0, 7.0]]), np.array([1.0, -1.0])
    y = reference.expert([1.0, 1.0], "relu", up, down, up_bias, down_bias)  # hidden 3.5, 0
    assert_allclose(y, [8.0, 2.5])


def test_gated_expert_has_the_gate_first():
    gate_up = np.array([[-1.0], [3.0]])
    assert_allclose(reference.expert([2.0], "reglu", gate_up, np.array([[1.0]])), [0.0])
    assert_allclose(reference.expert([2.0], "reglu", -gate_up, np.array([[1.0]])), [-12.0])


def test_expert_with_everything_cut_off_gives_its_bias_as_entrenar_tests():
    h, f = 4, 8
    y = reference.expert(
        np.ones(h), "relu", np.full((f, h), -10.0), np.ones((h, f)), np.full(f, -1.0), np.full(h, 42.0)
    )
    assert_array_equal(y, np.full(h, 42.0))


def test_experts_forward_by_hand():
    up = np.array([[[1.0]], [[10.0]]])
    down = np.array([[[1.0]], [[1.0]]])
    x = np.array([[1.0], [2.0], [3.0], [4.0]])
    indices = np.array([[0, 1], [1, 1], [0, 0], [0, 1]])
    weights = np.array([[0.25, 0.75], [1.0, 0.0], [0.0, 0.0], [np.nan, np.nan]])
    y = reference.experts_forward(x, indices, weights, np.array([2, 1, 0, 0]), "identity", up, down)
    assert_allclose(y, [[7.75], [20.0], [0.0], [np.nan]])


# ---- losses ----


def _routing(probs, counts):
    probs = np.asarray(probs, np.float32)
    slots = np.zeros((len(probs), 1))
    return Routing(slots, slots, probs, np.asarray(counts), 0, np.ones(len(probs)))


@BOTH_BALANCES
@pytest.mark.parametrize(
    ("probs", "counts", "expected"),
    [
        (np.full((8, 4), 0.25), [2, 2, 2, 2], 1.0),  # entrenar: balanced
        ([[1, 0, 0, 0]] * 8, [8, 0, 0, 0], 4.0),  # entrenar: all on one of four
        (np.zeros((0, 4)), [0, 0, 0, 0], 0.0),  # entrenar: empty
        ([[0.75, 0.25]] * 4, [1, 3], 0.75),  # 2 (1/4 3/4 + 3/4 1/4)
        ([[0.5, 0.5]] * 4, [0, 0], 0.0),  # nothing was dispatched
    ],
)
def test_balance_loss(balance_loss, probs, counts, expected):
    assert balance_loss(_routing(probs, counts)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("z_loss", [reference.z_loss, moe_numba.z_loss])
def test_z_loss(z_loss):
    logits = np.log(np.float32([[1, 2, 1], [4, 2, 2]]))
    expected = (math.log(4) ** 2 + math.log(8) ** 2) / 2
    assert z_loss(logits) == pytest.approx(expected, rel=1e-6)


# ---- the layer, as entrenar tests it ----


def test_entrenars_layer():
    config = moe_numba.MoeConfig(num_experts=4, top_k=2, capacity_factor=1.5, input_dim=16, hidden_dim=32)
    layer = moe_numba.MoeLayer(config, init="sine")
    x = np.sin(np.arange(8 * 16, dtype=np.float32).reshape(8, 16) * np.float32(0.7))
    y, routing = layer.forward(x)
    again, _ = layer.forward(x)
    assert y.shape == (8, 16)
    assert np.abs(y).sum() > 0
    assert_array_equal(y, again)
    assert np.count_nonzero(routing.expert_counts) > 1
    expected = reference.route(x, layer.router.gate_weight, 2, 1.5)
    assert_allclose(routing.routing_probs, expected.routing_probs, rtol=1e-5)
