"""Calls of functions by their address (`_jit.address_of`)."""

from llvmlite import ir
from numba.core import types

from .plain import intrinsic
from .vector import BYTE, unpack


@intrinsic
def call(typing, address, *args):
    """Call the function at `address` that takes such pointers, and int64 for every integer, and returns nothing.

    Nothing checks that it does.
    """
    taken = [types.int64 if isinstance(kind, types.Integer) else kind for kind in args]

    def generate(context, builder, signature, operands):
        address, packed = operands
        values = unpack(builder, packed, len(taken))
        function = ir.FunctionType(BYTE.as_pointer(), [value.type for value in values])
        builder.call(builder.inttoptr(address, function.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, types.StarArgTuple.from_types(taken)), generate
