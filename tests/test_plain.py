"""The operations in plain NumPy: the same bits as the compiled ones, and an error outside of an array."""

import itertools
from functools import lru_cache
from pathlib import Path
from types import FunctionType

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits, compiled, random_array, run_python
from numba import config
from numba.core import types
from numpy.testing import assert_array_equal

from moe_numba.kernels.projection import OUTER_COLUMNS
from moe_numba.simd import plain
from moe_numba.simd.outer import (
    GROUPS,
    ONE_ROW,
    OUTER,
    line_vectors,
    load_outer,
    outer_block,
    outer_run,
    outer_step,
    outer_step_size,
    store_outer,
)
from moe_numba.simd.products import line_size, step_size
from moe_numba.simd.row import row_dot_block, row_dot_line, store_row, zero_row
from moe_numba.simd.target import GROUP_ROWS, LANES, OUTER_ROWS, ROW_COLUMNS, TILE_COLUMNS, WIDE_COLUMNS, has_bf16_dot
from moe_numba.simd.tile import (
    ONE_LAST,
    TWO_LAST,
    WHOLE,
    clamped_offsets,
    dot_line,
    dot_step,
    prefetch_rows,
    store_sums,
    wide_offsets,
    zero_tile,
)
from moe_numba.simd.vector import (
    element,
    even_lanes,
    first_in_turn,
    fma,
    last_in_turn,
    load,
    load_or,
    max_lanes,
    nan_or,
    odd_lanes,
    offset,
    pointer,
    round_even,
    splat,
    store,
    store_operand,
    sum_lanes,
    where_less,
)

pytestmark = pytest.mark.plain

VALUES = np.float32([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-40, 3e38, -3e38, 1e30, np.inf, -np.inf, np.nan])


def awkward(rng, *shape):
    """Normal values with zeros, denormals, infinities and NaN among them."""
    values = random_array(rng, *shape) * np.float32(2.0) ** rng.integers(-60, 60, shape).astype(np.float32)
    chosen = rng.random(shape) < 0.2
    values[chosen] = rng.choice(VALUES, chosen.sum())
    return values


# ---- outside of an array ----


@pytest.mark.parametrize(("start", "at", "n"), [(0, 8, 3), (8, 0, 3), (0, -1, 1), (2, -3, 2), (0, 10, 1), (11, -3, 4)])
def test_outside_of_the_array_is_an_error(start, at, n):
    memory = plain.pointer(np.zeros((2, 5), np.float32), start)
    with pytest.raises(IndexError, match="of an array of 10"):
        plain.load(memory, at, n)
    with pytest.raises(IndexError, match="of an array of 10"):
        plain.store(np.ones(LANES, np.float32), memory, at, n)
    plain.prefetch(memory, at)
    assert not memory.values.any()


def test_nothing_is_read_for_no_lanes():
    assert_array_equal(plain.load(plain.pointer(np.ones(3, np.float32), 3), 5, 0), np.zeros(LANES))
    assert_array_equal(plain.load(plain.pointer(np.ones(3, np.float32), 0), 0, -2), np.zeros(LANES))


def test_a_pointer_needs_contiguous_memory():
    with pytest.raises(TypeError, match="C-contiguous"):
        plain.pointer(np.zeros((4, 4), np.float32)[:, :2], 0)


OVERREAD = """
import numpy as np
from moe_numba.kernels import projection
from moe_numba.simd.vector import pointer
a, w, out = (pointer(np.ones(n, np.float32), 0) for n in (4 * 40, 3 * 40 - {missing}, 4 * 3))
projection.project(a, 40, 4, w, 40, 3, 40, 0, out, 3)
print(out.values.tolist())
"""


def test_a_kernel_that_reads_too_far_is_found():
    assert run_python(OVERREAD.format(missing=0), NUMBA_DISABLE_JIT="1")[0] == f"{[40.0] * 12}\n"
    with pytest.raises(AssertionError, match=r"IndexError: elements .* of an array of 119"):
        run_python(OVERREAD.format(missing=1), NUMBA_DISABLE_JIT="1")


# ---- the same as compiled ----


def test_an_intrinsic_without_a_twin_says_so_when_it_is_called(monkeypatch):
    monkeypatch.setattr(config, "DISABLE_JIT", 1)

    @plain.intrinsic
    def matrix_unit(typing, memory):
        return types.void(memory), None

    with pytest.raises(NotImplementedError, match="matrix_unit"):
        matrix_unit(None)


@lru_cache
def both(function):
    """`function` compiled, and as plain Python with the operations of plain.py."""
    in_plain = FunctionType(function.__code__, function.__globals__ | vars(plain), closure=function.__closure__)
    return compiled(function), np.errstate(all="ignore")(in_plain)


def assert_both_alike(function, *arrays):
    """They leave the same bits in every array that they are given, and return the same."""
    compiled_copies, plain_copies = ([array.copy() for array in arrays] for _ in range(2))
    as_compiled, as_plain = both(function)
    assert_array_equal(as_compiled(*compiled_copies), as_plain(*plain_copies))
    for a, b in zip(compiled_copies, plain_copies, strict=True):
        assert_same_bits(a, b)


