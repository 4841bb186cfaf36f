"""exp, the logistic function and the normal distribution on vectors."""

import numpy as np

from .._jit import inline
from .vector import fma, nan_or, power_of_two, round_even, splat, where_less

_F = np.float32
_LOG2_E = _F(1.44269504)
_LN2_HIGH = _F(0.693359375)  # few bits, so that n * _LN2_HIGH is exact
_LN2_LOW = _F(-2.12194440e-4)
_EXP_MIN = _F(-87.33654)  # exp of less is below the smallest normal float32
_EXP_MAX = _F(88.37626)  # 2**127.5: the scale 2**n stays finite up to here
_INFINITY = _F(np.inf)
_SQRT_HALF = _F(0.70710678)


@inline
def exp(x):
    """e**x within 2 ulp. 0.0 where the result would be denormal, inf above 88.376, NaN for NaN.

    Range reduction x = n ln 2 + r (Cody and Waite), then the Taylor polynomial of degree 7
    on |r| <= ln 2 / 2, whose remainder is 5e-9 of the result.
    """
    low = splat(_EXP_MIN)
    high = splat(_EXP_MAX)
    clamped = where_less(x, high, x, high)
    clamped = where_less(low, clamped, clamped, low)
    n = round_even(clamped * splat(_LOG2_E))
    r = fma(n, splat(-_LN2_HIGH), clamped)
    r = fma(n, splat(-_LN2_LOW), r)
    p = splat(_F(1 / 5040))
    p = fma(p, r, splat(_F(1 / 720)))
    p = fma(p, r, splat(_F(1 / 120)))
    p = fma(p, r, splat(_F(1 / 24)))
    p = fma(p, r, splat(_F(1 / 6)))
    p = fma(p, r, splat(_F(0.5)))
    p = fma(p, r, splat(_F(1.0)))
    p = fma(p, r, splat(_F(1.0)))
    y = p * power_of_two(n)
    y = where_less(x, low, splat(_F(0.0)), y)
    y = where_less(high, x, splat(_INFINITY), y)
    return nan_or(x, y)


@inline
def logistic(x):
    """1 / (1 + e**-x)."""
    one = splat(_F(1.0))
    return one / (one + exp(splat(_F(0.0)) - x))


@inline
def normal_cdf(x):
    """Probability that a standard normal variable is below x, absolute error below 3e-7.

    erfc by the Chebyshev fit of Numerical Recipes (Press et al., section 6.2, erfcc,
    fractional error below 1.2e-7), whose relative error stays below 2e-5 in the tail (x = -13).
    """
    zero = splat(_F(0.0))
    one = splat(_F(1.0))
    z = x * splat(_SQRT_HALF)
    magnitude = where_less(z, zero, zero - z, z)
    t = one / fma(magnitude, splat(_F(0.5)), one)
    p = splat(_F(0.17087277))
    p = fma(p, t, splat(_F(-0.82215223)))
    p = fma(p, t, splat(_F(1.48851587)))
    p = fma(p, t, splat(_F(-1.13520398)))
    p = fma(p, t, splat(_F(0.27886807)))
    p = fma(p, t, splat(_F(-0.18628806)))
    p = fma(p, t, splat(_F(0.09678418)))
    p = fma(p, t, splat(_F(0.37409196)))
    p = fma(p, t, splat(_F(1.00002368)))
    p = fma(p, t, splat(_F(-1.26551223)))
    tail = splat(_F(0.5)) * t * exp(fma(zero - magnitude, magnitude, p))
    return where_less(zero, z, one - tail, tail)
