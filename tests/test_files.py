"""Files that are broken, lie or attack: a CheckpointError, soon, in little memory; nothing outside is read."""

import io
import json
import os
import pickle
import random
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits, random_array, random_layer, run_python
from safetensors.numpy import save_file
from test_checkpoint import CONFIG, H, block_tensors, split, write

from moe_numba import CheckpointError, MoeConfig, MoeLayer, _tokens, list_moe_layers
from moe_numba._files import write_tensors
from moe_numba._safetensors import MOST_JSON, Safetensors
from moe_numba._tokens import open_tokens
from moe_numba.batch import run
from moe_numba.families import FAMILIES

#: What is not endless. The largest index that is read takes 0.8 s of a processor, half of it in json, and has taken 1.2
#: on a busy machine.
SECONDS, MEGABYTES = 4.0, 300


def read_all(path):
    """Everything that a checkpoint directory, a layer's file or a file of tokens can be asked for."""
    if path.is_dir():
        for layer in list_moe_layers(path):
            MoeLayer.from_pretrained(path, layer)
    elif path.name.startswith("layer"):
        MoeLayer.load(path)
    else:
        with open_tokens(path) as tokens:
            return tokens.read(0, min(5, int(np.prod(tokens.shape[:-1]))))


def error_of(path):
    """The message with which the path is refused, or None."""
    try:
        read_all(path)
    except CheckpointError as error:
        return str(error)


def assert_refused_or_read(path, refused=False):
    """Within the limits of time and memory."""
    start = time.process_time()
    message = error_of(path)
    assert time.process_time() - start < SECONDS
    tracemalloc.start()
    error_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MEGABYTES * 2**20
    if message is None:
        assert not refused
    else:
        assert str(path) in message or "config.json" in message
        assert len(message) < 2000


def of_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


# ---- random damage ----


@pytest.fixture
def whole_files(tmp_path, rng):
    """One of each kind: (path to read, file to damage)."""
    layer, tokens = tmp_path / "layer.safetensors", tmp_path / "x.safetensors"
    random_layer(input_dim=H, hidden_dim=5).save(layer)
    save_file({"x": random_array(rng, 9, H)}, tokens)
    np.save(tmp_path / "x.npy", random_array(rng, 9, H))
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, split(block_tensors(rng, 1), 2))
    return [
        (layer, layer),
        (tokens, tokens),
        (tmp_path / "x.npy", tmp_path / "x.npy"),
        *((folder, folder / name) for name in os.listdir(folder)),
    ]


PIECES = [b"[", b"{", b'"', b"9" * 30, b"-", b"null", b"1e999", b"\0", b"\xff"]


def damages(whole, chance):
    """Endless variants of bytes: cut, flipped, overwritten, repeated, lengthened."""
    while True:
        broken, at = bytearray(whole), chance.randrange(min(len(whole), 2000))
        match chance.randrange(6):
            case 0:
                del broken[chance.randrange(len(whole)) :]
            case 1:
                broken[at] ^= 1 << chance.randrange(8)
            case 2:
                broken[at : at + chance.randrange(20)] = chance.randbytes(chance.randrange(20))
            case 3:
                broken[at:at] = broken[: chance.randrange(len(whole))]
            case 4:
                broken[at : at + 1] = chance.choice(PIECES)
            case 5:
                broken += chance.randbytes(chance.randrange(100))
        yield bytes(broken)


def test_random_damage(whole_files):
    chance = random.Random(0)
    for path, file in whole_files:
        whole = file.read_bytes()
        variants = damages(whole, chance)
        for _ in range(250):
            file.write_bytes(next(variants))
            assert_refused_or_read(path)
        file.write_bytes(whole)
        read_all(path)


JUNK = [None, True, -1, 0, 3, 2**40, 2**70, 1.5, float("nan"), "", "x", "../x", [], [1], [[]], {}, {"a": []}]


