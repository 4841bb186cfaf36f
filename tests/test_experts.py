"""Experts, one Expert, and fused_experts against reference.expert."""

import numpy as np
import pytest
from helpers import ALL_ACTIVATIONS, assert_close, assert_same_bits, experts_reference, guarded_copy, random_array
from numpy.testing import assert_array_equal

from moe_numba import Expert, MoeConfig, MoeLayer, MoeValueError, fused_experts, reference
from moe_numba.config import ACTIVATIONS
from moe_numba.experts import Experts


def _experts(rng, activation, num_experts, input_dim, hidden_dim, bias):
    """Random experts of which every array ends at the end of readable memory."""
    rows = hidden_dim * (2 if ACTIVATIONS[activation].gated else 1)
    shapes = [(num_experts, rows, input_dim), (num_experts, input_dim, hidden_dim)]
    if bias:
        shapes += [(num_experts, rows), (num_experts, input_dim)]
    return Experts(activation, *(guarded_copy(random_array(rng, *shape)) for shape in shapes))


def _choices(rng, tokens, num_experts, top_k):
    """Indices (distinct per token), weights and used slots as a router could give them."""
    ranked = rng.random((tokens, num_experts)).argsort(axis=1)[:, :top_k]
    weights = rng.random((tokens, top_k), np.float32)
    return np.ascontiguousarray(ranked), weights, np.full(tokens, top_k)


def _assert_experts(rng, experts, tokens, top_k):
    x = random_array(rng, tokens, experts.input_dim)
    choice = _choices(rng, tokens, len(experts), top_k)
    y = experts.forward(x, *choice)
    assert y.dtype == np.float32
    assert_close(y, experts_reference(experts, x, *choice))


# ---- all experts ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ALL_ACTIVATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 29])
def test_activations(rng, tokens, activation, bias):
    _assert_experts(rng, _experts(rng, activation, 5, 19, 23, bias), tokens, 2)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "input_dim", "hidden_dim", "tokens"),
    [
        (1, 1, 1, 1, 1),
        (1, 1, 1, 1, 70),
        (1, 1, 16, 48, 150),  # one expert, more than two blocks of rows
        (2, 1, 49, 1, 129),
        (3, 3, 1, 49, 33),  # K = E
        (3, 2, 15, 17, 201),
        (7, 7, 65, 95, 3),
        (60, 2, 31, 33, 11),  # most experts have no token
        (4, 2, 1024, 3, 9),
        (4, 2, 1025, 3, 9),  # sums over two blocks
        (2, 1, 3, 2100, 70),
        (2, 2, 1100, 1200, 5),
        (130, 4, 8, 8, 40),
    ],
)
def test_shapes(rng, activation, num_experts, top_k, input_dim, hidden_dim, tokens):
    _assert_experts(rng, _experts(rng, activation, num_experts, input_dim, hidden_dim, True), tokens, top_k)


def test_tokens_that_all_go_to_one_of_many_experts(rng):
    experts = _experts(rng, "geglu", 6, 20, 30, True)
    x = random_array(rng, 200, 20)
    indices, weights, used = np.full((200, 1), 4), np.ones((200, 1), np.float32), np.ones(200, np.int64)
    y = experts.forward(x, indices, weights, used)
    assert_close(y, experts_reference(experts, x, indices, weights, used))


def test_slots_without_an_expert_add_nothing(rng):
    experts = _experts(rng, "relu", 4, 10, 12, True)
    x = random_array(rng, 30, 10)
    indices, weights, _ = _choices(rng, 30, 4, 3)
    used = rng.integers(0, 4, 30)
    weights[used == 0] = 0
    y = experts.forward(x, indices, weights, used)
    assert_close(y, experts_reference(experts, x, indices, weights, used))
    assert_array_equal(y[used == 0], 0)


def test_nan_in_one_expert_reaches_only_its_tokens(rng):
    experts = _experts(rng, "silu", 4, 10, 12, True)
    experts.up[2, 5] = np.nan
    x = random_array(rng, 50, 10)
    indices, weights, used = _choices(rng, 50, 4, 2)
    y = experts.forward(x, indices, weights, used)
    assert_array_equal(np.isnan(y).any(axis=1), (indices == 2).any(axis=1))


# ---- one of a layer's experts ----


@pytest.fixture(params=["relu", "swiglu"])
def layer(request):
    return MoeLayer(MoeConfig(4, 2, input_dim=6, hidden_dim=5, activation=request.param))


