"""Whatever a layer may be made of and be given, against the specification.

`pytest tests/test_numbers.py --hypothesis-profile long` takes thousands of cases of each test.
"""

from dataclasses import fields

import ml_dtypes
import numpy as np
import pytest
from helpers import (
    ALL_ACTIVATIONS,
    LAYOUTS,
    TOLERANCE,
    as_bfloat16,
    assert_close,
    assert_routing,
    assert_same_bits,
    assert_same_routing,
    block_reference,
    experts_reference,
    random_array,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from numba import config as numba_config
from numpy.testing import assert_allclose, assert_array_equal

import moe_numba
from moe_numba import MoeConfig, MoeLayer, RoutingResult, fused_experts, reference, threads
from moe_numba.config import DTYPES, GROUP_MASKS, GROUP_SCORES, OVERFLOWS, SCORINGS

pytestmark = pytest.mark.plain

#: Tokens and widths at most: plain Python is slow.
LARGEST = 20 if numba_config.DISABLE_JIT else 300
#: Weights of a layer at most.
MOST_WEIGHTS = 300_000
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES_OF_TOKENS = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64), BFLOAT16]
KEPT_LAYOUT = {"as it is": lambda x: x} | LAYOUTS

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, LARGEST) | st.sampled_from([1, 2, 15, 16, 17])
token_counts = st.integers(0, min(LARGEST, 30)) | st.integers(0, LARGEST)
layouts = st.sampled_from(sorted(KEPT_LAYOUT))
booleans = st.booleans()


@st.composite
def limits(draw):
    """How many rows an expert takes, and what becomes of the others."""
    limit = draw(
        st.sampled_from([{"capacity_factor": None}] * 2)
        | st.fixed_dictionaries({"capacity_factor": st.sampled_from([1e-9, 0.3, 0.8, 1.25, 1e9])})
        | st.fixed_dictionaries({"expert_capacity": st.integers(1, 50), "capacity_factor": st.none()})
    )
    return limit | {"overflow": draw(st.sampled_from(OVERFLOWS))}


@st.composite
def rules(draw, experts):
    """How tokens choose among so many experts, and top_k."""
    if draw(booleans):
        return {"top_k": draw(st.integers(1, min(experts, 8)))}
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if experts % n == 0]))
    kept = draw(st.none() | st.integers(1, groups))
    choosable = experts // groups * (kept or groups)
    return {
        "top_k": draw(st.integers(1, min(choosable, 8))),
        "scoring": draw(st.sampled_from(SCORINGS)),
        "score_before_topk": groups > 1 or draw(booleans),
        "norm_topk_prob": draw(booleans),
        "norm_eps": draw(st.sampled_from([0.0, 1e-20, 1e-6, 1.0])),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "n_group": groups,
        "topk_group": kept,
        "group_score": draw(st.sampled_from(GROUP_SCORES if experts > groups else ["max"])),
        "group_mask": draw(st.sampled_from(GROUP_MASKS)),
        "logit_softcap": draw(st.none() | st.just(5.0)),
        "router_bias": draw(booleans),
        "selection_bias": draw(booleans),
    }


@st.composite
def experts_options(draw):
    """What the experts compute and how their weights are stored."""
    activation = draw(st.sampled_from(ALL_ACTIVATIONS))
    options = {
        "activation": activation,
        "bias": draw(booleans),
        "dtype": draw(st.sampled_from(DTYPES)),
        "transposed": draw(booleans),
        "interleaved": "glu" in activation and draw(booleans),
    }
    if activation == "swiglu" and draw(booleans):
        options |= {"swiglu_limit": draw(st.sampled_from([None, 0.5, 7.0])), "swiglu_alpha": 1.702, "swiglu_beta": 1.0}
    return options


