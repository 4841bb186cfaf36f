"""How close a layer comes to the limits of the machine.

python perf/roofline.py --output perf/results/roofline

A layer cannot be faster than its products divided by the processor's peak, nor than its weights
divided by the memory's reading rate. The larger of the two times is the bound; the bound divided by
the time that the layer takes is the share of the machine that it uses. Peaks and layer are measured in
turn in one run, because both drift. docs/performance.md says how to read the table.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # measure this checkout, whatever is installed

import numba  # noqa: E402
import numpy as np  # noqa: E402
import peaks  # noqa: E402
from timing import time_calls  # noqa: E402
from workloads import WORKLOADS, make_inputs, make_layer  # noqa: E402

import moe_numba  # noqa: E402
from moe_numba.config import ACTIVATIONS, DTYPES  # noqa: E402
from moe_numba.simd import target  # noqa: E402

DEFAULT_WORKLOADS = ("olmoe", "qwen3", "mixtral")
TOKENS = (1, 4, 16, 64, 512, 2048)
#: Share of the limit above which a measurement is called wrong. Nothing is faster than the machine.
MOST = 1.0

PROCESSOR, MEMORY, ERROR = "processor", "memory", "MEASUREMENT ERROR"


def main(arguments=None):
    options = _parser().parse_args(arguments)
    facts = machine()
    print(headline(facts))
    buffer = peaks.make_buffer(int(options.buffer * 2**30))
    results = []
    for name, dtype in itertools.product(options.workload or DEFAULT_WORKLOADS, options.dtype or DTYPES):
        cases = make_cases(name, dtype, options.tokens or TOKENS, options.cache_mib * 2**20)
        rows = measure(cases, dtype, buffer, options.rounds)
        print("\n" + "\n".join(show(rows)), flush=True)
        results += rows
    errors = sum(row["limit"] == ERROR for row in results)
    if errors:
        print(f"\n{errors} shares above {MOST:.0%}: a limit was measured too low. Repeat with more --rounds.")
    if options.output:
        store(options.output, {"machine": facts, "options": vars(options), "results": results})
        print(draw(results, options.output))
    return 1 if errors else 0


def _parser():
    parser = argparse.ArgumentParser(description="Share of the machine's limits that a layer reaches.")
    add_choices(parser, DEFAULT_WORKLOADS, TOKENS)
    parser.add_argument("--rounds", type=int, default=7, help="turns of peaks and layer (default: 7)")
    parser.add_argument(
        "--buffer", type=float, default=peaks.BUFFER_BYTES / 2**30, metavar="GIB", help="memory to read"
    )
    parser.add_argument(
        "--cache-mib",
        type=float,
        default=cache_bytes() / 2**20,
        metavar="MIB",
        help="last-level cache; weights that fit into it are not held against the memory (default: %(default)s, found)",
    )
    return parser


# ---- what is measured ----


class Case:
    """A layer, batches of one size, and the work in one of them: that of the experts, without the router's."""

    def __init__(self, name, layer, tokens, cached):
        config = layer.config
        self.name, self.tokens = name, tokens
        self.layer = layer
        inputs = make_inputs(layer.router, tokens)
        met = [len(np.unique(layer.router.route(x).expert_indices)) for x in inputs]
        self.inputs = itertools.cycle(inputs)
        self.pass_length = len(inputs)

        matrices = 3 if ACTIVATIONS[config.activation].gated else 2
        expert = matrices * config.input_dim * config.hidden_dim
        self.flops = 2 * tokens * config.top_k * expert
        #: Each chosen expert's weights once; 0 if the cache may answer for the memory.
        self.bytes = 0 if cached else statistics.mean(met) * expert * layer.experts.up.itemsize


def make_cases(name, dtype, tokens, cache):
    """One Case for each number of tokens, all of one layer."""
    layer = make_layer(WORKLOADS[name])
    if dtype != layer.config.dtype:
        layer = layer.astype(dtype)
    cached = layer.experts.up.nbytes + layer.experts.down.nbytes < cache
    if cached:
        print(f"\n{name} in {dtype} fits into the cache: only the processor's limit applies")
    return [Case(name, layer, t, cached) for t in dict.fromkeys(tokens)]


def measure(cases, dtype, buffer, rounds):
    """A dict of results for each case. In every round each case has its turn, between two measurements of the peaks."""
    turns = {case: [] for case in cases}
    for case in cases:
        time_calls(case.layer.forward, case.inputs, 1)  # compiles, and takes its workspace
    before = measure_peaks(dtype, buffer)
    for _ in range(rounds):
        for case in cases:
            seconds = time_calls(case.layer.forward, case.inputs, case.pass_length)
            after = measure_peaks(dtype, buffer)
            # The higher ones: a neighbour may have slowed down one of them, nobody can speed them up.
            turns[case].append((*map(max, before, after), seconds))
            before = after
    return [result(case, dtype, turns[case]) for case in cases]


def measure_peaks(dtype, buffer):
    """FLOP/s and bytes/s."""
    return peaks.multiply_add_rate(dtype), peaks.reading_rate(buffer)


