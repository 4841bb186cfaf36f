"""A block of vector registers that accumulates dot products of activation rows and weight rows.

A vector of activations holds 128 bits of each of GROUP_ROWS rows; 128 bits of a weight row meet all of them at once.
So an accumulator has four partial sums of every row: lane i of a row's four adds up the products at K = i, i + 4,
i + 8, ... (bfloat16: pairs of products). The four are added up at the end of a block of K, always in the same order.
The result for one row therefore does not depend on the rows that share its tile.

The last vector may have fewer rows, which it holds again and again: one of four meets 128 bits of four weight rows at
once, two of four, or one of two, those of two. No lane computes for rows that are not there.

Packed activations: a tile of R rows holds value k of row r at (k // B * R + r) * B + k % B, with B = `step_size`
values in 128 bits. Behind the last value are zeros up to a multiple of B.
"""

from llvmlite import ir
from numba.core import cgutils, types

from .plain import intrinsic
from .products import LINE_BITS, PRODUCTS
from .target import (
    GROUP_ROWS,
    LANES,
    TILE_COLUMNS,
    TILE_VECTORS,
    WIDE_COLUMNS,
)
from .vector import (
    BYTE,
    FLOAT,
    INT32,
    INT64,
    VECTOR,
    ZEROS,
    Floats,
    Vec,
    finished,
    first_lanes,
    masked_load,
    masked_store,
    unaligned_load,
    unaligned_store,
    unpack,
)

#: Activation rows of the largest tile.
TILE_ROWS = TILE_VECTORS * GROUP_ROWS


def _shapes(last):
    """Shapes of tiles with 1, 2, 3 and 4 vectors of activations, the last of which has `last` rows.

    They stand for these numbers where they decide what is compiled: two tuples of as many entries. What would not fit
    into the registers is never used, and not compiled.
    """
    rows = tuple(range(min(last, GROUP_ROWS)))
    return tuple((tuple(range(min(vectors, TILE_VECTORS))), rows) for vectors in range(1, 5))


#: Of tiles whose last vector has one row, two rows, or all of GROUP_ROWS.
ONE_LAST, TWO_LAST, WHOLE = (_shapes(last) for last in (1, 2, GROUP_ROWS))


def _layout(shape):
    """Vectors of a tile that are whole, rows of one that is not, and weight rows that this one meets at once."""
    vectors, last = (part.count for part in shape)
    return vectors - (last < GROUP_ROWS), last, GROUP_ROWS // last


@intrinsic
def zero_tile(typing, shape, columns_at):
    """A tile of zeros with as many weight rows as the tuple `columns_at` has entries: those of the first vector of
    activations, of the second, ..., and of one that is not whole, as many at once as it meets.
    """
    whole, _, at_once = _layout(shape)
    columns = columns_at.count
    tile = types.UniTuple(Vec, whole * columns + (-(-columns // at_once) if at_once > 1 else 0))

    def generate(context, builder, signature, args):
        return context.make_tuple(builder, tile, [ZEROS] * tile.count)

    return tile(shape, columns_at), generate


def clamped(builder, stride, last, count):
    """min(j, last) * stride for j < count."""
    indices = [builder.select(builder.icmp_signed("<", INT64(j), last), INT64(j), last) for j in range(count)]
    return [builder.mul(index, stride) for index in indices]


@intrinsic
def clamped_offsets(typing, stride, last):
    """Offsets j * stride for j = 0 .. TILE_COLUMNS - 1, with j held at `last`.

    A tile at the edge of the matrix reads its last row again instead of reading past it.
    """
    offsets = types.UniTuple(types.int64, TILE_COLUMNS)

    def generate(context, builder, signature, args):
        return context.make_tuple(builder, offsets, clamped(builder, *args, TILE_COLUMNS))

    return offsets(types.int64, types.int64), generate


@intrinsic
def wide_offsets(typing, stride):
    """Offsets j * stride for j = 0 .. WIDE_COLUMNS - 1."""
    offsets = types.UniTuple(types.int64, WIDE_COLUMNS)

    def generate(context, builder, signature, args):
        return context.make_tuple(builder, offsets, [builder.mul(args[0], INT64(j)) for j in range(WIDE_COLUMNS)])

    return offsets(types.int64), generate


def _prefetch_ir(builder, place):
    kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(place, BYTE.as_pointer()), INT32(0), INT32(2), INT32(1)])


@intrinsic
def prefetch(typing, memory, at):
    """Ask for the cache line of memory[at]. Addresses past the array are harmless."""

    def generate(context, builder, signature, args):
        _prefetch_ir(builder, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(memory, types.int64), generate


@intrinsic
def prefetch_rows(typing, memory, at, stride, rows):
    """`prefetch` at, at + stride, at + 2 stride, ..., as many times as `rows`: a loop that stays one.

    LLVM unrolls one in Python, and takes a register for each line's address from the tile's loop around it, whose
    weight rows then have none. It leaves a loop alone that has a piece of assembly in it, even an empty one.
    """

    def generate(context, builder, signature, args):
        memory, at, stride, rows = args
        with cgutils.for_range(builder, rows) as loop:
            _prefetch_ir(builder, builder.gep(memory, [builder.add(at, builder.mul(loop.index, stride))]))
            builder.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], side_effect=True)
        return context.get_dummy_value()

    return types.void(memory, types.int64, types.int64, types.int64), generate


