"""Every rule by which a router scores, chooses and weighs, against reference.route_logits."""

import copy
import pickle

import numpy as np
import pytest
from helpers import assert_same_bits, assert_same_routing, random_array
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from moe_numba import MoeValueError, RouterConfig, SparseMixerRouter, TopKRouter, reference
from moe_numba.config import GROUP_MASKS, GROUP_SCORES, SCORINGS

DEEPSEEK_V3 = {
    "scoring": "sigmoid",
    "selection_bias": True,
    "n_group": 8,
    "topk_group": 4,
    "group_score": "top2_sum",
    "group_mask": "-inf",
    "norm_eps": 1e-20,
    "routed_scaling_factor": 2.5,
}
#: As the families route; docs/routing.md has the table.
RULES = {
    "not normalised": {"norm_topk_prob": False},
    "scaled": {"norm_topk_prob": False, "routed_scaling_factor": 16.0},
    "deepseek_v2": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 16.0},
    "deepseek_v3": DEEPSEEK_V3,
    "one group": {**DEEPSEEK_V3, "topk_group": 1},
    "gpt_oss": {"score_before_topk": False, "router_bias": True},
    "llama4": {"scoring": "sigmoid", "score_before_topk": False, "norm_topk_prob": False},
    "kolibri": {"scoring": "sigmoid", "score_before_topk": False, "selection_bias": True, "norm_topk_prob": False},
    "ernie": {"selection_bias": True},
    "minimax_m2": {"scoring": "sigmoid", "selection_bias": True},
    "deepseek_v4": {"scoring": "sqrtsoftplus", "selection_bias": True, "norm_eps": 1e-20, "routed_scaling_factor": 1.5},
    "laguna": {"scoring": "sigmoid", "logit_softcap": 3.0, "selection_bias": True},
    "softmax of the chosen, biased": {"score_before_topk": False, "selection_bias": True},
    "large epsilon": {"scoring": "sigmoid", "norm_eps": 0.5},
}


def router_of(rng, config):
    """A router whose logits are its tokens."""
    biases = {
        name: random_array(rng, config.num_experts)
        for name, wanted in {"bias": config.router_bias, "e_score_correction_bias": config.selection_bias}.items()
        if wanted
    }
    return TopKRouter(config, weight=np.eye(config.num_experts, dtype=np.float32), **biases)


def spread_logits(rng, tokens, experts, width=4.0):
    """Logits without ties, so that rounding does not change the choice.

    Nor of sums: about 0 the sigmoids of a logit and of its opposite add up to 1, whichever they are.
    """
    rows = np.tile(np.linspace(-width, 0.9 * width, experts, dtype=np.float32), (tokens, 1))
    return rng.permuted(rows, axis=1)


def assert_as_reference(router, logits):
    result = router.route(logits)
    biases = (0.0 if b is None else b for b in (router.bias, router.e_score_correction_bias))
    expected = reference.route_logits(logits, router.config, *biases)
    assert_same_routing(result, expected)
    return result


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("experts", "top_k"), [(16, 2), (16, 1), (64, 6), (256, 8), (1024, 8)])
def test_rules(rng, rules, experts, top_k):
    if RULES[rules].get("topk_group") == 1 and top_k > experts // 8:
        top_k = 2
    router = router_of(rng, RouterConfig(experts, experts, top_k, None, **RULES[rules]))
    assert_as_reference(router, spread_logits(rng, 77, experts))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("overflow", ["next", "drop"])
@pytest.mark.parametrize("limit", [{"capacity_factor": 0.6}, {"capacity_factor": None, "expert_capacity": 5}], ids=str)
def test_rules_with_limits(rng, rules, overflow, limit):
    if RULES[rules].get("topk_group") == 1:
        pytest.skip("two experts a group, of which a token may lose both")
    config = RouterConfig(input_dim=32, num_experts=32, top_k=3, overflow=overflow, **limit, **RULES[rules])
    result = assert_as_reference(router_of(rng, config), spread_logits(rng, 90, 32))
    capacity = limit.get("expert_capacity") or reference.capacity_limit(90, 3, 32, 0.6)
    assert result.expert_counts.max() == capacity


