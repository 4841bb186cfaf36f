"""The limits of this machine, measured with the package's own vectors on all threads of a layer.

`multiply_add_rate(dtype)`: the processor's peak. Sums of products of values that never leave the
registers or the first-level cache.
`reading_rate(buffer)`: the memory's peak. All threads sum a buffer that is much larger than the
caches, with many vector loads under way at once.

There are several ways to try for both. The one that reaches most is the peak: a limit that is set too
low would make a layer look better than it is. Threads take the next piece of work when they are done
with one, as in a layer: beside another busy program both get what is left, and compare.
"""

import time
from functools import lru_cache, partial

import numba
import numpy as np

import moe_numba
from moe_numba._aligned import aligned_empty
from moe_numba._jit import helper
from moe_numba.kernels.projection import REPEAT_LINES, SKEW_LINES
from moe_numba.simd.amx import (
    CONFIGURATIONS,
    DEPTH,
    PACKED_TILE,
    SUMS,
    TILE,
    begin_sums,
    configure_tiles,
    multiply_step,
    release_tiles,
)
from moe_numba.simd.amx import store_sums as store_tile_sums
from moe_numba.simd.atomic import take_next
from moe_numba.simd.products import line_size, step_size
from moe_numba.simd.target import LANES, TILE_VECTORS, has_amx, has_bf16_dot
from moe_numba.simd.tile import (
    TILE_COLUMNS,
    TILE_ROWS,
    WHOLE,
    clamped_offsets,
    dot_line,
    prefetch,
    store_sums,
    zero_tile,
)
from moe_numba.simd.vector import fma, load, offset, pointer, store

#: Pieces of work of one measurement of the processor, some 20 ms on two cores.
PIECES = 500
#: Steps of one piece.
STEPS = 10_000
#: Registers that accumulate in `_multiply_add`. Two units with a latency of 4 cycles need 8; 12 and
#: the two factors still fit into 16 registers.
REGISTERS = 12
#: 64-byte lines in each row of the tile's operands: together they stay in the first-level cache. Odd,
#: so that the rows do not meet in the same few sets of it.
TILE_LINES = 33
#: The largest tile.
LARGEST = WHOLE[TILE_VECTORS - 1]
#: Loads under way in each thread.
STREAMS = 8
#: float32 values from one stream to the next: 256 KiB and a line, again for the sets of the caches.
STREAM_GAP = 65536 + 16
#: Memory to read: several times the largest caches there are.
BUFFER_BYTES = 3 * 2**30

# Not moe_numba._jit.kernel: its cache does not notice when this file changes.
_parallel = numba.njit(parallel=True, nogil=True, error_model="numpy")


# ---- the processor ----


@helper
def _multiply_add(memory, steps):
    """`steps` times REGISTERS independent sums of products, all in registers."""
    a = load(memory, 0, LANES)
    b = load(memory, LANES, LANES)
    # Different starts, or the compiler would find twelve equal sums and keep one.
    c0 = load(memory, 2 * LANES, LANES)
    c1 = load(memory, 3 * LANES, LANES)
    c2 = load(memory, 4 * LANES, LANES)
    c3 = load(memory, 5 * LANES, LANES)
    c4 = load(memory, 6 * LANES, LANES)
    c5 = load(memory, 7 * LANES, LANES)
    c6 = load(memory, 8 * LANES, LANES)
    c7 = load(memory, 9 * LANES, LANES)
    c8 = load(memory, 10 * LANES, LANES)
    c9 = load(memory, 11 * LANES, LANES)
    c10 = load(memory, 12 * LANES, LANES)
    c11 = load(memory, 13 * LANES, LANES)
    for _ in range(steps):
        c0 = fma(a, b, c0)
        c1 = fma(a, b, c1)
        c2 = fma(a, b, c2)
        c3 = fma(a, b, c3)
        c4 = fma(a, b, c4)
        c5 = fma(a, b, c5)
        c6 = fma(a, b, c6)
        c7 = fma(a, b, c7)
        c8 = fma(a, b, c8)
        c9 = fma(a, b, c9)
        c10 = fma(a, b, c10)
        c11 = fma(a, b, c11)
    # Used, or the compiler would leave all of it out.
    store(c0 + c1 + c2 + c3 + c4 + c5 + c6 + c7 + c8 + c9 + c10 + c11, memory, 0, LANES)


