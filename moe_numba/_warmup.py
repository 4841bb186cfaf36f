"""Compile every kernel, or load it from the cache, before the first result is wanted."""

from copy import copy

import numpy as np

from ._jit import KERNELS
from .config import DTYPES, MoeConfig
from .layer import MoeLayer
from .router import softmax_rows
from .threads import SERIAL_BELOW


def warmup() -> int:
    """Call every kernel once serial and once parallel; return how many of them were not yet in memory.

    Kernels are compiled for types, not for shapes, so a small layer serves for all.
    """
    before = _loaded()
    config = MoeConfig()
    width, experts = config.input_dim, config.num_experts
    for dtype in DTYPES:
        layer = MoeLayer(config).astype(dtype)
        for tokens in (1, SERIAL_BELOW // (width * experts) + 1):
            layer.forward(np.zeros((tokens, width), np.float32))
    for tokens in (1, SERIAL_BELOW // experts + 1):
        softmax_rows(np.zeros((tokens, experts), np.float32))
    return _loaded() - before


def prepare(layer, tokens):
    """Compile, or load, what a forward of that many tokens needs, with as few of them as will do."""
    config = layer.config
    least = min(config.num_experts, config.top_k * config.hidden_dim) * config.input_dim
    n = min(tokens, SERIAL_BELOW // least + 1)  # enough for the same twins: serial or parallel
    layer = copy(layer)
    layer.router = copy(layer.router)  # whose noise counts its own calls
    layer.forward(np.zeros((n, config.input_dim), np.float32))


def _loaded():
    return sum(len(twin.signatures) for kernel in KERNELS for twin in (kernel.serial, kernel.parallel))
