"""The experts' two projections with the activation between them, and the weighted sum."""

from typing import NamedTuple

import numpy as np
from numba import prange

from .._jit import helper, inline, kernel
from ..simd.atomic import take_next
from ..simd.calls import call
from ..simd.products import step_size
from ..simd.target import GROUP_ROWS, LANES
from ..simd.tile import prefetch
from ..simd.vector import even_lanes, fma, load, odd_lanes, offset, pointer, splat, store, store_operand
from .activations import activate, gated
from .plan import (
    MOST_COLUMNS,
    MOST_TRANSPOSED_COLUMNS,
    PIECES,
    TRANSPOSED_PIECES,
    Rows,
    columns_per_piece,
    most_rows,
    output_piece,
    piece,
    plan_rows,
)
from .projection import ROW_BLOCK, groups_of, pack, tile_of, tiles_of

#: Output columns per piece of work are a multiple of this, itself one of the tile's columns and of LANES.
COLUMN_BLOCK = 48
#: The same of transposed weights, whose tiles are wider.
TRANSPOSED_BLOCK = 2 * COLUMN_BLOCK
#: The same of outputs too few for two such pieces per thread (Zen 3, H = 64, F = 128, 64 tokens, 2 threads: experts 11
#: to 14 % faster, with 32 columns 2 %; for all widths this took olmoe with 16 tokens 18 % longer).
SMALL_BLOCK = 24 if LANES == 16 else 16
#: Output columns of a piece of work at most, for all tokens; and for as few as scratch holds the outputs of (weights
#: stored [in, out] are read as far as a piece is wide: Zen 4, gpt-oss, one token, float32 a sixth faster).
OUTPUT_COLUMNS, FEW_OUTPUT_COLUMNS = 384, 768
#: Rows times hidden columns of a piece of work at most: weight rows that follow one another are read as one stream, and
#: an activation is called for as many values as there are columns (Zen 4, T = 512 and 2048, 192 columns of 128 rows
#: instead of 48: olmoe, qwen3 and switch 1 to 2 % faster, Mixtral up to 2 %). Intel's are taken to be alike. A quarter
#: of it with AVX2, where such a piece and the packed rows would not fit into the second-level cache.
PIECE_SUMS = (512 if LANES == 16 else 128) * COLUMN_BLOCK
#: The same of transposed weights (Zen 4, gpt-oss, T = 512 and 2048, with twice of it 3 to 5 % slower).
TRANSPOSED_PIECE_SUMS = ROW_BLOCK * TRANSPOSED_BLOCK
#: float32 scratch of one thread: gate and up of one piece of work, or outputs of a block of rows.
SCRATCH_SIZE = max(2 * PIECE_SUMS, 2 * TRANSPOSED_PIECE_SUMS, ROW_BLOCK * OUTPUT_COLUMNS)
#: Tokens for which there are FEW_OUTPUT_COLUMNS.
FEW_TOKENS = SCRATCH_SIZE // FEW_OUTPUT_COLUMNS // GROUP_ROWS * GROUP_ROWS
#: Values of each token that are packed in a piece of work, a multiple of LANES.
PACK_VALUES = 512


class Form(NamedTuple):
    """What an expert computes."""

    code: int  #: activation function (activations.CODES)
    gated: bool  #: whether it gates a second projection
    interleaved: bool  #: rows of gate and up alternate; otherwise all of the gate's come first
    limit: float  #: parameters of activations.clamped_silu
    alpha: float
    beta: float


class Weights(NamedTuple):
    """All experts' weights, read-only and C-contiguous; empty arrays stand for no bias."""

    up: np.ndarray  #: (E, F, H), gated (E, 2F, H); transposed (E, H, F or 2F)
    up_bias: np.ndarray  #: (E, F), (E, 2F) or (0, 0)
    down: np.ndarray  #: (E, H, F); transposed (E, F, H)
    down_bias: np.ndarray  #: (E, H) or (0, 0)


class Products(NamedTuple):
    """How activations are multiplied with weights."""

    address: int  #: of `project`, or of `project_transposed`
    transposed: bool  #: weights are stored [in, out]


class Workspace(NamedTuple):
    """Memory that a forward writes and nobody reads afterwards."""

    tokens: np.ndarray  #: (groups, GROUP_ROWS * whole lines of H) the tokens of every row, packed (simd/tile.py)
    hidden: np.ndarray  #: (groups, GROUP_ROWS * whole lines of F) hidden values, packed
    sums: np.ndarray  #: (threads, T output columns) float32 of a piece of work of the second projection
    scratch: np.ndarray  #: (threads, SCRATCH_SIZE) float32
    plan: np.ndarray  #: (1, as much as `plan_rows` needs) int64
    counters: np.ndarray  #: (2,) int64


