"""The matrix unit of Intel processors (AMX): tiles of products of bfloat16, summed in float32.

A tile register holds 16 rows of 64 bytes. Here

- registers 0 to 3 are sums: [i, j] = 16 rows of the first operand's part i times 16 columns of the second one's
  part j, register 2 i + j;
- registers 4 and 5 hold the first operand, 16 rows of DEPTH values;
- registers 6 and 7 hold the second one, DEPTH values of 16 columns, in pairs: row p has values 2 p and 2 p + 1 of every
  column.

Weights as checkpoints store them, [out, in], are a first operand as they are, and tokens the second one (`pack_pairs`).
Of weights stored [in, out], a register has 16 rows of 32 columns as they lie there: its pairs are neighbouring columns
of one row, and tokens, the first operand, come with a 0 in place of the one or of the other (amx_transposed.py).

The unit adds up even and odd values of a step apart, then both to the sum, for every column alike, whatever the other
columns hold (Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS). Denormals count as 0.
"""

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .vector import (
    BFLOAT16,
    BYTE,
    INT32,
    INT64,
    SHORT_VECTOR,
    VECTOR,
    ZEROS,
    Bfloats,
    Floats,
    Vec,
    first_lanes,
    masked_load,
    unaligned_load,
    unaligned_store,
    unpack,
)

#: Rows of a tile register, and the float32 or pairs of bfloat16 in each.
TILE = 16
#: Values along K in one step.
DEPTH = 2 * TILE
#: Values of a packed tile of tokens.
PACKED_TILE = DEPTH * TILE
#: Sums of one register.
SUMS = TILE * TILE

_BYTES = BYTE.as_pointer()
_ROW_BYTES = 64
_FIRST, _SECOND = 4, 6  # first registers of the operands
_SHORTS = ir.VectorType(ir.IntType(16), DEPTH)


def _configurations():
    """(TILE + 1, TILE + 1, 64) uint8: what `configure_tiles` loads for the rows of the first operand's parts."""
    table = np.zeros((TILE + 1, TILE + 1, 64), np.uint8)
    table[:, :, 0] = 1  # the only palette there is
    table[:, :, 16:32].view(np.uint16)[...] = _ROW_BYTES
    rows = table[:, :, 48:56]
    rows[...] = TILE
    for part in (0, 1):
        for register in (2 * part, 2 * part + 1, _FIRST + part):
            rows[:, :, register] = np.expand_dims(np.arange(TILE + 1), 1 - part)
    return table


CONFIGURATIONS = _configurations()


def _call(builder, name, *args):
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


def _place(builder, memory, at):
    return builder.bitcast(builder.gep(memory, [at]), _BYTES)


@intrinsic
def configure_tiles(typing, configuration):
    """Take the unit into use on this thread, with the rows that an entry of CONFIGURATIONS says; sums become 0."""

    def generate(context, builder, signature, args):
        _call(builder, "ldtilecfg", builder.bitcast(args[0], _BYTES))
        return context.get_dummy_value()

    return types.void(configuration), generate


@intrinsic
def release_tiles(typing):
    """Leave the unit: from here on the thread's registers need not be saved any more."""

    def generate(context, builder, signature, args):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def _sums_at(builder, out, parts_at, out_at):
    """(register, place) of every sum: of parts i and j it lies at out[parts_at[i] + out_at[j]]."""
    for j, column in enumerate(out_at):
        for i, row in enumerate(parts_at):
            yield BYTE(2 * i + j), _place(builder, out, builder.add(row, column))


@intrinsic
def begin_sums(typing, first, out, parts_at, stride, out_at):
    """Set all sums to 0 if `first`, else to what is in `out`.

    Those of the first operand's part i and the second one's part j lie at out[parts_at[i] + out_at[j]], their rows
    `stride` values apart.
    """

    def generate(context, builder, signature, args):
        first, out, parts, stride, at = args
        parts, at = unpack(builder, parts, parts_at.count), unpack(builder, at, out_at.count)
        places = list(_sums_at(builder, out, parts, at))
        with builder.if_else(first) as (zero, resume):
            with zero:
                for register, _ in places:
                    _call(builder, "tilezero", register)
            with resume:
                for register, place in places:
                    _call(builder, "tileloadd64", register, place, builder.mul(stride, INT64(4)))
        return context.get_dummy_value()

    return types.void(types.boolean, Floats, parts_at, types.int64, out_at), generate


