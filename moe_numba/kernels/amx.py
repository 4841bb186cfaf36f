"""The experts' forward on a matrix unit (simd/amx.py): bfloat16 weights as stored, [out, in].

The same steps as experts.py, with another unit of work: 2 strips of 16 weight rows times groups of 16 tokens
(rows of one expert). The loop over K is in `_tile`. A product has weights on the left, so a group's values lie side
by side, and hidden values are already in the order in which the second projection wants them.
"""

from typing import NamedTuple

import numpy as np
from numba import prange

from .._jit import helper, inline, kernel
from ..simd.amx import (
    CONFIGURATIONS,
    DEPTH,
    PACKED_TILE,
    SUMS,
    TILE,
    begin_sums,
    configure_tiles,
    copy_shorts,
    multiply_step,
    pack_pairs,
    release_tiles,
    store_pairs,
    store_sums,
    store_tokens,
)
from ..simd.atomic import take_next
from ..simd.tile import prefetch
from ..simd.vector import load, offset, pointer, splat
from .activations import activate, gated
from .experts import (
    Form,
    Weights,
    add_outputs,
    bias_of,
    block_after,
    output_columns,
    start_sums,
    take_columns,
    write_sums,
)
from .plan import MOST_COLUMNS, PIECES, Rows, columns_per_piece, most_rows, piece

#: Rows that share one pass over the weights: with 512, Mixtral reads them once for 2,048 tokens.
ROW_BLOCK = 512
#: Values of tokens per pass over the weights: 1.25 MiB of a second-level cache of 2 MiB (320 tokens of H = 2048), while
#: the weights stream past. Only what does not fit takes K in several passes, of equal length: rows in pieces come from
#: memory at half the speed (olmoe, T = 512: the first projection took 95 ms on one thread instead of 54; T = 2048,
#: about 256 tokens per expert: 70 ms with 1 MiB, 64 with this).
PASS_VALUES = 5 * 2**17
#: Runs of weight rows that are fetched side by side, of either half. One sequence of lines was read at 76 % of the
#: memory's rate, 4 at 81 %, 16 (rows of their own) at 75 % (Xeon, olmoe, T = 16).
STREAMS = 4
#: Values of a weight row, two pages of 4 KiB, from which the processor reads the rows of a pair of strips ahead by
#: itself, if a tile or two of tokens do not keep it waiting. Asking for the next pair was slower then (Xeon, one core,
#: Mixtral, T = 1, first projection: 82 % of the memory's rate, without 87), by far so if two pairs do not fit the
#: second-level cache (second projection: 63 and 85 %). With rows of one page it was 82 and 84 % in memory of large
#: pages, but 2 % slower inside of transformers, whose memory has small ones.
READ_AHEAD = 4096
#: Cache lines of the next weights that are asked for while two hidden values are activated, so that the memory does
#: not rest (olmoe, T = 1, first projection: 83 % of the memory's rate, with 4 lines 84.5 and with 8 86 %).
ACTIVATION_LINES = 8
#: Output columns per piece of work are a multiple of this.
COLUMN_BLOCK = 2 * TILE
#: Output columns of a piece of work, for all tokens, are a multiple of the first number, at most the second.
OUTPUT_BLOCK, OUTPUT_COLUMNS = 2 * COLUMN_BLOCK, 128
#: float32 sums of one thread: 512 KiB of a second-level cache of 2 MiB.
SCRATCH_SIZE = 131072
#: Tiles of tokens that are packed per piece of work.
PACK_STEPS = 32


class AmxWorkspace(NamedTuple):
    """Memory that a forward writes and nobody reads afterwards."""

    tokens: np.ndarray  #: (groups, steps of H * PACKED_TILE) uint16 packed tokens of every row
    hidden: np.ndarray  #: (groups, steps of F * PACKED_TILE) uint16 packed hidden values
    sums: np.ndarray  #: (threads, T output columns) float32, as of experts.Workspace
    scratch: np.ndarray  #: (threads, SCRATCH_SIZE) float32, sums of tiles
    outputs: np.ndarray  #: (threads, TILE output columns) float32 of a group of rows
    tails: np.ndarray  #: (threads, 2 TILE DEPTH) uint16, ends of weight rows
    counters: np.ndarray  #: (2,) int64


class Strips(NamedTuple):
    """Where an expert's weight rows lie: offsets in values."""

    second: int  #: from strip 0 of a pair of strips to strip 1
    row: int  #: from a row of a strip to the next
    pair: int  #: from a pair of strips to the next
    columns: int  #: hidden or output columns of a pair: TILE if it is gate and up, else 2 TILE


