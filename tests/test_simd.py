"""Vectors, their mathematics, tiles of dot products, the shared counter."""

import math
from itertools import product

import numpy as np
import pytest
from helpers import compiled, fewer, guarded_copy, random_array
from numba import njit, prange
from numpy.testing import assert_array_equal

from moe_numba.simd import target
from moe_numba.simd.atomic import take_next
from moe_numba.simd.math import exp, logistic, normal_cdf
from moe_numba.simd.products import line_size, step_size
from moe_numba.simd.target import GROUP_ROWS, LANES, WIDE_COLUMNS
from moe_numba.simd.tile import (
    ONE_LAST,
    TILE_COLUMNS,
    TWO_LAST,
    WHOLE,
    clamped_offsets,
    dot_line,
    dot_step,
    store_sums,
    wide_offsets,
    zero_tile,
)
from moe_numba.simd.vector import (
    element,
    fma,
    load,
    load_or,
    max_lanes,
    nan_or,
    pointer,
    power_of_two,
    round_even,
    splat,
    store,
    sum_lanes,
    where_less,
)

pytestmark = pytest.mark.plain

EXP, LOGISTIC, NORMAL_CDF, ROUND_EVEN, POWER_OF_TWO = range(5)

# ---- memory ----


@compiled
def _load_and_store(x, start, n, loaded, filled, stored):
    source = pointer(x, start)
    store(load(source, 0, n), pointer(loaded, 0), 0, LANES)
    store(load_or(source, 0, n, splat(np.float32(-1.0))), pointer(filled, 0), 0, LANES)
    store(load(source, 0, n), pointer(stored, 0), 0, n)
    return element(source, 0)


@pytest.mark.parametrize("n", range(LANES + 1))
def test_load_and_store_touch_only_the_first_lanes(n):
    x = guarded_copy(np.arange(1, LANES + 1, dtype=np.float32))  # reading past the end is a crash
    start = min(LANES - n, LANES - 1)
    loaded, filled = np.empty((2, LANES), np.float32)
    stored = np.full(LANES, 7, np.float32)
    first = _load_and_store(x, start, n, loaded, filled, stored)
    values = x[start : start + n]
    assert first == x[start]
    assert_array_equal(loaded, np.append(values, np.zeros(LANES - n)))
    assert_array_equal(filled, np.append(values, np.full(LANES - n, -1)))
    assert_array_equal(stored, np.append(values, np.full(LANES - n, 7)))


# ---- arithmetic ----


@compiled
def _arithmetic(a, b, c, out):
    x, y, z = load(pointer(a, 0), 0, LANES), load(pointer(b, 0), 0, LANES), load(pointer(c, 0), 0, LANES)
    to = pointer(out, 0)
    store(x + y, to, 0, LANES)
    store(x - y, to, LANES, LANES)
    store(x * y, to, 2 * LANES, LANES)
    store(x / y, to, 3 * LANES, LANES)
    store(fma(x, y, z), to, 4 * LANES, LANES)
    store(where_less(x, y, z, x), to, 5 * LANES, LANES)
    store(nan_or(x, z), to, 6 * LANES, LANES)
    store(splat(a[0]), to, 7 * LANES, LANES)
    return sum_lanes(x), max_lanes(x)


def test_arithmetic(rng):
    a, b, c = random_array(rng, 3, LANES)
    out = np.empty((8, LANES), np.float32)
    _, high = _arithmetic(a, b, c, out)
    expected = [a + b, a - b, a * b, a / b, None, np.where(a < b, c, a), c, np.full(LANES, a[0])]
    for got, wanted in zip(out, expected, strict=True):
        if wanted is not None:
            assert_array_equal(got, wanted)
    exact = a.astype(np.float64) * b + c  # the product is exact in float64
    assert np.abs(out[4] - exact).max() <= np.spacing(np.abs(exact).astype(np.float32)).max()
    assert high == a.max()


