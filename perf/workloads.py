"""What is measured: layers of the shapes of real models, and the tokens sent through them.

T tokens, H input_dim, F hidden_dim, E num_experts, K top_k.
"""

import math

import numpy as np
from numba import njit

from moe_numba import MoeConfig, MoeLayer, TopKRouter
from moe_numba._aligned import aligned_empty
from moe_numba._engines import VECTORS, Sizes
from moe_numba.kernels.plan import plan_rows
from moe_numba.kernels.projection import ROW_BLOCK
from moe_numba.simd.target import GROUP_ROWS


def _swiglu(input_dim, hidden_dim, num_experts, top_k):
    return MoeConfig(num_experts, top_k, None, 0.0, input_dim, hidden_dim, activation="swiglu", bias=False)


def _relu(input_dim, hidden_dim, num_experts, top_k):
    return MoeConfig(num_experts, top_k, None, 0.0, input_dim, hidden_dim, activation="relu", bias=True)


def _gpt_oss(input_dim, hidden_dim, num_experts, top_k):
    form = {"activation": "swiglu", "swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}
    layout = {"transposed": True, "interleaved": True, "bias": True}
    return MoeConfig(num_experts, top_k, None, 0.0, input_dim, hidden_dim, **form, **layout)


#: Config by name; all dropless. In float32 the weights take: olmoe 1.6 GB, qwen3 2.4 GB,
#: mixtral 5.6 GB, gpt-oss 3.2 GB, switch 151 MB, seed 0.5 MB.
WORKLOADS = {
    "olmoe": _swiglu(2048, 1024, 64, 8),
    "qwen3": _swiglu(2048, 768, 128, 8),
    "mixtral": _swiglu(4096, 14336, 8, 2),
    "gpt-oss": _gpt_oss(2880, 2880, 32, 4),  # the 20b model's
    "switch": _relu(768, 3072, 8, 1),
    "seed": _relu(64, 128, 8, 2),
}

#: T of the batches: one token (decoding), a few users at once, a prompt.
TOKENS = (1, 16, 512)

#: What is timed: `layer` is `router`, then `experts`; `plan` is the part of `experts` before the products.
STEPS = ("router", "plan", "experts", "layer")

WEIGHT_STD = 0.02  # the usual start of language models


def prepare(name, tokens, step):
    """The function to time and a list of argument tuples for it, all built but not yet called.

    Only what the step needs is built: the experts' weights are gigabytes, the router's are not.
    """
    config = WORKLOADS[name]
    router = TopKRouter(config.router_config(), weight=_router_weight(config))
    inputs = make_inputs(router, tokens)
    if step == "router":
        return router.route, [(x,) for x in inputs]
    routed = [(x, router.route(x)) for x in inputs]
    if step == "plan":
        sizes = Sizes(tokens, tokens * config.top_k, config.num_experts, config.input_dim, config.hidden_dim, 1)
        size = VECTORS.shapes(sizes)[VECTORS.workspace._fields.index("plan")][1]
        memory = np.empty(size, np.int64)
        return _plan, [(r.expert_indices, r.slots_used, config.num_experts, memory) for _, r in routed]
    layer = make_layer(config)
    if step == "experts":
        return layer.experts.forward, [(x, r.expert_indices, r.expert_weights, r.slots_used) for x, r in routed]
    return layer.forward, [(x,) for x in inputs]


@njit
def _plan(indices, used, experts, memory):
    return plan_rows(indices, used, experts, ROW_BLOCK, GROUP_ROWS, memory)[3]


def make_layer(config):
    """A MoeLayer with random weights and biases of standard deviation WEIGHT_STD."""
    experts, h, f = config.num_experts, config.input_dim, config.hidden_dim
    gated = config.activation == "swiglu"
    up, rows = ("gate_up", 2 * f) if gated else ("up", f)
    up_shape, down_shape = ((h, rows), (f, h)) if config.transposed else ((rows, h), (h, f))
    weights = {f"{up}_proj": _normal((experts, *up_shape), 1), "down_proj": _normal((experts, *down_shape), 2)}
    if config.bias:
        weights |= {f"{up}_bias": _normal((experts, rows), 3), "down_bias": _normal((experts, h), 4)}
    return MoeLayer.from_weights(config, router_weight=_router_weight(config), **weights)


def make_inputs(router, tokens):
    """Different batches (T, H), in an order in which consecutive ones meet different experts.

    Otherwise a call with few tokens would find the weights of the call before in the cache, and
    the time would be the cache's. From many random batches, the next is always the one whose
    experts have all been left alone for longest; with many tokens every batch meets every expert.
    """
    generator = np.random.default_rng(0)
    shape = (max(4, 256 // tokens), tokens, router.config.input_dim)
    candidates = list(generator.standard_normal(shape, dtype=np.float32))
    experts = [np.unique(router.route(x).expert_indices) for x in candidates]
    last_met = np.full(router.config.num_experts, -1)  # number of the batch that met the expert
    inputs = []
    for number in range(max(4, 32 // tokens)):
        best = min(range(len(candidates)), key=lambda i: last_met[experts[i]].max())
        inputs.append(candidates.pop(best))
        last_met[experts.pop(best)] = number
    return inputs


def _router_weight(config):
    return _normal((config.num_experts, config.input_dim), 0)


def _normal(shape, seed):
    """Array whose rows begin on a cache line, as in a fresh MoeLayer, filled with copies of one random block.

    Drawing every value would take most of the time of a run. The block's length is a prime, so
    that no two rows are alike.
    """
    block = np.random.default_rng(seed).standard_normal(min(1_000_003, math.prod(shape)), dtype=np.float32)
    block *= np.float32(WEIGHT_STD)
    array = aligned_empty(shape)
    flat = array.reshape(-1)
    for start in range(0, flat.size, block.size):
        part = flat[start : start + block.size]
        part[:] = block[: part.size]
    return array