def test_random_configs(tmp_path, rng):
    """Any JSON value in the place of any that is known."""
    chance = random.Random(0)
    tensors = block_tensors(rng, 1)
    write(tmp_path, [tensors])
    keys = [*CONFIG, "text_config", "n_group", "topk_group", "norm_topk_prob", "swiglu_limit", "num_local_experts"]
    for _ in range(400):
        config = CONFIG | {"model_type": chance.choice([*FAMILIES, "qwen3_moe"])} if chance.random() < 0.5 else CONFIG
        changes = {chance.choice(keys): chance.choice(JUNK) for _ in range(chance.randrange(1, 4))}
        if chance.random() < 0.2:
            changes = {"text_config": CONFIG | changes}
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        try:
            assert_refused_or_read(tmp_path)
            MoeLayer.from_pretrained(tmp_path, 1)
        except CheckpointError:
            pass


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_empty_config_of_every_family(tmp_path, rng, family):
    write(tmp_path, [block_tensors(rng, 1)], {"model_type": family})
    try:
        MoeLayer.from_pretrained(tmp_path, 1)
    except CheckpointError:
        return
    pytest.fail("was read")


# ---- bombs ----


def sparse(path, start, size):
    """A file of that many bytes, of which only the first take room."""
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


@pytest.mark.parametrize("name", ["layer.safetensors", "x.safetensors"])
def test_headers_that_claim_gigabytes(tmp_path, name):
    path = tmp_path / name
    for length in (2**26, 2**33, 2**63, 2**64 - 1):
        sparse(path, length.to_bytes(8, "little"), 2**37)
        assert_refused_or_read(path, refused=True)


@pytest.mark.parametrize(("version", "digits"), [(1, 2), (2, 4), (3, 4)])
def test_npy_headers_that_claim_gigabytes(tmp_path, version, digits):
    sparse(tmp_path / "x.npy", b"\x93NUMPY" + bytes([version, 0]) + b"\xff" * digits, 2**33)
    assert_refused_or_read(tmp_path / "x.npy", refused=True)


def test_a_layer_that_claims_gigabytes(tmp_path):
    """Every byte is there, as a hole in the file, but not in the shape of the config."""
    path = tmp_path / "layer.safetensors"
    layer = random_layer(input_dim=8, hidden_dim=5)
    header, at = {"__metadata__": {"config": layer.config.to_json()}}, 0
    for name, array in layer._tensors().items():
        shape, size = (list(array.shape), array.nbytes) if name != "down_proj" else ([2**32], 2**34)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    start = of_header(header)
    sparse(path, start, len(start) + at)
    assert_refused_or_read(path, refused=True)


def test_experts_that_the_config_makes_huge(tmp_path, rng):
    for change in ({"moe_intermediate_size": 2**40}, {"hidden_size": 2**40}, {"num_experts": 2**40}):
        write(tmp_path, [block_tensors(rng, 1)], CONFIG | change)
        with pytest.raises(CheckpointError, match="shape"):
            MoeLayer.from_pretrained(tmp_path, 1)


