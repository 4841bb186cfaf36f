"""Experts: all experts' stacked weights. Expert: one of them. fused_experts: on raw arrays."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
from numpy.typing import ArrayLike

from . import _check
from ._engines import engine_for, products_for
from ._init import expert_weights
from ._workspace import LEAST_CHUNK, chunk_tokens, take_workspace
from .config import ACTIVATIONS, MoeConfig
from .formats import FORMATS
from .kernels.activations import CLAMPED_SILU, CODES
from .kernels.experts import Form
from .threads import get_num_threads, threads_for, twin

_NO_BIAS = _check.read_only(np.empty((0, 0), np.float32))


class Experts(Sequence):
    """The weights of E experts, and their weighted sum for a batch.

    activation: a key of config.ACTIVATIONS. dtype: the weights' format, one of config.DTYPES. Arrays
    in the checkpoint's layout, used in place if they are C-contiguous and in the format (bfloat16
    also as uint16), otherwise converted:
    up (E, F, H), or (E, 2F, H) with the gate's rows first for gated activations; down (E, H, F);
    up_bias (E, F or 2F) and down_bias (E, H), or None.
    transposed: up is (E, H, F or 2F) and down (E, F, H). interleaved: gate and up take turns along 2F, in
    the bias too. swiglu_limit, swiglu_alpha, swiglu_beta: as in MoeConfig.

    `experts[e]` is an Expert whose arrays are views of these.
    """

    def __init__(
        self,
        activation,
        up,
        down,
        up_bias=None,
        down_bias=None,
        dtype="float32",
        *,
        transposed=False,
        interleaved=False,
        swiglu_limit=None,
        swiglu_alpha=1.0,
        swiglu_beta=0.0,
    ):
        self.activation = _check.choice("activation", activation, ACTIVATIONS)
        kind = ACTIVATIONS[activation]
        self.gated = kind.gated
        self._options = {
            "transposed": transposed,
            "interleaved": interleaved,
            "swiglu_limit": swiglu_limit,
            "swiglu_alpha": swiglu_alpha,
            "swiglu_beta": swiglu_beta,
        }
        self._format = FORMATS[dtype]
        self._transposed = bool(transposed)
        up_name, up_bias_name, layout = _up_names(kind, self._transposed)
        up = self._encode(up_name, up, (None, None, None), layout)
        self.num_experts, rows, self.input_dim = (up.swapaxes(1, 2) if transposed else up).shape
        if 0 in up.shape or (self.gated and rows % 2):
            _check.fail(up_name, _check.describe(up), f"{layout}, none of them 0")
        self.hidden_dim = rows // 2 if self.gated else rows
        down_shape = (self.num_experts, self.input_dim, self.hidden_dim)
        self.up = up
        self.down = self._encode("down_proj", down, down_shape[::2] + down_shape[1:2] if transposed else down_shape)
        self.up_bias = _bias(up_bias_name, up_bias, (self.num_experts, rows))
        self.down_bias = _bias("down_bias", down_bias, (self.num_experts, self.input_dim))
        storage = self._format.storage
        #: The Engine that computes them.
        self.engine = engine_for(storage, self._transposed, (self.input_dim, self.hidden_dim))
        #: The fields of kernels.experts.Weights, as kernels take them.
        self._weights = (
            _check.read_only(up if up.dtype == storage else up.view(storage)),
            _NO_BIAS if up_bias is None else _check.read_only(self.up_bias),
            _check.read_only(self.down if self.down.dtype == storage else self.down.view(storage)),
            _NO_BIAS if down_bias is None else _check.read_only(self.down_bias),
        )
        self._interleaved = bool(interleaved)
        self._form = _form(activation, self._interleaved, swiglu_limit, swiglu_alpha, swiglu_beta)

    def _encode(self, name, value, shape, wanted=None):
        if _check.is_ready(value, shape, self._format.values):
            return value
        return self._format.encode(_check.shaped(name, value, shape, self._format.accepts, wanted))

    @property
    def projections(self) -> list[np.ndarray]:
        """Views (E, F, H) of the first projections: the gate's and the up's, or the only one."""
        return self._parts(self.up.swapaxes(1, 2) if self._transposed else self.up)

    @property
    def projection_biases(self) -> list[np.ndarray]:
        """Views (E, F) of the biases of `projections`; there must be biases."""
        return self._parts(self.up_bias)

    def _parts(self, array):
        if not self.gated:
            return [array]
        if self._interleaved:
            return [array[:, 0::2], array[:, 1::2]]
        return [array[:, : self.hidden_dim], array[:, self.hidden_dim :]]

    @property
    def down_projection(self) -> np.ndarray:
        """View (E, H, F) of the second projection."""
        return self.down.swapaxes(1, 2) if self._transposed else self.down

    def astype(self, dtype: str) -> "Experts":
        """These experts with weights in another format; biases stay float32 and are shared."""
        return Experts(self.activation, *self.arrays, dtype, **self._options)

    @property
    def arrays(self):
        """up, down, up_bias, down_bias; biases may be None."""
        return self.up, self.down, self.up_bias, self.down_bias

    def __reduce__(self):  # a copy builds views of its own arrays
        return partial(Experts, **self._options), (self.activation, *self.arrays, self._format.name)

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, e):
        if isinstance(e, slice):
            return [self[i] for i in range(*e.indices(len(self)))]
        try:
            return Expert._of(self._slice(range(len(self))[e]))  # negative indices, as of a list
        except IndexError:
            raise IndexError(f"expert was {e}, but must be from {-len(self)} to {len(self) - 1}") from None

    def _slice(self, e):
        """Experts holding only expert e, as views."""
        arrays = (None if array is None else array[e : e + 1] for array in self.arrays)
        return Experts(self.activation, *arrays, self._format.name, **self._options)

    def forward(self, x, indices, weights, used, *, skip_invalid=False):
        """y[t] = sum over k < used[t] of weights[t, k] * expert[indices[t, k]](x[t]).

        x (T, H), weights (T, K) float32; indices (T, K), used (T,) int64; all C-contiguous.
        A used index that is not one of an expert raises MoeValueError, or with `skip_invalid` adds nothing.
        """
        tokens, k = indices.shape
        if k == 0:
            return np.zeros((tokens, self.input_dim), np.float32)
        y = np.empty((tokens, self.input_dim), np.float32)
        if tokens <= LEAST_CHUNK or tokens <= (step := self._chunk_tokens(k)):
            self._forward_chunk(x, indices, weights, used, skip_invalid, y)
            return y
        for first in range(0, tokens, step):
            part = slice(first, min(first + step, tokens))
            self._forward_chunk(x[part], indices[part], weights[part], used[part], skip_invalid, y[part])
        return y

    def _forward_chunk(self, x, indices, weights, used, skip_invalid, y):
        tokens, k = indices.shape
        engine = self.engine
        threads = threads_for(tokens * k * self.hidden_dim * self.input_dim * (3 if self.gated else 2))
        space = take_workspace(engine, (tokens, tokens * k, self.num_experts, self.input_dim, self.hidden_dim, threads))
        products = products_for(engine, self._format.storage, self._transposed)
        kernel = twin(engine.kernel, threads)
        x = _check.read_only(x)
        invalid = kernel(x, self._weights, self._form, products, indices, weights, used, space, y)
        if invalid and not skip_invalid:
            bad = indices[(indices < 0) | (indices >= self.num_experts)][0]
            _check.fail("topk_ids", f"an array with the value {bad}", f"from 0 to {self.num_experts - 1}")

    def _chunk_tokens(self, k):
        return chunk_tokens(self.engine, k, self.num_experts, self.input_dim, self.hidden_dim, get_num_threads())


@lru_cache  # like `_form`, 1 us of a call of fused_experts
def _up_names(activation, transposed):
    """Names of the first projection and of its bias, and its shape in words."""
    axes = ["2 * hidden_dim" if activation.gated else "hidden_dim", "input_dim"]
    layout = ", ".join(["num_experts", *(axes[::-1] if transposed else axes)])
    return f"{activation.up_name}_proj", f"{activation.up_name}_bias", f"({layout})"


@lru_cache
def _form(activation, interleaved, limit, alpha, beta):
    function, gated = ACTIVATIONS[activation]
    code = CODES[function] if (limit, alpha, beta) == (None, 1.0, 0.0) else CLAMPED_SILU
    limit = math.inf if limit is None else float(limit)
    return tuple(Form(code, gated, interleaved, limit, float(alpha), float(beta)))


def _bias(name, bias, shape):
    return None if bias is None else _check.floats(name, bias, shape)


class _LiveArray:
    """An array of an Expert: reading gives a view of the weights, assigning writes into them.

    view(experts) finds the array in an Experts that holds one expert, in the orientation of x @ w.
    None if this expert has no such array: gated_only for experts without a gate, is_bias for those
    without biases.
    """

    def __init__(self, doc, view, gated_only=False, is_bias=False):
        self.__doc__ = doc
        self._view = view
        self._gated_only = gated_only
        self._is_bias = is_bias

    def __set_name__(self, owner, name):
        self._name = name

    def __get__(self, expert, owner=None):
        if expert is None:
            return self
        experts = expert._experts
        if (self._gated_only and not experts.gated) or (self._is_bias and experts.up_bias is None):
            return None
        return self._view(experts)

    def __set__(self, expert, value):
        view = self.__get__(expert)
        if view is None:
            _check.fail(self._name, "assigned", f"left alone: this expert has no {self._name}")
        _check.assign(self._name, view, value)


class Expert:
    """One expert: act(x @ w1 + b1) @ w2 + b2, or gated (act(x @ w1 + b1) * (x @ w3 + b3)) @ w2 + b2.

    Standing alone, with random weights: `Expert(input_dim, hidden_dim)`. From a layer:
    `layer.experts[e]`, whose arrays are live views of the layer's weights.

    Reading w1, w2, w3, b1, b2 or b3 gives a view; writing to it or assigning to the attribute changes
    what forward uses. Arrays that an expert does not have are None.
    """

    __slots__ = ("_experts",)  # a misspelt w1 is an error

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        *,
        activation: str = "relu",
        bias: bool = True,
        seed: int = 0,
        init: str = "xavier",
    ):
        options = {"input_dim": input_dim, "hidden_dim": hidden_dim, "activation": activation, "bias": bias}
        self._experts = random_experts(MoeConfig(num_experts=1, top_k=1, **options), seed, init)

    @classmethod
    def _of(cls, experts):
        self = cls.__new__(cls)
        self._experts = experts
        return self

    @property
    def input_dim(self) -> int:
        """H, width of the input and the output."""
        return self._experts.input_dim

    @property
    def hidden_dim(self) -> int:
        """F, width of the hidden layer."""
        return self._experts.hidden_dim

    w1 = _LiveArray("(H, F) first projection; of gated experts the gate", lambda e: e.projections[0][0].T)
    w2 = _LiveArray("(F, H) second projection", lambda e: e.down_projection[0].T)
    w3 = _LiveArray("(H, F) up projection of gated experts", lambda e: e.projections[1][0].T, gated_only=True)
    b1 = _LiveArray("(F,) bias of w1", lambda e: e.projection_biases[0][0], is_bias=True)
    b2 = _LiveArray("(H,) bias of w2", lambda e: e.down_bias[0], is_bias=True)
    b3 = _LiveArray("(F,) bias of w3", lambda e: e.projection_biases[1][0], gated_only=True, is_bias=True)

    def forward(self, x: ArrayLike) -> np.ndarray:
        """x (H,) -> (H,) float32."""
        x = _check.floats("x", x, (self.input_dim,))
        return self.forward_batch(x[None])[0]

    def forward_batch(self, x: ArrayLike) -> np.ndarray:
        """x (N, H) -> (N, H) float32."""
        x = _check.floats("x", x, (None, self.input_dim), f"(N, {self.input_dim})")
        n = x.shape[0]
        return self._experts.forward(x, np.zeros((n, 1), np.int64), np.ones((n, 1), np.float32), np.ones(n, np.int64))


def experts_of(config, arrays) -> Experts:
    """Experts on existing arrays (up, down, up_bias, down_bias), as a MoeConfig describes them."""
    names = ("transposed", "interleaved", "swiglu_limit", "swiglu_alpha", "swiglu_beta")
    return Experts(config.activation, *arrays, dtype=config.dtype, **{name: getattr(config, name) for name in names})


def random_experts(config, seed, init) -> Experts:
    """Experts of a MoeConfig with fresh weights (see `_init`) and zero biases, or none."""
    gated = ACTIVATIONS[config.activation].gated
    weights = expert_weights(config.num_experts, config.input_dim, config.hidden_dim, gated, seed, init)
    biases = [np.zeros(w.shape[:2], np.float32) if config.bias else None for w in weights]
    if config.transposed:
        weights = [np.ascontiguousarray(w.swapaxes(1, 2)) for w in weights]
    return experts_of(config, [*weights, *biases])


def shared_config(config) -> MoeConfig:
    """A config whose only expert is the shared expert of `config`."""
    return replace(
        config,
        num_experts=1,
        top_k=1,
        hidden_dim=config.shared_hidden_dim,
        transposed=False,
        interleaved=False,
        num_identity_experts=0,
        n_group=1,
        topk_group=None,
        shared_hidden_dim=0,
        shared_gate=False,
    )


def fused_experts(
    hidden_states: ArrayLike,
    gate_up_proj: ArrayLike | None = None,
    down_proj: ArrayLike | None = None,
    topk_weights: ArrayLike | None = None,
    topk_ids: ArrayLike | None = None,
    activation: str = "swiglu",
    *,
    up_proj: ArrayLike | None = None,
) -> np.ndarray:
    """Weighted sum of the chosen experts' outputs, for callers with a router of their own: (T, H) float32.

    hidden_states  (T, H)
    gate_up_proj   (E, 2F, H), gate rows first; for activations without a gate up_proj (E, F, H),
                   in the same place or by name
    down_proj      (E, H, F)
    topk_weights   (T, K)
    topk_ids       (T, K) integers from 0 to E - 1
    activation     a key of config.ACTIVATIONS

    If both weights are bfloat16 (ml_dtypes), they are multiplied as such, otherwise as float32. They are used in place
    if they are C-contiguous and of that dtype, otherwise converted in every call. Raises MoeValueError.
    """
    if up_proj is not None:
        if gate_up_proj is not None:
            _check.fail("up_proj", "given beside gate_up_proj", "the only one of the two")
        gate_up_proj = up_proj
    bfloat16 = FORMATS["bfloat16"].values
    is_bfloat16 = getattr(gate_up_proj, "dtype", None) == bfloat16 == getattr(down_proj, "dtype", None)
    experts = Experts(activation, gate_up_proj, down_proj, dtype="bfloat16" if is_bfloat16 else "float32")
    x = _check.floats("hidden_states", hidden_states, (None, experts.input_dim), f"(T, {experts.input_dim})")
    weights = _check.floats("topk_weights", topk_weights, (len(x), None), f"({len(x)}, K)")
    ids = _check.integers("topk_ids", topk_ids, weights.shape)
    # Kernels are compiled for writable ones, as a router gives them.
    weights, ids = map(_check.writable, (weights, ids))
    used = np.empty(len(x), np.int64)
    used.fill(ids.shape[1])
    return experts.forward(x, ids, weights, used)
