"""Model families: what the tensors of their MoE blocks are called, and what their configs mean.

A family is one entry of FAMILIES; docs/adding-a-family.md walks through one. Names are those of
published checkpoints, sources the blocks of Hugging Face transformers 5.23 and 5.24.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .errors import CheckpointError

#: What the names of a language model's tensors begin with: alone, or within a model for images and sound.
PREFIXES = ("model.", "model.language_model.", "language_model.model.", "backbone.", "thinker.model.", "")


class Key(NamedTuple):
    """A value of config.json: the first of `names` that is there, or the default."""

    names: tuple[str, ...]
    default: Any = None

    def read(self, config):
        for name in self.names:
            if config.get(name) is not None:
                return config[name]
        return self.default


def key(*names, default=None):
    """Key of names that mean the same."""
    return Key(names, default)


_ALWAYS = Key((), True)
_NUM_SHARED = key("n_shared_experts", "num_shared_experts", default=0)
_NUM_EXPERTS = key("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = key("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")
_INPUT_DIM = key("hidden_size", "d_model")
_HIDDEN_DIM = key("moe_intermediate_size", "intermediate_size")
_ACTIVATION = key("hidden_act", "hidden_activation", "activation", default="silu")


@dataclass(frozen=True)
class Stored:
    """Names of the experts' tensors below the block; `{e}` stands for an expert's number.

    up: both projections in one tensor, or the only one. gate: a tensor of its own. With `{e}` a
    tensor for each expert, otherwise one for all.
    """

    up: str
    down: str
    gate: str | None = None
    up_bias: str | None = None
    down_bias: str | None = None
    transposed: bool = False
    interleaved: bool = False


def _each(gate, up, down, path="experts.{e}.{}.weight"):
    return Stored(*(path.replace("{}", name) for name in (up, down)), gate=gate and path.replace("{}", gate))


_PACKED = Stored("experts.gate_up_proj", "experts.down_proj")
_PACKED_TRANSPOSED = replace(_PACKED, transposed=True)


@dataclass(frozen=True)
class Family:
    """The MoE block of a model. Names are below the block, those that begin with / beside it."""

    routing: Mapping[str, Any]  #: fields of MoeConfig: values, Keys, or functions of the model's config
    blocks: tuple[str, ...] = ("layers.{layer}.mlp",)  #: names of the block below one of PREFIXES
    router: str = "gate.weight"
    router_bias: str | None = None
    selection_bias: tuple[str, ...] = ()  #: names that it may have
    biased: Key = _ALWAYS  #: whether there is a selection bias, in a family that knows one
    #: Ways in which the experts may be stored: the first of which the tensors are there, and of their shapes.
    experts: tuple[Stored, ...] = (_each("gate_proj", "up_proj", "down_proj"), _PACKED)
    shared: tuple[Stored, ...] = ()  #: the same of the shared expert
    shared_gate: str | None = None
    num_shared: Key = _NUM_SHARED
    num_experts: Key = _NUM_EXPERTS
    top_k: Key = _TOP_K
    input_dim: Key = _INPUT_DIM
    hidden_dim: Key = _HIDDEN_DIM
    activation: Key = _ACTIVATION
    gated: bool = True
    #: Raises CheckpointError, or returns None, for configs that say something this table does not know.
    check: Any = None


_GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "relu": "reglu",
}
_PLAIN = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def activation_of(family, config) -> str:
    """Key of config.ACTIVATIONS for the activation that a model's config names."""
    name = family.activation.read(config)
    known = _GATED if family.gated else _PLAIN
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"config.json: the activation is {name!r}, but must be one of {', '.join(known)}")
    return known[name]


def _refuse(name, *allowed):
    """A check that config.json has one of these values under a name, or none."""

    def check(config):
        if config.get(name) is not None and config[name] not in allowed:
            allowed_text = " or ".join(map(repr, allowed)) or "null"
            raise CheckpointError(f"config.json: {name} is {config[name]!r}, but must be {allowed_text}")

    return check


# ---- routing ----

_SOFTMAX = {"norm_topk_prob": True}
_SOFTMAX_RAW = {"norm_topk_prob": False}
_SOFTMAX_OF_CHOSEN = {"score_before_topk": False}
_SIGMOID = {"scoring": "sigmoid", "norm_topk_prob": True}
#: DeepSeek-V3's router: modeling_deepseek_v3.py, DeepseekV3TopkRouter.
_DEEPSEEK_V3 = {
    "scoring": "sigmoid",
    "n_group": key("n_group", "num_expert_group", default=1),
    "topk_group": key("topk_group"),
    "group_score": "top2_sum",
    "group_mask": "-inf",
    "norm_topk_prob": key("norm_topk_prob", "moe_renormalize", default=True),
    "norm_eps": 1e-20,
    "routed_scaling_factor": key("routed_scaling_factor", default=1.0),
}
#: Its groups with the scores of Mixtral: modeling_mistral4.py, Mistral4TopkRouter.
_MISTRAL4 = _DEEPSEEK_V3 | {"scoring": "softmax", "group_mask": "zero"}


