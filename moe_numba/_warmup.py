"""Compile every kernel, or load it from the cache, before the first result is wanted."""

import itertools
from copy import copy
from dataclasses import replace

import numba
import numpy as np

from ._jit import KERNELS
from .config import DTYPES, MoeConfig
from .layer import MoeLayer
from .router import softmax_rows
from .threads import SERIAL_BELOW


def warmup() -> int:
    """Call every kernel once serial and once parallel; return how many of them were not yet in memory.

    Kernels are compiled for types, not for shapes, so small layers serve for all: of each format and storage, of
    a router with rules and one without, and of widths that a matrix unit takes and that it does not. Without the JIT
    there is nothing to do.
    """
    if numba.config.DISABLE_JIT:
        return 0
    before = _loaded()
    config = MoeConfig()
    experts = config.num_experts
    for dtype, transposed, odd in itertools.product(DTYPES, (False, True), (0, 1)):
        scoring, width = "sigmoid" if transposed else "softmax", config.input_dim + odd
        layer = MoeLayer(replace(config, input_dim=width, dtype=dtype, transposed=transposed, scoring=scoring))
        for tokens in (1, SERIAL_BELOW // (width * experts) + 1):
            layer.forward(np.zeros((tokens, width), np.float32))
    for tokens in (1, SERIAL_BELOW // experts + 1):
        softmax_rows(np.zeros((tokens, experts), np.float32))
    return _loaded() - before


def prepare(layer, tokens):
    """Compile, or load, what a forward of that many tokens needs, with as few of them as will do."""
    config = layer.config
    # Outputs per token, of each kernel that is called.
    parts = [config.num_experts, config.top_k * config.hidden_dim]
    if config.shared_hidden_dim:
        parts.append(config.shared_hidden_dim)
    if config.shared_gate:
        parts.append(1)
    n = min(tokens, SERIAL_BELOW // (min(parts) * config.input_dim) + 1)  # the same twins: serial or parallel
    layer = copy(layer)
    layer.router = copy(layer.router)  # whose noise counts its own calls
    # Alike, tokens would choose the same experts, and those above their capacity would be lost.
    layer.forward(np.random.default_rng(0).standard_normal((n, config.input_dim), np.float32))


def _loaded():
    return sum(len(twin.signatures) for kernel in KERNELS for twin in (kernel.serial, kernel.parallel))
