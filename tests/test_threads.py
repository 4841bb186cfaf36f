"""Thread counts, Python threads, forked processes. Wrong counts are in test_errors.py."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from helpers import assert_same_bits, random_array, random_layer, run_python

from moe_numba import get_num_threads, set_num_threads, threads

pytestmark = pytest.mark.jit

LIMIT = numba.config.NUMBA_NUM_THREADS


def test_every_count_up_to_the_limit_can_be_set():
    for n in range(1, LIMIT + 1):
        set_num_threads(n)
        assert get_num_threads() == n
    set_num_threads(np.int64(1))
    assert get_num_threads() == 1


def test_the_count_belongs_to_the_python_thread():
    set_num_threads(1)
    seen = []

    def other():
        seen.append(get_num_threads())
        set_num_threads(LIMIT)
        seen.append(get_num_threads())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [LIMIT, LIMIT]
    assert get_num_threads() == 1


def test_little_work_and_forked_children_get_one_thread(monkeypatch):
    assert threads.threads_for(threads.SERIAL_BELOW - 1) == 1
    assert threads.threads_for(threads.SERIAL_BELOW) == LIMIT
    set_num_threads(1)
    assert threads.threads_for(10**12) == 1
    set_num_threads(LIMIT)
    monkeypatch.setattr(threads, "_owner", None)
    assert threads.threads_for(10**12) == 1


def test_python_threads_may_share_a_layer(rng, always_parallel):
    layer = random_layer(num_experts=6, top_k=2, input_dim=40, hidden_dim=50, capacity_factor=None)
    batches = [random_array(rng, tokens, 40) for tokens in (1, 50, 333, 17) * 8]
    expected = [layer(x)[0] for x in batches]
    with ThreadPoolExecutor(8) as pool:
        for y, wanted in zip(pool.map(lambda x: layer(x)[0], batches), expected, strict=True):
            assert_same_bits(y, wanted)


_PREPARE = """
import os, sys, threading, numpy as np, moe_numba
from concurrent.futures import ThreadPoolExecutor
from moe_numba import MoeConfig, MoeLayer
moe_numba.threads.SERIAL_BELOW = 0
layer = MoeLayer(MoeConfig(4, 2, None, 0.0, 32, 48, activation="swiglu"))
x = np.random.default_rng(0).standard_normal((200, 32), np.float32)
"""

_FORK = """
y, _ = layer(x)
child = os.fork()
if child == 0:
    again, _ = layer(x)
    grandchild = os.fork()
    if grandchild == 0:
        os._exit(0 if layer(x)[0].tobytes() == y.tobytes() else 2)
    status = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
    os._exit(status or (0 if again.tobytes() == y.tobytes() else 3))
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert layer(x)[0].tobytes() == y.tobytes()
print("child", status)
"""

_POOL = """
import multiprocessing
y, _ = layer(x)
with multiprocessing.get_context("fork").Pool(2) as pool:
    for probs in pool.imap(moe_numba.softmax_rows, [x] * 4):
        assert probs.tobytes() == moe_numba.softmax_rows(x).tobytes()
print("child 0")
"""

_CONCURRENT = """
y, _ = layer(x)
with ThreadPoolExecutor(4) as pool:
    for again in pool.map(lambda _: layer(x)[0], range(200)):
        assert again.tobytes() == y.tobytes()
print("child 0")
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
@pytest.mark.parametrize("code", [_FORK, _POOL, _CONCURRENT], ids=["fork", "pool", "concurrent"])
def test_processes_and_threads_survive(code, layer):
    """Under both of Numba's threading layers that need nothing but Numba."""
    printed, _ = run_python(_PREPARE + code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2")
    assert printed == "child 0\n"


_STEPS = """
import numpy as np
from moe_numba import MoeConfig, MoeLayer, set_num_threads, threads
threads.SERIAL_BELOW = 0
layer = MoeLayer(MoeConfig(4, 2, None, 0.0, 40, 600, activation="swiglu"))
rng = np.random.default_rng(0)
batches = [rng.standard_normal((9, 40), np.float32) for _ in range(2)]
set_num_threads(1)
expected = [layer(x)[0].tobytes() for x in batches]
set_num_threads(16)
print(sum(layer(x)[0].tobytes() != y for _ in range(800) for x, y in zip(batches, expected)))
"""


def test_no_step_of_a_kernel_begins_before_the_last_one_is_done():
    """More threads than cores, so that some are late; two inputs in turn, so that old values are wrong ones."""
    printed, _ = run_python(_STEPS, NUMBA_NUM_THREADS="16")
    assert printed == "0\n"


def test_a_thread_count_from_the_environment():
    printed, _ = run_python("import moe_numba; print(moe_numba.get_num_threads())", NUMBA_NUM_THREADS="1")
    assert printed == "1\n"
