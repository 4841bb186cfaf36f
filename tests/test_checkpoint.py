"""Checkpoints in Hugging Face format: what is read, what is refused, and how much memory it takes."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits, random_array, run_python
from safetensors.numpy import save_file

from moe_numba import CheckpointError, MoeLayer, MoeValueError, cli, list_moe_layers
from moe_numba._safetensors import Safetensors
from moe_numba.checkpoint import Checkpoint

CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 16,
    "moe_intermediate_size": 24,
    "hidden_act": "silu",
    "norm_topk_prob": True,
}
E, H, F = 4, 16, 24


def block_tensors(rng, layer, dtype=np.float32):
    """The block of one layer as Qwen3-MoE stores it."""
    block = f"model.layers.{layer}.mlp"
    shapes = {f"{block}.gate.weight": (E, H)}
    for e in range(E):
        shapes |= {f"{block}.experts.{e}.{name}_proj.weight": (F, H) for name in ("gate", "up")}
        shapes[f"{block}.experts.{e}.down_proj.weight"] = (H, F)
    return {name: random_array(rng, *shape).astype(dtype) for name, shape in shapes.items()}


def write(path, shards, config=CONFIG):
    """A checkpoint of one file, or of several with an index."""
    (path / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors")
        return path
    weight_map = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i:05}.safetensors"
        save_file(tensors, path / name)
        weight_map |= dict.fromkeys(tensors, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def split(tensors, n):
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[i::n]} for i in range(n)]


@pytest.fixture
def tensors(rng):
    """Layers 1 and 3; 0 and 2 are dense."""
    dense = {f"model.layers.{n}.mlp.gate_proj.weight": random_array(rng, 8, H) for n in (0, 2)}
    return dense | block_tensors(rng, 1) | block_tensors(rng, 3)


def expected_arrays(tensors, layer):
    block = f"model.layers.{layer}.mlp.experts"
    up = [np.concatenate([tensors[f"{block}.{e}.{n}_proj.weight"] for n in ("gate", "up")]) for e in range(E)]
    return np.stack(up), np.stack([tensors[f"{block}.{e}.down_proj.weight"] for e in range(E)])


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_layers_and_their_weights(tmp_path, tensors, shards):
    path = write(tmp_path, split(tensors, shards))
    assert list_moe_layers(path) == [1, 3]
    for number in (1, 3):
        layer = MoeLayer.from_pretrained(str(path), number)
        up, down = expected_arrays(tensors, number)
        assert_same_bits(layer.experts.up, up)
        assert_same_bits(layer.experts.down, down)
        assert_same_bits(layer.router.weight, tensors[f"model.layers.{number}.mlp.gate.weight"])
        config = layer.config
        assert (config.num_experts, config.top_k, config.input_dim, config.hidden_dim) == (E, 2, H, F)
        assert (config.activation, config.capacity_factor, config.bias) == ("swiglu", None, False)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16"])
def test_dtypes(tmp_path, rng, stored, wanted):
    tensors = block_tensors(rng, 0, stored)
    layer = MoeLayer.from_pretrained(write(tmp_path, [tensors]), 0, dtype=wanted)
    kept = "bfloat16" if stored is ml_dtypes.bfloat16 else "float32"
    assert layer.config.dtype == (wanted or kept)
    up, _ = expected_arrays(tensors, 0)
    np.testing.assert_array_equal(layer.experts.up, up.astype(layer.experts.up.dtype))
    with pytest.raises(MoeValueError, match="dtype"):
        MoeLayer.from_pretrained(tmp_path, 0, dtype="int8")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_packed_tensors_stay_in_the_file(tmp_path, rng, dtype):
    block = "model.layers.0.block_sparse_moe"
    shapes = {"router.layer": (E, H), "input_linear": (E, 2 * F, H), "output_linear": (E, H, F)}
    tensors = {f"{block}.{name}.weight": random_array(rng, *shape).astype(dtype) for name, shape in shapes.items()}
    config = CONFIG | {"model_type": "granitemoe", "num_local_experts": E, "intermediate_size": F}
    del config["moe_intermediate_size"]
    layer = MoeLayer.from_pretrained(write(tmp_path, [tensors], config), 0)
    for array, name in ((layer.experts.up, "input_linear"), (layer.experts.down, "output_linear")):
        assert isinstance(array, np.memmap)
        np.testing.assert_array_equal(array, tensors[f"{block}.{name}.weight"])
    with pytest.raises(MoeValueError, match="read-only"):
        layer.experts[0].w1 = np.zeros((H, F), np.float32)
    x = random_array(rng, 9, H)
    other = MoeLayer.from_pretrained(tmp_path, 0, dtype="float32")
    assert np.abs(layer(x)[0] - other(x)[0]).max() < 2**-5 * np.abs(other(x)[0]).max()


@pytest.mark.parametrize("f", [F, H, H // 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_tensors_in_either_orientation(tmp_path, rng, f, transposed):
    """Qwen3-VL-MoE is published as (E, H, 2F) and saved by transformers as (E, 2F, H)."""
    block = "model.language_model.layers.0.mlp"
    up, down = random_array(rng, E, 2 * f, H), random_array(rng, E, H, f)
    stored = [np.ascontiguousarray(a.swapaxes(1, 2)) if transposed else a for a in (up, down)]
    tensors = {f"{block}.experts.gate_up_proj": stored[0], f"{block}.experts.down_proj": stored[1]}
    tensors[f"{block}.gate.weight"] = random_array(rng, E, H)
    text = CONFIG | {"model_type": "qwen3_vl_moe_text", "moe_intermediate_size": f}
    layer = MoeLayer.from_pretrained(write(tmp_path, [tensors], {"model_type": "qwen3_vl_moe", "text_config": text}), 0)
    assert layer.config.transposed == transposed
    np.testing.assert_array_equal(layer.experts.down_projection, down)
    np.testing.assert_array_equal(np.concatenate(layer.experts.projections, axis=1), up)


_MEMORY = """
import sys
from moe_numba import MoeLayer
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
before = peak()
layer = MoeLayer.from_pretrained({path!r}, 0, dtype={dtype!r})
experts = layer.experts
print((peak() - before) / (experts.up.nbytes + experts.down.nbytes))
"""


def peak_while_loading(path, dtype):
    """Times the layer's bytes, in a process of its own."""
    printed, _ = run_python(_MEMORY.format(path=str(path), dtype=dtype))
    return float(printed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
def test_memory_while_loading(tmp_path, rng, dtype, packed):
    """Less than 1.15 times the layer, of which there are 100 MB and more; nothing of what stays in its file."""
    experts, h, f = 16, 768, 1536
    block = "model.layers.0.mlp"
    tensors = {f"{block}.gate.weight": random_array(rng, experts, h)}
    shapes = {"gate": (f, h), "up": (f, h), "down": (h, f)}
    if packed:
        tensors[f"{block}.experts.gate_up_proj"] = np.ones((experts, 2 * f, h), np.float32)
        tensors[f"{block}.experts.down_proj"] = np.ones((experts, h, f), np.float32)
    else:
        for e in range(experts):
            for name, shape in shapes.items():
                tensors[f"{block}.experts.{e}.{name}_proj.weight"] = np.ones(shape, np.float32)
    config = CONFIG | {"num_experts": experts, "hidden_size": h, "moe_intermediate_size": f}
    write(tmp_path, split(tensors, 3), config)
    peak = peak_while_loading(tmp_path, dtype)
    if packed and dtype == "float32":
        assert peak < 0.1
    else:
        assert 0.9 < peak < 1.15


# ---- what is refused ----


def assert_refused(path, match, layer=1):
    with pytest.raises(CheckpointError, match=match):
        MoeLayer.from_pretrained(path, layer)


def test_a_layer_that_is_dense_or_not_there(tmp_path, tensors):
    path = write(tmp_path, [tensors])
    for number in (0, 4, -1, "1x", None):
        assert_refused(path, r"layer .* is no Mixture of Experts; those are \[1, 3\]", number)


def test_missing_tensors_are_named(tmp_path, tensors):
    for name in [n for n in tensors if n.startswith("model.layers.1.mlp.") and "gate.weight" not in n]:
        rest = {other: array for other, array in tensors.items() if other != name}
        assert_refused(write(tmp_path, [rest]), f"has no tensor {name}")


def test_extra_tensors_are_named(tmp_path, tensors, rng):
    name = "model.layers.1.mlp.experts.0.gate_proj.weight_scale_inv"
    assert_refused(write(tmp_path, [tensors | {name: random_array(rng, 1)}]), f"tensor {name} is not known")


def test_wrong_shapes_are_named(tmp_path, tensors, rng):
    for name in ("gate.weight", "experts.2.gate_proj.weight", "experts.3.down_proj.weight"):
        full = f"model.layers.1.mlp.{name}"
        assert_refused(
            write(tmp_path, [tensors | {full: random_array(rng, 5, 5)}]), rf"tensor {full} has shape \(5, 5\)"
        )


def test_wrong_dtypes_are_named(tmp_path, tensors):
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    assert_refused(write(tmp_path, [tensors | {name: np.zeros((H, F), np.int8)}]), f"tensor {name} has dtype I8")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', but must be one of"),
        ({"model_type": None}, "model_type is None"),
        ({"num_experts_per_tok": 9}, "top_k was 9"),
        ({"num_experts": "4"}, "num_experts was '4'"),
        ({"hidden_act": "tanh"}, "the activation is 'tanh'"),
        ({"hidden_size": None}, "input_dim was None"),
    ],
)
def test_configs_that_make_no_sense(tmp_path, tensors, change, match):
    assert_refused(write(tmp_path, [tensors], CONFIG | change), match)


