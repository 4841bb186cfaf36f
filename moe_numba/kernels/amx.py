"""The experts' forward on a matrix unit (simd/amx.py): bfloat16 weights as stored, [out, in].

The same steps as experts.py, with another unit of work: groups of 16 tokens (rows of one expert). Products are those
of amx_projection.py. They have weights on the left, so a group's values lie side by side, and hidden values are already
in the order in which the second projection wants them.
"""

from typing import NamedTuple

import numpy as np
from numba import prange

from .._jit import helper, inline, kernel
from ..simd.amx import DEPTH, PACKED_TILE, TILE, pack_pairs, release_tiles, store_pairs, store_tokens
from ..simd.atomic import take_next
from ..simd.vector import load, offset, pointer, splat
from .activations import activate, gated
from .amx_projection import WeightRows, configure, groups_of, multiply, sums_of, tile_of
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
from .plan import MOST_COLUMNS, PIECES, Rows, columns_per_piece, piece, plan_rows

#: Rows that share one pass over the weights: Mixtral reads them once for 2,048 tokens, with 512 rows twice for every
#: second expert (5 to 12 % slower).
ROW_BLOCK = 640
#: Hidden columns of a piece of work are a multiple of this.
COLUMN_BLOCK = 2 * TILE
#: Output columns of a piece of work, for all tokens, are a multiple of this.
OUTPUT_BLOCK = 2 * COLUMN_BLOCK
#: At most so many: as many as have OUTPUT_VALUES sums (256 KiB, in the second-level cache), but within these bounds.
#: Streams of weights should be long (olmoe, T = 1, 16, 64, 128: 2 to 4 % faster than with 128 columns).
OUTPUT_COLUMNS, OUTPUT_VALUES = (128, 512), 65536
#: Hidden values for each of which a piece of work may have one column more than that. It reads all of them again, from
#: the third-level cache, and its sums come from there, too, when they are more than OUTPUT_VALUES.
HIDDEN_PER_COLUMN = 16
#: float32 sums of one thread: 384 columns of gate and up of ROW_BLOCK rows, so that tokens are seldom read again.
SCRATCH_SIZE = 2 * 384 * ROW_BLOCK
#: Steps along the width of the tokens of a block that are packed in a piece of work.
PACK_STEPS = 32


class AmxWorkspace(NamedTuple):
    """Memory that a forward writes and nobody reads afterwards."""

    tokens: np.ndarray  #: (groups, steps of H * PACKED_TILE) uint16 packed tokens of every row
    hidden: np.ndarray  #: (groups, steps of F * PACKED_TILE) uint16 packed hidden values
    sums: np.ndarray  #: (threads, T output columns) float32, as of experts.Workspace
    scratch: np.ndarray  #: (threads, SCRATCH_SIZE) float32, sums of tiles
    outputs: np.ndarray  #: (threads, TILE output columns + SUMS) float32 of a group of rows, and a tile
    tails: np.ndarray  #: (threads, 2 TILE DEPTH) uint16, ends of weight rows
    plan: np.ndarray  #: (1, as much as `plan_rows` needs) int64
    counters: np.ndarray  #: (2,) int64


@kernel
def experts_forward_amx(x, weights, form, products, indices, topk_weights, used, space, y):
    """`experts_forward` (experts.py) of bfloat16 weights, with its own products; space is an AmxWorkspace."""
    w = Weights(*weights)  # one by one: Numba does not find the classes of those unpacked together
    f = Form(*form)
    s = AmxWorkspace(*space)
    r = Rows(*plan_rows(indices, used, w.up.shape[0], ROW_BLOCK, TILE, s.plan[0]))
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
    return r.invalid


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


