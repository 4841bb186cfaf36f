"""The experts' forward on a matrix unit (simd/amx.py): bfloat16 weights stored [in, out], as of gpt-oss and Llama 4.

The steps of experts.py. The unit multiplies pairs of neighbours along K, but neighbours in such weights are columns.
So a pair of columns is multiplied with (token, 0) for the sum of the first and with (0, token) for that of the second:
half of the products are with 0, but nothing is repacked, and memory is read in its order (Xeon, 64 experts of H = 2048,
F = 1024: weights brought into the unit's order in scratch were 40 % faster for 2,048 tokens and 40 to 70 % slower for
1 to 64). A token rounded to bfloat16 is (0, token) as a float32, and (token, 0) read two bytes further on.
A weight that is infinite or NaN makes its neighbour's sum NaN, too.

Widths are multiples of WIDTH_UNIT. The loop over K is in `_tile`.
"""

from typing import NamedTuple

import numpy as np
from numba import prange

from .._jit import helper, kernel
from ..simd.amx import TILE, begin_sums, multiply_step, release_tiles, store_sums
from ..simd.atomic import take_next
from ..simd.target import LANES
from ..simd.tile import prefetch
from ..simd.vector import first_in_turn, last_in_turn, load, offset, pointer, shorts, splat, store, store_operand
from .amx_projection import configure, groups_of
from .experts import (
    Form,
    Weights,
    activate_row,
    add_outputs,
    bias_of,
    block_after,
    output_columns,
    start_sums,
    take_columns,
    write_sums,
)
from .plan import Rows, columns_per_piece, most_rows, piece, plan_rows

#: Input, hidden and output width are multiples of this: the columns in a tile of weights.
WIDTH_UNIT = 2 * TILE
#: Columns that a tile of products takes at a time.
COLUMN_BLOCK = 2 * WIDTH_UNIT
#: Rows that share one pass over the weights.
ROW_BLOCK = 512
#: float32 sums of one thread: 512 KiB of a second-level cache of 2 MiB (with those of amx.py, T = 2048, 10 % slower).
SCRATCH_SIZE = 131072
#: Columns of a piece of work of the first projection at most, and pieces of work per thread at least: memory is read
#: faster the more of a row lies in one (one token: 4.9 ms with whole rows of 4 KiB, 5.7 with at most 1.5 KiB).
MOST_COLUMNS, PIECES = 1024, 4
#: Output columns of a piece of work, for all tokens, are a multiple of the first number, at most the second.
OUTPUT_BLOCK, OUTPUT_COLUMNS = COLUMN_BLOCK, 256
#: Values along K per block. All columns of a piece meet a block before the next, so what is asked for ahead are whole
#: rows: with 64, the two blocks lie in the second-level cache (512 KiB; one token: 4.9 ms, with 128 values 5.6).
DEPTH_BLOCK = 64
#: Rows of the next block that are asked for side by side: one took 36 ms, 4 took 34.4 and 8 took 33.7 (16 tokens).
STREAMS = 8


class Fetch(NamedTuple):
    """Weights that a tile asks for: `lines` per step in each of `streams`."""

    at: int  #: offset of the first line
    line: int  #: its number within its row
    row_lines: int  #: lines of a row
    gap: int  #: values between the end of a row and the next row
    lines: int
    streams: int
    apart: int  #: values from a stream to the next


class AmxTransposedWorkspace(NamedTuple):
    """Memory that a forward writes and nobody reads afterwards."""

    tokens: np.ndarray  #: (groups * TILE, stride > H) float32 tokens of every row, rounded to bfloat16, and a 0
    hidden: np.ndarray  #: (groups * TILE, stride > F) float32 hidden values, the same
    sums: np.ndarray  #: (threads, T output columns) float32, as of experts.Workspace
    scratch: np.ndarray  #: (threads, SCRATCH_SIZE) float32: gate and up, or outputs, of a block of rows
    plan: np.ndarray  #: (1, as much as `plan_rows` needs) int64
    counters: np.ndarray  #: (2,) int64


