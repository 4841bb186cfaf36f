"""SIMD vectors for Numba: the only package that contains LLVM IR.

`target` says how wide a register is and how many there are, `vector` is one register and
its arithmetic, `products` multiplies and adds activations and weights of any types, `tile` is a block of
registers that accumulates dot products, `outer` one of outer products, `amx` the registers of a matrix unit,
`math` is exp and friends on vectors, `atomic` is the shared counter from which threads take work, `calls` calls a
function by its address. `plain` does the same in NumPy, for when the JIT is off.
"""
