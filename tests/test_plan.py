"""The plan of a forward: rows sorted by expert and cut into blocks."""

import numpy as np
import pytest
from helpers import compiled
from numpy.testing import assert_array_equal

from moe_numba.kernels import amx, projection
from moe_numba.kernels.plan import LINE_VALUES, Rows, output_piece, plan_rows
from moe_numba.simd.amx import TILE
from moe_numba.simd.target import GROUP_ROWS

#: Rows of a block at most, and of a group: of vector registers, and of a matrix unit, whose plan any processor makes.
VECTORS, AMX = (projection.ROW_BLOCK, GROUP_ROWS), (amx.ROW_BLOCK, TILE)

pytestmark = pytest.mark.plain


@compiled
def _plan_rows(indices, used, experts, row_block, unit, memory):
    return plan_rows(indices, used, experts, row_block, unit, memory)


def _plan(indices, used, num_experts, cut):
    """Rows laid out in memory that held anything."""
    slots, row_block = indices.size, cut[0]
    memory = np.full(2 * slots + num_experts + 4 * (num_experts + slots // row_block), -99)
    return Rows(*_plan_rows(indices, used, num_experts, *cut, memory))


def _assert_plan(indices, used, num_experts, cut):
    """Every promise of the layout, checked from the outside."""
    row_block, unit = cut
    rows = _plan(indices, used, num_experts, cut)
    slots = [(t, j) for t in range(len(indices)) for j in range(used[t])]
    assert rows.invalid == 0

    row_of = {divmod(int(slot), indices.shape[1]): r for r, slot in enumerate(rows.row_slot[: len(slots)])}
    assert sorted(row_of) == slots  # every used slot has one row
    for (t, _), r in row_of.items():
        assert rows.row_token[r] == t
    expert_of_row = {r: int(indices[slot]) for slot, r in row_of.items()}
    order = [(expert_of_row[r], int(rows.row_token[r])) for r in range(len(slots))]
    assert order == sorted(order)  # by expert, then by token

    end = groups = 0
    for expert, first, last, group in rows.blocks[: rows.n_blocks]:
        assert first == end  # blocks cover the rows without a gap
        assert 0 < last - first <= row_block
        assert group == groups
        groups += -(-(last - first) // unit)
        assert {expert_of_row[r] for r in range(first, last)} == {expert}
        end = last
    assert end == len(slots)


@pytest.mark.parametrize("tokens", [0, 1, 3, 63, 64, 65, 300, 700])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (5, 3), (64, 8), (6, 6)])
@pytest.mark.parametrize("cut", [VECTORS, AMX], ids=["vectors", "AMX"])
def test_layout(rng, cut, tokens, num_experts, top_k):
    ranked = rng.random((tokens, num_experts)).argsort(axis=1)
    indices = np.ascontiguousarray(ranked[:, :top_k])
    _assert_plan(indices, np.full(tokens, top_k), num_experts, cut)
    _assert_plan(indices, rng.integers(0, top_k + 1, tokens), num_experts, cut)


def test_one_expert_taken_twice_by_a_token():
    _assert_plan(np.array([[2, 2], [1, 2]]), np.array([2, 2]), 4, VECTORS)


@pytest.mark.parametrize("rows", range(1, 4 * projection.ROW_BLOCK + 2))
def test_blocks_of_one_expert_are_about_equal(rows):
    laid_out = _plan(np.full((rows, 1), 1), np.ones(rows, np.int64), 3, VECTORS)
    blocks = laid_out.blocks[: laid_out.n_blocks]
    assert len(blocks) == -(-rows // projection.ROW_BLOCK)
    sizes = blocks[:, 2] - blocks[:, 1]
    assert sizes.sum() == rows
    assert (sizes[:-1] == sizes.max()).all()


def test_unused_slots_may_hold_anything():
    _assert_plan(np.array([[1, 99], [-7, 0]]), np.array([1, 0]), 2, VECTORS)


def test_invalid_experts_are_counted_and_get_no_row():
    indices = np.array([[0, 3], [-1, 2], [2**62, -(2**63)]])
    rows = _plan(indices, np.array([2, 2, 2]), 3, VECTORS)
    assert rows.invalid == 4
    assert_array_equal(rows.row_token[:2], [0, 1])
    assert_array_equal(rows.blocks[: rows.n_blocks], [[0, 0, 1, 0], [2, 1, 2, 1]])


@compiled
def _output_piece(item, width, threads, most, unit):
    return output_piece(item, width, threads, most, unit)


@pytest.mark.parametrize("threads", [1, 2, 7, 64])
@pytest.mark.parametrize("width", [1, 47, 48, 49, 1000, 2048])
def test_output_pieces_cover_every_column_once_and_give_every_thread_the_same(width, threads):
    most, unit = 384, 48
    end, sizes = 0, []
    while end < width:
        column, columns = _output_piece(len(sizes), width, threads, most, unit)
        assert column == end
        assert 0 < columns <= most
        sizes.append(columns)
        end += columns
    assert end == width
    batches = [sizes[i : i + threads] for i in range(0, len(sizes), threads)]
    *equal, last = batches
    if threads > 1:
        assert all(batch == [batch[0]] * threads and batch[0] % unit == 0 for batch in equal)
        assert equal == sorted(equal, reverse=True)
        assert max(last) <= 2 * unit
        assert sizes[0] * threads < width + threads * LINE_VALUES  # nobody waits for the first piece
    else:
        assert [size for (size,) in equal] == [most] * len(equal)
    for beyond in (0, 1, 100):
        assert _output_piece(len(sizes) + beyond, width, threads, most, unit) == (width, 0)