@helper
def _registers_worker(memory, counters, pieces, steps):
    while take_next(counters, 0) < pieces:
        _multiply_add(memory, steps)


@_parallel
def _registers_on_all(counters, memory, pieces, steps):
    for thread in numba.prange(memory.shape[0]):
        mine = pointer(memory, np.int64(thread) * memory.shape[1])
        _registers_worker(mine, pointer(counters, 0), pieces, steps)


def _registers(pieces, steps):
    """Multiply-adds per second of `_multiply_add`."""
    memory = aligned_empty((moe_numba.get_num_threads(), (REGISTERS + 2) * LANES))
    memory[:] = 1e-3 * np.linspace(1, 2, memory.shape[1])
    seconds = _seconds(_registers_on_all, memory, pieces, steps)
    return pieces * steps * REGISTERS * LANES / seconds


@helper
def _tiles_worker(a, w, length, out, counters, pieces, steps):
    """`steps` times one step of the largest tile along rows of `length` values, for every piece."""
    columns_at = clamped_offsets(length, TILE_COLUMNS - 1)
    step, line = step_size(a), line_size(w)
    while take_next(counters, 0) < pieces:
        tile = zero_tile(LARGEST, columns_at)
        for _ in range(steps * step // length):
            for k in range(0, length, line):
                tile = dot_line(tile, a, LARGEST, w, columns_at, k)
        store_sums(tile, LARGEST, columns_at, True, out, LANES, 1, TILE_COLUMNS)


@_parallel
def _tiles_on_all(counters, a, w, out, pieces, steps):
    for thread in numba.prange(out.shape[0]):
        mine = pointer(out, np.int64(thread) * out.shape[1])
        _tiles_worker(pointer(a, 0), pointer(w, 0), w.shape[1], mine, pointer(counters, 0), pieces, steps)


def _tiles(dtype, pieces, steps):
    """Multiply-adds per second of tiles, both operands of the dtype (float32, or uint16 for bfloat16)."""
    # 1.0 as float32; as two bfloat16 the same bits are 1.0 and 0.0.
    a, w = (aligned_empty((rows, TILE_LINES * 16)) for rows in (TILE_ROWS, TILE_COLUMNS))
    a[:] = w[:] = 1.0
    out = aligned_empty((moe_numba.get_num_threads(), TILE_ROWS * LANES))
    a, w = a.view(dtype), w.view(dtype)
    length = a.shape[1]
    seconds = _seconds(_tiles_on_all, a, w, out, pieces, steps)
    step = 16 // a.itemsize
    return pieces * (steps * step // length) * length * TILE_ROWS * TILE_COLUMNS / seconds


@helper
def _matrix_unit_worker(a, w, out, counters, pieces, steps):
    """`steps` times the products of 2 strips of weights and 2 groups of tokens, for every piece."""
    configure_tiles(pointer(CONFIGURATIONS, CONFIGURATIONS.size - 64))  # all rows of every tile
    groups_at = (0, PACKED_TILE)
    while take_next(counters, 0) < pieces:
        begin_sums(True, out, (0, SUMS), TILE, (0, 2 * SUMS))
        for _ in range(steps):
            multiply_step(w, (0, TILE * DEPTH), DEPTH, a, DEPTH, groups_at)
        store_tile_sums(out, (0, SUMS), TILE, (0, 2 * SUMS))
    release_tiles()


@_parallel
def _matrix_unit_on_all(counters, a, w, out, pieces, steps):
    for thread in numba.prange(out.shape[0]):
        mine = pointer(out, np.int64(thread) * out.shape[1])
        _matrix_unit_worker(pointer(a, 0), pointer(w, 0), mine, pointer(counters, 0), pieces, steps)


def _matrix_unit(pieces, steps):
    """Multiply-adds per second of the matrix unit on random values: it runs 10 % faster on zeros."""
    random = np.random.default_rng(0)
    a, w = (aligned_empty(2 * PACKED_TILE, np.uint16) for _ in range(2))
    for operand in (a, w):
        operand[:] = random.standard_normal(operand.size, np.float32).view(np.uint32) >> 16
    out = aligned_empty((moe_numba.get_num_threads(), 4 * SUMS))
    return pieces * steps * 4 * SUMS * DEPTH / _seconds(_matrix_unit_on_all, a, w, out, pieces, steps)


#: Ways to reach the peak with weights of a dtype: functions of (pieces, steps) -> multiply-adds per
#: second. Every format may be widened to float32, so the float32 ways belong to all of them; a format
#: with an instruction of its own adds one.
_FLOAT32_WAYS = [_registers, partial(_tiles, np.float32)]
WAYS = {
    "float32": _FLOAT32_WAYS,
    "bfloat16": [
        *_FLOAT32_WAYS,
        *([partial(_tiles, np.uint16)] if has_bf16_dot() else []),
        *([_matrix_unit] if has_amx() else []),
    ],
}


def multiply_add_rate(dtype, pieces=PIECES, steps=STEPS):
    """FLOP/s (two for a multiply-add) of all threads with weights of a dtype: the best of its WAYS."""
    return 2 * max(way(pieces, steps) for way in WAYS[dtype])


# ---- the memory ----


@helper
def _sum(memory, count, step, gap, ask, out):
    """Sums of memory[i + j * gap :][: LANES] over i = 0, step, ... < count, for STREAMS j.

    ask: for what comes next, as `project` does of few rows.
    """
    s0 = load(memory, 0, LANES)
    s1 = s0
    s2 = s0
    s3 = s0
    s4 = s0
    s5 = s0
    s6 = s0
    s7 = s0
    for i in range(0, count, step):
        s0 = s0 + load(memory, i, LANES)
        s1 = s1 + load(memory, i + gap, LANES)
        s2 = s2 + load(memory, i + 2 * gap, LANES)
        s3 = s3 + load(memory, i + 3 * gap, LANES)
        s4 = s4 + load(memory, i + 4 * gap, LANES)
        s5 = s5 + load(memory, i + 5 * gap, LANES)
        s6 = s6 + load(memory, i + 6 * gap, LANES)
        s7 = s7 + load(memory, i + 7 * gap, LANES)
        if ask:
            for j in range(STREAMS):
                at = i + j * gap + (REPEAT_LINES + j * SKEW_LINES) * line_size(memory)
                prefetch(memory, at)
                prefetch(memory, at + REPEAT_LINES * line_size(memory))
    store(s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7, out, 0, LANES)


@helper
def _sum_worker(buffer, out, counters, pieces, apart, ask):
    while True:
        piece = take_next(counters, 0)
        if piece >= pieces:
            break
        memory = offset(buffer, piece * STREAMS * STREAM_GAP)
        if apart:
            _sum(memory, STREAM_GAP, LANES, STREAM_GAP, ask, out)
        else:
            _sum(memory, STREAMS * STREAM_GAP, STREAMS * LANES, LANES, ask, out)


@_parallel
def _sum_on_all(counters, buffer, out, pieces, apart, ask):
    for thread in numba.prange(out.shape[0]):
        mine = pointer(out, np.int64(thread) * out.shape[1])
        _sum_worker(pointer(buffer, 0), mine, pointer(counters, 0), pieces, apart, ask)


@lru_cache(maxsize=1)
def make_buffer(size=BUFFER_BYTES):
    """Memory to read, of `size` bytes. Written once: pages that never were are all the same page of zeros."""
    buffer = aligned_empty(size // 4)
    buffer[:] = 1.0
    return buffer


#: Ways to read: (streams far apart, asked for in advance).
READING_WAYS = ((False, False), (True, False), (True, True))


def reading_rate(buffer):
    """Bytes/s that all threads read from `buffer` (float32): the best of three ways.

    Each thread's loads lie side by side, or in STREAMS streams far apart; these are also asked for in advance.
    """
    pieces = buffer.size // (STREAMS * STREAM_GAP)
    out = aligned_empty((moe_numba.get_num_threads(), LANES))
    size = pieces * STREAMS * STREAM_GAP * buffer.itemsize
    return size / min(_seconds(_sum_on_all, buffer, out, pieces, *way) for way in READING_WAYS)


# ---- both ----

_compiled = set()


def _seconds(function, *args):
    """Seconds of function(counters, *args); compiled before the first call of its kind."""
    signature = function, tuple(map(numba.typeof, args))
    if signature not in _compiled:
        function(np.zeros(1, np.int64), *args)
        _compiled.add(signature)
    counters = np.zeros(1, np.int64)
    start = time.perf_counter()
    function(counters, *args)
    return time.perf_counter() - start
