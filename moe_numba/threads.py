"""How many threads a kernel runs on, and when it must not start any.

Four things end, or stop, a process that runs Numba's parallel kernels, and a caller need not know them:

- a fork. The child has none of the threads of its parent, but GNU OpenMP believes that it has: it waits for them
  forever, or Numba sees it coming and ends the child with SIGTERM. So a forked process computes serially.
- a second launch under Numba's workqueue layer while one is running, by another Python thread or from within a
  parallel kernel of another package: SIGABRT. So under workqueue kernels run in parallel only in a process that
  has no other Python thread.
- a KeyboardInterrupt in a lock of Numba's (see `_count`): others wait forever.
- a fork while another thread compiles: the child waits forever for the compiler's lock. So forks wait for it.
"""

import os
import re
import sys
from functools import lru_cache
from pathlib import Path

import numba
from numba.core.compiler_lock import global_compiler_lock
from numba.np.ufunc import parallel

from . import _check

#: Multiply-adds below which one thread is quicker than waking others: a parallel step costs 2 us
#: on two idle cores, a kernel has up to three, and a core does about 50 multiply-adds per ns.
SERIAL_BELOW = 1_000_000


def _refuse_free_threading():
    """Raise ImportError in a Python that runs without its global interpreter lock."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():  # since Python 3.13
        raise ImportError(
            "moe_numba relies on Python's global interpreter lock, which is off in this free-threaded build; "
            "start it with PYTHON_GIL=1 or python -X gil=1"
        )


_refuse_free_threading()

# ---- forks ----


def _lost_threads() -> bool:
    """Whether this process was forked from one whose threads, of Numba or OpenMP (torch), it may believe to have.

    It has its parent's memory as long as it has not executed a program. Forkservers are such parents too, but
    most load no OpenMP.
    """
    try:
        stat = Path("/proc/self/stat").read_text()
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux, and hence not GNU OpenMP
        return False
    flags = int(stat.rpartition(")")[2].split()[6])
    forked = bool(flags & 0x40)  # PF_FORKNOEXEC in Linux's sched.h
    return forked and (parallel._is_initialized or bool(re.search(r"lib[gi]?omp", maps)))


#: The process that may start threads: the one that imported this module. Compared with the pid in every call, since
#: not every fork tells Python.
_owner = None if _lost_threads() else os.getpid()


def _in_child():
    global _owner
    _owner = None  # in a new namespace of pids the child can have its parent's
    global_compiler_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=_in_child,
    )

# ---- counts ----


def set_num_threads(n: int) -> None:
    """Use n threads for calls from the current Python thread, from 1 to the number of cores.

    The upper limit is NUMBA_NUM_THREADS, which Numba sets to the cores it finds. A forked process
    computes on one thread, whatever n.
    """
    n = _check.integer("n", n, 1)
    limit = numba.config.NUMBA_NUM_THREADS
    if n > limit:
        _check.fail("n", n, f"at most {limit}, the threads that Numba started with (NUMBA_NUM_THREADS)")
    if _may_start_threads():
        _count()
        parallel._set_num_threads(n)


def get_num_threads() -> int:
    """Threads that calls from the current Python thread use. 1 in a forked process."""
    return _count() if _may_start_threads() else 1


def _count():
    """Numba's count, for the current Python thread.

    Once its threads are there, not from numba.get_num_threads: that takes a lock in every call, which a
    KeyboardInterrupt leaves taken, so that other threads wait for it forever.
    """
    return parallel._get_num_threads() if parallel._is_initialized else numba.get_num_threads()


def threading_layer() -> str:
    """Numba's layer, "none" in a forked process."""
    return _layer() if _may_start_threads() else "none"


@lru_cache  # with cold caches 5 us of a call that reads 100 MB of weights
def _layer():
    _count()  # chooses it
    return numba.threading_layer()


def _may_start_threads():
    return os.getpid() == _owner


def threads_for(multiply_adds) -> int:
    """Threads to use for an amount of work: all or one."""
    if multiply_adds < SERIAL_BELOW or not _may_start_threads():
        return 1
    # Frames rather than threading.enumerate(): threads made in C, as Numba's are, have one while they run Python.
    if _layer() == "workqueue" and len(sys._current_frames()) > 1:
        return 1
    return _count()


def twin(kernel, threads):
    """The form of a kernel to call: serial for one thread, otherwise parallel."""
    return kernel.serial if threads == 1 else kernel.parallel