@st.composite
def layer_configs(draw, sparsemixer=booleans):
    """A MoeConfig of any kind, whose tokens are at least as wide as there are experts."""
    experts, identity = draw(sizes), draw(st.sampled_from([0, 0, 0, 3]))
    width = draw(st.integers(experts + identity, max(experts + identity, LARGEST)))
    hidden = min(draw(sizes), max(1, MOST_WEIGHTS // (experts * width)))
    options = draw(experts_options())
    if draw(sparsemixer) and draw(booleans):
        options |= {"sparsemixer_eps": 0.01, "capacity_factor": None, "top_k": draw(st.integers(1, min(experts, 8)))}
    else:
        options |= draw(limits()) | draw(rules(experts + identity))
    options["apply_router_weight_on_input"] = identity == 0 and draw(booleans)
    options["num_identity_experts"] = identity
    options["shared_hidden_dim"] = draw(st.sampled_from([0, 0, 5, 33]))
    options["shared_gate"] = options["shared_hidden_dim"] > 0 and draw(booleans)
    return MoeConfig(num_experts=experts, input_dim=width, hidden_dim=hidden, **options)


def layer_on(draw, config, router_weight=None):
    """A layer on random arrays, each laid out in memory in a way of its own."""
    rng = np.random.default_rng(draw(seeds))
    template = MoeLayer(config)._tensors()
    tensors = {}
    for name, like in template.items():
        values = random_array(rng, *like.shape) / np.float32(np.sqrt(like.shape[-1]))
        if name == "router_weight" and router_weight is not None:
            values = router_weight
        tensors[name] = KEPT_LAYOUT[draw(layouts)](values.astype(like.dtype))
    return MoeLayer.from_weights(config, **tensors)


def spread_tokens(rng, tokens, config, dtype):
    """Tokens that begin with their logits, which are so far apart that rounding changes no choice."""
    experts = config.num_experts + config.num_identity_experts
    x = random_array(rng, tokens, config.input_dim)
    # Not around 0: scores of opposite logits would add up to the same.
    logits = np.tile(np.linspace(-4, 5.3, experts, dtype=np.float32), (tokens, 1))
    x[:, :experts] = rng.permuted(logits, axis=1)
    return x.astype(dtype)


def assert_conserved(layer, routing):
    """Every slot has a row at an expert or is counted as lost."""
    slots = routing.expert_indices.size
    lost = int((layer.config.top_k - routing.slots_used).sum())
    assert routing.expert_counts.sum() + lost == slots
    filled = np.arange(layer.config.top_k) < routing.slots_used[:, None]
    found = np.bincount(routing.expert_indices[filled], minlength=len(routing.expert_counts))
    assert_array_equal(routing.expert_counts, found)
    assert routing.num_dropped <= np.count_nonzero(routing.slots_used == 0)
    for chosen, used in zip(routing.expert_indices, routing.slots_used, strict=True):
        assert len(set(chosen[:used].tolist())) == used


def _tolerance(rounded):
    """Tolerance and the magnitude that it is relative to at least: many hidden values may cancel out."""
    return (2**-6, 1.0) if rounded else (4 * TOLERANCE, 0.1)


def assert_output(layer, x, y, routing):
    """y is what the specification makes of x and the routing."""
    rounded = layer.config.dtype == "bfloat16"
    expected = block_reference(layer, np.float32(x), routing, *([as_bfloat16] if rounded else []))
    assert_close(y, expected, *_tolerance(rounded))


@given(data=st.data(), config=layer_configs(sparsemixer=st.just(False)), tokens=token_counts, parallel=booleans)
def test_any_layer(monkeypatch, data, config, tokens, parallel):
    monkeypatch.setattr(threads, "SERIAL_BELOW", 0 if parallel else 10**18)
    draw = data.draw
    experts = config.num_experts + config.num_identity_experts
    layer = layer_on(draw, config, np.eye(experts, config.input_dim, dtype=np.float32))
    rng = np.random.default_rng(draw(seeds))
    plain = spread_tokens(rng, tokens, config, draw(st.sampled_from(DTYPES_OF_TOKENS)))
    x = KEPT_LAYOUT[draw(layouts)](plain)
    y, routing = layer(x)
    assert_array_equal(x, plain)  # the input is left alone
    assert_conserved(layer, routing)
    assert_output(layer, plain, y, routing)
    biases = (0.0 if b is None else b for b in (layer.router.bias, layer.router.e_score_correction_bias))
    expected = reference.route_logits(plain[:, :experts], layer.router.config, *biases)
    assert_same_routing(routing, expected)
    assert layer.balance_loss(routing) == pytest.approx(reference.balance_loss(expected), rel=1e-5)


#: What tokens may be made of; each a function of (rng, tokens, width).
TOKENS = {
    "normal": lambda rng, *shape: random_array(rng, *shape),
    "all equal": lambda rng, tokens, width: np.tile(random_array(rng, 1, width), (tokens, 1)),
    "zero": lambda rng, *shape: np.zeros(shape, np.float32),
    "small integers": lambda rng, *shape: rng.integers(-2, 3, shape).astype(np.float32),
    "denormal": lambda rng, *shape: random_array(rng, *shape) * np.float32(1e-39),
    "huge": lambda rng, *shape: random_array(rng, *shape) * np.float32(1e30),
    "beyond float32": lambda rng, *shape: rng.standard_normal(shape) * 1e300,
}
SPECIAL = [np.nan, np.inf, -np.inf, -np.nan, 3e38, -3e38, 1e-45, -0.0]
#: What a router's weight may be; each a function of (rng, experts, width).
ROUTERS = {
    "normal": lambda rng, *shape: random_array(rng, *shape),
    "equal logits": lambda rng, *shape: np.zeros(shape, np.float32),
    "integers": lambda rng, *shape: rng.integers(-1, 2, shape).astype(np.float32),
    "one takes all": lambda rng, experts, width: np.eye(experts, 1, dtype=np.float32) * np.full(width, 9, np.float32),
    "huge": lambda rng, *shape: random_array(rng, *shape) * np.float32(1e30),
}


@given(data=st.data(), config=layer_configs(), tokens=token_counts, parallel=booleans)
def test_any_tokens(monkeypatch, data, config, tokens, parallel):
    """NaN, infinities, ties, logits of 1e30: rows are conserved and no token changes another."""
    monkeypatch.setattr(threads, "SERIAL_BELOW", 0 if parallel else 10**18)
    draw = data.draw
    rng = np.random.default_rng(draw(seeds))
    experts = config.num_experts + config.num_identity_experts
    layer = layer_on(draw, config, ROUTERS[draw(st.sampled_from(sorted(ROUTERS)))](rng, experts, config.input_dim))
    x = TOKENS[draw(st.sampled_from(sorted(TOKENS)))](rng, tokens, config.input_dim)
    special = rng.random(tokens) < draw(st.sampled_from([0, 0.1, 1]))
    x[special, rng.integers(0, config.input_dim, special.sum())] = rng.choice(SPECIAL, special.sum())
    y, routing = layer(x)
    assert_conserved(layer, routing)
    assert ((routing.expert_indices >= 0) & (routing.expert_indices < experts)).all()
    with np.errstate(over="ignore"):
        finite = np.isfinite(x.astype(np.float32)).all(axis=1)
    assert np.isnan(y[~finite]).all()
    again, same = layer(x)
    assert_same_bits(again, y)
    for field in fields(RoutingResult):
        assert_array_equal(getattr(same, field.name), getattr(routing, field.name))
    if config.capacity_factor is None and config.expert_capacity is None:
        assert routing.expert_counts.sum() == tokens * config.top_k
        assert routing.num_dropped == 0
        for t in range(0, tokens, 1 + tokens // 5):
            assert_same_bits(layer(x[t])[0], y[t])


@given(data=st.data(), options=experts_options(), tokens=token_counts, width=sizes, experts=sizes)
def test_any_call_of_fused_experts(data, options, tokens, width, experts):
    draw = data.draw
    rng = np.random.default_rng(draw(seeds))
    hidden = min(draw(sizes), max(1, MOST_WEIGHTS // (experts * width)))
    activation, gated = options["activation"], "glu" in options["activation"]
    rows = 2 * hidden if gated else hidden
    bfloat16 = options["dtype"] == "bfloat16"
    dtype = BFLOAT16 if bfloat16 else draw(st.sampled_from(DTYPES_OF_TOKENS[:3]))
    up = (random_array(rng, experts, rows, width) / np.float32(np.sqrt(width))).astype(dtype)
    down = (random_array(rng, experts, width, hidden) / np.float32(np.sqrt(hidden))).astype(dtype)
    x = random_array(rng, tokens, width).astype(draw(st.sampled_from(DTYPES_OF_TOKENS)))
    top_k = draw(st.integers(0, 8))  # an expert may be chosen twice
    ids = rng.integers(0, experts, (tokens, top_k)).astype(draw(st.sampled_from(["int64", "int32", "uint8", "uint64"])))
    ids = ids if experts <= 256 else ids.astype(np.int64) % experts
    weights = rng.standard_normal((tokens, top_k)).astype(draw(st.sampled_from(DTYPES_OF_TOKENS)))
    laid_out = [KEPT_LAYOUT[draw(layouts)](array) for array in (x, up, down, weights, ids)]
    y = fused_experts(*laid_out, activation)
    plain = x.astype(np.float32)
    if bfloat16:
        plain = as_bfloat16(plain)
    used = np.full(tokens, top_k)
    if top_k == 0:
        expected = np.zeros((tokens, width))
    else:
        expected = reference.experts_forward(plain, ids.astype(int), np.float64(weights), used, activation, up, down)
    assert_close(y, expected, *_tolerance(bfloat16))


@given(data=st.data(), options=experts_options(), width=sizes, hidden=sizes, tokens=token_counts)
def test_any_expert(data, options, width, hidden, tokens):
    """Standing alone and as a view of a layer."""
    draw = data.draw
    rng = np.random.default_rng(draw(seeds))
    alone = moe_numba.Expert(width, hidden, activation=options["activation"], bias=options["bias"], seed=draw(seeds))
    config = MoeConfig(3, 1, None, input_dim=width, hidden_dim=hidden, **options)
    one_of_three = layer_on(draw, config).experts[draw(st.integers(0, 2))]
    rounded = options["dtype"] == "bfloat16"
    x = KEPT_LAYOUT[draw(layouts)](random_array(rng, tokens, width).astype(draw(st.sampled_from(DTYPES_OF_TOKENS))))
    plain = np.float32(x)
    ones = np.ones((tokens, 1))
    for expert, in_bfloat16 in ((alone, False), (one_of_three, rounded)):
        tokens_in = as_bfloat16(plain) if in_bfloat16 else plain
        expected = experts_reference(expert._experts, tokens_in, ones.astype(int) - 1, ones, ones[:, 0].astype(int))
        y = expert.forward_batch(x)
        assert_close(y, expected, *_tolerance(in_bfloat16))
        if tokens:
            assert_same_bits(expert.forward(x[-1]), y[-1])


@given(
    seed=seeds,
    tokens=token_counts,
    experts=sizes,
    layout=layouts,
    scale=st.sampled_from([1, 30, 1e-39, 1e30]),
    dtype=st.sampled_from(DTYPES_OF_TOKENS),
)
def test_any_logits(seed, tokens, experts, layout, scale, dtype):
    """softmax_rows and the losses."""
    with np.errstate(over="ignore"):
        logits = (random_array(np.random.default_rng(seed), tokens, experts) * np.float32(scale)).astype(dtype)
    assume(np.isfinite(np.float32(logits)).all())
    x = KEPT_LAYOUT[layout](logits)
    probs = moe_numba.softmax_rows(x)
    expected = reference.softmax_rows(np.float64(logits)) if tokens else np.zeros((0, experts))
    assert_allclose(probs, expected, rtol=1e-5, atol=1.2e-38)
    mean = expected.mean(axis=0) if tokens else np.zeros(experts)
    assert_allclose(moe_numba.expert_load_fractions(probs), mean, rtol=1e-5, atol=1e-37)
    values = np.float64(np.float32(logits))
    high = values.max(axis=1, keepdims=True, initial=-np.inf)
    z_loss = np.mean((np.log(np.exp(values - high).sum(axis=1)) + high[:, 0]) ** 2) if tokens else 0.0
    assert moe_numba.z_loss(x) == pytest.approx(z_loss, rel=1e-6)


@given(
    seed=seeds,
    tokens=token_counts,
    experts=sizes,
    width=sizes,
    noise_std=st.sampled_from([1e-3, 1.0, 30.0]),
    limit=limits().filter(lambda limit: "expert_capacity" not in limit),
    data=st.data(),
)
def test_any_noise(seed, tokens, experts, width, noise_std, limit, data):
    config = moe_numba.RouterConfig(width, experts, data.draw(st.integers(1, min(experts, 8))), **limit)
    x = random_array(np.random.default_rng(seed), tokens, width)
    routers = [moe_numba.NoisyTopKRouter(config, noise_std, seed) for _ in range(2)]
    first, second = routers[0].route(x), routers[0].route(x)
    assert_same_bits(routers[1].route(x).routing_probs, first.routing_probs)
    assert_same_bits(routers[1].route(x).routing_probs, second.routing_probs)
    for routing in (first, second):
        assert_routing(routing, config.top_k, config.capacity_factor, config.overflow)
    if tokens and experts > 1:
        assert not np.array_equal(first.routing_probs, second.routing_probs)
    noise = moe_numba.NoisyTopKRouter(config, noise_std, seed)._noise(tokens)
    logits = np.float64(x) @ np.float64(routers[0].gate_weight) + noise
    if tokens:
        assert_allclose(first.routing_probs, reference.softmax_rows(logits), rtol=1e-3, atol=1e-6)