FILLERS = {
    "nested lists": b"[" * (MOST_JSON - 20),
    "nested objects": b'{"a":' * (MOST_JSON // 5 - 20),
    "numbers": b'{"a":[' + b"0," * (MOST_JSON // 2 - 20) + b"0]}",
    "objects": b'{"a":[' + b"{}," * (MOST_JSON // 3 - 20) + b"0]}",
    "a long number": b'{"a":' + b"9" * (MOST_JSON - 20) + b"}",
    "a long string": b'{"a":"' + b"x" * (MOST_JSON - 20) + b'"}',
    "many names": b"{" + b",".join(b'"%d":0' % i for i in range(MOST_JSON // 12)) + b"}",
}


@pytest.mark.parametrize("filler", FILLERS)
def test_json_of_the_largest_size(tmp_path, filler):
    """As a header, as config.json and as the index."""
    (tmp_path / "x.safetensors").write_bytes(of_header(FILLERS[filler]))
    assert_refused_or_read(tmp_path / "x.safetensors", refused=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(FILLERS[filler])
    assert_refused_or_read(tmp_path / "model", refused=True)
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model" / "model.safetensors.index.json").write_bytes(FILLERS[filler])
    assert_refused_or_read(tmp_path / "model", refused=True)


_LIMITED = """
import resource
from pathlib import Path
import moe_numba
from moe_numba._tokens import open_tokens
now = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + {megabytes} * 2**20,) * 2)
for path in {paths!r}:
    try:
        moe_numba.MoeLayer.load(path) if "layer" in path else open_tokens(path)
    except moe_numba.CheckpointError:
        print("refused")
"""


def test_bombs_in_a_process_of_little_memory(tmp_path):
    sparse(tmp_path / "layer.safetensors", (2**33).to_bytes(8, "little"), 2**35)
    sparse(tmp_path / "x.npy", b"\x93NUMPY\2\0\xff\xff\xff\xff", 2**33)
    (tmp_path / "x.safetensors").write_bytes(of_header(FILLERS["nested lists"]))
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    printed, _ = run_python(_LIMITED.format(megabytes=100, paths=paths))
    assert printed == "refused\n" * 3


# ---- lies ----


def entry(**fields):
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | fields


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry(), "b": entry()}, 16),
        ({"a": entry(), "b": entry(data_offsets=[20, 36])}, 36),
        ({"a": entry()}, 17),
        ({"a": entry(data_offsets=[4, 20])}, 20),
        ({"a": entry(shape=[2**62, 4], data_offsets=[0, 16])}, 16),
        ({"a": entry(shape=[True, 4])}, 16),
        (
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            16,
        ),
        (b'{"a":{"dtype":"F32","dtype":"F16","shape":[4],"data_offsets":[0,16]}}', 16),
        ({"a": entry(dtype=["F32"])}, 16),
        ({"a": entry(dtype="I32")}, 16),
        ({"a": entry(shape="4")}, 16),
        ({"a": entry(shape=[1] * 65, data_offsets=[0, 4])}, 4),
        ({"a": entry(shape=[0, 2**62, 4], data_offsets=[0, 0])}, 0),
    ],
    ids=str,
)
def test_headers_that_lie(tmp_path, header, size):
    (tmp_path / "x.safetensors").write_bytes(of_header(header, bytes(size)))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
        Safetensors(tmp_path / "x.safetensors").read("a")


def test_a_shape_of_many_axes_costs_no_time(tmp_path):
    header = of_header({"a": entry(shape=[10**18] * 40_000, data_offsets=[0, 0])})
    (tmp_path / "x.safetensors").write_bytes(header)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="a shape of 40000 axes"):
        Safetensors(tmp_path / "x.safetensors")
    assert time.process_time() - started < 1


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": np.zeros(5), "b": np.zeros((2, 3))}, {})
    file = Safetensors(path)
    write_tensors(path, {"a": np.ones(5), "b": np.ones((2, 3))}, {})
    for read in (file.read, file.map):
        assert not read("a").any()
        assert not read("b").any()
    assert Safetensors(path).map("b").all()


def test_tokens_that_are_replaced_while_they_are_opened_are_those_of_the_header(tmp_path, monkeypatch):
    path, header = tmp_path / "x.npy", _tokens._read_npy_header
    np.save(path, np.zeros((5, 3), np.float32))

    def replaced(file):
        np.save(tmp_path / "new.npy", np.ones((50, 3), np.float64))
        (tmp_path / "new.npy").rename(path)
        return header(file)

    monkeypatch.setattr(_tokens, "_read_npy_header", replaced)
    with open_tokens(path) as tokens:
        np.testing.assert_array_equal(tokens.read(0, 5), np.zeros((5, 3)))


def test_outputs_take_the_place_of_files_only(tmp_path):
    layer = MoeLayer(MoeConfig(input_dim=3, hidden_dim=2))
    np.save(tmp_path / "x.npy", np.zeros((5, 3), np.float32))
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path / "pipe", "is no file"), (tmp_path, "is a directory"), (f"{tmp_path}/a\0", "null")):
        for save in (
            layer.save,
            lambda path: run(layer, tmp_path / "x.npy", path),
            lambda path: run(layer, tmp_path / "x.npy", path, resume=True),
        ):
            with pytest.raises(CheckpointError, match=f"cannot be written.*{why}"):
                save(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"pipe", "x.npy"}


def test_a_link_and_the_permissions_of_an_output_stay(tmp_path):
    behind, link = tmp_path / "behind", tmp_path / "link"
    behind.write_bytes(b"old")
    behind.chmod(0o640)
    link.symlink_to(behind)
    MoeLayer(MoeConfig(input_dim=3, hidden_dim=2)).save(link)
    assert link.is_symlink()
    assert behind.stat().st_mode & 0o777 == 0o640
    assert MoeLayer.load(behind).config.input_dim == 3


def test_an_object_array_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    for i, content in enumerate((npy(np.array([Trap()] * H), allow_pickle=True), pickle.dumps(Trap()))):
        path = tmp_path / f"{i}.npy"
        path.write_bytes(content)
        assert_refused_or_read(path, refused=True)
        path.rename(tmp_path / "layer.safetensors")
        assert_refused_or_read(tmp_path / "layer.safetensors", refused=True)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("dtype", ["i4", "c8", "S3", "U2", "?", "M8[s]", "f4,f4", "V2", "g"])
