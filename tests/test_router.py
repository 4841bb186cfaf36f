"""Routers: probabilities, selection, capacity, noise.

The choice is checked against reference.select fed with the router's own probabilities, so that
two nearly equal probabilities cannot make a test fail; the probabilities are checked apart.
"""

import numpy as np
import pytest
from helpers import assert_routing, assert_same_bits, random_array
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import moe_numba
from moe_numba import (
    MoeConfig,
    MoeLayer,
    NoisyTopKRouter,
    RouterConfig,
    RoutingResult,
    TopKRouter,
    capacity_limit,
    reference,
    softmax_rows,
)

FIELDS = RoutingResult.__slots__
POLICIES = [(None, "next"), (0.5, "next"), (0.5, "drop"), (1.0, "next"), (1.25, "drop"), (1e-9, "next"), (1e-9, "drop")]


def _assert_same_routing(a, b):
    for field in FIELDS:
        assert_same_bits(getattr(a, field), getattr(b, field))


def _assert_conserved(result, capacity_factor):
    """No row is lost or invented, and no expert takes more than its capacity."""
    tokens, k = result.expert_indices.shape
    assert result.expert_counts.sum() == result.slots_used.sum()
    assert ((result.expert_weights > 0) <= (np.arange(k) < result.slots_used[:, None])).all()
    for chosen, used in zip(result.expert_indices, result.slots_used, strict=True):
        assert len(set(chosen[:used].tolist())) == used
    if capacity_factor is None:
        assert result.expert_counts.sum() == tokens * k
    else:
        limit = capacity_limit(tokens, k, len(result.expert_counts), capacity_factor)
        assert result.expert_counts.max() <= limit


# ---- probabilities ----


@pytest.mark.parametrize("experts", [1, 2, 15, 16, 17, 300])
@pytest.mark.parametrize("width", [1, 33, 1500])
def test_probabilities(rng, width, experts):
    router = TopKRouter(RouterConfig(width, experts, 1, None), seed=3)
    x = random_array(rng, 37, width)
    probs = router.route(x).routing_probs
    logits = x.astype(np.float64) @ router.gate_weight.astype(np.float64)
    assert_allclose(probs, reference.softmax_rows(logits), rtol=2e-5, atol=1e-9)
    assert_allclose(probs.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (5, 1), (3, 16), (7, 33), (400, 300)])
def test_softmax_rows(rng, always_parallel, shape):
    logits = random_array(rng, *shape) * 20
    before = logits.copy()
    probs = softmax_rows(logits)
    assert probs.dtype == np.float32
    assert probs.shape == shape
    assert_array_equal(logits, before)
    if shape[0]:
        assert_allclose(probs, reference.softmax_rows(logits), rtol=5e-6, atol=1e-37)


def test_softmax_of_infinities_and_nan():
    inf, nan = np.inf, np.nan
    probs = softmax_rows([[inf, 0, 1], [nan, 0, 1], [-inf, 0, 0], [-inf, -inf, -inf], [0, 1e38, -1e38], [1, 1, inf]])
    bad = [nan] * 3
    assert_array_equal(probs, np.float32([bad, bad, [0, 0.5, 0.5], bad, [0, 1, 0], bad]))


# ---- selection ----


@given(st.integers(0, 10**7), st.integers(1, 64), st.integers(1, 512), st.floats(1e-12, 1e6))
def test_capacity_limit(tokens, top_k, experts, capacity_factor):
    limit = capacity_limit(tokens, top_k, experts, capacity_factor)
    assert type(limit) is int
    assert limit == reference.capacity_limit(tokens, top_k, experts, capacity_factor)


@pytest.mark.parametrize(("capacity_factor", "overflow"), POLICIES)
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 150])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 4), (8, 2), (17, 5), (300, 8)])
def test_selection(rng, experts, top_k, tokens, capacity_factor, overflow):
    router = TopKRouter(RouterConfig(6, experts, top_k, capacity_factor, overflow=overflow))
    result = router.route(random_array(rng, tokens, 6))
    assert_routing(result, top_k, capacity_factor, overflow)
    _assert_conserved(result, capacity_factor)