def _lane_by_lane(x, out):
    for i in range(x.shape[0]):
        a, b = load(pointer(x, 0), i * x.shape[1], LANES), load(pointer(x, 0), i * x.shape[1] + LANES, LANES)
        c, d = load(pointer(x, 0), i * x.shape[1] + 2 * LANES, LANES), splat(x[i, 0])
        to = pointer(out, i * out.shape[1])
        store(fma(a, b, c), to, 0, LANES)
        store(round_even(a), to, LANES, LANES)
        store(where_less(a, b, c, d), to, 2 * LANES, LANES)
        store(nan_or(a, b), to, 3 * LANES, LANES)
        store(even_lanes(a, b), to, 4 * LANES, LANES)
        store(odd_lanes(a, b), to, 5 * LANES, LANES)
        store(a / b - c * d + a, to, 6 * LANES, LANES)
        store(first_in_turn(a, b), to, 7 * LANES, LANES)
        store(last_in_turn(a, b), to, 8 * LANES, LANES)


def test_lane_by_lane(rng):
    assert_both_alike(_lane_by_lane, awkward(rng, 500, 3 * LANES), np.zeros((500, 9 * LANES), np.float32))


def test_fma_rounds_once_where_rounding_twice_would_differ(rng):
    """Sums that lie next to the middle of two float32, which float64 would round to the middle itself."""
    a = np.float32(1) + np.float32(2.0**-12) * np.ones(LANES, np.float32)
    c = np.float32(2.0**-60) * np.where(np.arange(LANES) % 2, 1, -1).astype(np.float32)
    exact = [np.float32(1 + 2.0**-11 + 2.0**-23) if x > 0 else np.float32(1 + 2.0**-11) for x in c]
    assert_array_equal(plain.fma(a, a, c), exact)


def _across_lanes(x, out):
    total, high = np.float32(0.0), np.float32(0.0)
    for i in range(0, x.size, LANES):
        a = load(pointer(x, 0), i, LANES)
        total, high = sum_lanes(a), max_lanes(a)
        store(splat(total), pointer(out, 0), i, LANES)
    return total, high


def test_across_lanes(rng):
    x = random_array(rng, 50, LANES)
    assert_both_alike(_across_lanes, x, np.zeros_like(x))


def _memory(x, w, out, floats, rounded):
    for n in range(LANES + 1):
        a = load_or(offset(pointer(x, 1), 2), n, n, splat(element(pointer(x, 0), n)))
        store(a, pointer(out, n * LANES), 0, n)
        if LANES > 4:  # a run of bfloat16 has 8
            store_operand(a, pointer(rounded, 2 * n * LANES), 0, 2, n, pointer(w, 0))
        store_operand(a, pointer(floats, 2 * n * LANES), 0, 2, n, pointer(w, 0))
    return line_size(pointer(x, 0)), line_size(pointer(w, 0))


def test_memory(rng):
    x = random_array(rng, 3 * LANES)
    x[::5] = np.nan
    out, floats = np.zeros((2, LANES + 1, 2 * LANES), np.float32)
    assert_both_alike(_memory, x, np.zeros(1, np.uint16), out, floats, np.zeros(out.shape, np.uint16))


def _dot_products(shape):
    def products(a, w, out, length, columns, apart):
        columns_at = clamped_offsets(length, columns - 1)
        tile = zero_tile(shape, columns_at)
        x, v = pointer(a, 0), pointer(w, 0)
        whole = length - length % line_size(v)
        for k in range(0, whole, line_size(v)):
            tile = dot_line(tile, x, shape, v, columns_at, k)
        for k in range(whole, length, step_size(x)):
            tile = dot_step(tile, x, shape, v, columns_at, k, length - k)
        prefetch_rows(v, 0, length, columns)
        store_sums(tile, shape, columns_at, out[0] == 0.0, pointer(out, 1), apart * columns, apart, columns)

    return products


def _wide_dot_products(a, w, out, length, columns, apart):
    columns_at = wide_offsets(length)
    tile = zero_tile(WHOLE[0], columns_at)
    x, v = pointer(a, 0), pointer(w, 0)
    for k in range(0, length, step_size(x)):
        tile = dot_step(tile, x, WHOLE[0], v, columns_at, k, length - k)
    store_sums(tile, WHOLE[0], columns_at, out[0] == 0.0, pointer(out, 1), apart * columns, apart, columns)


def _row_products(a, w, out, length, columns, apart):
    columns_at = clamped_offsets(length, columns - 1)[:ROW_COLUMNS]
    x, v = pointer(a, 0), pointer(w, 0)
    sums = zero_row(x, v)
    whole = length - length % line_size(v)
    for k in range(0, whole, line_size(v)):
        sums = row_dot_line(sums, x, v, columns_at, k)
    for k in range(whole, length, step_size(v)):
        sums = row_dot_block(sums, x, v, columns_at, k, length - k)
    store_row(sums, columns_at, out[0] == 0.0, pointer(out, 1), apart, columns)


