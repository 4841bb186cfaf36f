"""How many threads a kernel runs on, and when it must not start any."""

import os
import threading

import numba

from . import _check

#: Multiply-adds below which one thread is quicker than waking others: a parallel step costs 2 us
#: on two idle cores, a kernel has up to four, and a core does about 50 multiply-adds per ns.
SERIAL_BELOW = 1_000_000

_in_forked_child = False


def _after_fork():
    global _in_forked_child
    _in_forked_child = True


# GNU OpenMP kills a forked child that starts a parallel region, so a child computes serially.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


#: Held during a parallel kernel under Numba's workqueue layer, which aborts the process when a
#: second Python thread starts one.
_workqueue = threading.Lock()


def set_num_threads(n: int) -> None:
    """Use n threads for calls from the current Python thread, from 1 to the number of cores.

    The upper limit is NUMBA_NUM_THREADS, which Numba sets to the cores it finds.
    """
    n = _check.integer("n", n, 1)
    limit = numba.config.NUMBA_NUM_THREADS
    if n > limit:
        _check.fail("n", n, f"at most {limit}, the threads that Numba started with (NUMBA_NUM_THREADS)")
    numba.set_num_threads(n)


def get_num_threads() -> int:
    """Threads that calls from the current Python thread use."""
    return numba.get_num_threads()


def threads_for(multiply_adds) -> int:
    """Threads worth using for an amount of work: all or one."""
    if multiply_adds < SERIAL_BELOW or _in_forked_child:
        return 1
    return numba.get_num_threads()


def twin(kernel, threads):
    """The form of a kernel to call: serial for one thread, otherwise parallel."""
    if threads == 1:
        return kernel.serial
    if numba.threading_layer() == "workqueue":
        return lambda *args: _one_at_a_time(kernel.parallel, args)
    return kernel.parallel


def _one_at_a_time(function, args):
    with _workqueue:
        return function(*args)
