"""Matrix products with the weights as they are stored: the loop over the axis K that is summed, by vectors.

(Those of a matrix unit are in amx_projection.py and amx_transposed.py.)

`project`: weights [out, in]. A weight row is contiguous along K and read as it lies. Only activations are copied, by
`pack`, so that one vector holds the same values of several rows (simd/tile.py). `project_transposed`: weights
[in, out], as gpt-oss and Llama 4 store them. Every activation multiplies a row of neighbouring columns.
"""

import numpy as np

from .._jit import helper, inline
from ..simd.outer import (
    GROUPS,
    ONE_ROW,
    OUTER,
    line_vectors,
    load_outer,
    outer_block,
    outer_run,
    outer_step,
    outer_step_size,
    store_outer,
)
from ..simd.products import line_size, step_size
from ..simd.row import row_dot_block, row_dot_line, store_row, zero_row
from ..simd.target import GROUP_ROWS, LANES, OUTER_GROUPS, OUTER_ROWS, ROW_COLUMNS, TILE_VECTORS, WIDE_COLUMNS, ZEN4
from ..simd.tile import (
    ONE_LAST,
    TILE_COLUMNS,
    TWO_LAST,
    WHOLE,
    clamped_offsets,
    dot_line,
    dot_step,
    prefetch_rows,
    store_sums,
    wide_offsets,
    zero_tile,
)
from ..simd.vector import element, load, offset, splat, store_operand

#: Activation rows that share one pass over the weights. Where a row's block of K is longest, 8 KiB, 96 of them are 768
#: KiB, and fit into Zen 4's second-level cache of 1 MiB (Mixtral, T = 512 and 2048: 1 to 2 % faster than with 128,
#: qwen3 up to 1 %, olmoe the same).
ROW_BLOCK = 96 if ZEN4 else 128
#: Steps along K whose sums are added up in one chain: 2,048 float32 values, or 4,096 bfloat16 by AVX512-BF16. The fewer
#: blocks, the fewer calls of tiles (half as many values: Zen 3, K = 2048, 60 and 126 rows 1 to 8 % slower; Zen 4,
#: Mixtral, float32, 1 to 16 rows 1 to 3 % slower, olmoe, T = 512 and 2048 within 1 %. Twice as many: Zen 3, K = 4096,
#: from 17 % slower to 7 % faster). The error of a float32 layer grows from 5e-7 to 7e-7 (H = 2048, F = 1024, root mean
#: square).
BLOCK_STEPS = 512
#: Activations per pass in cache lines, which stay in the second-level cache while the weight rows stream past. Many
#: rows take K in several passes, of a block at least, few rows in one. 768 KiB of the 1 MiB and more that processors
#: with AVX-512 have (Xeon, olmoe, float32, T = 2048: with half of it 3 % slower, with twice of it 1 %), half of it
#: elsewhere (Zen 3, 512 KiB, olmoe, T = 512: with 768 KiB 2 to 3 % slower).
PASS_LINES = 12288 if LANES == 16 else 6144
#: Rows that read weights as streams (`_project_streams`). With Intel's AVX-512 those of two largest tiles (Xeon,
#: float32, 16 rows per expert: olmoe 2 %, qwen3 4 %, Mixtral 4 % faster than with 16; the next, 24 rows: 1 %),
#: elsewhere fewer (Zen 3, 16 rows: 5 to 9 % faster than with 32; Zen 4, olmoe, T = 32: 2 to 4 % faster than with 4,
#: with 16 and 32 up to 5 % slower).
STREAM_ROWS = 32 if LANES == 16 and not ZEN4 else 8
#: Cache lines from which a weight row is worth a stream of its own. Shorter ones lie in small layers,
#: where the time is that of calling tiles (H = 64, F = 128, one token: 1.5 us of a forward of 23).
STREAM_LINES = 24
#: Cache lines from which a block of a weight row is worth asking for the next one: a layer of shorter rows lies in the
#: cache (H = 64, F = 128, one token: 1.2 us of a forward of 15). Where tiles have a single vector, such rows are taken
#: WIDE_COLUMNS at a time (the same layer: EPYC 7 % faster with one token, 15 % with 4; Xeon 4 % and 8 %; 18 and 24
#: columns are slower).
FETCH_LINES = 16
#: Cache lines by which a second request for weights is ahead of the first. Processors of Intel read ahead of a stream
#: whose lines are asked for twice within the same page of 4 KiB (Xeon, one core, six streams: 17 GB/s if each line is
#: asked for a page before it is needed, 18.4 if it has been 8 lines earlier, too; 12 and 16 lines are slower). Zen 4
#: gains by more (olmoe, one core, T = 1 and 16: 3 to 8 % faster than with 8 lines, 16 like 12), and also with many rows
#: (9 to 16 rows per expert: 1 to 5 % faster than if asked once).
REPEAT_LINES = 12 if ZEN4 else 8
#: Cache lines from the end of one stream's requests to the next one's, so that streams come to the end of a page one
#: after the other: there the processor has to find each of them anew (Xeon, float32, T = 1 and 4: 5 and 6 % faster;
#: Zen 4, olmoe, one core, T = 1 and 16: 4 to 10 %).
SKEW_LINES = 6
#: Columns of a tile of outer products.
OUTER_COLUMNS = len(OUTER) * LANES
#: Cache lines by which a stream of transposed weights is asked for in advance (Zen 4, gpt-oss, one core: 8, 12 and 16
#: are alike).
OUTER_AHEAD = 12
#: Rows of transposed weights that meet all columns of a piece of work before the next, for several tiles of activations
#: and for a single one of more than a group. Each row is a stream, and sums are loaded and stored once for all of them
#: (Zen 3, gpt-oss, float32: a single tile is 16 to 28 % faster with 16 rows than with 32, T = 512 a sixth faster with
#: 128 than with 32; with 192 it is 5 % faster still, T = 128 6 % slower. Zen 4, one core, 48 and 96 rows: 16 and 18 %
#: faster with 192 than with 32, 3 % than with 128; a single tile of bfloat16 is 10 % faster with 48 than with 32, of
#: float32 1 %, and with 64 up to 4 % slower).
OUTER_BLOCK, ONE_TILE_BLOCK = (192, 48) if LANES == 16 else (128, 16)


