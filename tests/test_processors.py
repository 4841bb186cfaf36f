"""Every instruction set: Numba compiles for another processor, in a process of its own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import run_python

from moe_numba.simd.target import LANES, has_bf16_dot

pytestmark = pytest.mark.jit

_CODE = """
import ml_dtypes
import numpy as np
from moe_numba import MoeConfig, MoeLayer, reference
from moe_numba.experts import Experts
from moe_numba.simd.target import LANES, has_bf16_dot

def check(dtype, error, input_dim, hidden_dim, transposed=False):
    config = MoeConfig(5, 2, None, input_dim=input_dim, hidden_dim=hidden_dim, activation="geglu", bias=False)
    layer = MoeLayer(config).astype(dtype)
    if transposed:
        up, down = (w.swapaxes(1, 2).copy() for w in (layer.experts.up, layer.experts.down))
        layer.experts = Experts("geglu", up, down, dtype=dtype, transposed=True)
    x = np.random.default_rng(0).standard_normal((19, input_dim), np.float32)
    y, r = layer(x)
    up = np.concatenate(layer.experts.projections, axis=1)
    weights = (np.float32(w) for w in (up, layer.experts.down_projection))
    tokens = x if dtype == "float32" else np.float32(x.astype(ml_dtypes.bfloat16))
    expected = reference.experts_forward(tokens, r.expert_indices, r.expert_weights, r.slots_used, "geglu", *weights)
    assert np.abs(y - expected).max() < error * np.abs(expected).max(), (dtype, input_dim)
    for i in range(19):
        assert layer(x[i : i + 1])[0][0].tobytes() == y[i].tobytes(), (dtype, input_dim, i)

for dtype, error in (("float32", 2e-5), ("bfloat16", 2**-8)):
    check(dtype, error, 21, 11)
    check(dtype, error, 75, 31, transposed=True)
    check(dtype, error, 801, 9)  # long enough for weight rows to be streams
    check(dtype, error, 832, 9)  # and of whole cache lines
print(LANES, has_bf16_dot())
"""

PROCESSORS = {
    "nehalem": "4 False",  # SSE 4.2
    "haswell": "8 False",  # AVX2 and FMA
    "skylake-avx512": "16 False",
    "cooperlake": "16 True",  # AVX512-BF16, and no AMX
}


def _runs_here(processor):
    lanes, dot = PROCESSORS[processor].split()
    return int(lanes) <= LANES and (dot == "False" or has_bf16_dot())


@pytest.fixture(scope="module")
def processes():
    """A process for each processor whose instructions this one has, two at a time: nearly all of it is compilation."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            processor: pool.submit(run_python, _CODE, NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES="")
            for processor in filter(_runs_here, PROCESSORS)
        }


@pytest.mark.parametrize("processor", PROCESSORS)
def test_layer_on_another_processor(processor, processes):
    if not _runs_here(processor):
        pytest.skip("this processor lacks its instructions")
    printed, _ = processes[processor].result()
    assert printed.strip() == PROCESSORS[processor]
