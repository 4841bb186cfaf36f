"""MoeLayer: configuration, router and experts, and their forward."""

from copy import copy
from dataclasses import replace
from os import PathLike

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import _check, losses
from ._files import write_tensors
from ._safetensors import Safetensors
from .config import ACTIVATIONS, DTYPES, MoeConfig, RouterConfig
from .errors import CheckpointError, MoeValueError
from .experts import experts_of, random_experts, shared_config
from .formats import FORMATS
from .pretrained import read_block
from .router import NoisyTopKRouter, RoutingResult, SparseMixerRouter, TopKRouter

#: As in kernels, what overflows is infinite and the difference of infinities NaN, without a warning.
_silent = np.errstate(over="ignore", invalid="ignore")


class MoeLayer:
    """A Mixture-of-Experts layer (Fedus et al. 2021, section 2; Shazeer et al. 2017, section 2).

    MoeLayer(config, seed=0): random weights from `seed` (normal, Glorot's variance), zero biases.
    init="sine": entrenar's deterministic start, in which all experts are alike.

    config          MoeConfig
    router          TopKRouter, NoisyTopKRouter when config.noise_std > 0, or SparseMixerRouter when
                    config.sparsemixer_eps is set
    experts         sequence of Expert, live views of the stacked weights
    shared_experts  sequence of the one Expert that every token meets, or None
    shared_gate     TopKRouter over that one expert, whose weights are sigmoids, or None
    """

    def __init__(self, config: MoeConfig | None = None, seed: int = 0, *, init: str = "xavier"):
        config = MoeConfig() if config is None else config
        _check.instance("config", config, MoeConfig)
        seed = _check.integer("seed", seed, 0)
        experts = random_experts(config, seed, init)
        shared = random_experts(shared_config(config), _after(seed), init) if config.shared_hidden_dim else None
        self._assemble(config, experts, shared, {}, seed=seed, init=init)

    def _assemble(self, config, experts, shared, router_arrays, shared_gate_weight=None, seed=0, init="xavier"):
        self.config = config
        self.experts = experts
        self.shared_experts = shared
        arrays = {"init": init} | router_arrays
        router_config = config.router_config()
        if config.sparsemixer_eps is not None:
            weight = router_arrays.get("weight")
            self.router = SparseMixerRouter(router_config, config.sparsemixer_eps, weight=weight, seed=seed, init=init)
        elif config.noise_std > 0:
            self.router = NoisyTopKRouter(router_config, config.noise_std, seed, **arrays)
        else:
            self.router = TopKRouter(router_config, seed=seed, **arrays)
        self.shared_gate = None
        if config.shared_gate:
            gate = RouterConfig(config.input_dim, 1, 1, None, scoring="sigmoid", norm_topk_prob=False)
            self.shared_gate = TopKRouter(gate, weight=shared_gate_weight, seed=_after(seed or 0), init=init)

    @classmethod
    def from_weights(
        cls,
        config: MoeConfig,
        *,
        router_weight: ArrayLike,
        router_bias: ArrayLike | None = None,
        e_score_correction_bias: ArrayLike | None = None,
        gate_up_proj: ArrayLike | None = None,
        up_proj: ArrayLike | None = None,
        down_proj: ArrayLike,
        gate_up_bias: ArrayLike | None = None,
        up_bias: ArrayLike | None = None,
        down_bias: ArrayLike | None = None,
        shared_gate_up_proj: ArrayLike | None = None,
        shared_up_proj: ArrayLike | None = None,
        shared_down_proj: ArrayLike | None = None,
        shared_gate_up_bias: ArrayLike | None = None,
        shared_up_bias: ArrayLike | None = None,
        shared_down_bias: ArrayLike | None = None,
        shared_gate_weight: ArrayLike | None = None,
        seed: int | None = 0,
    ) -> "MoeLayer":
        """A layer on existing arrays, in the layout of checkpoints.

        router_weight (E, H); gate_up_proj (E, 2F, H), gate rows first, for gated activations, else
        up_proj (E, F, H); down_proj (E, H, F); biases gate_up_bias (E, 2F) or up_bias (E, F), and
        down_bias (E, H), both if config.bias, else neither. With config.transposed the last two axes of the
        experts' weights are exchanged; with config.interleaved gate and up take turns.
        router_bias and e_score_correction_bias (E,), if config.router_bias and config.selection_bias. E here
        includes config.num_identity_experts, which have no other weights.
        With config.shared_hidden_dim S the same arrays of the shared expert, without E and never transposed or
        interleaved: shared_gate_up_proj (2S, H), ...; shared_gate_weight (1, H) if config.shared_gate.
        C-contiguous arrays of config.dtype are used in place, others converted; with config.dtype="bfloat16"
        arrays of bfloat16 (ml_dtypes) or of uint16 with the same bits. seed: of the router's noise.
        Raises MoeValueError.
        """
        _check.instance("config", config, MoeConfig)
        if seed is not None:
            seed = _check.integer("seed", seed, 0)
        given = {name: array for name, array in locals().items() if name not in ("cls", "config", "seed")}
        wanted = _tensor_shapes(config)
        for name, array in given.items():
            if (array is not None) != (name in wanted):
                was, rule = ("missing", "given") if array is None else ("given", "left out")
                options = [f"{option}={getattr(config, option)!r}" for option in _options_of(name)]
                _check.fail(name, was, f"{rule} with {', '.join(options)}" if options else rule)
        arrays = {name: _shaped(name, given[name], shape, config) for name, shape in wanted.items()}
        experts = [arrays.get(name) for name in _expert_names(config)]
        shared = None
        if config.shared_hidden_dim:
            shared_arrays = (arrays.get(f"shared_{name}") for name in _expert_names(config))
            shared = [None if array is None else array[None] for array in shared_arrays]
            shared = experts_of(shared_config(config), shared)
        router_arrays = {parameter: arrays[name] for name, parameter in _ROUTER_PARAMETERS.items() if name in arrays}
        layer = cls.__new__(cls)
        layer._assemble(
            config, experts_of(config, experts), shared, router_arrays, arrays.get("shared_gate_weight"), seed
        )
        return layer

    def forward(self, x: ArrayLike, *, dtype: DTypeLike | None = None) -> tuple[np.ndarray, RoutingResult]:
        """Send every token to its top-k experts and add their outputs by weight.

        x: (T, H), (..., H) or (H,). Returns (y, routing): y of x's shape, float32 or `dtype`;
        routing a RoutingResult over the T tokens. A token with NaN or an infinity becomes NaN.
        Raises MoeValueError.
        """
        if dtype is not None:
            dtype = _check.float_dtype("dtype", dtype)
        tokens, shape = self._tokens(x)
        routing = self.router.route(tokens)
        y = self._routed(tokens, routing)
        if self.shared_experts is not None:
            self._add_shared(tokens, y)
        y = y.reshape(shape)
        if dtype is not None:
            with np.errstate(over="ignore"):  # beyond float16 is inf
                y = y.astype(dtype, copy=False)
        return y, routing

    __call__ = forward

    def __repr__(self):
        return f"<MoeLayer: {self.config!s}>"

    def _routed(self, x, routing):
        """What the chosen experts add up to."""
        indices, weights, used = routing.expert_indices, routing.expert_weights, routing.slots_used
        identity = self.config.num_identity_experts > 0
        if self.config.apply_router_weight_on_input:
            return self._weighted_on_input(x, indices, weights, used)
        y = self.experts.forward(x, indices, weights, used, skip_invalid=identity)
        if identity:
            self._add_identity(x, indices, weights, y)
        return y

    @_silent
    def _add_identity(self, x, indices, weights, y):
        """Add what identity experts give: x times their weights."""
        y += np.where(indices < self.config.num_experts, 0, weights).sum(axis=1, keepdims=True) * x

    @_silent
    def _weighted_on_input(self, x, indices, weights, used):
        """Every slot a token of its own: x[t] times the slot's weight (Llama 4: its experts' input)."""
        tokens, k = indices.shape
        rows = (x[:, None] * weights[:, :, None]).reshape(tokens * k, x.shape[1])
        found = (np.arange(k) < used[:, None]).astype(np.int64).ravel()
        lost = np.where(found[:, None], np.float32(1), weights.reshape(-1, 1))  # 0, or NaN without probabilities
        y = self.experts.forward(rows, indices.reshape(-1, 1), lost, found)
        return y.reshape(tokens, k, x.shape[1]).sum(axis=1)

    @_silent
    def _add_shared(self, x, y):
        """Add the shared expert's output, weighted by its gate."""
        tokens = len(x)
        weights = np.ones((tokens, 1), np.float32)
        if self.shared_gate is not None:
            weights = self.shared_gate.route(x).expert_weights
        y += self.shared_experts.forward(x, np.zeros((tokens, 1), np.int64), weights, np.ones(tokens, np.int64))

    def _tokens(self, x):
        """x as (T, H) float32, not to be written, and the shape it had."""
        x = _check.array("x", x)
        width = self.config.input_dim
        if x.ndim == 0 or x.shape[-1] != width:
            _check.fail("x", _check.describe(x), f"of shape ({width},) or (..., {width})")
        rows = x if x.ndim == 2 else x.reshape(-1, width)
        return _check.read_only(_check.floats("x", rows, (None, width))), x.shape

    def astype(self, dtype: str) -> "MoeLayer":
        """This layer with expert weights in another format, one of config.DTYPES; the router stays float32.

        Weights that change their format are copied, everything else is shared.
        """
        _check.choice("dtype", dtype, DTYPES)
        layer = copy(self)
        layer.config = replace(self.config, dtype=dtype)
        layer.experts = self.experts.astype(dtype)
        if self.shared_experts is not None:
            layer.shared_experts = self.shared_experts.astype(dtype)
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
        """The layer that `save` wrote; `seed` is that of the router's noise.

        Raises CheckpointError, and for a bad seed MoeValueError.
        """
        if seed is not None:  # before the file is read
            _check.integer("seed", seed, 0)
        file = Safetensors(path)
        try:
            config = MoeConfig.from_json(file.metadata.get("config"))
        except MoeValueError as error:
            raise CheckpointError(f"{path}: no moe_numba layer, its metadata has no valid config ({error})") from None
        wanted = _tensor_shapes(config)
        if set(file.entries) != set(wanted):
            names = f"{sorted(file.entries)!s:.500}"
            raise CheckpointError(f"{path}: holds the tensors {names}, but must hold {sorted(wanted)}")
        for name, shape in wanted.items():  # before a byte of what may be many gigabytes is read
            if file.entries[name].shape != shape:
                was = f"{file.entries[name].shape!s:.80}"
                raise CheckpointError(f"{path}: tensor {name} has shape {was}, but must have {shape}")
        try:
            return cls.from_weights(config, **{name: file.read(name) for name in wanted}, seed=seed)
        except MoeValueError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike, layer: int | str, *, dtype: str | None = None, seed: int | None = 0
    ) -> "MoeLayer":
        """The MoE block of one layer of a published model, from its checkpoint.

        path: directory in Hugging Face format: config.json and safetensors files. layer: one of
        `list_moe_layers(path)`. Only the bytes of that layer are read; what is stored as it is used stays in the
        file, mapped read-only. dtype: one of config.DTYPES; None: bfloat16 if the checkpoint's is, else float32.
        docs/checkpoints.md has the table of families. seed: of a router's noise, which no family has. Raises
        CheckpointError, and for another dtype or a bad seed MoeValueError.
        """
        config, arrays = read_block(path, layer, dtype)
        return cls.from_weights(config, **arrays, seed=seed)

    def _tensors(self):
        """The arrays of `from_weights`, by name."""
        names = _expert_names(self.config)
        arrays = dict(zip(names, self.experts.arrays, strict=True))
        if self.shared_experts is not None:
            shared = (None if array is None else array[0] for array in self.shared_experts.arrays)
            arrays |= {f"shared_{name}": array for name, array in zip(names, shared, strict=True)}
        if self.shared_gate is not None:
            arrays["shared_gate_weight"] = self.shared_gate.weight
        arrays |= {name: getattr(self.router, parameter) for name, parameter in _ROUTER_PARAMETERS.items()}
        return {name: array for name, array in arrays.items() if array is not None}