@given(
    st.integers(0, 40),
    st.integers(1, 40),
    st.integers(1, 12),
    st.data(),
    st.sampled_from(["next", "drop"]),
    st.one_of(st.none(), st.floats(1e-3, 3)),
    st.sampled_from([0.0, 0.1, 3.0, 300.0]),
)
def test_selection_of_anything(tokens, experts, width, data, overflow, capacity_factor, spread):
    """Spreads from all probabilities equal to most of them 0."""
    top_k = data.draw(st.integers(1, experts))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    router = TopKRouter(RouterConfig(width, experts, top_k, capacity_factor, overflow=overflow))
    router.gate_weight = np.round(random_array(rng, width, experts) * 2) * spread  # rounded: many exact ties
    x = np.round(random_array(rng, tokens, width))
    result = router.route(x)
    assert_routing(result, top_k, capacity_factor, overflow)
    _assert_conserved(result, capacity_factor)


@pytest.mark.parametrize(("capacity_factor", "overflow"), POLICIES)
def test_ties_go_to_the_lower_index(capacity_factor, overflow):
    router = TopKRouter(RouterConfig(3, 7, 3, capacity_factor, overflow=overflow))
    router.gate_weight = np.zeros((3, 7))
    result = router.route(np.ones((10, 3)))
    assert_array_equal(result.expert_indices[0, 0], 0)
    assert_routing(result, 3, capacity_factor, overflow)


def test_full_experts_are_passed_over_or_the_slot_is_lost():
    """All tokens want experts 0, 1, 2 in this order; each has room for one."""
    config = {"input_dim": 1, "num_experts": 3, "top_k": 2, "capacity_factor": 0.5}
    weight = np.log([[0.5], [0.3], [0.2]])
    x = np.ones((3, 1))
    passed = TopKRouter(RouterConfig(**config), weight=weight).route(x)
    assert_array_equal(passed.expert_indices, [[0, 1], [2, 2], [0, 0]])
    assert_allclose(passed.expert_weights, [[0.625, 0.375], [1, 0], [0, 0]], rtol=1e-6)
    assert_array_equal(passed.expert_counts, [1, 1, 1])
    assert passed.num_dropped == 1
    lost = TopKRouter(RouterConfig(**config, overflow="drop"), weight=weight).route(x)
    assert_array_equal(lost.expert_indices, [[0, 1], [0, 0], [0, 0]])
    assert_array_equal(lost.expert_counts, [1, 1, 0])
    assert lost.num_dropped == 2


@pytest.mark.parametrize("capacity_factor", [1e6, 1e18, 1e30, 3e38, 1e300])
def test_a_huge_capacity_is_no_limit(rng, capacity_factor):
    x = random_array(rng, 50, 4)
    limited = TopKRouter(RouterConfig(4, 3, 2, capacity_factor)).route(x)
    _assert_same_routing(limited, TopKRouter(RouterConfig(4, 3, 2, None)).route(x))


@pytest.mark.parametrize("seed", range(3))
def test_no_more_rows_than_the_capacity_when_all_tokens_agree(seed):
    router = TopKRouter(RouterConfig(5, 4, 2, 1.0), seed=seed)
    result = router.route(np.ones((16, 5)))
    assert_array_equal(result.expert_counts, [8, 8, 8, 8])  # full to the brim
    assert result.num_dropped == 0


# ---- NaN and infinity ----


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("capacity_factor", "overflow"), POLICIES)
def test_tokens_that_are_no_numbers(rng, bad, capacity_factor, overflow):
    router = TopKRouter(RouterConfig(6, 5, 2, capacity_factor, overflow=overflow))
    x = random_array(rng, 40, 6)
    x[::3, 2] = bad
    result = router.route(x)
    assert np.isnan(result.routing_probs[::3]).all()
    assert np.isnan(result.expert_weights[::3]).all()
    assert not np.isnan(result.expert_weights[1::3]).any()
    assert ((result.expert_indices >= 0) & (result.expert_indices < 5)).all()
    _assert_conserved(result, capacity_factor)
    assert_routing(result, 2, capacity_factor, overflow)


