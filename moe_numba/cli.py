"""The command line: moe-numba run, info, warmup."""

import argparse
import dataclasses
import functools
import io
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import numba
import numpy as np

from . import __version__, _check
from ._jit import KERNELS
from ._partial import is_kept
from ._warmup import warmup
from .batch import run
from .errors import MoeError
from .layer import MoeLayer
from .pretrained import list_moe_layers
from .simd import target
from .simd.tile import TILE_COLUMNS, TILE_ROWS
from .threads import get_num_threads, set_num_threads, threading_layer

DATA = Path(__file__).parent / "data"
BAR_WIDTH = 40
#: Signals that end a run.
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
#: The one that came.
_came = None


def main(arguments=None) -> int:
    """Run a command; 0 when it succeeded, 2 for bad input, with one line on stderr."""
    global _came
    if threading.current_thread() is not threading.main_thread():  # where signals do not arrive
        return _main(arguments)
    _came = None
    # Those that are ignored stay so (nohup, and jobs in the background of a script); None: Python cannot restore it.
    handlers = {number: signal.getsignal(number) for number in ENDING}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, _end)
        return _main(arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _main(arguments):
    options = None
    try:
        options = _parser().parse_args(arguments)
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
            sys.stdout.reconfigure(errors="backslashreplace")
        options.command(options)
        if sys.stdout is not None:  # closed from the beginning
            sys.stdout.flush()
        return 0
    except MoeError as error:
        message = str(error)
    except MemoryError as error:
        message = f"not enough memory, try a smaller --batch-size ({error})"
    except KeyboardInterrupt:
        print(f"moe-numba: interrupted{_kept(options)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        _discard_stdout()
        return 141
    except OSError as error:
        _discard_stdout()
        message = f"standard output cannot be written ({error.strerror})"
    print("moe-numba: error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _kept(options):
    """What an interrupted run leaves, in words."""
    output = getattr(options, "output", None)
    if output is None:
        return ""
    if options.resume and is_kept(output):
        return f"; what is done is kept in {output}.part, and the same command continues"
    advice = "" if options.resume else " (with --resume a run keeps what is done)"
    return f"; {output} was not written{advice}"


def _end(number, frame):
    global _came
    if _came is None:  # a second one must not stop us from cleaning up
        _came = number
        _raise(number)


def _raise(number):
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _discard_stdout():
    """Let what is still buffered go nowhere instead of failing again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        message = " ".join(message.split())
        command = "" if " " in self.prog else " [COMMAND]"
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog}{command} --help)\n")


def _parser():
    parser = _Parser(prog="moe-numba", description="Mixture-of-Experts layers on the CPU.")
    parser.add_argument("--version", action="version", version=f"moe_numba {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "run",
        help="send tokens from a file through a layer",
        description="Send tokens from a file through a layer, in batches, on all cores. Without files: a layer "
        "trained to remove noise from images of handwritten digits, and 1797 such images, which ship in the package.",
    )
    command.set_defaults(command=_run)
    command.add_argument(
        "--layer",
        metavar="FILE",
        help="layer saved by MoeLayer.save (.safetensors); with --checkpoint the number of a layer",
    )
    command.add_argument("--checkpoint", metavar="DIR", help="model in Hugging Face format, of which to run one layer")
    command.add_argument("--input", metavar="FILE", help="tokens of shape (..., input_dim), .npy or .safetensors")
    command.add_argument("--output", metavar="FILE", help="where to write the layer's output (.npy)")
    command.add_argument(
        "--resume",
        action="store_true",
        help="keep what is done in OUTPUT.part if the run ends early, and continue from there",
    )
    command.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=4096,
        help="tokens per batch and its capacity limit (4096)",
    )
    command.add_argument("--threads", metavar="N", type=int, help="threads to use (all cores)")
    command.add_argument("--json", action="store_true", help="print the report as one JSON object")

    command = commands.add_parser("info", help="what moe_numba found on this machine")
    command.set_defaults(command=_info)
    command.add_argument("--json", action="store_true", help="print one JSON object")

    command = commands.add_parser("warmup", help="compile all kernels now, so that no later call waits for it")
    command.set_defaults(command=_warmup)
    return parser


# ---- run ----


def _run(options):
    input_file = DATA / "digits.npy" if options.input is None else options.input
    if options.output is not None and not options.output.endswith(".npy"):
        raise MoeError(f"--output was {options.output!r}, but must end in .npy")
    if options.resume and options.output is None:
        raise MoeError("--resume was given, but must be left out without --output")
    if options.threads is not None:
        try:
            set_num_threads(options.threads)
        except MoeError as error:
            raise MoeError(f"--threads{str(error).removeprefix('n')}") from None
    _check.integer("--batch-size", options.batch_size, 1)
    layer, layer_name = _load_layer(options)
    with _progress_bar() as bar:
        advance = functools.partial(_advance, bar)
        report = run(layer, input_file, options.output, options.batch_size, advance, resume=options.resume)
    config = layer.config
    facts = {
        "layer": layer_name,
        "input": str(input_file)
        if options.input is not None
        else "1797 handwritten digits, 8 x 8 pixels, UCI (ship in the package)",
        "output": options.output,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "input_dim": config.input_dim,
        "hidden_dim": config.hidden_dim,
        "activation": config.activation,
        "dtype": config.dtype,
        "threads": get_num_threads(),
        **dataclasses.asdict(report),
    }
    if options.json:
        if math.isnan(facts["balance_loss"]):  # tokens of NaN; JSON has no such number
            facts["balance_loss"] = None
        print(json.dumps(facts, allow_nan=False))
    else:
        print(_report_text(facts, layer.config))


def _advance(bar, done, total):
    if _came is not None:  # what the handler raised was lost, in a destructor or a callback from C
        _raise(_came)
    bar.total = total
    bar.update(done - bar.n)


def _load_layer(options):
    """The layer to run, and what to call it."""
    if options.checkpoint is None:
        if options.layer is not None:
            if options.layer.isdecimal() and not Path(options.layer).exists():
                raise MoeError("--checkpoint was left out, but must be given with a layer's number")
            return MoeLayer.load(options.layer), options.layer
        return MoeLayer.load(DATA / "digits_layer.safetensors"), "trained denoiser for digits (ships in the package)"
    if options.input is None:
        raise MoeError("--input was left out, but must be given with --checkpoint")
    layers = list_moe_layers(options.checkpoint)
    if options.layer not in map(str, layers):
        was = "left out" if options.layer is None else repr(options.layer)
        known = ", ".join(map(str, layers)) or "none"
        raise MoeError(f"--layer was {was}, but must be a Mixture-of-Experts layer of the checkpoint: {known}")
    number = int(options.layer) if options.layer.isdecimal() else options.layer
    return MoeLayer.from_pretrained(options.checkpoint, number), f"layer {options.layer} of {options.checkpoint}"


def _progress_bar():
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread that watches the bar: beside another thread workqueue computes serially
    # disable=None: only on a terminal. delay: only if the run takes longer than that, in seconds.
    return tqdm(unit=" tokens", unit_scale=True, delay=1.0, disable=None, leave=False)


def _report_text(facts, shape):
    lines = [
        ("layer", facts["layer"]),
        ("", shape),
        ("input", facts["input"]),
        ("output", facts["output"] or "not written (--output FILE writes it)"),
        ("tokens", f"{facts['tokens']:,}"),
        ("time", f"{_duration(facts['seconds'])} on {facts['threads']} thread{'s' * (facts['threads'] > 1)}"),
        ("speed", f"{facts['tokens_per_second']:,.0f} tokens per second"),
        ("dropped", f"{facts['dropped_rows']:,} rows, {facts['dropped_tokens']:,} whole tokens"),
        ("balance loss", f"{facts['balance_loss']:.4f} (1 is even)"),
    ]
    if facts["nan_tokens"]:
        why = "they hold NaN or an infinity, or their logits overflow"
        lines.append(("NaN", f"{facts['nan_tokens']:,} tokens: {why}"))
    text = [f"{name:13} {value}" for name, value in lines]
    return "\n".join([*text, "", "rows per expert", *_bar_chart(facts["rows_per_expert"])])


def _bar_chart(counts):
    """One line per expert: number, bar, rows, share."""
    total = sum(counts) or 1
    longest = max(counts) or 1
    digits = len(str(len(counts) - 1))
    bars = ("#" * round(BAR_WIDTH * n / longest) for n in counts)
    return [
        f"  {e:{digits}} {bar:{BAR_WIDTH}} {n:>{len(f'{longest:,}')},} {n / total:6.1%}"
        for e, (n, bar) in enumerate(zip(counts, bars, strict=True))
    ]


def _duration(seconds):
    for unit, length in (("s", 1), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


# ---- info, warmup ----


def _info(options):
    facts = _facts()
    if options.json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):17} {', '.join(value) if isinstance(value, list) else value}")


def _facts():
    features = target.cpu_features()
    used = [name for name in ("avx512f", "avx2", "fma", "neon") if name in features]
    lanes = target.LANES
    without_cache = "none can be written: kernels are compiled in every process"
    if numba.config.DISABLE_JIT:
        without_cache = "none: NUMBA_DISABLE_JIT is set, and kernels are plain Python"
    cache = {Path(twin._cache.cache_path) for k in KERNELS for twin in (k.serial, k.parallel) if twin._cache.cache_path}
    return {
        "processor": _processor(),
        "compiled_for": target.cpu_name(),
        "instruction_sets": used or ["those of " + target.cpu_name()],
        "vector": f"{target.register_bits()} bits, {lanes} float32",
        "tile": f"{TILE_ROWS} rows x {TILE_COLUMNS} columns",
        "matrix_unit": "AMX, for bfloat16 weights" if target.has_amx() else "none",
        "threads": f"{get_num_threads()} of {os.cpu_count()} processors",
        "threading_layer": threading_layer(),
        "cache": sorted(str(path) for path in cache) or without_cache,
        "moe_numba": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "llvmlite": metadata.version("llvmlite"),
    }


def _processor():
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _warmup(options):
    if numba.config.DISABLE_JIT:
        print("nothing to compile: NUMBA_DISABLE_JIT is set")
        return
    start = time.perf_counter()
    n = warmup()
    print(f"{n} kernels compiled or loaded from the cache in {time.perf_counter() - start:.1f} s")