@kernel
def experts_forward_amx_transposed(x, weights, form, products, indices, topk_weights, used, space, y):
    """`experts_forward` of bfloat16 weights, with its own products; space is an AmxTransposedWorkspace."""
    w = Weights(*weights)  # one by one: Numba does not find the classes of those unpacked together
    f = Form(*form)
    s = AmxTransposedWorkspace(*space)
    r = Rows(*plan_rows(indices, used, w.up.shape[0], ROW_BLOCK, TILE, s.plan[0]))
    threads = s.scratch.shape[0]
    s.counters[:] = 0
    for block in prange(r.n_blocks):
        _encode(x, w, r, np.int64(block), s)
    for worker in prange(threads):
        _up_projection(w, f, r, s, np.int64(worker))
    for worker in prange(threads):
        _down_projection(w, r, topk_weights, used, s, y, np.int64(worker))
    return r.invalid


@helper
def _encode(x, weights, rows, block, space):
    """The tokens of a block, rounded to bfloat16."""
    width = x.shape[1]
    first, end, group = rows.blocks[block, 1], rows.blocks[block, 2], rows.blocks[block, 3]
    for r in range(first, end):
        token = pointer(x, rows.row_token[r] * width)
        row = pointer(space.tokens, (group * TILE + r - first) * space.tokens.shape[1])
        for i in range(0, width, LANES):
            store_operand(load(token, i, LANES), row, i, 1, LANES, pointer(weights.up, 0))
        store(splat(np.float32(0.0)), row, width, LANES)


@helper
def _tile(tokens, stride, w, w_stride, columns_at, length, fetch, first, out, out_stride):
    """A group times WIDTH_UNIT columns from each of `columns_at` on, over `length` values of K.

    out = the sums if `first`, else out += them; of 32 columns, the even ones come first. Asks for weights meanwhile.
    """
    at, line = fetch.at, fetch.line
    begin_sums(first, out, (0, TILE), out_stride, columns_at)
    for k in range(0, length, TILE):
        multiply_step(offset(tokens, 2 * k + 1), (0, -1), 2 * stride, offset(w, k * w_stride), w_stride, columns_at)
        for _ in range(fetch.lines):
            for stream in range(fetch.streams):
                prefetch(w, at + stream * fetch.apart)
            at += WIDTH_UNIT
            line += 1
            if line == fetch.row_lines:
                at += fetch.gap
                line = 0
    store_sums(out, (0, TILE), out_stride, columns_at)


