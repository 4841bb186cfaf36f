"""MoeLayer: forward against the specification, kinds of input, batches, files."""

import copy
import pickle
from pathlib import Path

import helpers
import ml_dtypes
import numpy as np
import pytest
from helpers import (
    ALL_ACTIVATIONS,
    assert_close,
    assert_routing,
    assert_same_bits,
    guarded_copy,
    layer_reference,
    random_array,
    random_layer,
    read_only,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from safetensors.numpy import save_file

import moe_numba
from moe_numba import CheckpointError, MoeConfig, MoeLayer, _workspace

POLICIES = [
    {"capacity_factor": None},
    {"capacity_factor": 0.6, "overflow": "next"},
    {"capacity_factor": 0.6, "overflow": "drop"},
]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _assert_layer(layer, x):
    y, routing = layer.forward(x)
    config = layer.config
    assert y.dtype == np.float32
    assert_routing(routing, config.top_k, config.capacity_factor, config.overflow)
    assert_close(y, layer_reference(layer, x, routing))


# ---- forward ----


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("activation", ALL_ACTIVATIONS)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "input_dim", "hidden_dim", "tokens"),
    [(1, 1, 1, 1, 1), (8, 2, 17, 9, 0), (8, 2, 17, 9, 41), (3, 3, 50, 49, 100)],
)
def test_forward(rng, num_experts, top_k, input_dim, hidden_dim, tokens, activation, policy):
    sizes = {"num_experts": num_experts, "top_k": top_k, "input_dim": input_dim, "hidden_dim": hidden_dim}
    _assert_layer(random_layer(activation=activation, **sizes, **policy), random_array(rng, tokens, input_dim))


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_forward_of_a_wide_layer_with_many_experts(rng, activation):
    layer = random_layer(num_experts=300, top_k=8, input_dim=1100, hidden_dim=20, activation=activation)
    _assert_layer(layer, random_array(rng, 12, 1100))


@given(
    st.integers(0, 40),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(ALL_ACTIVATIONS),
    st.booleans(),
    st.sampled_from(["next", "drop"]),
    st.one_of(st.none(), st.floats(0.01, 3)),
    st.data(),
)
def test_forward_of_anything(tokens, experts, input_dim, hidden_dim, activation, bias, overflow, capacity_factor, data):
    layer = random_layer(
        seed=data.draw(st.integers(0, 2**32)),
        num_experts=experts,
        top_k=data.draw(st.integers(1, experts)),
        capacity_factor=capacity_factor,
        input_dim=input_dim,
        hidden_dim=hidden_dim,
        activation=activation,
        bias=bias,
        overflow=overflow,
    )
    _assert_layer(layer, random_array(np.random.default_rng(0), tokens, input_dim))


def test_dropped_tokens_are_zero():
    layer = random_layer(num_experts=4, top_k=1, capacity_factor=0.5, input_dim=3, hidden_dim=4, overflow="drop")
    y, routing = layer(np.ones((16, 3)))
    assert routing.num_dropped == 14
    assert_array_equal(y[2:], np.zeros((14, 3)))
    assert y[:2].all()


def test_noisy_layer_follows_its_noisy_routing(rng):
    layer = random_layer(noise_std=1.0, capacity_factor=0.7, input_dim=9, hidden_dim=11)
    x = random_array(rng, 50, 9)
    _assert_layer(layer, x)
    assert not np.array_equal(layer(x)[0], layer(x)[0])
    a, b = (random_layer(noise_std=1.0, input_dim=9, hidden_dim=11) for _ in range(2))
    assert_same_bits(a(x)[0], b(x)[0])


def test_writing_to_the_router_changes_the_routing(rng):
    layer = random_layer(num_experts=4, top_k=1, capacity_factor=None, input_dim=5, hidden_dim=6)
    gate = np.zeros((5, 4))
    gate[:, 2] = 1
    layer.router.gate_weight = gate
    _, routing = layer(np.ones((3, 5)))
    assert_array_equal(routing.expert_indices, [[2]] * 3)


# ---- kinds of input ----


@pytest.fixture(scope="module")
def layer():
    return random_layer(num_experts=5, top_k=2, capacity_factor=None, input_dim=24, hidden_dim=13)


@pytest.fixture
def x(rng):
    return random_array(rng, 12, 24)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (12, 24), (3, 4, 24), (2, 3, 2, 24), (0, 24), (2, 0, 24)])
def test_output_has_the_shape_of_the_input(layer, x, shape):
    part = x.reshape(-1)[: int(np.prod(shape))].reshape(shape)
    y, routing = layer(part)
    tokens = part.reshape(-1, 24)
    assert y.shape == shape
    assert routing.expert_indices.shape == (len(tokens), 2)
    assert_same_bits(y.reshape(-1, 24), layer(tokens)[0])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, BFLOAT16])
