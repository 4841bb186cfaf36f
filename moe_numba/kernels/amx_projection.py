"""Matrix products on a matrix unit (simd/amx.py) with bfloat16 weights as they are stored, [out, in].

The counterpart of projection.py. Weights are the first operand, 8 or 16 rows at a time as they lie in memory, and
tokens the second one, packed, in groups of 16. A product has weights on the left, so the sums of a group lie side by
side, where `sums_of` says. The loop over K is in `_stream_tile` and `_pair_tile`.
"""

from typing import NamedTuple

from .._jit import helper, inline
from ..simd.amx import (
    CONFIGURATIONS,
    DEPTH,
    SUMS,
    TILE,
    begin_sums,
    configure_tiles,
    copy_shorts,
    multiply_step,
    store_sums,
)
from ..simd.tile import prefetch
from ..simd.vector import load, offset, pointer, store
from .projection import REPEAT_LINES, SKEW_LINES

#: Values of tokens per pass over the weights: 1.25 MiB of a second-level cache of 2 MiB (320 tokens of H = 2048), while
#: the weights stream past. Only what does not fit takes K in several passes, of equal length: rows in pieces come from
#: memory at half the speed (olmoe, T = 512: the first projection took 95 ms on one thread instead of 54; T = 2048,
#: about 256 tokens per expert: 70 ms with 1 MiB, 64 with this).
PASS_VALUES = 5 * 2**17
#: Groups that are few: up to there weights are read as streams (`_multiply_streams`).
STREAM_GROUPS = 2
#: Streams of weights that few groups read side by side, the rows of a tile.
STREAMS = 8
#: Runs of weight rows that are fetched side by side, of either half of a pair of strips. One sequence of lines was read
#: at 76 % of the memory's rate, 4 at 81 %, 16 (rows of their own) at 75 % (Xeon, olmoe, T = 16).
RUNS = 4


class WeightRows(NamedTuple):
    """Where an expert's weight rows lie."""

    projections: int  #: 2 if gated, else 1
    second: int  #: values from the first row of the gate to the first one of up
    row: int  #: values from a row to the next


@inline
def groups_of(rows):
    """Groups of TILE that so many rows fill."""
    return (rows + TILE - 1) // TILE


@inline
def configure(rows0, rows1):
    """Parts 0 and 1 of the first operand have so many rows from now on."""
    configure_tiles(pointer(CONFIGURATIONS, (rows0 * (TILE + 1) + rows1) * 64))


@inline
def _streams_apart(columns):
    """Weight rows from one stream to the next."""
    return (columns + STREAMS - 1) // STREAMS


@inline
def _pair_columns(rows):
    """Columns of a pair of strips, which is of gate and up, or of one after the other."""
    return TILE if rows.projections > 1 else 2 * TILE


