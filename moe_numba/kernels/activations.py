"""Activation functions on vectors, chosen by a number so that they share one compiled kernel.

To add one: write its formula below, give it a code and a branch in `activate`;
docs/adding-an-activation.md walks through the rest.
"""

import numpy as np

from .._jit import inline
from ..simd.math import logistic, normal_cdf
from ..simd.vector import splat, where_less

IDENTITY, RELU, RELU2, SILU, GELU, GELU_TANH, CLAMPED_SILU = range(7)


#: The code of each function that `config.ACTIVATIONS` names.
CODES = {"identity": IDENTITY, "relu": RELU, "relu2": RELU2, "silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}

_SQRT_8_OVER_PI = np.float32(1.5957691216057308)  # 2 sqrt(2 / pi)
_GELU_CUBIC = np.float32(0.044715)


@inline
def relu(x):
    """max(x, 0); NaN stays NaN."""
    zero = splat(np.float32(0.0))
    return where_less(x, zero, zero, x)


@inline
def silu(x):
    """x * logistic(x) (Elfwing et al. 2017, eq. 2; also called swish)."""
    return x * logistic(x)


@inline
def gelu(x):
    """x * Phi(x), Phi the normal distribution (Hendrycks and Gimpel 2016, section 2)."""
    return x * normal_cdf(x)


@inline
def gelu_tanh(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016, section 2).

    Written with (1 + tanh(u)) / 2 = logistic(2 u).
    """
    return x * logistic(splat(_SQRT_8_OVER_PI) * (x + splat(_GELU_CUBIC) * x * x * x))


@inline
def clamped_silu(gate, up, limit, alpha, beta):
    """g * logistic(alpha * g) * (u + beta) with g = min(gate, limit) and u = up within +- limit (gpt-oss)."""
    limit = splat(limit)
    gate = where_less(limit, gate, limit, gate)
    up = where_less(limit, up, limit, up)
    lowest = splat(np.float32(0.0)) - limit
    up = where_less(up, lowest, lowest, up)
    return gate * logistic(splat(alpha) * gate) * (up + splat(beta))


@inline
def gated(code, gate, up, limit, alpha, beta):
    """What the gate lets through: the activation of `gate`, times `up`."""
    if code == CLAMPED_SILU:
        return clamped_silu(gate, up, limit, alpha, beta)
    return activate(code, gate) * up


@inline
def activate(code, x):
    """The activation function `code` of every lane."""
    if code == RELU:
        return relu(x)
    if code == RELU2:  # Primer, So et al. 2021, section 4.2
        y = relu(x)
        return y * y
    if code == SILU:
        return silu(x)
    if code == GELU:
        return gelu(x)
    if code == GELU_TANH:
        return gelu_tanh(x)
    return x
