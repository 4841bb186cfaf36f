"""A token's result does not depend on its batch, its place in it, or the number of threads."""

import numpy as np
import pytest
from helpers import assert_same_bits, random_layer

from moe_numba import get_num_threads, set_num_threads
from moe_numba.config import DTYPES

#: (H, F): rows of a few cache lines and odd lengths; rows long enough to be streams
#: (kernels/projection.py) in both formats; rows of several blocks of K.
SHAPES = [(33, 50), (801, 800), (2500, 70)]


def layer_of(shape, dtype):
    input_dim, hidden_dim = shape
    options = {"num_experts": 6, "top_k": 2, "capacity_factor": None, "activation": "swiglu"}
    return random_layer(**options, input_dim=input_dim, hidden_dim=hidden_dim).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 12, 64, 129, 700, 2000])
def test_a_token_does_not_depend_on_its_batch(rng, dtype, shape, tokens):
    layer = layer_of(shape, dtype)
    x = rng.standard_normal((tokens, shape[0]), np.float32)
    y, _ = layer(x)
    assert_same_bits(layer(x)[0], y)
    order = rng.permutation(tokens)
    assert_same_bits(layer(x[order])[0], y[order])
    part = np.sort(rng.choice(tokens, max(1, tokens // 3), replace=False))
    assert_same_bits(layer(x[part])[0], y[part])
    for i in rng.choice(tokens, min(tokens, 30), replace=False):
        assert_same_bits(layer(x[i : i + 1])[0][0], y[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_a_token_does_not_depend_on_the_threads(rng, always_parallel, dtype, tokens):
    layer = layer_of((801, 90), dtype)
    x = rng.standard_normal((tokens, 801), np.float32)
    y, _ = layer(x)
    for threads in range(1, get_num_threads() + 1):
        set_num_threads(threads)
        assert_same_bits(layer(x)[0], y)
