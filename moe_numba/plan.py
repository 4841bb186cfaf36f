"""DispatchPlan: which rows go to which expert, sorted by expert and cut into pieces."""

import numpy as np

from .kernels.plan import plan_rows


class DispatchPlan:
    """Rows of a batch sorted by expert; within an expert in token order.

    indices (T, K) int64: expert of each slot. used (T,) int64: how many leading slots of a token
    are dispatched. num_experts: E. engine: Engine that says how
    rows are cut.
    """

    def __init__(self, indices, used, num_experts, engine):
        slots = indices.size
        row_token = np.empty(slots, np.int64)
        row_slot = np.empty(slots, np.int64)
        blocks = np.empty((num_experts + slots // engine.row_block, 4), np.int64)
        next_row = np.empty(num_experts, np.int64)
        self.num_rows, n_blocks, self.num_invalid = plan_rows.serial(
            indices, used, num_experts, engine.row_block, engine.unit, row_token, row_slot, blocks, next_row
        )
        #: The fields of kernels.plan.Rows, as kernels take them.
        self.rows = row_token, row_slot, blocks, n_blocks