def test_experts_are_a_sequence(layer):
    assert len(layer.experts) == 4
    assert [type(expert) for expert in layer.experts] == [Expert] * 4
    assert_array_equal(layer.experts[-1].w1, layer.experts[3].w1)
    assert [len(part) for part in (layer.experts[1:3], layer.experts[::-1], layer.experts[9:])] == [2, 4, 0]
    for index in (4, -5):
        with pytest.raises(IndexError):
            layer.experts[index]


def test_views_have_the_shapes_of_the_formula(layer):
    expert = layer.experts[1]
    gated = ACTIVATIONS[layer.config.activation].gated
    assert (expert.input_dim, expert.hidden_dim) == (6, 5)
    assert (expert.w1.shape, expert.b1.shape, expert.w2.shape, expert.b2.shape) == ((6, 5), (5,), (5, 6), (6,))
    assert (expert.w3.shape, expert.b3.shape) == ((6, 5), (5,)) if gated else expert.w3 is expert.b3 is None


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2", "w3", "b3"])
@pytest.mark.parametrize("assign", [True, False])
def test_writing_to_a_view_changes_what_forward_uses(rng, name, assign):
    layer = MoeLayer(MoeConfig(4, 4, None, input_dim=6, hidden_dim=5, activation="swiglu"))
    x = random_array(rng, 7, 6)
    before, routing = layer(x)
    expert = layer.experts[2]
    value = random_array(rng, *getattr(expert, name).shape)
    if assign:
        setattr(expert, name, value.astype(np.float64))
    else:
        getattr(expert, name)[...] = value
    assert_array_equal(getattr(layer.experts[2], name), value)
    after, _ = layer(x)
    assert not np.allclose(after, before)
    choice = (routing.expert_indices, routing.expert_weights, routing.slots_used)
    assert_close(after, experts_reference(layer.experts, x, *choice))


def test_views_can_be_changed_in_place(layer):
    expert = layer.experts[0]
    before = expert.w1.copy()
    expert.w1 *= 2
    expert.b2 += 3
    assert_array_equal(layer.experts[0].w1, before * 2)
    assert_array_equal(layer.experts[0].b2, np.full(6, 3))
    assert_array_equal(layer.experts[1].b2, np.zeros(6))


def test_arrays_that_an_expert_does_not_have_cannot_be_assigned():
    expert = Expert(3, 2, bias=False)
    assert expert.b1 is expert.b2 is expert.w3 is expert.b3 is None
    for name in ("b1", "b2", "w3", "b3"):
        with pytest.raises(MoeValueError, match=rf"^{name} was assigned"):
            setattr(expert, name, np.zeros(2))


def test_assigning_to_read_only_weights_says_so(rng):
    up, down = random_array(rng, 2, 3, 4), random_array(rng, 2, 4, 3)
    up.flags.writeable = False
    experts = Experts("relu", up, down)
    with pytest.raises(MoeValueError, match=r"^w1 .*read-only"):
        experts[0].w1 = np.zeros((4, 3))


@pytest.mark.parametrize("value", [np.zeros((5, 6)), np.zeros(6), 0.0, np.zeros((6, 5), np.int64)])
def test_assigning_the_wrong_array_is_an_error(value):
    with pytest.raises(MoeValueError, match=r"^w1 was "):
        Expert(6, 5).w1 = value


def test_expert_of_a_layer_computes_its_share(layer, rng):
    x = random_array(rng, 9, 6)
    expert = layer.experts[2]
    indices, weights, used = np.full((9, 1), 2), np.ones((9, 1), np.float32), np.ones(9, np.int64)
    assert_same_bits(expert.forward_batch(x), layer.experts.forward(x, indices, weights, used))


# ---- one expert alone ----