@pytest.mark.plain
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_rules(data):
    """Any combination of the options."""
    draw = data.draw
    n_group = draw(st.sampled_from([1, 2, 4, 5]))
    size = draw(st.integers(2, 9))
    experts = n_group * size
    topk_group = draw(st.none() | st.integers(1, n_group))
    config = RouterConfig(
        experts,
        experts,
        draw(st.integers(1, (topk_group or n_group) * size)),
        None,
        scoring=draw(st.sampled_from(SCORINGS)),
        score_before_topk=n_group > 1 or draw(st.booleans()),
        norm_topk_prob=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([0.0, 1e-20, 1e-6, 1.0])),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        n_group=n_group,
        topk_group=topk_group,
        group_score=draw(st.sampled_from(GROUP_SCORES)),
        group_mask="-inf",  # with "zero", negative keys of other groups come after ties of zeros
        logit_softcap=draw(st.none() | st.just(5.0)),
        router_bias=draw(st.booleans()),
        selection_bias=draw(st.booleans()),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    assert_as_reference(router_of(rng, config), spread_logits(rng, draw(st.integers(0, 40)), experts))


@pytest.mark.plain
@pytest.mark.parametrize("bias", [1e3, 1e5, -np.inf])
def test_weights_of_chosen_logits_know_nothing_of_the_bias(rng, bias):
    config = RouterConfig(16, 16, 3, None, score_before_topk=False, selection_bias=True)
    router = router_of(rng, config)
    router.e_score_correction_bias = np.float32([bias] * 14 + [0, 0])
    assert_as_reference(router, spread_logits(rng, 20, 16))


@pytest.mark.parametrize("mask", GROUP_MASKS)
def test_other_groups_are_chosen_only_after_better_keys(mask):
    config = RouterConfig(
        4, 4, 2, None, n_group=2, topk_group=1, scoring="sigmoid", group_mask=mask, selection_bias=True
    )
    bias = np.float32([0, -2, 0, 0])  # the second expert's key is negative
    router = TopKRouter(config, weight=np.eye(4, dtype=np.float32), e_score_correction_bias=bias)
    chosen = router.route(np.float32([[3, 2, 1, 0]])).expert_indices
    assert_array_equal(chosen, [[0, 2]] if mask == "zero" else [[0, 1]])


def test_ties_go_to_the_lower_group_and_index():
    config = RouterConfig(8, 8, 2, None, n_group=4, topk_group=2, group_mask="-inf")
    router = TopKRouter(config, weight=np.eye(8, dtype=np.float32))
    assert_array_equal(router.route(np.zeros((3, 8), np.float32)).expert_indices, [[0, 1]] * 3)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_token_becomes_nan_or_stays_a_choice_and_spoils_no_other(rng, rules, bad):
    router = router_of(rng, RouterConfig(32, 32, 3, None, **RULES[rules]))
    logits = spread_logits(rng, 6, 32)
    good = router.route(logits)
    logits[2, 5] = bad  # times the zeros of the weight, every logit of the token is NaN
    result = router.route(logits)
    assert np.isnan(result.expert_weights[2]).all()
    assert np.isnan(result.routing_probs[2]).all()
    others = np.arange(6) != 2
    assert_same_bits(result.expert_weights[others], good.expert_weights[others])
    assert_array_equal(result.expert_indices[others], good.expert_indices[others])


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, 3e38])
def test_infinite_logits_are_nan_whatever_the_scores(rng, rules, bad):
    """Sigmoid and the cap would turn them into numbers."""
    router = router_of(rng, RouterConfig(32, 32, 3, None, **RULES[rules]))
    router.weight = np.full((32, 32), 2.0)
    x = np.zeros((2, 32), np.float32)
    x[0, 7] = bad
    result = router.route(x)
    assert np.isnan(result.routing_probs[0]).all()
    assert np.isnan(result.expert_weights[0]).all()
    assert np.isfinite(result.expert_weights[1]).all()