def _outer_products(rows, vectors):
    def products(a, w, out, length, columns, _):
        x, v = pointer(a, 0), pointer(w, 0)
        tile = load_outer(rows, vectors, out[0] == 0.0, pointer(out, 1), columns, columns)
        whole = length - length % step_size(x) if columns == len(vectors) * LANES else 0
        for k in range(0, whole, step_size(x)):
            tile = outer_run(tile, offset(x, k * len(rows)), vectors, offset(v, k * columns), columns)
        for k in range(whole, length, outer_step_size(x, v)):
            at = k // step_size(x) * step_size(x) * len(rows) + k % step_size(x)
            tile = outer_step(tile, offset(x, at), vectors, offset(v, k * columns), columns, columns, length - k)
        store_outer(tile, vectors, pointer(out, 1), columns, columns)

    return products


def _line_outer_products(rows):
    def products(a, w, out, length, columns, _):
        x, v = pointer(a, 0), pointer(w, 0)
        vectors = line_vectors(v)
        columns = min(columns, len(vectors) * LANES)
        tile = load_outer(rows, vectors, out[0] == 0.0, pointer(out, 1), columns, columns)
        whole = length - length % OUTER_ROWS if columns == len(vectors) * LANES else 0
        for k in range(0, whole, OUTER_ROWS):
            tile = outer_block(tile, offset(x, k * len(rows)), vectors, offset(v, k * columns), columns)
        for k in range(whole, length, outer_step_size(x, v)):
            at = k // step_size(x) * step_size(x) * len(rows) + k % step_size(x)
            tile = outer_step(tile, offset(x, at), vectors, offset(v, k * columns), columns, columns, length - k)
        store_outer(tile, vectors, pointer(out, 1), columns, columns)

    return products


#: Columns of each kind of tile.
TILES = {
    **{_dot_products(shape[1]): range(1, TILE_COLUMNS + 1) for shape in (ONE_LAST, TWO_LAST, WHOLE)},
    _wide_dot_products: (WIDE_COLUMNS,),
    _row_products: range(1, ROW_COLUMNS + 1),
    _outer_products(GROUPS[0], OUTER): (1, LANES + 3, OUTER_COLUMNS),
    _line_outer_products(GROUPS[0]): (1, 11, 16, 32),
    _line_outer_products(ONE_ROW): (1, 11, 16, 32),
}
BITS = np.dtype(np.uint16)
OPERANDS = [(np.float32, np.float32), (np.float32, BITS), *([(BITS, BITS)] if has_bf16_dot() else [])]


def _operand(values, dtype):
    return values.astype(dtype) if dtype != BITS else values.astype(ml_dtypes.bfloat16).view(BITS)


@pytest.mark.parametrize(("activations", "weights"), OPERANDS, ids=str)
@pytest.mark.parametrize("length", [1, LANES, 2 * LANES + 3, 4 * LANES])
@pytest.mark.parametrize("products", TILES)
def test_tiles(rng, products, activations, weights, length):
    # dpbf16ps adds a pair of products in an order of its own: of whole numbers the sum is exact in any.
    values = rng.integers(-9, 10, (2, 200, 5 * LANES)) if activations == BITS else random_array(rng, 2, 200, 5 * LANES)
    for columns in TILES[products]:
        # Packed rows are filled up to whole steps.
        size = 2 * GROUP_ROWS * (length + 8)
        a = _operand(values[0].ravel()[:size].astype(np.float32), activations)
        w = _operand(values[1].ravel()[: columns * length].astype(np.float32), weights)
        for first, apart in itertools.product((0.0, 1.0), (1, 3)):
            out = np.concatenate([[first], values[0].ravel()[: 2 * GROUP_ROWS * apart * columns]]).astype(np.float32)
            assert_both_alike(products, a, w, out, np.int64(length), np.int64(columns), np.int64(apart))


_LAYER = """
import sys
from helpers import random_layer
import numpy as np
for dtype in ("float32", "bfloat16"):
    for transposed in (False, True):
        options = {"num_experts": 5, "top_k": 2, "input_dim": 41, "hidden_dim": 19, "activation": "swiglu"}
        layer = random_layer(**options, capacity_factor=0.8, transposed=transposed).astype(dtype)
        y, routing = layer(np.random.default_rng(0).standard_normal((23, 41), np.float32))
        rounded = y if dtype == "float32" else y.round(2)  # dpbf16ps: see test_tiles
        print(rounded.tobytes().hex(), routing.expert_weights.tobytes().hex())
"""


def test_a_layer_gives_the_same_bits():
    tests = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {tests!r})\n{_LAYER}"
    with_jit, without = (run_python(code, NUMBA_DISABLE_JIT=off)[0].splitlines() for off in ("0", "1"))
    assert len(with_jit) == 4
    assert with_jit == without
