"""What a layer is: frozen, validated, to and from dict and JSON."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

from . import _check
from .errors import MoeValueError


class Activation(NamedTuple):
    """How hidden values are formed from the first projection."""

    function: str  #: the scalar function
    gated: bool  #: True: function(gate) * up, from two projections; False: function(up)


#: Every activation by its name in a config.
ACTIVATIONS = {
    "relu": Activation("relu", gated=False),
    "gelu": Activation("gelu", gated=False),
    "gelu_tanh": Activation("gelu_tanh", gated=False),
    "silu": Activation("silu", gated=False),
    "relu2": Activation("relu2", gated=False),
    "identity": Activation("identity", gated=False),
    "swiglu": Activation("silu", gated=True),
    "geglu": Activation("gelu", gated=True),
    "reglu": Activation("relu", gated=True),
}
#: Weight formats by name; formats/ holds one file for each.
DTYPES = ("float32", "bfloat16")
#: What happens to a token whose expert is full: it goes to its next best, or loses the slot.
OVERFLOWS = ("next", "drop")


class _Config:
    """Conversions shared by the configurations below."""

    def to_dict(self) -> dict:
        """The fields as a dict of plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict):
        """The inverse of `to_dict`. Missing keys take their defaults, unknown keys are an error."""
        if not isinstance(values, dict):
            _check.fail("values", repr(values), "a dict")
        names = [f.name for f in fields(cls)]
        for key in values:
            if key not in names:
                _check.fail("values", f"a dict with the key {key!r}", "a dict with keys among " + ", ".join(names))
        try:
            return cls(**values)
        except TypeError as error:  # a field without a default is missing
            raise MoeValueError(f"values was {values!r}, but must hold every required field ({error})") from None

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str):
        """The inverse of `to_json`."""
        try:
            values = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise MoeValueError(f"text was {text!r:.80}, but must be a JSON object ({error})") from None
        return cls.from_dict(values)

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    def _check_routing(self):
        for name in ("input_dim", "num_experts", "top_k"):
            self._set(name, _check.integer(name, getattr(self, name), 1))
        if self.top_k > self.num_experts:
            _check.fail("top_k", self.top_k, f"at most num_experts, which is {self.num_experts}")
        if self.capacity_factor is not None:
            rule = "a number above 0, or None for no limit"
            self._set("capacity_factor", _check.number("capacity_factor", self.capacity_factor, rule, lambda v: v > 0))
        _check.choice("overflow", self.overflow, OVERFLOWS)


@dataclass(frozen=True)
class MoeConfig(_Config):
    """Configuration of a MoeLayer. Raises MoeValueError for values outside the stated ranges."""

    num_experts: int = 8  #: E, at least 1
    top_k: int = 2  #: K, experts per token, from 1 to E
    capacity_factor: float | None = 1.25  #: > 0: rows an expert takes, relative to an even share; None: no limit
    noise_std: float = 0.0  #: >= 0: standard deviation of the noise added to the router's logits
    input_dim: int = 64  #: H, width of a token
    hidden_dim: int = 128  #: F, width of an expert
    activation: str = field(default="relu", kw_only=True)  #: a key of ACTIVATIONS
    bias: bool = field(default=True, kw_only=True)  #: whether both projections of an expert add a bias
    dtype: str = field(default="float32", kw_only=True)  #: weight format, one of DTYPES
    overflow: str = field(default="next", kw_only=True)  #: one of OVERFLOWS

    def __post_init__(self):
        self._check_routing()
        self._set("hidden_dim", _check.integer("hidden_dim", self.hidden_dim, 1))
        rule = "a finite number of at least 0"
        self._set("noise_std", _check.number("noise_std", self.noise_std, rule, lambda v: v >= 0))
        _check.choice("activation", self.activation, ACTIVATIONS)
        _check.choice("dtype", self.dtype, DTYPES)
        if not isinstance(self.bias, bool):
            _check.fail("bias", repr(self.bias), "True or False")

    def router_config(self) -> "RouterConfig":
        """The part of the configuration that the router needs."""
        return RouterConfig(self.input_dim, self.num_experts, self.top_k, self.capacity_factor, overflow=self.overflow)


@dataclass(frozen=True)
class RouterConfig(_Config):
    """Configuration of a router; the fields are those of MoeConfig."""

    input_dim: int
    num_experts: int
    top_k: int
    capacity_factor: float | None
    overflow: str = field(default="next", kw_only=True)

    def __post_init__(self):
        self._check_routing()
