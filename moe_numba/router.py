"""Routers: from tokens to the experts they go to, and with which weights."""

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from . import _check
from ._aligned import CACHE_LINE
from ._engines import project_address
from ._init import router_weight
from .config import RouterConfig
from .kernels import routing, scoring
from .simd.target import GROUP_ROWS
from .threads import threads_for, twin

_FLOAT32, _INT64 = np.dtype(np.float32), np.dtype(np.int64)  # a type costs each np.empty 0.07 us more
_NO_NOISE = _check.read_only(np.empty((0, 0), np.float32))
_NO_VECTOR = np.empty(0, np.float32)
#: To read a weight from memory takes as long as to multiply it with so many tokens (Zen 4, one token: the router of
#: qwen3 takes 33 us on two threads and 45 on one, olmoe's 28 and 31).
_TOKENS_PER_READ = 8


@dataclass(slots=True, eq=False)
class RoutingResult:
    """Where T tokens go. `expert_counts`, `num_dropped` and `slots_used` are derived if left out.

    A slot of weight 0 then counts as one that found no expert.
    """

    expert_indices: np.ndarray  #: (T, K) int64, the more probable expert first; unfilled slots last
    expert_weights: np.ndarray  #: (T, K) float32, sum 1 over the filled slots or as configured, 0 in unfilled ones
    routing_probs: np.ndarray  #: (T, E) float32, scores of all experts: their softmax or as configured
    expert_counts: np.ndarray | None = None  #: (E,) int64, rows dispatched to each expert
    num_dropped: int | None = None  #: tokens that found no expert
    slots_used: np.ndarray | None = None  #: (T,) int64, filled slots of each token; they come first

    def __post_init__(self):
        if self.slots_used is None:
            self.slots_used = np.count_nonzero(np.asarray(self.expert_weights), axis=-1).astype(np.int64)
        if self.expert_counts is None:
            filled = np.asarray(self.expert_indices, np.int64)[np.asarray(self.expert_weights) != 0]
            self.expert_counts = np.bincount(filled, minlength=np.shape(self.routing_probs)[-1])
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
    return _capacity_limit(num_tokens, top_k, num_experts, factor)


@lru_cache  # 0.1 us of a call instead of 2
def _capacity_limit(num_tokens, top_k, num_experts, factor):
    with np.errstate(over="ignore", invalid="ignore"):
        limit = np.float32(factor) * np.float32(num_tokens * top_k) / np.float32(num_experts)
    return max(1, math.ceil(limit) if np.isfinite(limit) else num_tokens * top_k)


def softmax_rows(logits: ArrayLike) -> np.ndarray:
    """Softmax over the last axis of `logits` (T, E), in float32. A row with NaN or +inf becomes NaN."""
    probs = _check.floats("logits", logits, (None, None), "(T, E)").copy()
    kernel = routing.softmax_rows
    twin(kernel, threads_for(probs.size * 16))(probs)
    return probs