def _beside(builder, columns, rows):
    """What a vector of `rows` rows meets at once: the first in as many places of GROUP_ROWS, the second in the next."""
    kind = columns[0].type
    first, *others = (builder.bitcast(column, VECTOR) for column in columns)
    for j, column in enumerate(others, 1):
        lanes = [lane + LANES * (lane // (4 * rows) == j) for lane in range(LANES)]
        first = builder.shuffle_vector(first, column, ir.Constant(ir.VectorType(INT32, LANES), lanes))
    return builder.bitcast(first, kind)


def _dot_steps(products, steps, builder, signature, args, n):
    """Multiply `steps` steps of all activation rows with as many of every weight row."""
    tile, a, _, w, columns_at, k = args[:6]
    tile_type, _, shape, _, columns_type = signature.args[:5]
    columns, vectors = columns_type.count, range(len(shape[0]))
    whole, last, at_once = _layout(shape)
    sums = unpack(builder, tile, tile_type.count)
    size = len(vectors) * GROUP_ROWS
    a = builder.gep(a, [builder.mul(k, INT64(size))])
    rows = [builder.gep(builder.gep(w, [at]), [k]) for at in unpack(builder, columns_at, columns)]
    for at in range(0, steps * products.step, products.step):

        def activations(i, at=at):
            place = builder.gep(a, [INT64(at * size + i * GROUP_ROWS * products.step)])
            return products.load_rows(builder, place, GROUP_ROWS if i < whole else last)

        held = [activations(i) for i in vectors[: products.held]]
        waiting = []
        for j, row in enumerate(rows):
            column = products.load_column(builder, builder.gep(row, [INT64(at)]), n)
            operands = held + [activations(i) for i in vectors[products.held :]]
            terms = [(i * columns + j, operands[i], column) for i in range(whole)]
            waiting.append(column)
            if at_once > 1 and (len(waiting) == at_once or j == columns - 1):
                terms.append((whole * columns + j // at_once, operands[whole], _beside(builder, waiting, last)))
                waiting = []
            added = [products.accumulate(builder, v, column, sums[i]) for i, v, column in terms]
            for (i, _, _), total in zip(terms, finished(builder, added), strict=True):
                sums[i] = total
    return sums


@intrinsic
def dot_line(typing, tile, a, shape, w, columns_at, k):
    """Add the products of all rows in packed `a` and of all weight rows, for values k, k + 1, ... of a cache line of w.

    shape       of the tile
    columns_at  where each weight row begins in w
    """
    products = PRODUCTS[a, w]
    steps = LINE_BITS // w.dtype.bitwidth // products.step

    # All steps here: in a loop of Numba's, LLVM computes the address of the activations anew for each of them, a fifth
    # of the instructions (Zen 3, 4 to 128 rows: 3 to 10 % faster).
    def generate(context, builder, signature, args):
        return context.make_tuple(builder, tile, _dot_steps(products, steps, builder, signature, args, None))

    return tile(tile, a, shape, w, columns_at, types.int64), generate


@intrinsic
def dot_step(typing, tile, a, shape, w, columns_at, k, n):
    """`dot_line` of a single step, values k .. k + `step_size` - 1, of weight rows that end after n values."""
    products = PRODUCTS[a, w]

    def generate(context, builder, signature, args):
        return context.make_tuple(builder, tile, _dot_steps(products, 1, builder, signature, args, args[6]))

    return tile(tile, a, shape, w, columns_at, types.int64, types.int64), generate


#: Steps in which the four lanes of a row are added up: lane i and lane i + distance.
_SUM_DISTANCES = (2, 1)


def row_sums(builder, vectors):
    """One vector whose lanes are, for every row, the sums of its lanes in vectors[0], in vectors[1], ... (at most 4).

    Each step halves what two vectors have left and puts both in one, so four sums of each row cost 9 instructions. A
    vector's lanes meet in the same order whatever stands beside it.
    """
    lanes = vectors[0].type.count
    mask = ir.VectorType(INT32, lanes)
    for distance in _SUM_DISTANCES:
        firsts, seconds = [], []
        for row in range(0, lanes, 4):
            for vector in (0, lanes):  # a shuffle counts on from the first vector to the second
                for i in range(4):
                    (seconds if i // distance % 2 else firsts).append(vector + row + i)
        pairs = zip(vectors[::2], [*vectors[1::2], None], strict=False)
        vectors = [
            builder.fadd(*(builder.shuffle_vector(a, b or a, ir.Constant(mask, half)) for half in (firsts, seconds)))
            for a, b in pairs
        ]
    return vectors[0]


def _chunks(columns):
    """(first column, width) of the parts in which a row of a tile is stored."""
    first = 0
    while first < columns:
        width = next(w for w in (4, 2, 1) if first + w <= columns)
        yield first, width
        first += width


def add_one_by_one(builder, values, row, column_at, first):
    """row[column_at[j]] += values[j]; = if `first`. Columns in the same place have the same value, added once."""
    # All are read before any is written. What lies there before the first block is read too, and thrown away:
    # cheaper than a branch.
    places = [builder.gep(row, [at]) for at in column_at]
    before = [builder.load(place) for place in places]
    for place, value, old in zip(places, values, before, strict=True):
        builder.store(builder.fadd(builder.select(first, FLOAT(0.0), old), value), place)


def _sums_by_row(builder, entries, shape, columns):
    """Of every row of a tile: its number, a vector for each of `_chunks`, and the lane where its sums begin in all."""
    whole, last, at_once = _layout(shape)
    for i in range(whole):
        sums = [row_sums(builder, entries[i * columns + column :][:width]) for column, width in _chunks(columns)]
        for row in range(GROUP_ROWS):
            yield i * GROUP_ROWS + row, sums, 4 * row
    if at_once > 1:
        together = row_sums(builder, entries[whole * columns :])
        lane = [4 * (j % at_once * last) + j // at_once for j in range(columns)]  # of the first row
        for row in range(last):
            lanes = [[4 * row + lane[j] for j in range(column, column + width)] for column, width in _chunks(columns)]
            order = [ir.Constant(ir.VectorType(INT32, LANES), (some + LANES * [0])[:LANES]) for some in lanes]
            yield whole * GROUP_ROWS + row, [builder.shuffle_vector(together, together, o) for o in order], 0


@intrinsic
def store_sums(typing, tile, shape, columns_at, first, out, out_stride, apart, n):
    """out[r * out_stride + j * apart] = the finished dot product (r, j), for j < n; added to it unless `first`.

    All rows of the tile are written. Columns from n on must equal the last one before.
    """
    columns = columns_at.count
    run = ir.VectorType(FLOAT, 8)

    def generate(context, builder, signature, args):
        tile_value, _, _, first, out, stride, apart, n = args
        entries = unpack(builder, tile_value, tile.count)
        rows = [  # (pointer to the row, sums of the chunks, first lane there)
            (builder.gep(out, [builder.mul(stride, INT64(row))]), sums, lane)
            for row, sums, lane in _sums_by_row(builder, entries, shape, columns)
        ]
        widths = [width for _, width in _chunks(columns)]

        def add(places, values, read, write):
            """Write each value, added to what is read at its place; nothing is, if `first`.

            A load, even a masked one of nothing, would wait for what the tile before stored beside it (Xeon, a layer
            of H = 64, F = 128, one token: 0.2 us of 17).
            """
            started = builder.basic_block
            with builder.if_then(builder.not_(first)):
                there = [read(place) for place in places]
                finished = builder.basic_block
            before = [builder.phi(value.type) for value in values]
            for phi, old in zip(before, there, strict=True):
                phi.add_incoming(ir.Constant(phi.type, None), started)
                phi.add_incoming(old, finished)
            for place, old, value in zip(places, before, values, strict=True):
                write(builder.fadd(old, value), place)

        def write_masked():
            for start in range(0, columns, run.count):
                write_run(start)

        def write_run(start):
            """Up to 8 columns, from `start` on: those of two chunks."""
            there = first_lanes(builder, builder.sub(n, INT64(start)), run.count)
            part = slice(start // 4, start // 4 + 2)
            values = []
            for _, sums, lane in rows:
                lanes = [LANES * c + lane + i for c, width in enumerate(widths[part]) for i in range(width)]
                lanes += [lane] * (run.count - len(lanes))
                order = ir.Constant(ir.VectorType(INT32, run.count), lanes)
                values.append(builder.shuffle_vector(sums[part][0], sums[part][-1], order))
            add(
                [builder.gep(row, [INT64(start)]) for row, _, _ in rows],
                values,
                lambda place: masked_load(builder, place, there, ir.Constant(run, None)),
                lambda value, place: masked_store(builder, value, place, there),
            )

        def write_whole():
            places, values = [], []
            for row, sums, lane in rows:
                for (start, width), chunk in zip(_chunks(columns), sums, strict=True):
                    lanes = ir.Constant(ir.VectorType(INT32, width), list(range(lane, lane + width)))
                    places.append(builder.gep(row, [INT64(start)]))
                    values.append(builder.shuffle_vector(chunk, chunk, lanes))
            kinds = iter([value.type for value in values])
            add(
                places,
                values,
                lambda place: unaligned_load(builder, place, next(kinds)),
                lambda value, place: unaligned_store(builder, value, place),
            )

        def write_one_by_one():
            column_at = clamped(builder, apart, builder.sub(n, INT64(1)), columns)
            for row, sums, lane in rows:
                values = [
                    builder.extract_element(chunk, INT32(lane + i))
                    for chunk, width in zip(sums, widths, strict=True)
                    for i in range(width)
                ]
                add_one_by_one(builder, values, row, column_at, first)

        # Masks cost nothing with AVX-512 only (`store_first`; Zen 3, 64 and 128 rows: 4 % faster without).
        together = builder.icmp_signed("==", apart, INT64(1))
        if LANES < 16:
            together = builder.and_(together, builder.icmp_signed("==", n, INT64(columns)))
        with builder.if_else(together) as (side_by_side, one_by_one):
            with side_by_side:
                write_masked() if LANES == 16 else write_whole()
            with one_by_one:
                write_one_by_one()
        return context.get_dummy_value()

    return types.void(tile, shape, columns_at, types.boolean, Floats, *[types.int64] * 3), generate
