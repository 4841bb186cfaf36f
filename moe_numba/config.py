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

    @property
    def projections(self) -> int:
        """First projections of an expert."""
        return 2 if self.gated else 1

    @property
    def up_name(self) -> str:
        """What their weights and biases are called, before _proj and _bias."""
        return "gate_up" if self.gated else "up"


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
    "geglu_tanh": Activation("gelu_tanh", gated=True),
    "reglu": Activation("relu", gated=True),
}
#: Weight formats by name; formats/ holds one file for each.
DTYPES = ("float32", "bfloat16")
#: What happens to a token whose expert is full: it goes to its next best, or loses the slot.
OVERFLOWS = ("next", "drop")
#: How logits become scores.
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
#: Score of a group of experts: its best one's, or the sum of its best two.
GROUP_SCORES = ("max", "top2_sum")
#: What takes the place of the scores of groups that are not chosen.
GROUP_MASKS = ("zero", "-inf")
#: The kernel notes the groups that a token chooses in the bits of an int64.
MOST_GROUPS = 63


class _Config:
    """Conversions shared by the configurations below."""

    def __repr__(self):
        """What has to be said to make it, the class's own fields first."""
        named = sorted(fields(self), key=lambda f: f.name in _Routing.__dataclass_fields__)
        said = (f"{f.name}={getattr(self, f.name)!r}" for f in named if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(said)})"

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


@dataclass(frozen=True, kw_only=True, repr=False)
class _Routing(_Config):
    """How tokens choose experts; shared by MoeConfig and RouterConfig. docs/routing.md has the rules.

    The model's own names where the families agree on one.
    """

    overflow: str = "next"  #: one of OVERFLOWS
    expert_capacity: int | None = None  #: rows an expert takes from a call, at least 1, instead of capacity_factor
    scoring: str = "softmax"  #: one of SCORINGS
    score_before_topk: bool = True  #: False: experts are chosen by logits, and only the chosen are scored
    norm_topk_prob: bool = True  #: whether the weights of a token's experts are divided by their sum
    norm_eps: float = 0.0  #: >= 0: added to that sum
    routed_scaling_factor: float = 1.0  #: > 0: factor of the weights, after `norm_topk_prob`
    n_group: int = 1  #: groups of E / n_group neighbouring experts
    topk_group: int | None = None  #: groups that a token chooses first, from 1 to n_group; None: all
    group_score: str = "max"  #: one of GROUP_SCORES
    group_mask: str = "zero"  #: one of GROUP_MASKS
    logit_softcap: float | None = None  #: > 0: logits become cap * tanh(logit / cap)
    router_bias: bool = False  #: whether the router adds a bias (E,) to its logits
    selection_bias: bool = False  #: whether a bias (E,) is added to the scores for choosing, not for weighting

    def _check_routing(self):
        for name in ("input_dim", "num_experts", "top_k", "n_group"):
            self._set(name, _check.integer(name, getattr(self, name), 1))
        if self.capacity_factor is not None:
            rule = "a number above 0, or None for no limit"
            self._set("capacity_factor", _check.number("capacity_factor", self.capacity_factor, rule, lambda v: v > 0))
        if self.expert_capacity is not None:
            self._set("expert_capacity", _check.integer("expert_capacity", self.expert_capacity, 1))
            if self.capacity_factor is not None:
                _check.fail("capacity_factor", self.capacity_factor, "None beside expert_capacity")
        for name, choices in {
            "overflow": OVERFLOWS,
            "scoring": SCORINGS,
            "group_score": GROUP_SCORES,
            "group_mask": GROUP_MASKS,
        }.items():
            _check.choice(name, getattr(self, name), choices)
        self._check_booleans("score_before_topk", "norm_topk_prob", "router_bias", "selection_bias")
        self._number("norm_eps", "a finite number of at least 0", lambda v: v >= 0)
        self._number("routed_scaling_factor", "a finite number above 0", lambda v: v > 0)
        if self.logit_softcap is not None:
            self._number("logit_softcap", "a finite number above 0, or None", lambda v: v > 0)

    def _check_choice(self, experts):
        """What a token can choose of: `experts` as many as the router has logits."""
        if self.top_k > experts:
            _check.fail("top_k", self.top_k, f"at most num_experts, which is {experts}")
        if self.n_group > MOST_GROUPS:
            _check.fail("n_group", self.n_group, f"at most {MOST_GROUPS}")
        if experts % self.n_group:
            _check.fail("n_group", self.n_group, f"a divisor of num_experts, which is {experts}")
        size = experts // self.n_group
        if self.topk_group is not None:
            self._set("topk_group", _check.integer("topk_group", self.topk_group, 1))
            if self.topk_group > self.n_group:
                _check.fail("topk_group", self.topk_group, f"at most n_group, which is {self.n_group}")
            if self.top_k > self.topk_group * size:
                chosen = f"{self.topk_group} groups of {size}"
                _check.fail("top_k", self.top_k, f"at most the experts of topk_group groups, {chosen}")
        if self.n_group > 1 and self.group_score == "top2_sum" and size < 2:
            _check.fail("group_score", repr(self.group_score), "'max' where a group is a single expert")
        if self.n_group > 1 and not self.score_before_topk:
            _check.fail("score_before_topk", False, "True where experts are chosen by groups")

    def _check_booleans(self, *names):
        for name in names:
            if not isinstance(getattr(self, name), bool):
                _check.fail(name, repr(getattr(self, name)), "True or False")

    def _number(self, name, rule, accept):
        self._set(name, _check.float32_number(name, getattr(self, name), rule, accept))


