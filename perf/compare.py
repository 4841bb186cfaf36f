"""Compare two results of perf/run.py, benchmark by benchmark.

python perf/compare.py old.json new.json [--ratio 1.10]

A benchmark is slower (or faster) when both hold:

- the medians' ratio new / old is above --ratio (or below 1 / --ratio);
- it is beyond noise: even the fastest process of the slower side has a median above the upper
  quartile of the faster side's values. Disturbance by other programs comes and goes and only ever
  adds time, so it leaves some process alone; a real change does not.

Exit status: 0 nothing is slower, 1 something is, 2 the files cannot be read or compared.
"""

import argparse
import math
import os
import statistics
import sys
from collections import Counter
from typing import NamedTuple

import pyperf

#: Fewer processes than this on either side say nothing about noise: the values of one are much alike.
MIN_PROCESSES = 3

#: Results that differ in one of these were not measured under the same conditions.
CONDITIONS = ("cpu_model_name", "compiled_for", "threads", "threading_layer", "environment")
#: Facts worth showing above the table.
SHOWN = {
    "moe_numba_version": "moe_numba",
    "numba_version": "Numba",
    "python_version": "Python",
    "threads": "threads",
    "cpu_model_name": "processor",
}

SAME, NOISE, SLOWER, FASTER, FEW = "same", "noise", "SLOWER", "faster", "too few processes"
ONLY_OLD, ONLY_NEW = "only in old", "only in new"


class Row(NamedTuple):
    """A line of the table. Medians as text with their unit, None if not measured; ratio new / old."""

    name: str
    old: str | None
    new: str | None
    ratio: float | None
    verdict: str


class CompareError(Exception):
    """Two files cannot be compared; the message is one line for the user."""


def main(arguments=None) -> int:
    options = _parser().parse_args(arguments)
    try:
        old, new = load(options.old), load(options.new)
        _check_conditions(options, old, new)
        rows = compare(old, new, options.ratio)
    except CompareError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    report = [*_header(options, old, new), "", *_table(rows), "", *_summary(rows, options.ratio)]
    try:
        print("\n".join(report), flush=True)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(any(row.verdict == SLOWER for row in rows))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser():
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="result to compare with, from run.py -o or --append")
    parser.add_argument("new", help="result to judge")
    parser.add_argument(
        "--ratio", type=_ratio, default=1.10, help="how many times slower is worth reporting (default: 1.10)"
    )
    return parser


def _ratio(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"was {text}, but must be a number of at least 1")
    return value


# ---- reading ----


def load(path) -> pyperf.BenchmarkSuite:
    """The suite in a file that pyperf wrote. Raises CompareError."""
    try:
        return pyperf.BenchmarkSuite.load(path)
    except OSError as error:
        raise CompareError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # pyperf trusts its input: what garbage raises depends on the garbage
        raise CompareError(f"{path}: is no pyperf result ({type(error).__name__})") from None


def _check_conditions(options, old, new):
    old_facts, new_facts = old.get_metadata(), new.get_metadata()
    for fact in CONDITIONS:
        before, now = old_facts.get(fact), new_facts.get(fact)
        if before is not None and now is not None and before != now:
            raise CompareError(
                f"{fact} was {before} for {options.old} and {now} for {options.new}, so their times cannot be compared "
                "(python -m pyperf compare_to shows them nevertheless)"
            )


# ---- comparing ----


def compare(old, new, ratio) -> list[Row]:
    """One row for each benchmark, in the order of the old suite, then those that only the new one has.

    Raises CompareError if no benchmark can be judged.
    """
    before = {bench.get_name(): bench for bench in old}
    now = {bench.get_name(): bench for bench in new}
    rows = [_row(name, before.get(name), now.get(name), ratio) for name in before | now]
    if all(row.ratio is None for row in rows):
        raise CompareError("the files have no benchmark in common")
    if all(row.verdict in (FEW, ONLY_OLD, ONLY_NEW) for row in rows):
        raise CompareError(f"no benchmark was run by {MIN_PROCESSES} processes in both files, so noise cannot be told")
    return rows


def _row(name, old, new, ratio):
    medians = _median(old), _median(new)
    if old is None or new is None:
        return Row(name, *medians, None, ONLY_NEW if old is None else ONLY_OLD)
    if old.get_unit() != new.get_unit():
        raise CompareError(f"{name} is measured in {old.get_unit()}s in the old file and {new.get_unit()}s in the new")
    if None in medians:
        return Row(name, *medians, None, FEW)
    times = new.median() / old.median()
    return Row(name, *medians, times, _verdict(old, new, times, ratio))


def _verdict(old, new, times, ratio):
    """See the rule at the top of the file."""
    if min(len(_process_medians(old)), len(_process_medians(new))) < MIN_PROCESSES:
        return FEW
    if 1 / ratio <= times <= ratio:
        return SAME
    fast, slow = (old, new) if times > 1 else (new, old)
    if min(_process_medians(slow)) <= fast.percentile(75):
        return NOISE
    return SLOWER if times > 1 else FASTER


def _process_medians(bench):
    return [statistics.median(run.values) for run in bench.get_runs() if run.values]


def _median(bench):
    """As text with its unit; None if there is no value to take it of."""
    return bench.format_value(bench.median()) if bench is not None and bench.get_nvalue() else None


# ---- showing ----


def _header(options, old, new):
    """The two files with the facts that differ between them, then the facts that they share."""
    old_facts, new_facts = (set(_facts(suite)) for suite in (old, new))
    for side, path, suite in (("old", options.old, old), ("new", options.new, new)):
        yield f"{side}   {', '.join([path, *(f for f in _facts(suite) if f not in old_facts & new_facts)])}"
    yield f"both  {', '.join(f for f in _facts(old) if f in new_facts) or 'nothing known'}"


def _facts(suite):
    """What is known about a suite, as texts."""
    known = suite.get_metadata()
    return [f"{word} {known[fact]}" for fact, word in SHOWN.items() if fact in known]


def _table(rows):
    lines = [("benchmark", "old", "new", "ratio", "verdict")]
    for row in rows:
        ratio = None if row.ratio is None else f"{row.ratio:.2f}"
        lines.append((row.name, row.old or "-", row.new or "-", ratio or "-", row.verdict))
    name, old, new, ratio, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    for line in lines:
        yield f"{line[0]:{name}}  {line[1]:>{old}}  {line[2]:>{new}}  {line[3]:>{ratio}}  {line[4]}"


def _summary(rows, ratio):
    counts = Counter(row.verdict for row in rows)
    order = (SLOWER, FASTER, SAME, NOISE, FEW, ONLY_OLD, ONLY_NEW)
    yield ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict])
    yield f"Medians; ratio is new / old. Noise: beyond {ratio:.2f}x, but not in every process; repeat with more (-p)."


if __name__ == "__main__":
    sys.exit(main())
