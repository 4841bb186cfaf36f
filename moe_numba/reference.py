"""The specification: the whole layer as plain NumPy loops in float64.

Slow on purpose, readable in one sitting, and what every kernel is tested against. Shapes: T
tokens, H input_dim, F hidden_dim, E experts, K top_k.
"""

import math
from typing import NamedTuple

import numpy as np

from .config import ACTIVATIONS

# ---- activations ----


def sigmoid(x):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x)


FUNCTIONS = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}

# ---- routing ----


class Routing(NamedTuple):
    """What `route` returns; the fields of RoutingResult."""

    expert_indices: np.ndarray
    expert_weights: np.ndarray
    routing_probs: np.ndarray
    expert_counts: np.ndarray
    num_dropped: int
    slots_used: np.ndarray


def softmax_rows(logits):
    logits = np.asarray(logits, np.float64)
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def capacity_limit(num_tokens, top_k, num_experts, capacity_factor):
    if capacity_factor is None:
        return max(1, num_tokens * top_k)
    raw = np.float32(capacity_factor) * np.float32(num_tokens * top_k) / np.float32(num_experts)
    return max(1, math.ceil(raw))


def select(scores, top_k, capacity=None, overflow="next", keys=None, weigh=None):
    """Steps 4 and 5 of the routing rules: who goes where, given scores (T, E).

    Experts are chosen by keys (T, E), the scores if left out; weigh(t, chosen) gives their weights,
    scores that sum to 1 if left out.
    """
    scores = np.asarray(scores)
    keys = scores if keys is None else keys
    num_tokens, num_experts = scores.shape
    indices = np.zeros((num_tokens, top_k), np.int64)
    weights = np.zeros((num_tokens, top_k))
    used = np.zeros(num_tokens, np.int64)
    counts = np.zeros(num_experts, np.int64)

    def shares(t, chosen):
        p = scores[t, chosen].astype(np.float64)
        return p / p.sum() if p.sum() != 0 else 1 / len(chosen)

    for t in range(num_tokens):
        ranking = np.argsort(-keys[t], kind="stable")  # ties to the lower index; NaN keeps index order
        if capacity is not None and np.isnan(scores[t]).any():
            chosen = []  # takes no room from the others
            weights[t] = np.nan
        else:
            candidates = ranking if overflow == "next" else ranking[:top_k]
            has_room = [e for e in candidates if capacity is None or counts[e] < capacity]
            chosen = has_room[:top_k]

        n = len(chosen)
        used[t] = n
        indices[t] = chosen[-1] if chosen else ranking[0]
        indices[t, :n] = chosen
        counts[chosen] += 1
        if chosen:
            weights[t, :n] = (weigh or shares)(t, chosen)

    return indices, weights, counts, used


def route(x, gate_weight, top_k, capacity_factor, overflow="next", noise=0.0):
    """x (T, H), gate_weight (H, E) -> Routing."""
    logits = np.float64(x) @ np.float64(gate_weight) + noise
    probs = softmax_rows(logits) if len(logits) else logits
    capacity = None
    if capacity_factor is not None:
        capacity = capacity_limit(len(x), top_k, probs.shape[1], capacity_factor)
    return _routing(probs, capacity, *select(probs, top_k, capacity, overflow))


def _routing(probs, capacity, indices, weights, counts, used):
    dropped = 0 if capacity is None else int((used == 0).sum())
    return Routing(indices, weights, probs, counts, dropped, used)


SCORINGS = {
    "softmax": softmax_rows,
    "sigmoid": sigmoid,
    "sqrtsoftplus": lambda x: np.sqrt(np.logaddexp(0, x)),
}