@dataclass(frozen=True, repr=False)
class MoeConfig(_Routing):
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
    transposed: bool = field(default=False, kw_only=True)  #: experts' weights are stored [in, out], not [out, in]
    interleaved: bool = field(default=False, kw_only=True)  #: gate and up take turns along 2F, the gate first
    swiglu_limit: float | None = field(default=None, kw_only=True)  #: > 0: gate at most this, up within +- this
    swiglu_alpha: float = field(default=1.0, kw_only=True)  #: > 0: gate * sigmoid(alpha * gate)
    swiglu_beta: float = field(default=0.0, kw_only=True)  #: added to up
    apply_router_weight_on_input: bool = field(default=False, kw_only=True)  #: weights scale tokens, not outputs
    num_identity_experts: int = field(default=0, kw_only=True)  #: experts after the E that return the token
    shared_hidden_dim: int = field(default=0, kw_only=True)  #: width of the expert that every token meets; 0: none
    shared_gate: bool = field(default=False, kw_only=True)  #: whether a sigmoid gate weights the shared expert
    sparsemixer_eps: float | None = field(default=None, kw_only=True)  #: > 0: route by sparsemixer; see its router

    def __post_init__(self):
        self._check_routing()
        for name, least in {"hidden_dim": 1, "num_identity_experts": 0, "shared_hidden_dim": 0}.items():
            self._set(name, _check.integer(name, getattr(self, name), least))
        self._check_choice(self.num_experts + self.num_identity_experts)
        self._number("noise_std", "a finite number of at least 0", lambda v: v >= 0)
        _check.choice("activation", self.activation, ACTIVATIONS)
        _check.choice("dtype", self.dtype, DTYPES)
        self._check_booleans("bias", "transposed", "interleaved", "apply_router_weight_on_input", "shared_gate")
        if self.swiglu_limit is not None:
            self._number("swiglu_limit", "a finite number above 0, or None", lambda v: v > 0)
        self._number("swiglu_alpha", "a finite number above 0", lambda v: v > 0)
        self._number("swiglu_beta", "a finite number", lambda v: True)
        gating = (self.swiglu_limit, self.swiglu_alpha, self.swiglu_beta)
        if gating != (None, 1.0, 0.0) and self.activation != "swiglu":
            _check.fail("activation", repr(self.activation), "'swiglu' with swiglu_limit, swiglu_alpha or swiglu_beta")
        if self.interleaved and not ACTIVATIONS[self.activation].gated:
            _check.fail("interleaved", True, f"False with activation={self.activation!r}, which has no gate")
        if self.apply_router_weight_on_input and self.num_identity_experts:
            _check.fail("apply_router_weight_on_input", True, "False beside identity experts")
        if self.shared_gate and not self.shared_hidden_dim:
            _check.fail("shared_gate", True, "False without a shared expert (shared_hidden_dim=0)")
        if self.sparsemixer_eps is not None:
            self._number("sparsemixer_eps", "a finite number above 0, or None", lambda v: v > 0)
            if self.noise_std:
                _check.fail("noise_std", self.noise_std, "0 beside sparsemixer_eps, which routes without noise")
            self.router_config().check_sparsemixer()

    def __str__(self):
        """The layer in a line."""
        shape = f"{self.input_dim} -> {self.hidden_dim} -> {self.input_dim}"
        return f"{self.num_experts} experts, {self.top_k} per token, {shape}, {self.activation}, {self.dtype}"

    def router_config(self) -> "RouterConfig":
        """The part of the configuration that the router needs; its experts include the identity experts."""
        routing = {f.name: getattr(self, f.name) for f in fields(_Routing)}
        experts = self.num_experts + self.num_identity_experts
        return RouterConfig(self.input_dim, experts, self.top_k, self.capacity_factor, **routing)


@dataclass(frozen=True, repr=False)
class RouterConfig(_Routing):
    """Configuration of a router; the fields are those of MoeConfig."""

    input_dim: int
    num_experts: int
    top_k: int
    capacity_factor: float | None

    def __post_init__(self):
        self._check_routing()
        self._check_choice(self.num_experts)

    def check_sparsemixer(self) -> None:
        """Raise MoeValueError unless a SparseMixerRouter can be made of this: it has rules of its own."""
        plain = RouterConfig(self.input_dim, self.num_experts, self.top_k, None)
        for name, value in self.to_dict().items():
            if value != getattr(plain, name) and name != "norm_topk_prob":
                _check.fail(name, repr(value), f"{getattr(plain, name)!r} for a SparseMixerRouter")
