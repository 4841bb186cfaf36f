"""Weight formats: what is stored, and that a layer computes with it."""

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits

from moe_numba import MoeConfig, MoeLayer, MoeValueError, fused_experts, reference
from moe_numba.config import ACTIVATIONS, DTYPES
from moe_numba.formats import FORMATS
from moe_numba.kernels.projection import BLOCK_STEPS
from moe_numba.simd.target import LANES

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BLOCK = 2 * LANES * BLOCK_STEPS  # values of K in one block of bfloat16


def bfloat16_layer(input_dim=40, hidden_dim=24, activation="swiglu", bias=True, **options):
    config = MoeConfig(4, 2, None, 0.0, input_dim, hidden_dim, activation=activation, bias=bias, **options)
    layer = MoeLayer(config, seed=5)
    if bias:
        rng = np.random.default_rng(6)
        for array in (layer.experts.up_bias, layer.experts.down_bias):
            array[...] = rng.standard_normal(array.shape)
    return layer.astype("bfloat16")


def expected(layer, x, routing):
    """The specification on the rounded weights and tokens; hidden values are not rounded."""
    experts = layer.experts
    weights = (np.float64(w) for w in (experts.up, experts.down))
    biases = (experts.up_bias, experts.down_bias)
    rounded = x.astype(BFLOAT16).astype(np.float64)
    chosen = (routing.expert_indices, routing.expert_weights, routing.slots_used)
    return reference.experts_forward(rounded, *chosen, experts.activation, *weights, *biases)


def test_every_dtype_of_a_config_has_a_format():
    assert set(FORMATS) == set(DTYPES)
    assert all(name == format_.name for name, format_ in FORMATS.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_bound(rng, dtype):
    weights = (rng.standard_normal(10_000) * 10.0 ** rng.integers(-30, 30, 10_000)).astype(np.float32)
    stored = np.float64(FORMATS[dtype].encode(weights))
    assert (np.abs(stored - weights) <= FORMATS[dtype].error * np.abs(weights)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_what_is_encoded_copies_nothing(dtype):
    stored = np.zeros((2, 3), FORMATS[dtype].values)
    assert FORMATS[dtype].encode(stored) is stored
    assert np.shares_memory(FORMATS[dtype].encode(stored.view(FORMATS[dtype].storage)), stored)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_layer_is_the_specification_within_its_rounding(rng, activation, bias):
    layer = bfloat16_layer(activation=activation, bias=bias)
    x = rng.standard_normal((30, 40)).astype(np.float32)
    y, routing = layer(x)
    exact = expected(layer, x, routing)
    assert np.abs(y - exact).max() <= 2**-8 * np.abs(exact).max()  # hidden values are rounded


@pytest.mark.parametrize(
    ("input_dim", "hidden_dim"), [(1, 1), (31, 33), (32, 64), (BLOCK, 5), (BLOCK + 1, 3), (7, 2 * BLOCK + 35)]
)
def test_bfloat16_of_any_width(rng, input_dim, hidden_dim):
    layer = bfloat16_layer(input_dim, hidden_dim)
    x = rng.standard_normal((9, input_dim)).astype(np.float32)
    y, routing = layer(x)
    exact = expected(layer, x, routing)
    assert np.abs(y - exact).max() <= 2**-8 * np.abs(exact).max()


def test_activations_are_rounded_to_nearest_even():
    """One expert that copies its input: what comes out is the rounded input, rounded once more."""
    eye = np.eye(8, dtype=BFLOAT16)[None]
    x = np.float32([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, -(1 + 2**-8), 3e38, 1e-30, 0])[None]
    y = fused_experts(x, eye, eye, np.ones((1, 1)), np.zeros((1, 1), int), "identity")
    assert_same_bits(y, x.astype(BFLOAT16).astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_no_number_stays_alone(rng, value):
    layer = bfloat16_layer()
    x = rng.standard_normal((20, 40)).astype(np.float32)
    y, _ = layer(x)
    x[7, 3] = value
    z, _ = layer(x)
    assert np.isnan(z[7]).all()
    assert_same_bits(np.delete(z, 7, 0), np.delete(y, 7, 0))


def test_weights_may_be_uint16_or_bfloat16_and_are_not_copied(rng):
    layer = bfloat16_layer(bias=False)
    x = rng.standard_normal((5, 40)).astype(np.float32)
    up, down = layer.experts.up, layer.experts.down
    for view in (BFLOAT16, np.uint16):
        arrays = {"gate_up_proj": up.view(view), "down_proj": down.view(view)}
        same = MoeLayer.from_weights(layer.config, router_weight=layer.router.weight, **arrays)
        assert np.shares_memory(same.experts.up, up)
        assert np.shares_memory(same.experts.down, down)
        assert_same_bits(same(x)[0], layer(x)[0])


def test_uint16_is_refused_for_float32_layers():
    config = MoeConfig(bias=False)
    up, down = np.zeros((8, 128, 64), np.uint16), np.zeros((8, 64, 128), np.float32)
    with pytest.raises(MoeValueError, match=r"up_proj was an array of shape .* dtype uint16"):
        MoeLayer.from_weights(config, router_weight=np.zeros((8, 64)), up_proj=up, down_proj=down)


def test_fused_experts_computes_in_the_weights_format(rng):
    layer = bfloat16_layer(bias=False)
    x = rng.standard_normal((5, 40)).astype(np.float32)
    y, routing = layer(x)
    chosen = (routing.expert_weights, routing.expert_indices)
    assert_same_bits(fused_experts(x, layer.experts.up, layer.experts.down, *chosen), y)


def test_views_are_live(rng):
    layer = bfloat16_layer(bias=False)
    x = rng.standard_normal((5, 40)).astype(np.float32)
    assert layer.experts[1].w1.dtype == BFLOAT16
    before = layer.experts[1].forward_batch(x)
    layer.experts[1].w2 *= 2
    assert_same_bits(layer.experts[1].forward_batch(x), 2 * before)


def test_save_and_load(rng, tmp_path):
    layer = bfloat16_layer()
    layer.save(tmp_path / "layer.safetensors")
    loaded = MoeLayer.load(tmp_path / "layer.safetensors")
    x = rng.standard_normal((5, 40)).astype(np.float32)
    assert loaded.config == layer.config
    assert_same_bits(loaded(x)[0], layer(x)[0])


def test_astype_there_and_back():
    layer = bfloat16_layer()
    assert layer.astype("bfloat16").experts.up is layer.experts.up
    back = layer.astype("float32")
    assert back.config.dtype == "float32"
    assert_same_bits(back.experts.up, layer.experts.up.astype(np.float32))
    with pytest.raises(MoeValueError, match="dtype was 'float8'"):
        layer.astype("float8")


def test_new_layer_in_bfloat16():
    layer = MoeLayer(MoeConfig(dtype="bfloat16"), seed=3)
    assert_same_bits(layer.experts.up, MoeLayer(MoeConfig(), seed=3).experts.up.astype(BFLOAT16))
