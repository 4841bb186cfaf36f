"""One vector register as a Numba type.

`Vec` holds LANES float32 values and is what LLVM calls `<LANES x float>`. (A VecType of fewer is part of a register.)

Memory is addressed through `pointer(array, start)`, element `at` of which is
`array.flat[start + at]` of a C-contiguous array of any rank. A pointer and not the array,
because Numba counts references on every array that is passed to a function: two atomic
operations and a spill of all vector registers for each, which took a quarter to a third of the time of a tile.
The caller keeps the array alive.
Nothing here checks bounds.
"""

import operator

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import models, overload, register_model

from .plain import intrinsic
from .target import LANES, register_constraint

FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
BYTE = ir.IntType(8)
INT32 = ir.IntType(32)
INT64 = ir.IntType(64)
INT_VECTOR = ir.VectorType(INT32, LANES)
SHORT_VECTOR = ir.VectorType(ir.IntType(16), LANES)
ZEROS = ir.Constant(VECTOR, [0.0] * LANES)


class _Bfloat16(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self):
        return "bfloat"


BFLOAT16 = _Bfloat16()


class VecType(types.Type):
    """Numba type of a vector of float32 values."""

    def __init__(self, lanes=LANES):
        self.lanes = lanes
        super().__init__(name=f"Vec(float32 x {lanes})")


Vec = VecType()


@register_model(VecType)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(FLOAT, fe_type.lanes))


# ---- pieces of IR, shared with tile.py and outer.py ----


def unpack(builder, aggregate, count):
    """The entries of a tuple."""
    return [builder.extract_value(aggregate, i) for i in range(count)]


def unaligned_load(builder, pointer, vector=VECTOR, align=4):
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = align
    return value


def unaligned_store(builder, value, pointer, align=4):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = align


def splat_ir(builder, scalar, vector):
    """Every lane of `vector` (an IR vector type) set to the IR value `scalar`."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, INT32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INT32, vector.count), [0] * vector.count))


def first_lanes(builder, n, lanes=LANES):
    """Mask `<lanes x i1>` of the first n lanes (n: an i64 value)."""
    vector = ir.VectorType(INT32, lanes)
    count = splat_ir(builder, builder.trunc(n, INT32), vector)
    return builder.icmp_signed("<", ir.Constant(vector, list(range(lanes))), count)


def _suffix(vector):
    """How LLVM's intrinsics name a vector type: v16f32, v32i16."""
    kind = "f32" if vector.element == FLOAT else f"i{vector.element.width}"
    return f"v{vector.count}{kind}"


def masked_load(builder, pointer, mask, other):
    """Lanes of the mask; the others are those of `other`, and their memory is not touched."""
    vector = other.type
    load = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector, [vector.as_pointer(), INT32, mask.type, vector]),
        f"llvm.masked.load.{_suffix(vector)}.p0",
    )
    return builder.call(load, [builder.bitcast(pointer, vector.as_pointer()), INT32(2), mask, other])


def masked_store(builder, value, pointer, mask):
    store = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [value.type, value.type.as_pointer(), INT32, mask.type]),
        f"llvm.masked.store.{_suffix(value.type)}.p0",
    )
    builder.call(store, [value, builder.bitcast(pointer, value.type.as_pointer()), INT32(2), mask])


def store_first(builder, value, pointer, n):
    """Write the first n lanes.

    Whole vectors without a mask, except with AVX-512: AVX2's masked stores are slow on AMD (Zen 3, olmoe, T = 64: 2 %).
    """
    if LANES == 16:
        masked_store(builder, value, pointer, first_lanes(builder, n, value.type.count))
        return
    with builder.if_else(builder.icmp_signed(">=", n, INT64(value.type.count))) as (whole, part):
        with whole:
            unaligned_store(builder, value, pointer)
        with part:
            masked_store(builder, value, pointer, first_lanes(builder, n, value.type.count))