def result(case, dtype, turns):
    """Medians over the turns (FLOP/s, bytes/s, seconds); shares are taken within each turn first."""
    products = [case.flops / peak / seconds for peak, _, seconds in turns]
    weights = [case.bytes / reading / seconds for _, reading, seconds in turns]
    of_peak, of_reading, share = map(statistics.median, (products, weights, map(max, products, weights)))
    peak, reading, seconds = map(statistics.median, zip(*turns, strict=True))
    limit = PROCESSOR if of_peak >= of_reading else MEMORY
    return {
        "workload": case.name,
        "dtype": dtype,
        "tokens": case.tokens,
        "seconds": seconds,
        "flops": case.flops,
        "bytes": case.bytes,
        "peak_flops_per_second": peak,
        "reading_bytes_per_second": reading,
        "share_of_peak": of_peak,
        "share_of_reading": of_reading,
        "share": share,
        "limit": limit if max(share, of_peak, of_reading) <= MOST else ERROR,
        "turns": turns,
    }


def show(rows):
    """The results of one layer as lines of text."""
    peak, reading = _limits(rows)
    name, dtype = rows[0]["workload"], rows[0]["dtype"]
    yield f"{name}, weights {dtype}: peak {peak / 1e9:.0f} GFLOP/s, reading {reading / 1e9:.1f} GB/s"
    lines = [("T", "ms", "GFLOP/s", "of peak", "GB/s", "of reading", "bound ms", "SHARE", "limit")]
    for row in rows:
        seconds = row["seconds"]
        lines.append(
            (
                str(row["tokens"]),
                f"{seconds * 1e3:.3f}",
                f"{row['flops'] / seconds / 1e9:.1f}",
                f"{row['share_of_peak']:.0%}",
                f"{row['bytes'] / seconds / 1e9:.1f}" if row["bytes"] else "-",
                f"{row['share_of_reading']:.0%}" if row["bytes"] else "-",
                f"{row['share'] * seconds * 1e3:.3f}",
                f"{row['share']:.0%}",
                row["limit"],
            )
        )
    yield from table(lines)


def _limits(rows):
    """Medians of the two peaks: FLOP/s, bytes/s."""
    keys = "peak_flops_per_second", "reading_bytes_per_second"
    return [statistics.median(row[key] for row in rows) for key in keys]


def draw(results, path):
    """Write path.png: shares over T, a panel for each weight format. Returns a line that says so, or why not."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(row["dtype"] for row in results))
    figure, panels = pyplot.subplots(
        1, len(dtypes), figsize=(5 * len(dtypes), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        rows = [row for row in results if row["dtype"] == dtype]
        for name in dict.fromkeys(row["workload"] for row in rows):
            points = [row for row in rows if row["workload"] == name]
            x, y = [row["tokens"] for row in points], [100 * row["share"] for row in points]
            (line,) = panel.plot(x, y, label=name)
            for limit, face in ((MEMORY, "white"), (PROCESSOR, line.get_color())):
                at = [i for i, row in enumerate(points) if row["limit"] == limit]
                style = {"color": line.get_color(), "markerfacecolor": face}
                panel.plot([x[i] for i in at], [y[i] for i in at], "o", **style)
        ticks = sorted({row["tokens"] for row in rows})
        panel.set(title=f"{dtype} weights", xlabel="T tokens", xscale="log", ylim=(0, 100))
        panel.set_xticks(ticks, ticks)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(loc="lower left")
    panels[0][0].set_ylabel(f"% of the limit (open: {MEMORY}, filled: {PROCESSOR})")
    figure.savefig(f"{path}.png", dpi=120)
    return f"picture: {path}.png"


# ---- shared with peers.py ----


def add_choices(parser, workloads, tokens):
    """The options that say what to measure."""
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help=f"default: {' '.join(workloads)}")
    parser.add_argument(
        "--tokens", nargs="+", type=_positive, metavar="T", help=f"default: {' '.join(map(str, tokens))}"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="weight formats; default: all")
    parser.add_argument("--output", type=Path, metavar="NAME", help="write NAME.json, for example perf/results/NAME")


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"was {text}, but must be an integer of at least 1")
    return int(text)


def machine():
    """What a result depends on."""
    threads = moe_numba.get_num_threads()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "compiled_for": f"{target.cpu_name()}, vectors of {target.register_bits()} bits",
        "cache_bytes": cache_bytes(),
        "threads": threads,
        "threading_layer": numba.threading_layer(),
        "moe_numba": moe_numba.__version__,
        "commit": _commit(),
        "numba": numba.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("NUMBA_", "OMP_", "GOMP_"))},
    }


def _commit():
    """The checkout's commit, with "-dirty" if files other than results differ from it; None where there is no git."""
    try:
        commit = _git("describe", "--always", "--exclude", "*")
        return commit + "-dirty" if _git("diff", "HEAD", "--", ":!perf/results") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments):
    command = ["git", "-C", ROOT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def headline(facts):
    return f"{facts['processor']} ({facts['compiled_for']}), {facts['threads']} threads ({facts['threading_layer']})"


def _processor():
    """The processor's name, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cache_bytes():
    """Size of the largest cache, 0 if it is not known."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * 1024 ** (" KMG".find(text[-1]) if text[-1] in "KMG" else 0))
    return max(sizes)


def table(lines):
    """Rows of texts as aligned lines; the last column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(line[:-1], widths, strict=False)]
        yield "  ".join([*cells, line[-1]])


def store(path, result):
    """Write path.json; makes its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"\nresult: {path}.json")


if __name__ == "__main__":
    sys.exit(main())