def test_fma_rounds_once():
    epsilon = np.float32(2.0**-13)
    a, b, c = (np.full(LANES, v, np.float32) for v in (1 + epsilon, 1 - epsilon, -1))
    out = np.empty((8, LANES), np.float32)
    _arithmetic(a, b, c, out)
    assert_array_equal(out[4], np.full(LANES, -(2.0**-26)))


def test_sum_of_lanes_is_exact_for_integers():
    a = np.arange(LANES, dtype=np.float32) + 5
    total, high = _arithmetic(a, a, a, np.empty((8, LANES), np.float32))
    assert total == a.sum()
    assert high == LANES + 4


def test_comparisons_with_nan():
    nan = np.full(LANES, np.nan, np.float32)
    one = np.ones(LANES, np.float32)
    out = np.empty((8, LANES), np.float32)
    _arithmetic(nan, one, one, out)
    assert np.isnan(out[5]).all()  # nan < 1 is false: x
    assert np.isnan(out[6]).all()  # nan_or(nan, 1) is nan


# ---- mathematics ----


@compiled
def _apply(function, x, out):
    for i in range(0, x.size, LANES):
        n = min(LANES, x.size - i)
        v = load(pointer(x, 0), i, n)
        if function == EXP:
            v = exp(v)
        elif function == LOGISTIC:
            v = logistic(v)
        elif function == NORMAL_CDF:
            v = normal_cdf(v)
        elif function == ROUND_EVEN:
            v = round_even(v)
        else:
            v = power_of_two(v)
        store(v, pointer(out, 0), i, n)


def _on_array(function, x):
    x = np.asarray(x, np.float32)
    out = np.empty_like(x)
    _apply(function, x, out)
    return out


def test_exp_is_within_2_ulp():
    x = np.linspace(-87.3365, 88.3762, fewer(300_000) + 1, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(_on_array(EXP, x) - exact) / np.spacing(exact.astype(np.float32))
    assert error.max() <= 2


def test_exp_at_the_ends():
    x = [0.0, -0.0, -87.4, -1e30, -np.inf, 88.4, 1e30, np.inf, np.nan]
    assert_array_equal(_on_array(EXP, x), np.float32([1, 1, 0, 0, 0, np.inf, np.inf, np.inf, np.nan]))


def test_exp_never_decreases():
    x = np.linspace(-90, 90, fewer(100_000) + 1, dtype=np.float32)
    y = _on_array(EXP, x)
    assert (y[1:] >= y[:-1] * (1 - 3e-7)).all()


def test_logistic():
    x = np.linspace(-87, 87, fewer(200_000) + 1, dtype=np.float32)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(_on_array(LOGISTIC, x) - exact) / exact).max() < 4e-7
    assert_array_equal(
        _on_array(LOGISTIC, [0, -np.inf, np.inf, -200, 200, np.nan]), np.float32([0.5, 0, 1, 0, 1, np.nan])
    )


def test_normal_cdf():
    x = np.linspace(-13, 13, fewer(100_000) + 1, dtype=np.float32)
    exact = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
    error = np.abs(_on_array(NORMAL_CDF, x) - exact)
    assert error.max() < 3e-7
    assert (error / exact).max() < 2e-5
    ends = _on_array(NORMAL_CDF, [-np.inf, np.inf, -50, 50, np.nan])
    assert_array_equal(ends, np.float32([0, 1, 0, 1, np.nan]))


def test_round_even_and_powers_of_two():
    assert_array_equal(_on_array(ROUND_EVEN, [0.5, 1.5, 2.5, -0.5, -1.5, 2.4]), np.float32([0, 2, 2, 0, -2, 2]))
    n = np.arange(-126, 128)
    assert_array_equal(_on_array(POWER_OF_TWO, n), np.float32(2.0) ** n.astype(np.float32))


# ---- tiles ----


