"""DispatchPlan: rows sorted by expert and cut into blocks."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from moe_numba.kernels.projection import ROW_BLOCK
from moe_numba.plan import DispatchPlan

pytestmark = pytest.mark.plain


def _assert_plan(indices, used, num_experts):
    """Every promise of the layout, checked from the outside."""
    plan = DispatchPlan(indices, used, num_experts)
    rows = plan.rows
    slots = [(t, j) for t in range(len(indices)) for j in range(used[t])]
    assert plan.num_rows == len(slots)
    assert plan.num_invalid == 0

    row_of = {slot: int(rows.slot_row[slot]) for slot in slots}
    assert sorted(row_of.values()) == list(range(len(slots)))  # every used slot has one row
    for (t, _), r in row_of.items():
        assert rows.row_token[r] == t
    expert_of_row = {r: int(indices[slot]) for slot, r in row_of.items()}
    order = [(expert_of_row[r], int(rows.row_token[r])) for r in range(len(slots))]
    assert order == sorted(order)  # by expert, then by token

    end = 0
    for expert, first, last in rows.blocks[: rows.n_blocks]:
        assert first == end  # blocks cover the rows without a gap
        assert 0 < last - first <= ROW_BLOCK
        assert {expert_of_row[r] for r in range(first, last)} == {expert}
        end = last
    assert end == len(slots)


@pytest.mark.parametrize("tokens", [0, 1, 3, 63, 64, 65, 300, 700])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (5, 3), (64, 8), (6, 6)])
def test_layout(rng, tokens, num_experts, top_k):
    ranked = rng.random((tokens, num_experts)).argsort(axis=1)
    indices = np.ascontiguousarray(ranked[:, :top_k])
    _assert_plan(indices, np.full(tokens, top_k), num_experts)
    _assert_plan(indices, rng.integers(0, top_k + 1, tokens), num_experts)


def test_one_expert_taken_twice_by_a_token():
    _assert_plan(np.array([[2, 2], [1, 2]]), np.array([2, 2]), 4)


@pytest.mark.parametrize("rows", range(1, 4 * ROW_BLOCK + 2))
def test_blocks_of_one_expert_are_about_equal(rows):
    plan = DispatchPlan(np.full((rows, 1), 1), np.ones(rows, np.int64), 3)
    blocks = plan.rows.blocks[: plan.rows.n_blocks]
    assert len(blocks) == -(-rows // ROW_BLOCK)
    sizes = blocks[:, 2] - blocks[:, 1]
    assert sizes.sum() == rows
    assert (sizes[:-1] == sizes.max()).all()


def test_unused_slots_may_hold_anything():
    _assert_plan(np.array([[1, 99], [-7, 0]]), np.array([1, 0]), 2)


def test_invalid_experts_are_counted_and_get_no_row():
    plan = DispatchPlan(np.array([[0, 3], [-1, 2], [2**62, -(2**63)]]), np.array([2, 2, 2]), 3)
    assert plan.num_invalid == 4
    assert plan.num_rows == 2
    assert_array_equal(plan.rows.row_token[:2], [0, 1])
    assert_array_equal(plan.rows.blocks[: plan.rows.n_blocks], [[0, 0, 1], [2, 1, 2]])
