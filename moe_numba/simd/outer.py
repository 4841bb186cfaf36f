"""Tiles of outer products: weights stored [in, out], whose columns lie side by side.

A tile has a single activation row, or some groups of GROUP_ROWS, packed as in tile.py, and some vectors of neighbouring
columns. Every lane is the sum of one column in order of K, so nothing has to be added up across lanes.
"""

from llvmlite import ir
from numba.core import types

from .plain import intrinsic
from .products import LINE_BITS, Bfloat16Products
from .target import GROUP_ROWS, LANES, OUTER_GROUPS, OUTER_ROWS, OUTER_VECTORS
from .vector import (
    INT32,
    INT64,
    INT_VECTOR,
    SHORT_VECTOR,
    VECTOR,
    Bfloats,
    Floats,
    Vec,
    finished,
    first_lanes,
    fma_ir,
    masked_load,
    splat_ir,
    store_first,
    unaligned_load,
    unpack,
)

#: What stands for the number of a tile's rows, as shapes in tile.py: a tuple of as many entries. A single row, and
#: groups of rows.
ONE_ROW = (0,)
GROUPS = tuple(tuple(range(min(groups, OUTER_GROUPS) * GROUP_ROWS)) for groups in range(1, 5))
#: The same for its vectors (of a tile with a single group see `line_vectors`).
OUTER = tuple(range(OUTER_VECTORS))


def _load(builder, memory, i, n, vector, align):
    """The vector at memory[i]; with n only what lies before memory[n], and zeros."""
    place = builder.gep(memory, [INT64(i)])
    if n is None:
        return unaligned_load(builder, place, vector, align)
    zero = 0.0 if vector == VECTOR else 0
    zeros = ir.Constant(vector, [zero] * vector.count)
    return masked_load(builder, place, first_lanes(builder, builder.sub(n, INT64(i)), vector.count), zeros)


class _Float32Outer:
    """float32 times float32, one row of weights at a time."""

    #: Rows of weights of one multiply-add.
    step = 1
    #: Vectors of columns that wait in registers while they meet all rows of activations, at most.
    held = OUTER_VECTORS

    @staticmethod
    def columns(builder, rows, start, count, n, both):
        """`count` vectors of columns of `step` rows of weights, from `start` on; with n those before n, and zeros."""
        return [_load(builder, rows[0], start + j * LANES, n, VECTOR, 4) for j in range(count)]

    @staticmethod
    def value(builder, a):
        """`step` values of a row of activations, in every lane."""
        return splat_ir(builder, builder.load(a), VECTOR)

    accumulate = staticmethod(fma_ir)


class _WidenedOuter(_Float32Outer):
    """float32 times bfloat16 without AVX512-BF16: shifted left, its bits are those of the float32."""

    @staticmethod
    def columns(builder, rows, start, count, n, both):
        sixteen = ir.Constant(INT_VECTOR, [16] * LANES)
        shorts = (_load(builder, rows[0], start + j * LANES, n, SHORT_VECTOR, 2) for j in range(count))
        return [builder.bitcast(builder.shl(builder.zext(s, INT_VECTOR), sixteen), VECTOR) for s in shorts]


class _Bfloat16Outer:
    """bfloat16 times bfloat16 by AVX512-BF16: two rows of weights at a time, their columns in pairs."""

    step = 2
    held = 2  # pairing takes registers, too

    @staticmethod
    def columns(builder, rows, start, count, n, both):
        """`count` is two. `both`: whether the second row is there; None: it is."""
        vector, mask = Bfloat16Products.vector, ir.VectorType(INT32, 2 * LANES)
        second_n = n if both is None else builder.select(both, n, INT64(0))
        first = _load(builder, rows[0], start, n, vector, 2)
        second = _load(builder, rows[1], start, second_n, vector, 2)
        columns = []
        for half in (0, LANES):
            order = [i for c in range(half, half + LANES) for i in (c, c + 2 * LANES)]
            pairs = builder.shuffle_vector(first, second, ir.Constant(mask, order))
            columns.append(builder.bitcast(pairs, Bfloat16Products.pairs))
        return columns

    @staticmethod
    def value(builder, a):
        pair = builder.load(builder.bitcast(a, INT32.as_pointer()))
        pair.align = 2
        return builder.bitcast(splat_ir(builder, pair, INT_VECTOR), Bfloat16Products.pairs)

    @staticmethod
    def accumulate(builder, value, column, total):
        return Bfloat16Products.accumulate(builder, value, column, total)


_OUTER = {
    (Floats, Floats): _Float32Outer,
    (Floats, Bfloats): _WidenedOuter,
    (Bfloats, Bfloats): _Bfloat16Outer,
}


