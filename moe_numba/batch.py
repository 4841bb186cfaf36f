"""The main job: a layer over a file of tokens, in batches, with what it did summed up."""

import contextlib
import hashlib
import math
import time
from dataclasses import asdict, dataclass

import numpy as np

from . import _check
from ._cache import package_stamp
from ._files import replacing
from ._partial import Partial
from ._tokens import open_tokens
from ._version import __version__
from ._warmup import prepare
from .errors import CheckpointError
from .layer import MoeLayer
from .losses import balance_of
from .simd import target as processor

#: Seconds of work that a killed run loses at most, beside its last batch.
SAVE_SECONDS = 1.0


@dataclass
class RunReport:
    """What a run did. Times exclude compilation."""

    tokens: int
    seconds: float  #: from the first token read to the last one written
    tokens_per_second: float
    rows_per_expert: list[int]
    dropped_rows: int  #: slots that found no expert with room
    dropped_tokens: int  #: tokens that found none at all
    nan_tokens: int  #: tokens that cannot be routed: they hold NaN or an infinity, or their logits overflow
    balance_loss: float  #: 1.0 when balanced


@dataclass
class _Totals:
    """What the batches so far add up to; plain values, for a record."""

    tokens: int
    seconds: float
    rows: list[int]  #: of each expert
    probs: list[float]  #: summed over tokens, of each expert
    dropped: int
    nan: int  #: tokens of NaN
    digest: str  #: of the tokens read, if they are to be recognised

    def add(self, routing):
        self.tokens += len(routing.routing_probs)
        self.rows = (np.array(self.rows) + routing.expert_counts).tolist()
        self.probs = (np.array(self.probs) + routing.routing_probs.sum(axis=0, dtype=np.float64)).tolist()
        self.dropped += routing.num_dropped
        self.nan += int(np.count_nonzero(np.isnan(routing.routing_probs[:, 0])))

    def report(self, top_k):
        probs = np.array(self.probs) / max(self.tokens, 1)
        return RunReport(
            tokens=self.tokens,
            seconds=self.seconds,
            tokens_per_second=self.tokens / self.seconds,
            rows_per_expert=self.rows,
            dropped_rows=self.tokens * top_k - sum(self.rows),
            dropped_tokens=self.dropped,
            nan_tokens=self.nan,
            balance_loss=balance_of(np.array(self.rows), probs),
        )


def run(
    layer: MoeLayer,
    source,
    target=None,
    batch_size=4096,
    progress=lambda done, total: None,
    *,
    resume=False,
) -> RunReport:
    """Send every token of a file through a layer.

    source: path of a .npy or .safetensors file of shape (..., H). target: path of the .npy file
    for the outputs, float32 of the same shape, or None; it appears, or replaces an existing one,
    when the run is complete. batch_size: tokens per forward; a capacity limit applies to each
    batch. progress: called with the tokens done and the tokens in all after each batch.
    resume: keep the batches that are done in the directory TARGET.part when the run ends early, and begin
    with those that are there: the result is the same, bit for bit. They must have been made by the same
    layer, of the same tokens, with the same batch_size, version and kind of processor.
    Memory in use does not depend on the length of the file. Raises MoeError.
    """
    batch_size = _check.integer("batch_size", batch_size, 1)
    if resume and target is None:
        _check.fail("resume", True, "False without a target")
    with open_tokens(source) as tokens:
        width = layer.config.input_dim
        if tokens.shape[-1] != width:
            was = f"tokens of width {tokens.shape[-1]}"
            raise CheckpointError(f"{source}: has {was}, but the layer's input_dim is {width}")
        count = math.prod(tokens.shape[:-1])
        for batch in {min(batch_size, count), count % batch_size}:
            prepare(layer, batch)
        if resume:
            return _run_partial(layer, tokens, count, target, batch_size, progress)
        with contextlib.nullcontext() if target is None else replacing(target) as output:
            if output:
                _write_header(output, tokens.shape)
            totals = _no_totals(layer)
            for _ in _batches(layer, tokens, count, batch_size, output, totals, progress):
                pass
        return totals.report(layer.config.top_k)


def _run_partial(layer, tokens, count, target, batch_size, progress):
    """`run` on an output that is kept when it is not whole."""
    with Partial(target, _identity(layer, tokens, batch_size)) as partial:
        digest = hashlib.blake2b(digest_size=16)
        if partial.progress is None:
            _write_header(partial.file, tokens.shape)
            totals = _no_totals(layer)
        else:
            totals = _restored(layer, partial)
            for first in range(0, totals.tokens, batch_size):
                digest.update(_bytes(tokens.read(first, min(first + batch_size, totals.tokens))))
            if digest.hexdigest() != totals.digest:
                partial.refuse("input")
            layer.router.skip(-(-totals.tokens // batch_size))
        saved = time.monotonic()
        for x in _batches(layer, tokens, count, batch_size, partial.file, totals, progress):
            digest.update(_bytes(x))
            if time.monotonic() - saved > SAVE_SECONDS:
                totals.digest = digest.hexdigest()
                partial.save(asdict(totals))
                saved = time.monotonic()
    return totals.report(layer.config.top_k)


def _batches(layer, tokens, count, batch_size, output, totals, progress):
    """Do what `totals` lacks, batch by batch; yield the tokens of each when it is written."""
    start = time.perf_counter() - totals.seconds
    for first in range(totals.tokens, count, batch_size):
        end = min(first + batch_size, count)
        x = tokens.read(first, end)
        y, routing = layer.forward(x)
        if output:
            output.write(y.data)
        totals.add(routing)
        totals.seconds = time.perf_counter() - start
        yield x
        progress(end, count)
    totals.seconds = time.perf_counter() - start


def _restored(layer, partial):
    """The totals of a record, which are of the types of fresh ones."""
    fresh, kept = asdict(_no_totals(layer)), partial.progress

    def kind(value):
        return [kind(item) for item in value] if isinstance(value, list) else type(value)

    if {name: kind(value) for name, value in kept.items()} != {name: kind(value) for name, value in fresh.items()}:
        raise partial.damaged("its progress")
    return _Totals(**kept)


def _no_totals(layer):
    experts = layer.router.config.num_experts
    return _Totals(tokens=0, seconds=0.0, rows=[0] * experts, probs=[0.0] * experts, dropped=0, nan=0, digest="")


def _write_header(output, shape):
    np.lib.format.write_array_header_1_0(output, {"descr": "<f4", "fortran_order": False, "shape": shape})


def _identity(layer, tokens, batch_size):
    """What the bits of an output depend on, but for the tokens themselves."""
    digest = hashlib.blake2b(layer.config.to_json().encode(), digest_size=16)
    for name, array in sorted(layer._tensors().items()):
        digest.update(name.encode())
        digest.update(_bytes(array))
    return {
        "layer": digest.hexdigest(),
        "noise": layer.router.noise_state,
        "shape of the input": str(tokens.shape),
        "batch size": batch_size,
        "version": f"{__version__}, {package_stamp()}",
        "processor": f"{processor.cpu_name()}, {processor.register_bits()} bits",
    }


def _bytes(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
