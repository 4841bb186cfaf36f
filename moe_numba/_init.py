"""First weights of a layer that is not loaded from anywhere."""

import numpy as np

from . import _check
from ._aligned import aligned_empty

INITS = ("xavier", "sine")


def _xavier(shape, fan_in, fan_out, generator):
    """Normal with variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010, eq. 16)."""
    weight = aligned_empty(shape)
    generator.standard_normal(out=weight, dtype=np.float32)
    weight *= np.float32(np.sqrt(2 / (fan_in + fan_out)))
    return weight


def _sine(inputs, outputs, frequency, fan_sum):
    """entrenar's start, transposed to (outputs, inputs): sin((i * outputs + j) * frequency), scaled."""
    weight = np.sin(np.arange(inputs * outputs) * frequency) * np.sqrt(2 / fan_sum)
    return weight.reshape(inputs, outputs).T.astype(np.float32)


def router_weight(shape, seed, init):
    """(E, H) router weight."""
    _check.choice("init", init, INITS)
    experts, input_dim = shape
    if init == "sine":
        return np.ascontiguousarray(_sine(input_dim, experts, 0.4567, input_dim + experts))
    return _xavier(shape, input_dim, experts, _generator(seed, stream=0))


def expert_weights(experts, input_dim, hidden_dim, gated, seed, init):
    """(E, F or 2F, H) first and (E, H, F) second projections."""
    _check.choice("init", init, INITS)
    fan_sum = input_dim + hidden_dim
    if init == "sine":
        first = _sine(input_dim, hidden_dim, 0.3141, fan_sum)
        first = np.concatenate([first, first]) if gated else first
        second = _sine(hidden_dim, input_dim, 0.2718, fan_sum)
        return tuple(np.ascontiguousarray(np.broadcast_to(w, (experts, *w.shape))) for w in (first, second))
    generator = _generator(seed, stream=1)
    rows = 2 * hidden_dim if gated else hidden_dim
    up = _xavier((experts, rows, input_dim), input_dim, hidden_dim, generator)
    return up, _xavier((experts, input_dim, hidden_dim), hidden_dim, input_dim, generator)


def _generator(seed, stream):
    """One generator for the router's weight and another for the experts', from one seed."""
    return np.random.default_rng([_check.integer("seed", seed, 0), stream])
