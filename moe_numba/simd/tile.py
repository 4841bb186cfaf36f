"""A block of vector registers that accumulates ROWS x COLUMNS dot products.

A tile is a tuple of `rows * columns` vectors; LLVM keeps it in registers. Entry (i, j)
accumulates, lane by lane, the products of activation row i and weight row j; the lanes are
added up once, at the end, always in the same order. The result for one row therefore does
not depend on the rows that share its tile.
"""

from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from .plain import intrinsic
from .target import LANES, TILE_COLUMNS, has_bf16_dot
from .vector import (
    BYTE,
    INT32,
    INT64,
    INT_VECTOR,
    VECTOR,
    ZEROS,
    Bfloats,
    Floats,
    Vec,
    first_lanes,
    fma_ir,
    masked_load,
    unaligned_load,
    unaligned_store,
    unpack,
)

#: Activation rows of the largest tile.
TILE_ROWS = 4


@intrinsic
def zero_tile(typing, rows_at, columns_at):
    """A tile of zeros with as many rows and columns as the tuples have entries."""
    tile = types.UniTuple(Vec, rows_at.count * columns_at.count)

    def generate(context, builder, signature, args):
        return context.make_tuple(builder, tile, [ZEROS] * tile.count)

    return tile(rows_at, columns_at), generate


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
def prefetch(typing, memory, at):
    """Ask for the cache line of memory[at]. Addresses past the array are harmless."""

    def generate(context, builder, signature, args):
        line = builder.bitcast(builder.gep(args[0], [args[1]]), BYTE.as_pointer())
        builder.call(prefetch_function(builder), [line, INT32(0), INT32(2), INT32(1)])
        return context.get_dummy_value()

    return types.void(memory, types.int64), generate


def prefetch_function(builder):
    kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT32, INT32, INT32])
    return cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")


class _Float32Products:
    """float32 times float32, one vector at a time."""

    step = LANES

    @staticmethod
    def load(builder, pointer, n):
        """The next `step` values; with n only the first n, and zeros."""
        if n is None:
            return unaligned_load(builder, pointer)
        return masked_load(builder, pointer, first_lanes(builder, n), ZEROS)

    load_row = load_column = load

    @staticmethod
    def accumulate(builder, row, column, total):
        return fma_ir(builder, row, column, total)


class _Bfloat16(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self):
        return "bfloat"


class Bfloat16Products:
    """bfloat16 times bfloat16 by AVX512-BF16: pairs of products added to each float32 lane."""

    step = 2 * LANES
    vector = ir.VectorType(ir.IntType(16), 2 * LANES)
    pairs = ir.VectorType(_Bfloat16(), 2 * LANES)

    @classmethod
    def load(cls, builder, pointer, n):
        if n is None:
            values = unaligned_load(builder, pointer, cls.vector, align=2)
        else:
            zeros = ir.Constant(cls.vector, [0] * cls.step)
            values = masked_load(builder, pointer, first_lanes(builder, n, cls.step), zeros)
        return builder.bitcast(values, cls.pairs)

    load_row = load_column = load

    @classmethod
    def accumulate(cls, builder, row, column, total):
        kind = ir.FunctionType(VECTOR, [VECTOR, cls.pairs, cls.pairs])
        dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return builder.call(dot, [total, row, column])


class _WidenedProducts(Bfloat16Products):
    """float32 times bfloat16 without AVX512-BF16: weights at even and odd places as float32.

    A pair of bfloat16 is one 32-bit word: shifted left it is the even value as float32, with its
    low half cleared the odd one. The activations are split into even and odd to match.
    """

    @classmethod
    def load_column(cls, builder, pointer, n):
        words = builder.bitcast(super().load(builder, pointer, n), INT_VECTOR)
        sixteen, high = (ir.Constant(INT_VECTOR, [n] * LANES) for n in (16, -65536))
        return [builder.bitcast(w, VECTOR) for w in (builder.shl(words, sixteen), builder.and_(words, high))]

    @classmethod
    def load_row(cls, builder, pointer, n):
        second = builder.gep(pointer, [INT64(LANES)])
        rest = None if n is None else builder.sub(n, INT64(LANES))
        halves = [_Float32Products.load(builder, *at) for at in ((pointer, n), (second, rest))]
        mask = ir.VectorType(INT32, LANES)
        places = (list(range(start, 2 * LANES, 2)) for start in (0, 1))
        return [builder.shuffle_vector(*halves, ir.Constant(mask, list(p))) for p in places]

    @staticmethod
    def accumulate(builder, row, column, total):
        for values, weights in zip(row, column, strict=True):
            total = fma_ir(builder, values, weights, total)
        return total


_PRODUCTS = {
    (Floats, Floats): _Float32Products,
    (Bfloats, Bfloats): Bfloat16Products,
    (Floats, Bfloats): _WidenedProducts,
}


@lru_cache
def operand_dtype(storage):
    """dtype of the activations that are multiplied with weights of a storage dtype, as `_PRODUCTS` wants."""
    return np.dtype(np.uint16 if storage == np.uint16 and has_bf16_dot() else np.float32)


@intrinsic
def step_size(typing, a, w):
    """Values along K that one `dot_step` of activations a and weights w takes."""
    step = _PRODUCTS[a, w].step

    def generate(context, builder, signature, args):
        return INT64(step)

    return types.int64(a, w), generate


