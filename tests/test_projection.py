"""project: dot products of rows of tokens with rows of weights."""

import numpy as np
import pytest
from helpers import assert_same_bits, compiled, guarded_copy, random_array
from numpy.testing import assert_array_equal

from moe_numba.kernels.projection import BLOCK_STEPS, ROW_BLOCK, STREAM_ROWS, pack, project, tile_of, tiles_of
from moe_numba.simd.target import GROUP_ROWS, LANES, TILE_VECTORS
from moe_numba.simd.vector import pointer

pytestmark = pytest.mark.plain


@compiled
def _project(a, row_ids, w, packed, out, columns):
    rows, width = row_ids.size, a.shape[1]
    x, v = pointer(packed, 0), pointer(w, 0)
    pack(pointer(a, 0), width, pointer(row_ids, 0), rows, 0, width, x, packed.shape[1], v)
    project(x, packed.shape[1], rows, v, width, columns, width, 0, pointer(out, 0), out.shape[1])


def _whole_groups(rows):
    return -(-rows // GROUP_ROWS) * GROUP_ROWS


def _run(a, row_ids, w):
    rows = _whole_groups(len(row_ids))
    packed = np.full((rows, -(-a.shape[1] // 16) * 16), np.nan, np.float32)
    out = np.full((rows, len(w) + 1), 99, np.float32)
    _project(a, row_ids, w, packed, out, len(w))
    assert_array_equal(out[:, -1], np.full(len(out), 99))
    # The rest of the last group: sums of zeros. That of one or two rows may be left alone.
    assert np.isin(out[len(row_ids) :, :-1], (0, 99) if len(row_ids) % GROUP_ROWS in (1, 2) else (0,)).all()
    return out[: len(row_ids), :-1]


K_BLOCK = 4 * BLOCK_STEPS
LENGTHS = [1, LANES - 1, LANES, LANES + 1, 100, K_BLOCK - 1, K_BLOCK, K_BLOCK + 1, 2 * K_BLOCK + 17]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 5), (3, 6), (4, 7), (5, 12), (7, 13), (ROW_BLOCK, 12)])
def test_project(rng, rows, columns, length):
    a = guarded_copy(random_array(rng, rows + 3, length))
    w = guarded_copy(random_array(rng, columns, length))
    row_ids = rng.integers(0, rows + 3, rows)
    rows_64, w_64 = a[row_ids].astype(np.float64), w.astype(np.float64)
    error = np.abs(_run(a, row_ids, w) - rows_64 @ w_64.T)
    assert (error <= 5e-7 * (np.abs(rows_64) @ np.abs(w_64).T)).all()


@pytest.mark.parametrize("length", [LANES + 3, 80, K_BLOCK + 5])
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


@compiled
def _tiles(rows, tiles):
    """First row, number of vectors, rows, and packed rows of every tile of a block."""
    parts = tiles_of(rows)
    for t in range(parts[1]):
        tiles[t] = tile_of(parts, t)
    return parts[1]


@pytest.mark.parametrize("rows", [*range(1, 70), ROW_BLOCK])
def test_tiles_of_a_block_are_alike_and_hold_every_row(rows):
    tiles = np.zeros((ROW_BLOCK, 4), np.int64)
    firsts, vectors, heights, packed = tiles[: _tiles(rows, tiles)].T
    assert_array_equal(firsts, np.append(0, np.cumsum(vectors * GROUP_ROWS))[:-1])
    assert sum(vectors * GROUP_ROWS) == _whole_groups(rows)
    assert_array_equal(heights, np.minimum(vectors * GROUP_ROWS, rows - firsts))
    assert_array_equal(packed, vectors * GROUP_ROWS if rows > 1 else [1])
    assert 1 <= min(vectors) <= vectors[-1] == max(vectors) <= min(min(vectors) + 1, TILE_VECTORS)
