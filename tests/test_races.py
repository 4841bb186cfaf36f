"""Consecutive parallel steps of a kernel must not overlap.

Numba's loop fusion once merged the two projections into one parallel loop without a barrier
between them: when a core was held up for a moment, 64 rows of a batch were wrong.
"""

from typing import NamedTuple

import numpy as np
import pytest
from numba import prange

from moe_numba._jit import Kernel, helper
from moe_numba.simd.atomic import take_next
from moe_numba.simd.vector import pointer

pytestmark = pytest.mark.jit


class Memory(NamedTuple):
    """Arrays in a tuple, as the kernels take them: Numba does not see that the steps share them."""

    done: np.ndarray
    seen: np.ndarray
    counter: np.ndarray


@helper
def write_late(memory, worker):
    if worker == 1:
        while take_next(pointer(memory.counter, 0), 0) < 20_000_000:  # about 0.1 s
            pass
    memory.done[worker] = 1


@helper
def look(memory, worker):
    memory.seen[worker] = memory.done[0] + memory.done[1]


def two_steps(memory):
    for worker in prange(2):
        write_late(memory, np.int64(worker))
    for worker in prange(2):
        look(memory, np.int64(worker))


def test_second_step_waits_for_the_first():
    kernel = Kernel(two_steps)
    # Every signature: Numba once forgot the options of a kernel after it had compiled the first.
    for dtype in (np.int64, np.int32):
        memory = Memory(np.zeros(2, dtype), np.zeros(2, dtype), np.zeros(1, np.int64))
        kernel.parallel(memory)
        assert memory.seen.tolist() == [2, 2]
