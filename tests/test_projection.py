"""project: dot products of rows of tokens with rows of weights."""

import numpy as np
import pytest
from helpers import assert_same_bits, compiled, guarded_copy, random_array
from numpy.testing import assert_array_equal

from moe_numba.kernels.projection import BLOCK_STEPS, CONSECUTIVE, ROW_BLOCK, STREAM_ROWS, project
from moe_numba.simd.target import LANES
from moe_numba.simd.vector import pointer

pytestmark = pytest.mark.plain


@compiled
def _project(a, row_ids, w, out, columns):
    project(
        pointer(a, 0),
        a.shape[1],
        pointer(row_ids, 0),
        row_ids.size,
        pointer(w, 0),
        columns,
        w.shape[1],
        0,
        pointer(out, 0),
        out.shape[1],
    )


def _run(a, row_ids, w):
    out = np.full((len(row_ids), len(w) + 1), 99, np.float32)
    _project(a, row_ids, w, out, len(w))
    assert_array_equal(out[:, -1], np.full(len(out), 99))
    return out[:, :-1]


K_BLOCK = BLOCK_STEPS * LANES
LENGTHS = [1, LANES - 1, LANES, LANES + 1, 100, K_BLOCK - 1, K_BLOCK, K_BLOCK + 1, 2 * K_BLOCK + 17]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 5), (3, 6), (4, 7), (5, 12), (7, 13), (ROW_BLOCK, 48)])
def test_project(rng, rows, columns, length):
    a = guarded_copy(random_array(rng, rows + 3, length))
    w = guarded_copy(random_array(rng, columns, length))
    row_ids = rng.integers(0, rows + 3, rows)
    rows_64, w_64 = a[row_ids].astype(np.float64), w.astype(np.float64)
    error = np.abs(_run(a, row_ids, w) - rows_64 @ w_64.T)
    assert (error <= 5e-7 * (np.abs(rows_64) @ np.abs(w_64).T)).all()


@pytest.mark.parametrize("length", [LANES + 3, K_BLOCK + 5])
def test_a_row_does_not_depend_on_the_rows_beside_it(rng, length):
    a, w = random_array(rng, STREAM_ROWS + 5, length), random_array(rng, 9, length)
    together = _run(a, np.arange(len(a)), w)
    for r in range(len(a)):
        assert_same_bits(_run(a, np.array([r]), w)[0], together[r])


def test_a_column_does_not_depend_on_the_columns_beside_it(rng):
    a, w = random_array(rng, 3, 77), random_array(rng, 20, 77)
    together = _run(a, np.arange(3), w)
    for j in range(20):
        assert_same_bits(_run(a, np.arange(3), w[j : j + 1])[:, 0], together[:, j])


def test_consecutive_rows_are_one_block():
    assert_array_equal(CONSECUTIVE, np.arange(ROW_BLOCK))
