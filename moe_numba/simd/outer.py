"""Tiles of outer products: weights stored [in, out], whose columns lie side by side.

A tile has OUTER_ROWS activation rows, packed as in tile.py, and OUTER_VECTORS vectors of neighbouring columns. Every
lane is the sum of one column in order of K, so nothing has to be added up across lanes.
"""

from llvmlite import ir
from numba.core import types

from .plain import intrinsic
from .products import Bfloat16Products
from .target import LANES, OUTER_VECTORS
from .vector import (
    INT32,
    INT64,
    INT_VECTOR,
    SHORT_VECTOR,
    VECTOR,
    Bfloats,
    Floats,
    Vec,
    first_lanes,
    fma_ir,
    masked_load,
    splat_ir,
    store_first,
    unaligned_load,
    unpack,
)

#: Activation rows of a tile.
OUTER_ROWS = 4
#: Columns of a tile.
OUTER_COLUMNS = OUTER_VECTORS * LANES


def _place(builder, memory, at, i):
    return builder.gep(memory, [builder.add(at, INT64(i))])


def _left(builder, n, i, width):
    """Mask of the lanes i .. i + width - 1 that lie before n."""
    return first_lanes(builder, builder.sub(n, INT64(i)), width)


def _load(builder, memory, at, i, n, vector, align):
    """The vector at memory[at + i]; with n only what lies before memory[at + n], and zeros."""
    place = _place(builder, memory, at, i)
    if n is None:
        return unaligned_load(builder, place, vector, align)
    zero = 0.0 if vector == VECTOR else 0
    zeros = ir.Constant(vector, [zero] * vector.count)
    return masked_load(builder, place, _left(builder, n, i, vector.count), zeros)


class _Float32Outer:
    """float32 times float32, one row of weights at a time."""

    step = 1

    @staticmethod
    def columns(builder, w, at, stride, n, both):
        return [_load(builder, w, at, j * LANES, n, VECTOR, 4) for j in range(OUTER_VECTORS)]

    @staticmethod
    def row(builder, a, at, both):
        return splat_ir(builder, builder.load(builder.gep(a, [at])), VECTOR)

    accumulate = staticmethod(fma_ir)


class _WidenedOuter(_Float32Outer):
    """float32 times bfloat16 without AVX512-BF16: shifted left, its bits are those of the float32."""

    @staticmethod
    def columns(builder, w, at, stride, n, both):
        sixteen = ir.Constant(INT_VECTOR, [16] * LANES)
        shorts = (_load(builder, w, at, j * LANES, n, SHORT_VECTOR, 2) for j in range(OUTER_VECTORS))
        return [builder.bitcast(builder.shl(builder.zext(s, INT_VECTOR), sixteen), VECTOR) for s in shorts]


class _Bfloat16Outer:
    """bfloat16 times bfloat16 by AVX512-BF16: two rows of weights at a time, their columns in pairs."""

    step = 2

    @staticmethod
    def columns(builder, w, at, stride, n, both):
        """`both`: whether the second row is there; None: it is."""
        vector, mask = Bfloat16Products.vector, ir.VectorType(INT32, 2 * LANES)
        second_n = n if both is None else builder.select(both, n, INT64(0))
        second_at = builder.add(at, stride)
        columns = []
        for j in range(0, OUTER_COLUMNS, 2 * LANES):
            first = _load(builder, w, at, j, n, vector, 2)
            second = _load(builder, w, second_at, j, second_n, vector, 2)
            for start in (0, LANES):
                order = [i for c in range(start, start + LANES) for i in (c, c + 2 * LANES)]
                pairs = builder.shuffle_vector(first, second, ir.Constant(mask, order))
                columns.append(builder.bitcast(pairs, Bfloat16Products.pairs))
        return columns

    @staticmethod
    def row(builder, a, at, both):
        pair = builder.load(builder.bitcast(builder.gep(a, [at]), INT32.as_pointer()))
        pair.align = 2
        if both is not None:
            pair = builder.select(both, pair, builder.and_(pair, INT32(0xFFFF)))
        return builder.bitcast(splat_ir(builder, pair, INT_VECTOR), Bfloat16Products.pairs)

    @staticmethod
    def accumulate(builder, row, column, total):
        return Bfloat16Products.accumulate(builder, row, column, total)