def _by_group(config):
    """DeepSeek-V2: whether groups are chosen before experts."""
    return config.get("topk_method") == "group_limited_greedy"


def _softmax_with(default):
    return {"norm_topk_prob": key("norm_topk_prob", default=default)}


# ---- tensors that several families share ----

_SHARED_EXPERT = (_each("gate_proj", "up_proj", "down_proj", "shared_expert.{}.weight"),)
_SHARED_EXPERTS = (_each("gate_proj", "up_proj", "down_proj", "shared_experts.{}.weight"),)
_SHARED_MLP = (_each("gate_proj", "up_proj", "down_proj", "shared_mlp.{}.weight"),)
_W123 = (_each("w1", "w3", "w2"), _PACKED)
_SPARSE_BLOCKS = ("layers.{layer}.block_sparse_moe", "layers.{layer}.mlp")
_ONE_SHARED = Key((), 1)

_QWEN = Family(_softmax_with(False))
_QWEN_SHARED = replace(_QWEN, shared=_SHARED_EXPERT, shared_gate="shared_expert_gate.weight", num_shared=_ONE_SHARED)
_DEEPSEEK = Family(_DEEPSEEK_V3, selection_bias=("gate.e_score_correction_bias",), shared=_SHARED_EXPERTS)
_MIXTRAL = Family(_SOFTMAX, blocks=_SPARSE_BLOCKS, experts=_W123)
_GRANITE = Family(
    _SOFTMAX_OF_CHOSEN,
    blocks=("layers.{layer}.block_sparse_moe",),
    router="router.layer.weight",
    experts=(Stored("input_linear.weight", "output_linear.weight"),),
    hidden_dim=key("intermediate_size"),
)
_GRANITE_SHARED = replace(
    _GRANITE,
    shared=(Stored("/shared_mlp.input_linear.weight", "/shared_mlp.output_linear.weight"),),
    num_shared=key("shared_intermediate_size", default=0),
)
_PACKED_BIASED = replace(_PACKED_TRANSPOSED, up_bias="experts.gate_up_proj_bias", down_bias="experts.down_proj_bias")
_CLAMPED = {
    "swiglu_limit": key("swiglu_limit", default=7.0),
    "swiglu_alpha": key("swiglu_alpha", default=1.702),
    "swiglu_beta": 1.0,
}
_GPT_OSS = Family(
    _SOFTMAX_OF_CHOSEN | _CLAMPED,
    router="router.weight",
    router_bias="router.bias",
    experts=(_PACKED_BIASED,),
    hidden_dim=key("intermediate_size"),
    activation=Key((), "silu"),  # whatever hidden_act says
)