@intrinsic
def store_sums(typing, out, parts_at, stride, out_at):
    """Write the sums to where `begin_sums` reads them."""

    def generate(context, builder, signature, args):
        out, parts, stride, at = args
        parts, at = unpack(builder, parts, parts_at.count), unpack(builder, at, out_at.count)
        for register, place in _sums_at(builder, out, parts, at):
            _call(builder, "tilestored64", register, place, builder.mul(stride, INT64(4)))
        return context.get_dummy_value()

    return types.void(Floats, parts_at, types.int64, out_at), generate


@intrinsic
def multiply_step(typing, rows, rows_at, stride, pairs, pairs_stride, pairs_at):
    """Add the products of one step to the sums.

    rows     the first operand: rows of part i begin at rows[rows_at[i]], rows[rows_at[i] + stride], ...
    pairs    the second one: rows of part j begin at pairs[pairs_at[j]], pairs[pairs_at[j] + pairs_stride], ...
    """

    def generate(context, builder, signature, args):
        rows, parts, stride, pairs, pairs_stride, at = args
        stride, pairs_stride = (builder.mul(n, INT64(2)) for n in (stride, pairs_stride))  # bytes
        for j, start in enumerate(unpack(builder, at, pairs_at.count)):
            _call(builder, "tileloadd64", BYTE(_SECOND + j), _place(builder, pairs, start), pairs_stride)
        for i, start in enumerate(unpack(builder, parts, rows_at.count)):
            _call(builder, "tileloadd64", BYTE(_FIRST + i), _place(builder, rows, start), stride)
            for j in range(pairs_at.count):
                _call(builder, "tdpbf16ps", BYTE(2 * i + j), BYTE(_FIRST + i), BYTE(_SECOND + j))
        return context.get_dummy_value()

    return types.void(Bfloats, rows_at, types.int64, Bfloats, types.int64, pairs_at), generate


# ---- the order in which the unit wants its second operand, and in which it leaves sums ----


def _rounded(builder, first, second):
    """The values of two float32 vectors rounded to bfloat16, end to end. Denormals become 0, as in a product."""
    shorts = ir.VectorType(BFLOAT16, DEPTH)
    kind = ir.FunctionType(shorts, [VECTOR, VECTOR])
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    both = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [second, first])
    return builder.bitcast(both, _SHORTS)


@intrinsic
def store_pairs(typing, first, second, memory, at):
    """Write the lanes of two vectors, rounded to bfloat16, in turn: a row of a packed tile."""

    def generate(context, builder, signature, args):
        first, second, memory, at = args
        values = _rounded(builder, first, second)
        in_turn = ir.Constant(ir.VectorType(INT32, DEPTH), [i + start for i in range(TILE) for start in (0, TILE)])
        unaligned_store(builder, builder.shuffle_vector(values, values, in_turn), builder.gep(memory, [at]), align=2)
        return context.get_dummy_value()

    return types.void(Vec, Vec, Bfloats, types.int64), generate


def _shuffle(builder, a, b, order):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, TILE), order))


