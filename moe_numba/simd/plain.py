"""Every operation on vectors and tiles in plain NumPy: what runs with NUMBA_DISABLE_JIT=1.

Kernels are then plain Python: a debugger steps through them, coverage counts their lines, and a pointer
knows its array, so that reading or writing outside of it is an IndexError. A function here and the
intrinsic of the same name do the same, float32 to the last bit; the intrinsic's docstring says what.
A vector is an array of LANES values, a tile an array of vectors, of dot products (vectors of rows, columns), of
outer products (rows, columns).
"""

import ml_dtypes
import numpy as np
from numba import config, extending

from .target import GROUP_ROWS, LANES, OUTER_ROWS, ROW_COLUMNS, TILE_COLUMNS, WIDE_COLUMNS

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def intrinsic(define):
    """`numba.extending.intrinsic`; without the JIT the function of the same name in this file.

    One that has none here raises NotImplementedError when it is called.
    """
    twin = globals().get(define.__name__) if config.DISABLE_JIT else None
    return twin or extending.intrinsic(define)


# ---- memory ----


class Memory:
    """A pointer: place `start` of the flat array `values`."""

    __slots__ = ("start", "values")

    def __init__(self, values, start):
        self.values = values
        self.start = start

    def _span(self, at, n):
        first = self.start + at
        if n <= 0:
            return slice(0, 0)
        if not 0 <= first <= first + n <= self.values.size:
            raise IndexError(f"elements {first} to {first + n} of an array of {self.values.size}")
        return slice(first, first + n)

    def read(self, at, n):
        """A copy of n values from `at` on."""
        return self.values[self._span(at, n)].copy()

    def floats(self, at, n, width):
        """float32 of n values, at most `width`, and zeros up to `width`."""
        vector = np.zeros(width, np.float32)
        n = max(0, min(n, width))
        values = self.read(at, n)
        vector[:n] = values.view(_BFLOAT16) if self.values.dtype == np.uint16 else values
        return vector

    def write(self, at, values):
        self.values[self._span(at, len(values))] = values


def pointer(array, start):
    if not array.flags.c_contiguous:
        raise TypeError("the array must be C-contiguous")
    return Memory(array.reshape(-1), start)


def offset(memory, at):
    return Memory(memory.values, memory.start + at)


def element(memory, at):
    return memory.read(at, 1)[0]


def load(memory, at, n):
    return memory.floats(at, n, LANES)


def load_or(memory, at, n, other):
    return np.append(load(memory, at, n)[: max(n, 0)], other[max(n, 0) :])


def store(value, memory, at, n):
    memory.write(at, value[: max(n, 0)])


def store_operand(value, memory, at, rows, n, w):
    if w.values.dtype == np.uint16:
        value = value.astype(_BFLOAT16)
        value = value.view(np.uint16) if memory.values.dtype == np.uint16 else value.astype(np.float32)
    value = np.where(np.arange(LANES) < n, value, np.zeros_like(value))
    run = step_size(memory)
    for i in range(0, n, run):
        memory.write(at + i * rows, value[i : i + run])


def prefetch(memory, at):
    """Nothing: an address outside of the array is allowed here, and only here."""


def prefetch_rows(memory, at, stride, rows):
    """Nothing, as `prefetch`."""


def take_next(counters, i):
    value = element(counters, i)
    counters.write(i, [value + 1])
    return value


def call(address, *args):
    address(*args)


# ---- arithmetic, lane by lane ----


def splat(value):
    return np.full(LANES, value, np.float32)


def fma(a, b, c):
    # The product is exact in float64. Their sum is rounded to odd there, after which rounding to
    # float32 gives what rounding once would (Boldo and Melquiond 2008, "Emulation of FMA").
    product = a.astype(np.float64) * b
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    bits = total.view(np.int64)
    even = ((error < 0) | (error > 0)) & (bits & 1 == 0)
    bits += np.where(even, np.where((error > 0) == (total > 0), 1, -1), 0)
    return total.astype(np.float32)


def round_even(a):
    return np.rint(a)


def power_of_two(n):
    return ((n.astype(np.int32) + 127) << 23).view(np.float32)


def where_less(a, b, yes, no):
    return np.where(a < b, yes, no)


def nan_or(a, b):
    return np.where(np.isnan(a), a, b)


def even_lanes(a, b):
    return np.append(a, b)[::2]


def odd_lanes(a, b):
    return np.append(a, b)[1::2]


def first_in_turn(a, b):
    return np.stack([a, b], axis=1).reshape(-1)[:LANES]


def last_in_turn(a, b):
    return np.stack([a, b], axis=1).reshape(-1)[LANES:]


# ---- across the lanes ----


