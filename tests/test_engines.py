"""Which engine computes which weights, and that each computes what the specification says."""

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close, assert_same_bits, experts_reference, guarded_copy, random_array

from moe_numba import _engines, experts, get_num_threads, set_num_threads
from moe_numba._engines import AMX, AMX_TRANSPOSED, VECTORS, VECTORS_BFLOAT16, engine_for
from moe_numba.experts import Experts
from moe_numba.kernels import amx
from moe_numba.kernels.plan import MOST_COLUMNS
from moe_numba.simd.target import has_amx, has_bf16_dot

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def test_scratch_of_the_matrix_unit_holds_the_largest_pieces_of_work():
    assert amx.ROW_BLOCK * max(2 * MOST_COLUMNS, amx.OUTPUT_COLUMNS[1]) <= amx.SCRATCH_SIZE


needs_amx = pytest.mark.skipif(not has_amx(), reason="this processor has no matrix unit (AMX)")


def test_choice():
    assert engine_for(np.dtype(np.float32), False, (64, 32)) is VECTORS
    vectors = VECTORS_BFLOAT16 if has_bf16_dot() else VECTORS
    assert engine_for(np.dtype(np.uint16), False, (65, 33)) is (AMX if has_amx() else vectors)
    assert engine_for(np.dtype(np.uint16), True, (64, 32)) is (AMX_TRANSPOSED if has_amx() else vectors)
    for widths in ((65, 32), (64, 48)):
        assert engine_for(np.dtype(np.uint16), True, widths) is vectors


def test_choice_without_a_matrix_unit(monkeypatch):
    monkeypatch.setattr(_engines, "has_amx", lambda: False)
    vectors = VECTORS_BFLOAT16 if has_bf16_dot() else VECTORS
    for transposed in (False, True):
        assert engine_for.__wrapped__(np.dtype(np.uint16), transposed, (64, 32)) is vectors


def _experts(
    rng, activation, input_dim, hidden_dim, num_experts=5, bias=False, interleaved=False, transposed=False, **options
):
    """bfloat16 experts at the end of readable memory."""
    rows = hidden_dim * (2 if activation == "swiglu" else 1)
    weights = ((num_experts, rows, input_dim), (num_experts, input_dim, hidden_dim))
    arrays = [(random_array(rng, *s) / np.sqrt(s[-1])).astype(BFLOAT16).view(np.uint16) for s in weights]
    arrays = [guarded_copy(np.ascontiguousarray(a.swapaxes(1, 2)) if transposed else a) for a in arrays]
    if bias:
        arrays += [guarded_copy(random_array(rng, num_experts, n)) for n in (rows, input_dim)]
    layout = {"interleaved": interleaved, "transposed": transposed}
    return Experts(activation, *arrays, dtype="bfloat16", **layout, **options)


def _routed(rng, experts, tokens, top_k=2):
    x = random_array(rng, tokens, experts.input_dim)
    indices = np.ascontiguousarray(rng.random((tokens, len(experts))).argsort(axis=1)[:, :top_k])
    return x, indices, random_array(rng, tokens, top_k), np.full(tokens, top_k)


FORMS = {
    "swiglu": {"activation": "swiglu"},
    "swiglu, bias": {"activation": "swiglu", "bias": True},
    "swiglu, interleaved": {"activation": "swiglu", "bias": True, "interleaved": True},
    "relu": {"activation": "relu"},
    "gelu, bias": {"activation": "gelu", "bias": True},
}


@needs_amx
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(64, 32), (1, 1), (21, 11), (33, 50), (47, 16), (801, 90), (1100, 65)], ids=str)
def test_amx_computes_what_the_specification_says(rng, shape, form):
    """Few and many rows per expert, edges on every side of a tile, in a block of K and across blocks."""
    experts = _experts(rng, input_dim=shape[0], hidden_dim=shape[1], **FORMS[form])
    assert experts.engine is AMX
    _assert_computes_what_the_specification_says(rng, experts)


