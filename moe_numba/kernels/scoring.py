"""What one token's logits become: scores, keys by which experts are chosen, weights of the chosen.

Without Rules, scores and keys are one softmax and weights are scores that sum to 1. Kernels are
compiled for each of the two: plain routing carries none of the rest.
"""

from typing import NamedTuple

import numpy as np

from .._jit import helper, inline
from ..simd.math import exp, logistic
from ..simd.target import LANES
from ..simd.vector import load, load_or, max_lanes, pointer, splat, store, sum_lanes, where_less

SOFTMAX, SIGMOID, SQRTSOFTPLUS, SPARSEMIXER = range(4)

#: The code of each scoring in `config.SCORINGS`.
CODES = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "sqrtsoftplus": SQRTSOFTPLUS}


class Rules(NamedTuple):
    """How a router scores and chooses; the fields of RouterConfig as kernels take them."""

    scoring: int  #: a code
    before: bool  #: experts are chosen by scores, not by logits
    norm: bool  #: weights are divided by their sum and `eps`
    eps: float
    scale: float  #: factor of the weights
    groups: int  #: groups of neighbouring experts
    kept_groups: int
    top2: bool  #: a group's score is the sum of its best two keys, not the best
    masked: float  #: key of the experts of other groups
    softcap: float  #: 0: none
    jitter: float  #: of SPARSEMIXER
    bias: np.ndarray  #: (E,) float32 added to the logits, or (0,)
    selection_bias: np.ndarray  #: (E,) float32 added to the keys, or (0,)


@inline
def softmax(row, at, n):
    """Replace row[at : at + n] by its softmax. All NaN if a value is NaN or +inf, or all are -inf."""
    high = splat(np.float32(-np.inf))
    for i in range(0, n, LANES):
        x = load_or(row, at + i, min(LANES, n - i), high)
        high = where_less(high, x, x, high)
    high = splat(max_lanes(high))
    total = splat(np.float32(0.0))
    for i in range(0, n, LANES):
        size = min(LANES, n - i)
        e = exp(load(row, at + i, size) - high)
        store(e, row, at + i, size)
        total = total + load(row, at + i, size)
    total = splat(sum_lanes(total))
    for i in range(0, n, LANES):
        size = min(LANES, n - i)
        store(load(row, at + i, size) / total, row, at + i, size)


@inline
def normalise(weights, t, n, eps):
    """Divide weights[t, :n] by their sum + eps; equal shares if that is 0."""
    total = np.float32(eps)
    for j in range(n):
        total += weights[t, j]
    for j in range(n):
        weights[t, j] = weights[t, j] / total if total != 0.0 else np.float32(1.0) / np.float32(n)


@helper
def score(rules, logits, keys, t):
    """Replace logits[t] by scores and write keys[t]. All NaN if a logit is NaN or infinite."""
    experts = logits.shape[1]
    cap = np.float32(rules.softcap)
    nan = False
    for e in range(experts):
        x = logits[t, e]
        nan = nan or not np.isfinite(x)  # a cap or a sigmoid would make a number of an infinity
        if rules.bias.shape[0] > 0:
            x += rules.bias[e]
        if cap > 0.0:
            x = cap * np.tanh(x / cap)
        nan = nan or np.isnan(x)
        logits[t, e] = x
        keys[t, e] = x
    if nan:
        logits[t, :] = np.nan
        keys[t, :] = np.nan
        return
    _scores(rules.scoring, logits, t)
    for e in range(experts):
        if rules.before:
            keys[t, e] = logits[t, e]
        if rules.selection_bias.shape[0] > 0:
            keys[t, e] += rules.selection_bias[e]
    if rules.groups > rules.kept_groups:
        _mask_groups(rules, keys, t)


@helper
def _scores(scoring, x, t):
    """Replace logits x[t] by scores."""
    experts = x.shape[1]
    row = pointer(x, t * experts)
    if scoring == SIGMOID:
        for i in range(0, experts, LANES):
            n = min(LANES, experts - i)
            store(logistic(load(row, i, n)), row, i, n)
    elif scoring == SQRTSOFTPLUS:  # DeepSeek-V4's router; softplus(x) = max(x, 0) + log1p(exp(-abs(x)))
        for e in range(experts):
            x[t, e] = np.sqrt(max(x[t, e], np.float32(0.0)) + np.log1p(np.exp(-abs(x[t, e]))))
    else:
        softmax(row, 0, experts)


@helper
def _mask_groups(rules, keys, t):
    """Give the experts of all but the best groups the key `masked` (DeepSeek-V2, section 2.1.2; V3, section 2.1.2)."""
    size = keys.shape[1] // rules.groups
    kept = 0  # bit g: group g is among the best
    for g in range(rules.groups):
        mine = _group_score(rules, keys, t, g, size)
        better = 0
        for other in range(rules.groups):
            theirs = _group_score(rules, keys, t, other, size)
            if theirs > mine or (theirs == mine and other < g):
                better += 1
        if better < rules.kept_groups:
            kept |= 1 << g
    for g in range(rules.groups):
        if kept >> g & 1 == 0:
            keys[t, g * size : (g + 1) * size] = rules.masked


@inline
def _group_score(rules, keys, t, group, size):
    first = second = np.float32(-np.inf)
    for e in range(group * size, (group + 1) * size):
        key = keys[t, e]
        if key > first:
            first, second = key, first
        elif key > second:
            second = key
    return first + second if rules.top2 else first


@helper
def weigh(rules, scores, keys, t, n, indices, weights):
    """weights[t, :n] of the chosen indices[t, :n]."""
    if rules.scoring == SOFTMAX and not rules.before:  # of the chosen logits alone
        if rules.selection_bias.shape[0] > 0:  # keys are logits and a bias, which may be large, or -inf
            for j in range(n):
                weights[t, j] = scores[t, indices[t, j]]
        else:
            high = np.float32(-np.inf)
            for j in range(n):
                high = max(high, keys[t, indices[t, j]])
            for j in range(n):
                weights[t, j] = np.exp(keys[t, indices[t, j]] - high)
        normalise(weights, t, n, 0.0)
    else:
        for j in range(n):
            weights[t, j] = scores[t, indices[t, j]]
        if rules.norm:
            normalise(weights, t, n, rules.eps)
    for j in range(n):
        weights[t, j] *= np.float32(rules.scale)


@helper
def sparsemixer(jitter, logits, t, k, indices, weights):
    """k picks one after the other (Phi-3.5-MoE's sparsemixer, without noise); logits[t] become a softmax.

    Each pick is the best that is left; its weight is its share among those left whose gap to it,
    relative to the larger of their magnitude and the pick, is at most 2 * jitter.
    """
    experts = logits.shape[1]
    for j in range(k):
        pick = -1
        for e in range(experts):
            if not _is_among(indices, t, j, e) and (pick < 0 or logits[t, e] > logits[t, pick]):
                pick = e
        high = logits[t, pick]
        total = np.float32(0.0)
        for e in range(experts):
            x = logits[t, e]
            far = (high - x) / max(abs(x), high) > np.float32(2 * jitter)
            if not far and not _is_among(indices, t, j, e):
                total += np.exp(x - high)
        indices[t, j] = pick
        weights[t, j] = np.float32(1.0) / total
    softmax(pointer(logits, t * experts), 0, experts)


@inline
def _is_among(indices, t, n, e):
    for j in range(n):  # noqa: SIM110 - kernels have no `any`
        if indices[t, j] == e:
            return True
    return False
