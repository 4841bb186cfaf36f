"""Memory for intermediate values."""

import itertools
import threading

import numpy as np
import pytest

from moe_numba import _workspace
from moe_numba._aligned import CACHE_LINE
from moe_numba._engines import AMX, AMX_TRANSPOSED, VECTORS, VECTORS_BFLOAT16, Sizes
from moe_numba._workspace import chunk_tokens
from moe_numba.simd.target import GROUP_ROWS, ZEN4

ENGINES = (VECTORS, VECTORS_BFLOAT16, AMX, AMX_TRANSPOSED)


def take_workspace(engine, sizes):
    return engine.workspace(*_workspace.take_workspace(engine, sizes))


every_engine = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)


@pytest.mark.parametrize("width", range(1, 130))
def test_rows_that_are_not_packed_are_an_odd_number_of_cache_lines(width):
    rows = take_workspace(AMX_TRANSPOSED, Sizes(2, 2, 1, width, 1, 1)).tokens
    lines, rest = divmod(rows.strides[0], CACHE_LINE)
    assert rest == 0
    assert lines % 2 == 1
    assert width * rows.itemsize < rows.strides[0] <= width * rows.itemsize + 2 * CACHE_LINE


def _parts(space):
    return space[:-1]  # all but counters


@every_engine
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (7, 14, 4, 33, 65, 2), (100, 800, 64, 16, 16, 1)])
def test_parts_are_large_enough_and_do_not_overlap(engine, sizes):
    sizes = Sizes(*sizes)
    space = take_workspace(engine, sizes)
    for part, (rows, length, dtype) in zip(_parts(space), engine.shapes(sizes), strict=True):
        assert part.shape == (rows, length)
        assert part.dtype == dtype
        assert part.ctypes.data % CACHE_LINE == 0
    assert len(space.scratch) == sizes.threads
    assert len(space.sums) == sizes.threads
    assert space.sums.shape[1] % sizes.tokens == 0
    ends = sorted((part.ctypes.data, part.ctypes.data + part.nbytes) for part in _parts(space))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def _rounded(width, unit):
    return -(-width // unit) * unit


@pytest.mark.parametrize(
    "sizes",
    [
        (7, 14, 4, 33, 65, 1),
        (64, 128, 8, 3000, 96, 2),
        (65, 130, 8, 3000, 96, 2),
        (100, 800, 64, 160, 96, 2),
        (150, 300, 8, 2048, 96, 1),
        (2000, 16000, 64, 2048, 1024, 2),
        (2000, 4000, 8, 2048, 5000, 2),
    ],
)
def test_engines_need_what_the_documentation_says(sizes):
    """docs/performance.md."""
    sizes = Sizes(*sizes)
    columns = sizes.input_dim // (2 * sizes.threads) if sizes.threads > 1 else sizes.input_dim
    groups = min(sizes.num_experts, sizes.rows) + sizes.rows // 16

    def bytes_of(engine, row_block):
        """Without the plan, whose size is checked here."""
        size = sum(rows * length * np.dtype(dtype).itemsize for rows, length, dtype in engine.shapes(sizes))
        return size - (16 * sizes.rows + 40 * sizes.num_experts + 32 * (sizes.rows // row_block))

    row_groups = min(sizes.num_experts, sizes.rows) + sizes.rows // GROUP_ROWS
    sums = min(768 if sizes.tokens <= 64 else 384, _rounded(columns, 96))
    for engine, item in ((VECTORS, 4), (VECTORS_BFLOAT16, 2)):
        widths = sum(_rounded(width, CACHE_LINE // item) for width in (sizes.input_dim, sizes.hidden_dim))
        expected = item * GROUP_ROWS * row_groups * widths + sizes.threads * 4 * (sizes.tokens * sums + 49152)
        assert bytes_of(engine, 96 if ZEN4 else 128) == expected

    most = max(65536 // sizes.tokens, sizes.hidden_dim // 16)
    most = min(512, max(128, most // 64 * 64))
    sums = min(most, _rounded(columns, 64))
    widths = _rounded(sizes.input_dim, 32) + _rounded(sizes.hidden_dim, 32)
    expected = 32 * groups * widths + sizes.threads * (4 * sizes.tokens * sums + 64 * sums + 1969152)
    assert bytes_of(AMX, 640) == expected

    sums = min(256, _rounded(columns, 64))
    widths = sum(16 * (-(-(width + 1) // 16) | 1) for width in (sizes.input_dim, sizes.hidden_dim))
    expected = 64 * groups * widths + sizes.threads * (4 * sizes.tokens * sums + 524288)
    assert bytes_of(AMX_TRANSPOSED, 512) == expected


def test_memory_for_many_sizes_is_bounded():
    for tokens in range(1, 500):
        take_workspace(VECTORS, Sizes(tokens, tokens, 1, 1, 1, 1))
    assert len(_workspace._memory.workspaces) <= 64


@every_engine
def test_memory_is_used_again_by_the_same_thread_only(engine):
    sizes = Sizes(5, 10, 4, 8, 8, 1)
    mine = take_workspace(engine, sizes)
    assert np.shares_memory(mine.tokens, take_workspace(engine, sizes).tokens)
    others = []
    thread = threading.Thread(target=lambda: others.append(take_workspace(engine, sizes)))
    thread.start()
    thread.join()
    assert not any(np.shares_memory(a, b) for a in _parts(mine) for b in _parts(others[0]))


@every_engine
@pytest.mark.parametrize("threads", [1, 2, 256])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "input_dim", "hidden_dim"), [(64, 8, 2048, 1024), (2, 1, 16, 16), (8, 2, 4096, 14336)]
)
def test_a_chunk_stays_below_its_bound(monkeypatch, engine, num_experts, top_k, input_dim, hidden_dim, threads):
    layer = num_experts, input_dim, hidden_dim, threads
    tokens = chunk_tokens(engine, top_k, *layer)
    assert tokens > 1000

    def size(tokens):
        shapes = engine.shapes(Sizes(tokens, tokens * top_k, *layer))
        return sum(rows * length * np.dtype(dtype).itemsize for rows, length, dtype in shapes)

    assert size(tokens) - size(1) <= _workspace.CHUNK_BYTES
    assert size(tokens + 16) - size(1) > _workspace.CHUNK_BYTES - 1024  # one group more; parts are whole cache lines
    monkeypatch.setattr(_workspace, "CHUNK_BYTES", 1)
    assert chunk_tokens(engine, top_k, *layer) == 64