@inline
def groups_of(rows):
    """Groups of GROUP_ROWS rows, the last of which may not be whole."""
    return (rows + GROUP_ROWS - 1) // GROUP_ROWS


@inline
def tiles_of(rows):
    """Rows of a block, tiles, groups of the smaller tiles, and how many these are; the others have one group more."""
    groups = groups_of(rows)
    tiles = (groups + TILE_VECTORS - 1) // TILE_VECTORS
    fewest = groups // tiles
    return rows, tiles, fewest, tiles * (fewest + 1) - groups


@inline
def tile_of(parts, t):
    """First row of tile t of a block, its vectors, its rows, and rows of it as it is packed: whole groups, or one.

    parts: of the block, as `tiles_of` gives them.
    """
    rows, _, fewest, smaller = parts
    first = (t * fewest + max(0, t - smaller)) * GROUP_ROWS
    vectors = fewest + (1 if t >= smaller else 0)
    size = 1 if rows == 1 else vectors * GROUP_ROWS
    return first, vectors, min(size, rows - first), size


@helper
def pack(x, width, row_ids, rows, start, end, packed, stride, w):
    """Values start <= k < end of `rows` activation rows, as `project` reads them beside weights like those at `w`.

    Zeros fill up the last group, but of a single row.

    x        row i begins at x[i * width]
    row_ids  (rows,) int64 row of `x` for each of the block's
    start    a multiple of LANES
    packed   row r begins at packed[r * stride], were it alone; a tile's rows lie mixed (simd/tile.py)
    """
    step, zero = step_size(packed), splat(np.float32(0.0))
    parts = tiles_of(rows)
    for t in range(parts[1]):
        first, _, height, size = tile_of(parts, t)
        tile = offset(packed, first * stride)
        for k in range(start, end, LANES):
            n = min(LANES, width - k)
            for r in range(height):
                token = element(row_ids, first + r) * width
                store_operand(load(x, token + k, n), tile, k * size + r * step, size, n, w)
            for r in range(height, size):
                store_operand(zero, tile, k * size + r * step, size, n, w)