@njit
def _tile(a, shape, w, columns_at, length, first, out, out_at, out_stride, apart, columns):
    rows, weights = pointer(a, 0), pointer(w, 0)
    tile = zero_tile(shape, columns_at)
    line = line_size(weights)
    whole = length - length % line
    for k in range(0, whole, line):
        tile = dot_line(tile, rows, shape, weights, columns_at, k)
    for k in range(whole, length, step_size(rows)):
        tile = dot_step(tile, rows, shape, weights, columns_at, k, length - k)
    store_sums(tile, shape, columns_at, first, pointer(out, out_at), out_stride, apart, columns)


@compiled
def _dot_products(a, shape, w, w_stride, length, first, out, out_at, out_stride, apart, columns):
    columns_at = clamped_offsets(w_stride, columns - 1)
    _tile(a, shape, w, columns_at, length, first, out, out_at, out_stride, apart, columns)


@compiled
def _wide_dot_products(a, shape, w, w_stride, length, first, out, out_at, out_stride, apart, columns):
    columns_at = wide_offsets(w_stride)
    _tile(a, shape, w, columns_at, length, first, out, out_at, out_stride, apart, columns)


def _packed(a):
    """As tile.py describes it."""
    (rows, length), step = a.shape, 4
    padded = np.zeros((rows, -(-length // step) * step), a.dtype)
    padded[:, :length] = a
    return np.ascontiguousarray(padded.reshape(rows, -1, step).swapaxes(0, 1))


SHAPES = sorted({*WHOLE, *ONE_LAST[2:], *TWO_LAST[2:]})
TILES = [*product(SHAPES, range(1, TILE_COLUMNS + 1)), (WHOLE[0], WIDE_COLUMNS)]


@pytest.mark.parametrize(("shape", "columns"), TILES)
@pytest.mark.parametrize("apart", [1, 3])
def test_tile_of_dot_products(rng, shape, columns, apart):
    products = _dot_products if columns <= TILE_COLUMNS else _wide_dot_products
    vectors, last = map(len, shape)
    rows = (vectors - 1) * GROUP_ROWS + last
    for length in (1, 3, 4, 5, 3 * 16 + 2):
        # Small integers: every order of additions gives the same, exact sum.
        a = rng.integers(-9, 10, (vectors * GROUP_ROWS, length)).astype(np.float32)
        a[rows:] = np.nan
        w = guarded_copy(rng.integers(-9, 10, (columns, length)).astype(np.float32))
        stride = columns * apart + 2
        out = np.full((len(a), stride), 99, np.float32)
        expected = out.copy()
        packed = guarded_copy(_packed(a))
        for first, times in ((True, 1), (False, 2)):  # stored, then added to what is there
            args = (w, length, length, first, out, 1, stride, apart, columns)
            products(packed, shape, *args)
            expected[:rows, 1 : 1 + columns * apart : apart] = times * (a[:rows] @ w.T)
            assert_array_equal(out, expected)


# ---- the shared counter ----


@njit(parallel=True)
def _draw(counters, seen, threads, draws):
    for _thread in prange(threads):
        for _draw in range(draws):
            seen[take_next(pointer(counters, 0), 1)] += 1


def test_take_next_gives_every_number_once():
    threads, draws = 8, fewer(50_000)
    counters = np.array([-5, 0, -5])
    seen = np.zeros(threads * draws, np.int64)
    _draw(counters, seen, threads, draws)
    assert_array_equal(counters, [-5, threads * draws, -5])
    assert_array_equal(seen, np.ones_like(seen))


# ---- the target ----


def test_target_describes_one_register():
    assert target.register_bits() in (128, 256, 512)
    assert target.register_bits() == LANES * 32
    assert GROUP_ROWS * 4 == LANES


@pytest.mark.parametrize(
    ("features", "bits"),
    [
        (["sse2"], 128),
        (["avx2"], 128),  # without fused multiply-add
        (["avx2", "fma"], 256),
        (["avx2", "fma", "avx512f"], 512),
    ],
)
def test_register_bits_follow_the_features(monkeypatch, features, bits):
    monkeypatch.setattr(target, "cpu_features", lambda: frozenset(features))
    assert target.register_bits.__wrapped__() == bits
