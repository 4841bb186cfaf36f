"""Thread counts, Python threads, forked processes. Wrong counts are in test_errors.py."""

import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from helpers import PACKAGE, assert_same_bits, random_array, random_layer, run_python

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


def test_python_without_its_lock_is_refused(monkeypatch):
    threads._refuse_free_threading()
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(ImportError, match="PYTHON_GIL=1"):
        threads._refuse_free_threading()


# ---- programs with threads, under each of Numba's threading layers ----

_PREPARE = """
import os, random, signal, threading, time, numpy as np, moe_numba
from numba import njit, objmode, prange
from moe_numba import MoeConfig, MoeLayer, TopKRouter, fused_experts, get_num_threads, set_num_threads, softmax_rows
moe_numba.threads.SERIAL_BELOW = 0
EFFORT = int(os.environ.get("EFFORT", "1"))
rng = np.random.default_rng(0)

def new_layer(seed):
    layer = MoeLayer(MoeConfig(4, 2, None, 0.0, 32, 48, activation="swiglu", bias=False), seed=seed)
    return (layer, layer.astype("bfloat16"))[seed % 2]

layers = [new_layer(seed) for seed in range(4)]
xs = [rng.standard_normal((n, 32), np.float32) for n in (1, 40, 7, 200)]

def results(layer, x):
    y, routing = layer(x)
    again = layer.router.route(x)
    up, down, _, _ = layer.experts.arrays
    fused = fused_experts(x, up, down, again.expert_weights, again.expert_indices)
    return [array.tobytes() for array in (y, routing.routing_probs, again.expert_indices, fused, softmax_rows(x))]

expected = [[results(layer, x) for x in xs] for layer in layers]

def check(layer, x):
    assert results(layers[layer], xs[x]) == expected[layer][x]

def in_threads(*functions):
    # Run them at once; the first error of each.
    errors = []
    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)
    running = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60 * EFFORT)
        assert not thread.is_alive(), "waits forever"
    assert errors == []
"""

_SIXTEEN = """
def work(number):
    def run():
        own = new_layer(number)
        wanted = results(own, xs[1])
        draw = random.Random(number)
        for i in range(60 * EFFORT):
            n = draw.randint(1, 2)
            set_num_threads(n)
            check(draw.randrange(4), draw.randrange(4))
            assert results(own, xs[1]) == wanted
            assert get_num_threads() == n
    return run
set_num_threads(1)
in_threads(*map(work, range(16)))
assert get_num_threads() == 1
"""

_OTHER_PACKAGE = """
@njit(parallel=True, nogil=True)
def other(x):
    for i in prange(x.size):
        x[i] += 1

@njit(parallel=True, nogil=True)
def calls_us(ok):
    for i in prange(ok.size):
        with objmode():
            check(i % 4, i // 4 % 4)
        ok[i] += 1

ok = np.zeros(16)
for _ in range(10 * EFFORT):
    calls_us(ok)
assert (ok == 10 * EFFORT).all()

x = np.zeros(100_000)
def others():
    for _ in range(300 * EFFORT):
        other(x)
def ours():
    for i in range(200 * EFFORT):
        check(i % 4, i // 4 % 4)
in_threads(others, ours, ours)
assert (x == 300 * EFFORT).all()
ours()
"""

_TORCH = """
import torch
a = torch.ones(300, 300)
def torch_s():
    for _ in range(200 * EFFORT):
        assert (a @ a)[0, 0] == 300
def ours():
    for i in range(100 * EFFORT):
        check(i % 4, i // 4 % 4)
        assert (a @ a)[0, 0] == 300
ours()
in_threads(torch_s, ours, torch_s, ours)
"""

#: A timer, since a thread would make kernels serial under workqueue.
_INTERRUPTED = """
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
random.seed(0)
interrupted = 0
for i in range(600 * EFFORT):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-3))
        try:
            while True:
                results(layers[i % 4], xs[i // 4 % 4])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
assert interrupted == 600 * EFFORT
in_threads(*[lambda: [check(i % 4, i // 4) for i in range(16)]] * 3)
assert get_num_threads() == 2

# A handler that calls us in the middle of a call of ours.
inner = 0
def reenter(*_):
    global inner
    check(inner % 4, inner // 4 % 4)
    inner += 1
signal.signal(signal.SIGALRM, reenter)
calls = 0  # as many as it takes: the quicker a call, the fewer are interrupted
while inner < 20 * EFFORT and calls < 20000 * EFFORT:
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 1e-3))
    check(calls % 4, calls // 4 % 4)
    calls += 1
assert inner >= 20 * EFFORT
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
@pytest.mark.parametrize("code", [_SIXTEEN, _OTHER_PACKAGE, _TORCH, _INTERRUPTED], ids=["16", "other", "torch", "int"])
def test_nothing_dies_waits_or_differs(code, layer):
    """NUMBA_THREADING_LAYER=tbb and EFFORT=100 in the environment by hand: docs/reliability.md."""
    if code is _TORCH:
        pytest.importorskip("torch")
    layer = os.environ.get("NUMBA_THREADING_LAYER", layer)
    run_python(_PREPARE + code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2", timeout=3600)


_INTERRUPTED_COMPILATION = """
import os, random, signal, threading, time, numpy as np, moe_numba
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background are begun with it ignored
x = np.zeros((2, 4), np.float32)
router = moe_numba.TopKRouter(moe_numba.RouterConfig(4, 3, 1, None))
done = threading.Event()
def interrupt():
    while not done.wait(random.uniform(0.01, 0.2)):
        os.kill(os.getpid(), signal.SIGINT)
random.seed(0)
threading.Thread(target=interrupt, daemon=True).start()
interrupted = 0
for compiled in (lambda: moe_numba.softmax_rows(x), lambda: router.route(x)):
    for _ in range(1000):
        try:
            compiled()
            break
        except KeyboardInterrupt:
            interrupted += 1
while True:
    try:
        done.set()
        break
    except KeyboardInterrupt:
        pass
time.sleep(0.3)
assert (moe_numba.softmax_rows(x) == 0.25).all()
many = np.zeros((20_000, 4), np.float32)  # for which the parallel form is compiled
other = threading.Thread(target=moe_numba.softmax_rows, daemon=True, args=(many,))
other.start()
other.join(60)
print(interrupted, other.is_alive())
"""


def test_interrupts_wait_for_a_compilation(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "moe_numba", ignore=shutil.ignore_patterns("__pycache__"))
    printed, stderr = run_python(_INTERRUPTED_COMPILATION, tmp_path, NUMBA_CACHE_DIR=str(tmp_path))
    interrupted, waits = printed.split()
    assert int(interrupted) > 0
    assert (waits, stderr) == ("False", "")


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
