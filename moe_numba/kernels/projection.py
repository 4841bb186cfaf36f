"""Matrix products as they are: weight rows [out, in], activation rows along the same axis.

Both operands are contiguous along the axis that is summed, so a dot product reads two
streams and nothing has to be repacked. This file is the only one with a loop over that axis.
"""

import numpy as np

from .._jit import helper, inline
from ..simd.tile import (
    TILE_COLUMNS,
    TILE_ROWS,
    clamped_offsets,
    dot_step,
    dot_step_partial,
    line_size,
    prefetch_step,
    step_size,
    store_sums,
    zero_tile,
)
from ..simd.vector import element, offset

#: Activation rows that share one pass over the weights.
ROW_BLOCK = 128
#: Steps along K per tile. 6 weight and 4 activation rows of 64 steps are 40 KiB of a first-level
#: cache of 48 KiB; the fewer blocks, the fewer sums over the lanes of a tile.
BLOCK_STEPS = 64
#: Activations per pass in cache lines: 768 KiB, which stay in the second-level cache (1 MiB and
#: more) while the weight rows stream past. Many rows take K in several passes (Mixtral, 128 rows:
#: 22 % faster), few rows take it in one, because whole weight rows stream faster than pieces (10 %).
PASS_LINES = 12288
#: Rows from which the next weights are prefetched. With 64 rows per expert a whole layer ran 9 %
#: faster with it; with one, the processor's own prefetching does better (31 instead of 27 GB/s).
PREFETCH_FROM = 16
#: `row_ids` for rows that already lie side by side.
CONSECUTIVE = np.arange(ROW_BLOCK)


@inline
def _dot(tile, a, rows_at, w, columns_at, length):
    """The loop over K: tile[i, j] += a[rows_at[i] :][: length] . w[columns_at[j] :][: length]"""
    step = step_size(a, w)
    whole = length - length % step
    for k in range(0, whole, step):
        tile = dot_step(tile, a, rows_at, w, columns_at, k)
    if whole < length:
        tile = dot_step_partial(tile, a, rows_at, w, columns_at, whole, length - whole)
    return tile


@helper
def _tile(a, rows_at, w, columns_at, length, first, out, out_at, out_stride, columns):
    """One tile over one block of K: out = its dot products if `first`, else out += them."""
    tile = _dot(zero_tile(rows_at), a, rows_at, w, columns_at, length)
    store_sums(tile, rows_at, first, out, out_at, out_stride, columns)


@helper
def _strip(a, a_stride, row_ids, rows, w, w_stride, n, size, ahead, first, out, out_stride):
    """All rows against n weight rows over one block of K; `ahead` of these weights lie the next."""
    columns_at = clamped_offsets(0, w_stride, n - 1)
    # A share of the next weights is asked for with each tile, all of them by the last one.
    values = line_size(w)
    share = (size * TILE_ROWS // rows // values + 1) * values if rows >= PREFETCH_FROM else 0
    line = 0
    r = 0
    while r < rows:
        stop = min(line + share, size)
        while line < stop:
            prefetch_step(w, columns_at, ahead + line)
            line += values
        out_at = r * out_stride
        a0 = element(row_ids, r) * a_stride
        if r + TILE_ROWS <= rows:
            a1 = element(row_ids, r + 1) * a_stride
            a2 = element(row_ids, r + 2) * a_stride
            a3 = element(row_ids, r + 3) * a_stride
            _tile(a, (a0, a1, a2, a3), w, columns_at, size, first, out, out_at, out_stride, n)
            r += TILE_ROWS
        elif r + 2 <= rows:
            a1 = element(row_ids, r + 1) * a_stride
            _tile(a, (a0, a1), w, columns_at, size, first, out, out_at, out_stride, n)
            r += 2
        else:
            _tile(a, (a0,), w, columns_at, size, first, out, out_at, out_stride, n)
            r += 1


@helper
def project(a, a_stride, row_ids, rows, w, w_stride, columns, length, out, out_stride):
    """out[r, j] = a[row_ids[r]] . w[j] for r < rows (at most ROW_BLOCK) and j < columns.

    All but the integers are pointers:

    a           activations; row i begins at a[i * a_stride]
    row_ids     (rows,) int64 row of `a` for each r
    w           weights; row j begins at w[j * w_stride]
    length      values summed
    out         row r begins at out[r * out_stride]
    """
    block = BLOCK_STEPS * step_size(a, w)
    span = max(1, PASS_LINES * line_size(a) // (rows * block)) * block
    for start in range(0, length, span):
        end = min(start + span, length)
        for j in range(0, columns, TILE_COLUMNS):
            n = min(TILE_COLUMNS, columns - j)
            for k in range(start, end, block):
                size = min(block, end - k)
                ahead = block if k + block < end else TILE_COLUMNS * w_stride + start - k
                weight = offset(w, j * w_stride + k)
                _strip(
                    offset(a, k),
                    a_stride,
                    row_ids,
                    rows,
                    weight,
                    w_stride,
                    n,
                    size,
                    ahead,
                    k == 0,
                    offset(out, j),
                    out_stride,
                )
