"""MoeLayer: configuration, router and experts, and their forward."""

from copy import copy
from dataclasses import replace
from os import PathLike

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import _check, losses
from ._files import read_tensors, write_tensors
from .config import ACTIVATIONS, DTYPES, MoeConfig
from .errors import CheckpointError, MoeValueError
from .experts import Experts, random_experts
from .formats import FORMATS
from .router import NoisyTopKRouter, RoutingResult, TopKRouter


class MoeLayer:
    """A Mixture-of-Experts layer (Fedus et al. 2021, section 2; Shazeer et al. 2017, section 2).

    MoeLayer(config, seed=0): random weights from `seed` (normal, Glorot's variance), zero biases.
    init="sine": entrenar's deterministic start, in which all experts are alike.

    config   MoeConfig
    router   TopKRouter, or NoisyTopKRouter when config.noise_std > 0
    experts  sequence of Expert, live views of the stacked weights
    """

    def __init__(self, config: MoeConfig | None = None, seed: int = 0, *, init: str = "xavier"):
        config = MoeConfig() if config is None else config
        _check.instance("config", config, MoeConfig)
        experts = random_experts(
            config.num_experts,
            config.input_dim,
            config.hidden_dim,
            config.activation,
            config.bias,
            seed,
            init,
            config.dtype,
        )
        self._assemble(config, experts, router_weight=None, seed=seed, init=init)

    def _assemble(self, config, experts, router_weight, seed=0, init="xavier"):
        self.config = config
        self.experts = experts
        router_config = config.router_config()
        if config.noise_std > 0:
            self.router = NoisyTopKRouter(router_config, config.noise_std, seed, weight=router_weight, init=init)
        else:
            self.router = TopKRouter(router_config, weight=router_weight, seed=seed, init=init)

    @classmethod
    def from_weights(
        cls,
        config: MoeConfig,
        *,
        router_weight: ArrayLike,
        gate_up_proj: ArrayLike | None = None,
        up_proj: ArrayLike | None = None,
        down_proj: ArrayLike,
        gate_up_bias: ArrayLike | None = None,
        up_bias: ArrayLike | None = None,
        down_bias: ArrayLike | None = None,
        seed: int | None = 0,
    ) -> "MoeLayer":
        """A layer on existing arrays, in the layout of checkpoints.

        router_weight (E, H); gate_up_proj (E, 2F, H), gate rows first, for gated activations, else
        up_proj (E, F, H); down_proj (E, H, F); biases gate_up_bias (E, 2F) or up_bias (E, F), and
        down_bias (E, H), both if config.bias, else neither. C-contiguous arrays of config.dtype are used in
        place, others converted; with config.dtype="bfloat16" arrays of bfloat16 (ml_dtypes) or of uint16
        with the same bits. seed: of the router's noise.
        Raises MoeValueError.
        """
        _check.instance("config", config, MoeConfig)
        given = {
            "gate_up_proj": gate_up_proj,
            "up_proj": up_proj,
            "down_proj": down_proj,
            "gate_up_bias": gate_up_bias,
            "up_bias": up_bias,
            "down_bias": down_bias,
        }
        wanted = _expert_tensors(config)
        for name, array in given.items():
            if (array is not None) != (name in wanted):
                was, rule = ("missing", "given") if array is None else ("given", "left out")
                _check.fail(name, was, f"{rule} with activation={config.activation!r} and bias={config.bias}")
        accepts = FORMATS[config.dtype].accepts
        arrays = [_check.shaped(name, given[name], shape, accepts) for name, shape in wanted.items()]
        biases = arrays[2:] or (None, None)
        experts = Experts(config.activation, *arrays[:2], *biases, config.dtype)
        router_shape = (config.num_experts, config.input_dim)
        router_weight = _check.floats("router_weight", router_weight, router_shape)
        layer = cls.__new__(cls)
        layer._assemble(config, experts, router_weight, seed)
        return layer

    def forward(self, x: ArrayLike, *, dtype: DTypeLike | None = None) -> tuple[np.ndarray, RoutingResult]:
        """Send every token to its top-k experts and add their outputs by weight.

        x: (T, H), (..., H) or (H,). Returns (y, routing): y of x's shape, float32 or `dtype`;
        routing a RoutingResult over the T tokens. A token with NaN or an infinity becomes NaN.
        Raises MoeValueError.
        """
        dtype = np.float32 if dtype is None else _check.float_dtype("dtype", dtype)
        tokens, shape = self._tokens(x)
        routing = self.router.route(tokens)
        y = self.experts.forward(tokens, routing.expert_indices, routing.expert_weights, routing.slots_used)
        with np.errstate(over="ignore"):  # beyond float16 is inf
            return y.reshape(shape).astype(dtype, copy=False), routing

    __call__ = forward

    def _tokens(self, x):
        """x as (T, H) float32, and the shape it had."""
        x = _check.array("x", x)
        width = self.config.input_dim
        if x.ndim == 0 or x.shape[-1] != width:
            _check.fail("x", _check.describe(x), f"of shape ({width},) or (..., {width})")
        return _check.floats("x", x.reshape(-1, width), (None, width)), x.shape

    def astype(self, dtype: str) -> "MoeLayer":
        """This layer with expert weights in another format, one of config.DTYPES; the router stays float32.

        Weights that change their format are copied, everything else is shared.
        """
        _check.choice("dtype", dtype, DTYPES)
        layer = copy(self)
        layer.config = replace(self.config, dtype=dtype)
        layer.experts = self.experts.astype(dtype)
        return layer

    def balance_loss(self, routing: RoutingResult) -> float:
        """See losses.balance_loss."""
        return losses.balance_loss(routing)

    def save(self, path: str | PathLike) -> None:
        """Write config and weights to a safetensors file; an existing file is replaced only when done.

        Raises CheckpointError if it cannot be written.
        """
        write_tensors(path, self._tensors(), {"format": "moe_numba", "config": self.config.to_json()})

    @classmethod
    def load(cls, path: str | PathLike, *, seed: int | None = 0) -> "MoeLayer":
        """The layer that `save` wrote; `seed` is that of the router's noise. Raises CheckpointError."""
        tensors, metadata = read_tensors(path)
        try:
            config = MoeConfig.from_json(metadata["config"])
        except (KeyError, MoeValueError) as error:
            raise CheckpointError(f"{path}: no moe_numba layer, its metadata has no valid config ({error})") from None
        wanted = {"router_weight", *_expert_tensors(config)}
        if set(tensors) != wanted:
            raise CheckpointError(f"{path}: holds the tensors {sorted(tensors)}, but must hold {sorted(wanted)}")
        try:
            return cls.from_weights(config, **tensors, seed=seed)
        except MoeValueError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def _tensors(self):
        experts = self.experts
        arrays = [experts.up, experts.down]
        if self.config.bias:
            arrays += [experts.up_bias, experts.down_bias]
        return {"router_weight": self.router.weight} | dict(zip(_expert_tensors(self.config), arrays, strict=True))


def _expert_tensors(config):
    """Name and shape of the experts' arrays in `from_weights`: up, down, up_bias, down_bias."""
    gated = ACTIVATIONS[config.activation].gated
    up = "gate_up" if gated else "up"
    experts, h, f = config.num_experts, config.input_dim, config.hidden_dim
    rows = 2 * f if gated else f
    shapes = {f"{up}_proj": (experts, rows, h), "down_proj": (experts, h, f)}
    if config.bias:
        shapes |= {f"{up}_bias": (experts, rows), "down_bias": (experts, h)}
    return shapes
