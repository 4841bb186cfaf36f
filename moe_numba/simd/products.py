"""Multiply-adds of activations and weights for every pair of their types, 128 bits of each row at a time."""

from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from .plain import intrinsic
from .target import LANES, TILE_VECTORS, has_32_registers, has_bf16_dot
from .vector import (
    BFLOAT16,
    FLOAT,
    INT32,
    INT64,
    VECTOR,
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


class _Float32Products:
    """float32 times float32, 4 values of each row."""

    #: Values along K of one multiply-add.
    step = 4
    block = ir.VectorType(FLOAT, step)
    #: Vectors of activations that wait in registers. Those beyond are operands from memory, of every column anew.
    held = TILE_VECTORS

    @staticmethod
    def load_rows(builder, pointer, rows):
        """A vector of the next 128 bits of so many rows, GROUP_ROWS or fewer; fewer are in it again and again."""
        return _repeated(builder, unaligned_load(builder, pointer, ir.VectorType(FLOAT, 4 * rows)), LANES)

    @classmethod
    def load_block(cls, builder, pointer, n):
        """The next `step` values of a weight row; with n only the first n, and zeros."""
        align = 4 if cls.block.element == FLOAT else 2
        if n is None:
            return unaligned_load(builder, pointer, cls.block, align)
        zeros = ir.Constant(cls.block, [0.0 if cls.block.element == FLOAT else 0] * cls.step)
        return masked_load(builder, pointer, first_lanes(builder, n, cls.step), zeros)

    @classmethod
    def load_column(cls, builder, pointer, n):
        """`load_block` once for each of GROUP_ROWS rows."""
        return _repeated(builder, cls.load_block(builder, pointer, n), LANES)

    @staticmethod
    def side_by_side(builder, blocks):
        """128 bits of each of GROUP_ROWS weight rows as columns: a vector for each step that they hold."""
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
    def load_column(cls, builder, pointer, n):
        return builder.bitcast(_repeated(builder, cls.load_block(builder, pointer, n), 2 * LANES), cls.pairs)

    @classmethod
    def side_by_side(cls, builder, blocks):
        return [builder.bitcast(blocks, cls.pairs)]

    @classmethod
    def accumulate(cls, builder, rows, column, total):
        kind = ir.FunctionType(VECTOR, [VECTOR, cls.pairs, cls.pairs])
        dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return builder.call(dot, [total, rows, column])


class _WidenedProducts(_Float32Products):
    """float32 times bfloat16 without AVX512-BF16: behind 16 zero bits, a bfloat16 is the same value as float32."""

    block = ir.VectorType(ir.IntType(16), 4)
    # The zeros take one of 16 registers (Zen 3, 16 to 64 rows: 40 % faster than spilling).
    held = TILE_VECTORS if has_32_registers() else TILE_VECTORS - 1

    @classmethod
    def load_column(cls, builder, pointer, n):
        # First repeated, then widened: the one comes with the load, the other is one instruction.
        return cls._widened(builder, _repeated(builder, cls.load_block(builder, pointer, n), 2 * LANES), 0)

    @classmethod
    def side_by_side(cls, builder, blocks):
        return [cls._widened(builder, blocks, start) for start in (0, 4)]

    @staticmethod
    def _widened(builder, shorts, start):
        """Values start .. start + 3 of every 128 bits, as float32."""
        order = [i for block in range(start, 2 * LANES, 8) for k in range(block, block + 4) for i in (2 * LANES, k)]
        places = ir.Constant(ir.VectorType(INT32, 2 * LANES), order)
        return builder.bitcast(builder.shuffle_vector(shorts, ir.Constant(shorts.type, None), places), VECTOR)


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
