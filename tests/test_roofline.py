"""perf/roofline.py and perf/peers.py: a tiny workload goes through, and what cannot be is called an error."""

import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.jit

PERF = Path(__file__).resolve().parent.parent / "perf"
BUFFER = 2**25  # bytes


@pytest.fixture
def perf_module(monkeypatch):
    """perf_module("peaks") imports perf/peaks.py, which is no part of a package."""
    monkeypatch.syspath_prepend(PERF)
    return importlib.import_module


@pytest.fixture
def roofline(perf_module, monkeypatch):
    """perf/roofline.py with peaks that take no time to measure."""
    module = perf_module("roofline")
    monkeypatch.setattr(module.peaks, "make_buffer", lambda size: None)
    monkeypatch.setattr(module.peaks, "multiply_add_rate", lambda dtype: 1e15)
    monkeypatch.setattr(module.peaks, "reading_rate", lambda buffer: 1e14)
    return module


@pytest.fixture
def peers(perf_module):
    return perf_module("peers")


def test_peaks_are_those_of_a_processor(perf_module):
    peaks = perf_module("peaks")
    for dtype in peaks.WAYS:
        assert 1e8 < peaks.multiply_add_rate(dtype, pieces=8, steps=1000) < 1e15
    assert 1e7 < peaks.reading_rate(peaks.make_buffer(BUFFER)) < 1e14


def test_every_format_has_a_peak(perf_module):
    from moe_numba.config import DTYPES

    assert set(perf_module("peaks").WAYS) == set(DTYPES)


def test_all_of_a_buffer_is_read(perf_module):
    peaks = perf_module("peaks")
    piece = peaks.STREAMS * peaks.STREAM_GAP
    buffer = np.arange(3 * piece, dtype=np.float32) % 7
    for way in peaks.READING_WAYS:
        out = np.zeros((1, peaks.LANES), np.float32)
        peaks._sum_on_all(np.zeros(1, np.int64), buffer, out, 3, *way)
        # The sum of the last piece, and its first vector again in each of the eight sums.
        first = buffer[2 * piece :][: peaks.LANES]
        expected = buffer[2 * piece :].sum(dtype=np.float64) + peaks.STREAMS * first.sum()
        np.testing.assert_allclose(out.sum(dtype=np.float64), expected, rtol=1e-4)


def test_roofline_writes_a_result(roofline, tmp_path, capsys):
    output = tmp_path / "new" / "result"
    options = ["--workload", "seed", "--dtype", "float32", "--tokens", "1", "16", "--rounds", "2", "--cache-mib", "0"]
    assert roofline.main([*options, "--output", str(output)]) == 0
    rows = json.loads(Path(f"{output}.json").read_text())["results"]
    assert [(row["workload"], row["tokens"]) for row in rows] == [("seed", 1), ("seed", 16)]
    assert rows[0]["flops"] == 2 * 2 * 2 * 64 * 128  # two for a multiply-add, K, two matrices
    assert rows[0]["bytes"] == 2 * 2 * 64 * 128 * 4  # two experts
    for row in rows:
        assert 0 < row["share"] == max(row["share_of_peak"], row["share_of_reading"]) < 1
        assert row["limit"] == "memory"
    assert "SHARE" in capsys.readouterr().out


def test_weights_in_the_cache_have_no_limit_of_the_memory(roofline, capsys):
    assert roofline.main(["--workload", "seed", "--tokens", "1", "--rounds", "1", "--cache-mib", "100"]) == 0
    out = capsys.readouterr().out
    assert "fits into the cache" in out
    assert "memory" not in out


def test_a_share_above_one_is_an_error(roofline, monkeypatch, capsys):
    monkeypatch.setattr(roofline.peaks, "multiply_add_rate", lambda dtype: 1e3)
    assert roofline.main(["--workload", "seed", "--tokens", "1", "--rounds", "1"]) == 1
    assert "MEASUREMENT ERROR" in capsys.readouterr().out


def test_the_higher_of_two_peaks_counts(roofline, monkeypatch):
    rates = iter([1e12, 4e12, 2e12])
    monkeypatch.setattr(roofline.peaks, "multiply_add_rate", lambda dtype: next(rates))
    cases = roofline.make_cases("seed", "float32", [1], cache=0)
    (row,) = roofline.measure(cases, "float32", None, rounds=2)
    assert [turn[0] for turn in row["turns"]] == [4e12, 4e12]