@kernel
def experts_forward(x, weights, form, products, indices, topk_weights, used, space, y):
    """y[t] = sum over used slots k of topk_weights[t, k] * expert[slot (t, k)](x[t]).

    x             (T, H) float32 tokens
    weights       Weights of all experts; this, form, products and space as plain tuples, which cross from
                  Python 0.5 us faster than named ones
    form          Form of the experts
    products      Products
    indices       (T, K) int64 expert of each slot
    topk_weights  (T, K) float32
    used          (T,) int64 slots of each token that are dispatched, from the first on
    space         Workspace
    y             (T, H) float32, written. A token of which no slot is dispatched gets its first weight, 0 or NaN.

    Returns how many dispatched slots name no expert; they add nothing.

    A plan of rows, then three steps, each parallel: tokens packed, over (block of rows, part of K); first projection
    and activation, over (block of rows, block of hidden columns); second projection and weighted sum, over blocks of
    output columns. Threads take the next piece when they are done with one, so a slow core does not hold up the others;
    every value is written by one thread in one order: a token's experts are added up in order of their numbers. A
    thread takes the next piece before the last product of one, to ask for its weights in time. Earlier, it would keep
    two while others end without work (Zen 4, H = 64, F = 128, T = 64 and 512: 2 and 4 % slower).
    """
    w = Weights(*weights)  # one by one: Numba does not find the classes of those unpacked together
    f = Form(*form)
    p = Products(*products)
    s = Workspace(*space)
    r = Rows(*plan_rows(indices, used, w.up.shape[0], ROW_BLOCK, GROUP_ROWS, s.plan[0]))
    threads = s.scratch.shape[0]
    s.counters[:] = 0
    shares = (x.shape[1] + PACK_VALUES - 1) // PACK_VALUES
    if x.shape[0] > 1:
        for item in prange(r.n_blocks * shares):
            _pack(x, r, np.int64(item) // shares, np.int64(item) % shares * PACK_VALUES, w, s)
    elif r.n_blocks > 0:
        for share in range(shares):
            _pack(x, r, np.int64(0), share * PACK_VALUES, w, s)
    for worker in prange(threads):
        _up_projection(x.shape[0], w, f, p, r, s, np.int64(worker))
    for worker in prange(threads):
        _down_projection(w, p, r, topk_weights, used, s, y, np.int64(worker))
    return r.invalid


@helper
def _pack(x, rows, block, start, weights, space):
    """Pack values start <= k < start + PACK_VALUES of the tokens of a block."""
    width, stride = x.shape[1], space.tokens.shape[1]
    first, end, group = rows.blocks[block, 1], rows.blocks[block, 2], rows.blocks[block, 3]
    pack(
        pointer(x, 0),
        width,
        pointer(rows.row_token, first),
        end - first,
        start,
        min(start + PACK_VALUES, width),
        pointer(space.tokens, group * stride),
        stride // GROUP_ROWS,
        pointer(weights.up, 0),
    )


@inline
def _packed_at(tokens, group):
    """Group where the tokens of a block whose rows begin at `group` are packed.

    A single token is the same row of all its experts, and packed once (Zen 4, olmoe, bfloat16: 3 us of 3,000 instead of
    16; eight copies took 58 of 2,050 while the memory was fast and lines went from one core to the other slowly).
    """
    return group if tokens > 1 else 0


@inline
def _columns_per_piece(rows, width, threads, transposed):
    """Columns of a piece of work over `width` columns: the more rows, the fewer; scratch holds their sums."""
    unit, most, pieces, sums = COLUMN_BLOCK, MOST_COLUMNS, PIECES, PIECE_SUMS
    if transposed:
        unit, most, pieces = TRANSPOSED_BLOCK, MOST_TRANSPOSED_COLUMNS, TRANSPOSED_PIECES
        sums = TRANSPOSED_PIECE_SUMS
    if threads == 1:  # nobody waits for it: as few calls as possible (Zen 3, H = 64, F = 128, one token: 0.5 us of 21)
        pieces = 1
    most = min(most, sums // (groups_of(most_rows(rows)) * GROUP_ROWS))
    return columns_per_piece(rows, width, pieces * threads, most, unit)


@inline
def _project(a, stride, rows, w, products, height, length, at, columns, then, out, out_stride):
    """Products with `columns` columns of an expert's weights, in either storage.

    at, then: (expert, column) of these weights and of the next; each expert has `height` columns of `length`
    values, `w` points to the first of all. The rest as in `project`.
    """
    expert, column = at
    next_expert, next_column = then
    # From one column to the next, and from one row of what is stored to the next.
    apart, w_stride = (1, height) if products.transposed else (length, length)
    here = expert * height * length + column * apart
    ahead = next_expert * height * length + next_column * apart - here
    call(products.address, a, stride, rows, offset(w, here), w_stride, columns, length, ahead, out, out_stride)


@inline
def _length_and_height(weights, transposed):
    """Values that a product sums, and products per expert."""
    if transposed:
        return weights.shape[1], weights.shape[2]
    return weights.shape[2], weights.shape[1]


@helper
def _up_projection(tokens, weights, form, products, rows, space, worker):
    """hidden[r] = act(gate(r)) * up(r), or act(up(r)), until no piece of work is left."""
    input_dim, height = _length_and_height(weights.up, products.transposed)
    projections = 2 if form.gated else 1
    hidden_dim = height // projections
    # Interleaved, gate and up are one run of columns, twice as long.
    run = projections if form.interleaved else 1
    column_block = _columns_per_piece(rows, hidden_dim, space.scratch.shape[0], products.transposed)
    column_blocks = (hidden_dim + column_block - 1) // column_block
    sums_stride = projections * column_block
    mine = worker * space.scratch.shape[1]

    items = rows.n_blocks * column_blocks
    item = take_next(pointer(space.counters, 0), 0)
    while item < items:
        expert, first, end, group, column = piece(rows, item, column_blocks, column_block)
        columns = min(column_block, hidden_dim - column)
        for p in range(projections // run):
            then = expert, hidden_dim + column
            if (p + 1) * run == projections:
                item = take_next(pointer(space.counters, 0), 0)
                next_expert, _, _, _, next_column = piece(rows, min(item, items - 1), column_blocks, column_block)
                then = next_expert, next_column * run
            _project(
                pointer(space.tokens, _packed_at(tokens, group) * space.tokens.shape[1]),
                space.tokens.shape[1] // GROUP_ROWS,
                end - first,
                pointer(weights.up, 0),
                products,
                height,
                input_dim,
                (expert, p * hidden_dim + column * run),
                columns * run,
                then,
                pointer(space.scratch, mine + p * column_block),
                sums_stride,
            )
        _activate(
            pointer(space.scratch, mine),
            sums_stride,
            end - first,
            columns,
            column_block,
            weights,
            form,
            expert,
            column,
            pointer(space.hidden, group * space.hidden.shape[1]),
            space.hidden.shape[1] // GROUP_ROWS,
        )


@helper
def _activate(sums, sums_stride, rows, columns, column_block, weights, form, expert, column, hidden, stride):
    """`activate_row` of every row of a block; zeros fill up the last group. hidden, stride: as of `pack`'s result."""
    step, zero = step_size(hidden), splat(np.float32(0.0))
    parts = tiles_of(rows)
    for t in range(parts[1]):
        first, _, height, size = tile_of(parts, t)
        tile = offset(hidden, first * stride + column * size)
        for r in range(height):
            row = offset(sums, (first + r) * sums_stride)
            activate_row(row, columns, column_block, weights, form, expert, column, offset(tile, r * step), size)
        for r in range(height, size):
            for i in range(0, columns, LANES):
                store_operand(zero, tile, i * size + r * step, size, min(LANES, columns - i), pointer(weights.down, 0))


@helper
def activate_row(sums, columns, column_block, weights, form, expert, column, hidden, rows):
    """Bias, activation and gating of one row of a piece of work, whose sums are gate and up.

    hidden: where the row's values of this piece begin in a packed tile of `rows` rows (simd/tile.py).
    Column i of gate and up lies in the sums at i and column_block + i, in the bias at i and
    hidden_dim + i; interleaved, at 2 i and 2 i + 1 in both.
    """
    limit, alpha, beta = np.float32(form.limit), np.float32(form.alpha), np.float32(form.beta)
    projections = 2 if form.gated else 1
    run = projections if form.interleaved else 1
    biased = weights.up_bias.shape[0] > 0
    hidden_dim = weights.up_bias.shape[1] // projections
    bias = pointer(weights.up_bias, expert * weights.up_bias.shape[1] + column * run if biased else 0)
    for i in range(0, columns, LANES):
        n = min(LANES, columns - i)
        # Two vectors: of gate and of up, or interleaved of both.
        at, size = i * run, min(LANES, n * run)
        second_at = at + LANES if form.interleaved else column_block + i
        second_size = n * run - size if form.interleaved else n
        x = load(sums, at, size)
        if biased:
            x = x + load(bias, at, size)
        if form.gated:
            y = load(sums, second_at, second_size)
            if biased:
                y = y + load(bias, at + LANES if form.interleaved else hidden_dim + i, second_size)
            gate, up = (even_lanes(x, y), odd_lanes(x, y)) if form.interleaved else (x, y)
            value = gated(form.code, gate, up, limit, alpha, beta)
        else:
            value = activate(form.code, x)
        store_operand(value, hidden, i * rows, rows, n, pointer(weights.down, 0))


@helper
def _down_projection(weights, products, rows, topk_weights, used, space, y, worker):
    """y[t] = sum of topk_weights[slot] * (hidden[r] @ down.T + bias) over t's rows, until no columns are left."""
    hidden_dim, output_dim = _length_and_height(weights.down, products.transposed)
    hidden_stride = space.hidden.shape[1]
    width = output_columns(space, used)
    unit = _output_unit(output_dim, space.scratch.shape[0], products.transposed)
    outputs = pointer(space.scratch, worker * space.scratch.shape[1])
    sums = pointer(space.sums, worker * space.sums.shape[1])

    column, columns = take_columns(space, output_dim, width, unit)
    while columns > 0:
        start_sums(topk_weights, used, sums, width)
        next_column = next_columns = 0
        for block in range(rows.n_blocks):
            if block + 1 == rows.n_blocks:
                next_column, next_columns = take_columns(space, output_dim, width, unit)
            expert, first, end = rows.blocks[block, 0], rows.blocks[block, 1], rows.blocks[block, 2]
            _project(
                pointer(space.hidden, rows.blocks[block, 3] * hidden_stride),
                hidden_stride // GROUP_ROWS,
                end - first,
                pointer(weights.down, 0),
                products,
                output_dim,
                hidden_dim,
                (expert, column),
                columns,
                block_after(rows, block, column, next_column),
                outputs,
                width,
            )
            bias = bias_of(weights.down_bias, expert, column)
            add_outputs(outputs, width, rows, first, end, columns, topk_weights, bias, sums)
        write_sums(sums, width, columns, column, y)
        if rows.n_blocks == 0:
            next_column, next_columns = take_columns(space, output_dim, width, unit)
        column, columns = next_column, next_columns


@inline
def _output_unit(output_dim, threads, transposed):
    """What the columns of a piece of work of the second projection are a multiple of."""
    if transposed:
        return TRANSPOSED_BLOCK
    return COLUMN_BLOCK if output_dim >= 2 * threads * COLUMN_BLOCK else SMALL_BLOCK


@inline
def output_columns(space, used):
    """Columns of a piece of work of the second projection at most: the length of a row of sums."""
    return space.sums.shape[1] // max(1, used.shape[0])


@inline
def take_columns(space, output_dim, most, unit):
    """First column and number of columns of the next piece of work of the second projection, as `output_piece`."""
    item = take_next(pointer(space.counters, 1), 0)
    return output_piece(item, output_dim, space.scratch.shape[0], most, unit)


@inline
def block_after(rows, block, column, next_column):
    """Expert and column of the weights that follow those of a block of rows: the last block's lie in `next_column`."""
    if block + 1 < rows.n_blocks:
        return rows.blocks[block + 1, 0], column
    return rows.blocks[0, 0], next_column


@inline
def bias_of(bias, expert, column):
    """Pointer to an expert's bias, and whether there is one."""
    biased = bias.shape[0] > 0
    return pointer(bias, expert * bias.shape[1] + column if biased else 0), biased


@helper
def start_sums(topk_weights, used, sums, width):
    """sums[t] = 0, or the first weight of a token of which no slot is dispatched."""
    for t in range(used.shape[0]):
        start = splat(topk_weights[t, 0] if used[t] == 0 else np.float32(0.0))
        for i in range(0, width, LANES):
            store(start, sums, t * width + i, LANES)


@helper
def add_outputs(outputs, width, rows, first, end, columns, topk_weights, bias, sums):
    """sums[token of r] += weight of r * (outputs[r - first] + bias) for rows first <= r < end.

    A row of outputs and one of sums is `width` long. bias: as `bias_of` gives it.
    """
    k = topk_weights.shape[1]
    at_bias, biased = bias
    for r in range(first, end):
        t, following = rows.row_token[r], rows.row_token[min(r + 1, end - 1)]
        weight = splat(topk_weights[t, rows.row_slot[r] - t * k])
        output, total = offset(outputs, (r - first) * width), offset(sums, t * width)
        for i in range(0, columns, LANES):
            # The sums of many tokens lie in the third-level cache (Xeon, olmoe, float32, T = 2048: second projection
            # 193 ms instead of 219).
            prefetch(sums, following * width + i)
            n = min(LANES, columns - i)
            value = load(output, i, n)
            if biased:
                value = value + load(at_bias, i, n)
            store(fma(weight, value, load(total, i, n)), total, i, n)


@helper
def write_sums(sums, width, columns, column, y):
    """y[t, column :][: columns] = sums[t]."""
    for t in range(y.shape[0]):
        target = pointer(y, t * y.shape[1] + column)
        for i in range(0, columns, LANES):
            n = min(LANES, columns - i)
            store(load(sums, t * width + i, n), target, i, n)
