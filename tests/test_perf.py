"""perf/: the suite writes a result that pyperf reads, and comparing two results tells change from noise."""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyperf
import pytest

from moe_numba import MoeLayer, threads

pytestmark = pytest.mark.jit

PERF = Path(__file__).resolve().parent.parent / "perf"
STEPS = ("router", "plan", "experts", "layer")
STEADY = [1.00, 1.01, 1.02, 0.99, 0.98]
NOISY = [0.70, 1.50, 1.40, 0.95, 1.30]
DISTURBED = [1.40, 1.50, 1.00, 1.60, 1.70]  # all processes but one


def script(name, *arguments):
    return subprocess.run([sys.executable, PERF / name, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def perf_module(monkeypatch):
    """perf_module("run") imports perf/run.py, which is no part of a package."""
    monkeypatch.syspath_prepend(PERF)
    return importlib.import_module


@pytest.fixture
def compare(perf_module, capsys):
    """compare(*arguments) -> exit status, stdout, stderr of perf/compare.py. A traceback would be an exception."""

    def call(*arguments):
        try:
            status = perf_module("compare").main(list(map(str, arguments)))
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def write_suite(tmp_path):
    """write_suite("a.json", {benchmark: one value in ms a process}, **metadata) -> path."""

    def write(name, benchmarks, **metadata):
        suite = pyperf.BenchmarkSuite(
            [
                pyperf.Benchmark(
                    [
                        pyperf.Run([v * 1e-3], metadata={"name": bench} | metadata, collect_metadata=False)
                        for v in values
                    ]
                )
                for bench, values in benchmarks.items()
            ]
        )
        suite.dump(str(tmp_path / name))
        return tmp_path / name

    return write


def test_run_writes_a_suite(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    result = tmp_path / "result.json"
    done = script("run.py", "-o", result, "--workload", "seed", "--tokens", 1, "--debug-single-value", "--quiet")
    assert done.returncode == 0, done.stderr
    suite = pyperf.BenchmarkSuite.load(str(result))
    assert suite.get_benchmark_names() == [f"seed/T=1/{step}" for step in STEPS]
    assert all(bench.median() > 0 for bench in suite)
    facts = suite.get_metadata()
    assert {"moe_numba_version", "numba_version", "compiled_for"} <= set(facts)
    assert facts["threads"] == 1  # the workers inherited the environment
    assert "NUMBA_NUM_THREADS=1" in facts["environment"]


def test_startup_is_timed_in_a_new_process(perf_module, monkeypatch):
    run = perf_module("run")
    nothing = """
import os, pathlib, moe_numba
caches = pathlib.Path(moe_numba.__file__).parent, pathlib.Path(os.environ["NUMBA_CACHE_DIR"])
assert not any(list(cache.rglob("*.nbc")) for cache in caches)"""
    monkeypatch.setitem(run.STARTUP_CODE, "compile", nothing)
    monkeypatch.setitem(run.STARTUP_CODE, "import", "import time; time.sleep(0.2)")
    assert run.time_startup(1, "compile") > 0
    assert 0.2 < run.time_startup(1, "import") < 60
    monkeypatch.setitem(run.STARTUP_CODE, "import", "1 / 0")
    with pytest.raises(subprocess.CalledProcessError):
        run.time_startup(1, "import")


def test_consecutive_inputs_meet_different_experts(perf_module):
    workloads = perf_module("workloads")
    config = workloads.WORKLOADS["switch"]
    route, calls = workloads.prepare("switch", 1, "router")
    met = [int(route(*args).expert_indices[0, 0]) for args in calls]
    assert len(calls) >= config.num_experts
    assert all(a != b for a, b in itertools.pairwise(met))
    assert set(met[: config.num_experts]) == set(range(config.num_experts))


def test_steps_of_a_workload_fit_together(perf_module):
    workloads = perf_module("workloads")
    (forward, layer_args), (experts, experts_args) = (workloads.prepare("seed", 16, step) for step in STEPS[:1:-1])
    np.testing.assert_array_equal(forward(*layer_args[0])[0], experts(*experts_args[0]))
    _, plan_args = workloads.prepare("seed", 16, "plan")
    np.testing.assert_array_equal(plan_args[0][0], experts_args[0][1])


@pytest.mark.parametrize(
    ("new", "status", "verdict"),
    [
        (STEADY, 0, "same"),
        ([v * 1.3 for v in STEADY], 1, "SLOWER"),
        ([v / 1.3 for v in STEADY], 0, "faster"),
        (NOISY, 0, "noise"),
        (DISTURBED, 0, "noise"),
        (STEADY[:2], 0, "too few processes"),
    ],
)
def test_compare(compare, write_suite, new, status, verdict):
    old_file = write_suite("old.json", {"layer": STEADY, "plan": STEADY, "gone": STEADY})
    new_file = write_suite("new.json", {"layer": new, "plan": STEADY, "added": STEADY})
    actual_status, out, err = compare(old_file, new_file)
    assert (actual_status, err) == (status, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert lines["layer"].endswith(verdict)
    assert lines["plan"].endswith("1.00  same")
    assert lines["gone"].endswith("only in old")
    assert lines["added"].endswith("only in new")


def test_compare_ratio(compare, write_suite):
    files = write_suite("old.json", {"layer": STEADY}), write_suite("new.json", {"layer": [v * 1.3 for v in STEADY]})
    assert compare(*files, "--ratio", 1.5)[0] == 0
    assert compare(*files, "--ratio", 1.2)[0] == 1
    check_refused(compare(*files, "--ratio", 0.5), "--ratio")


@pytest.mark.parametrize("content", ["", "no json", "[]", "{}", '{"benchmarks": 3, "version": "1.0"}', None])
def test_compare_unreadable(compare, write_suite, tmp_path, content):
    good, bad = write_suite("good.json", {"layer": STEADY}), tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    check_refused(compare(good, bad), "bad.json")
    check_refused(compare(bad, good), "bad.json")


def test_compare_incomparable(compare, write_suite):
    old = write_suite("old.json", {"layer": STEADY}, threads=2)
    check_refused(compare(old, write_suite("a.json", {"plan": STEADY})), "no benchmark in common")
    check_refused(compare(old, write_suite("b.json", {"layer": STEADY[:1]})), "3 processes")
    check_refused(compare(old, write_suite("c.json", {"layer": STEADY}, threads=1)), "threads was 2")
    check_refused(compare(old, write_suite("d.json", {"layer": STEADY}, unit="byte")), "bytes")


def test_compare_as_a_script(write_suite, tmp_path):
    old, new = write_suite("old.json", {"layer": STEADY}), write_suite("new.json", {"layer": [v * 2 for v in STEADY]})
    assert [script("compare.py", *files).returncode for files in ((old, old), (old, new), (old, tmp_path))] == [0, 1, 2]


def check_refused(result, reason):
    """Status 2 and one line that says why."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert reason in err


def test_endurance_passes_and_finds_a_wrong_bit(perf_module, capsys, monkeypatch):
    endurance = perf_module("endurance")
    monkeypatch.setattr(threads, "SERIAL_BELOW", threads.SERIAL_BELOW)  # which it sets
    assert endurance.main(["--minutes", "0.02"]) == 0
    assert "passed" in capsys.readouterr().out
    forward, calls = MoeLayer.forward, []

    def broken(self, x):
        y, routing = forward(self, x)
        calls.append(x)
        if len(calls) > 200:
            y.view("i4")[-1:] ^= 1
        return y, routing

    monkeypatch.setattr(MoeLayer, "__call__", broken)
    assert endurance.main(["--minutes", "0.5"]) == 1
    assert "VIOLATION: AssertionError" in capsys.readouterr().out
