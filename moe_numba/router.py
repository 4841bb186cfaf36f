"""Routers: from tokens to the experts they go to, and with which weights."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from . import _check
from ._init import router_weight
from .config import RouterConfig
from .kernels import routing
from .threads import threads_for, twin

_NO_NOISE = _check.read_only(np.empty((0, 0), np.float32))


@dataclass(slots=True, eq=False)
class RoutingResult:
    """Where T tokens go. `expert_counts`, `num_dropped` and `slots_used` are derived if left out.

    A slot of weight 0 then counts as one that found no expert.
    """

    expert_indices: np.ndarray  #: (T, K) int64, the more probable expert first; unfilled slots last
    expert_weights: np.ndarray  #: (T, K) float32, sum 1 over the filled slots, 0 in unfilled ones
    routing_probs: np.ndarray  #: (T, E) float32, softmax over all experts
    expert_counts: np.ndarray | None = None  #: (E,) int64, rows dispatched to each expert
    num_dropped: int | None = None  #: tokens that found no expert
    slots_used: np.ndarray | None = None  #: (T,) int64, filled slots of each token; they come first

    def __post_init__(self):
        if self.slots_used is None:
            self.slots_used = np.count_nonzero(np.asarray(self.expert_weights), axis=-1).astype(np.int64)
        if self.expert_counts is None:
            indices = np.asarray(self.expert_indices, np.int64)
            filled = np.arange(indices.shape[-1]) < self.slots_used[:, None] if indices.size else indices.astype(bool)
            self.expert_counts = np.bincount(indices[filled], minlength=np.shape(self.routing_probs)[-1])
        if self.num_dropped is None:
            self.num_dropped = int(np.count_nonzero(self.slots_used == 0))


def capacity_limit(num_tokens: int, top_k: int, num_experts: int, capacity_factor: float | None) -> int:
    """Rows that one expert takes from a batch: max(1, ceil(capacity_factor * T * K / E)).

    Product and quotient in float32 (entrenar, moe::router::capacity_limit). With None for
    `capacity_factor` there is no limit: T * K, at least 1.
    """
    num_tokens = _check.integer("num_tokens", num_tokens, 0)
    top_k = _check.integer("top_k", top_k, 1)
    num_experts = _check.integer("num_experts", num_experts, 1)
    if capacity_factor is None:
        return max(1, num_tokens * top_k)
    factor = _check.number("capacity_factor", capacity_factor, "a number above 0, or None", lambda v: v > 0)
    with np.errstate(over="ignore"):
        limit = _capacity(num_tokens, top_k, num_experts, factor)
    return max(1, math.ceil(limit)) if np.isfinite(limit) else max(1, num_tokens * top_k)


def _capacity(num_tokens, top_k, num_experts, factor):
    return np.float32(factor) * np.float32(num_tokens * top_k) / np.float32(num_experts)


def softmax_rows(logits: ArrayLike) -> np.ndarray:
    """Softmax over the last axis of `logits` (T, E), in float32. A row with NaN or +inf becomes NaN."""
    probs = _check.floats("logits", logits, (None, None), "(T, E)").copy()
    kernel = routing.softmax_rows
    twin(kernel, threads_for(probs.size * 16))(probs)
    return probs


class TopKRouter:
    """Deterministic top-k router: softmax(x @ gate_weight), the K most probable experts.

    config: RouterConfig. weight: (E, H) float32, used in place; without it, `init` draws one:
    "xavier" from `seed`, or "sine", entrenar's start.
    """

    def __init__(self, config: RouterConfig, *, weight: ArrayLike | None = None, seed: int = 0, init: str = "xavier"):
        self.config = _check.instance("config", config, RouterConfig)
        shape = (config.num_experts, config.input_dim)
        if weight is None:
            weight = router_weight(shape, seed, init)
        self._weight = _check.floats("weight", weight, shape, "(num_experts, input_dim)")
        self._kernel_weight = _check.read_only(self._weight)

    @property
    def weight(self) -> np.ndarray:
        """(E, H) the weight as checkpoints store it; assigning writes into it."""
        return self._weight

    @weight.setter
    def weight(self, value: ArrayLike) -> None:
        _check.assign("weight", self._weight, value)

    @property
    def gate_weight(self) -> np.ndarray:
        """(H, E) live view of the weight: writing to it changes what `route` uses."""
        return self.weight.T

    @gate_weight.setter
    def gate_weight(self, value: ArrayLike) -> None:
        _check.assign("gate_weight", self._weight.T, value)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("_kernel_weight", "_calls")}

    def __setstate__(self, state):  # a copy has views of its own weight
        vars(self).update(state)
        self._kernel_weight = _check.read_only(self._weight)

    def route(self, x: ArrayLike) -> RoutingResult:
        """Route the tokens x (T, H). See RoutingResult, and README.md for the rules."""
        config = self.config
        x = _check.read_only(_check.floats("x", x, (None, config.input_dim), f"(T, {config.input_dim})"))
        tokens = x.shape[0]
        experts, k = config.num_experts, config.top_k
        limited = config.capacity_factor is not None
        # 1e20: every row has room in any case, and the product stays finite.
        factor = min(config.capacity_factor, 1e20) if limited else 0.0
        capacity = max(1, math.ceil(min(_capacity(tokens, k, experts, factor), tokens * k))) if limited else -1
        probs = np.empty((tokens, experts), np.float32)
        indices = np.empty((tokens, k), np.int64)
        weights = np.empty((tokens, k), np.float32)
        used = np.empty(tokens, np.int64)
        counts = np.empty(experts, np.int64)
        threads = threads_for(tokens * experts * config.input_dim)
        twin(routing.route, threads)(
            x,
            self._kernel_weight,
            self._noise(tokens),
            capacity,
            config.overflow == "next",
            probs,
            indices,
            weights,
            used,
            counts,
            threads,
            np.empty(1, np.int64),
        )
        dropped = int(tokens - np.count_nonzero(used)) if limited else 0
        return RoutingResult(indices, weights, probs, counts, dropped, used)

    def _noise(self, tokens):
        """What is added to the logits of T tokens: (T, E), or (0, 0) for nothing."""
        return _NO_NOISE


class NoisyTopKRouter(TopKRouter):
    """TopKRouter with Gaussian noise of standard deviation `noise_std` on the logits.

    The noise of a token depends on the seed, the number of the call and the token's place in the
    batch, not on the number of threads. seed None: a different one for every router. A copy counts
    its calls anew.
    """

    def __init__(
        self,
        config: RouterConfig,
        noise_std: float,
        seed: int | None = None,
        *,
        weight: ArrayLike | None = None,
        init: str = "xavier",
    ):
        rule = "a finite number of at least 0"
        self.noise_std = _check.number("noise_std", noise_std, rule, lambda v: v >= 0)
        self._seed = np.random.SeedSequence(None if seed is None else _check.integer("seed", seed, 0)).entropy
        self._calls = itertools.count()  # next() is atomic: calls from several threads differ
        super().__init__(config, weight=weight, seed=0 if seed is None else seed, init=init)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._calls = itertools.count()

    def _noise(self, tokens):
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, next(self._calls)])))
        noise = generator.standard_normal((tokens, self.config.num_experts), np.float32)
        noise *= np.float32(self.noise_std)
        return _check.read_only(noise)
