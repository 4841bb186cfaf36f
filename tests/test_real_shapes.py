"""float32 accuracy at the widths of real models; the number of experts does not matter for it."""

import numpy as np
import pytest

from moe_numba import fused_experts, reference

EXPERTS, TOP_K, TOKENS = 3, 2, 3


@pytest.mark.parametrize(
    ("name", "input_dim", "hidden_dim", "activation"),
    [
        ("olmoe", 2048, 1024, "swiglu"),
        ("qwen3", 2048, 768, "swiglu"),
        ("mixtral", 4096, 14336, "swiglu"),
        ("switch", 768, 3072, "relu"),
    ],
)
def test_result_is_within_2e_6_of_float64(name, input_dim, hidden_dim, activation):
    rng = np.random.default_rng(0)
    rows = 2 * hidden_dim if activation == "swiglu" else hidden_dim
    up = rng.standard_normal((EXPERTS, rows, input_dim), np.float32) * np.float32(0.02)
    down = rng.standard_normal((EXPERTS, input_dim, hidden_dim), np.float32) * np.float32(0.02)
    x = rng.standard_normal((TOKENS, input_dim), np.float32)
    ids = np.array([[0, 1], [2, 1], [1, 0]])
    weights = rng.dirichlet(np.ones(TOP_K), TOKENS).astype(np.float32)

    y = fused_experts(x, up, down, weights, ids, activation)

    used = np.full(TOKENS, TOP_K)
    exact = reference.experts_forward(x, ids, weights, used, activation, up, down)
    assert np.abs(y - exact).max() < 2e-6 * np.abs(exact).max()