def _fold(values, combine):
    """Reduce the last axis: the first half with the second, until one value is left."""
    while (half := values.shape[-1] // 2) > 0:
        values = combine(values[..., :half], values[..., half:])
    return values[..., 0]


def sum_lanes(a):
    return _fold(a, np.add)


def max_lanes(a):
    return _fold(a, lambda x, y: np.where(x < y, y, x))


# ---- tiles of dot products ----


def zero_tile(shape, columns_at):
    return np.zeros((len(shape[0]), len(columns_at), LANES), np.float32)


def clamped_offsets(stride, last):
    return tuple(min(j, last) * stride for j in range(TILE_COLUMNS))


def wide_offsets(stride):
    return tuple(j * stride for j in range(WIDE_COLUMNS))


def step_size(a):
    return 16 // a.values.itemsize


def line_size(memory):
    return 64 // memory.values.itemsize


def dot_line(tile, a, shape, w, columns_at, k):
    for at in range(k, k + line_size(w), step_size(a)):
        tile = dot_step(tile, a, shape, w, columns_at, at, step_size(a))
    return tile


def dot_step(tile, a, shape, w, columns_at, k, n):
    # Of bfloat16 activations, two neighbouring products meet in a lane.
    step, vectors = step_size(a), len(tile)
    rows = vectors * GROUP_ROWS
    values = a.floats(k * rows, rows * step, rows * step).reshape(vectors, 1, GROUP_ROWS, step)
    columns = np.stack([w.floats(at + k, n, step) for at in columns_at])[:, None]
    sums = tile.reshape(*tile.shape[:2], GROUP_ROWS, 4)
    for i in range(step // 4):
        sums = fma(values[..., i :: step // 4], columns[..., i :: step // 4], sums)
    return sums.reshape(tile.shape)


def store_sums(tile, shape, columns_at, first, out, out_stride, apart, n):
    sums = _fold(tile.reshape(*tile.shape[:2], GROUP_ROWS, 4), np.add)[:, :n]
    rows = (len(shape[0]) - 1) * GROUP_ROWS + len(shape[1])
    for r, row in enumerate(sums.swapaxes(1, 2).reshape(-1, n)[:rows]):
        for j, value in enumerate(row):
            at = r * out_stride + j * apart
            out.write(at, value[None] + (np.zeros(1, np.float32) if first else out.read(at, 1)))


# ---- a single row ----


def zero_row(a, w):
    return np.zeros((ROW_COLUMNS, 4), np.float32)


def row_dot_line(sums, a, w, columns_at, k):
    for at in range(k, k + line_size(w), step_size(w)):
        sums = row_dot_block(sums, a, w, columns_at, at, step_size(w))
    return sums


def row_dot_block(sums, a, w, columns_at, k, n):
    step = step_size(a)
    for at in range(0, min(n, step_size(w)), step):
        values = a.floats(k + at, n - at, step)
        columns = np.stack([w.floats(start + k + at, n - at, step) for start in columns_at])
        for i in range(step // 4):
            sums = fma(values[i :: step // 4], columns[:, i :: step // 4], sums)
    return sums


def store_row(sums, columns_at, first, out, apart, n):
    for j, value in enumerate(_fold(sums, np.add)[:n]):
        out.write(j * apart, value[None] + (np.zeros(1, np.float32) if first else out.read(j * apart, 1)))


# ---- tiles of outer products ----


def line_vectors(w):
    return tuple(range(line_size(w) // LANES))


def outer_step_size(a, w):
    return 2 if a.values.dtype == np.uint16 else 1


def outer_run(tile, a, vectors, w, stride):
    step = outer_step_size(a, w)
    for k in range(0, step_size(a), step):
        tile = outer_step(tile, offset(a, k), vectors, offset(w, k * stride), stride, tile.shape[1], step)
    return tile


def outer_block(tile, a, vectors, w, stride):
    for k in range(0, OUTER_ROWS, step_size(a)):
        tile = outer_run(tile, offset(a, k * len(tile)), vectors, offset(w, k * stride), stride)
    return tile


def outer_step(tile, a, vectors, w, stride, n, length):
    step = outer_step_size(a, w)
    rows = np.stack([a.floats(i * step_size(a), step, step) for i in range(len(tile))])
    for m in range(min(step, length)):
        tile = fma(rows[:, m, None], w.floats(m * stride, n, tile.shape[1])[None], tile)
    return tile


def load_outer(rows, vectors, first, out, out_stride, n):
    return np.stack([out.floats(i * out_stride, 0 if first else n, len(vectors) * LANES) for i in range(len(rows))])


def store_outer(tile, vectors, out, out_stride, n):
    for i, row in enumerate(tile):
        out.write(i * out_stride, row[:n])