def test_missing_and_broken_files(tmp_path, tensors):
    assert_refused(tmp_path, "config.json: cannot be read")
    (tmp_path / "config.json").write_text("{")
    assert_refused(tmp_path, "config.json: is no JSON")
    (tmp_path / "config.json").write_text("[1]")
    assert_refused(tmp_path, "config.json: must hold a JSON object")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert_refused(tmp_path, "model.safetensors: cannot be read")
    write(tmp_path, split(tensors, 3))
    os.remove(tmp_path / "model-00001.safetensors")
    assert_refused(tmp_path, "model-00001.safetensors: cannot be read")


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 3, "", ".."])
def test_an_index_cannot_leave_the_directory(tmp_path, tensors, file):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file(tensors, tmp_path / "outside.safetensors")
    (inside / "config.json").write_text(json.dumps(CONFIG))
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
    assert_refused(inside, "which is no file beside it")


def test_an_index_that_is_wrong(tmp_path, tensors):
    write(tmp_path, split(tensors, 2))
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    swapped = dict.fromkeys(weight_map, "model-00000.safetensors")
    index.write_text(json.dumps({"weight_map": swapped}))
    assert_refused(tmp_path, "though the index says so")
    index.write_text("{}")
    assert_refused(tmp_path, "must hold an object weight_map")