@intrinsic
def line_vectors(typing, w):
    """What stands for as many vectors of columns as a cache line of w holds (see OUTER)."""
    vectors = types.UniTuple(types.int64, LINE_BITS // w.dtype.bitwidth // LANES)

    def generate(context, builder, signature, args):
        return context.make_tuple(builder, vectors, [INT64(i) for i in range(vectors.count)])

    return vectors(w), generate


@intrinsic
def outer_step_size(typing, a, w):
    """Values along K that one `outer_step` of activations a and weights w takes."""
    step = _OUTER[a, w].step

    def generate(context, builder, signature, args):
        return INT64(step)

    return types.int64(a, w), generate


def _outer_steps(context, builder, signature, args, size, n=None, both=None):
    """Multiply `size` values of every row of activations with as many rows of weights."""
    tile, a, vectors, w, stride = args[:5]
    tile_type, a_type, vectors, w_type = signature.args[:4]
    outer, run = _OUTER[a_type, w_type], 128 // a_type.dtype.bitwidth
    sums, vectors = unpack(builder, tile, tile_type.count), vectors.count
    height = len(sums) // vectors
    for k in range(0, size, outer.step):
        rows = [builder.gep(w, [builder.mul(stride, INT64(k + i))]) for i in range(outer.step)]
        for j in range(0, vectors, outer.held):
            columns = outer.columns(builder, rows, j * LANES, min(outer.held, vectors - j), n, both)
            for i in range(height):
                value = outer.value(builder, builder.gep(a, [INT64((k // run * height + i) * run + k % run)]))
                for entry, column in enumerate(columns, i * vectors + j):
                    sums[entry] = outer.accumulate(builder, value, column, sums[entry])
            sums = finished(builder, sums)
    return context.make_tuple(builder, tile_type, sums)


@intrinsic
def outer_run(typing, tile, a, vectors, w, stride):
    """tile[i, j] += sum of value m of row i * w[m * stride + j] over m < `step_size`: all that 128 bits of a row hold.

    a: packed activations; row i of the tile has its values side by side, from a[i * step_size] on.
    """
    size = 128 // a.dtype.bitwidth

    def generate(context, builder, signature, args):
        return _outer_steps(context, builder, signature, args, size)

    return tile(tile, a, vectors, w, types.int64), generate


@intrinsic
def outer_block(typing, tile, a, vectors, w, stride):
    """`outer_run` of OUTER_ROWS rows of weights. The tile has all rows of a packed one."""

    def generate(context, builder, signature, args):
        return _outer_steps(context, builder, signature, args, OUTER_ROWS)

    return tile(tile, a, vectors, w, types.int64), generate


@intrinsic
def outer_step(typing, tile, a, vectors, w, stride, n, length):
    """`outer_run` of `outer_step_size` values only, for columns j < n; of two rows of weights, only `length` are read.

    (Behind the end of the activations there are zeros.)
    """
    size = _OUTER[a, w].step

    def generate(context, builder, signature, args):
        both = builder.icmp_signed(">", args[6], INT64(1))
        return _outer_steps(context, builder, signature, args, size, args[5], both)

    return tile(tile, a, vectors, w, types.int64, types.int64, types.int64), generate


def _places(builder, out, stride, rows):
    """Pointers to the rows of a tile of outputs."""
    return [builder.gep(out, [builder.mul(stride, INT64(i))]) for i in range(rows)]


@intrinsic
def load_outer(typing, rows, vectors, first, out, out_stride, n):
    """The tile of out[i * out_stride + j] for j < n, with zeros beyond; all zeros if `first`.

    rows     ONE_ROW or one of GROUPS
    vectors  OUTER or `line_vectors`
    """
    tile, per_row = types.UniTuple(Vec, rows.count * vectors.count), range(vectors.count)

    def generate(context, builder, signature, args):
        _, _, first, out, stride, n = args
        n = builder.select(first, INT64(0), n)
        places = _places(builder, out, stride, rows.count)
        values = [_load(builder, place, j * LANES, n, VECTOR, 4) for place in places for j in per_row]
        return context.make_tuple(builder, tile, values)

    return tile(rows, vectors, types.boolean, Floats, types.int64, types.int64), generate


@intrinsic
def store_outer(typing, tile, vectors, out, out_stride, n):
    """out[i * out_stride + j] = tile[i, j] for j < n."""

    def generate(context, builder, signature, args):
        tile_value, _, out, stride, n = args
        values = iter(unpack(builder, tile_value, tile.count))
        for place in _places(builder, out, stride, tile.count // vectors.count):
            for j in range(vectors.count):
                at = builder.gep(place, [INT64(j * LANES)])
                store_first(builder, next(values), at, builder.sub(n, INT64(j * LANES)))
        return context.get_dummy_value()

    return types.void(tile, vectors, Floats, types.int64, types.int64), generate