@helper
def _multiply(w, w_stride, columns, length, then, tokens, stride, groups, out, out_stride):
    """out[r, j] = sum of tokens[r, k] * w[k * w_stride + j] over k < length, for all rows of the groups, j < columns.

    Of 32 columns, those with an even j come first. What a group has no row for is written too.

    then     offset from `w` to the weights of the next call
    """
    row_lines = columns // WIDTH_UNIT
    streams = STREAMS if groups * STREAMS <= 2 * TILE else 1
    lines = (2 * TILE // streams + groups - 1) // groups  # tiles of all groups together ask for 16 rows of 2 lines
    apart = DEPTH_BLOCK // streams * w_stride
    for k in range(0, length, DEPTH_BLOCK):
        size = min(DEPTH_BLOCK, length - k)
        ahead = (k + DEPTH_BLOCK) * w_stride if k + DEPTH_BLOCK < length else then
        line = 0
        for column in range(0, columns, COLUMN_BLOCK):
            at = k * w_stride + column
            for group in range(groups):
                start = ahead + line // row_lines * w_stride + line % row_lines * WIDTH_UNIT - at
                fetch = Fetch(start, line % row_lines, row_lines, w_stride - columns, lines, streams, apart)
                line += lines * (size // TILE)
                t = shorts(offset(tokens, group * TILE * stride + k))
                v, y = offset(w, at), offset(out, group * TILE * out_stride + column)
                if column + COLUMN_BLOCK <= columns:
                    _tile(t, stride, v, w_stride, (0, WIDTH_UNIT), size, fetch, k == 0, y, out_stride)
                else:
                    _tile(t, stride, v, w_stride, (0,), size, fetch, k == 0, y, out_stride)


@helper
def _in_order(sums, columns):
    """Bring the sums of a row into the order of columns."""
    for i in range(0, columns, 2 * LANES):
        even, odd = load(sums, i, LANES), load(sums, i + LANES, LANES)
        store(first_in_turn(even, odd), sums, i, LANES)
        store(last_in_turn(even, odd), sums, i + LANES, LANES)


@helper
def _up_projection(weights, form, rows, space, worker):
    """hidden[r] = act(gate(r)) * up(r), or act(up(r)), until no piece of work is left."""
    width, height = weights.up.shape[1:]
    projections = 2 if form.gated else 1
    hidden_dim = height // projections
    # Interleaved, gate and up are one run of columns, twice as long.
    run = projections if form.interleaved else 1
    held = SCRATCH_SIZE // (groups_of(most_rows(rows)) * TILE * projections)
    pieces = PIECES * space.scratch.shape[0]
    column_block = columns_per_piece(rows, hidden_dim, pieces, min(held, MOST_COLUMNS), COLUMN_BLOCK)
    column_blocks = (hidden_dim + column_block - 1) // column_block
    sums_stride = projections * column_block
    stride = space.tokens.shape[1]
    hidden_stride = space.hidden.shape[1]
    scratch = pointer(space.scratch, worker * space.scratch.shape[1])

    configure(TILE, TILE)
    items = rows.n_blocks * column_blocks
    next_item = take_next(pointer(space.counters, 0), 0)
    while next_item < items:
        item = next_item
        next_item = take_next(pointer(space.counters, 0), 0)
        expert, first, end, group, column = piece(rows, item, column_blocks, column_block)
        columns = min(column_block, hidden_dim - column)
        next_expert, _, _, _, next_column = piece(rows, min(next_item, items - 1), column_blocks, column_block)
        then = next_expert * width * height + next_column * run
        tokens, groups = pointer(space.tokens, group * TILE * stride), groups_of(end - first)
        for p in range(projections // run):
            here = expert * width * height + column * run + p * hidden_dim
            after = then if (p + 1) * run == projections else here + hidden_dim
            w, out = pointer(weights.up, here), offset(scratch, p * column_block)
            _multiply(w, height, columns * run, width, after - here, tokens, stride, groups, out, sums_stride)
        for r in range(end - first):
            hidden = pointer(space.hidden, (group * TILE + r) * hidden_stride + column)
            sums = offset(scratch, r * sums_stride)
            for p in range(projections // run):
                _in_order(offset(sums, p * column_block), columns * run)
            activate_row(sums, columns, column_block, weights, form, expert, column, hidden, 1)
            if column + columns == hidden_dim:
                store(splat(np.float32(0.0)), hidden, columns, LANES)
    release_tiles()


@helper
def _down_projection(weights, rows, topk_weights, used, space, y, worker):
    """y[t] = sum of topk_weights[slot] * (hidden[r] @ down + bias) over t's rows, until no columns are left."""
    hidden_dim, output_dim = weights.down.shape[1:]
    size = hidden_dim * output_dim
    stride = space.hidden.shape[1]
    width = output_columns(space, used)
    outputs = pointer(space.scratch, worker * space.scratch.shape[1])
    sums = pointer(space.sums, worker * space.sums.shape[1])

    configure(TILE, TILE)
    column, columns = take_columns(space, output_dim, width, OUTPUT_BLOCK)
    while columns > 0:
        start_sums(topk_weights, used, sums, width)
        next_column = next_columns = 0
        for block in range(rows.n_blocks):
            if block + 1 == rows.n_blocks:
                next_column, next_columns = take_columns(space, output_dim, width, OUTPUT_BLOCK)
            expert, first, end = rows.blocks[block, 0], rows.blocks[block, 1], rows.blocks[block, 2]
            following, following_column = block_after(rows, block, column, next_column)
            here = expert * size + column
            hidden = pointer(space.hidden, rows.blocks[block, 3] * TILE * stride)
            then = following * size + following_column - here
            w, groups = pointer(weights.down, here), groups_of(end - first)
            _multiply(w, output_dim, columns, hidden_dim, then, hidden, stride, groups, outputs, width)
            for r in range(end - first):
                _in_order(offset(outputs, r * width), columns)
            bias = bias_of(weights.down_bias, expert, column)
            add_outputs(outputs, width, rows, first, end, columns, topk_weights, bias, sums)
        write_sums(sums, width, columns, column, y)
        if rows.n_blocks == 0:
            next_column, next_columns = take_columns(space, output_dim, width, OUTPUT_BLOCK)
        column, columns = next_column, next_columns
    release_tiles()
