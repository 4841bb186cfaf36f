"""Every wrong argument is a MoeValueError that names the argument, what it was and the rule.

Wrong fields of a configuration are in test_config.py.
"""

import re

import numpy as np
import pytest
from helpers import random_array

import moe_numba
from moe_numba import (
    CheckpointError,
    Expert,
    MoeConfig,
    MoeError,
    MoeLayer,
    MoeValueError,
    NoisyTopKRouter,
    RouterConfig,
    TopKRouter,
    fused_experts,
)

CONFIG = MoeConfig(3, 2, None, input_dim=4, hidden_dim=5)
ROUTER = RouterConfig(4, 3, 2, None)


def test_types():
    assert issubclass(MoeError, Exception)
    assert issubclass(MoeValueError, (MoeError, ValueError))
    assert issubclass(MoeValueError, MoeError)
    assert issubclass(MoeValueError, ValueError)
    assert issubclass(CheckpointError, MoeError)
    assert not issubclass(CheckpointError, ValueError)


def _raises(name, was, rule, call):
    """`call` must fail with a message that says all three. was, rule: pieces of text."""
    with pytest.raises(MoeValueError) as raised:
        call()
    message = str(raised.value)
    assert re.match(rf"{name}\b", message), message
    assert was in message, message
    assert "must be" in message, message
    assert rule in message, message


# ---- tokens ----


def _layer(x):
    return MoeLayer(CONFIG)(x)


def _route(x):
    return TopKRouter(ROUTER).route(x)


def _expert(x):
    return Expert(4, 5).forward(x)


def _expert_batch(x):
    return Expert(4, 5).forward_batch(x)


RAGGED = [[1.0, 2.0, 3.0, 4.0], [1.0]]
WRONG_KINDS = {
    "int64": np.zeros((2, 4), np.int64),
    "bool": np.zeros((2, 4), bool),
    "complex64": np.zeros((2, 4), np.complex64),
    "object": np.zeros((2, 4), object),
    "<U": np.full((2, 4), "a"),
    "masked": np.ma.array(np.zeros((2, 4), np.float32)),
    "": RAGGED,
}


@pytest.mark.parametrize("was", WRONG_KINDS, ids=lambda was: was or "ragged")
@pytest.mark.parametrize("call", [_layer, _route, _expert_batch])
def test_tokens_of_a_wrong_kind(call, was):
    _raises("x", was, "", lambda: call(WRONG_KINDS[was]))


@pytest.mark.parametrize(
    ("call", "shapes", "rule"),
    [
        (_layer, [(), (3,), (2, 5), (4, 2), (2, 4, 1), (0,), (0, 3)], "(..., 4)"),
        (_route, [(), (4,), (2, 5), (1, 2, 4)], "(T, 4)"),
        (_expert, [(), (5,), (1, 4)], "(4,)"),
        (_expert_batch, [(), (4,), (2, 5), (1, 2, 4)], "(N, 4)"),
    ],
)
def test_tokens_of_a_wrong_shape(call, shapes, rule):
    for shape in shapes:
        _raises("x", str(shape), rule, lambda shape=shape: call(np.zeros(shape, np.float32)))


@pytest.mark.parametrize("value", [None, "tokens", 1.0, {}, object()])
@pytest.mark.parametrize("call", [_layer, _route, _expert, _expert_batch])
def test_tokens_that_are_no_array(call, value):
    _raises("x", "", "", lambda: call(value))


class _NoArray:
    """As a tensor of torch that needs a gradient, or of a dtype that NumPy has not."""

    def __init__(self, error):
        self.error = error

    def __array__(self, *_, **__):
        raise self.error("no numpy")


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
@pytest.mark.parametrize("call", [_layer, _route, _expert, _expert_batch])
def test_tokens_that_refuse_to_be_an_array(call, error):
    _raises("x", "no numpy", "", lambda: call(_NoArray(error)))


@pytest.mark.parametrize("dtype", ["int32", "nonsense", "32-bit", "(,)f4", np.bool_, complex, object, 7])
def test_output_dtype_must_be_a_float(dtype):
    _raises("dtype", "", "float", lambda: MoeLayer(CONFIG).forward(np.zeros((2, 4)), dtype=dtype))


# ---- layers ----


@pytest.mark.parametrize("config", [{}, 3, "config", ROUTER])
def test_layer_needs_a_config(config):
    _raises("config", "", "MoeConfig", lambda: MoeLayer(config))
    _raises("config", "", "MoeConfig", lambda: MoeLayer.from_weights(config, router_weight=None, down_proj=None))


