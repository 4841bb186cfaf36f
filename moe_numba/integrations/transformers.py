"""Experts of Hugging Face transformers: experts_implementation="moe_numba".

    from moe_numba.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_numba")

transformers (from 5.23) calls `experts_forward` for every experts module of such a model, after the model's own
router. The weights stay torch's: kernels read the memory of its parameters.
"""

import itertools
import logging
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from .. import reference
from ..config import ACTIVATIONS
from ..experts import Experts

NAME = "moe_numba"
#: Who computes what this cannot: on the CPU the fastest of transformers' own implementations.
FALLBACK = "grouped_mm"

_logger = logging.getLogger(__name__)
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def register(name: str = NAME) -> None:
    """Make transformers know the implementation by `name`; once, before models are loaded or switched."""
    ExpertsInterface.register(name, experts_forward)


def experts_forward(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, as transformers' ExpertsInterface calls it.

    module: an experts module of transformers. hidden_states (T, H) float32 or bfloat16; top_k_index (T, K)
    integers; top_k_weights (T, K). Returns (T, H) of the dtype of hidden_states. Falls back to
    transformers' "grouped_mm", and says so once for each reason, where it is asked for gradients, another device
    or dtype, or what Experts cannot compute.
    """
    reason = _reason_against(module, hidden_states, top_k_weights)
    if reason is None:
        experts = _experts_of(module)
        reason = experts if isinstance(experts, str) else None
    if reason is not None:
        _say_once(f"{type(module).__name__}: {reason}")
        return ALL_EXPERTS_FUNCTIONS[FALLBACK](module, hidden_states, top_k_index, top_k_weights)
    x = hidden_states.detach().float().contiguous().numpy()
    indices = top_k_index.detach().long().contiguous().numpy()
    weights = top_k_weights.detach().float().contiguous().numpy()
    used = np.full(len(x), indices.shape[1])
    # Experts of other processes have ids beyond the module's own, and are added there.
    y = experts.forward(x, indices, weights, used, skip_invalid=module._is_expert_parallel)
    return torch.from_numpy(y).to(hidden_states.dtype)


def _reason_against(module, hidden_states, top_k_weights):
    """Why a call cannot be computed here, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile traces torch's own operations only"
    if hidden_states.device.type != "cpu":
        return f"the device is {hidden_states.device.type}"
    if hidden_states.dtype not in _DTYPES:
        return f"the dtype is {hidden_states.dtype}"
    if torch.is_grad_enabled():
        asked = (hidden_states, top_k_weights, *_parameters(module))
        if any(t.requires_grad for t in asked if t is not None):
            return "gradients are asked for; without them, use torch.no_grad()"
    return None


def _say_once(message):
    if message not in _said:
        _said.add(message)
        _logger.warning("moe_numba: transformers' %s computes %s", FALLBACK, message)


_said: set[str] = set()

# ---- from a module to Experts ----

#: (what the Experts were built from, Experts or the reason why there are none) by module.
_known: WeakKeyDictionary = WeakKeyDictionary()


def _parameters(module):
    """up, down, up_bias, down_bias of an experts module; biases may be None."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    biases = (getattr(module, f"{name}_bias"), module.down_proj_bias) if module.has_bias else (None, None)
    return getattr(module, name), module.down_proj, *biases


def _experts_of(module):
    """Experts on the module's own memory, or the reason why there are none; built once."""
    parameters = _parameters(module)
    state = [(p.data_ptr(), p.dtype, p.shape) for p in parameters if p is not None]
    if module.has_bias:  # converted to float32, so a change in place must be noticed
        state += [None if p.is_inference() else p._version for p in parameters[2:]]
    known = _known.get(module)
    if known is None or known[0] != state:
        known = _known[module] = state, _build(module, *parameters)
    return known[1]


def _build(module, up, down, up_bias, down_bias):
    if module.has_post_expert_norm:
        return "experts' outputs are normalised one by one"
    if up.dtype not in _DTYPES or down.dtype != up.dtype or up.device.type != "cpu":
        return f"the weights are {up.dtype} on {up.device.type}"
    if not (up.is_contiguous() and down.is_contiguous()):
        return "the weights are not contiguous"
    gate = _recognise_gate(module)
    if gate is None:
        return "its activation is not known"
    activation, options = gate
    biases = [None if b is None else b.detach().float().numpy() for b in (up_bias, down_bias)]
    return Experts(
        activation,
        *map(_as_numpy, (up, down)),
        *biases,
        dtype=_DTYPES[up.dtype],
        transposed=module.is_transposed,
        interleaved=module.has_gate and not module.is_concatenated,
        **options,
    )


def _as_numpy(tensor):
    """The memory of a tensor as an array; bfloat16 as uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


#: Where activations differ.
_PROBE = np.linspace(-24, 24, 97)


def _recognise_gate(module):
    """(activation, options) of Experts that do what the module's own `_apply_gate` or `act_fn` does, or None.

    By trying: modules have gates of their own, under names of their own, and what counts is what they compute.
    """
    if not module.has_gate:
        ours = {name: reference.FUNCTIONS[a.function](_PROBE) for name, a in ACTIVATIONS.items() if not a.gated}
        theirs = _try(module.act_fn, _PROBE)
        return next(((name, {}) for name, value in ours.items() if _equal(value, theirs)), None)
    limits = [getattr(module, name, None) for name in ("limit", "swiglu_limit")]
    # And both sides of every limit, or a layer without it would seem to do the same.
    probe = np.concatenate([_PROBE, *(limit * np.array([-2, -1.1, 1.1, 2]) for limit in limits if limit)])
    gate, up = (values.ravel() for values in np.meshgrid(probe, probe))
    order = np.stack([gate, up], axis=1 if not module.is_concatenated else 0)
    theirs = _try(module._apply_gate, order.reshape(1, -1))
    for name, activation in ACTIVATIONS.items():
        if activation.gated and _equal(reference.FUNCTIONS[activation.function](gate) * up, theirs):
            return name, {}
    alphas = {1.0, 1.702, *(getattr(module, name, 1.0) for name in ("alpha", "swiglu_alpha"))}
    for limit, alpha, beta in itertools.product({None, *limits}, alphas, (0.0, 1.0)):
        if _equal(reference.clamped_swiglu(gate, up, limit, alpha, beta), theirs):
            return "swiglu", {"swiglu_limit": limit, "swiglu_alpha": alpha, "swiglu_beta": beta}
    return None


def _try(function, values):
    """A function of torch on an array, or None if it fails."""
    try:
        with torch.no_grad():
            return function(torch.from_numpy(values.astype(np.float32))).numpy().reshape(-1)
    except Exception:  # whatever a module of another library raises
        return None


def _equal(ours, theirs):
    return theirs is not None and ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
