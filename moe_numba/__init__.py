"""Mixture-of-Experts layers on the CPU, compiled with Numba.

layer = MoeLayer(MoeConfig(num_experts=8, top_k=2, input_dim=64, hidden_dim=128))
y, routing = layer(x)
"""

from ._version import __version__
from .config import MoeConfig, RouterConfig
from .errors import CheckpointError, MoeError, MoeValueError
from .experts import Expert, fused_experts
from .layer import MoeLayer
from .losses import balance_loss, expert_load_fractions, z_loss
from .pretrained import list_moe_layers
from .router import NoisyTopKRouter, RoutingResult, SparseMixerRouter, TopKRouter, capacity_limit, softmax_rows
from .threads import get_num_threads, set_num_threads

__all__ = [
    "CheckpointError",
    "Expert",
    "MoeConfig",
    "MoeError",
    "MoeLayer",
    "MoeValueError",
    "NoisyTopKRouter",
    "RouterConfig",
    "RoutingResult",
    "SparseMixerRouter",
    "TopKRouter",
    "__version__",
    "balance_loss",
    "capacity_limit",
    "expert_load_fractions",
    "fused_experts",
    "get_num_threads",
    "list_moe_layers",
    "set_num_threads",
    "softmax_rows",
    "z_loss",
]