_OUTER = {
    (Floats, Floats): _Float32Outer,
    (Floats, Bfloats): _WidenedOuter,
    (Bfloats, Bfloats): _Bfloat16Outer,
}


@intrinsic
def outer_step_size(typing, a, w):
    """Values along K that one `outer_step` of activations a and weights w takes."""
    step = _OUTER[a, w].step

    def generate(context, builder, signature, args):
        return INT64(step)

    return types.int64(a, w), generate


def _outer_step(context, builder, signature, args, n, both):
    tile, a, rows_at, a_at, w, stride, k = args[:7]
    a = builder.gep(a, [a_at])
    tile_type, a_type, rows_type, _, w_type = signature.args[:5]
    outer = _OUTER[a_type, w_type]
    sums = unpack(builder, tile, tile_type.count)
    columns = outer.columns(builder, w, builder.mul(k, stride), stride, n, both)
    for i, row_at in enumerate(unpack(builder, rows_at, rows_type.count)):
        row = outer.row(builder, a, row_at, both)
        for j, column in enumerate(columns):
            entry = i * len(columns) + j
            sums[entry] = outer.accumulate(builder, row, column, sums[entry])
    return context.make_tuple(builder, tile_type, sums)


@intrinsic
def outer_step(typing, tile, a, rows_at, a_at, w, stride, k):
    """tile[i, j] += sum of a[rows_at[i] + a_at + m] * w[(k + m) * stride + j] over m < outer_step_size(a, w)"""

    def generate(context, builder, signature, args):
        return _outer_step(context, builder, signature, args, None, None)

    return tile(tile, a, rows_at, types.int64, w, types.int64, types.int64), generate


@intrinsic
def outer_step_partial(typing, tile, a, rows_at, a_at, w, stride, k, n, length):
    """`outer_step` for columns j < n and, if it takes two, m < length.

    A row of activations may be read one value past its end, but that value is not used.
    """

    def generate(context, builder, signature, args):
        both = builder.icmp_signed(">", args[8], INT64(1))
        return _outer_step(context, builder, signature, args, args[7], both)

    return tile(tile, a, rows_at, types.int64, w, *[types.int64] * 4), generate


@intrinsic
def load_outer(typing, first, out, out_at, n):
    """The tile of out[out_at[i] + j] for j < n, with zeros beyond; all zeros if `first`."""
    rows = out_at.count
    tile = types.UniTuple(Vec, rows * OUTER_VECTORS)

    def generate(context, builder, signature, args):
        first, out, out_at, n = args
        n = builder.select(first, INT64(0), n)
        values = [
            _load(builder, out, at, j * LANES, n, VECTOR, 4)
            for at in unpack(builder, out_at, rows)
            for j in range(OUTER_VECTORS)
        ]
        return context.make_tuple(builder, tile, values)

    return tile(types.boolean, Floats, out_at, types.int64), generate


@intrinsic
def store_outer(typing, tile, out, out_at, n):
    """out[out_at[i] + j] = tile[i, j] for j < n. Rows may share a place if they are equal."""
    rows = out_at.count

    def generate(context, builder, signature, args):
        tile_value, out, out_at, n = args
        vectors = iter(unpack(builder, tile_value, tile.count))
        for at in unpack(builder, out_at, rows):
            for j in range(OUTER_VECTORS):
                place = _place(builder, out, at, j * LANES)
                store_first(builder, next(vectors), place, builder.sub(n, INT64(j * LANES)))
        return context.get_dummy_value()

    return types.void(tile, Floats, out_at, types.int64), generate
