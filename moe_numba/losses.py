"""Auxiliary losses that keep routers balanced and their logits small."""

import numpy as np
from numpy.typing import ArrayLike

from . import _check
from .router import RoutingResult


def expert_load_fractions(probs: ArrayLike) -> np.ndarray:
    """Mean routing probability of each expert: (T, E) -> (E,) float32, zeros for T = 0."""
    probs = _check.floats("probs", probs, (None, None), "(T, E)")
    if probs.shape[0] == 0:
        return np.zeros(probs.shape[1], np.float32)
    return probs.mean(axis=0, dtype=np.float64).astype(np.float32)


def balance_loss(routing: RoutingResult) -> float:
    """Load-balancing loss E * sum_i f_i P_i (Fedus et al. 2021, Switch Transformers, eq. 4 without alpha).

    f_i is the fraction of dispatched rows at expert i, P_i the mean of routing_probs[:, i].
    1.0 when balanced, 0.0 for an empty batch. routing: RoutingResult.
    """
    try:
        counts, probs = np.asarray(routing.expert_counts), np.asarray(routing.routing_probs)
    except AttributeError:  # of anything that has them, such as reference.Routing, they will do
        _check.fail("routing", f"{routing!r:.80}", "a RoutingResult")
    return balance_of(counts, probs.mean(axis=0, dtype=np.float64)) if len(probs) else 0.0


def balance_of(counts, mean_probs) -> float:
    """`balance_loss` from the rows (E,) of each expert and its mean probability (E,); 0.0 without rows."""
    rows = counts.sum()
    return float(len(counts) * (counts / rows @ mean_probs)) if rows else 0.0


def z_loss(logits: ArrayLike) -> float:
    """Router z-loss mean(logsumexp(logits)**2) (Zoph et al. 2022, ST-MoE, eq. 5); 0.0 for an empty batch.

    logits: (T, E).
    """
    logits = _check.floats("logits", logits, (None, None), "(T, E)").astype(np.float64)
    if logits.size == 0:
        return 0.0
    high = logits.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # inf - inf: the loss is NaN
        total = np.log(np.exp(logits - high).sum(axis=1)) + high[:, 0]
    return float(np.mean(total**2))
