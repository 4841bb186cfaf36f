"""The experts' two projections with the activation between them, and the weighted sum."""

from typing import NamedTuple

import numpy as np
from numba import prange

from .._jit import helper, inline, kernel
from ..simd.atomic import take_next
from ..simd.target import LANES
from ..simd.vector import element, fma, load, pointer, splat, store, store_operand
from .activations import activate
from .projection import CONSECUTIVE, ROW_BLOCK, project

#: Output columns per piece of work are a multiple of this, itself one of the tile's columns and of LANES.
COLUMN_BLOCK = 48
#: Output columns per piece of work at most. With a row or two per expert pieces of 384 columns were read
#: from memory 5 % faster than those of 96: the processor fetches a long stream ahead.
MOST_COLUMNS = 384
#: Pieces of work per thread at least, so that threads end at about the same time.
PIECES = 8
#: float32 scratch of one thread: gate and up of one piece of work.
SCRATCH_SIZE = 2 * ROW_BLOCK * COLUMN_BLOCK
#: Tokens per piece of work where tokens are copied, and where outputs are summed.
ENCODE_BLOCK = 16
COMBINE_BLOCK = 8


class Weights(NamedTuple):
    """All experts' weights, read-only and C-contiguous; empty arrays stand for no bias."""

    up: np.ndarray  #: (E, F, H), or (E, 2F, H) with the gate's rows first
    up_bias: np.ndarray  #: (E, F), (E, 2F) or (0, 0)
    down: np.ndarray  #: (E, H, F)
    down_bias: np.ndarray  #: (E, H) or (0, 0)


class Rows(NamedTuple):
    """Rows sorted by expert, as `plan_rows` lays them out."""

    row_token: np.ndarray  #: (at least R,) int64
    slot_row: np.ndarray  #: (at least T, K) int64
    blocks: np.ndarray  #: (at least n_blocks, 3) int64: expert, first row, end row
    n_blocks: int


class Workspace(NamedTuple):
    """Memory that a forward writes and nobody reads afterwards. Rows are padded and aligned."""

    tokens: np.ndarray  #: (at least T, stride >= H) tokens, as the format multiplies them
    hidden: np.ndarray  #: (at least R, stride >= F) hidden values, as the format multiplies them
    output: np.ndarray  #: (at least R, stride >= H) float32 experts' outputs, sorted by expert
    scratch: np.ndarray  #: (threads, SCRATCH_SIZE) float32
    counters: np.ndarray  #: (2,) int64


