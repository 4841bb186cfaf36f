"""Configurations: defaults, validation, round trips."""

import dataclasses
import inspect
import json

import numpy as np
import pytest

from moe_numba import MoeConfig, MoeValueError, RouterConfig
from moe_numba.config import ACTIVATIONS

DEFAULTS = {
    "num_experts": 8,
    "top_k": 2,
    "capacity_factor": 1.25,
    "noise_std": 0.0,
    "input_dim": 64,
    "hidden_dim": 128,
}
CONFIGS = [
    MoeConfig(),
    MoeConfig(64, 8, None, 0.1, 2048, 1024, activation="swiglu", bias=False, overflow="drop"),
    MoeConfig(capacity_factor=1 / 3, noise_std=1e-300),
    MoeConfig(
        256,
        8,
        None,
        activation="swiglu",
        scoring="sigmoid",
        selection_bias=True,
        n_group=8,
        topk_group=4,
        group_score="top2_sum",
        group_mask="-inf",
        norm_eps=1e-20,
        routed_scaling_factor=2.5,
        shared_hidden_dim=32,
    ),
    MoeConfig(4, 1, None, expert_capacity=64, overflow="drop", num_identity_experts=2),
    MoeConfig(4, 2, None, norm_topk_prob=False, sparsemixer_eps=0.01),
    RouterConfig(16, 4, 2, 1.1),
    RouterConfig(16, 4, 2, None, overflow="drop"),
]


def test_defaults_and_their_order():
    config = MoeConfig()
    positional = [p for p in inspect.signature(MoeConfig).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert {p.name: p.default for p in positional} == DEFAULTS
    assert [p.name for p in positional] == list(DEFAULTS)
    assert (config.activation, config.bias, config.dtype, config.overflow) == ("relu", True, "float32", "next")


def test_router_config_order():
    config = RouterConfig(16, 4, 2, 1.5)
    assert (config.input_dim, config.num_experts, config.top_k, config.capacity_factor) == (16, 4, 2, 1.5)


def test_router_config_of_a_layer_config():
    config = MoeConfig(6, 3, None, input_dim=10, overflow="drop")
    assert config.router_config() == RouterConfig(10, 6, 3, None, overflow="drop")


@pytest.mark.parametrize("config", CONFIGS)
def test_frozen_and_hashable(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 1
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trips_are_exact(config):
    kind = type(config)
    assert kind.from_dict(config.to_dict()) == config
    assert kind.from_json(config.to_json()) == config
    assert json.loads(config.to_json()) == config.to_dict()
    assert list(config.to_dict()) == [f.name for f in dataclasses.fields(config)]


def test_numpy_numbers_become_python_numbers():
    config = MoeConfig(np.int64(4), np.uint8(1), np.float32(1.5), np.float64(0.5), np.int32(8), np.int16(4))
    assert {type(value) for value in config.to_dict().values()} == {int, float, str, bool, type(None)}
    assert MoeConfig.from_json(config.to_json()) == config
    assert type(MoeConfig(capacity_factor=2).capacity_factor) is float


def test_from_dict_takes_defaults_for_missing_keys():
    assert MoeConfig.from_dict({}) == MoeConfig()
    assert MoeConfig.from_dict({"top_k": 1}) == MoeConfig(top_k=1)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_accepted(name):
    assert MoeConfig(activation=name).activation == name


COUNTS = [0, -1, 1.0, "2", None, True, np.True_, np.nan]
WRONG = [
    *(("num_experts", value) for value in COUNTS),
    *(("top_k", value) for value in [*COUNTS, 9]),
    *(("input_dim", value) for value in COUNTS),
    *(("hidden_dim", value) for value in COUNTS),
    *(("capacity_factor", value) for value in [0, 0.0, -1.0, np.nan, np.inf, "1", True, [1.0], 10**400]),
    *(("noise_std", value) for value in [-0.1, np.nan, np.inf, "0", False, None, 10**400]),
    *(("activation", value) for value in ["RELU", "", None, 3, ["relu"]]),
    *(("bias", value) for value in [0, 1, "True", None]),
    *(("dtype", value) for value in ["float16", "f4", np.float32, None]),
    *(("overflow", value) for value in ["skip", "", None, 0]),
    *(("scoring", value) for value in ["tanh", None]),
    *((name, value) for name in ("group_score", "group_mask") for value in ["mean", None]),
    *(("expert_capacity", value) for value in [0, 1.5, True]),
    *(("n_group", value) for value in [0, 3, 16]),
    *(("topk_group", value) for value in [0, 2, 1.0]),
    *(("norm_eps", value) for value in [-1e-20, np.inf, None]),
    *(("routed_scaling_factor", value) for value in [0, -1, np.nan, None]),
    *(("logit_softcap", value) for value in [0, -1, np.nan, "30"]),
    *((name, 1) for name in ("score_before_topk", "norm_topk_prob", "router_bias", "selection_bias")),
    *((name, value) for name in ("swiglu_limit", "swiglu_alpha") for value in [0, -1, np.nan, "7"]),
    *(("swiglu_beta", value) for value in [np.inf, None]),
    *((name, 0) for name in ("apply_router_weight_on_input", "shared_gate", "transposed", "interleaved")),
    *((name, value) for name in ("num_identity_experts", "shared_hidden_dim") for value in [-1, 1.0, None]),
    *(("sparsemixer_eps", value) for value in [0, np.inf, "0.01"]),
    # Kernels compute with them as float32.
    *((name, 1e39) for name in ("noise_std", "routed_scaling_factor", "logit_softcap", "swiglu_limit", "swiglu_alpha")),
    *((name, 1e-46) for name in ("routed_scaling_factor", "logit_softcap", "swiglu_alpha")),
    ("swiglu_beta", -1e39),
]
WRONG_ROUTER = [w for w in WRONG if w[0] in RouterConfig.__dataclass_fields__]


def _short(value):
    return str(value)[:20]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=_short)
def test_wrong_values_are_named(name, value):
    with pytest.raises(MoeValueError, match=rf"^{name} was .*, but must be "):
        MoeConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), WRONG_ROUTER, ids=_short)
