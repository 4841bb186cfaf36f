"""A single row of activations: dot products with ROW_COLUMNS weight rows, each of which has 128 bits of a register.

As in tile.py, four lanes have the partial sums of a product, and add up in the same order: the result is the one that
the row has among others. But nothing is computed for rows that are not there. float32, and bfloat16 by AVX512-BF16,
are multiplied 128 bits of a weight row at a time, straight from memory: an instruction, where a tile of GROUP_ROWS rows
has two. bfloat16 that are widened lie side by side, those of as many weight rows as a register holds.

A row alone is packed as it is, its values side by side (in tile.py's words: a tile of one row).
"""

from llvmlite import ir
from numba.core import types

from .plain import intrinsic
from .products import LINE_BITS, PRODUCTS, load_block
from .target import ROW_COLUMNS
from .tile import add_one_by_one, clamped, row_sums
from .vector import FLOAT, INT32, INT64, Floats, VecType, finished, unpack


@intrinsic
def zero_row(typing, a, w):
    """Sums of zeros of a row like that at `a` and ROW_COLUMNS weight rows like those at `w`.

    Lanes 4 g .. 4 g + 3 of vector v belong to weight row v * beside + g, with the products' `beside`.
    """
    products = PRODUCTS[a, w]
    lanes = 4 * products.beside
    sums = types.UniTuple(VecType(lanes), ROW_COLUMNS // products.beside)

    def generate(context, builder, signature, args):
        zeros = ir.Constant(ir.VectorType(FLOAT, lanes), [0.0] * lanes)
        return context.make_tuple(builder, sums, [zeros] * sums.count)

    return sums(a, w), generate


def _joined(builder, vectors):
    """One vector with the elements of all (a power of two of them)."""
    while len(vectors) > 1:
        order = ir.Constant(ir.VectorType(INT32, 2 * vectors[0].type.count), list(range(2 * vectors[0].type.count)))
        vectors = [builder.shuffle_vector(a, b, order) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def _dot_blocks(context, builder, signature, args, blocks, n=None):
    """Add the products of `blocks` times 128 bits of each weight row; with n, of n values at most."""
    sums, a, w, columns_at, k = args[:5]
    sums_type, a_type, w_type, columns_type = signature.args[:4]
    products, activations = PRODUCTS[a_type, w_type], PRODUCTS[a_type, a_type]
    bits = w_type.dtype.bitwidth
    block = ir.VectorType(FLOAT if bits == 32 else ir.IntType(bits), 128 // bits)
    sums = unpack(builder, sums, sums_type.count)
    rows = [builder.gep(builder.gep(w, [at]), [k]) for at in unpack(builder, columns_at, columns_type.count)]
    a = builder.gep(a, [k])
    beside = products.beside
    for at in range(0, blocks * block.count, block.count):
        values = []
        for i in range(at, at + block.count, products.step):
            left = None if n is None else builder.sub(n, INT64(i))
            values.append(activations.load_column(builder, builder.gep(a, [INT64(i)]), left, beside))
        for v in range(len(sums)):
            mine = rows[v * beside :][:beside]
            columns = _joined(builder, [load_block(builder, builder.gep(r, [INT64(at)]), block, n) for r in mine])
            for value, column in zip(values, products.side_by_side(builder, columns), strict=True):
                sums[v] = products.accumulate(builder, value, column, sums[v])
        sums = finished(builder, sums)
    return context.make_tuple(builder, sums_type, sums)


@intrinsic
def row_dot_line(typing, sums, a, w, columns_at, k):
    """Add the products of the row in packed `a` and of all weight rows, for values k, k + 1, ... of a cache line of w.

    columns_at  where each weight row begins in w
    """
    blocks = LINE_BITS // 128

    def generate(context, builder, signature, args):
        return _dot_blocks(context, builder, signature, args, blocks)

    return sums(sums, a, w, columns_at, types.int64), generate


@intrinsic
def row_dot_block(typing, sums, a, w, columns_at, k, n):
    """`row_dot_line` of 128 bits of w, of rows that end after n values."""

    def generate(context, builder, signature, args):
        return _dot_blocks(context, builder, signature, args, 1, args[5])

    return sums(sums, a, w, columns_at, types.int64, types.int64), generate


@intrinsic
def store_row(typing, sums, columns_at, first, out, apart, n):
    """out[j * apart] = the finished dot product j, for j < n; added to it unless `first`.

    Columns from n on must equal the last one before.
    """
    beside = sums.dtype.lanes // 4

    def generate(context, builder, signature, args):
        vectors, _, first, out, apart, n = args
        together = row_sums(builder, unpack(builder, vectors, sums.count))
        lanes = [4 * g + v for v in range(sums.count) for g in range(beside)]
        values = [builder.extract_element(together, INT32(lane)) for lane in lanes]
        add_one_by_one(builder, values, out, clamped(builder, apart, builder.sub(n, INT64(1)), ROW_COLUMNS), first)
        return context.get_dummy_value()

    return types.void(sums, columns_at, types.boolean, Floats, types.int64, types.int64), generate
