"""Matrix products with the weights as they are stored; the only file with a loop over the axis K that is summed.

`project`: weights [out, in]. Both operands are contiguous along K, so a dot product reads two
streams and nothing has to be repacked. `project_transposed`: weights [in, out], as gpt-oss and
Llama 4 store them. Every activation multiplies a row of neighbouring columns.
"""

import numpy as np

from .._jit import helper, inline
from ..simd.outer import (
    OUTER_COLUMNS,
    load_outer,
    outer_step,
    outer_step_partial,
    outer_step_size,
    store_outer,
)
from ..simd.target import ONE_STREAM
from ..simd.tile import (
    TILE_COLUMNS,
    TILE_ROWS,
    clamped_offsets,
    dot_step,
    dot_step_partial,
    line_size,
    prefetch,
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
#: Streams of weights that few rows read side by side (`_project_streams`).
STREAMS = 1 if ONE_STREAM else TILE_COLUMNS
#: Rows that are few in this sense (Xeon, olmoe, float32, T = 64, 128, 256, or 8, 16, 32 rows per expert: 23, 18 and 8 %
#: faster than tiles of adjacent weight rows).
STREAM_ROWS = TILE_ROWS if ONE_STREAM else 32
#: Cache lines from which a weight row is worth a stream of its own. Shorter ones lie in small layers,
#: where the time is that of calling tiles (H = 64, F = 128, one token: 1.5 us of a forward of 23).
STREAM_LINES = 24
#: Activations that a single stream of weights leaves in the first-level cache, in cache lines: with more, each
#: weight row fetches them from the second level again (K = 4096, 4 rows: 19 GB/s instead of 42).
STREAM_ACTIVATIONS = 128
#: Cache lines from which a block of a weight row is worth asking for the next one: a layer of shorter rows lies in the
#: cache (H = 64, F = 128, one token: 1.2 us of a forward of 15).
FETCH_LINES = 16
#: Cache lines by which a second request for weights is ahead of the first. Processors of Intel read ahead of a stream
#: whose lines are asked for twice within the same page of 4 KiB (Xeon, one core, six streams: 17 GB/s if each line is
#: asked for a page before it is needed, 18.4 if it has been 8 lines earlier, too; 12 and 16 lines are slower).
REPEAT_LINES = 8
#: Cache lines from the end of one stream's requests to the next one's, so that streams come to the end of a page one
#: after the other: there the processor has to find each of them anew (float32, T = 1 and 4: 5 and 6 % faster).
SKEW_LINES = 6
#: Rows of transposed weights that meet all columns of a piece of work before the next: each lies in a page
#: of its own, and a first-level cache of translations holds 64 and more.
OUTER_BLOCK = 32
#: `row_ids` for rows that already lie side by side.
CONSECUTIVE = np.arange(ROW_BLOCK)


@helper
def _tile(a, rows_at, w, columns_at, length, fetch, fetch_rows, fetch_stride, first, out, out_at, apart, n):
    """One tile over one block of K: out = its dot products if `first`, else out += them.

    Meanwhile asks for the `length` values at w[fetch], w[fetch + fetch_stride], ..., `fetch_rows` times.
    """
    tile = zero_tile(rows_at, columns_at)
    step = step_size(a, w)
    whole = length - length % step
    for k in range(0, whole, step):
        tile = dot_step(tile, a, rows_at, w, columns_at, k)
        at = fetch + k
        for _ in range(fetch_rows):
            prefetch(w, at)
            if not ONE_STREAM:
                prefetch(w, at + REPEAT_LINES * line_size(w))
            at += fetch_stride
    if whole < length:
        tile = dot_step_partial(tile, a, rows_at, w, columns_at, whole, length - whole)
    store_sums(tile, columns_at, first, out, out_at, apart, n)


@helper
def _strip(a, a_stride, row_ids, rows, w, columns_at, n, size, ahead, ahead_stride, first, out, out_stride, apart):
    """All rows against n weight rows over one block of K, while fetching as many weights `ahead` of these.

    Tiles have four rows, the last one or two as many; of three, the last is computed again. Outputs of neighbouring
    columns of the tile are `apart` values apart.

    Each tile asks for its share of the next weights (olmoe, T = 64: 18 % faster in float32, 32 % in bfloat16), but for
    a single column, which is one long stream on AMD: the processor fetches it ahead by itself, and a quarter slower
    when asked for.
    """
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    fetched = len(columns_at) if len(columns_at) > 1 and size >= FETCH_LINES * line_size(w) else 0
    for t in range(tiles):
        share = t * fetched // tiles
        fetch, fetch_rows = ahead + share * ahead_stride, (t + 1) * fetched // tiles - share
        r0 = t * TILE_ROWS
        r1 = min(r0 + 1, rows - 1)
        a0 = element(row_ids, r0) * a_stride
        a1 = element(row_ids, r1) * a_stride
        if rows - r0 == 1:
            out_at1 = (r0 * out_stride,)
            _tile(a, (a0,), w, columns_at, size, fetch, fetch_rows, ahead_stride, first, out, out_at1, apart, n)
        elif rows - r0 == 2:
            out_at = (r0 * out_stride, r1 * out_stride)
            _tile(a, (a0, a1), w, columns_at, size, fetch, fetch_rows, ahead_stride, first, out, out_at, apart, n)
        else:
            r2, r3 = r0 + 2, min(r0 + 3, rows - 1)
            rows_at4 = (a0, a1, element(row_ids, r2) * a_stride, element(row_ids, r3) * a_stride)
            out_at4 = (r0 * out_stride, r1 * out_stride, r2 * out_stride, r3 * out_stride)
            _tile(a, rows_at4, w, columns_at, size, fetch, fetch_rows, ahead_stride, first, out, out_at4, apart, n)


@inline
def _stream_offsets(stride, last):
    """Where a tile's weight rows begin, one from each stream."""
    if ONE_STREAM:
        return (np.int64(0),)
    return clamped_offsets(stride, last)


@helper
def _project_streams(a, a_stride, row_ids, rows, w, columns, length, block, then, out, out_stride):
    """`project` of few rows, for which the time is that of reading the weights.

    A tile's weight rows are as far apart as possible. So each is a stream that goes on with the row behind it, and the
    processor reads ahead of it from row to row (Xeon, olmoe, float32, T = 1, 4, 16: 7 to 12 % faster than tiles of
    adjacent rows). On processors that read one stream fastest, there is one (EPYC, T = 1: 95 % of the memory's rate).
    A single tile of rows asks for what it needs soon; several share what all of them need next.
    """
    apart = (columns + STREAMS - 1) // STREAMS
    stride = apart * length
    single = rows <= TILE_ROWS
    soon, skew = REPEAT_LINES * line_size(w), SKEW_LINES * line_size(w)
    for j in range(apart):
        n = min(STREAMS, (columns - j + apart - 1) // apart)
        for k in range(0, length, block):
            size = min(block, length - k)
            at = j * length + k
            end = j + 1 == apart and k + size == length
            ahead = soon if single else then - at if end else size
            ahead_stride = stride + skew if single else stride
            columns_at = _stream_offsets(stride, n - 1)
            x, v, y = offset(a, k), offset(w, at), offset(out, j)
            _strip(
                x, a_stride, row_ids, rows, v, columns_at, n, size, ahead, ahead_stride, k == 0, y, out_stride, apart
            )


@helper
def project(a, a_stride, row_ids, rows, w, columns, length, then, out, out_stride):
    """out[r, j] = a[row_ids[r]] . w[j] for r < rows (at most ROW_BLOCK) and j < columns.

    Rows meet TILE_COLUMNS weight rows at a time, a block of K after the other, while the next weight rows are
    fetched. Which ones these are, adjacent or far apart, depends on the number of rows; a row's values do not.

    All but the integers are pointers:

    a           activations; row i begins at a[i * a_stride]
    row_ids     (rows,) int64 row of `a` for each r
    w           weights; row j begins at w[j * length]
    length      values summed
    then        offset from `w` to the weights of the next call, which are fetched in advance
    out         row r begins at out[r * out_stride]
    """
    block = BLOCK_STEPS * step_size(a, w)
    span = max(1, PASS_LINES * line_size(a) // (rows * block)) * block
    few = rows <= STREAM_ROWS and length >= STREAM_LINES * line_size(w) and span >= length
    if few and (not ONE_STREAM or rows * length <= STREAM_ACTIVATIONS * line_size(a)):
        _project_streams(a, a_stride, row_ids, rows, w, columns, length, block, then, out, out_stride)
        return
    for start in range(0, length, span):
        end = min(start + span, length)
        for j in range(0, columns, TILE_COLUMNS):
            if j + TILE_COLUMNS < columns:
                ahead = (j + TILE_COLUMNS) * length + start
            elif end < length:
                ahead = end
            else:
                ahead = then
            for k in range(start, end, block):
                size = min(block, end - k)
                at = j * length + k
                # Whole weight rows lie end to end and are fetched in that order, as long as they are:
                # the processor recognises the stream and reads ahead of it.
                if span < length:
                    fetch, fetch_stride = ahead + k - start, length
                else:
                    fetch, fetch_stride = ahead + TILE_COLUMNS * k, size
                fetch -= at
                n = min(TILE_COLUMNS, columns - j)
                adjacent = clamped_offsets(length, n - 1)
                x, v, y = offset(a, k), offset(w, at), offset(out, j)
                _strip(x, a_stride, row_ids, rows, v, adjacent, n, size, fetch, fetch_stride, k == 0, y, out_stride, 1)


@helper
def _outer_tile(a, rows_at, w, w_stride, length, fetch, fetch_end, first, out, out_at, n):
    """One tile over one block of K: out = its sums if `first`, else out += them.

    Meanwhile asks for what lies from w[fetch] to w[fetch_end] in each of the `length` rows.
    """
    tile = load_outer(first, out, out_at, n)
    step = outer_step_size(a, w)
    line = line_size(w)
    whole = length - length % step if n == OUTER_COLUMNS else 0
    for k in range(0, whole, step):
        tile = outer_step(tile, a, rows_at, w, w_stride, k)
        for m in range(k, k + step):
            for at in range(fetch + m * w_stride, fetch_end + m * w_stride, line):
                prefetch(w, at)
    for k in range(whole, length, step):
        tile = outer_step_partial(tile, a, rows_at, w, w_stride, k, n, length - k)
    store_outer(tile, out, out_at, n)


@helper
def project_transposed(a, a_stride, row_ids, rows, w, w_stride, columns, length, then, out, out_stride):
    """out[r, j] = sum of a[row_ids[r], k] * w[k, j] over k, for r < rows and j < columns.

    As `project`, but row k of the weights begins at w[k * w_stride], and its columns lie side by side.
    """
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for k in range(0, length, OUTER_BLOCK):
        size = min(OUTER_BLOCK, length - k)
        for j in range(0, columns, OUTER_COLUMNS):
            at = k * w_stride + j
            if j + OUTER_COLUMNS < columns:
                ahead = at + OUTER_COLUMNS
            elif k + OUTER_BLOCK < length:
                ahead = (k + OUTER_BLOCK) * w_stride
            else:
                ahead = then
            n = min(OUTER_COLUMNS, columns - j)
            x, v, y = offset(a, k), offset(w, at), offset(out, j)
            for t in range(tiles):
                r0 = t * TILE_ROWS
                r1, r2, r3 = min(r0 + 1, rows - 1), min(r0 + 2, rows - 1), min(r0 + 3, rows - 1)
                rows_at = (
                    element(row_ids, r0) * a_stride,
                    element(row_ids, r1) * a_stride,
                    element(row_ids, r2) * a_stride,
                    element(row_ids, r3) * a_stride,
                )
                out_at = (r0 * out_stride, r1 * out_stride, r2 * out_stride, r3 * out_stride)
                fetch = ahead - at + t * OUTER_COLUMNS // tiles
                fetch_end = ahead - at + (t + 1) * OUTER_COLUMNS // tiles
                _outer_tile(x, rows_at, v, w_stride, size, fetch, fetch_end, k == 0, y, out_at, n)