@helper
def _tile(a, shape, w, columns_at, length, fetch, first, out, out_stride, apart, n):
    """One tile over one block of K: out = its dot products if `first`, else out += them.

    fetch: (place, stride, rows, again). Meanwhile asks for the `length` values at w[place], w[place + stride], ..., as
    many times as `rows`, and if `again` is not 0, at the same time for those at w[place + again], ...
    """
    place, stride, rows, again = fetch
    tile = zero_tile(shape, columns_at)
    step, line = step_size(a), line_size(w)
    whole = length - length % line
    for k in range(0, whole, line):
        prefetch_rows(w, place + k, stride, rows)
        if again > 0:
            prefetch_rows(w, place + again + k, stride, rows)
        tile = dot_line(tile, a, shape, w, columns_at, k)
    for k in range(whole, length, step):
        tile = dot_step(tile, a, shape, w, columns_at, k, length - k)
    store_sums(tile, shape, columns_at, first, out, out_stride, apart, n)


@helper
def _strip(a, stride, parts, k, w, columns_at, n, size, fetch, first, out, out_stride, apart):
    """All rows against n weight rows over one block of K.

    parts  of the block of rows, as `tiles_of` gives them
    fetch  (place, stride, rows, again) of the weights that are asked for meanwhile; each tile takes its share of
           the rows (olmoe, T = 64: 18 % faster in float32, 32 % in bfloat16)
    apart  from the output of one column of the tile to the next
    """
    tiles = parts[1]
    place, fetch_stride, fetched, again = fetch
    if size < FETCH_LINES * line_size(w):
        fetched = 0
    for t in range(tiles):
        share, fetch_end = 0, fetched
        if tiles > 1 and fetched > 0:  # a division takes as long as a sixth of a small layer's tile
            share, fetch_end = t * fetched // tiles, (t + 1) * fetched // tiles
        ahead = (place + share * fetch_stride, fetch_stride, fetch_end - share, again)
        row, vectors, height, _ = tile_of(parts, t)
        # Rows that are not there cost nothing in a last group of one or two (Zen 4, 13 and 14 rows: 17 and 12 % faster;
        # Mixtral, T = 64 and 512: 5 and 1 to 2 %; qwen3, T = 512: 2 %). A tile of one or two vectors waits for loading
        # weights and has no use for it (5 and 6 rows: 1 and 12 % slower). With AVX2 an odd number is 3 to 5 % faster.
        last = height % GROUP_ROWS
        x = offset(a, row * stride + k * vectors * GROUP_ROWS)
        y = offset(out, row * out_stride)
        if vectors == 1:
            _tile(x, WHOLE[0], w, columns_at, size, ahead, first, y, out_stride, apart, n)
        elif vectors == 2:
            _tile(x, WHOLE[1], w, columns_at, size, ahead, first, y, out_stride, apart, n)
        elif vectors == 3:
            if last == 1:
                _tile(x, ONE_LAST[2], w, columns_at, size, ahead, first, y, out_stride, apart, n)
            elif last == 2:
                _tile(x, TWO_LAST[2], w, columns_at, size, ahead, first, y, out_stride, apart, n)
            else:
                _tile(x, WHOLE[2], w, columns_at, size, ahead, first, y, out_stride, apart, n)
        elif last == 1:
            _tile(x, ONE_LAST[3], w, columns_at, size, ahead, first, y, out_stride, apart, n)
        elif last == 2:
            _tile(x, TWO_LAST[3], w, columns_at, size, ahead, first, y, out_stride, apart, n)
        else:
            _tile(x, WHOLE[3], w, columns_at, size, ahead, first, y, out_stride, apart, n)