def mask_groups(keys, n_group, topk_group, group_score, group_mask):
    """Keys (T, E) of which only those of the best groups are left (DeepSeek-V2 and V3, section 2.1.2)."""
    groups = keys.reshape(len(keys), n_group, keys.shape[1] // n_group)
    best = np.sort(groups, axis=2)[:, :, ::-1]
    score = best[:, :, 0] + best[:, :, 1] if group_score == "top2_sum" else best[:, :, 0]
    chosen = np.argsort(-score, axis=1, kind="stable")[:, :topk_group]
    left = np.zeros(score.shape, bool)
    np.put_along_axis(left, chosen, True, axis=1)
    masked = 0.0 if group_mask == "zero" else -np.inf
    return np.where(left[:, :, None], groups, masked).reshape(keys.shape)


def route_logits(logits, config, bias=0.0, selection_bias=0.0):
    """logits (T, E) -> Routing, as a RouterConfig says. docs/routing.md states it in words."""
    with np.errstate(over="ignore"):
        infinite = ~np.isfinite(np.float32(logits)).all(axis=1)
    logits = np.float64(logits) + bias
    logits[infinite] = np.nan
    if config.logit_softcap is not None:
        logits = config.logit_softcap * np.tanh(logits / config.logit_softcap)
    logits[np.isnan(logits).any(axis=1)] = np.nan
    scores = SCORINGS[config.scoring](logits)
    keys = (scores if config.score_before_topk else logits) + selection_bias
    if config.n_group > 1 and config.topk_group is not None:
        keys = mask_groups(keys, config.n_group, config.topk_group, config.group_score, config.group_mask)

    def weigh(t, chosen):
        w = scores[t, chosen]
        if config.scoring == "softmax" and not config.score_before_topk:
            w = softmax_rows(logits[t : t + 1, chosen])[0]
        elif config.norm_topk_prob:
            w = w / (w.sum() + config.norm_eps) if w.sum() + config.norm_eps != 0 else np.full(len(w), 1 / len(w))
        return w * config.routed_scaling_factor

    capacity = config.expert_capacity
    if config.capacity_factor is not None:
        capacity = capacity_limit(len(logits), config.top_k, logits.shape[1], config.capacity_factor)
    return _routing(scores, capacity, *select(scores, config.top_k, capacity, config.overflow, keys, weigh))


def sparsemixer(logits, top_k, jitter_eps):
    """(indices, weights) of Phi-3.5-MoE's router: one pick after the other, each weighted among those near it."""
    logits = np.float64(logits)
    indices = np.zeros((len(logits), top_k), np.int64)
    weights = np.zeros((len(logits), top_k))
    for t, row in enumerate(logits):
        left = row.copy()
        for k in range(top_k):
            pick = int(left.argmax())
            high = left[pick]
            with np.errstate(divide="ignore", invalid="ignore"):
                near = ~((high - row) / np.maximum(np.abs(row), high) > 2 * jitter_eps) & (left > -np.inf)
            indices[t, k] = pick
            weights[t, k] = 1 / np.exp(left[near] - high).sum()
            left[pick] = -np.inf
    return indices, weights


# ---- experts ----


def clamped_swiglu(gate, up, limit=None, alpha=1.0, beta=0.0):
    """gpt-oss and DeepSeek-V4: both clamped to `limit` before the activation, the gate from above only."""
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * sigmoid(alpha * gate) * (up + beta)


def expert(x, activation, up, down, up_bias=None, down_bias=None, **swiglu):
    """One expert for one token x (H,). up (F, H), or (2F, H) gate rows first; down (H, F).

    swiglu: limit, alpha and beta of `clamped_swiglu`, with activation="swiglu".
    """
    function, gated = ACTIVATIONS[activation]
    act = FUNCTIONS[function]
    first = np.float64(up) @ np.float64(x)
    if up_bias is not None:
        first = first + up_bias
    if gated:
        gate, value = np.split(first, 2)
        hidden = clamped_swiglu(gate, value, **swiglu) if swiglu else act(gate) * value
    else:
        hidden = act(first)
    y = np.float64(down) @ hidden
    return y if down_bias is None else y + down_bias


def experts_forward(x, indices, weights, used, activation, up, down, up_bias=None, down_bias=None, **swiglu):
    """y[t] = sum over the used slots k of weights[t, k] * expert[indices[t, k]](x[t]); other indices add nothing."""
    y = np.zeros(np.shape(x))
    for t in range(len(x)):
        if used[t] == 0:
            y[t] = weights[t, 0]  # 0 for a dropped token, NaN for one without probabilities
        for k in range(used[t]):
            e = indices[t, k]
            if 0 <= e < len(up):
                biases = (None if b is None else b[e] for b in (up_bias, down_bias))
                y[t] += weights[t, k] * expert(x[t], activation, up[e], down[e], *biases, **swiglu)
    return y


# ---- losses ----


def balance_loss(routing):
    num_tokens, num_experts = routing.routing_probs.shape
    rows = routing.expert_counts.sum()
    if num_tokens == 0 or rows == 0:
        return 0.0
    f = routing.expert_counts / rows
    p = routing.routing_probs.mean(axis=0)
    return float(num_experts * (f * p).sum())


def z_loss(logits):
    return float(np.mean([np.log(np.exp(row).sum()) ** 2 for row in np.float64(logits)]))
