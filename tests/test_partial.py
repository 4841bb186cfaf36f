"""Runs that end early and are continued: the same bytes, or a refusal; never a file left over."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers import PACKAGE

from moe_numba import CheckpointError, MoeConfig, MoeLayer, MoeValueError, batch
from moe_numba._partial import Partial
from moe_numba.batch import run

TOKENS, WIDTH = 1003, 24
BATCH = 50
CONFIG = {"num_experts": 4, "input_dim": WIDTH, "hidden_dim": 16}
#: Plain; a limit that depends on the batch; noise that depends on the number of the call.
KINDS = [{"capacity_factor": None}, {"capacity_factor": 0.7}, {"noise_std": 1.0}]


def layer_of(kind, seed=3):
    return MoeLayer(MoeConfig(**CONFIG, **kind), seed=seed)


@pytest.fixture(autouse=True)
def _record_every_batch(monkeypatch):
    monkeypatch.setattr(batch, "SAVE_SECONDS", -1)


@pytest.fixture
def source(rng, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, rng.standard_normal((TOKENS, WIDTH), np.float32))
    return path


class Stopped(BaseException):
    pass


def stop_after(tokens):
    def progress(done, total):
        if done >= tokens:
            raise Stopped

    return progress


def stopped(layer, source, target, tokens, **options):
    with pytest.raises(Stopped):
        run(layer, source, target, BATCH, stop_after(tokens), resume=True, **options)
    assert (target.parent / "y.npy.part" / "record.json").exists()


def names(path):
    return {entry.name for entry in path.iterdir()}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("stops", [[50], [51, 400, 990], [1003]], ids=str)
def test_continued_runs_give_the_same_bytes_and_report(source, tmp_path, kind, stops):
    whole = run(layer_of(kind), source, tmp_path / "whole.npy", BATCH)
    target = tmp_path / "y.npy"
    target.write_bytes(b"precious")
    for tokens in stops:
        stopped(layer_of(kind), source, target, tokens)
        assert target.read_bytes() == b"precious"
    calls = []
    report = run(layer_of(kind), source, target, BATCH, lambda done, total: calls.append(done), resume=True)
    assert target.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert len(calls) == -(-(TOKENS - (TOKENS if stops == [1003] else -(-stops[-1] // BATCH) * BATCH)) // BATCH)
    for field in ("tokens", "rows_per_expert", "dropped_rows", "dropped_tokens", "balance_loss"):
        assert getattr(report, field) == getattr(whole, field), field
    assert names(tmp_path) == {"x.npy", "y.npy", "whole.npy"}


def test_batches_after_the_last_record_are_done_again(source, tmp_path):
    target = tmp_path / "y.npy"
    stopped(layer_of({}), source, target, 200)
    with open(tmp_path / "y.npy.part" / "data", "ab") as file:
        file.write(b"written by a run that was killed before it could say so")
    run(layer_of({}), source, target, BATCH, resume=True)
    run(layer_of({}), source, tmp_path / "whole.npy", BATCH)
    assert target.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_an_output_that_another_run_has_just_finished_stays_whole(tmp_path, monkeypatch):
    """It takes its place after this run has opened it, and before it has the lock."""
    target = tmp_path / "y.npy"
    data = tmp_path / "y.npy.part" / "data"
    data.parent.mkdir()
    data.write_bytes(b"precious")
    monkeypatch.setattr(fcntl, "flock", lambda *_: data.rename(target))
    with pytest.raises(CheckpointError, match="another run has just ended there"):
        Partial(target, {}).__enter__()
    assert target.read_bytes() == b"precious"


def test_the_same_tokens_elsewhere_are_the_same(source, tmp_path):
    target = tmp_path / "y.npy"
    stopped(layer_of({}), source, target, 200)
    source.rename(tmp_path / "moved.npy")
    run(layer_of({}), tmp_path / "moved.npy", target, BATCH, resume=True)
    assert np.array_equal(np.load(target)[:BATCH], layer_of({})(np.load(tmp_path / "moved.npy")[:BATCH])[0])


def other_tokens(source):
    x = np.load(source)
    x[7, 3] += 1
    np.save(source, x)


def fewer_tokens(source):
    np.save(source, np.load(source)[:900])


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (None, {"layer": layer_of({}, seed=4)}, "whose layer was"),
        (None, {"layer": layer_of({"capacity_factor": 2.0})}, "whose layer was"),
        (None, {"batch_size": BATCH + 1}, "whose batch size was 50 and not 51"),
        (other_tokens, {}, "whose input differs"),
        (fewer_tokens, {}, "whose shape of the input was"),
    ],
)
def test_what_belongs_to_another_run_is_refused(source, tmp_path, change, options, says):
    target = tmp_path / "y.npy"
    stopped(layer_of({}), source, target, 200)
    before = (tmp_path / "y.npy.part" / "data").read_bytes()
    if change:
        change(source)
    options = {"layer": layer_of({}), "batch_size": BATCH} | options
    with pytest.raises(CheckpointError, match=f"y.npy.part: belongs to another run, {says}"):
        run(options["layer"], source, target, options["batch_size"], resume=True)
    assert (tmp_path / "y.npy.part" / "data").read_bytes() == before
    assert not target.exists()


def test_other_noise_and_another_version_are_refused(source, tmp_path, monkeypatch):
    target = tmp_path / "y.npy"
    stopped(layer_of({"noise_std": 1.0}), source, target, 200)
    used = layer_of({"noise_std": 1.0})
    used(np.zeros((1, WIDTH)))  # the noise of its first call is spent
    with pytest.raises(CheckpointError, match="whose noise was"):
        run(used, source, target, BATCH, resume=True)
    monkeypatch.setattr(batch, "package_stamp", lambda: "other sources")
    with pytest.raises(CheckpointError, match="whose version was"):
        run(layer_of({"noise_std": 1.0}), source, target, BATCH, resume=True)


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"{}", b"[" * 100_000, b'{"size": 9, "progress": {}, "identity": 3}']
)
def test_a_damaged_record_is_refused(source, tmp_path, damage):
    stopped(layer_of({}), source, tmp_path / "y.npy", 200)
    (tmp_path / "y.npy.part" / "record.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"record\.json: is damaged"):
        run(layer_of({}), source, tmp_path / "y.npy", BATCH, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 9.5},
        {"size": True},
        {"progress": None},
        {"progress": {}},
        {"progress": {"tokens": 50}},
        {"progress.rows": [1]},
        {"progress.rows": None},
        {"progress.tokens": "50"},
    ],
    ids=str,
)
def test_a_record_of_other_types_is_refused(source, tmp_path, change):
    stopped(layer_of({}), source, tmp_path / "y.npy", 200)
    path = tmp_path / "y.npy.part" / "record.json"
    record = json.loads(path.read_text())
    for name, value in change.items():
        *outer, last = name.split(".")
        (record[outer[0]] if outer else record)[last] = value
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"record\.json: is damaged"):
        run(layer_of({}), source, tmp_path / "y.npy", BATCH, resume=True)


def test_a_record_that_a_finished_run_left_is_nothing_to_continue(source, tmp_path):
    """Killed when its data was in the output's place, and its directory still there."""
    target = tmp_path / "y.npy"
    stopped(layer_of({}), source, target, 200)
    (tmp_path / "y.npy.part" / "data").rename(target)
    run(layer_of({}), source, target, BATCH, resume=True)
    run(layer_of({}), source, tmp_path / "whole.npy", BATCH)
    assert target.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert names(tmp_path) == {"x.npy", "y.npy", "whole.npy"}