@helper
def _project_streams(a, stride, parts, w, columns, length, block, out, out_stride):
    """`project` of few rows, for which the time is that of reading the weights.

    A tile's weight rows are as far apart as possible. So each is a stream that goes on with the row behind it, and the
    processor reads ahead of it from row to row (Xeon, olmoe, float32, T = 1, 4, 16: 7 to 12 % faster than tiles of
    adjacent rows; Zen 4, olmoe, one core, T = 1: 14 % in float32, 20 % in bfloat16). A single tile of rows asks for
    what it needs soon; several share what all of them need next.
    """
    apart = (columns + TILE_COLUMNS - 1) // TILE_COLUMNS
    w_stride = apart * length
    soon, skew = REPEAT_LINES * line_size(w), SKEW_LINES * line_size(w)
    for j in range(apart):
        n = min(TILE_COLUMNS, (columns - j + apart - 1) // apart)
        columns_at = clamped_offsets(w_stride, n - 1)
        for k in range(0, length, block):
            size = min(block, length - k)
            place, fetch_stride = (soon, w_stride + skew) if parts[1] == 1 else (size, w_stride)
            fetch = (place, fetch_stride, TILE_COLUMNS, soon)
            v, y = offset(w, j * length + k), offset(out, j)
            _strip(a, stride, parts, k, v, columns_at, n, size, fetch, k == 0, y, out_stride, apart)


@helper
def _project_row(a, w, columns, length, block, out):
    """`project` of a single row, by weight rows in ROW_COLUMNS streams.

    Half as many instructions as a tile has let the processor look far enough ahead. Then Zen 4 reads as fast as it can
    without requests (olmoe and qwen3, T = 1 and 4: 4 to 7 % faster than tiles with their requests; with requests in
    here the same or slower). Others have those of `_project_streams`, because nobody compared it there.
    """
    apart = (columns + ROW_COLUMNS - 1) // ROW_COLUMNS
    w_stride = apart * length
    line = line_size(w)
    soon, ahead = REPEAT_LINES * line, w_stride + SKEW_LINES * line
    fetched = 0 if ZEN4 or length < FETCH_LINES * line else ROW_COLUMNS
    for j in range(apart):
        n = min(ROW_COLUMNS, (columns - j + apart - 1) // apart)
        columns_at = clamped_offsets(w_stride, n - 1)[:ROW_COLUMNS]
        for start in range(0, length, block):
            size = min(block, length - start)
            x, v = offset(a, start), offset(w, j * length + start)
            sums = zero_row(x, v)
            whole = size - size % line
            for k in range(0, whole, line):
                prefetch_rows(v, soon + k, ahead, fetched)
                prefetch_rows(v, 2 * soon + k, ahead, fetched)
                sums = row_dot_line(sums, x, v, columns_at, k)
            for k in range(whole, size, step_size(w)):
                sums = row_dot_block(sums, x, v, columns_at, k, size - k)
            store_row(sums, columns_at, start == 0, offset(out, j), apart, n)


@helper
def _project_short(a, w, columns, length, out, out_stride):
    """`project` of a group of rows and short weight rows, for which the time is that of calling tiles: wide ones."""
    nothing = (0, 0, 0, 0)
    for j in range(0, columns - WIDE_COLUMNS + 1, WIDE_COLUMNS):
        v, y = offset(w, j * length), offset(out, j)
        _tile(a, WHOLE[0], v, wide_offsets(length), length, nothing, True, y, out_stride, 1, WIDE_COLUMNS)
    for j in range(columns // WIDE_COLUMNS * WIDE_COLUMNS, columns, TILE_COLUMNS):
        n = min(TILE_COLUMNS, columns - j)
        v, y = offset(w, j * length), offset(out, j)
        _tile(a, WHOLE[0], v, clamped_offsets(length, n - 1), length, nothing, True, y, out_stride, 1, n)


@helper
def project(a, stride, rows, w, w_stride, columns, length, then, out, out_stride):
    """out[r, j] = row r of a . w[j] for r < rows (at most ROW_BLOCK) and j < columns.

    Rows meet some weight rows at a time, a block of K after the other, while the next are fetched. How many, and which
    ones, adjacent or far apart, depends on the number of rows; a row's values do not.

    All but the integers are pointers:

    a           activations of the block, from `pack`
    stride      values in a packed row
    w           weights; row j begins at w[j * length]
    w_stride    equal to length; an argument because `project_transposed` has it
    length      values summed
    then        offset from `w` to the weights of the next call, which many rows ask for in advance
    out         row r begins at out[r * out_stride]; may be written up to the end of the last group of GROUP_ROWS rows
    """
    line, block = line_size(w), BLOCK_STEPS * step_size(a)
    short, long = length < FETCH_LINES * line, length >= STREAM_LINES * line
    if rows == 1:
        _project_row(a, w, columns, length, block, out)
        return
    if rows <= GROUP_ROWS and short:
        _project_short(a, w, columns, length, out, out_stride)
        return
    parts = tiles_of(rows)
    size = groups_of(rows) * GROUP_ROWS
    again = REPEAT_LINES * line if ZEN4 else 0
    span = max(1, PASS_LINES * line_size(a) // (size * block)) * block
    if rows <= STREAM_ROWS and long and span >= length:
        _project_streams(a, stride, parts, w, columns, length, block, out, out_stride)
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
                depth = min(block, end - k)
                at = j * length + k
                # Whole weight rows lie end to end and are fetched in that order, as long as they are:
                # the processor recognises the stream and reads ahead of it.
                if span < length:
                    fetch = (ahead + k - start - at, length, TILE_COLUMNS, 0)
                else:
                    fetch = (ahead + TILE_COLUMNS * k - at, depth, TILE_COLUMNS, again)
                n = min(TILE_COLUMNS, columns - j)
                v, y, columns_at = offset(w, at), offset(out, j), clamped_offsets(length, n - 1)
                # Not a literal 1, for which Numba compiles all tiles again (2 s of a float32 layer's first call).
                _strip(a, stride, parts, k, v, columns_at, n, depth, fetch, k == 0, y, out_stride, np.int64(1))


@helper
def _outer_tile(a, packed, rows, vectors, w, w_stride, length, fetch, first, out, out_stride, n):
    """One tile over one block of K: out = its sums if `first`, else out += them.

    packed  rows of the packed tile that its `rows` are a part of
    fetch   (place, start, end). Meanwhile asks for as many columns of the weights at w[place], for start <= k < end
    """
    place, start, end = fetch
    tile = load_outer(rows, vectors, first, out, out_stride, n)
    run, step, width = step_size(a), outer_step_size(a, w), len(vectors) * LANES
    whole = length - length % run if n == width else 0
    for k in range(0, whole, run):
        tile = outer_run(tile, offset(a, k * packed), vectors, offset(w, k * w_stride), w_stride)
        if start <= k < end:
            for at in range(0, width, line_size(w)):
                prefetch_rows(w, place + k * w_stride + at, w_stride, run)
    for k in range(whole, length, step):
        x = offset(a, k // run * run * packed + k % run)
        tile = outer_step(tile, x, vectors, offset(w, k * w_stride), w_stride, n, length - k)
    store_outer(tile, vectors, out, out_stride, n)


@inline
def _after(at, j, k, w_stride, columns, length, width, block, then):
    """Offset of the weights that a tile at column j and row k asks for: those of the tile after it."""
    if j + width < columns:
        return at + width
    if k + block < length:
        return (k + block) * w_stride
    return then


@helper
def _few_tile(a, rows, w, w_stride, size, place, first, out, out_stride, n):
    """`_outer_tile` of all rows of a packed tile and of a cache line of columns, the first n of which are there.

    place  of the cache line that is asked for in each of `size` rows of weights
    """
    vectors = line_vectors(w)
    if size == OUTER_ROWS and n == len(vectors) * LANES:
        tile = load_outer(rows, vectors, first, out, out_stride, n)
        prefetch_rows(w, place, w_stride, OUTER_ROWS)
        store_outer(outer_block(tile, a, vectors, w, w_stride), vectors, out, out_stride, n)
    else:
        fetch = (place, np.int64(0), size)
        _outer_tile(a, np.int64(len(rows)), rows, vectors, w, w_stride, size, fetch, first, out, out_stride, n)


@helper
def _project_few(a, rows, w, w_stride, columns, length, then, out, out_stride):
    """`project_transposed` of a group of rows, or of a single one, for which the time is that of reading the weights.

    OUTER_ROWS rows of weights are streams along their columns, and go on with the rows behind them. Sums wait in `out`.
    """
    width, height = line_size(w), tile_of(tiles_of(rows), 0)[3]
    for k in range(0, length, OUTER_ROWS):
        size, x = min(OUTER_ROWS, length - k), offset(a, k * height)
        behind = (k + OUTER_ROWS) * w_stride if k + OUTER_ROWS < length else then
        for j in range(0, columns, width):
            at, ahead = k * w_stride + j, j + OUTER_AHEAD * width
            ahead += k * w_stride if ahead < columns else behind - columns
            n = min(width, columns - j)
            v, y = offset(w, at), offset(out, j)
            if rows == 1:
                _few_tile(x, ONE_ROW, v, w_stride, size, ahead - at, k == 0, y, out_stride, n)
            else:
                _few_tile(x, GROUPS[0], v, w_stride, size, ahead - at, k == 0, y, out_stride, n)


@helper
def project_transposed(a, stride, rows, w, w_stride, columns, length, then, out, out_stride):
    """out[r, j] = sum over k of value k of row r of a * w[k, j], for r < rows and j < columns.

    As `project`, but row k of the weights begins at w[k * w_stride], and its columns lie side by side.
    """
    if rows <= GROUP_ROWS:
        _project_few(a, rows, w, w_stride, columns, length, then, out, out_stride)
        return
    parts = tiles_of(rows)
    run = step_size(a)
    block = OUTER_BLOCK if parts[1] > 1 else ONE_TILE_BLOCK
    for k in range(0, length, block):
        size = min(block, length - k)
        for j in range(0, columns, OUTER_COLUMNS):
            at = k * w_stride + j
            ahead = _after(at, j, k, w_stride, columns, length, OUTER_COLUMNS, block, then)
            n = min(OUTER_COLUMNS, columns - j)
            v = offset(w, at)
            fetched = np.int64(0)  # a literal would be one more type of tile to compile
            for t in range(parts[1]):
                row, vectors, _, height = tile_of(parts, t)
                for group in range(0, vectors, OUTER_GROUPS):
                    count, first = min(OUTER_GROUPS, vectors - group), row + group * GROUP_ROWS
                    x = offset(a, row * stride + k * height + group * GROUP_ROWS * run)
                    y = offset(out, first * out_stride + j)
                    # Each tile asks for its share of the rows.
                    start, done = fetched, first // GROUP_ROWS + count
                    fetched = size * done // groups_of(rows)
                    fetch = (ahead - at, start, fetched)
                    if count == 1:
                        _outer_tile(x, height, GROUPS[0], OUTER, v, w_stride, size, fetch, k == 0, y, out_stride, n)
                    elif count == 2:
                        _outer_tile(x, height, GROUPS[1], OUTER, v, w_stride, size, fetch, k == 0, y, out_stride, n)
                    elif count == 3:
                        _outer_tile(x, height, GROUPS[2], OUTER, v, w_stride, size, fetch, k == 0, y, out_stride, n)
                    else:
                        _outer_tile(x, height, GROUPS[3], OUTER, v, w_stride, size, fetch, k == 0, y, out_stride, n)