def test_wrong_router_values_are_named(name, value):
    valid = {"input_dim": 4, "num_experts": 8, "top_k": 2, "capacity_factor": 1.0}
    with pytest.raises(MoeValueError, match=rf"^{name} was .*, but must be "):
        RouterConfig(**(valid | {name: value}))


CLASHES = {
    "activation": [{"swiglu_limit": 7.0}, {"swiglu_alpha": 1.702, "activation": "geglu"}, {"swiglu_beta": 1.0}],
    "capacity_factor": [{"expert_capacity": 64, "capacity_factor": 1.0}, {"sparsemixer_eps": 0.01}],
    "apply_router_weight_on_input": [{"apply_router_weight_on_input": True, "num_identity_experts": 1}],
    "interleaved": [{"interleaved": True, "activation": "gelu"}],
    "group_score": [{"n_group": 8, "group_score": "top2_sum"}],
    "n_group": [{"num_experts": 128, "n_group": 64}],
    "noise_std": [{"noise_std": 1.0, "sparsemixer_eps": 0.01, "capacity_factor": None}],
    "score_before_topk": [{"n_group": 2, "score_before_topk": False}],
    "shared_gate": [{"shared_gate": True}],
    "top_k": [{"top_k": 5, "n_group": 4, "topk_group": 2}, {"top_k": 11, "num_identity_experts": 2}],
}


@pytest.mark.parametrize(("name", "values"), [(name, v) for name, all_ in CLASHES.items() for v in all_], ids=_short)
def test_options_that_exclude_each_other_are_named(name, values):
    with pytest.raises(MoeValueError, match=rf"^{name} was .*, but must be "):
        MoeConfig(**values)


def test_text_says_what_is_not_as_usual():
    assert repr(MoeConfig()) == "MoeConfig()"
    config = MoeConfig(4, top_k=1, scoring="sigmoid")
    assert repr(config) == "MoeConfig(num_experts=4, top_k=1, scoring='sigmoid')"
    assert str(config) == "4 experts, 1 per token, 64 -> 128 -> 64, relu, float32"
    router = RouterConfig(4, 3, 2, None, norm_topk_prob=False)
    expected = "RouterConfig(input_dim=4, num_experts=3, top_k=2, capacity_factor=None, norm_topk_prob=False)"
    assert repr(router) == expected
    assert eval(expected) == router


@pytest.mark.parametrize("kind", [MoeConfig, RouterConfig])
@pytest.mark.parametrize("values", [{"topk": 1}, {1: 2}, [("top_k", 1)], None, "top_k"])
def test_from_dict_refuses_what_it_does_not_know(kind, values):
    with pytest.raises(MoeValueError, match=r"^values was "):
        kind.from_dict(values)


def test_from_dict_names_a_missing_field():
    with pytest.raises(MoeValueError, match="capacity_factor"):
        RouterConfig.from_dict({"input_dim": 1, "num_experts": 1, "top_k": 1})


NO_CONFIGS = ["", "{", "[]", "3", "null", '{"top_k": NaN}', '{"topk": 1}', None, 5, "[" * 100_000]


@pytest.mark.parametrize("text", NO_CONFIGS, ids=_short)
def test_from_json_refuses_what_is_no_config(text):
    with pytest.raises(MoeValueError):
        MoeConfig.from_json(text)