def test_other_dtypes_of_npy(tmp_path, dtype):
    (tmp_path / "x.npy").write_bytes(npy(np.zeros((3, 4), dtype)))
    with pytest.raises(CheckpointError, match="must hold float16"):
        open_tokens(tmp_path / "x.npy")


@pytest.mark.parametrize(
    "shape", ["(2**70,4)", f"({2**70},4)", "(True,4)", "(1.0,4)", "4", "[3,4]", "(-1,4)", "(0,-4)"]
)
def test_npy_shapes_that_lie(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    start = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
    (tmp_path / "x.npy").write_bytes(start + bytes(100))
    assert_refused_or_read(tmp_path / "x.npy", refused=shape != "(True,4)")


def test_tokens_of_bfloat16(tmp_path, rng):
    layer = random_layer(input_dim=H, hidden_dim=5, capacity_factor=None)
    x = random_array(rng, 3, 7, H).astype(ml_dtypes.bfloat16)
    save_file({"x": x}, tmp_path / "x.safetensors")
    run(layer, tmp_path / "x.safetensors", tmp_path / "y.npy", batch_size=4)
    assert_same_bits(np.load(tmp_path / "y.npy"), layer(x)[0])


# ---- outside of the directory ----


@pytest.fixture
def model(tmp_path, rng):
    """A checkpoint of two shards, with a secret beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = block_tensors(rng, 1)
    save_file(tensors, tmp_path / "secret.safetensors")
    write(folder, split(tensors, 2))
    return folder


@pytest.mark.parametrize(
    "target",
    [
        "../secret.safetensors",
        "../model/../secret.safetensors",
        "{outside}/secret.safetensors",
        "link/secret.safetensors",
    ],
)
@pytest.mark.parametrize("name", ["model-00000.safetensors", "config.json", "model.safetensors.index.json"])
def test_links_that_lead_out_are_refused(model, name, target):
    (model / "link").symlink_to("..")
    (model / name).unlink()
    (model / name).symlink_to(target.format(outside=model.parent))
    with pytest.raises(CheckpointError, match=r"is a link to .*secret.safetensors, which is not in the directory"):
        MoeLayer.from_pretrained(model, 1)


@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/mem", "model-00000.safetensors", "gone"])
def test_links_to_devices_to_themselves_and_to_nothing(model, target):
    (model / "model-00000.safetensors").unlink()
    (model / "model-00000.safetensors").symlink_to(target)
    assert_refused_or_read(model)
    with pytest.raises(CheckpointError):
        MoeLayer.from_pretrained(model, 1)


@pytest.mark.parametrize(
    "name", ["a\0.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", "a/b.safetensors"]
)
def test_names_that_no_file_can_have(model, name):
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, name)}))
    assert_refused_or_read(model)
    with pytest.raises(CheckpointError):
        MoeLayer.from_pretrained(model, 1)


def test_an_index_of_many_names(model):
    names = {f"{i:09}": f"{i:x}.safetensors" for i in range(MOST_JSON // 40)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert_refused_or_read(model)


def test_links_within_the_directory_and_to_it(model):
    expected = MoeLayer.from_pretrained(model, 1).experts.up
    (model / "model-00000.safetensors").rename(model / "stored")
    (model / "model-00000.safetensors").symlink_to("stored")
    (model.parent / "latest").symlink_to("model")
    assert_same_bits(MoeLayer.from_pretrained(model.parent / "latest", 1).experts.up, expected)


def test_the_cache_of_hugging_face(model):
    """Snapshots hold links into blobs."""
    expected = MoeLayer.from_pretrained(model, 1).experts.up
    snapshot = model.parent / "models--a--b" / "snapshots" / "0123"
    blobs = model.parent / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(model.iterdir()):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert_same_bits(MoeLayer.from_pretrained(snapshot, 1).experts.up, expected)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../refs")
    (blobs.parent / "refs").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="not in the directory"):
        list_moe_layers(snapshot)


def test_pipes_do_not_wait(model, tmp_path):
    for path, read in (
        (model / "config.json", model),
        (tmp_path / "layer.safetensors", tmp_path / "layer.safetensors"),
        (tmp_path / "x.npy", tmp_path / "x.npy"),
        (tmp_path / "x.safetensors", tmp_path / "x.safetensors"),
    ):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        assert_refused_or_read(read, refused=True)