@kernel
def experts_forward_amx(x, weights, form, transposed, rows, topk_weights, used, space, y):
    """`experts_forward` (experts.py) of bfloat16 weights, with transposed None; space is an AmxWorkspace."""
    w = Weights(*weights)  # one by one: Numba does not find the classes of those unpacked together
    f = Form(*form)
    r = Rows(*rows)
    s = AmxWorkspace(*space)
    threads = s.scratch.shape[0]
    s.counters[:] = 0
    steps = s.tokens.shape[1] // PACKED_TILE
    shares = (steps + PACK_STEPS - 1) // PACK_STEPS
    for item in prange(r.n_blocks * shares):
        block = np.int64(item) // shares
        first_step = np.int64(item) % shares * PACK_STEPS
        _pack(x, r, block, first_step, min(first_step + PACK_STEPS, steps), s)
    for worker in prange(threads):
        _up_projection(w, f, r, s, np.int64(worker))
    for worker in prange(threads):
        _down_projection(w, r, topk_weights, used, s, y, np.int64(worker))


@inline
def groups_of(rows):
    """Groups of TILE that so many rows fill."""
    return (rows + TILE - 1) // TILE


@helper
def _pack(x, rows, block, first_step, end_step, space):
    """Pack steps of the tokens of a block. A group that is not full repeats the block's last row."""
    width = x.shape[1]
    first, end, group = rows.blocks[block, 1], rows.blocks[block, 2], rows.blocks[block, 3]
    for start in range(first, end, TILE):
        row_ids, last = pointer(rows.row_token, start), min(TILE, end - start) - 1
        for step in range(first_step, end_step):
            packed = pointer(space.tokens, group * space.tokens.shape[1] + step * PACKED_TILE)
            pack_pairs(pointer(x, 0), width, row_ids, last, step * DEPTH, packed)
        group += 1


@inline
def configure(rows0, rows1):
    """Strips 0 and 1 have so many rows from now on."""
    configure_tiles(pointer(CONFIGURATIONS, (rows0 * (TILE + 1) + rows1) * 64))


@helper
def _tile(w, second, stride, strip_rows, length, tokens, tokens_at, fetch, first, out, out_at, tails):
    """2 strips times the groups at `tokens_at`, over `length` values of K: out = the sums if `first`, else out += them.

    fetch: (offset, offset of the second half, per step, streams of each half, per stream, lines of each per step) of
    what is asked for meanwhile.
    """
    begin_sums(first, out, SUMS, TILE, out_at)
    near, far, per_step, streams, per_stream, lines = fetch
    whole = length - length % DEPTH
    for k in range(0, whole, DEPTH):
        multiply_step(offset(w, k), second, stride, offset(tokens, k * TILE), DEPTH, tokens_at)
        for stream in range(streams):
            for line in range(lines):
                at = stream * per_stream + line * DEPTH
                prefetch(w, near + at)
                prefetch(w, far + at)
        near += per_step
        far += per_step
    if whole < length:  # a step must not read on into the next row: 0 times what is there may be NaN
        for strip in range(2):
            for r in range(strip_rows[strip]):
                copy_shorts(w, strip * second + r * stride + whole, length - whole, tails, (strip * TILE + r) * DEPTH)
        multiply_step(tails, TILE * DEPTH, DEPTH, offset(tokens, whole * TILE), DEPTH, tokens_at)
    store_sums(out, SUMS, TILE, out_at)


@inline
def _reads_ahead(groups, length):
    """Whether the processor reads weights of so many values a row ahead by itself."""
    return groups <= 2 and length >= READ_AHEAD


@inline
def _strip_rows(strips, columns):
    """Rows of both strips of a pair of which `columns` columns exist, and the offset from one to the other."""
    rows0 = min(columns, TILE)
    if strips.columns == TILE:
        return rows0, rows0, strips.second
    if columns <= TILE:  # there is no second strip: take the first one twice
        return rows0, rows0, 0
    return rows0, min(columns - TILE, TILE), strips.second


