"""Layers of the model families' forms: shared and identity experts, weights on the input, stored forms."""

import copy
import pickle

import numpy as np
import pytest
from helpers import assert_close, assert_same_bits, block_reference, layer_reference, random_array

from moe_numba import CheckpointError, MoeConfig, MoeLayer, MoeValueError
from moe_numba.config import DTYPES

PLAIN = {"num_experts": 6, "top_k": 2, "capacity_factor": None, "input_dim": 33, "hidden_dim": 20}
FORMS = {
    "shared": {"shared_hidden_dim": 41},
    "shared_gate": {"shared_hidden_dim": 41, "shared_gate": True, "bias": True},
    "identity": {"num_identity_experts": 3, "norm_topk_prob": False, "routed_scaling_factor": 6.0},
    "weight_on_input": {"apply_router_weight_on_input": True, "scoring": "sigmoid", "norm_topk_prob": False},
    "transposed": {"transposed": True, "shared_hidden_dim": 8},
    "interleaved": {
        "interleaved": True,
        "transposed": True,
        "bias": True,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
        "swiglu_beta": 1.0,
        "router_bias": True,
    },
    "relu2": {"activation": "relu2", "shared_hidden_dim": 12},
    "biased": {"scoring": "sigmoid", "selection_bias": True, "norm_eps": 1e-20, "routed_scaling_factor": 2.5},
    "sparsemixer": {"sparsemixer_eps": 0.01},
}
EACH_FORM = pytest.mark.parametrize("form", FORMS)


def layer_of(form, seed=0, **options):
    """A layer of which every array is random."""
    layer = MoeLayer(MoeConfig(**PLAIN, **({"activation": "swiglu", "bias": False} | FORMS[form] | options)), seed)
    rng = np.random.default_rng(seed)
    tensors = layer._tensors()
    for name in sorted(set(tensors) - {"router_weight"}):
        if name.endswith("bias"):
            tensors[name][...] = random_array(rng, *tensors[name].shape)
    return layer


@EACH_FORM
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_forms(rng, form, tokens):
    layer = layer_of(form)
    x = random_array(rng, tokens, 33)
    y, routing = layer(x)
    assert_close(y, block_reference(layer, x, routing))
    if form == "identity" and tokens > 1:
        assert (routing.expert_indices >= 6).any()
        assert len(routing.expert_counts) == 9


@EACH_FORM
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_batch(rng, form, dtype):
    layer = layer_of(form).astype(dtype)
    x = random_array(rng, 45, 33)
    y, _ = layer(x)
    assert_same_bits(layer(x)[0], y)
    for i in range(0, 45, 4):
        assert_same_bits(layer(x[i])[0], y[i])


@EACH_FORM
@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load(tmp_path, rng, form, dtype):
    layer = layer_of(form).astype(dtype)
    layer.save(tmp_path / "layer.safetensors")
    x = random_array(rng, 9, 33)
    for again in (
        MoeLayer.load(tmp_path / "layer.safetensors"),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
    ):
        assert again.config == layer.config
        assert_same_bits(again(x)[0], layer(x)[0])


@EACH_FORM
def test_from_weights_uses_arrays_in_place(form):
    layer = layer_of(form)
    tensors = layer._tensors()
    again = MoeLayer.from_weights(layer.config, **tensors)._tensors()
    assert set(again) == set(tensors)
    for name, array in tensors.items():
        assert np.shares_memory(array, again[name]), name


@EACH_FORM
def test_missing_and_needless_arrays_are_named(tmp_path, form):
    layer = layer_of(form)
    tensors = layer._tensors()
    for name in tensors:
        rest = {other: array for other, array in tensors.items() if other != name}
        with pytest.raises((MoeValueError, TypeError), match=name):
            MoeLayer.from_weights(layer.config, **rest)
        with pytest.raises(MoeValueError, match=name):
            MoeLayer.from_weights(layer.config, **rest, **{name: tensors[name][..., :-1]})
    for name in {"router_bias", "e_score_correction_bias", "shared_down_proj", "shared_gate_weight"} - set(tensors):
        with pytest.raises(MoeValueError, match=f"{name} was given"):
            MoeLayer.from_weights(layer.config, **tensors, **{name: np.zeros(6, np.float32)})


def test_a_file_of_another_form_is_refused(tmp_path):
    layer_of("shared").save(tmp_path / "layer.safetensors")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "layer.safetensors")
    del tensors["shared_down_proj"]
    save_file(tensors, tmp_path / "broken.safetensors", {"config": layer_of("shared").config.to_json()})
    with pytest.raises(CheckpointError, match="shared_down_proj"):
        MoeLayer.load(tmp_path / "broken.safetensors")


def test_switch_drops_what_an_expert_has_no_room_for(rng):
    config = {**PLAIN, "top_k": 1, "activation": "relu", "bias": False, "norm_topk_prob": False}
    layer = MoeLayer(MoeConfig(**config, expert_capacity=4, overflow="drop"))
    x = random_array(rng, 50, 33)
    y, routing = layer(x)
    assert routing.expert_counts.max() == 4
    dropped = routing.slots_used == 0
    assert routing.num_dropped == np.count_nonzero(dropped) == 50 - routing.expert_counts.sum() > 0
    assert not y[dropped].any()
    assert_close(y, layer_reference(layer, x, routing))


def test_a_nan_token_spoils_no_other(rng):
    for form in FORMS:
        layer = layer_of(form)
        x = random_array(rng, 8, 33)
        y, _ = layer(x)
        x[3] = np.nan
        spoilt, _ = layer(x)
        assert np.isnan(spoilt[3]).all(), form
        assert_same_bits(np.delete(spoilt, 3, 0), np.delete(y, 3, 0))
