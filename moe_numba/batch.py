"""The main job: a layer over a file of tokens, in batches, with what it did summed up."""

import contextlib
import math
import time
from dataclasses import dataclass

import numpy as np

from . import _check
from ._files import replacing
from ._tokens import open_tokens
from ._warmup import prepare
from .errors import CheckpointError
from .layer import MoeLayer
from .losses import balance_of


@dataclass
class RunReport:
    """What a run did. Times exclude compilation."""

    tokens: int
    seconds: float  #: from the first token read to the last one written
    tokens_per_second: float
    rows_per_expert: list[int]
    dropped_rows: int  #: slots that found no expert with room
    dropped_tokens: int  #: tokens that found none at all
    balance_loss: float  #: 1.0 when balanced


def run(layer: MoeLayer, source, target=None, batch_size=4096, progress=lambda done, total: None) -> RunReport:
    """Send every token of a file through a layer.

    source: path of a .npy or .safetensors file of shape (..., H). target: path of the .npy file
    for the outputs, float32 of the same shape, or None; it appears, or replaces an existing one,
    when the run is complete. batch_size: tokens per forward; a capacity limit applies to each
    batch. progress: called with the tokens done and the tokens in all after each batch.
    Memory in use does not depend on the length of the file. Raises MoeError.
    """
    batch_size = _check.integer("batch_size", batch_size, 1)
    tokens = open_tokens(source)
    width = layer.config.input_dim
    if tokens.shape[-1] != width:
        raise CheckpointError(f"{source}: has tokens of width {tokens.shape[-1]}, but the layer's input_dim is {width}")
    count = math.prod(tokens.shape[:-1])
    experts = layer.router.config.num_experts
    counts, probs = np.zeros(experts, np.int64), np.zeros(experts)
    dropped = 0

    for batch in {min(batch_size, count), count % batch_size}:
        prepare(layer, batch)
    with contextlib.nullcontext() if target is None else replacing(target) as output:
        start = time.perf_counter()
        if output:
            header = {"descr": "<f4", "fortran_order": False, "shape": tokens.shape}
            np.lib.format.write_array_header_1_0(output, header)
        for first in range(0, count, batch_size):
            end = min(first + batch_size, count)
            y, routing = layer.forward(tokens.read(first, end))
            if output:
                output.write(y.data)
            counts += routing.expert_counts
            probs += routing.routing_probs.sum(axis=0, dtype=np.float64)
            dropped += routing.num_dropped
            progress(end, count)
        seconds = time.perf_counter() - start

    return RunReport(
        tokens=count,
        seconds=seconds,
        tokens_per_second=count / seconds,
        rows_per_expert=counts.tolist(),
        dropped_rows=count * layer.config.top_k - int(counts.sum()),
        dropped_tokens=dropped,
        balance_loss=balance_of(counts, probs / count) if count else 0.0,
    )