@helper
def _multiply(w, strips, columns, length, then, tokens, tokens_stride, groups, out, tails):
    """out[pair of strips, group, strip, row, token] = products of an expert's weights from `w` on.

    A pair of strips meets all groups before the next pair, whose rows are fetched meanwhile, each tile its share.
    The more groups, the more weights come from the second-level cache. The first-level cache holds neither
    operand of a whole row; smaller blocks of K in which it would were slower, because sums then come and go.

    columns  that exist, of all strips
    length   values summed
    then     offset from `w` to the weights of the next call
    tokens   packed; a group begins every tokens_stride values
    """
    pairs = (columns + strips.columns - 1) // strips.columns
    steps = (length + DEPTH - 1) // DEPTH
    most = max(1, PASS_VALUES // (groups * TILE * DEPTH))
    passes = (steps + most - 1) // most
    depth = (steps + passes - 1) // passes * DEPTH
    for k in range(0, length, depth):
        size = min(depth, length - k)
        for p in range(pairs):
            at = p * strips.pair + k
            rows0, rows1, second = _strip_rows(strips, columns - p * strips.columns)
            after = k + depth if k + depth < length else then  # the last pair
            ahead = strips.pair if p + 1 < pairs else after - at
            partial = rows0 < TILE or rows1 < TILE
            if partial:
                configure(rows0, rows1)
            for group in range(0, groups, 2):
                row = TILE * group // groups
                rows = TILE * min(group + 2, groups) // groups - row
                if _reads_ahead(groups, length):
                    fetch = (0, 0, 0, 0, 0, 0)
                elif size == length:  # whole rows lie end to end, those of gate and up in two places
                    near = ahead + row * length
                    far = near + (strips.second if strips.pair == TILE * length else TILE * length)
                    streams = min(rows, STREAMS)
                    lines = rows // max(1, streams)
                    fetch = (near, far, lines * DEPTH, streams, lines * length, lines)
                else:
                    near = ahead + row * strips.row
                    fetch = (near, near + strips.second, DEPTH, rows, strips.row, 1)
                v = offset(w, at)
                t = offset(tokens, group * tokens_stride + k * TILE)
                c = offset(out, (p * groups + group) * 2 * SUMS)
                strip_rows = (rows0, rows1)
                if group + 1 < groups:
                    tokens_at, out_at = (0, tokens_stride), (0, 2 * SUMS)
                    _tile(v, second, strips.row, strip_rows, size, t, tokens_at, fetch, k == 0, c, out_at, tails)
                else:
                    _tile(v, second, strips.row, strip_rows, size, t, (0,), fetch, k == 0, c, (0,), tails)
            if partial:
                configure(TILE, TILE)


@inline
def _sums_of(strips, groups, column, group):
    """Where `_multiply` leaves a column's sums for the tokens of a group; if gated the gate's, then up's."""
    pair, rest = column // strips.columns, column % strips.columns
    return ((pair * groups + group) * 2 + rest // TILE) * SUMS + rest % TILE * TILE


@helper
def _up_projection(weights, form, rows, space, worker):
    """hidden[r] = act(gate(r)) * up(r), or act(up(r)), until no piece of work is left."""
    height, width = weights.up.shape[1:]
    hidden_dim = height // 2 if form.gated else height
    if not form.gated:
        strips, run = Strips(TILE * width, width, 2 * TILE * width, 2 * TILE), 1
    elif form.interleaved:
        strips, run = Strips(width, 2 * width, 2 * TILE * width, TILE), 2
    else:
        strips, run = Strips(hidden_dim * width, width, TILE * width, TILE), 1
    held = SCRATCH_SIZE // (groups_of(most_rows(rows)) * TILE * (2 if form.gated else 1))
    pieces = PIECES * space.scratch.shape[0]
    column_block = columns_per_piece(rows, hidden_dim, pieces, min(held, MOST_COLUMNS), COLUMN_BLOCK)
    column_blocks = (hidden_dim + column_block - 1) // column_block
    stride = space.tokens.shape[1]
    sums = pointer(space.scratch, worker * space.scratch.shape[1])
    tails = pointer(space.tails, worker * space.tails.shape[1])

    configure(TILE, TILE)
    items = rows.n_blocks * column_blocks
    next_item = take_next(pointer(space.counters, 0), 0)
    while next_item < items:
        item = next_item
        next_item = take_next(pointer(space.counters, 0), 0)
        expert, first, end, group, column = piece(rows, item, column_blocks, column_block)
        columns = min(column_block, hidden_dim - column)
        here = (expert * height + column * run) * width
        next_expert, _, _, _, next_column = piece(rows, min(next_item, items - 1), column_blocks, column_block)
        then = (next_expert * height + next_column * run) * width
        w, tokens = pointer(weights.up, here), pointer(space.tokens, group * stride)
        groups = groups_of(end - first)
        _multiply(w, strips, columns, width, then - here, tokens, stride, groups, sums, tails)
        # What comes next, but for the pair of strips that has been asked for.
        ahead = offset(w, then - here + (0 if _reads_ahead(groups, width) else strips.pair))
        for g in range(groups):
            hidden = pointer(space.hidden, (group + g) * space.hidden.shape[1])
            _activate_group(sums, strips, groups, g, weights, form, expert, column, columns, hidden, ahead)
            if column + columns == hidden_dim:  # what is behind it must not be NaN
                zero = splat(np.float32(0.0))
                for f in range((hidden_dim + 1) // 2 * 2, space.hidden.shape[1] // TILE, 2):
                    store_pairs(zero, zero, hidden, f * TILE)
    release_tiles()


@helper
def _activate_group(sums, strips, groups, g, weights, form, expert, column, columns, hidden, ahead):
    """Bias, activation and gating of a piece of work for one group of rows; the first asks for the weights `ahead`."""
    for i in range(0, columns, 2):
        if g == 0:
            for line in range(ACTIVATION_LINES):
                prefetch(ahead, (i // 2 * ACTIVATION_LINES + line) * DEPTH)
        value = _activated(sums, strips, groups, g, weights, form, expert, column, i)
        following = splat(np.float32(0.0))
        if i + 1 < columns:
            following = _activated(sums, strips, groups, g, weights, form, expert, column, i + 1)
        store_pairs(value, following, hidden, (column + i) * TILE)


@inline
def _activated(sums, strips, groups, g, weights, form, expert, column, i):
    """Hidden value `column + i` of a group's rows."""
    at = _sums_of(strips, groups, i, g)
    biased = weights.up_bias.shape[0] > 0
    f = column + i
    if not form.gated:
        x = load(sums, at, TILE)
        if biased:
            x = x + splat(weights.up_bias[expert, f])
        return activate(form.code, x)
    gate, up = load(sums, at, TILE), load(sums, at + SUMS, TILE)
    if biased:
        hidden_dim = weights.up_bias.shape[1] // 2
        gate = gate + splat(weights.up_bias[expert, 2 * f if form.interleaved else f])
        up = up + splat(weights.up_bias[expert, 2 * f + 1 if form.interleaved else hidden_dim + f])
    return gated(form.code, gate, up, np.float32(form.limit), np.float32(form.alpha), np.float32(form.beta))


@helper
def _down_projection(weights, rows, topk_weights, used, space, y, worker):
    """y[t] = sum of topk_weights[slot] * (hidden[r] @ down.T + bias) over t's rows, until no columns are left."""
    output_dim, hidden_dim = weights.down.shape[1:]
    strips = Strips(TILE * hidden_dim, hidden_dim, 2 * TILE * hidden_dim, 2 * TILE)
    stride = space.hidden.shape[1]
    width = output_columns(space, used)
    tiles = pointer(space.scratch, worker * space.scratch.shape[1])
    tails = pointer(space.tails, worker * space.tails.shape[1])
    outputs = pointer(space.outputs, worker * space.outputs.shape[1])
    sums = pointer(space.sums, worker * space.sums.shape[1])

    configure(TILE, TILE)
    next_column, next_columns = take_columns(space, used, output_dim, OUTPUT_BLOCK)
    while next_columns > 0:
        column, columns = next_column, next_columns
        next_column, next_columns = take_columns(space, used, output_dim, OUTPUT_BLOCK)
        start_sums(topk_weights, used, sums, width)
        for block in range(rows.n_blocks):
            expert, first, end = rows.blocks[block, 0], rows.blocks[block, 1], rows.blocks[block, 2]
            following, following_column = block_after(rows, block, column, next_column)
            here = (expert * output_dim + column) * hidden_dim
            then = (following * output_dim + following_column) * hidden_dim - here
            hidden = pointer(space.hidden, rows.blocks[block, 3] * stride)
            groups = groups_of(end - first)
            _multiply(
                pointer(weights.down, here), strips, columns, hidden_dim, then, hidden, stride, groups, tiles, tails
            )
            bias = bias_of(weights.down_bias, expert, column)
            for g in range(groups):
                for i in range(0, columns, TILE):
                    store_tokens(offset(tiles, _sums_of(strips, groups, i, g)), offset(outputs, i), width)
                start = first + g * TILE
                add_outputs(outputs, width, rows, start, min(start + TILE, end), columns, topk_weights, bias, sums)
        write_sums(sums, width, columns, column, y)
    release_tiles()