@pytest.mark.parametrize("seed", [-1, 1.5, "1", None, True])
def test_seed(seed):
    _raises("seed", repr(seed), "integer", lambda: MoeLayer(CONFIG, seed=seed))
    _raises("seed", repr(seed), "integer", lambda: MoeLayer(CONFIG, seed=seed, init="sine"))
    _raises("seed", repr(seed), "integer", lambda: Expert(4, 5, seed=seed))
    _raises("seed", repr(seed), "integer", lambda: TopKRouter(ROUTER, seed=seed))


@pytest.mark.parametrize("seed", [-1, 1.5, "1", True])
def test_seed_of_given_weights(seed):
    weights = {"router_weight": np.zeros((3, 4)), "up_proj": np.zeros((3, 5, 4)), "down_proj": np.zeros((3, 4, 5))}
    config = MoeConfig(3, 2, input_dim=4, hidden_dim=5, bias=False)
    _raises("seed", repr(seed), "integer", lambda: MoeLayer.from_weights(config, **weights, seed=seed))


def test_the_largest_seed_and_integers_that_python_does_not_print():
    MoeLayer(MoeConfig(shared_hidden_dim=4, shared_gate=True), seed=2**63 - 1)
    _raises("top_k", "thousands of digits", "below 2**63", lambda: MoeConfig(top_k=10**5000))
    _raises("capacity_factor", "thousands of digits", "", lambda: MoeConfig(capacity_factor=10**5000))


@pytest.mark.parametrize("init", ["zeros", "", None, 1])
def test_init(init):
    _raises("init", repr(init), "'xavier', 'sine'", lambda: MoeLayer(CONFIG, init=init))
    _raises("init", repr(init), "'xavier', 'sine'", lambda: Expert(4, 5, init=init))


WEIGHTS = {
    "router_weight": (3, 4),
    "up_proj": (3, 5, 4),
    "down_proj": (3, 4, 5),
    "up_bias": (3, 5),
    "down_bias": (3, 4),
}


def _from_weights(**changes):
    arrays = {name: np.zeros(shape, np.float32) for name, shape in WEIGHTS.items()}
    return MoeLayer.from_weights(CONFIG, **(arrays | changes))


@pytest.mark.parametrize("name", WEIGHTS)
def test_from_weights_names_the_wrong_array(name):
    shape = WEIGHTS[name]
    for wrong in (shape[::-1], (*shape, 1), shape[1:]):
        _raises(name, str(wrong), "shape", lambda wrong=wrong: _from_weights(**{name: np.zeros(wrong, np.float32)}))
    _raises(name, "int32", "float32", lambda: _from_weights(**{name: np.zeros(shape, np.int32)}))


@pytest.mark.parametrize("name", WEIGHTS)
def test_from_weights_needs_every_array(name):
    with pytest.raises(MoeValueError, match=f"^{name} was "):
        _from_weights(**{name: None})


@pytest.mark.parametrize("name", ["gate_up_proj", "gate_up_bias"])
def test_from_weights_refuses_arrays_that_do_not_belong(name):
    _raises(name, "given", "left out", lambda: _from_weights(**{name: np.zeros((3, 10, 4), np.float32)}))


# ---- experts ----


@pytest.mark.parametrize("name", ["input_dim", "hidden_dim"])
@pytest.mark.parametrize("value", [0, -1, 2.0, None, True])
def test_expert_sizes(name, value):
    sizes = {"input_dim": 4, "hidden_dim": 5} | {name: value}
    _raises(name, repr(value), "integer of at least 1", lambda: Expert(**sizes))


@pytest.mark.parametrize("activation", ["tanh", None, ["relu"]])
def test_activation(activation, rng):
    _raises("activation", repr(activation), "'swiglu'", lambda: Expert(4, 5, activation=activation))
    arguments = _fused(rng, {})
    _raises("activation", repr(activation), "'swiglu'", lambda: fused_experts(**arguments, activation=activation))


