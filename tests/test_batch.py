"""The batch job and the files it reads and writes."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_numba import CheckpointError, MoeConfig, MoeLayer, MoeValueError
from moe_numba.batch import run


@pytest.fixture(scope="module")
def layer():
    return MoeLayer(MoeConfig(num_experts=4, input_dim=24, hidden_dim=16, capacity_factor=None), seed=3)


@pytest.fixture
def tokens():
    return np.random.default_rng(0).standard_normal((37, 24)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", ">f4"])
@pytest.mark.parametrize("batch_size", [1, 10, 37, 1000])
def test_output_is_the_layer_of_the_input(layer, tokens, tmp_path, dtype, batch_size):
    source, target = tmp_path / "x.npy", tmp_path / "y.npy"
    stored = tokens.astype(dtype)
    np.save(source, stored)
    report = run(layer, source, target, batch_size)
    y, routing = layer(stored.astype(np.float32))
    written = np.load(target)
    assert written.dtype == np.float32
    assert np.array_equal(written, y)
    assert report.tokens == 37
    assert report.rows_per_expert == routing.expert_counts.tolist()
    assert report.balance_loss == pytest.approx(layer.balance_loss(routing))
    assert report.dropped_rows == report.dropped_tokens == 0
    assert report.tokens_per_second == pytest.approx(37 / report.seconds)


@pytest.mark.parametrize("shape", [(24,), (0, 24), (3, 5, 24), (2, 0, 24), (1, 11, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_shape_is_kept(layer, tmp_path, shape, suffix):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    source, target = tmp_path / f"x{suffix}", tmp_path / "y.npy"
    np.save(source, x) if suffix == ".npy" else save_file({"any name": x}, source)
    run(layer, source, target, batch_size=4)
    assert np.array_equal(np.load(target), layer(x)[0])


def test_fortran_order(layer, tokens, tmp_path):
    np.save(tmp_path / "x.npy", np.asfortranarray(tokens))
    run(layer, tmp_path / "x.npy", tmp_path / "y.npy", batch_size=10)
    assert np.array_equal(np.load(tmp_path / "y.npy"), layer(tokens)[0])


def test_tensor_called_hidden_states_is_chosen(layer, tokens, tmp_path):
    save_file({"other": tokens[:, :3].copy(), "hidden_states": tokens}, tmp_path / "x.safetensors")
    assert run(layer, tmp_path / "x.safetensors").tokens == 37


def test_capacity_applies_to_each_batch(tokens, tmp_path):
    layer = MoeLayer(MoeConfig(num_experts=4, top_k=1, input_dim=24, hidden_dim=16, capacity_factor=0.5))
    np.save(tmp_path / "x.npy", tokens)
    report = run(layer, tmp_path / "x.npy", batch_size=8)
    parts = [layer(tokens[i : i + 8])[1] for i in range(0, 37, 8)]
    assert report.dropped_tokens == report.dropped_rows == sum(p.num_dropped for p in parts) > 0
    assert report.rows_per_expert == sum(p.expert_counts for p in parts).tolist()


def test_target_may_be_the_source(layer, tokens, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, tokens)
    run(layer, path, path, batch_size=5)
    assert np.array_equal(np.load(path), layer(tokens)[0])


def broken_npy(path, damage):
    np.save(path, np.zeros((5, 24), np.float32))
    path.write_bytes(damage(path.read_bytes()))


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.mkdir(), "directory"),
        (lambda p: p.write_bytes(b""), "is no .npy file"),
        (lambda p: p.write_bytes(b"x" * 500), "is no .npy file"),
        (lambda p: broken_npy(p, lambda b: b[:-1]), "truncated"),
        (lambda p: broken_npy(p, lambda b: b[:40]), "is no .npy file"),
        (lambda p: broken_npy(p, lambda b: b.replace(b"{'descr'", b"{{'desc'")), "is no .npy file"),
        (lambda p: broken_npy(p, lambda b: b.replace(b"(5, 24)", b"(-5,24)")), r"shape \(-5, 24\)"),
        (lambda p: broken_npy(p, lambda b: b[:6] + b"\x09" + b[7:]), "version"),
        (lambda p: np.save(p, np.zeros((5, 23), np.float32)), "width 23, but the layer's input_dim is 24"),
        (lambda p: np.save(p, np.zeros((5, 24), np.int32)), "int32"),
        (lambda p: np.save(p, np.array([{}] * 24), allow_pickle=True), "object"),
        (lambda p: np.save(p, np.float32(1)), r"shape \(\)"),
        (lambda p: np.save(p, np.asfortranarray(np.zeros((2, 3, 24), np.float32))), "Fortran"),
    ],
)
def test_unreadable_input_leaves_an_existing_output_alone(layer, tmp_path, write, says):
    source, target = tmp_path / "x.npy", tmp_path / "y.npy"
    write(source)
    target.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=says):
        run(layer, source, target)
    assert target.read_bytes() == b"precious"
    assert {p.name for p in tmp_path.iterdir()} <= {"x.npy", "y.npy"}


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda p: p.write_bytes(b"x" * 100), "is no safetensors file, or a damaged one"),
        (lambda p: save_file({"a": np.zeros((2, 24), np.float32), "b": np.zeros(2, np.float32)}, p), "one tensor"),
        (lambda p: save_file({"a": np.zeros((2, 24), np.int64)}, p), "I64"),
    ],
)
def test_unreadable_safetensors(layer, tmp_path, write, says):
    write(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=says):
        run(layer, tmp_path / "x.safetensors")


def test_name_must_say_the_kind(layer, tmp_path):
    with pytest.raises(CheckpointError, match=r"\.npy or \.safetensors"):
        run(layer, tmp_path / "x.txt")


def test_batch_size_is_checked(layer, tmp_path):
    with pytest.raises(MoeValueError, match="batch_size was 0"):
        run(layer, tmp_path / "x.npy", batch_size=0)


@pytest.mark.parametrize("target", ["missing/y.npy", "directory"])
def test_output_that_cannot_be_written_is_found_before_the_work(layer, tokens, tmp_path, target):
    np.save(tmp_path / "x.npy", tokens)
    (tmp_path / "directory").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(layer, tmp_path / "x.npy", tmp_path / target)
    assert {p.name for p in tmp_path.iterdir()} == {"x.npy", "directory"}


def test_interrupted_run_leaves_the_old_output_whole(layer, tokens, tmp_path):
    source, target = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(source, tokens)
    target.write_bytes(b"precious")

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(layer, source, target, batch_size=5, progress=interrupt)
    assert target.read_bytes() == b"precious"
    assert {p.name for p in tmp_path.iterdir()} == {"x.npy", "y.npy"}


def test_noise_is_that_of_the_first_calls(tokens, tmp_path):
    noisy = MoeConfig(num_experts=4, input_dim=24, hidden_dim=16, capacity_factor=None, noise_std=1.0)
    np.save(tmp_path / "x.npy", tokens)
    run(MoeLayer(noisy, seed=3), tmp_path / "x.npy", tmp_path / "y.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), MoeLayer(noisy, seed=3)(tokens)[0])
