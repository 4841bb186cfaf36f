"""Memory for intermediate values."""

import itertools
import threading

import numpy as np
import pytest

from moe_numba import _workspace
from moe_numba._aligned import CACHE_LINE
from moe_numba._workspace import chunk_tokens, take_workspace


@pytest.mark.parametrize("operand", [np.dtype(np.float32), np.dtype(np.uint16)])
@pytest.mark.parametrize("width", range(1, 130))
def test_rows_are_an_odd_number_of_cache_lines(width, operand):
    rows = take_workspace(2, 2, width, 1, 1, operand).tokens
    lines, rest = divmod(rows.strides[0], CACHE_LINE)
    assert rest == 0
    assert lines % 2 == 1
    assert width * operand.itemsize <= rows.strides[0] < width * operand.itemsize + 2 * CACHE_LINE


def _parts(space):
    return [space.tokens, space.hidden, space.output, space.scratch]


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (7, 14, 33, 65, 2), (100, 800, 16, 16, 1)])
def test_parts_are_large_enough_and_do_not_overlap(sizes):
    tokens, rows, input_dim, hidden_dim, threads = sizes
    space = take_workspace(*sizes, np.dtype(np.float32))
    for part, shape in zip(_parts(space), [(tokens, input_dim), (rows, hidden_dim), (rows, input_dim)], strict=False):
        assert len(part) >= shape[0]
        assert part.shape[1] >= shape[1]
        assert part.ctypes.data % CACHE_LINE == 0
    assert len(space.scratch) == threads
    ends = sorted((part.ctypes.data, part.ctypes.data + part.nbytes) for part in _parts(space))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def test_memory_is_used_again_by_the_same_thread_only():
    sizes = (5, 10, 8, 8, 1, np.dtype(np.float32))
    mine = take_workspace(*sizes)
    assert np.shares_memory(mine.tokens, take_workspace(*sizes).tokens)
    others = []
    thread = threading.Thread(target=lambda: others.append(take_workspace(*sizes)))
    thread.start()
    thread.join()
    assert not any(np.shares_memory(a, b) for a in _parts(mine) for b in _parts(others[0]))


@pytest.mark.parametrize(("top_k", "input_dim", "hidden_dim"), [(8, 2048, 1024), (1, 16, 16), (2, 4096, 14336)])
def test_a_chunk_stays_below_its_bound(monkeypatch, top_k, input_dim, hidden_dim):
    tokens = chunk_tokens(top_k, input_dim, hidden_dim)
    space = take_workspace(64, 64 * top_k, input_dim, hidden_dim, 1, np.dtype(np.float32))
    per_token = sum(part.nbytes for part in _parts(space)[:3]) / 64
    assert tokens * per_token <= _workspace.CHUNK_BYTES
    assert (tokens + 1) * per_token > _workspace.CHUNK_BYTES
    monkeypatch.setattr(_workspace, "CHUNK_BYTES", 1)
    assert chunk_tokens(top_k, input_dim, hidden_dim) == 64