#: Every family by the model_type in its config.json.
FAMILIES: dict[str, Family] = {
    "mixtral": _MIXTRAL,
    "minimax": _MIXTRAL,
    "minimax_m2": replace(
        _MIXTRAL,
        routing=_SIGMOID,
        selection_bias=("e_score_correction_bias",),
    ),
    "phimoe": replace(_MIXTRAL, routing={"sparsemixer_eps": key("router_jitter_noise", default=0.01)}),
    "qwen2_moe": _QWEN_SHARED,
    "qwen3_moe": _QWEN,
    "qwen3_next": replace(_QWEN_SHARED, routing=_softmax_with(True)),
    "qwen3_5_moe": replace(_QWEN_SHARED, routing=_SOFTMAX),
    "qwen3_vl_moe": replace(_QWEN, routing=_SOFTMAX, experts=(_PACKED_TRANSPOSED, _PACKED)),
    "qwen3_omni_moe_text": replace(_QWEN, routing=_softmax_with(True)),
    "qwen4_exp_text": replace(_QWEN_SHARED, routing=_softmax_with(True)),
    "lara_mini": Family(_softmax_with(True), shared=_SHARED_EXPERT, num_shared=_ONE_SHARED),
    "flint": Family(
        _SIGMOID | {"norm_topk_prob": key("norm_topk_prob", default=True)},
        shared=_SHARED_EXPERT,
        num_shared=_ONE_SHARED,
    ),
    "olmoe": replace(_QWEN, hidden_dim=key("intermediate_size")),
    "flex_olmo": replace(_QWEN, hidden_dim=key("intermediate_size")),
    "mellum": replace(_QWEN, routing=_softmax_with(True)),
    "deepseek_v2": Family(
        {
            "norm_topk_prob": False,
            "routed_scaling_factor": key("routed_scaling_factor", default=1.0),
            "n_group": lambda config: config.get("n_group", 1) if _by_group(config) else 1,
            "topk_group": lambda config: config.get("topk_group") if _by_group(config) else None,
        },
        shared=_SHARED_EXPERTS,
        check=_refuse("topk_method", "greedy", "group_limited_greedy"),
    ),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "kimi_linear": replace(_DEEPSEEK, blocks=_SPARSE_BLOCKS, experts=_W123, num_experts=key("num_experts")),
    "axk2": replace(_DEEPSEEK, routing=_DEEPSEEK_V3 | {"group_mask": "zero"}),
    "bailing_hybrid": replace(_DEEPSEEK, selection_bias=("gate.expert_bias",), num_experts=key("num_experts")),
    "beam": replace(_DEEPSEEK, shared=()),
    "dots3_note_text": _DEEPSEEK,
    "glm5_next_text": replace(_DEEPSEEK, routing=_DEEPSEEK_V3 | {"swiglu_limit": key("swiglu_limit", default=10.0)}),
    "mistral4": Family(_MISTRAL4, shared=_SHARED_EXPERTS),
    "mistral_large4_text": Family(
        _MISTRAL4 | {"norm_topk_prob": True},
        blocks=("layers.{layer}.experts",),
        router="/gate.weight",
        experts=(_each("w1", "w3", "w2", "{e}.{}.weight"),),
        shared=(_each("gate_proj", "up_proj", "down_proj", "/shared_experts.{}.weight"),),
    ),
    "kolibri1": Family(
        {"scoring": "sigmoid", "score_before_topk": False, "norm_topk_prob": key("norm_topk_prob", default=False)},
        selection_bias=("/moe.router.expert_bias",),
        shared=_SHARED_EXPERTS,
        num_shared=_ONE_SHARED,
    ),
    "glm4_moe": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK,
    "glm4v_moe": _DEEPSEEK,
    "glm_moe_dsa": _DEEPSEEK,
    "dots1": replace(_DEEPSEEK, routing=_DEEPSEEK_V3 | {"norm_topk_prob": key("norm_topk_prob", default=False)}),
    "solar_open": _DEEPSEEK,
    "exaone_moe": replace(_DEEPSEEK, selection_bias=("e_score_correction_bias",)),
    "mimo_v2_flash": replace(_DEEPSEEK, shared=()),
    "nemotron_h": replace(
        _DEEPSEEK,
        blocks=("layers.{layer}.mixer",),
        experts=(_each(None, "up_proj", "down_proj"), Stored("experts.up_proj", "experts.down_proj")),
        shared=(_each(None, "up_proj", "down_proj", "shared_experts.{}.weight"),),
        activation=key("mlp_hidden_act", default="relu2"),
        gated=False,
        check=_refuse("moe_latent_size"),
    ),
    "deepseek_v4": Family(
        {
            "scoring": key("scoring_func", default="sqrtsoftplus"),
            "norm_eps": 1e-20,
            "routed_scaling_factor": key("routed_scaling_factor", default=1.5),
            "swiglu_limit": key("swiglu_limit", default=10.0),
        },
        blocks=("layers.{layer}.ffn", "layers.{layer}.mlp"),
        selection_bias=("gate.bias",),
        experts=_W123,
        shared=(_each("w1", "w3", "w2", "shared_experts.{}.weight"),),
    ),
    "longcat_flash": Family(
        {
            "norm_topk_prob": False,
            "routed_scaling_factor": key("routed_scaling_factor", default=6.0),
            "num_identity_experts": key("zero_expert_num", default=0),
        },
        router="router.classifier.weight",
        selection_bias=("router.e_score_correction_bias",),
        num_experts=key("n_routed_experts"),
        hidden_dim=key("expert_ffn_hidden_size"),
        top_k=key("moe_topk", "num_experts_per_tok"),
    ),
    "gpt_oss": replace(_GPT_OSS, experts=(replace(_PACKED_BIASED, interleaved=True),)),
    "openai_privacy_filter": _GPT_OSS,
    "minimax_m3_vl": Family(
        _SIGMOID | _CLAMPED | {"routed_scaling_factor": key("routed_scaling_factor", default=1.0)},
        blocks=_SPARSE_BLOCKS,
        selection_bias=("e_score_correction_bias", "gate.e_score_correction_bias"),
        experts=_W123,
        shared=(
            *_SHARED_EXPERTS,
            Stored("shared_experts.gate_up_proj.weight", "shared_experts.down_proj.weight"),
        ),
        num_shared=_ONE_SHARED,
        hidden_dim=key("intermediate_size"),
        activation=Key((), "silu"),
    ),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE_SHARED,
    "granitemoehybrid": _GRANITE_SHARED,
    "granitemoe_swa": replace(_GRANITE_SHARED, router="router.weight", experts=(_PACKED,)),
    "jamba": replace(
        _QWEN,
        routing=_SOFTMAX_RAW,
        blocks=("layers.{layer}.feed_forward",),
        router="router.weight",
        hidden_dim=key("intermediate_size"),
    ),
    "llama4": Family(
        {
            "scoring": "sigmoid",
            "score_before_topk": False,
            "norm_topk_prob": False,
            "apply_router_weight_on_input": True,
        },
        blocks=("layers.{layer}.feed_forward",),
        router="router.weight",
        experts=(_PACKED_TRANSPOSED,),
        shared=_SHARED_EXPERT,
        num_shared=_ONE_SHARED,
        hidden_dim=key("intermediate_size"),
    ),
    "aria_text": Family(
        _SOFTMAX_OF_CHOSEN,
        router="router.weight",
        experts=(Stored("experts.fc1.weight", "experts.fc2.weight", transposed=True),),
        shared=_SHARED_EXPERTS,
        num_shared=key("moe_num_shared_experts", default=2),
        hidden_dim=key("intermediate_size"),
        check=_refuse("hidden_act", "silu"),  # which the routed experts have in any case, the shared ones only then
    ),
    "ernie4_5_moe": Family(
        _SOFTMAX,
        selection_bias=("moe_statics.e_score_correction_bias",),
        shared=_SHARED_EXPERTS,
        num_shared=key("moe_num_shared_experts", default=2),
        check=_refuse("moe_norm_min", 1e-12),  # least sum of the weights; none is that small
    ),
    "hunyuan_v1_moe": Family(
        _SOFTMAX,
        router="gate.wg.weight",
        shared=_SHARED_MLP,
        num_shared=_ONE_SHARED,
    ),
    "hy_v3": Family(
        _SIGMOID | {"norm_eps": 1e-20, "routed_scaling_factor": key("router_scaling_factor", default=1.0)},
        router="router.gate.weight",
        selection_bias=("expert_bias",),
        shared=_SHARED_MLP,
    ),
    "lfm2_moe": Family(
        {
            "scoring": "sigmoid",
            "norm_topk_prob": key("norm_topk_prob", default=True),
            "norm_eps": 1e-6,
            "routed_scaling_factor": key("routed_scaling_factor", default=1.0),
        },
        blocks=("layers.{layer}.feed_forward",),
        selection_bias=("expert_bias",),
        biased=key("use_expert_bias", default=True),
        experts=_W123,
    ),
    "afmoe": Family(
        _SIGMOID | {"norm_eps": 1e-20, "routed_scaling_factor": key("route_scale", default=1.0)},
        router="router.gate.weight",
        selection_bias=("expert_bias",),
        shared=_SHARED_EXPERTS,
    ),
    "laguna": Family(
        _SIGMOID
        | {
            "logit_softcap": lambda config: config.get("moe_router_logit_softcapping") or None,
            "routed_scaling_factor": key("moe_routed_scaling_factor", default=1.0),
        },
        selection_bias=("experts.e_score_correction_bias",),
        shared=_SHARED_EXPERT,
        num_shared=_ONE_SHARED,
    ),
    "cohere2_moe": Family(
        {
            "scoring": key("expert_selection_fn", default="softmax"),
            "score_before_topk": False,
            "norm_topk_prob": key("norm_topk_prob", default=True),
        },
        shared=_SHARED_EXPERTS,
        hidden_dim=key("intermediate_size"),
        check=_refuse("shared_expert_combination_strategy", "sum"),
    ),
    "switch_transformers": Family(
        {
            "norm_topk_prob": False,
            "capacity_factor": None,
            "expert_capacity": key("expert_capacity", default=64),
            "overflow": "drop",
        },
        blocks=("encoder.block.{layer}.layer.1.mlp", "decoder.block.{layer}.layer.2.mlp"),
        router="router.classifier.weight",
        experts=(_each(None, "wi", "wo", "experts.expert_{e}.{}.weight"),),
        top_k=Key((), 1),
        hidden_dim=key("d_ff"),
        activation=key("dense_act_fn", default="relu"),
        gated=False,
        check=_refuse("router_bias", False),
    ),
}
#: The language models of models for text and images, which have a config of their own.
FAMILIES |= {
    f"{name}_text": FAMILIES[name] for name in ("llama4", "qwen3_5_moe", "qwen3_vl_moe", "glm4v_moe", "minimax_m3_vl")
}
