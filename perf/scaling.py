"""How time grows with tokens, choices, experts, width and threads, beside the law on paper.

python perf/scaling.py

In each table `of the law` is the time divided by what proportionality to the first line gives: 1.00
everywhere would be the law exactly. Medians of calls made in turn; docs/performance.md explains.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # measure this checkout, whatever is installed

import argparse  # noqa: E402
import itertools  # noqa: E402
import statistics  # noqa: E402

from roofline import headline, machine, table  # noqa: E402
from timing import time_calls  # noqa: E402
from workloads import make_inputs, make_layer  # noqa: E402

import moe_numba  # noqa: E402
from moe_numba import MoeConfig  # noqa: E402


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Time against T, K, E, F and threads.")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every line of a table (default: 7)")
    rounds = parser.parse_args(arguments).rounds
    print(headline(machine()))
    all_threads = moe_numba.get_num_threads()
    for title, lines, law in tables(all_threads):
        print(f"\n{title}")
        times = measure([case(*line) for _, line in lines], rounds)
        rows = [("", "ms", "of the law")]
        for (name, _), seconds, share in zip(lines, times, law, strict=True):
            rows.append((name, f"{seconds * 1e3:.3f}", f"{seconds / times[0] / (share / law[0]):.2f}"))
        print("\n".join(table(rows)), flush=True)
    moe_numba.set_num_threads(all_threads)


def tables(all_threads):
    """(title, [(name, (T, K, E, H, F, threads))], what the time should be proportional to) of each table."""
    t = (256, 512, 1024, 2048, 4096)
    yield "T tokens: proportional", [(f"T={n}", (n, 4, 16, 1024, 512, all_threads)) for n in t], t
    k = (1, 2, 4, 8, 16)
    yield "K experts per token, T=1024: proportional", [(f"K={n}", (1024, n, 16, 1024, 512, all_threads)) for n in k], k
    e = (64, 256, 1024)
    # The router reads E rows of H, the experts K times 3 F.
    share = [8 * 3 * 512 + n for n in e]
    yield (
        "E experts at K=8, T=1: flat, but for the router's E H",
        [(f"E={n}", (1, 8, n, 512, 512, all_threads)) for n in e],
        share,
    )
    f = (480, 481, 488, 496, 505, 512, 513)
    yield "F wide, T=512: proportional, no steps", [(f"F={n}", (512, 4, 8, 1024, n, all_threads)) for n in f], f
    n = sorted({1, 2, all_threads} & set(range(1, all_threads + 1)))
    yield (
        "threads, T=1024: inversely proportional",
        [(f"{i}", (1024, 4, 16, 1024, 512, i)) for i in n],
        [1 / i for i in n],
    )


def case(tokens, top_k, experts, input_dim, hidden_dim, threads):
    """A function that takes a batch, and an endless iterator of batches."""
    config = MoeConfig(experts, top_k, None, 0.0, input_dim, hidden_dim, activation="swiglu", bias=False)
    layer = make_layer(config)

    def forward(x):
        moe_numba.set_num_threads(threads)
        return layer.forward(x)

    return forward, itertools.cycle(make_inputs(layer.router, tokens))


def measure(cases, rounds):
    """Median seconds of each case, all measured in turn."""
    times = [[] for _ in cases]
    for _ in range(rounds):
        for (forward, inputs), seconds in zip(cases, times, strict=True):
            seconds.append(time_calls(forward, inputs, 4, turn=0.05))
    return [statistics.median(seconds) for seconds in times]


if __name__ == "__main__":
    main()