def _transposed(builder, rows):
    """16 vectors whose vector i has lane i of each of the 16 `rows`: four steps, each of 16 shuffles.

    The first two exchange within 128 bits, which is cheapest: 4 x 4 values. The others move those 128 bits.
    """

    def zip_within(a, b, width, start):
        """Runs of `width` lanes of a and of b in turn, from the first or the second half of every 128 bits."""
        order = []
        for block in range(0, TILE, 4):
            for run in range(start, start + 2, width):
                order += [block + run + i for i in range(width)] + [TILE + block + run + i for i in range(width)]
        return _shuffle(builder, a, b, order)

    def pick_blocks(a, b, first):
        """128-bit blocks first and first + 2 of a, then of b."""
        blocks = [first, first + 2, 4 + first, 6 + first]
        return _shuffle(builder, a, b, [4 * block + i for block in blocks for i in range(4)])

    columns = []  # columns[g][c]: its block L holds column 4 L + c of rows 4 g .. 4 g + 3
    for g in range(0, TILE, 4):
        r0, r1, r2, r3 = rows[g : g + 4]
        low, high = ((zip_within(r0, r1, 1, s), zip_within(r2, r3, 1, s)) for s in (0, 2))
        columns.append([zip_within(*half, 2, s) for half in (low, high) for s in (0, 2)])
    result = [None] * TILE
    for c in range(4):
        a, b, d, e = (group[c] for group in columns)
        for first in (0, 1):
            left, right = pick_blocks(a, b, first), pick_blocks(d, e, first)
            result[4 * first + c] = pick_blocks(left, right, 0)
            result[4 * (first + 2) + c] = pick_blocks(left, right, 1)
    return result


@intrinsic
def pack_pairs(typing, x, width, row_ids, last, k, packed):
    """One packed tile of 16 tokens: values k .. k + DEPTH - 1 of each, rounded to bfloat16; zeros beyond `width`.

    x is float32, token r begins at x[row_ids[min(r, last)] * width] (row_ids a pointer to int64).
    """

    def generate(context, builder, signature, args):
        x, width, row_ids, last, k, packed = args
        n = builder.sub(width, k)
        rest = builder.sub(n, INT64(TILE))
        tokens = []
        for r in range(TILE):
            exists = builder.icmp_signed("<", INT64(r), last)
            row = builder.load(builder.gep(row_ids, [builder.select(exists, INT64(r), last)]))
            at = builder.add(builder.mul(row, width), k)
            low = masked_load(builder, builder.gep(x, [at]), first_lanes(builder, n), ZEROS)
            at = builder.add(at, INT64(TILE))
            high = masked_load(builder, builder.gep(x, [at]), first_lanes(builder, rest), ZEROS)
            tokens.append(builder.bitcast(_rounded(builder, low, high), VECTOR))
        for p, vector in enumerate(_transposed(builder, tokens)):
            place = builder.bitcast(builder.gep(packed, [INT64(DEPTH * p)]), VECTOR.as_pointer())
            builder.store(vector, place).align = 2
        return context.get_dummy_value()

    row_ids = types.CPointer(types.int64)
    return types.void(Floats, types.int64, row_ids, types.int64, types.int64, Bfloats), generate


@intrinsic
def store_tokens(typing, sums, out, out_stride):
    """out[r * out_stride + i] = the sum of weight row i and token r, for all of a register's."""

    def generate(context, builder, signature, args):
        sums, out, stride = args
        tile = [unaligned_load(builder, builder.gep(sums, [INT64(TILE * i)])) for i in range(TILE)]
        for r, vector in enumerate(_transposed(builder, tile)):
            unaligned_store(builder, vector, builder.gep(out, [builder.mul(stride, INT64(r))]))
        return context.get_dummy_value()

    return types.void(Floats, Floats, types.int64), generate


@intrinsic
def copy_shorts(typing, memory, at, n, out, out_at):
    """Copy n (at most DEPTH) 16-bit values and add zeros up to DEPTH."""

    def generate(context, builder, signature, args):
        memory, at, n, out, out_at = args
        for start in (0, TILE):
            zeros = ir.Constant(SHORT_VECTOR, [0] * TILE)
            mask = first_lanes(builder, builder.sub(n, INT64(start)))
            values = masked_load(builder, builder.gep(memory, [builder.add(at, INT64(start))]), mask, zeros)
            place = builder.gep(out, [builder.add(out_at, INT64(start))])
            builder.store(values, builder.bitcast(place, SHORT_VECTOR.as_pointer())).align = 2
        return context.get_dummy_value()

    return types.void(Bfloats, types.int64, types.int64, Bfloats, types.int64), generate
