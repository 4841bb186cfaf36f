"""The command line as a user meets it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_numba import MoeConfig, MoeLayer, cli, get_num_threads


def moe_numba(*arguments, **options):
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "moe_numba", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_run_without_files_uses_the_digits_in_the_package(capsys):
    assert cli.main(["run"]) == 0
    out = capsys.readouterr().out
    assert "1797 handwritten digits" in out
    assert re.search(r"tokens +1,797\n", out)
    assert len(re.findall(r"^ +\d #+ +\d+ +\d+\.\d%$", out, re.MULTILINE)) == 8


def test_layer_in_the_package_removes_noise_from_digits():
    layer = MoeLayer.load(cli.DATA / "digits_layer.safetensors")
    clean = np.load(cli.DATA / "digits.npy").astype(np.float32)
    assert clean.shape == (1797, 64)
    assert (clean.min(), clean.max()) == (0, 1)
    noisy = clean + 0.3 * np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
    error = np.mean((layer(noisy)[0] - clean) ** 2)
    assert error < 0.2 * np.mean((noisy - clean) ** 2)


def test_json_says_the_same_as_the_report(capsys, tmp_path):
    assert cli.main(["run", "--json", "--batch-size", "100", "--output", str(tmp_path / "y.npy")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] == 1797
    assert sum(facts["rows_per_expert"]) + facts["dropped_rows"] == 2 * 1797
    assert facts["threads"] == get_num_threads()
    assert np.load(tmp_path / "y.npy").shape == (1797, 64)


def test_own_layer_and_input(tmp_path):
    layer = MoeLayer(MoeConfig(num_experts=3, top_k=1, input_dim=5, hidden_dim=7, activation="geglu"))
    x = np.random.default_rng(0).standard_normal((11, 5)).astype(np.float32)
    layer.save(tmp_path / "layer.safetensors")
    np.save(tmp_path / "x.npy", x)
    files = ["--layer", "layer.safetensors", "--input", "x.npy", "--output", "y.npy"]
    done = moe_numba("run", *files, "--threads", 1, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["threads"] == 1
    assert np.array_equal(np.load(tmp_path / "y.npy"), layer(x)[0])


def test_token_of_nan_keeps_json_valid(tmp_path, capsys):
    x = np.load(cli.DATA / "digits.npy")
    x[3, 5] = np.nan
    np.save(tmp_path / "x.npy", x)
    assert cli.main(["run", "--json", "--input", str(tmp_path / "x.npy")]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert facts["balance_loss"] is None
    assert facts["dropped_rows"] == 2
    assert facts["nan_tokens"] == 1
    assert cli.main(["run", "--input", str(tmp_path / "x.npy")]) == 0
    assert re.search(r"^NaN +1 tokens: ", capsys.readouterr().out, re.MULTILINE)


def test_bfloat16_layer(tmp_path, capsys):
    MoeLayer.load(cli.DATA / "digits_layer.safetensors").astype("bfloat16").save(tmp_path / "layer.safetensors")
    assert cli.main(["run", "--layer", str(tmp_path / "layer.safetensors")]) == 0
    assert "relu, bfloat16" in capsys.readouterr().out


@pytest.mark.usefixtures("signals_are_heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_ended_run_leaves_the_old_output_whole(tmp_path, number):
    np.save(tmp_path / "x.npy", np.zeros((6_000_000, 64), np.float16))  # seconds of work
    (tmp_path / "y.npy").write_bytes(b"precious")
    command = [sys.executable, "-m", "moe_numba", "run", "--input", "x.npy", "--output", "y.npy"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not list(tmp_path.glob(".*.part")):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    if number == signal.SIGINT:
        assert b"interrupted; y.npy was not written" in said
    assert (tmp_path / "y.npy").read_bytes() == b"precious"
    assert {p.name for p in tmp_path.iterdir()} == {"x.npy", "y.npy"}


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As `nohup` starts it."""
    np.save(tmp_path / "x.npy", np.zeros((300_000, 64), np.float16))
    code = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); from moe_numba import cli; "
    code += "sys.exit(cli.main(['run', '--input', 'x.npy', '--output', 'y.npy']))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    while process.poll() is None and not list(tmp_path.glob(".*.part")):
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert {p.name for p in tmp_path.iterdir()} == {"x.npy", "y.npy"}


def test_names_that_are_no_text_and_a_closed_output(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.npy"
    shutil.copy(cli.DATA / "digits.npy", name)
    arguments = [sys.executable, "-m", "moe_numba", "run", "--input", name]
    done = subprocess.run(arguments, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"}, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"udcff.npy" in done.stdout
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *arguments], stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


class _Lost:
    """What is raised in a destructor gets no further."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@pytest.mark.usefixtures("signals_are_heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_whose_exception_is_lost_ends_the_run_at_the_next_batch(tmp_path, monkeypatch, number):
    forward = MoeLayer.forward
    calls, lost = [], []

    def interrupted(self, x):
        calls.append(x)
        if len(calls) == 5:
            _Lost(number)
        return forward(self, x)

    monkeypatch.setattr(MoeLayer, "forward", interrupted)
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    arguments = ["run", "--batch-size", "50", "--output", str(tmp_path / "y.npy")]
    if number == signal.SIGINT:
        assert cli.main(arguments) == 130
    else:
        with pytest.raises(SystemExit, match=str(128 + number)):
            cli.main(arguments)
    assert (len(calls), len(lost)) == (5, 1)
    assert list(tmp_path.iterdir()) == []


def test_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "moe_numba", "run"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"moe-numba: error: standard output .*\n", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--input", "missing.npy"], "missing.npy: cannot be read"),
        (["run", "--layer", "missing.safetensors"], "missing.safetensors: cannot be read"),
        (["run", "--output", "y.txt"], "--output was 'y.txt', but must end in .npy"),
        (["run", "--output", ""], "--output was '', but must end in .npy"),
        (["run", "--input", ""], "the name must end in .npy or .safetensors"),
        (["run", "--layer", ""], "cannot be read"),
        (["run", "--nonsense", "two\nlines"], "unrecognized arguments: --nonsense two lines"),
        (["run", "--output", "missing/y.npy"], "missing/y.npy: cannot be written"),
        (["run", "--batch-size", "0"], "--batch-size was 0"),
        (["run", "--batch-size", "many"], "invalid int value: 'many'"),
        (["run", "--threads", "0"], "--threads was 0"),
        (["run", "--threads", "100000"], "--threads was 100000"),
        (["run", "--layer", "3"], "--checkpoint was left out"),
        (["run", "--checkpoint", "missing", "--input", "x.npy", "--layer", "1"], "missing: is no directory"),
        (["run", "--nonsense"], "see moe-numba [COMMAND] --help"),
        (["run", "--batch-size"], "see moe-numba run --help"),
        (["run", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "the following arguments are required"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(arguments)
    except SystemExit as ended:  # argparse
        status = ended.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_report_into_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m moe_numba run | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_info_names_what_it_found(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for name in ("processor", "instruction sets", "threads", "threading layer", "cache", "numba", "llvmlite"):
        assert re.search(rf"^{name} +\S", out, re.MULTILINE), name
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["numpy"] == np.__version__


def test_warmup_says_what_it_did(capsys):
    assert cli.main(["warmup"]) == 0
    assert re.fullmatch(r"\d+ kernels compiled or loaded from the cache in \d+\.\d s\n", capsys.readouterr().out)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert re.fullmatch(r"moe_numba \d+\.\d+\.\d+\n", capsys.readouterr().out)
