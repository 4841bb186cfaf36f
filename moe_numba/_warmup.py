"""Compile every kernel, or load it from the cache, before the first result is wanted."""

import numpy as np

from ._jit import KERNELS
from .config import DTYPES, MoeConfig
from .layer import MoeLayer
from .router import softmax_rows
from .threads import SERIAL_BELOW


def warmup(dtypes=DTYPES) -> int:
    """Call every kernel once serial and once parallel; return how many of them were not yet in memory.

    dtypes: the weight formats to compile for. Kernels are compiled for types, not for shapes, so a
    small layer serves for all.
    """
    before = _loaded()
    config = MoeConfig()
    width, experts = config.input_dim, config.num_experts
    for dtype in dtypes:
        layer = MoeLayer(config).astype(dtype)
        for tokens in (1, SERIAL_BELOW // (width * experts) + 1):
            layer.forward(np.zeros((tokens, width), np.float32))
    for tokens in (1, SERIAL_BELOW // experts + 1):
        softmax_rows(np.zeros((tokens, experts), np.float32))
    return _loaded() - before


def _loaded():
    return sum(len(twin.signatures) for kernel in KERNELS for twin in (kernel.serial, kernel.parallel))