def test_nan_tokens_take_no_room_under_a_limit(rng):
    """Eight good tokens have the room of sixteen, whatever eight broken ones would have liked."""
    router = TopKRouter(RouterConfig(4, 2, 1, 1.0))
    router.gate_weight = np.zeros((4, 2))
    x = random_array(rng, 16, 4)
    x[:8] = np.nan
    result = router.route(x)
    assert_array_equal(result.expert_counts, [8, 0])
    assert_array_equal(result.expert_indices[8:], 0)
    assert result.num_dropped == 8


# ---- results ----


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_result_types(rng, tokens):
    result = TopKRouter(RouterConfig(4, 6, 3, 1.0)).route(random_array(rng, tokens, 4))
    shapes = {
        name: (getattr(result, name).shape, getattr(result, name).dtype) for name in FIELDS if name != "num_dropped"
    }
    assert shapes == {
        "expert_indices": ((tokens, 3), np.int64),
        "expert_weights": ((tokens, 3), np.float32),
        "routing_probs": ((tokens, 6), np.float32),
        "expert_counts": ((6,), np.int64),
        "slots_used": ((tokens,), np.int64),
    }
    assert type(result.num_dropped) is int


@pytest.mark.parametrize(("capacity_factor", "overflow"), POLICIES)
def test_fields_left_out_of_a_result_are_derived(rng, capacity_factor, overflow):
    routed = TopKRouter(RouterConfig(4, 6, 3, capacity_factor, overflow=overflow)).route(random_array(rng, 30, 4))
    built = RoutingResult(routed.expert_indices, routed.expert_weights, routed.routing_probs)
    _assert_same_routing(built, routed)


def test_derived_counts_are_of_the_filled_slots_wherever_they_are():
    built = RoutingResult(np.array([[3, 1]]), np.float32([[0, 0.5]]), np.zeros((1, 4), np.float32))
    assert_array_equal(built.expert_counts, [0, 1, 0, 0])
    assert_array_equal(built.slots_used, [1])


def test_result_of_an_empty_batch_is_derived():
    built = RoutingResult(np.zeros((0, 2), np.int64), np.zeros((0, 2), np.float32), np.zeros((0, 3), np.float32))
    assert_array_equal(built.expert_counts, [0, 0, 0])
    assert built.num_dropped == 0


# ---- the gate's weight ----


def test_gate_weight_is_a_live_view(rng):
    router = TopKRouter(RouterConfig(4, 3, 1, None))
    assert router.gate_weight.shape == (4, 3)
    new = random_array(rng, 4, 3)
    for write in (lambda: router.gate_weight.__setitem__(..., new), lambda: setattr(router, "gate_weight", -new)):
        write()
        x = random_array(rng, 6, 4)
        logits = x.astype(np.float64) @ router.gate_weight
        assert_allclose(router.route(x).routing_probs, reference.softmax_rows(logits), rtol=1e-5)
    assert_array_equal(router.gate_weight, -new)


def test_weight_is_used_in_place(rng):
    weight = random_array(rng, 3, 4)
    router = TopKRouter(RouterConfig(4, 3, 1, None), weight=weight)
    assert np.shares_memory(router.gate_weight, weight)
    weight[...] = 0
    assert_array_equal(router.route(np.ones((1, 4))).routing_probs, np.full((1, 3), np.float32(1 / 3)))


# ---- batches and threads ----


@pytest.mark.parametrize(("capacity_factor", "overflow"), POLICIES)
def test_threads_do_not_change_the_result(rng, always_parallel, capacity_factor, overflow):
    router = TopKRouter(RouterConfig(40, 30, 4, capacity_factor, overflow=overflow))
    x = random_array(rng, 333, 40)
    parallel = router.route(x)
    moe_numba.set_num_threads(1)
    _assert_same_routing(parallel, router.route(x))


def test_a_token_is_routed_alike_in_any_batch(rng):
    router = TopKRouter(RouterConfig(1100, 29, 3, None))
    x = random_array(rng, 70, 1100)
    together = router.route(x)
    for t in range(70):
        alone = router.route(x[t : t + 1])
        assert_same_bits(alone.routing_probs[0], together.routing_probs[t])
        assert_same_bits(alone.expert_indices[0], together.expert_indices[t])
        assert_same_bits(alone.expert_weights[0], together.expert_weights[t])


