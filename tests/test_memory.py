"""Peak memory of a forward is what docs/performance.md says."""

import pytest
from helpers import run_python

pytestmark = pytest.mark.jit

_CODE = """
import numpy as np
from moe_numba import MoeConfig, MoeLayer, _workspace, set_num_threads

set_num_threads(1)
_workspace.CHUNK_BYTES = {chunk}
tokens, top_k, input_dim, hidden_dim, experts = {tokens}, 2, 100, 200, 8
layer = MoeLayer(MoeConfig(experts, top_k, None, input_dim=input_dim, hidden_dim=hidden_dim))
x = np.ones((tokens, input_dim), np.float32)
layer(x[:2000])

def peak():  # not ru_maxrss, which begins with that of the parent process
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

before = peak()
y, routing = layer(x)
print(peak() - before)
"""


def whole_lines(width):
    return 16 * -(-width // 16)


def measured(tokens, chunk):
    """Bytes by which the peak of a process grows, once the kernels come from the cache: compiling takes more."""
    run_python(_CODE.format(tokens=1, chunk=chunk))
    printed, _ = run_python(_CODE.format(tokens=tokens, chunk=chunk))
    return int(printed)


def results(tokens):
    """Bytes of y and of the routing."""
    return tokens * (4 * 100 + 2 * (8 + 4) + 4 * 8 + 8)


def test_one_chunk():
    tokens = 60_000
    columns = 192  # of a piece of work: 100 rounded up to a multiple of 96
    workspace = 4 * tokens * (2 * whole_lines(100) + 2 * whole_lines(200) + columns)
    expected = workspace + results(tokens) + 16 * 2 * tokens
    grown = measured(tokens, chunk=2**30)
    assert 0.9 * expected < grown < 1.1 * expected


def test_many_tokens_need_no_larger_workspace():
    tokens, chunk = 200_000, 2**24
    assert measured(tokens, chunk) < 1.1 * results(tokens) + 2 * chunk
