"""DispatchPlan: rows sorted by expert and cut into blocks."""

import numpy as np
import pytest
from helpers import compiled
from numpy.testing import assert_array_equal

from moe_numba._engines import AMX, VECTORS
from moe_numba.kernels.plan import Rows, output_piece
from moe_numba.plan import DispatchPlan

ENGINES = (VECTORS, AMX)  # AMX's plan can be made on any processor

pytestmark = pytest.mark.plain


def _assert_plan(indices, used, num_experts, engine):
    """Every promise of the layout, checked from the outside."""
    plan = DispatchPlan(indices, used, num_experts, engine)
    rows = Rows(*plan.rows)
    slots = [(t, j) for t in range(len(indices)) for j in range(used[t])]
    assert plan.num_rows == len(slots)
    assert plan.num_invalid == 0

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
        assert 0 < last - first <= engine.row_block
        assert group == groups
        groups += -(-(last - first) // engine.unit)
        assert {expert_of_row[r] for r in range(first, last)} == {expert}
        end = last
    assert end == len(slots)


@pytest.mark.parametrize("tokens", [0, 1, 3, 63, 64, 65, 300, 700])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (5, 3), (64, 8), (6, 6)])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_layout(rng, engine, tokens, num_experts, top_k):
    ranked = rng.random((tokens, num_experts)).argsort(axis=1)
    indices = np.ascontiguousarray(ranked[:, :top_k])
    _assert_plan(indices, np.full(tokens, top_k), num_experts, engine)
    _assert_plan(indices, rng.integers(0, top_k + 1, tokens), num_experts, engine)


def test_one_expert_taken_twice_by_a_token():
    _assert_plan(np.array([[2, 2], [1, 2]]), np.array([2, 2]), 4, VECTORS)


@pytest.mark.parametrize("rows", range(1, 4 * VECTORS.row_block + 2))
def test_blocks_of_one_expert_are_about_equal(rows):
    plan = DispatchPlan(np.full((rows, 1), 1), np.ones(rows, np.int64), 3, VECTORS)
    laid_out = Rows(*plan.rows)
    blocks = laid_out.blocks[: laid_out.n_blocks]
    assert len(blocks) == -(-rows // VECTORS.row_block)
    sizes = blocks[:, 2] - blocks[:, 1]
    assert sizes.sum() == rows
    assert (sizes[:-1] == sizes.max()).all()


def test_unused_slots_may_hold_anything():
    _assert_plan(np.array([[1, 99], [-7, 0]]), np.array([1, 0]), 2, VECTORS)


def test_invalid_experts_are_counted_and_get_no_row():
    plan = DispatchPlan(np.array([[0, 3], [-1, 2], [2**62, -(2**63)]]), np.array([2, 2, 2]), 3, VECTORS)
    assert plan.num_invalid == 4
    assert plan.num_rows == 2
    rows = Rows(*plan.rows)
    assert_array_equal(rows.row_token[:2], [0, 1])
    assert_array_equal(rows.blocks[: rows.n_blocks], [[0, 0, 1, 0], [2, 1, 2, 1]])


@compiled
def _output_piece(item, width, threads, most, unit):
    return output_piece(item, width, threads, most, unit)


@pytest.mark.parametrize("threads", [1, 2, 7, 64])
@pytest.mark.parametrize("width", [1, 47, 48, 49, 1000, 2048])
def test_output_pieces_cover_every_column_once_and_become_smaller(width, threads):
    most, unit = 384, 48
    end, sizes = 0, []
    while end < width:
        column, columns = _output_piece(len(sizes), width, threads, most, unit)
        assert column == end
        sizes.append(columns)
        end += columns
    assert end == width
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= most
    assert all(size % unit == 0 for size in sizes[:-1])
    if width >= 2 * threads * unit > 2 * unit:
        assert sizes[0] * threads <= width  # nobody waits for the first piece
    for beyond in (0, 1, 100):
        assert _output_piece(len(sizes) + beyond, width, threads, most, unit) == (width, 0)