def test_other_floats_are_converted(layer, x, dtype):
    other = x.astype(dtype)
    y, routing = layer(other)
    assert y.dtype == routing.routing_probs.dtype == np.float32
    assert_same_bits(y, layer(other.astype(np.float32))[0])


LAYOUTS = helpers.LAYOUTS | {
    "transposed batch": lambda x: x.reshape(3, 4, -1).transpose(1, 0, 2).copy().transpose(1, 0, 2),
    "broadcast": lambda x: np.broadcast_to(x[0], x.shape),
    "nested lists": lambda x: x.tolist(),
    "matrix": lambda x: x.view(np.matrix),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_memory(layer, x, layout):
    laid_out = LAYOUTS[layout](x)
    values = np.array(laid_out, np.float32)
    before = values.copy()
    y, _ = layer(laid_out)
    assert type(y) is np.ndarray
    assert_same_bits(y, layer(values)[0])
    assert_array_equal(np.array(laid_out), before)  # the input is left alone


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [{"num_identity_experts": 2}, {"apply_router_weight_on_input": True}], ids=str)
def test_a_matrix_is_an_array(rng, kind):
    layer = random_layer(num_experts=3, top_k=2, capacity_factor=None, input_dim=5, hidden_dim=4, **kind)
    x = random_array(rng, 9, 5)
    assert_same_bits(layer(x.view(np.matrix))[0], layer(x)[0])


def test_output_is_fresh_memory(layer, x):
    y, _ = layer(x)
    kept = y.copy()
    again, _ = layer(-x)
    assert not np.shares_memory(y, again)
    assert_same_bits(y, kept)


@pytest.mark.parametrize("dtype", ["float16", "float32", np.float64, BFLOAT16])
def test_output_in_another_dtype(layer, x, dtype):
    y, _ = layer.forward(x, dtype=dtype)
    assert y.dtype == np.dtype(dtype)
    assert_array_equal(y, layer(x)[0].astype(dtype))


# ---- batches, threads, chunks ----


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_serial_and_parallel_give_the_same_bits(rng, always_parallel, activation, policy):
    layer = random_layer(num_experts=6, top_k=2, input_dim=70, hidden_dim=110, activation=activation, **policy)
    for tokens in (1, 7, 200):
        x = random_array(rng, tokens, 70)
        parallel, _ = layer(x)
        moe_numba.set_num_threads(1)
        serial, _ = layer(x)
        moe_numba.set_num_threads(moe_numba.threads.numba.config.NUMBA_NUM_THREADS)
        assert_same_bits(parallel, serial)


@pytest.mark.parametrize(
    "config",
    [
        {"num_experts": 4, "top_k": 2, "input_dim": 33, "hidden_dim": 50, "activation": "swiglu"},
        {"num_experts": 3, "top_k": 3, "input_dim": 1100, "hidden_dim": 7, "activation": "gelu"},
        {"num_experts": 40, "top_k": 1, "input_dim": 16, "hidden_dim": 1030, "activation": "relu"},
    ],
)
def test_a_token_gives_the_same_bits_in_any_batch(rng, config):
    layer = random_layer(capacity_factor=None, **config)
    x = random_array(rng, 400, config["input_dim"])
    alone = np.stack([layer(row)[0] for row in x])
    for tokens in [1, 2, 3, 5, 31, 32, 33, 64, 65, 127, 255, 399, 400]:
        chosen = rng.permutation(400)[:tokens]
        y, _ = layer(x[chosen])
        assert_same_bits(y, alone[chosen])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_token_breaks_no_other(rng, bad):
    layer = random_layer(num_experts=3, top_k=2, capacity_factor=None, input_dim=20, hidden_dim=30)
    x = random_array(rng, 100, 20)
    clean, _ = layer(x)
    broken = rng.random(100) < 0.2
    x[broken, rng.integers(0, 20, broken.sum())] = bad
    y, _ = layer(x)
    assert np.isnan(y[broken]).all()
    assert_same_bits(y[~broken], clean[~broken])


@pytest.mark.parametrize("overflow", ["next", "drop"])
def test_a_broken_token_takes_no_room(rng, overflow):
    """Broken tokens at the end cannot change what came before them; at the front they only make room."""
    layer = random_layer(num_experts=4, top_k=2, capacity_factor=0.5, input_dim=8, hidden_dim=9, overflow=overflow)
    x = random_array(rng, 40, 8)
    clean, _ = layer(x)
    x[30:] = np.nan
    y, routing = layer(x)
    assert_same_bits(y[:30], clean[:30])
    assert np.isnan(y[30:]).all()
    moved, moved_routing = layer(np.concatenate([x[30:], x[:30]]))
    assert_same_bits(moved[10:], y[:30])
    assert_array_equal(moved_routing.expert_counts, routing.expert_counts)


