"""How experts' weights may be stored, and gates with parameters."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close, assert_same_bits, experts_reference, guarded_copy, random_array

from moe_numba import MoeValueError
from moe_numba.config import DTYPES
from moe_numba.experts import Expert, Experts
from moe_numba.kernels.projection import OUTER_BLOCK, OUTER_COLUMNS

#: Columns of the widest tile: of outer products, or a cache line of bfloat16.
WIDEST = max(OUTER_COLUMNS, 32)
GPT_OSS = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}
#: (E, H, F): a column, edges of tiles, several tiles and blocks of K, odd sums.
SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (4, OUTER_COLUMNS, OUTER_COLUMNS),
    (5, OUTER_COLUMNS + 1, 2 * WIDEST + 3),
    (2, 131, 500),
]


def random_experts(rng, shape, dtype="float32", bias=True, activation="swiglu", **options):
    """Experts of which every array ends at the end of readable memory."""
    num_experts, h, f = shape
    rows = f if activation in ("relu2", "gelu") else 2 * f
    up, down = (rows, h), (h, f)
    if options.get("transposed"):
        up, down = up[::-1], down[::-1]
    weights = [random_array(rng, num_experts, *size) for size in (up, down)]
    if dtype == "bfloat16":
        weights = [w.astype(ml_dtypes.bfloat16).view(np.uint16) for w in weights]
    biases = [random_array(rng, num_experts, n) for n in (rows, h)] if bias else []
    return Experts(activation, *map(guarded_copy, [*weights, *biases]), dtype=dtype, **options)


def choices(rng, tokens, num_experts, top_k):
    indices = rng.integers(0, num_experts, (tokens, top_k))
    return indices, rng.random((tokens, top_k), np.float32), np.full(tokens, top_k)


def assert_form(rng, experts, tokens, top_k=2):
    x = 3 * random_array(rng, tokens, experts.input_dim)
    choice = choices(rng, tokens, len(experts), top_k)
    tolerance = 2e-5
    if experts.up.dtype != np.float32:
        x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
        tolerance = 2**-7  # the hidden values are rounded
    y = experts.forward(x, *choice)
    assert_close(y, experts_reference(experts, x, *choice), tolerance)
    for t in range(0, tokens, 7):
        assert_same_bits(experts.forward(x[t : t + 1], *(c[t : t + 1] for c in choice))[0], y[t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 9, 300])
def test_storage(rng, tokens, shape, transposed, interleaved, dtype):
    options = {"transposed": transposed, "interleaved": interleaved}
    assert_form(rng, random_experts(rng, shape, dtype, **options), tokens)
    assert_form(rng, random_experts(rng, shape, dtype, bias=False, **options, **GPT_OSS), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu2", "gelu"])
def test_transposed_without_gate(rng, dtype, activation):
    assert_form(rng, random_experts(rng, (3, 37, 45), dtype, activation=activation, transposed=True), 40)


@pytest.mark.plain
@pytest.mark.parametrize("tokens", [1, 3, 18])
def test_transposed_wider_than_a_tile_and_longer_than_a_block(rng, tokens):
    shape = (2, OUTER_BLOCK + 3, WIDEST + 1)
    assert_form(rng, random_experts(rng, shape, activation="relu2", transposed=True), tokens)


@pytest.mark.parametrize(
    "parameters",
    [{"swiglu_limit": 0.5}, {"swiglu_alpha": 1.702}, {"swiglu_beta": 1.0}, {"swiglu_limit": 10.0}, GPT_OSS],
    ids=str,
)
def test_gates_with_parameters(rng, parameters):
    assert_form(rng, random_experts(rng, (3, 37, 45), **parameters), 40)
    plain = random_experts(rng, (3, 37, 45))
    altered = Experts("swiglu", *plain.arrays, **parameters)
    x, choice = 9 * random_array(rng, 20, 37), choices(rng, 20, 3, 1)
    assert np.abs(plain.forward(x, *choice) - altered.forward(x, *choice)).max() > 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_clamp_does_not_hide_nan(rng, value):
    experts = random_experts(rng, (1, 8, 8), **GPT_OSS)
    x = np.full((1, 8), value, np.float32)
    with np.errstate(invalid="ignore"):
        expected = experts_reference(experts, x, *choices(rng, 1, 1, 1))
    y = experts.forward(x, *choices(rng, 1, 1, 1))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_interleaved_and_concatenated_give_the_same_bits(rng, dtype):
    plain = random_experts(rng, (3, 70, 61), dtype)
    order = np.arange(122).reshape(2, 61).T.ravel()  # gate 0, up 0, gate 1, ...
    up, up_bias = plain.up[:, order], plain.up_bias[:, order]
    mixed = Experts("swiglu", up, plain.down, up_bias, plain.down_bias, dtype, interleaved=True)
    x, choice = random_array(rng, 33, 70), choices(rng, 33, 3, 2)
    assert_same_bits(mixed.forward(x, *choice), plain.forward(x, *choice))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_an_expert_shows_its_arrays_however_they_are_stored(rng, transposed, interleaved):
    experts = random_experts(rng, (3, 6, 5), transposed=transposed, interleaved=interleaved, **GPT_OSS)
    expert, x = experts[1], random_array(rng, 6)
    assert isinstance(expert, Expert)
    one = (np.array([[1]]), np.ones((1, 1), np.float32), np.ones(1, np.int64))
    for name in ("w1", "w3", "w2", "b1", "b3", "b2"):
        array = getattr(expert, name)
        setattr(expert, name, random_array(rng, *array.shape))
        assert_same_bits(expert.forward(x), experts.forward(x[None], *one)[0])
    gate, up = (x @ w + b for w, b in ((expert.w1, expert.b1), (expert.w3, expert.b3)))
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    assert_close(expert.forward(x), hidden @ expert.w2 + expert.b2)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e)), lambda e: e.astype("float32")]
)
def test_copies_keep_their_form(rng, again):
    experts = random_experts(rng, (2, 9, 11), transposed=True, interleaved=True, **GPT_OSS)
    x, choice = random_array(rng, 5, 9), choices(rng, 5, 2, 1)
    assert_same_bits(again(experts).forward(x, *choice), experts.forward(x, *choice))


def test_indices_of_no_expert(rng):
    experts = random_experts(rng, (4, 9, 11))
    x = random_array(rng, 50, 9)
    indices, weights, used = choices(rng, 50, 4, 3)
    outside = rng.random((50, 3)) < 0.4
    indices[outside] = rng.choice([-1, 4, 99], np.count_nonzero(outside))
    y = experts.forward(x, indices, weights, used, skip_invalid=True)
    assert_close(y, experts_reference(experts, x, indices, weights, used))
    assert not y[outside.all(axis=1)].any()
    with pytest.raises(MoeValueError, match="topk_ids"):
        experts.forward(x, indices, weights, used)


def test_wrong_shapes_name_the_layout(rng):
    up, down = random_array(rng, 2, 6, 10), random_array(rng, 2, 5, 6)
    Experts("swiglu", up, down, transposed=True)
    with pytest.raises(MoeValueError, match=r"gate_up_proj .*\(num_experts, input_dim, 2 \* hidden_dim\)"):
        Experts("swiglu", up[0], down, transposed=True)
    with pytest.raises(MoeValueError, match=r"down_proj .*\(2, 5, 6\)"):
        Experts("swiglu", up, down.swapaxes(1, 2), transposed=True)