def _fused(rng, changes):
    arguments = {
        "hidden_states": random_array(rng, 6, 4),
        "gate_up_proj": random_array(rng, 3, 10, 4),
        "down_proj": random_array(rng, 3, 4, 5),
        "topk_weights": random_array(rng, 6, 2),
        "topk_ids": rng.integers(0, 3, (6, 2)),
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("name", "value", "was", "rule"),
    [
        ("hidden_states", np.zeros((6, 5)), "(6, 5)", "(T, 4)"),
        ("hidden_states", np.zeros(4), "(4,)", "(T, 4)"),
        ("hidden_states", np.zeros((6, 4), int), "int64", "float32"),
        ("gate_up_proj", np.zeros((3, 9, 4)), "(3, 9, 4)", "2 * hidden_dim"),
        ("gate_up_proj", np.zeros((10, 4)), "(10, 4)", "2 * hidden_dim"),
        ("gate_up_proj", np.zeros((0, 10, 4)), "(0, 10, 4)", "none of them 0"),
        ("down_proj", np.zeros((3, 5, 4)), "(3, 5, 4)", "(3, 4, 5)"),
        ("topk_weights", np.zeros((5, 2)), "(5, 2)", "(6, K)"),
        ("topk_weights", np.zeros(6), "(6,)", "(6, K)"),
        ("topk_ids", np.zeros((6, 3), int), "(6, 3)", "(6, 2)"),
        ("topk_ids", np.zeros((6, 2)), "float64", "integers"),
        ("topk_ids", np.zeros((6, 2), bool), "bool", "integers"),
        ("topk_ids", np.ma.zeros((6, 2), int), "masked", "without a mask"),
        ("topk_ids", None, "object", "integers"),
        ("topk_ids", [[1, 2], [1]], "", "integers"),
    ],
)
def test_fused_experts(rng, name, value, was, rule):
    _raises(name, was, rule, lambda: fused_experts(**_fused(rng, {name: value})))


def test_fused_experts_checks_ids_before_it_reads_weights(rng):
    """An id that is no expert must not be used as an address, whatever the weight."""
    bad = np.full((6, 2), 10**15)
    _raises("topk_ids", str(10**15), "from 0 to 2", lambda: fused_experts(**_fused(rng, {"topk_ids": bad})))


# ---- routers and functions ----


@pytest.mark.parametrize("config", [None, {}, "config"])
def test_router_needs_a_config(config):
    _raises("config", repr(config), "RouterConfig", lambda: TopKRouter(config))


@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf, "1", None])
def test_noise_std(value):
    _raises("noise_std", repr(value), "at least 0", lambda: NoisyTopKRouter(ROUTER, value))


def test_gate_weight():
    router = TopKRouter(ROUTER)
    for shape in ((3, 4), (4,), (4, 3, 1)):
        _raises(
            "gate_weight", str(shape), "(4, 3)", lambda shape=shape: setattr(router, "gate_weight", np.zeros(shape))
        )
    _raises("weight", "(4, 3)", "", lambda: TopKRouter(ROUTER, weight=np.zeros((4, 3))))


def test_gate_weight_that_is_read_only():
    weight = np.zeros((3, 4), np.float32)
    weight.flags.writeable = False
    with pytest.raises(MoeValueError, match=r"^gate_weight .*read-only"):
        TopKRouter(ROUTER, weight=weight).gate_weight = np.ones((4, 3))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("num_tokens", (-1, 2, 4, 1.0)),
        ("num_tokens", (1.5, 2, 4, 1.0)),
        ("top_k", (8, 0, 4, 1.0)),
        ("num_experts", (8, 2, 0, 1.0)),
        ("capacity_factor", (8, 2, 4, 0)),
        ("capacity_factor", (8, 2, 4, np.nan)),
        ("capacity_factor", (8, 2, 4, "1")),
    ],
)
def test_capacity_limit(name, arguments):
    value = dict(zip(["num_tokens", "top_k", "num_experts", "capacity_factor"], arguments, strict=True))[name]
    _raises(name, repr(value), "", lambda: moe_numba.capacity_limit(*arguments))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (moe_numba.softmax_rows, "logits"),
        (moe_numba.z_loss, "logits"),
        (moe_numba.expert_load_fractions, "probs"),
    ],
)
def test_functions_of_a_matrix(function, name):
    for shape in ((), (3,), (1, 2, 3)):
        _raises(name, str(shape), "(T, E)", lambda shape=shape: function(np.zeros(shape)))
    _raises(name, "int64", "float32", lambda: function(np.zeros((2, 3), np.int64)))
    _raises(name, "", "(T, E)", lambda: function(RAGGED))


@pytest.mark.parametrize("n", [0, -1, 1.0, "1", None, True, 10**6])
def test_set_num_threads(n):
    before = moe_numba.get_num_threads()
    _raises("n", repr(n), "at", lambda: moe_numba.set_num_threads(n))
    assert moe_numba.get_num_threads() == before


def test_balance_loss_of_something_else():
    _raises("routing", "3", "a RoutingResult", lambda: MoeLayer(CONFIG).balance_loss(3))


def test_an_expert_that_is_not_there():
    with pytest.raises(IndexError, match="expert was 3, but must be from -3 to 2"):
        MoeLayer(CONFIG).experts[3]
