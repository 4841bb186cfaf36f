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


def select(probs, top_k, capacity=None, overflow="next"):
    """Steps 4 and 5 of the routing rules: who goes where, given probabilities (T, E)."""
    probs = np.asarray(probs)
    num_tokens, num_experts = probs.shape
    indices = np.zeros((num_tokens, top_k), np.int64)
    weights = np.zeros((num_tokens, top_k))
    used = np.zeros(num_tokens, np.int64)
    counts = np.zeros(num_experts, np.int64)

    for t in range(num_tokens):
        ranking = np.argsort(-probs[t], kind="stable")  # ties to the lower index; NaN keeps index order
        if capacity is not None and np.isnan(probs[t]).any():
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
            p = probs[t, chosen].astype(np.float64)
            weights[t, :n] = p / p.sum() if p.sum() != 0 else 1 / n

    return indices, weights, counts, used


def route(x, gate_weight, top_k, capacity_factor, overflow="next", noise=0.0):
    """x (T, H), gate_weight (H, E) -> Routing."""
    logits = np.float64(x) @ np.float64(gate_weight) + noise
    probs = softmax_rows(logits) if len(logits) else logits
    capacity = None
    if capacity_factor is not None:
        capacity = capacity_limit(len(x), top_k, probs.shape[1], capacity_factor)
    indices, weights, counts, used = select(probs, top_k, capacity, overflow)
    dropped = 0 if capacity is None else int((used == 0).sum())
    return Routing(indices, weights, probs, counts, dropped, used)


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