@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_do_not_change_the_result(rng, monkeypatch, policy):
    layer = random_layer(num_experts=6, top_k=2, input_dim=20, hidden_dim=30, **policy)
    x = random_array(rng, 333, 20)
    x[::50] = np.nan
    whole, _ = layer(x)
    monkeypatch.setattr(_workspace, "CHUNK_BYTES", 1)
    assert _workspace.chunk_tokens(layer.experts.engine, 2, 6, 20, 30, 1) < 333 / 3
    chunked, _ = layer(x)
    assert_same_bits(chunked, whole)


def test_calls_of_many_shapes_share_one_workspace(rng):
    """More shapes than are remembered, growing and shrinking."""
    layer = random_layer(num_experts=3, top_k=1, capacity_factor=None, input_dim=5, hidden_dim=6)
    x = random_array(rng, 150, 5)
    whole, _ = layer(x)
    for tokens in [*range(0, 150, 2), *range(149, 0, -2)]:
        assert_same_bits(layer(x[:tokens])[0], whole[:tokens])


# ---- weights ----


def _arrays(rng, activation, bias):
    gated = activation == "swiglu"
    up = "gate_up" if gated else "up"
    rows = 10 if gated else 5
    arrays = {"router_weight": (3, 4), f"{up}_proj": (3, rows, 4), "down_proj": (3, 4, 5)}
    if bias:
        arrays |= {f"{up}_bias": (3, rows), "down_bias": (3, 4)}
    return {name: random_array(rng, *shape) for name, shape in arrays.items()}


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_from_weights_uses_arrays_in_place(rng, activation, bias):
    config = MoeConfig(3, 2, None, 0.0, 4, 5, activation=activation, bias=bias)
    arrays = _arrays(rng, activation, bias)
    layer = MoeLayer.from_weights(config, **arrays)
    x = random_array(rng, 6, 4)
    _assert_layer(layer, x)
    before, _ = layer(x)
    for name, array in arrays.items():
        kept = array.copy()
        array *= 1.5
        assert not np.array_equal(layer(x)[0], before), name
        array[...] = kept
    assert_same_bits(layer(x)[0], before)
    assert np.shares_memory(layer.experts[1].w2, arrays["down_proj"])


