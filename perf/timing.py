"""The time that a call takes, on machines that others use, too."""

import itertools
import os
import statistics
import time
from pathlib import Path

#: Seconds of calls in one turn, at least.
TURN = 0.1
#: Seconds after which what the hypervisor has taken is looked up: two ticks of its clock, in which Linux counts.
RUN = 0.02
#: Share of the processors' time that a run may have lost: less than one tick of a call that takes some seconds.
LOST = 0.002
#: Runs after which a turn ends even if each of them has lost more.
MOST_RUNS = 4


def time_calls(function, inputs, n, turn=TURN):
    """Median seconds of a call, over passes of n calls until `turn` seconds are over.

    inputs: an endless iterator. A pass is cut short after ten turns' time, for long calls.

    A virtual machine does not always have its processors: the hypervisor gives them to others (`steal` in
    proc_stat(5)). Long calls lose time so again and again (Zen 4, Mixtral, bfloat16, T = 512: 825 ms in peace, 1,070
    with a fifth stolen). So of runs of calls only those count that lost nothing, or least. If each has lost some,
    further passes are made, until there are MOST_RUNS of them.
    """
    runs = []
    end = time.perf_counter() + turn
    while not runs or time.perf_counter() < end or (_least(runs) > LOST and len(runs) < MOST_RUNS):
        calls = itertools.islice(inputs, n)
        while run := _run(function, calls):
            runs.append(run)
            if time.perf_counter() > end + 9 * turn:
                break
    most = max(LOST, _least(runs))
    return statistics.median(itertools.chain.from_iterable(seconds for lost, seconds in runs if lost <= most))


def _run(function, inputs):
    """Share of time lost, and seconds of each call, of calls until RUN seconds are over; None without any."""
    before, begin, seconds = stolen(), time.perf_counter(), []
    for x in inputs:
        start = time.perf_counter()
        function(x)
        end = time.perf_counter()
        seconds.append(end - start)
        if end > begin + RUN:
            break
    return ((stolen() - before) / (os.cpu_count() * sum(seconds)), seconds) if seconds else None


def _least(runs):
    return min(lost for lost, _ in runs)


def stolen():
    """Seconds of all processors that the hypervisor has given to others, in ticks; 0 where nobody says so."""
    try:
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[8]
    except (OSError, IndexError):
        return 0.0
    return int(ticks) / os.sysconf("SC_CLK_TCK")
