"""The only file that says njit: options, the serial and parallel twins.

Decorators for the functions in kernels/ and simd/:

- `inline`: a helper that LLVM must inline into its caller.
- `helper`: a function of its own, compiled with the kernel that calls it.
- `kernel`: an entry point that Python calls. It exists twice, compiled from the same source:
  `.parallel`, where `prange` runs on all threads, and `.serial`, where it is a plain loop.

`address_of`: a helper compiled by itself, which kernels call by its address.
"""

import signal
import sys
import threading
from functools import lru_cache

import numpy as np
from numba import config, njit, types
from numba.core import event
from numba.core.ccallback import CFunc
from numba.core.cpu_options import ParallelOptions

from ._cache import KernelCache, warn_uncached

#: Set on every function, because Numba lets a helper inherit what is left unset from whichever
#: caller compiles it first.
#: fastmath off: the order of additions is part of the results (the kernels say fma where they
#: want it), and a NaN must stay one. nogil: a forward runs beside other Python threads.
_OPTIONS = {"nogil": True, "fastmath": False, "error_model": "numpy"}

#: Only `prange` runs in parallel. Fusion would merge the parallel loops of consecutive steps of a
#: kernel into one and lose the barrier between them (it cannot see what the functions that they
#: call read and write); the others would start threads for `counts[:] = 0`.
#: Not as a dict, which Numba empties when it compiles the first signature of a kernel: the second
#: would be compiled with everything on.
_PARALLEL = ParallelOptions(
    dict.fromkeys(("fusion", "comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil"), False)
)

#: Helpers are called by kernels only, never from Python, so they need no way in from there: wrappers
#: for it took 2 of 14 seconds of compiling a layer.
_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

inline = njit(forceinline=True, **_INNER, **_OPTIONS)
helper = njit(**_INNER, **_OPTIONS)


class Kernel:
    """An entry point in two compiled forms: `parallel` and `serial`."""

    def __init__(self, function):
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__
        self.serial = self._compiled(function, parallel=False)
        # With checks of bounds (NUMBA_BOUNDSCHECK=1) serial too: from a thread no IndexError comes through.
        self.parallel = self.serial if config.BOUNDSCHECK else self._compiled(function, parallel=True)

    @staticmethod
    def _compiled(function, parallel):
        if config.DISABLE_JIT:  # plain Python (simd/plain.py), which would warn of what compiled code does in silence
            return np.errstate(all="ignore")(function)
        dispatcher = njit(parallel=_PARALLEL if parallel else False, **_OPTIONS)(function)
        _keep_on_disk(dispatcher, function, "parallel" if parallel else "serial")
        dispatcher._compile_for_args = _uninterrupted(dispatcher._compile_for_args)
        return dispatcher


def _keep_on_disk(compiled, function, twin):
    """Give what Numba compiles of a function a KernelCache, if there is a place for it."""
    try:
        compiled._cache = KernelCache(function, twin)
    except (RuntimeError, OSError) as error:
        warn_uncached(error)


def _uninterrupted(compile_for_args):
    """Compile, and let a KeyboardInterrupt wait for it.

    Numba does not survive an interrupt in the middle: its locks stay taken and other threads wait forever, tables stay
    half filled and the next compilation fails or crashes (four of five interrupts in the first 0.1 s).
    Python runs handlers of signals in the main thread only.
    """

    def compile_(*args, **kwargs):
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            return compile_for_args(*args, **kwargs)
        waiting = []
        signal.signal(signal.SIGINT, lambda *signal_and_frame: waiting.append(signal_and_frame))
        try:
            return compile_for_args(*args, **kwargs)
        finally:
            signal.signal(signal.SIGINT, handler)
            if waiting:
                handler(*waiting[0])

    return compile_


#: Those that can be compiled: none without the JIT.
KERNELS: list[Kernel] = []


def kernel(function):
    """Make `function` an entry point (see `Kernel`)."""
    entry = Kernel(function)
    if not config.DISABLE_JIT:
        KERNELS.append(entry)
    return entry


class _Apart(CFunc):
    """A helper compiled by itself, which Numba tells its listeners, too."""

    def _compile_uncached(self):
        with event.trigger_event("numba:compile", data={"dispatcher": self._compiler}):
            return super()._compile_uncached()


@lru_cache  # machine code lives as long as what it belongs to
def _compiled_apart(function, arguments):
    apart = _Apart(function.py_func, (arguments, types.void), {}, dict(_OPTIONS))
    _keep_on_disk(apart, function.py_func, "apart")
    _uninterrupted(apart.compile)()
    return apart


def address_of(function, *arguments):
    """Address at which kernels `call` a helper that returns nothing, compiled for arguments of these types.

    A helper becomes part of all that calls it: LLVM optimizes it anew in each of the eight functions that Numba makes
    between a product and a parallel kernel, in every kernel and twin. Apart it is compiled once (Zen 3, a layer's first
    call: float32 27 s instead of 37, then bfloat16 18 instead of 32, then weights stored [in, out] 4 instead of 17).
    Without the JIT the helper itself.
    """
    return function if config.DISABLE_JIT else _compiled_apart(function, arguments).address


# ---- telling the user why the first call takes long ----


class _CompileNotice(event.Listener):
    """Says on a terminal, once, that kernels are being compiled."""

    def on_start(self, event_):
        module = event_.data["dispatcher"].py_func.__module__  # None of a function made by `exec`
        if module is not None and module.startswith(__package__ + "."):
            event.unregister("numba:compile", self)
            if sys.stderr is not None and sys.stderr.isatty():
                print(
                    "moe_numba: compiling kernels for this processor, which takes up to half a minute, once ...",
                    file=sys.stderr,
                )

    def on_end(self, event_):
        pass


event.register("numba:compile", _CompileNotice())