@pytest.mark.parametrize("convert", [np.float64, np.float16, BFLOAT16, read_only, np.asfortranarray, guarded_copy])
def test_from_weights_takes_other_arrays(rng, convert):
    config = MoeConfig(3, 2, None, 0.0, 4, 5, activation="swiglu")
    arrays = _arrays(rng, "swiglu", True)
    converted = {
        name: a.astype(convert) if isinstance(convert, (np.dtype, type)) else convert(a) for name, a in arrays.items()
    }
    plain = {name: a.astype(np.float32) for name, a in converted.items()}
    x = random_array(rng, 6, 4)
    y, _ = MoeLayer.from_weights(config, **converted)(x)
    assert_same_bits(y, MoeLayer.from_weights(config, **plain)(x)[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent_and_their_views_are_live(rng, duplicate):
    """Processes hand layers to each other as pickles."""
    layer = random_layer(num_experts=4, top_k=2, capacity_factor=None, input_dim=6, hidden_dim=7, activation="swiglu")
    x = random_array(rng, 9, 6)
    y, _ = layer(x)
    other = duplicate(layer)
    assert_same_bits(other(x)[0], y)
    other.router.gate_weight = -other.router.gate_weight
    for expert in other.experts:
        expert.w1 *= 2
        expert.b2 += 1
    _assert_layer(other, x)
    changed, routing = other(x)
    expected = moe_numba.reference.route(x, other.router.gate_weight, 2, None)
    np.testing.assert_allclose(routing.routing_probs, expected.routing_probs, rtol=1e-5)
    assert not np.allclose(changed, y)
    assert_same_bits(layer(x)[0], y)


# ---- files ----


def test_noise_without_a_seed_and_a_shared_gate(tmp_path):
    layer = random_layer(input_dim=6, hidden_dim=4, noise_std=1.0, shared_hidden_dim=3, shared_gate=True)
    layer.save(tmp_path / "layer.safetensors")
    x = np.ones((9, 6), np.float32)
    first, second = (MoeLayer.load(tmp_path / "layer.safetensors", seed=None)(x)[1] for _ in range(2))
    assert not np.array_equal(first.routing_probs, second.routing_probs)
    with pytest.raises(moe_numba.MoeValueError, match="seed was -1"):
        MoeLayer.load(tmp_path / "layer.safetensors", seed=-1)


def test_weights_beyond_float32_are_infinite_without_a_warning():
    config = MoeConfig(2, 1, input_dim=3, hidden_dim=4, bias=False)
    weights = {"up_proj": np.full((2, 4, 3), 1e300), "down_proj": np.full((2, 3, 4), -1e300)}
    layer = MoeLayer.from_weights(config, router_weight=np.zeros((2, 3)), **weights)
    assert np.isposinf(layer.experts.up).all()
    assert np.isneginf(layer.experts.down).all()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"activation": "swiglu", "bias": False, "capacity_factor": None},
        {"activation": "geglu", "overflow": "drop", "capacity_factor": 1 / 3},
        {"num_experts": 1, "top_k": 1, "input_dim": 1, "hidden_dim": 1},
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_save_and_load(rng, tmp_path, config, kind):
    layer = random_layer(seed=3, **({"input_dim": 11, "hidden_dim": 7} | config))
    path = kind(tmp_path / "layer.safetensors")
    layer.save(path)
    loaded = MoeLayer.load(path)
    assert loaded.config == layer.config
    x = random_array(rng, 30, layer.config.input_dim)
    (y, routing), (expected, expected_routing) = loaded(x), layer(x)
    assert_same_bits(y, expected)
    assert_same_bits(routing.expert_indices, expected_routing.expert_indices)
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


def test_loaded_layers_can_be_changed_and_saved_again(tmp_path):
    path = tmp_path / "layer.safetensors"
    layer = random_layer(input_dim=6, hidden_dim=5)
    layer.save(path)
    layer = MoeLayer.load(path)
    layer.experts[1].w1[...] = 3
    layer.router.gate_weight = np.ones((6, 8))
    layer.save(path)
    again = MoeLayer.load(path)
    assert_array_equal(again.experts[1].w1, np.full((6, 5), 3))
    assert_array_equal(again.router.gate_weight, np.ones((6, 8)))


def test_an_existing_file_survives_a_failed_save(tmp_path, monkeypatch):
    path = tmp_path / "layer.safetensors"
    random_layer(input_dim=6, hidden_dim=5).save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left"):
        random_layer(input_dim=6, hidden_dim=4).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "layer.safetensors"
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        random_layer(input_dim=6, hidden_dim=5).save(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["missing/layer.safetensors", "."])
def test_saving_where_nothing_can_be_written(tmp_path, path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        random_layer(input_dim=6, hidden_dim=5).save(tmp_path / path)
    assert list(tmp_path.iterdir()) == []


def _header_of(dtype):
    """A safetensors file with one tensor of a dtype that NumPy may not know."""
    header = f'{{"router_weight":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,2]}}}}'.encode()
    return len(header).to_bytes(8, "little") + header + b"\0\0"


DAMAGES = {
    "empty": lambda whole: b"",
    "garbage": lambda whole: b"garbage" * 100,
    "header only": lambda whole: whole[:100],
    "half": lambda whole: whole[: len(whole) // 2],
    "last byte missing": lambda whole: whole[:-1],
    "trailing bytes": lambda whole: whole + b"\0" * 8,
    "header length": lambda whole: b"\xff" * 8 + whole[8:],
    "bfloat16": lambda whole: _header_of("BF16"),
    "unknown dtype": lambda whole: _header_of("X7"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_checkpoint_errors(tmp_path, damage):
    path = tmp_path / "layer.safetensors"
    random_layer(input_dim=6, hidden_dim=5).save(path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"layer\.safetensors: "):
        MoeLayer.load(path)


@pytest.mark.parametrize("path", ["missing.safetensors", "."])
def test_loading_what_is_not_there(tmp_path, path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        MoeLayer.load(tmp_path / path)


CONFIG = MoeConfig(3, 2, None, 0.0, 4, 5)


@pytest.mark.parametrize(
    ("change", "metadata"),
    [
        ({}, None),
        ({}, {"config": "not JSON"}),
        ({}, {"config": '{"top_k": 99}'}),
        ({}, {"config": '{"capacity_factor": 1' + "0" * 400 + "}"}),
        ({}, {"config": "[" * 100_000}),
        ({"surplus": np.zeros(1, np.float32)}, {"config": CONFIG.to_json()}),
        ({"down_bias": None}, {"config": CONFIG.to_json()}),
        ({"router_weight": np.zeros((4, 4), np.float32)}, {"config": CONFIG.to_json()}),
        ({"up_bias": np.zeros((3, 5), np.int32)}, {"config": CONFIG.to_json()}),
    ],
    ids=range(9),
)
def test_files_that_hold_no_layer(rng, tmp_path, change, metadata):
    tensors = {name: a for name, a in (_arrays(rng, "relu", True) | change).items() if a is not None}
    path = tmp_path / "layer.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=r"layer\.safetensors: "):
        MoeLayer.load(path)