@kernel
def experts_forward(x, weights, code, gated, rows, topk_weights, used, space, y):
    """y[t] = sum over used slots k of topk_weights[t, k] * expert[slot (t, k)](x[t]).

    x             (T, H) float32 tokens
    weights       Weights of all experts
    code, gated   activation function (activations.CODES), and whether it gates
    rows          Rows: which token goes to which expert
    topk_weights  (T, K) float32
    used          (T,) int64 slots of each token that have a row
    space         Workspace
    y             (T, H) float32, written. A token without rows gets its first weight, 0 or NaN.

    Four steps, each parallel: tokens to the format's operands, over tokens; first projection and
    activation, over (block of rows, block of hidden columns); second projection, over (block of
    rows, block of output columns); weighted sum, over tokens. Threads take the next piece when
    they are done with one, so a slow core does not hold up the others; every value is written by
    one thread in one order. A thread takes the next piece before it begins with one, to ask for its
    weights in time.
    """
    threads = space.scratch.shape[0]
    tokens = used.shape[0]
    space.counters[:] = 0
    for block in prange((tokens + ENCODE_BLOCK - 1) // ENCODE_BLOCK):
        first = np.int64(block) * ENCODE_BLOCK
        _encode(x, first, min(first + ENCODE_BLOCK, tokens), weights, space)
    for worker in prange(threads):
        _up_projection(weights, code, gated, rows, space, np.int64(worker))
    for _ in prange(threads):
        _down_projection(weights, rows, space)
    for block in prange((tokens + COMBINE_BLOCK - 1) // COMBINE_BLOCK):
        first = np.int64(block) * COMBINE_BLOCK
        _combine(first, min(first + COMBINE_BLOCK, tokens), rows, topk_weights, used, space, y)


@helper
def _encode(x, first, end, weights, space):
    """space.tokens[t] = x[t], rounded if the weights' format wants it."""
    width = x.shape[1]
    stride = space.tokens.shape[1]
    like = pointer(weights.up, 0)
    for t in range(first, end):
        token = pointer(x, t * width)
        row = pointer(space.tokens, t * stride)
        for i in range(0, width, LANES):
            n = min(LANES, width - i)
            store_operand(load(token, i, n), row, i, n, like)


@helper
def _columns_per_piece(rows, width, threads):
    """Columns of a piece of work over `width` columns: as many as scratch holds, but enough pieces."""
    most_rows = 1
    for block in range(rows.n_blocks):
        most_rows = max(most_rows, rows.blocks[block, 2] - rows.blocks[block, 1])
    held = min(MOST_COLUMNS, ROW_BLOCK * COLUMN_BLOCK // most_rows)
    fair = rows.n_blocks * width // (PIECES * threads)
    return max(1, min(held, fair) // COLUMN_BLOCK) * COLUMN_BLOCK


@inline
def _piece(rows, item, column_blocks, column_block):
    """Expert, first row, end row and first column of a piece of work."""
    block = item // column_blocks
    expert, first, end = rows.blocks[block, 0], rows.blocks[block, 1], rows.blocks[block, 2]
    return expert, first, end, item % column_blocks * column_block


@helper
def _up_projection(weights, code, gated, rows, space, worker):
    """hidden[r] = act(gate(r)) * up(r), or act(up(r)), until no piece of work is left."""
    input_dim = weights.up.shape[2]
    projections = 2 if gated else 1
    hidden_dim = weights.up.shape[1] // projections
    stride = space.tokens.shape[1]
    biased = weights.up_bias.shape[0] > 0
    column_block = _columns_per_piece(rows, hidden_dim, space.scratch.shape[0])
    column_blocks = (hidden_dim + column_block - 1) // column_block
    mine = worker * space.scratch.shape[1]
    sums = pointer(space.scratch, mine)
    sums_stride = projections * column_block
    down = pointer(weights.down, 0)

    items = rows.n_blocks * column_blocks
    next_item = take_next(pointer(space.counters, 0), 0)
    while next_item < items:
        item = next_item
        next_item = take_next(pointer(space.counters, 0), 0)
        expert, first, end, column = _piece(rows, item, column_blocks, column_block)
        next_expert, _, _, next_column = _piece(rows, min(next_item, items - 1), column_blocks, column_block)
        columns = min(column_block, hidden_dim - column)
        for p in range(projections):
            weight_row = (expert * projections + p) * hidden_dim + column
            next_row = next_expert * projections * hidden_dim + next_column
            if p + 1 < projections:
                next_row = weight_row + hidden_dim
            project(
                pointer(space.tokens, 0),
                stride,
                pointer(rows.row_token, first),
                end - first,
                pointer(weights.up, weight_row * input_dim),
                columns,
                input_dim,
                (next_row - weight_row) * input_dim,
                pointer(space.scratch, mine + p * column_block),
                sums_stride,
            )
        bias_at = expert * weights.up_bias.shape[1] + column
        bias = pointer(weights.up_bias, bias_at if biased else 0)
        for r in range(end - first):
            hidden = pointer(space.hidden, (first + r) * space.hidden.shape[1] + column)
            _activate_row(
                sums, r * sums_stride, columns, column_block, code, gated, biased, bias, hidden_dim, hidden, down
            )


@helper
def _activate_row(sums, at, columns, up_at, code, gated, biased, bias, hidden_dim, hidden, down):
    """Bias, activation and gating of one row of a block; gate and up lie `up_at` apart.

    down: the weights that the result will be multiplied with.
    """
    for i in range(0, columns, LANES):
        n = min(LANES, columns - i)
        x = load(sums, at + i, n)
        if biased:
            x = x + load(bias, i, n)
        value = activate(code, x)
        if gated:
            up = load(sums, at + up_at + i, n)
            if biased:
                up = up + load(bias, hidden_dim + i, n)
            value = value * up
        store_operand(value, hidden, i, n, down)


@helper
def _down_projection(weights, rows, space):
    """output[r] = hidden[r] @ down.T + bias, until no piece of work is left."""
    output_dim = weights.down.shape[1]
    hidden_dim = weights.down.shape[2]
    hidden_stride = space.hidden.shape[1]
    output_stride = space.output.shape[1]
    biased = weights.down_bias.shape[0] > 0
    column_block = _columns_per_piece(rows, output_dim, space.scratch.shape[0])
    column_blocks = (output_dim + column_block - 1) // column_block

    items = rows.n_blocks * column_blocks
    next_item = take_next(pointer(space.counters, 1), 0)
    while next_item < items:
        item = next_item
        next_item = take_next(pointer(space.counters, 1), 0)
        expert, first, end, column = _piece(rows, item, column_blocks, column_block)
        next_expert, _, _, next_column = _piece(rows, min(next_item, items - 1), column_blocks, column_block)
        columns = min(column_block, output_dim - column)
        weight_row = expert * output_dim + column
        project(
            pointer(space.hidden, first * hidden_stride),
            hidden_stride,
            pointer(CONSECUTIVE, 0),
            end - first,
            pointer(weights.down, weight_row * hidden_dim),
            columns,
            hidden_dim,
            (next_expert * output_dim + next_column - weight_row) * hidden_dim,
            pointer(space.output, first * output_stride + column),
            output_stride,
        )
        if biased:
            bias = pointer(weights.down_bias, expert * output_dim + column)
            for r in range(first, end):
                output = pointer(space.output, r * output_stride + column)
                for i in range(0, columns, LANES):
                    n = min(LANES, columns - i)
                    store(load(output, i, n) + load(bias, i, n), output, i, n)


@helper
def _combine(first, end, rows, topk_weights, used, space, y):
    """y[t] = sum of the outputs of t's rows by weight, in order of the slots."""
    output_dim = y.shape[1]
    output = pointer(space.output, 0)
    stride = space.output.shape[1]
    k = topk_weights.shape[1]
    for t in range(first, end):
        slots = pointer(rows.slot_row, t * k)
        weight = pointer(topk_weights, t * k)
        target = pointer(y, t * output_dim)
        for i in range(0, output_dim, LANES):
            n = min(LANES, output_dim - i)
            if used[t] == 0:
                total = splat(element(weight, 0))
            else:
                total = splat(element(weight, 0)) * load(output, element(slots, 0) * stride + i, n)
            for j in range(1, used[t]):
                total = fma(splat(element(weight, j)), load(output, element(slots, j) * stride + i, n), total)
            store(total, target, i, n)
