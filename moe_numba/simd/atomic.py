"""A counter that several threads draw from."""

from llvmlite import ir
from numba.core import types

from .plain import intrinsic


@intrinsic
def take_next(typing, counters, i):
    """Add 1 to counters[i] (pointer to int64) in one indivisible step, return what it was before."""

    def generate(context, builder, signature, args):
        counter = builder.gep(args[0], [args[1]])
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64), types.int64), generate