def fma_ir(builder, a, b, c):
    kind = ir.FunctionType(c.type, [c.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.{_suffix(c.type)}")
    return builder.call(function, [a, b, c])


def finished(builder, sums):
    """The same sums, behind an empty piece of assembly that wants all of them, and before which memory is not read.

    Without it LLVM collects the loads of several steps in front of their multiplications, and spills most of the tile
    (Xeon: a third to half of the speed); with one for a whole step, not for each column, three sums of the largest tile
    (EPYC, many tokens: 4 to 8 %, depending on where the stack lies).
    """
    if register_constraint() is None:
        return sums
    kinds = [value.type for value in sums]
    every = ir.LiteralStructType(kinds) if len(sums) > 1 else kinds[0]
    names = [f"={register_constraint()}"] * len(sums) + [str(i) for i in range(len(sums))] + ["~{memory}"]
    result = builder.asm(ir.FunctionType(every, kinds), "", ",".join(names), sums, side_effect=True)
    return unpack(builder, result, len(sums)) if len(sums) > 1 else [result]


# ---- memory ----

#: Numba type of a pointer to float32.
Floats = types.CPointer(types.float32)
#: Numba type of a pointer to bfloat16, whose bits NumPy holds as uint16.
Bfloats = types.CPointer(types.uint16)


@intrinsic
def pointer(typing, array, start):
    """The memory of a C-contiguous array from element `start` on."""
    if not (isinstance(array, types.Array) and array.layout == "C"):
        return None

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return types.CPointer(array.dtype)(array, types.int64), generate


@intrinsic
def offset(typing, memory, at):
    """The pointer `at` elements further on."""
    if not isinstance(memory, types.CPointer):
        return None

    def generate(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return memory(memory, types.int64), generate


@intrinsic
def shorts(typing, memory):
    """The same memory as 16-bit values."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(16).as_pointer())

    return Bfloats(Floats), generate


@intrinsic
def element(typing, memory, at):
    """The one value memory[at]."""
    if not isinstance(memory, types.CPointer):
        return None

    def generate(context, builder, signature, args):
        return builder.load(builder.gep(args[0], [args[1]]))

    return memory.dtype(memory, types.int64), generate


@intrinsic
def load(typing, memory, at, n):
    """Read n (at most LANES) values; the remaining lanes are 0.0."""

    def generate(context, builder, signature, args):
        memory, at, n = args
        return masked_load(builder, builder.gep(memory, [at]), first_lanes(builder, n), ZEROS)

    return Vec(Floats, types.int64, types.int64), generate


@intrinsic
def load_or(typing, memory, at, n, other):
    """`load`, with the remaining lanes taken from the vector `other`."""

    def generate(context, builder, signature, args):
        memory, at, n, other = args
        return masked_load(builder, builder.gep(memory, [at]), first_lanes(builder, n), other)

    return Vec(Floats, types.int64, types.int64, Vec), generate


@intrinsic
def store(typing, value, memory, at, n):
    """Write the first n (at most LANES) lanes."""

    def generate(context, builder, signature, args):
        value, memory, at, n = args
        store_first(builder, value, builder.gep(memory, [at]), n)
        return context.get_dummy_value()

    return types.void(Vec, Floats, types.int64, types.int64), generate


@intrinsic
def store_operand(typing, value, memory, at, rows, n, w):
    """Write n (at most LANES) values of a row of activations that will be multiplied with weights like those at `w`.

    float32 beside float32 weights. Beside bfloat16 weights rounded to bfloat16, to nearest, ties to even: as bfloat16
    if `memory` holds such, else as the float32 of the same value. In runs of 128 bits, the last filled up with
    zeros, as a tile of `rows` rows has them (tile.py); with rows = 1 one after the other.
    """
    rounded = w == Bfloats

    def generate(context, builder, signature, args):
        value, memory, at, rows, n, _ = args
        if rounded:
            bits = rounded_to_bfloat16(builder, value)
            if signature.args[1] == Bfloats:
                value = builder.trunc(builder.lshr(bits, _splat_int(16)), SHORT_VECTOR)
            else:
                value = builder.bitcast(bits, VECTOR)
        value = builder.select(first_lanes(builder, n), value, ir.Constant(value.type, None))
        run = 128 // signature.args[1].dtype.bitwidth
        for i in range(0, LANES, run):
            with builder.if_then(builder.icmp_signed("<", INT64(i), n)):
                lanes = ir.Constant(ir.VectorType(INT32, run), list(range(i, i + run)))
                place = builder.gep(memory, [builder.add(at, builder.mul(rows, INT64(i)))])
                unaligned_store(builder, builder.shuffle_vector(value, value, lanes), place, align=2)
        return context.get_dummy_value()

    return types.void(Vec, memory, types.int64, types.int64, types.int64, w), generate


def _splat_int(n):
    return ir.Constant(INT_VECTOR, [n] * LANES)


def rounded_to_bfloat16(builder, value):
    """The bits of a float32 vector rounded to bfloat16, low halves 0; NaN stays NaN."""
    bits = builder.bitcast(value, INT_VECTOR)
    odd = builder.and_(builder.lshr(bits, _splat_int(16)), _splat_int(1))
    rounded = builder.add(bits, builder.add(odd, _splat_int(0x7FFF)))
    quiet = builder.or_(bits, _splat_int(0x400000))  # a NaN whose payload is in the low half
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.and_(rounded, _splat_int(-65536))


@intrinsic
def splat(typing, value):
    """Every lane set to one number."""

    def generate(context, builder, signature, args):
        return splat_ir(builder, args[0], VECTOR)

    return Vec(types.float32), generate


# ---- arithmetic, lane by lane ----


def _lanewise(name, n_args, build, doc):
    """An intrinsic Vec(Vec, ...) whose IR is `build(builder, *args)`."""

    def generate(context, builder, signature, args):
        return build(builder, *args)

    if n_args == 1:

        def typed(typing, a):
            return Vec(Vec), generate
    elif n_args == 2:

        def typed(typing, a, b):
            return Vec(Vec, Vec), generate
    elif n_args == 3:

        def typed(typing, a, b, c):
            return Vec(Vec, Vec, Vec), generate
    else:

        def typed(typing, a, b, c, d):
            return Vec(Vec, Vec, Vec, Vec), generate

    typed.__name__ = name
    typed.__doc__ = doc
    return intrinsic(typed)


def _round(builder, a):
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(VECTOR, [VECTOR]), f"llvm.roundeven.v{LANES}f32"
    )
    return builder.call(function, [a])


def _power_of_two(builder, n):
    biased = builder.add(builder.fptosi(n, INT_VECTOR), ir.Constant(INT_VECTOR, [127] * LANES))
    return builder.bitcast(builder.shl(biased, ir.Constant(INT_VECTOR, [23] * LANES)), VECTOR)


_add = _lanewise("_add", 2, lambda builder, a, b: builder.fadd(a, b), "a + b")
_sub = _lanewise("_sub", 2, lambda builder, a, b: builder.fsub(a, b), "a - b")
_mul = _lanewise("_mul", 2, lambda builder, a, b: builder.fmul(a, b), "a * b")
_div = _lanewise("_div", 2, lambda builder, a, b: builder.fdiv(a, b), "a / b")
fma = _lanewise("fma", 3, fma_ir, "a * b + c, rounded once")
round_even = _lanewise("round_even", 1, _round, "nearest integer, ties to even")
power_of_two = _lanewise("power_of_two", 1, _power_of_two, "2**n for lanes that hold integers from -126 to 127")
where_less = _lanewise(
    "where_less",
    4,
    lambda builder, a, b, yes, no: builder.select(builder.fcmp_ordered("<", a, b), yes, no),
    "yes where a < b, else no (also where a or b is NaN)",
)
nan_or = _lanewise(
    "nan_or",
    2,
    lambda builder, a, b: builder.select(builder.fcmp_unordered("uno", a, a), a, b),
    "a where a is NaN, else b",
)


def _every_second(start):
    """IR of the lanes start, start + 2, ... of two vectors."""
    order = ir.Constant(INT_VECTOR, list(range(start, 2 * LANES, 2)))
    return lambda builder, a, b: builder.shuffle_vector(a, b, order)


even_lanes = _lanewise("even_lanes", 2, _every_second(0), "lanes 0, 2, 4, ... of a, then of b")
odd_lanes = _lanewise("odd_lanes", 2, _every_second(1), "lanes 1, 3, 5, ... of a, then of b")


def _in_turn(start):
    """IR of the lanes of two vectors in turn, from lane `start` on."""
    order = ir.Constant(INT_VECTOR, [i for lane in range(start, start + LANES // 2) for i in (lane, LANES + lane)])
    return lambda builder, a, b: builder.shuffle_vector(a, b, order)


first_in_turn = _lanewise("first_in_turn", 2, _in_turn(0), "the first halves of a and b, a lane of each in turn")
last_in_turn = _lanewise("last_in_turn", 2, _in_turn(LANES // 2), "the last halves of a and b, a lane of each in turn")


def _operator(symbol, function):
    @overload(symbol, inline="never")
    def _(a, b):
        if a == b == Vec:
            return lambda a, b: function(a, b)


_operator(operator.add, _add)
_operator(operator.sub, _sub)
_operator(operator.mul, _mul)
_operator(operator.truediv, _div)


# ---- across the lanes ----


def fold(builder, value, combine):
    """Reduce a vector to a scalar: lane i with lane i + LANES/2, then LANES/4, and so on."""
    lanes = value.type.count
    while lanes > 1:
        lanes //= 2
        low, high = (
            builder.shuffle_vector(
                value, value, ir.Constant(ir.VectorType(INT32, lanes), list(range(start, start + lanes)))
            )
            for start in (0, lanes)
        )
        value = combine(low, high)
    return builder.extract_element(value, INT32(0))


@intrinsic
def sum_lanes(typing, a):
    """Sum of the lanes, in a fixed order."""

    def generate(context, builder, signature, args):
        return fold(builder, args[0], builder.fadd)

    return types.float32(Vec), generate


@intrinsic
def max_lanes(typing, a):
    """Largest lane; which of them when one is NaN is not specified."""

    def generate(context, builder, signature, args):
        return fold(builder, args[0], lambda x, y: builder.select(builder.fcmp_ordered("<", x, y), y, x))

    return types.float32(Vec), generate
