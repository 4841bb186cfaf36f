"""Multiply-adds of activations and weights for every pair of their types, 128 bits of each row at a time."""

from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from .plain import intrinsic
from .target import GROUP_ROWS, LANES, TILE_VECTORS, has_32_registers, has_bf16_dot
from .vector import (
    BFLOAT16,
    FLOAT,
    INT32,
    INT64,
    Bfloats,
    Floats,
    first_lanes,
    fma_ir,
    masked_load,
    unaligned_load,
)

#: Bits of a cache line.
LINE_BITS = 512


def _repeated(builder, block, count):
    """A vector that holds the vector `block` again and again, `count` values."""
    places = [i % block.type.count for i in range(count)]
    return builder.shuffle_vector(block, block, ir.Constant(ir.VectorType(INT32, count), places))


def load_block(builder, pointer, block, n):
    """The next values of a row, as many as the vector type `block` has; with n only the first n, and zeros."""
    is_float = block.element == FLOAT
    if n is None:
        return unaligned_load(builder, pointer, block, 4 if is_float else 2)
    zeros = ir.Constant(block, [0.0 if is_float else 0] * block.count)
    return masked_load(builder, pointer, first_lanes(builder, n, block.count), zeros)


class _Float32Products:
    """float32 times float32, 4 values of each row."""

    #: Values along K of one multiply-add.
    step = 4
    block = ir.VectorType(FLOAT, step)
    #: Vectors of activations that wait in registers. Those beyond are operands from memory, of every column anew.
    held = TILE_VECTORS
    #: Weight rows that lie side by side in a register where they meet a single row (row.py).
    beside = 1

    @staticmethod
    def load_rows(builder, pointer, rows):
        """A vector of the next 128 bits of so many rows, GROUP_ROWS or fewer; fewer are in it again and again."""
        return _repeated(builder, unaligned_load(builder, pointer, ir.VectorType(FLOAT, 4 * rows)), LANES)

    @classmethod
    def load_column(cls, builder, pointer, n, rows=GROUP_ROWS):
        """The next `step` values of a weight row (`load_block`), once for each of `rows` rows."""
        return _repeated(builder, load_block(builder, pointer, cls.block, n), cls.step * rows)

    @staticmethod
    def side_by_side(builder, blocks):
        """128 bits of each of `beside` weight rows as columns: a vector for each step that they hold."""
        return [blocks]

    @staticmethod
    def accumulate(builder, rows, column, total):
        return fma_ir(builder, rows, column, total)


class Bfloat16Products(_Float32Products):
    """bfloat16 times bfloat16 by AVX512-BF16: pairs of products added to each float32 lane."""

    step = 8
    block = ir.VectorType(ir.IntType(16), step)
    vector = ir.VectorType(ir.IntType(16), 2 * LANES)
    pairs = ir.VectorType(BFLOAT16, 2 * LANES)

    @classmethod
    def load_rows(cls, builder, pointer, rows):
        some = unaligned_load(builder, pointer, ir.VectorType(ir.IntType(16), cls.step * rows), align=2)
        return builder.bitcast(_repeated(builder, some, 2 * LANES), cls.pairs)

    @classmethod
    def load_column(cls, builder, pointer, n, rows=GROUP_ROWS):
        return cls._in_pairs(builder, super().load_column(builder, pointer, n, rows))

    @classmethod
    def side_by_side(cls, builder, blocks):
        return [cls._in_pairs(builder, blocks)]

    @staticmethod
    def _in_pairs(builder, shorts):
        return builder.bitcast(shorts, ir.VectorType(BFLOAT16, shorts.type.count))

    @staticmethod
    def accumulate(builder, rows, column, total):
        kind = ir.FunctionType(total.type, [total.type, rows.type, column.type])
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * total.type.count}"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [total, rows, column])


class _WidenedProducts(_Float32Products):
    """float32 times bfloat16 without AVX512-BF16: behind 16 zero bits, a bfloat16 is the same value as float32."""

    block = ir.VectorType(ir.IntType(16), 4)
    # The zeros take one of 16 registers (Zen 3, 16 to 64 rows: 40 % faster than spilling).
    held = TILE_VECTORS if has_32_registers() else TILE_VECTORS - 1
    # As many as fill one: half as many instructions as one by one.
    beside = GROUP_ROWS

    @classmethod
    def load_column(cls, builder, pointer, n, rows=GROUP_ROWS):
        # First repeated, then widened: the one comes with the load, the other is one instruction.
        return cls._widened(builder, _repeated(builder, load_block(builder, pointer, cls.block, n), 8 * rows), 0)

    @classmethod
    def side_by_side(cls, builder, blocks):
        return [cls._widened(builder, blocks, start) for start in (0, 4)]

    @staticmethod
    def _widened(builder, shorts, start):
        """Values start .. start + 3 of every 128 bits, as float32."""
        count = shorts.type.count
        order = [i for block in range(start, count, 8) for k in range(block, block + 4) for i in (count, k)]
        places = ir.Constant(ir.VectorType(INT32, count), order)
        wide = builder.shuffle_vector(shorts, ir.Constant(shorts.type, None), places)
        return builder.bitcast(wide, ir.VectorType(FLOAT, count // 2))


#: By the types of pointers to activations and to weights.
PRODUCTS = {
    (Floats, Floats): _Float32Products,
    (Bfloats, Bfloats): Bfloat16Products,
    (Floats, Bfloats): _WidenedProducts,
}


@lru_cache
def operand_dtype(storage):
    """dtype of the activations that are multiplied with weights of a storage dtype, as `PRODUCTS` wants."""
    return np.dtype(np.uint16 if storage == np.uint16 and has_bf16_dot() else np.float32)


@intrinsic
def step_size(typing, a):
    """Values along K that a vector of activations a has of each row: those in 128 bits."""

    def generate(context, builder, signature, args):
        return INT64(128 // a.dtype.bitwidth)

    return types.int64(a), generate


@intrinsic
def line_size(typing, memory):
    """Values in a cache line of 64 bytes."""

    def generate(context, builder, signature, args):
        return INT64(LINE_BITS // memory.dtype.bitwidth)

    return types.int64(memory), generate