@pytest.mark.parametrize("rules", RULES)
def test_huge_logits(rng, rules):
    router = router_of(rng, RouterConfig(32, 32, 3, None, **RULES[rules]))
    result = router.route(spread_logits(rng, 20, 32, width=1e30))
    assert np.isfinite(result.expert_weights).all()
    assert (result.slots_used == 3).all()


@pytest.mark.parametrize("rules", RULES)
def test_a_token_is_routed_alike_in_any_batch(rng, always_parallel, rules):
    router = router_of(rng, RouterConfig(64, 64, 4, None, **RULES[rules]))
    x = random_array(rng, 130, 64)
    together = router.route(x)
    for t in range(0, 130, 9):
        alone = router.route(x[t : t + 1])
        assert_same_bits(alone.expert_weights[0], together.expert_weights[t])
        assert_array_equal(alone.expert_indices[0], together.expert_indices[t])


def test_biases_are_used_in_place_and_can_be_assigned(rng):
    config = RouterConfig(8, 8, 2, None, router_bias=True, selection_bias=True)
    bias, selection = random_array(rng, 8), random_array(rng, 8)
    router = TopKRouter(config, weight=np.eye(8, dtype=np.float32), bias=bias, e_score_correction_bias=selection)
    assert router.bias is bias
    assert router.e_score_correction_bias is selection
    x = spread_logits(rng, 9, 8)
    for name in ("bias", "e_score_correction_bias"):
        setattr(router, name, random_array(rng, 8))
        assert_as_reference(router, x)
        getattr(router, name)[...] = random_array(rng, 8)
        assert_as_reference(router, x)
    for again in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert_same_bits(again.route(x).expert_weights, router.route(x).expert_weights)
        again.bias[...] = 0
        assert_as_reference(again, x)
    assert router.bias.any()


def test_biases_that_the_config_does_not_know():
    plain = RouterConfig(8, 8, 2, None)
    for name in ("bias", "e_score_correction_bias"):
        with pytest.raises(MoeValueError, match=f"^{name} was given"):
            TopKRouter(plain, **{name: np.zeros(8, np.float32)})
        router = TopKRouter(plain)
        assert getattr(router, name) is None
        with pytest.raises(MoeValueError, match=f"^{name} was assigned"):
            setattr(router, name, np.zeros(8, np.float32))
    with pytest.raises(MoeValueError, match=r"^bias was .*\(num_experts,\)"):
        TopKRouter(RouterConfig(8, 8, 2, None, router_bias=True), bias=np.zeros(7, np.float32))


# ---- sparsemixer ----


@pytest.mark.parametrize(("experts", "top_k"), [(2, 2), (16, 2), (16, 1), (9, 4)])
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_sparsemixer(rng, experts, top_k, spread):
    router = SparseMixerRouter(RouterConfig(experts, experts, top_k, None), weight=np.eye(experts, dtype=np.float32))
    logits = np.float32(spread) * random_array(rng, 200, experts)
    result = router.route(logits)
    indices, weights = reference.sparsemixer(logits, top_k, 0.01)
    assert_array_equal(result.expert_indices, indices)
    equal = np.isclose(result.expert_weights, weights, rtol=1e-5, atol=0)
    assert equal.mean() > 0.998  # rounding may put a gap on the other side of the limit
    assert_allclose(result.routing_probs, reference.softmax_rows(logits), rtol=1e-5)


def test_sparsemixer_refuses_what_it_does_not_do():
    plain = {"input_dim": 8, "num_experts": 8, "top_k": 2, "capacity_factor": None}
    for name, value in {
        "capacity_factor": 1.0,
        "scoring": "sigmoid",
        "selection_bias": True,
        "n_group": 2,
        "expert_capacity": 3,
    }.items():
        with pytest.raises(MoeValueError, match=f"^{name} was .* SparseMixerRouter"):
            SparseMixerRouter(RouterConfig(**(plain | {name: value})))
    with pytest.raises(MoeValueError, match=r"^jitter_eps was "):
        SparseMixerRouter(RouterConfig(**plain), 0.0)