def test_files_of_others_in_the_directory_stay(source, tmp_path):
    others = tmp_path / "y.npy.part"
    others.mkdir()
    (others / "thesis.txt").write_text("precious")
    run(layer_of({}), source, tmp_path / "y.npy", BATCH, resume=True)
    with pytest.raises(CheckpointError):
        run(layer_of({}), tmp_path / "y.npy.part" / "thesis.txt", tmp_path / "y.npy", BATCH, resume=True)
    assert names(others) == {"thesis.txt"}


def test_data_that_is_shorter_than_its_record_is_refused(source, tmp_path):
    stopped(layer_of({}), source, tmp_path / "y.npy", 200)
    os.truncate(tmp_path / "y.npy.part" / "data", 1000)
    with pytest.raises(CheckpointError, match="the data is shorter"):
        run(layer_of({}), source, tmp_path / "y.npy", BATCH, resume=True)


def test_two_runs_cannot_write_the_same_output(source, tmp_path):
    seen = []

    def second(done, total):
        with pytest.raises(CheckpointError, match="another run is writing there"):
            run(layer_of({}), source, tmp_path / "y.npy", BATCH, resume=True)
        seen.append(done)

    run(layer_of({}), source, tmp_path / "y.npy", BATCH, second, resume=True)
    assert len(seen) == 21


def test_nothing_is_left_of_a_run_that_never_began(source, tmp_path):
    def fail(done, total):
        raise Stopped

    target = tmp_path / "y.npy"
    batch.SAVE_SECONDS = 100
    with pytest.raises(Stopped):
        run(layer_of({}), source, target, BATCH, fail, resume=True)
    assert names(tmp_path) == {"x.npy"}
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(layer_of({}), source, tmp_path / "missing" / "y.npy", BATCH, resume=True)
    with pytest.raises(MoeValueError, match="resume was True"):
        run(layer_of({}), source, None, BATCH, resume=True)


