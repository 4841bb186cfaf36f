"""Engines: the kernels that compute experts, and which memory each needs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import from_dtype, types

from ._aligned import CACHE_LINE
from ._jit import Kernel, address_of
from .kernels import amx, amx_transposed, experts, projection
from .simd.amx import DEPTH, PACKED_TILE, SUMS, TILE
from .simd.products import operand_dtype
from .simd.target import GROUP_ROWS, has_amx
from .simd.vector import Floats


class Sizes(NamedTuple):
    """Of a call."""

    tokens: int
    rows: int
    num_experts: int
    input_dim: int
    hidden_dim: int
    threads: int


@dataclass(frozen=True, eq=False)
class Engine:
    """A kernel that computes experts."""

    name: str
    kernel: Kernel  #: of the arguments of kernels.experts.experts_forward
    workspace: type  #: the NamedTuple that it takes its memory in; the last field is counters
    shapes: Callable  #: Sizes -> (rows, length, dtype) of every field but counters


def _odd_lines(width):
    """`width` float32, rounded up to an odd number of cache lines.

    Rows at a distance of a power of two would compete for the same few sets of the first-level
    cache; padding made blocks of 64 rows up to 15 % faster.
    """
    items = CACHE_LINE // 4
    return items * (-(-width // items) | 1)


def _output_columns(s, most, unit):
    """Columns of the largest piece of work of the second projection (plan.output_piece)."""
    share = s.input_dim // (2 * s.threads) if s.threads > 1 else s.input_dim
    return min(most, max(1, -(-share // unit)) * unit)


def _groups(s, unit):
    """Groups of `unit` rows at most: every expert's last one may hold one row."""
    return min(s.rows, s.num_experts) + s.rows // unit


def _plan_shape(s, row_block):
    """Of the memory of kernels.plan.plan_rows."""
    return 1, 2 * s.rows + s.num_experts + 4 * (s.num_experts + s.rows // row_block), np.int64


def _vector_shapes(operand):
    def shapes(s):
        most = experts.FEW_OUTPUT_COLUMNS if s.tokens <= experts.FEW_TOKENS else experts.OUTPUT_COLUMNS
        columns = _output_columns(s, most, experts.TRANSPOSED_BLOCK)
        line = CACHE_LINE // np.dtype(operand).itemsize
        packed = (GROUP_ROWS * line * -(-width // line) for width in (s.input_dim, s.hidden_dim))
        return [
            *((_groups(s, GROUP_ROWS), length, operand) for length in packed),
            (s.threads, max(1, s.tokens) * columns, np.float32),
            (s.threads, experts.SCRATCH_SIZE, np.float32),
            _plan_shape(s, projection.ROW_BLOCK),
        ]

    return shapes


def _amx_shapes(s):
    least, most = amx.OUTPUT_COLUMNS
    held = max(amx.OUTPUT_VALUES // max(1, s.tokens), s.hidden_dim // amx.HIDDEN_PER_COLUMN)
    held = held // amx.OUTPUT_BLOCK * amx.OUTPUT_BLOCK
    columns = _output_columns(s, min(most, max(least, held)), amx.OUTPUT_BLOCK)
    packed = (PACKED_TILE * -(-width // DEPTH) for width in (s.input_dim, s.hidden_dim))
    return [
        *((_groups(s, TILE), length, np.uint16) for length in packed),
        (s.threads, max(1, s.tokens) * columns, np.float32),
        (s.threads, amx.SCRATCH_SIZE, np.float32),
        (s.threads, TILE * columns + SUMS, np.float32),
        (s.threads, 2 * TILE * DEPTH, np.uint16),
        _plan_shape(s, amx.ROW_BLOCK),
    ]


def _amx_transposed_shapes(s):
    columns = _output_columns(s, amx_transposed.OUTPUT_COLUMNS, amx_transposed.OUTPUT_BLOCK)
    rows = TILE * _groups(s, TILE)
    return [
        *((rows, _odd_lines(width + 1), np.float32) for width in (s.input_dim, s.hidden_dim)),
        (s.threads, max(1, s.tokens) * columns, np.float32),
        (s.threads, amx_transposed.SCRATCH_SIZE, np.float32),
        _plan_shape(s, amx_transposed.ROW_BLOCK),
    ]


#: Vector registers, with float32 activations, and with bfloat16 ones.
VECTORS, VECTORS_BFLOAT16 = (
    Engine(name, experts.experts_forward, experts.Workspace, _vector_shapes(operand))
    for name, operand in (("vectors", np.float32), ("vectors, bfloat16", np.uint16))
)
#: The matrix unit, and with weights stored [in, out].
AMX = Engine("AMX", amx.experts_forward_amx, amx.AmxWorkspace, _amx_shapes)
AMX_TRANSPOSED = Engine(
    "AMX, transposed",
    amx_transposed.experts_forward_amx_transposed,
    amx_transposed.AmxTransposedWorkspace,
    _amx_transposed_shapes,
)


@lru_cache
def engine_for(storage, transposed, widths) -> Engine:
    """The quickest engine on this processor for weights of a storage dtype. widths: of input and hidden values."""
    if storage == np.uint16 and has_amx():
        if not transposed:
            return AMX
        if all(width % amx_transposed.WIDTH_UNIT == 0 for width in widths):
            return AMX_TRANSPOSED
    return VECTORS_BFLOAT16 if operand_dtype(storage) == np.uint16 else VECTORS


@lru_cache
def products_for(engine, storage, transposed) -> tuple:
    """The fields of experts.Products of an engine and weights of a storage dtype."""
    if engine.kernel is not experts.experts_forward:  # those of the matrix unit are part of its kernels
        return tuple(experts.Products(0, transposed))
    return tuple(experts.Products(project_address(storage, transposed), transposed))


@lru_cache
def project_address(storage, transposed) -> int:
    """Address of `project`, or `project_transposed`, of weights of a storage dtype."""
    function = projection.project_transposed if transposed else projection.project
    a, w = (types.CPointer(from_dtype(np.dtype(dtype))) for dtype in (operand_dtype(storage), storage))
    n = types.int64
    return address_of(function, a, n, n, w, n, n, n, n, Floats, n)