def test_truncated_files(tmp_path, tensors):
    path = write(tmp_path, [tensors]) / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_refused(tmp_path, "is no safetensors file, or a damaged one")


def test_flipped_bits_are_refused_or_read_within_the_file(tmp_path, tensors, rng):
    path = write(tmp_path, [tensors]) / "model.safetensors"
    whole = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in rng.integers(0, header, 300):
        broken = whole.copy()
        broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            layer = MoeLayer.from_pretrained(tmp_path, 1)
        except CheckpointError:
            continue
        layer(np.zeros((1, H), np.float32))


def test_a_number_of_thousands_of_digits_is_no_layer(tmp_path, tensors):
    tensors[f"model.layers.{'7' * 5000}.mlp.gate.weight"] = np.zeros((E, H), np.float32)
    path = write(tmp_path, [tensors])
    assert list_moe_layers(path) == [1, 3]
    with pytest.raises(CheckpointError, match="layer 2 is no Mixture of Experts"):
        MoeLayer.from_pretrained(path, 2)


def test_float64_beyond_float32_is_infinite_without_a_warning(tmp_path, tensors):
    wide = {name: np.float64(tensor) for name, tensor in tensors.items()}
    for name in ("model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.0.up_proj.weight"):
        wide[name][0, 0] = 1e300
    layer = MoeLayer.from_pretrained(write(tmp_path, [wide]), 1)
    assert np.isinf(layer.router.weight[0, 0])
    assert np.isinf(layer.experts.up[0, F, 0])


def entry(**fields):
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | fields


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(data_offsets=[0, 2**62])},
        {"a": entry(data_offsets=[-16, 0])},
        {"a": entry(data_offsets=[16, 0])},
        {"a": entry(shape=[-4])},
        {"a": entry(shape=[2.0, 2])},
        {"a": entry(shape=None)},
        {"a": entry(data_offsets=[0])},
        {"a": 3},
        {"a": {}},
        [],
        {"a": entry(), "b": entry(data_offsets=[8, 24])},
    ],
    ids=str,
)
def test_headers_that_lie(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        Safetensors(path)


def test_a_shape_that_is_larger_than_its_bytes(tmp_path):
    text = json.dumps({"a": entry(shape=[2**30, 8])}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tensor a of float32"):
        Checkpoint(tmp_path).tensor("a")


def test_a_header_of_many_gigabytes(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:  # sparse: takes no room on the disk
        file.write((2**36).to_bytes(8, "little"))
        file.truncate(2**37)
    with pytest.raises(CheckpointError, match="a header of 68719476736 bytes"):
        Safetensors(path)


# ---- the command line ----


def test_run_a_layer_of_a_checkpoint(tmp_path, tensors, rng, capsys):
    path = write(tmp_path, split(tensors, 2))
    x = random_array(rng, 20, H)
    np.save(tmp_path / "hidden.npy", x)
    run = ["run", "--checkpoint", str(path), "--input", str(tmp_path / "hidden.npy"), "--json"]
    assert cli.main([*run, "--layer", "3", "--output", str(tmp_path / "out.npy")]) == 0
    assert json.loads(capsys.readouterr().out)["layer"] == f"layer 3 of {path}"
    assert_same_bits(np.load(tmp_path / "out.npy"), MoeLayer.from_pretrained(path, 3)(x)[0])
    for wrong in ([], ["--layer", "2"], ["--layer", "x"]):
        assert cli.main([*run, *wrong]) == 2
        assert "must be a Mixture-of-Experts layer of the checkpoint: 1, 3" in capsys.readouterr().err
    assert cli.main(["run", "--checkpoint", str(path), "--layer", "1"]) == 2
    assert "--input was left out" in capsys.readouterr().err