# ---- noise ----

NOISY = RouterConfig(8, 50, 2, None)


def _noise(router, tokens):
    """The logits' noise of the next call, up to a constant per token; the weight must be 0."""
    probs = router.route(np.ones((tokens, 8))).routing_probs.astype(np.float64)
    logs = np.log(probs)
    return logs - logs.mean(axis=1, keepdims=True)


def _silent_router(noise_std, seed):
    return NoisyTopKRouter(NOISY, noise_std, seed, weight=np.zeros((50, 8)))


@pytest.mark.parametrize("noise_std", [0.01, 0.5, 2.0])
def test_noise_has_its_standard_deviation(noise_std):
    noise = _noise(_silent_router(noise_std, seed=1), 2000)
    std = noise.std() / np.sqrt(1 - 1 / 50)  # the mean of 50 was taken out
    assert std == pytest.approx(noise_std, rel=0.02)
    standard = noise / noise.std()
    assert np.mean(standard**3) == pytest.approx(0, abs=0.05)
    assert np.mean(standard**4) == pytest.approx(3, abs=0.1)
    neighbours = [np.mean(standard[1:] * standard[:-1]), np.mean(standard[:, 1:] * standard[:, :-1])]
    assert_allclose(neighbours, [0, -1 / 50], atol=0.015)


def test_noise_is_the_same_for_the_same_seed_and_call(rng):
    x = random_array(rng, 20, 8)
    a, b, other = (NoisyTopKRouter(NOISY, 1.0, seed, weight=np.zeros((50, 8))) for seed in (5, 5, 6))
    first = a.route(x)
    _assert_same_routing(first, b.route(x))
    assert not np.array_equal(first.routing_probs, a.route(x).routing_probs)
    assert not np.array_equal(first.routing_probs, other.route(x).routing_probs)


def test_noise_of_a_token_does_not_depend_on_the_tokens_after_it():
    few, many = _noise(_silent_router(1.0, seed=2), 3), _noise(_silent_router(1.0, seed=2), 300)
    assert_same_bits(few, many[:3])


def test_noise_does_not_depend_on_the_number_of_threads(rng, always_parallel):
    x = random_array(rng, 300, 8)
    parallel = NoisyTopKRouter(NOISY, 1.0, 3).route(x)
    moe_numba.set_num_threads(1)
    _assert_same_routing(parallel, NoisyTopKRouter(NOISY, 1.0, 3).route(x))


def test_without_a_seed_every_router_differs():
    weight = np.zeros((50, 8))
    x = np.ones((4, 8))
    a, b = (NoisyTopKRouter(NOISY, 1.0, weight=weight).route(x).routing_probs for _ in range(2))
    assert not np.array_equal(a, b)


def test_no_noise_is_the_plain_router(rng):
    weight = random_array(rng, 50, 8)
    x = random_array(rng, 9, 8)
    quiet = NoisyTopKRouter(NOISY, 0.0, 1, weight=weight).route(x)
    _assert_same_routing(quiet, TopKRouter(NOISY, weight=weight).route(x))


def test_noisy_selection_follows_the_noisy_probabilities(rng):
    router = NoisyTopKRouter(RouterConfig(8, 6, 2, 0.5), 1.0, 4)
    assert_routing(router.route(random_array(rng, 60, 8)), 2, 0.5, "next")


def test_layers_router_is_noisy_only_with_noise():
    assert type(MoeLayer(MoeConfig(noise_std=0.0)).router) is TopKRouter
    router = MoeLayer(MoeConfig(noise_std=0.5)).router
    assert type(router) is NoisyTopKRouter
    assert router.noise_std == 0.5


def test_assigning_the_weight_writes_into_it(rng):
    router = TopKRouter(RouterConfig(5, 4, 2, None))
    x = rng.standard_normal((6, 5)).astype(np.float32)
    weight = rng.standard_normal((4, 5)).astype(np.float32)
    router.weight = weight
    assert_array_equal(router.gate_weight, weight.T)
    assert_array_equal(router.route(x).routing_probs, TopKRouter(router.config, weight=weight).route(x).routing_probs)