# ---- files that change, disks that fill ----


@pytest.mark.parametrize("resume", [False, True])
def test_an_input_that_shrinks_is_an_error(source, tmp_path, resume):
    def shrink(done, total):
        os.truncate(source, 2000)

    with pytest.raises(CheckpointError, match=r"x\.npy: has become shorter"):
        run(layer_of({}), source, tmp_path / "y.npy", BATCH, shrink, resume=resume)
    assert not (tmp_path / "y.npy").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_an_output_directory_that_goes_away_is_an_error(source, tmp_path, resume):
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(layer_of({}), source, folder / "y.npy", BATCH, lambda *_: shutil.rmtree(folder, True), resume=resume)
    assert names(tmp_path) == {"x.npy"}


@pytest.fixture
def small_disk():
    """Files may have 60 kB, of 96 that the output has."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_the_old_output_and_nothing_else(source, tmp_path, small_disk):
    target = tmp_path / "y.npy"
    target.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(layer_of({}), source, target, BATCH)
    assert target.read_bytes() == b"precious"
    assert names(tmp_path) == {"x.npy", "y.npy"}


def test_a_full_disk_can_be_continued(source, tmp_path, small_disk):
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(layer_of({}), source, tmp_path / "y.npy", BATCH, resume=True)
    small_disk()
    calls = []
    run(layer_of({}), source, tmp_path / "y.npy", BATCH, lambda done, total: calls.append(done), resume=True)
    assert 0 < len(calls) < 15
    run(layer_of({}), source, tmp_path / "whole.npy", BATCH)
    assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


# ---- the command, ended by signals at any time ----

_COMMAND = """
import sys
from moe_numba import batch, cli
batch.SAVE_SECONDS = 0.01
sys.exit(cli.main(sys.argv[1:]))
"""


def command(folder, *options):
    """`moe-numba run` over 100,000 tokens, in small batches."""
    arguments = ["run", "--input", "x.npy", "--output", "y.npy", "--batch-size", "512", "--json", *options]
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A folder with an input, the bytes that belong to it, and the seconds that they take."""
    folder = tmp_path_factory.mktemp("run")
    x = np.random.default_rng(0).standard_normal((100_000, 64), np.float32).astype(np.float16)
    np.save(folder / "x.npy", x)
    process = command(folder)
    start = time.monotonic()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    seconds = time.monotonic() - start
    expected = (folder / "y.npy").read_bytes()
    (folder / "y.npy").unlink()
    return folder, expected, json.loads(out), seconds


@pytest.mark.jit
@pytest.mark.usefixtures("signals_are_heard")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_random_moments_and_continued(long_run, number):
    folder, expected, whole, seconds = long_run
    (folder / "y.npy").write_bytes(b"precious")
    moments = np.random.default_rng(int(number)).uniform(0.3, 1, 3) * seconds
    for moment in moments:
        process = command(folder, "--resume")
        timer = threading.Timer(moment, process.send_signal, [number])
        timer.start()
        process.communicate(timeout=120)
        timer.cancel()
        found = (folder / "y.npy").read_bytes()
        assert found in (b"precious", expected)  # it may have been done, and on its way out
        if process.returncode == 0:
            assert found == expected
        (folder / "y.npy").write_bytes(b"precious")
        assert names(folder) <= {"x.npy", "y.npy", "y.npy.part"}
    process = command(folder, "--resume")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, b"")
    assert (folder / "y.npy").read_bytes() == expected
    assert json.loads(out)["rows_per_expert"] == whole["rows_per_expert"]
    assert json.loads(out)["balance_loss"] == whole["balance_loss"]
    assert names(folder) == {"x.npy", "y.npy"}
    (folder / "y.npy").unlink()


@pytest.mark.jit
@pytest.mark.usefixtures("signals_are_heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_ended_at_random_moments_nothing_is_left(long_run, number):
    folder, expected, _, seconds = long_run
    (folder / "y.npy").write_bytes(b"precious")
    for moment in np.random.default_rng(int(number)).uniform(0.2, 1, 2) * seconds:
        process = command(folder)
        time.sleep(moment)
        for _ in range(3):  # an impatient user
            process.send_signal(number)
        process.communicate(timeout=60)
        assert (folder / "y.npy").read_bytes() in (b"precious", expected)
        assert names(folder) == {"x.npy", "y.npy"}
    (folder / "y.npy").unlink()
