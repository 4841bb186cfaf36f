"""Memory for intermediate values, kept between calls.

Fresh memory costs a page fault per 4 KiB when it is first written, which is several percent of
a forward. Every Python thread keeps one buffer that grows to the largest call it has seen;
`CHUNK_BYTES` bounds what grows with the tokens, because experts.py cuts larger batches into chunks.
"""

import math
import threading
from bisect import bisect_right
from functools import lru_cache

import numpy as np

from ._aligned import CACHE_LINE, aligned_empty
from ._engines import Sizes

#: A batch is cut into chunks of tokens whose workspace is at most so much larger than that of a single one. 256 MiB
#: hold 2,700 tokens of H = 2048, F = 1024, K = 8: enough rows per expert to read the weights once.
CHUNK_BYTES = 256 * 2**20
#: Tokens in a chunk, at least.
LEAST_CHUNK = 64


class _Memory(threading.local):
    """What one Python thread keeps between calls."""

    def __init__(self):
        self.buffer = aligned_empty(0, np.uint8)
        self.workspaces = {}  # views of the buffer, by the engine and the sizes of the call


_memory = _Memory()


def _bytes(shape):
    rows, length, dtype = shape
    return -(-rows * length * np.dtype(dtype).itemsize // CACHE_LINE) * CACHE_LINE


def chunk_tokens(engine, top_k, num_experts, input_dim, hidden_dim, threads) -> int:
    """Tokens per chunk, so that what its workspace has beyond a single token's stays below CHUNK_BYTES; at least
    LEAST_CHUNK. (What every thread has whatever the tokens, 2 MB on AMX, would leave nothing to 128 threads.)
    """
    return _tokens_in(CHUNK_BYTES, engine, top_k, num_experts, input_dim, hidden_dim, threads)


@lru_cache
def _tokens_in(limit, engine, top_k, *layer):
    def size(tokens):
        return sum(map(_bytes, engine.shapes(Sizes(tokens, tokens * top_k, *layer))))

    too_many = range(LEAST_CHUNK + 1, max(LEAST_CHUNK + 1, limit))
    return LEAST_CHUNK + bisect_right(too_many, size(1) + limit, key=size)


def take_workspace(engine, sizes):
    """Memory for a call of an Engine, valid until the current Python thread's next call.

    sizes: the fields of Sizes. Returns the fields of the engine's workspace, as kernels take them.
    """
    key = (engine, sizes)
    space = _memory.workspaces.get(key)
    if space is not None:
        return space

    shapes = engine.shapes(Sizes(*sizes))
    size = sum(map(_bytes, shapes))
    if size > _memory.buffer.size or len(_memory.workspaces) >= 64:
        _memory.workspaces.clear()  # these are views of the old buffer, and would keep it alive
    if size > _memory.buffer.size:
        _memory.buffer = aligned_empty(size, np.uint8)
    parts = []
    at = 0
    for shape in shapes:
        rows, length, dtype = shape
        used = math.prod((rows, length, np.dtype(dtype).itemsize))
        parts.append(_memory.buffer[at : at + used].view(dtype).reshape(rows, length))
        at += _bytes(shape)
    space = _memory.workspaces[key] = (*parts, np.empty(2, np.int64))
    return space