@inline
def sums_of(rows, columns, groups, column, group):
    """Where `multiply` leaves a column's sums, and if gated those of up, for the tokens of a group.

    Tile by tile, as they are computed: sums of a tile far apart disturb the reading of weights (one core, K = 2048, 512
    rows: 16.4 GB/s instead of 19.4).
    """
    if groups <= STREAM_GROUPS:
        apart = _streams_apart(columns)
        at = (column % apart * groups + group) * STREAMS + column // apart
        return at * TILE, (at + apart * groups * STREAMS) * TILE
    strip, first = column // TILE, column % TILE * TILE
    pair, second = (strip, 0) if rows.projections > 1 else (strip // 2, strip % 2)
    at = ((pair * groups + group) * 2 + second) * SUMS + first
    return at, at + SUMS


@helper
def tile_of(rows, columns, groups, column, group, sums, tile):
    """Pointer to the sums of TILE columns from `column` on, side by side: where `multiply` left them, or in `tile`."""
    if groups > STREAM_GROUPS:
        return offset(sums, sums_of(rows, columns, groups, column, group)[0])
    for i in range(min(TILE, columns - column)):
        at, _ = sums_of(rows, columns, groups, column + i, group)
        store(load(sums, at, TILE), tile, i * TILE, TILE)
    return tile


@inline
def _copy_ends(w, stride, rows, start, n, tails):
    """The last n values of weight rows, from `start` on, and zeros up to a whole step.

    A step must not read on into the next row: 0 times what is there may be NaN.
    """
    for r in range(rows):
        copy_shorts(w, r * stride + start, n, tails, r * DEPTH)


@helper
def _stream_tile(w, stride, streams, length, tokens, tokens_at, out, out_at, tails):
    """Weight rows `stride` values apart times groups of tokens, while asking for what comes next in each stream."""
    begin_sums(True, out, (0,), TILE, out_at)
    whole = length - length % DEPTH
    soon, apart = REPEAT_LINES * DEPTH, stride + SKEW_LINES * DEPTH
    for k in range(0, whole, DEPTH):
        multiply_step(offset(w, k), (0,), stride, offset(tokens, k * TILE), DEPTH, tokens_at)
        for stream in range(streams):
            at = k + soon + stream * apart
            prefetch(w, at)
            prefetch(w, at + soon)
    if whole < length:
        _copy_ends(w, stride, streams, whole, length - whole, tails)
        multiply_step(tails, (0,), DEPTH, offset(tokens, whole * TILE), DEPTH, tokens_at)
    store_sums(out, (0,), TILE, out_at)


@helper
def _pair_tile(w, second, stride, strip_rows, length, tokens, tokens_at, fetch, first, out, out_at, tails):
    """2 strips times the groups at `tokens_at`, over `length` values of K: out = the sums if `first`, else out += them.

    fetch: (offset, offset of the second half, per step, runs of each half, per run, lines of each per step) of what is
    asked for meanwhile.
    """
    begin_sums(first, out, (0, SUMS), TILE, out_at)
    near, far, per_step, runs, per_run, lines = fetch
    whole = length - length % DEPTH
    for k in range(0, whole, DEPTH):
        multiply_step(offset(w, k), (0, second), stride, offset(tokens, k * TILE), DEPTH, tokens_at)
        for run in range(runs):
            for line in range(lines):
                at = run * per_run + line * DEPTH
                prefetch(w, near + at)
                prefetch(w, far + at)
        near += per_step
        far += per_step
    if whole < length:
        for strip in range(2):
            ends = offset(tails, strip * TILE * DEPTH)
            _copy_ends(offset(w, strip * second), stride, strip_rows[strip], whole, length - whole, ends)
        multiply_step(tails, (0, TILE * DEPTH), DEPTH, offset(tokens, whole * TILE), DEPTH, tokens_at)
    store_sums(out, (0, SUMS), TILE, out_at)


@helper
def multiply(w, rows, columns, length, then, tokens, tokens_stride, groups, out, tails):
    """Products of `columns` columns of an expert's weights, from `w` on, with groups of tokens.

    rows     WeightRows
    length   values summed
    then     offset from `w` to the weights of the next call, which many groups ask for in advance
    tokens   packed; a group begins every tokens_stride values
    out      `sums_of` says where
    tails    scratch for the ends of weight rows
    """
    if groups <= STREAM_GROUPS:
        _multiply_streams(w, rows, columns, length, tokens, tokens_stride, groups, out, tails)
    else:
        _multiply_pairs(w, rows, columns, length, then, tokens, tokens_stride, groups, out, tails)


@helper
def _multiply_streams(w, rows, columns, length, tokens, tokens_stride, groups, out, tails):
    """`multiply` of few groups, for which the time is that of reading the weights.

    A tile's weight rows are as far apart as possible, as in projection.py.
    """
    apart = _streams_apart(columns)
    most = (columns + apart - 1) // apart
    last = columns - (most - 1) * apart  # rows of the last stream
    stride = apart * rows.row
    configured = TILE
    for p in range(rows.projections):
        for j in range(apart):
            streams = most if j < last else most - 1
            if streams != configured:
                configure(streams, TILE)
                configured = streams
            v = offset(w, p * rows.second + j * rows.row)
            y = offset(out, (p * apart + j) * groups * STREAMS * TILE)
            if groups > 1:
                groups_at, out_at = (0, tokens_stride), (0, STREAMS * TILE)
                _stream_tile(v, stride, streams, length, tokens, groups_at, y, out_at, tails)
            else:
                _stream_tile(v, stride, streams, length, tokens, (0,), y, (0,), tails)
    configure(TILE, TILE)


@helper
def _multiply_pairs(w, rows, columns, length, then, tokens, tokens_stride, groups, out, tails):
    """`multiply` of many groups: a pair of strips of 16 weight rows, of gate and up or of 32 columns, meets all groups.

    Then follows the next pair, whose rows are fetched meanwhile, each tile its share. The more groups, the more weights
    come from the second-level cache. The first-level cache holds neither operand of a whole row; smaller blocks of K in
    which it would were slower, because sums then come and go.
    """
    is_gated = rows.projections > 1
    pair_columns = _pair_columns(rows)
    second = rows.second if is_gated else TILE * rows.row
    pairs = (columns + pair_columns - 1) // pair_columns
    steps = (length + DEPTH - 1) // DEPTH
    most = max(1, PASS_VALUES // (groups * TILE * DEPTH))
    passes = (steps + most - 1) // most
    depth = (steps + passes - 1) // passes * DEPTH
    for k in range(0, length, depth):
        size = min(depth, length - k)
        for p in range(pairs):
            at = p * pair_columns * rows.row + k
            left = columns - p * pair_columns
            rows0 = min(left, TILE)
            rows1 = rows0 if is_gated else min(left - TILE, TILE)
            second_at = second
            if rows1 <= 0:  # there is no second strip: take the first one twice
                rows1, second_at = rows0, 0
            after = k + depth if k + depth < length else then  # the last pair
            ahead = pair_columns * rows.row if p + 1 < pairs else after - at
            partial = rows0 < TILE or rows1 < TILE
            if partial:
                configure(rows0, rows1)
            for group in range(0, groups, 2):
                row = TILE * group // groups
                n = TILE * min(group + 2, groups) // groups - row
                if size == length and rows.row == length:  # whole rows lie end to end
                    near = ahead + row * length
                    runs = min(n, RUNS)
                    lines = n // max(1, runs)
                    fetch = (near, near + second, lines * DEPTH, runs, lines * length, lines)
                else:
                    near = ahead + row * rows.row
                    fetch = (near, near + second, DEPTH, n, rows.row, 1)
                v = offset(w, at)
                t = offset(tokens, group * tokens_stride + k * TILE)
                c = offset(out, (p * groups + group) * 2 * SUMS)
                strip_rows, first = (rows0, rows1), k == 0
                if group + 1 < groups:
                    groups_at, out_at = (0, tokens_stride), (0, 2 * SUMS)
                    _pair_tile(v, second_at, rows.row, strip_rows, size, t, groups_at, fetch, first, c, out_at, tails)
                else:
                    _pair_tile(v, second_at, rows.row, strip_rows, size, t, (0,), fetch, first, c, (0,), tails)
            if partial:
                configure(TILE, TILE)
