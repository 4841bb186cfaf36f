"""Other processes, however they are made: none is killed, none waits forever, all give the bits of the first.

Every scenario is a program, under each of Numba's threading layers. By hand also under TBB, where Numba finds it:
NUMBA_THREADING_LAYER=tbb (docs/reliability.md).
"""

import os
import subprocess
import sys

import pytest
from helpers import PACKAGE

pytestmark = pytest.mark.jit

#: A program's module, which processes that do not inherit memory import.
PREPARE = """
import multiprocessing, os, signal, sys, threading, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
import numpy as np, moe_numba
from moe_numba import MoeConfig, MoeLayer

moe_numba.threads.SERIAL_BELOW = 0
first = MoeLayer(MoeConfig(4, 2, None, 0.0, 32, 48, activation="swiglu", bias=False))
layers = first, first.astype("bfloat16")
x = np.random.default_rng(0).standard_normal((300, 32), np.float32)

def bits(_=None):
    return b"".join(layer(x)[0].tobytes() for layer in layers) + moe_numba.softmax_rows(x).tobytes()

def forked(work):
    # Exit code of a child that does `work`. SIGALRM ends one that waits forever.
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        code = 2
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def differs(expected):
    return int(bits() != expected)
"""

FORKS = """
expected = bits()
assert forked(lambda: differs(expected)) == 0
assert forked(lambda: differs(expected) or forked(lambda: differs(expected) or forked(lambda: differs(expected)))) == 0
def counts():
    moe_numba.set_num_threads(2)
    assert moe_numba.get_num_threads() == 1
    return 0
assert forked(counts) == 0
assert bits() == expected
assert moe_numba.get_num_threads() == 2
"""

POOLS = """
expected = bits()
context = multiprocessing.get_context("METHOD")
pool = context.Pool(2)
assert set(pool.map(bits, range(4))) == {expected}
pool.close()  # not killed: Python warns of a semaphore that Numba then leaves
pool.join()
with ProcessPoolExecutor(2, mp_context=context) as pool:
    assert set(pool.map(bits, range(4))) == {expected}
process = context.Process(target=bits)
process.start()
process.join()
assert process.exitcode == 0
assert bits() == expected
"""

#: One thread computes, one compiles, one loads what is compiled, while processes are forked that do the same.
BUSY = """
from numba import njit
expected = bits()
done = False
wrong = 0

def compute():
    global wrong
    while not done:
        wrong += differs(expected)

def compile_():
    while not done:
        square(time.time())

def square(i):
    function = njit(lambda x: x * x)
    return function(i)

def child():
    return differs(expected) or int(square(3) != 9)

threads = [threading.Thread(target=target) for target in (compute, compute, compile_)]
for thread in threads:
    thread.start()
codes = [forked(child) for _ in range(12)]
done = True
for thread in threads:
    thread.join()
assert codes == [0] * 12, codes
assert wrong == 0
"""

JOBLIB = """
import joblib
expected = bits()
assert set(joblib.Parallel(2, backend="loky")(joblib.delayed(bits)(i) for i in range(4))) == {expected}
"""

DATA_LOADER = """
import torch
from work import *
from torch.utils.data import DataLoader, Dataset

class Data(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return bits()

def main():
    a = torch.ones(600, 600)
    assert (a @ a)[0, 0] == 600  # torch has threads of its own from here on
    expected = bits()
    for start in ("fork", "spawn"):
        loader = DataLoader(Data(), batch_size=None, num_workers=2, multiprocessing_context=start)
        assert set(loader) == {expected}
        assert (a @ a)[0, 0] == 600
    assert bits() == expected

if __name__ == "__main__":
    main()
"""

#: Another package's parallel code ran, this one is imported in the child only.
IMPORTED_IN_THE_CHILD = """
import os, runpy, signal, sys
import numpy as np
from numba import njit, prange

@njit(parallel=True)
def other(x):
    for i in prange(x.size):
        x[i] += 1

if "parent" in sys.argv:
    other(np.ones(1000))
child = os.fork()
if child == 0:
    code = 2
    signal.alarm(60)
    try:
        import work
        work.bits()
        code = 10 + work.moe_numba.get_num_threads()
    finally:
        os._exit(code)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def _run(tmp_path, code, layer, *arguments, **environment):
    """What a program printed, beside which is a module named work with PREPARE in it."""
    (tmp_path / "work.py").write_text(PREPARE)
    program = tmp_path / "program.py"
    program.write_text(code)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(tmp_path)]),
        "NUMBA_THREADING_LAYER": os.environ.get("NUMBA_THREADING_LAYER", layer),
        "NUMBA_NUM_THREADS": "2",
    } | environment
    command = [sys.executable, "-W", "ignore::DeprecationWarning", program, *arguments]  # Python 3.12 warns of forks
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def _main(code):
    lines = ["if __name__ == '__main__':", *(f"    {line}" for line in code.splitlines())]
    return "from work import *\n" + "\n".join(lines)


under_each_layer = pytest.mark.parametrize("layer", ["omp", "workqueue"])


@under_each_layer
def test_forks_and_forks_of_forks(tmp_path, layer):
    _run(tmp_path, _main(FORKS), layer)


@under_each_layer
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pools_of_multiprocessing_and_of_futures(tmp_path, layer, method):
    _run(tmp_path, _main(POOLS.replace("METHOD", method)), layer)


@under_each_layer
def test_forks_while_other_threads_compute_and_compile(tmp_path, layer):
    _run(tmp_path, "from work import *\n" + BUSY, layer)


@under_each_layer
def test_joblib(tmp_path, layer):
    pytest.importorskip("joblib")
    _run(tmp_path, _main(JOBLIB), layer)


@under_each_layer
def test_workers_of_a_torch_data_loader(tmp_path, layer):
    pytest.importorskip("torch")
    _run(tmp_path, DATA_LOADER, layer)


@under_each_layer
@pytest.mark.parametrize("used_in_parent", [True, False])
def test_imported_in_the_child_only(tmp_path, layer, used_in_parent):
    """A child may start threads of its own if its parent had none."""
    arguments = ["parent"] if used_in_parent else []
    assert _run(tmp_path, IMPORTED_IN_THE_CHILD, layer, *arguments) == ("11\n" if used_in_parent else "12\n")