def _after(seed):
    """Another seed than a layer's own."""
    return (seed + 1) % 2**63


#: The router's arrays as `from_weights` calls them, and as the routers do.
_ROUTER_PARAMETERS = {
    "router_weight": "weight",
    "router_bias": "bias",
    "e_score_correction_bias": "e_score_correction_bias",
}


def _options_of(name):
    """Fields of a config that decide whether `from_weights` wants an array."""
    router = {
        "router_bias": "router_bias",
        "e_score_correction_bias": "selection_bias",
        "shared_gate_weight": "shared_gate",
    }
    if name in router:
        return [router[name]]
    options = {"shared_": "shared_hidden_dim", "up_": "activation", "_bias": "bias"}
    return [option for part, option in options.items() if part in name]


def _expert_names(config):
    """Names in `from_weights` of the experts' arrays: up, down, up_bias, down_bias."""
    up = ACTIVATIONS[config.activation].up_name
    return f"{up}_proj", "down_proj", f"{up}_bias", "down_bias"


def _expert_shapes(config, hidden_dim, transposed):
    """Shapes of one expert's arrays, in the order of `_expert_names`."""
    h, rows = config.input_dim, hidden_dim * ACTIVATIONS[config.activation].projections
    weights = [(rows, h), (h, hidden_dim)]
    if transposed:
        weights = [shape[::-1] for shape in weights]
    return weights + ([(rows,), (h,)] if config.bias else [])


def _tensor_shapes(config):
    """Name and shape of every array that `from_weights` wants."""
    experts, logits = config.num_experts, config.num_experts + config.num_identity_experts
    names = _expert_names(config)
    shapes = {"router_weight": (logits, config.input_dim)}
    if config.router_bias:
        shapes["router_bias"] = (logits,)
    if config.selection_bias:
        shapes["e_score_correction_bias"] = (logits,)
    of_one = _expert_shapes(config, config.hidden_dim, config.transposed)
    shapes |= {name: (experts, *shape) for name, shape in zip(names, of_one, strict=False)}
    if config.shared_hidden_dim:
        of_shared = _expert_shapes(config, config.shared_hidden_dim, False)
        shapes |= {f"shared_{name}": shape for name, shape in zip(names, of_shared, strict=False)}
    if config.shared_gate:
        shapes["shared_gate_weight"] = (1, config.input_dim)
    return shapes


def _shaped(name, array, shape, config):
    """`array` checked: experts' weights in the config's format, all others floats."""
    accepts = FORMATS[config.dtype].accepts if name.endswith("_proj") else _check.is_float
    return _check.shaped(name, array, shape, accepts)