@intrinsic
def line_size(typing, memory):
    """Values in a cache line of 64 bytes."""

    def generate(context, builder, signature, args):
        return INT64(64 * 8 // memory.dtype.bitwidth)

    return types.int64(memory), generate


def _dot_step(products, context, builder, signature, args, n):
    """Multiply one step of every activation row with one of every weight row."""
    tile, a, rows_at, w, columns_at, k = args[:6]
    tile_type, _, rows_type, _, columns_type = signature.args[:5]
    sums = unpack(builder, tile, tile_type.count)

    def place(memory, offsets, i):
        row = builder.gep(memory, [builder.extract_value(offsets, i)])
        return builder.gep(row, [k])

    rows = [products.load_row(builder, place(a, rows_at, i), n) for i in range(rows_type.count)]
    for j in range(columns_type.count):
        column = products.load_column(builder, place(w, columns_at, j), n)
        for i, row in enumerate(rows):
            entry = i * columns_type.count + j
            sums[entry] = products.accumulate(builder, row, column, sums[entry])
    return context.make_tuple(builder, tile_type, sums)


@intrinsic
def dot_step(typing, tile, a, rows_at, w, columns_at, k):
    """tile[i, j] += a[rows_at[i] + k :][:s] . w[columns_at[j] + k :][:s] for s = step_size(a, w)"""
    products = _PRODUCTS[a, w]

    def generate(context, builder, signature, args):
        return _dot_step(products, context, builder, signature, args, None)

    return tile(tile, a, rows_at, w, columns_at, types.int64), generate


@intrinsic
def dot_step_partial(typing, tile, a, rows_at, w, columns_at, k, n):
    """`dot_step` over n < step_size(a, w) values."""
    products = _PRODUCTS[a, w]

    def generate(context, builder, signature, args):
        return _dot_step(products, context, builder, signature, args, args[6])

    return tile(tile, a, rows_at, w, columns_at, types.int64, types.int64), generate


#: Steps in which the lanes of a vector are added up: within every `block` lanes, lane i and lane
#: i + distance. Those within 128 bits come first: shuffles that stay there are the cheapest.
_SUM_STEPS = [(4, 2), (4, 1), *((LANES, d) for d in (8, 4) if d < LANES)]


def _lane_sums(builder, vectors):
    """One vector whose lane i is the sum over the lanes of vectors[i]; at most LANES of them.

    Each step halves what two vectors have left and puts both in one, so LANES sums cost 3 (LANES - 1)
    instructions. A vector's lanes meet in the same order whatever stands beside it.
    """
    mask = ir.VectorType(INT32, LANES)
    for block, distance in _SUM_STEPS:
        firsts, seconds = [], []
        for start in range(0, LANES, block):
            for vector in (0, LANES):  # a shuffle counts on from the first vector to the second
                for i in range(start, start + block):
                    (seconds if i // distance % 2 else firsts).append(vector + i)
        pairs = zip(vectors[::2], [*vectors[1::2], None], strict=False)
        vectors = [
            builder.fadd(*(builder.shuffle_vector(a, b or a, ir.Constant(mask, half)) for half in (firsts, seconds)))
            for a, b in pairs
        ]
    return vectors[0]


def _zeros(vector):
    return ir.Constant(vector, [0.0] * vector.count)


def _chunks(rows, columns):
    """(first column, width) of the parts in which a tile is stored: sums of one part fill one vector at most."""
    first = 0
    while first < columns:
        width = next(w for w in (4, 2, 1) if w * rows <= LANES and first + w <= columns)
        yield first, width
        first += width


@intrinsic
def store_sums(typing, tile, columns_at, first, out, out_at, apart, n):
    """out[out_at[i] + j * apart] = the finished dot product (i, j), for j < n; added to it unless `first`.

    Rows may share a place if they are equal; so do columns from n on, which are equal to the last one before.
    """
    rows, columns = out_at.count, columns_at.count

    def generate(context, builder, signature, args):
        tile_value, _, first, out, out_at, apart, n = args
        vectors = unpack(builder, tile_value, tile.count)
        row_at = unpack(builder, out_at, rows)
        parts = []  # (row, first column, sums) of each row of each chunk
        for column, width in _chunks(rows, columns):
            chunk = [vectors[i * columns + column + j] for i in range(rows) for j in range(width)]
            sums = _lane_sums(builder, chunk)
            for i in range(rows):
                lanes = ir.Constant(ir.VectorType(INT32, width), list(range(i * width, (i + 1) * width)))
                parts.append((i, column, builder.shuffle_vector(sums, sums, lanes)))

        def write(parts):
            # All are read before any is written: what is computed twice is added once. What lies there
            # before the first block is read too, and thrown away: cheaper than a branch.
            places = [builder.gep(out, [at]) for at, _ in parts]
            before = [
                unaligned_load(builder, place, value.type) for place, (_, value) in zip(places, parts, strict=True)
            ]
            for place, (_, value), old in zip(places, parts, before, strict=True):
                old = builder.select(first, ir.Constant(value.type, None), old)
                unaligned_store(builder, builder.fadd(old, value), place)

        whole = builder.icmp_signed("==", n, INT64(columns))
        adjacent = builder.icmp_signed("==", apart, INT64(1))
        with builder.if_else(builder.and_(whole, adjacent)) as (together, one_by_one):
            with together:
                write([(builder.add(row_at[i], INT64(column)), sums) for i, column, sums in parts])
            with one_by_one:
                column_at = clamped(builder, apart, builder.sub(n, INT64(1)), columns)
                write(
                    [
                        (builder.add(row_at[i], column_at[column + j]), builder.extract_element(sums, INT32(j)))
                        for i, column, sums in parts
                        for j in range(sums.type.count)
                    ]
                )
        return context.get_dummy_value()

    return types.void(tile, columns_at, types.boolean, Floats, out_at, types.int64, types.int64), generate