@helper
def _up_projection(weights, form, rows, space, worker):
    """hidden[r] = act(gate(r)) * up(r), or act(up(r)), until no piece of work is left."""
    height, width = weights.up.shape[1:]
    hidden_dim = height // 2 if form.gated else height
    projections = 2 if form.gated else 1
    run = projections if form.interleaved else 1
    weight_rows = WeightRows(projections, width if form.interleaved else hidden_dim * width, run * width)
    column_block = columns_per_piece(rows, hidden_dim, PIECES * space.scratch.shape[0], MOST_COLUMNS, COLUMN_BLOCK)
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
        multiply(w, weight_rows, columns, width, then - here, tokens, stride, groups, sums, tails)
        for g in range(groups):
            hidden = pointer(space.hidden, (group + g) * space.hidden.shape[1])
            for i in range(0, columns, 2):
                at, at_up = sums_of(weight_rows, columns, groups, i, g)
                value = _activated(sums, at, at_up, weights, form, expert, column + i)
                following = splat(np.float32(0.0))
                if i + 1 < columns:
                    at, at_up = sums_of(weight_rows, columns, groups, i + 1, g)
                    following = _activated(sums, at, at_up, weights, form, expert, column + i + 1)
                store_pairs(value, following, hidden, (column + i) * TILE)
            if column + columns == hidden_dim:  # what is behind it must not be NaN
                zero = splat(np.float32(0.0))
                for f in range((hidden_dim + 1) // 2 * 2, space.hidden.shape[1] // TILE, 2):
                    store_pairs(zero, zero, hidden, f * TILE)
    release_tiles()


@inline
def _activated(sums, at, at_up, weights, form, expert, f):
    """Hidden value f of a group's rows: bias, activation and gating."""
    biased = weights.up_bias.shape[0] > 0
    x = load(sums, at, TILE)
    if not form.gated:
        if biased:
            x = x + splat(weights.up_bias[expert, f])
        return activate(form.code, x)
    up = load(sums, at_up, TILE)
    if biased:
        hidden_dim = weights.up_bias.shape[1] // 2
        x = x + splat(weights.up_bias[expert, 2 * f if form.interleaved else f])
        up = up + splat(weights.up_bias[expert, 2 * f + 1 if form.interleaved else hidden_dim + f])
    return gated(form.code, x, up, np.float32(form.limit), np.float32(form.alpha), np.float32(form.beta))


@helper
def _down_projection(weights, rows, topk_weights, used, space, y, worker):
    """y[t] = sum of topk_weights[slot] * (hidden[r] @ down.T + bias) over t's rows, until no columns are left."""
    output_dim, hidden_dim = weights.down.shape[1:]
    weight_rows = WeightRows(1, 0, hidden_dim)
    stride = space.hidden.shape[1]
    width = output_columns(space, used)
    tiles = pointer(space.scratch, worker * space.scratch.shape[1])
    tails = pointer(space.tails, worker * space.tails.shape[1])
    outputs = pointer(space.outputs, worker * space.outputs.shape[1])
    sums = pointer(space.sums, worker * space.sums.shape[1])
    tile = offset(outputs, TILE * width)

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
            here = (expert * output_dim + column) * hidden_dim
            then = (following * output_dim + following_column) * hidden_dim - here
            hidden = pointer(space.hidden, rows.blocks[block, 3] * stride)
            groups = groups_of(end - first)
            w = pointer(weights.down, here)
            multiply(w, weight_rows, columns, hidden_dim, then, hidden, stride, groups, tiles, tails)
            bias = bias_of(weights.down_bias, expert, column)
            for g in range(groups):
                for i in range(0, columns, TILE):
                    outputs_of_group = tile_of(weight_rows, columns, groups, i, g, tiles, tile)
                    store_tokens(outputs_of_group, offset(outputs, i), width)
                start = first + g * TILE
                add_outputs(outputs, width, rows, start, min(start + TILE, end), columns, topk_weights, bias, sums)
        write_sums(sums, width, columns, column, y)
        if rows.n_blocks == 0:
            next_column, next_columns = take_columns(space, output_dim, width, OUTPUT_BLOCK)
        column, columns = next_column, next_columns
    release_tiles()