GPT_OSS = {**FORMS["swiglu, interleaved"], "swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}


@needs_amx
@pytest.mark.parametrize("form", FORMS | {"gpt-oss": GPT_OSS})
@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (96, 160), (800, 96), (1120, 64)], ids=str)
def test_amx_with_transposed_weights(rng, shape, form):
    """Few and many rows per expert, the last tile of columns whole and half, one and several blocks of K."""
    options = (FORMS | {"gpt-oss": GPT_OSS})[form]
    experts = _experts(rng, input_dim=shape[0], hidden_dim=shape[1], transposed=True, **options)
    assert experts.engine is AMX_TRANSPOSED
    _assert_computes_what_the_specification_says(rng, experts)


def _assert_computes_what_the_specification_says(rng, experts):
    for tokens in (1, 6, 37, 90, 200):
        x, *routing = _routed(rng, experts, tokens)
        y = experts.forward(x, *routing)
        assert_close(y, experts_reference(experts, x.astype(BFLOAT16).astype(np.float64), *routing), 2**-8)
        for t in rng.choice(tokens, min(tokens, 5), replace=False):
            one = [np.ascontiguousarray(array[t : t + 1]) for array in (x, *routing)]
            assert_same_bits(experts.forward(*one)[0], y[t])


@needs_amx
@pytest.mark.parametrize("transposed", [False, True])
def test_amx_rounds_as_the_vectors_do(rng, monkeypatch, transposed):
    """Sums apart, both engines compute the same: operands are rounded alike, denormals and NaN included."""
    experts = _experts(rng, "relu", 64, 64, transposed=transposed)
    x, *routing = _routed(rng, experts, 50)
    x[7] = np.nan
    x[8, 3] = np.inf
    y = experts.forward(x, *routing)
    assert np.isnan(y[7]).all()
    assert not np.isfinite(y[8]).all()
    monkeypatch.setattr(experts, "engine", VECTORS_BFLOAT16)
    finite = np.delete(np.arange(50), [7, 8])
    assert_close(y[finite], experts.forward(x, *routing)[finite], 2**-14)


@needs_amx
@pytest.mark.parametrize("tokens", [1, 40, 700])
@pytest.mark.parametrize("transposed", [False, True])
def test_amx_does_not_depend_on_the_threads(rng, always_parallel, tokens, transposed):
    experts = _experts(rng, "swiglu", 96, 544, num_experts=3, transposed=transposed)
    x, *routing = _routed(rng, experts, tokens)
    y = experts.forward(x, *routing)
    for threads in range(1, get_num_threads() + 1):
        set_num_threads(threads)
        assert_same_bits(experts.forward(x, *routing), y)


@needs_amx
@pytest.mark.parametrize("transposed", [False, True])
def test_amx_blocks_of_one_expert(rng, monkeypatch, transposed):
    """More rows than a block holds, all of one expert."""
    monkeypatch.setattr(experts, "chunk_tokens", lambda *_: 10**6)
    one = _experts(rng, "swiglu", 96, 64, num_experts=1, transposed=transposed)
    x, *routing = _routed(rng, one, 2 * amx.ROW_BLOCK + 3, top_k=1)
    y = one.forward(x, *routing)
    assert_close(y, experts_reference(one, x.astype(BFLOAT16).astype(np.float64), *routing), 2**-8)


@needs_amx
def test_amx_of_few_tokens_with_many_rows(rng):
    """A token may go to one expert several times: wide pieces of work, as few tokens have, with many rows."""
    one = _experts(rng, "swiglu", 544, 64, num_experts=1)
    x, indices, _, used = _routed(rng, one, 64, top_k=1)
    routing = np.repeat(indices, 8, axis=1), random_array(rng, 64, 8), used * 8
    set_num_threads(1)
    y = one.forward(x, *routing)
    assert_close(y, experts_reference(one, x.astype(BFLOAT16).astype(np.float64), *routing), 2**-8)