def test_results_do_not_change_the_commit(roofline, tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "ROOT", tmp_path)
    assert roofline._commit() is None
    result, code = tmp_path / "perf" / "results" / "a.json", tmp_path / "code.py"
    result.parent.mkdir(parents=True)
    result.write_text("1")
    code.write_text("1")
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm a"):
        roofline._git(*command.split())
    commit = roofline._git("describe", "--always", "--exclude", "*")
    result.write_text("2")
    assert roofline._commit() == commit
    code.write_text("2")
    assert roofline._commit() == f"{commit}-dirty"


@pytest.fixture
def timing(perf_module, monkeypatch):
    """perf/timing.py with a clock that only `function` of a test moves, and a hypervisor that only it serves."""
    module = perf_module("timing")
    monkeypatch.setattr(module, "now", 0.0, raising=False)
    monkeypatch.setattr(module, "taken", 0.0, raising=False)
    monkeypatch.setattr(module.time, "perf_counter", lambda: module.now)
    monkeypatch.setattr(module, "stolen", lambda: module.taken)
    return module


def calls_that(timing, seconds, thefts):
    """A function that takes so many seconds and what is stolen from it, and a list of what each call took."""
    thefts, took = iter(thefts), []

    def function(x):
        lost = next(thefts)
        timing.taken += lost
        timing.now += seconds + lost
        took.append(seconds + lost)

    return function, took


def test_calls_that_were_disturbed_do_not_count(timing):
    function, took = calls_that(timing, 1.0, [0.5, 0.25, 0.0, 9.0])
    assert timing.time_calls(function, itertools.repeat(None), 4) == 1.0
    assert took == [1.5, 1.25, 1.0]  # until one is left in peace


def test_of_disturbed_calls_the_least_disturbed_count(timing):
    function, took = calls_that(timing, 1.0, [0.5, 0.25, 0.5, 0.75, 0.0])
    assert timing.time_calls(function, itertools.repeat(None), 4) == 1.25
    assert len(took) == timing.MOST_RUNS


def test_short_calls_are_looked_at_together(timing):
    thefts = itertools.chain([0.03] * 20, itertools.repeat(0.0))
    function, took = calls_that(timing, 0.001, thefts)
    assert timing.time_calls(function, itertools.repeat(None), 32) == pytest.approx(0.001)
    assert len(took) == 32  # a pass, after which the turn is over


def test_what_was_stolen_is_never_less(perf_module):
    timing = perf_module("timing")
    assert 0 <= timing.stolen() <= timing.stolen()


def test_peers_are_compared(peers, monkeypatch, tmp_path, capsys):
    class Missing(peers.Peer):
        name = "missing"

        def prepare(self, weights):
            import a_library_that_nobody_has  # noqa: F401

    class Wrong(peers.NumpyLoop):
        name = "wrong"

        def run(self, *args):
            return super().run(*args) * 1.01

    class Large(peers.NumpyLoop):
        name = "large"
        copies = 10**9

    monkeypatch.setattr(peers, "PEERS", (peers.NumpyLoop, Missing, Wrong, Large))
    output = tmp_path / "result"
    options = ["--workload", "seed", "--dtype", "float32", "--tokens", "1", "16", "--rounds", "2"]
    assert peers.main([*options, "--output", str(output)]) == 0
    rows = json.loads(Path(f"{output}.json").read_text())["results"]
    assert [(row["tokens"], row["peer"]) for row in rows] == [
        (tokens, peer) for tokens in (1, 16) for peer in ("moe_numba", "NumPy loop")
    ]
    assert all(row["seconds"] > 0 for row in rows)
    assert [row["ratio"] for row in rows[::2]] == [1.0, 1.0]
    lines = {line.split(":")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "No module named 'a_library_that_nobody_has'" in lines["without missing"]
    assert "wrong result" in lines["without wrong"]
    assert "GiB" in lines["without large"]


def test_only_chosen_peers(peers, capsys):
    workload = peers.Workload("seed", "bfloat16", [1])
    assert [peer.name for peer in peers.gather(workload, ["NumPy"])] == ["moe_numba"]
    assert "without NumPy loop: not for bfloat16" in capsys.readouterr().out


def test_the_numpy_loop_computes_gated_experts(peers, rng):
    arrays = (rng.standard_normal(shape, dtype=np.float32) for shape in ((3, 10, 4), (3, 4, 5), (3, 10), (3, 4)))
    weights = peers.Weights("float32", "swiglu", *arrays, top_k=2)
    peer = peers.NumpyLoop()
    peer.prepare(weights)
    call = rng.standard_normal((6, 4), dtype=np.float32), np.full((6, 2), 0.5, np.float32), np.tile([2, 0], (6, 1))
    assert peers.check(peer, weights, call) < 1e-5
