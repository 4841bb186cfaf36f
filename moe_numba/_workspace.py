"""Memory for intermediate values, kept between calls.

Fresh memory costs a page fault per 4 KiB when it is first written, which is several percent of
a forward. Every Python thread keeps one buffer that grows to the largest call it has seen;
`CHUNK_BYTES` bounds it, because experts.py cuts larger batches into chunks.
"""

import threading

import numpy as np

from ._aligned import CACHE_LINE, aligned_empty
from .kernels.experts import SCRATCH_SIZE, Workspace

#: A batch is cut into chunks of tokens whose workspace stays below this. 256 MiB hold 2,700
#: tokens of H = 2048, F = 1024, K = 8: enough rows per expert to read the weights once.
CHUNK_BYTES = 256 * 2**20
#: Tokens in a chunk, at least.
LEAST_CHUNK = 64


class _Memory(threading.local):
    """What one Python thread keeps between calls."""

    def __init__(self):
        self.buffer = aligned_empty(0)
        self.workspaces = {}  # views of the buffer, by the shape of the call


_memory = _Memory()


def _row_lines(width, dtype) -> int:
    """Cache lines of a row of `width` values: an odd number.

    Rows at a distance of a power of two would compete for the same few sets of the first-level
    cache; padding made blocks of 64 rows up to 15 % faster.
    """
    return -(-width * np.dtype(dtype).itemsize // CACHE_LINE) | 1


def chunk_tokens(top_k, input_dim, hidden_dim) -> int:
    """Tokens per chunk, so that its workspace stays below CHUNK_BYTES; at least LEAST_CHUNK."""
    token, hidden = (CACHE_LINE * _row_lines(width, np.float32) for width in (input_dim, hidden_dim))
    return max(LEAST_CHUNK, CHUNK_BYTES // (top_k * (token + hidden) + token))


def take_workspace(tokens, rows, input_dim, hidden_dim, threads, operand) -> Workspace:
    """A workspace for a call, valid until the current Python thread's next call.

    operand: dtype of the activations that are multiplied.
    """
    key = (tokens, rows, input_dim, hidden_dim, threads, operand)
    space = _memory.workspaces.get(key)
    if space is not None:
        return space

    shapes = [
        (tokens, input_dim, operand),
        (rows, hidden_dim, operand),
        (rows, input_dim, np.float32),
        (threads, SCRATCH_SIZE, np.float32),
    ]
    widths = [CACHE_LINE // 4 * _row_lines(width, dtype) for _, width, dtype in shapes]
    size = sum(n * width for (n, _, _), width in zip(shapes, widths, strict=True))
    if size > _memory.buffer.size or len(_memory.workspaces) >= 64:
        _memory.workspaces.clear()  # these are views of the old buffer, and would keep it alive
    if size > _memory.buffer.size:
        _memory.buffer = aligned_empty(size)
    parts = []
    at = 0
    for (n, _, dtype), width in zip(shapes, widths, strict=True):
        parts.append(_memory.buffer[at : at + n * width].reshape(n, width).view(dtype))
        at += n * width
    space = _memory.workspaces[key] = Workspace(*parts, counters=np.empty(2, np.int64))
    return space