@lru_cache
def _scratch_shape(tokens, input_dim, threads):
    """Of the scratch memory of kernels.routing.route."""
    rows = min(routing.TOKEN_BLOCK, -(-tokens // GROUP_ROWS) * GROUP_ROWS)
    line = CACHE_LINE // _FLOAT32.itemsize
    whole_lines = -(-input_dim // line) * line
    return threads, rows, routing.EXPERT_BLOCK + whole_lines


class TopKRouter:
    """Deterministic top-k router: softmax(x @ gate_weight), the K most probable experts.

    config: RouterConfig, with other scores, groups and biases if it says so (docs/routing.md). weight:
    (E, H) float32, used in place; without it, `init` draws one: "xavier" from `seed`, or "sine",
    entrenar's start. bias, e_score_correction_bias: (E,) float32, used in place, if config.router_bias and
    config.selection_bias; zeros without them.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        weight: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        e_score_correction_bias: ArrayLike | None = None,
        seed: int = 0,
        init: str = "xavier",
    ):
        self.config = _check.instance("config", config, RouterConfig)
        shape = (config.num_experts, config.input_dim)
        if weight is None:
            weight = router_weight(shape, seed, init)
        self._weight = _check.floats("weight", weight, shape, "(num_experts, input_dim)")
        self._bias = _vector("bias", bias, "router_bias", config)
        self._selection_bias = _vector("e_score_correction_bias", e_score_correction_bias, "selection_bias", config)
        self._make_views()

    def _make_views(self):
        """What kernels take: views that cannot be written."""
        self._kernel_weight = _check.read_only(self._weight)
        self._rules = self._make_rules()

    def _make_rules(self):
        c = self.config
        if replace(c, **_WITHOUT_RULES) == c:
            return None
        return scoring.Rules(
            scoring.CODES[c.scoring],
            c.score_before_topk,
            c.norm_topk_prob,
            c.norm_eps,
            c.routed_scaling_factor,
            c.n_group,
            c.n_group if c.topk_group is None else c.topk_group,
            c.group_score == "top2_sum",
            0.0 if c.group_mask == "zero" else -math.inf,
            0.0 if c.logit_softcap is None else c.logit_softcap,
            0.0,
            *(_check.read_only(_NO_VECTOR if v is None else v) for v in (self._bias, self._selection_bias)),
        )

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

    @property
    def bias(self) -> np.ndarray | None:
        """(E,) added to the logits, or None; assigning writes into it."""
        return self._bias

    @bias.setter
    def bias(self, value: ArrayLike) -> None:
        self._assign_vector("bias", self._bias, value)

    @property
    def e_score_correction_bias(self) -> np.ndarray | None:
        """(E,) added to the scores by which experts are chosen, not to the weights, or None."""
        return self._selection_bias

    @e_score_correction_bias.setter
    def e_score_correction_bias(self, value: ArrayLike) -> None:
        self._assign_vector("e_score_correction_bias", self._selection_bias, value)

    @staticmethod
    def _assign_vector(name, vector, value):
        if vector is None:
            _check.fail(name, "assigned", f"left alone: this router has no {name}")
        _check.assign(name, vector, value)

    def __getstate__(self):
        views = ("_kernel_weight", "_rules", "_calls")
        return {name: value for name, value in vars(self).items() if name not in views}

    def __setstate__(self, state):  # a copy has views of its own arrays
        vars(self).update(state)
        self._make_views()

    def route(self, x: ArrayLike) -> RoutingResult:
        """Route the tokens x (T, H). See RoutingResult, and docs/routing.md for the rules."""
        config = self.config
        x = _check.read_only(_check.floats("x", x, (None, config.input_dim), f"(T, {config.input_dim})"))
        tokens = x.shape[0]
        experts, k = config.num_experts, config.top_k
        probs = np.empty((tokens, experts), _FLOAT32)
        keys = probs if self._rules is None else np.empty((tokens, experts), _FLOAT32)
        indices = np.empty((tokens, k), _INT64)
        weights = np.empty((tokens, k), _FLOAT32)
        used = np.empty(tokens, _INT64)
        counts = np.empty(experts, _INT64)
        threads = threads_for(max(tokens, _TOKENS_PER_READ) * experts * config.input_dim)
        dropped = twin(routing.route, threads)(
            x,
            self._kernel_weight,
            project_address(_FLOAT32, False),
            self._noise(tokens),
            self._rules,
            self._capacity(tokens),
            config.overflow == "next",
            probs,
            keys,
            indices,
            weights,
            used,
            counts,
            np.empty(_scratch_shape(tokens, config.input_dim, threads), _FLOAT32),
        )
        return RoutingResult(indices, weights, probs, counts, dropped, used)

    def _capacity(self, tokens):
        """Rows that an expert takes from T tokens; -1 for no limit."""
        config = self.config
        if config.expert_capacity is not None:
            return config.expert_capacity
        if config.capacity_factor is None:
            return -1
        rows = tokens * config.top_k  # more than 64 bits hold may be asked for
        return max(1, min(_capacity_limit(tokens, config.top_k, config.num_experts, config.capacity_factor), rows))

    #: What the noise of the next call depends on, as text; None without noise.
    noise_state = None

    def skip(self, calls: int) -> None:
        """Go on as if `route` had been called so many times; nothing but noise depends on that."""

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
        bias: ArrayLike | None = None,
        e_score_correction_bias: ArrayLike | None = None,
        init: str = "xavier",
    ):
        rule = "a finite number of at least 0"
        self.noise_std = _check.float32_number("noise_std", noise_std, rule, lambda v: v >= 0)
        self._seed = np.random.SeedSequence(None if seed is None else _check.integer("seed", seed, 0)).entropy
        self._calls = itertools.count()  # next() is atomic: calls from several threads differ
        biases = {"bias": bias, "e_score_correction_bias": e_score_correction_bias}
        super().__init__(config, weight=weight, **biases, seed=0 if seed is None else seed, init=init)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._calls = itertools.count()

    @property
    def noise_state(self) -> str:
        """What the noise of the next call depends on, as text."""
        return f"{self.noise_std} {self._seed} {self._calls!r}"

    def skip(self, calls: int) -> None:
        """Go on as if `route` had been called so many times."""
        for _ in range(calls):
            next(self._calls)

    def _noise(self, tokens):
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, next(self._calls)])))
        noise = generator.standard_normal((tokens, self.config.num_experts), np.float32)
        noise *= np.float32(self.noise_std)
        return _check.read_only(noise)


class SparseMixerRouter(TopKRouter):
    """Router that picks one expert after the other (Phi-3.5-MoE's `sparsemixer` without its noise, for inference).

    The pick is the largest logit that is left. Its weight is its softmax among the logits left whose gap to it,
    divided by the larger of their magnitude and the pick, is at most 2 * jitter_eps. The weights of a
    token do not sum to 1. config: a RouterConfig without limits, other scores, groups and biases.
    routing_probs are the softmax over all experts.
    """

    def __init__(
        self,
        config: RouterConfig,
        jitter_eps: float = 0.01,
        *,
        weight: ArrayLike | None = None,
        seed: int = 0,
        init: str = "xavier",
    ):
        rule = "a finite number above 0"
        self.jitter_eps = _check.float32_number("jitter_eps", jitter_eps, rule, lambda v: v > 0)
        _check.instance("config", config, RouterConfig).check_sparsemixer()
        super().__init__(config, weight=weight, seed=seed, init=init)

    def _make_rules(self):
        none = _check.read_only(_NO_VECTOR)
        return scoring.Rules(
            scoring.SPARSEMIXER, True, False, 0.0, 1.0, 1, 1, False, 0.0, 0.0, self.jitter_eps, none, none
        )


#: Fields of a RouterConfig with which the plain softmax does what the config says.
_WITHOUT_RULES = {
    "scoring": "softmax",
    "score_before_topk": True,
    "norm_topk_prob": True,
    "norm_eps": 0.0,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": None,
    "logit_softcap": None,
    "router_bias": False,
    "selection_bias": False,
}


def _vector(name, value, option, config):
    """A bias (E,) of a router: given or zeros if the config's option says so, else None."""
    if not getattr(config, option):
        if value is not None:
            _check.fail(name, "given", f"left out with {option}=False")
        return None
    if value is None:
        return np.zeros(config.num_experts, np.float32)
    return _check.floats(name, value, (config.num_experts,), "(num_experts,)")
