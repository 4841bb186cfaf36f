"""Minutes of random calls by several threads: every result checked, memory flat.

python perf/endurance.py --minutes 10

Layers of both formats and many kinds come and go; threads share them, with every number of Numba's threads. A
result is checked against the specification in float64 (moe_numba/reference.py) the first time, and to the last
bit against that result afterwards. Memory in use may not grow after the first fifth. Exit status 1 when a result
differs or memory grows.
"""

import argparse
import random
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import as_bfloat16, assert_close, assert_routing, assert_same_bits, block_reference, random_layer  # noqa: E402

from moe_numba import config, get_num_threads, set_num_threads, threads  # noqa: E402
from moe_numba._warmup import warmup  # noqa: E402

WORKERS = 4
LAYERS = 12
#: Layers are replaced by new ones after so many calls.
LIFE = 60
#: Growth after warming up that is a leak: far more than the allocator's noise, less than a byte per value computed.
ALLOWED_MB = 32
#: By format: tolerance, and the magnitude that it is relative to at least, as in tests/test_numbers.py.
TOLERANCES = {"float32": (8e-5, 0.1), "bfloat16": (2**-6, 1.0)}


@dataclass
class Case:
    """A layer, tokens for it, and what they gave."""

    layer: object
    x: np.ndarray
    y: np.ndarray = None
    routing: object = None
    calls: int = 0


def random_case(seed):
    """A layer of any kind, none above 4 MB, and tokens."""
    draw = random.Random(seed)
    experts = draw.choice([1, 2, 5, 8, 32])
    options = {
        "num_experts": experts,
        "top_k": draw.randint(1, min(experts, 4)),
        "input_dim": draw.choice([1, 16, 33, 64, 100]),
        "hidden_dim": draw.choice([1, 17, 48, 80, 128]),
        "activation": draw.choice(sorted(config.ACTIVATIONS)),
        "dtype": draw.choice(config.DTYPES),
        "bias": draw.random() < 0.5,
        "capacity_factor": draw.choice([None, 0.5, 1.25]),
        "overflow": draw.choice(config.OVERFLOWS),
        "scoring": draw.choice(["softmax", "sigmoid"]),
        "shared_hidden_dim": draw.choice([0, 0, 24]),
    }
    if options["scoring"] == "sigmoid":
        options["norm_topk_prob"] = True
    layer = random_layer(seed, **options)
    tokens = draw.choice([0, 1, 2, 16, 63, 200, 500])
    return Case(layer, np.random.default_rng(seed).standard_normal((tokens, options["input_dim"]), np.float32))


def check(case):
    """One call; raises AssertionError."""
    y, routing = case.layer(case.x)
    if case.y is None:
        settings = case.layer.config
        slots = int(routing.slots_used.sum())
        assert int(routing.expert_counts.sum()) == slots, "rows are lost"
        if settings.scoring == "softmax":
            assert_routing(routing, settings.top_k, settings.capacity_factor, settings.overflow)
        operand = as_bfloat16 if settings.dtype == "bfloat16" else lambda x: x
        assert_close(y, block_reference(case.layer, case.x, routing, operand), *TOLERANCES[settings.dtype])
        case.y, case.routing = y, routing
    assert_same_bits(y, case.y)
    assert_same_bits(routing.routing_probs, case.routing.routing_probs)
    assert_same_bits(routing.expert_indices, case.routing.expert_indices)
    case.calls += 1


class Run:
    """The workers, and what they found."""

    def __init__(self, seed, seconds):
        self.seed = seed
        self.end = time.monotonic() + seconds
        self.next_seed = seed
        self.cases = [self._new() for _ in range(LAYERS)]
        self.calls = self.tokens = self.checked = 0
        self.violations = []
        self._replacing = threading.Lock()

    def _new(self):
        self.next_seed += 1
        return random_case(self.next_seed)

    def work(self, number):
        """Call until time is over; a violation ends it for all."""
        draw = random.Random(self.seed + number)
        case = None
        try:
            while time.monotonic() < self.end and not self.violations:
                at = draw.randrange(LAYERS)
                case = self.cases[at]
                set_num_threads(n := draw.randint(1, threads.numba.config.NUMBA_NUM_THREADS))
                check(case)
                assert get_num_threads() == n, "another thread's count"
                self.calls += 1
                self.tokens += len(case.x)
                if case.calls > LIFE:
                    self._replace(at, case)
        except BaseException as error:
            settings = None if case is None else case.layer.config
            self.violations.append(f"{type(error).__name__}: {error}\n{settings}, {len(case.x)} tokens")

    def _replace(self, at, case):
        """A new layer in the place of one that has been called long enough, unless another worker was quicker."""
        with self._replacing:
            if self.cases[at] is case:
                self.cases[at] = self._new()
                self.checked += 1


def resident_mb():
    """Memory of this process that is in use, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmRSS in /proc/self/status")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    warmup()  # a compiler's memory is no leak
    threads.SERIAL_BELOW = 0  # small layers run on all threads too
    run = Run(options.seed, 60 * options.minutes)
    start = time.monotonic()
    workers = [threading.Thread(target=run.work, args=(number,), daemon=True) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    memory = []
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.5)
        memory.append((time.monotonic() - start, resident_mb()))
        if len(memory) % 60 == 0:
            print(f"{memory[-1][0]:6.0f} s  {run.calls:10,} calls  {memory[-1][1]:7.1f} MB", flush=True)
        if time.monotonic() > run.end + 120:
            print("FAILED: a thread waits forever", flush=True)
            return 1
    settled = [mb for at, mb in memory if at > 12 * options.minutes] or [memory[-1][1]]
    quarter = max(1, len(settled) // 4)
    growth = float(np.median(settled[-quarter:]) - np.median(settled[:quarter]))
    if growth > ALLOWED_MB:
        run.violations.append(f"memory grew by {growth:.1f} MB")
    print(f"{run.calls:,} calls with {run.tokens:,} tokens, {run.checked + LAYERS} layers, {WORKERS} threads")
    print(
        f"memory {np.median(settled[:quarter]):.1f} MB after a fifth, {np.median(settled[-quarter:]):.1f} MB at the end"
    )
    for violation in run.violations:
        print(f"VIOLATION: {violation}")
    print("FAILED" if run.violations else "passed: every result right, memory flat")
    return 1 if run.violations else 0


if __name__ == "__main__":
    sys.exit(main())
