"""Losses on results of the router; examples by hand are in test_reference.py."""

import numpy as np
import pytest
from helpers import random_array, random_layer
from numpy.testing import assert_allclose, assert_array_equal

import moe_numba
from moe_numba import RoutingResult, balance_loss, expert_load_fractions, reference, z_loss


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        (np.full((6, 4), 0.25), [0.25] * 4),  # entrenar
        ([[1.0, 0, 0, 0]] * 3, [1, 0, 0, 0]),  # entrenar
        (np.zeros((0, 4)), [0, 0, 0, 0]),  # entrenar
        ([[0.5, 0.5], [1.0, 0.0]], [0.75, 0.25]),
    ],
)
def test_load_fractions(probs, expected):
    fractions = expert_load_fractions(probs)
    assert fractions.dtype == np.float32
    assert_array_equal(fractions, np.float32(expected))


def test_load_fractions_of_many_tokens_do_not_drift():
    probs = np.full((200_000, 3), np.float32(1 / 3))
    assert_allclose(expert_load_fractions(probs), 1 / 3, rtol=1e-7)


def test_z_loss_of_infinite_logits_is_nan_and_says_nothing():
    assert np.isnan(z_loss(np.full((2, 3), np.inf)))


@pytest.mark.parametrize("capacity_factor", [None, 0.5, 1.0])
def test_balance_loss_of_a_forward(rng, capacity_factor):
    layer = random_layer(num_experts=6, top_k=2, capacity_factor=capacity_factor, input_dim=8, hidden_dim=4)
    _, routing = layer(random_array(rng, 50, 8))
    loss = layer.balance_loss(routing)
    assert type(loss) is float
    assert loss == balance_loss(routing) == pytest.approx(reference.balance_loss(routing), rel=1e-6)


def test_balance_loss_does_not_count_slots_without_an_expert():
    """Two of four slots found no expert; they name expert 0 but did not go there."""
    probs = np.float32([[0.75, 0.25]] * 2)
    indices = np.array([[0, 1], [0, 0]])
    result = RoutingResult(indices, np.float32([[0.75, 0.25], [0, 0]]), probs)
    assert_array_equal(result.expert_counts, [1, 1])
    assert result.num_dropped == 1
    assert balance_loss(result) == pytest.approx(1.0)


def test_z_loss_of_large_logits_and_of_nothing(rng):
    logits = random_array(rng, 9, 5)
    assert z_loss(logits) == pytest.approx(reference.z_loss(logits), rel=1e-6)
    assert z_loss(np.float32([[10_000, 10_000]])) == pytest.approx((10_000 + np.log(2)) ** 2)
    assert z_loss(np.zeros((0, 5))) == 0.0
    assert type(moe_numba.z_loss(logits)) is float