@pytest.mark.parametrize("activation", ALL_ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_expert_follows_its_formula(rng, activation, bias):
    expert = Expert(7, 9, activation=activation, bias=bias)
    names = ["w1", "b1", "w2", "b2", "w3", "b3"]
    for name in names:
        if getattr(expert, name) is not None:
            setattr(expert, name, random_array(rng, *getattr(expert, name).shape))
    w1, b1, w2, b2, w3, b3 = (0 if (a := getattr(expert, name)) is None else np.float64(a) for name in names)
    x = random_array(rng, 11, 7)
    function, gated = ACTIVATIONS[activation]
    hidden = reference.FUNCTIONS[function](x @ w1 + b1)
    if gated:
        hidden = hidden * (x @ w3 + b3)
    assert_close(expert.forward_batch(x), hidden @ w2 + b2)


def test_forward_is_one_row_of_forward_batch(rng):
    expert = Expert(7, 9)
    x = random_array(rng, 5, 7)
    batch = expert.forward_batch(x)
    for row, y in zip(x, batch, strict=True):
        assert_same_bits(expert.forward(row), y)
    assert expert.forward_batch(x[:0]).shape == (0, 7)


def test_expert_as_entrenar_tests_it():
    """All hidden values are cut off, so the second bias is all that is left."""
    expert = Expert(4, 8)
    expert.w1[...] = -10
    expert.b1[...] = -1
    expert.b2[...] = 42
    assert_array_equal(expert.forward(np.ones(4)), np.full(4, 42))


def test_experts_start_alike_for_the_same_seed():
    assert_array_equal(Expert(4, 8, seed=1).w1, Expert(4, 8, seed=1).w1)
    assert not np.array_equal(Expert(4, 8, seed=1).w1, Expert(4, 8, seed=2).w1)


# ---- fused_experts ----


def _fused_case(rng, activation="swiglu", tokens=13):
    experts = _experts(rng, activation, 5, 12, 10, bias=False)
    indices, weights, used = _choices(rng, tokens, 5, 3)
    x = random_array(rng, tokens, 12)
    return (x, experts.up, experts.down, weights, indices), experts_reference(experts, x, indices, weights, used)


@pytest.mark.parametrize("activation", ALL_ACTIVATIONS)
def test_fused_experts(rng, activation):
    arguments, expected = _fused_case(rng, activation)
    assert_close(fused_experts(*arguments, activation=activation), expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_fused_experts_takes_any_integers(rng, dtype):
    (*arguments, ids), expected = _fused_case(rng)
    assert_close(fused_experts(*arguments, ids.astype(dtype)), expected)
    assert_close(fused_experts(*arguments, np.asfortranarray(ids.astype(dtype))), expected)


def test_fused_experts_of_no_tokens(rng):
    arguments, _ = _fused_case(rng, tokens=0)
    assert fused_experts(*arguments).shape == (0, 12)


def test_fused_experts_without_slots_gives_zeros(rng):
    """K = 0: no expert, nothing to add up."""
    (x, up, down, weights, ids), _ = _fused_case(rng)
    assert_array_equal(fused_experts(x, up, down, weights[:, :0], ids[:, :0]), np.zeros_like(x))


def test_fused_experts_uses_weights_as_they_are(rng):
    """Weights need not sum to 1, may be negative, and one expert may be named twice."""
    (x, up, down, _, _), _ = _fused_case(rng)
    ids = np.full((13, 2), 3)
    weights = np.float32([[2.0, -0.5]] * 13)
    doubled = fused_experts(x, up, down, weights, ids)
    assert_close(doubled, 1.5 * fused_experts(x, up, down, np.ones((13, 1)), ids[:, :1]))


@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**63)])
def test_fused_experts_names_an_id_that_is_no_expert(rng, bad):
    (*arguments, ids), _ = _fused_case(rng)
    ids[7, 1] = bad
    with pytest.raises(MoeValueError, match=rf"^topk_ids was .*value {bad}, but must be from 0 to 4"):
        fused_experts(*arguments, ids)


def test_fused_experts_refuses_ids_beyond_int64(rng):
    (*arguments, ids), _ = _fused_case(rng)
    ids = ids.astype(np.uint64)
    ids[0, 0] = 2**64 - 1
    with pytest.raises(MoeValueError, match=r"^topk_ids was "):
        fused_experts(*arguments, ids)


def test_fused_experts_takes_up_proj_by_name(rng):
    up, down = (rng.standard_normal((2, 4, 4)).astype(np.float32) for _ in range(2))
    x, weights, ids = rng.standard_normal((3, 4)), np.ones((3, 1)), np.zeros((3, 1), int)
    by_name = fused_experts(x, up_proj=up, down_proj=down, topk_weights=weights, topk_ids=ids, activation="relu")
    assert_same_bits(by_name, fused_experts(x, up, down, weights, ids, "relu"))
    with pytest.raises(MoeValueError, match="up_proj was given beside gate_up_proj"):
        fused_experts(x, up, down, weights, ids, "relu", up_proj=up)


def test_misspelt_array_of_an_expert_is_an_error():
    with pytest.raises(AttributeError):
        Expert(2, 3).weight1 = 0
