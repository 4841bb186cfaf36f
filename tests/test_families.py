"""Every family's block from its checkpoint against the block of Hugging Face transformers itself."""

import contextlib
import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models of the families are built with torch: pip install torch")
transformers = pytest.importorskip("transformers", reason="pip install transformers, after torch")

from helpers import random_array  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from moe_numba import CheckpointError, MoeLayer, list_moe_layers  # noqa: E402
from moe_numba.families import FAMILIES  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of torch and transformers

SIZES = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
FEW = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
ROUTED = {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3}
GROUPS = {**ROUTED, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
ONE_DENSE = {"first_k_dense_replace": 1}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 40,
}
#: A tower for images, of which nothing is compared.
VISION = {
    "depth": 1,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 8,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
}
#: What to build: (model_type, arguments of its config).
MODELS = {
    "mixtral": LOCAL,
    "minimax": LOCAL,
    "minimax_m2": LOCAL,
    "phimoe": LOCAL,
    "qwen2_moe": {**FEW, "shared_expert_intermediate_size": 40, "norm_topk_prob": False},
    "qwen3_moe": {**FEW, "norm_topk_prob": True},
    "qwen3_next": {**FEW, **LINEAR},
    "qwen3_5_moe_text": {**FEW, **LINEAR},
    "olmoe": FEW,
    "flex_olmo": FEW,
    "mellum": FEW,
    "deepseek_v2": {**GROUPS, **LATENT, **ONE_DENSE, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**GROUPS, **LATENT, **ONE_DENSE},
    "glm4_moe": {**ROUTED, **ONE_DENSE, "n_shared_experts": 1, "routed_scaling_factor": 1.5},
    "glm4_moe_lite": {**GROUPS, **LATENT, **ONE_DENSE},
    "glm_moe_dsa": {**GROUPS, **LATENT, **ONE_DENSE},
    "dots1": {**ROUTED, **ONE_DENSE, "n_shared_experts": 2, "norm_topk_prob": True},
    "solar_open": {**ROUTED, "n_shared_experts": 1},
    "exaone_moe": {**FEW, **ONE_DENSE, "num_shared_experts": 1},
    "mimo_v2_flash": ROUTED,
    "nemotron_h": {
        **ROUTED,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 40,
        "layers_block_type": ["attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
    },
    "deepseek_v4": {**ROUTED, "n_shared_experts": 1, "mlp_layer_types": ["moe", "moe"]},
    "longcat_flash": {
        **GROUPS,
        **LATENT,
        "zero_expert_num": 2,
        "moe_topk": 3,
        "expert_ffn_hidden_size": 24,
        "ffn_hidden_size": 48,
        "num_layers": 1,
    },
    "gpt_oss": LOCAL,
    "minimax_m3_vl_text": {**LOCAL, "shared_intermediate_size": 40},
    "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 40},
    "jamba": {
        **FEW,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "llama4_text": {**LOCAL, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2},
    "ernie4_5_moe": {
        "moe_intermediate_size": 24,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {**FEW, "num_shared_experts": 1},
    "lfm2_moe": {**FEW, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2},
    "afmoe": {**FEW, "num_shared_experts": 1, "num_dense_layers": 1},
    "laguna": {**FEW, "shared_expert_intermediate_size": 40, "moe_router_logit_softcapping": 2.0},
    "cohere2_moe": {**FEW, "num_shared_experts": 1, "shared_expert_combination_strategy": "sum"},
    "deepseek_v32": {**GROUPS, **LATENT, **ONE_DENSE},
    "kimi_linear": {
        **GROUPS,
        **LATENT,
        **ONE_DENSE,
        "num_experts": 8,
        "num_experts_per_token": 3,
        "num_expert_group": 4,
        "num_shared_experts": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "axk2": {**GROUPS, **LATENT, **ONE_DENSE},
    "bailing_hybrid": {**GROUPS, **LATENT, **ONE_DENSE, "num_experts": 8},
    "beam": {**GROUPS, "num_experts": 8, "mlp_layer_types": ["sparse"] * 2},
    "dots3_note_text": {**GROUPS, **LATENT, **ONE_DENSE, "shared_experts_intermediate_size": 20},
    "glm5_next_text": {**GROUPS, **LATENT, "qk_rope_head_dim": 0, "mlp_layer_types": ["sparse"] * 2},
    "mistral4": {**GROUPS, **LATENT, **ONE_DENSE},
    "mistral_large4_text": {**GROUPS, **LATENT, **ONE_DENSE},
    "kolibri1": {**ROUTED, "num_experts": 8, "shared_expert_intermediate_size": 40},
    "flint": {**FEW, "shared_expert_intermediate_size": 40, "num_hidden_layers": 3},
    "lara_mini": {**FEW, "shared_expert_intermediate_size": 40},
    "qwen4_exp_text": {**FEW, **LINEAR},
    "granitemoehybrid": {
        **LOCAL,
        "shared_intermediate_size": 40,
        "layer_types": ["attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
    },
    "granitemoe_swa": {**LOCAL, "shared_intermediate_size": 40},
    "openai_privacy_filter": LOCAL,
    # As base models, whose tensors' names do not begin with "model.", and within models for images.
    "glm4v_moe_text": {**ROUTED, **ONE_DENSE, "n_shared_experts": 1},
    "qwen3_vl_moe_text": FEW,
    "qwen3_vl_moe": {
        "text_config": {**FEW, "rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        "vision_config": VISION,
    },
    "qwen3_omni_moe_thinker": {
        "text_config": FEW,
        "vision_config": VISION,
        "audio_config": {"encoder_layers": 1, "d_model": 16, "encoder_attention_heads": 2, "encoder_ffn_dim": 16},
    },
    "qwen3_5_moe": {"text_config": {**FEW, **LINEAR}, "vision_config": VISION},
    "glm4v_moe": {"text_config": {**ROUTED, **ONE_DENSE, "n_shared_experts": 1}, "vision_config": VISION},
    "minimax_m3_vl": {"text_config": {**LOCAL, "shared_intermediate_size": 40}, "vision_config": VISION},
    "llama4": {
        "text_config": {**LOCAL, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
        "vision_config": {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_experts": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 9,
    },
}
TOKENS = 60


def build(model_type, dtype="float32", **changes):
    """A model of which every parameter and buffer that a checkpoint holds is random."""
    model = _model_class(model_type)(_config(model_type, changes)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and "inv_freq" not in name:
                value.normal_(0, 0.2)
    return model.to(getattr(torch, dtype))


def _config(model_type, changes):
    """changes: arguments of the config of the language model."""
    sizes = {"vocab_size": 64} if model_type == "switch_transformers" else SIZES
    values = MODELS[model_type]
    if "text_config" in values:
        values = values | {"text_config": SIZES | values["text_config"] | changes}
    else:
        values = sizes | values | changes
    return transformers.AutoConfig.for_model(model_type, **values)


def _model_class(model_type):
    if model_type == "switch_transformers":
        return transformers.AutoModelForSeq2SeqLM.from_config
    if model_type == "qwen3_omni_moe_thinker":
        return transformers.Qwen3OmniMoeThinkerForConditionalGeneration._from_config
    if "vision_config" in MODELS[model_type]:
        return transformers.AutoModelForImageTextToText.from_config
    base_only = (
        "glm5_next_text",
        "mistral4",
        "mistral_large4_text",
        "openai_privacy_filter",
        "glm4v_moe_text",
        "qwen3_vl_moe_text",
    )
    return (transformers.AutoModel if model_type in base_only else transformers.AutoModelForCausalLM).from_config


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Model and directory of each (model type, dtype), built once."""
    known = {}

    def get(model_type, dtype="float32"):
        if (model_type, dtype) not in known:
            model, path = build(model_type, dtype), tmp_path_factory.mktemp(model_type)
            model.save_pretrained(path, max_shard_size="20KB")
            known[model_type, dtype] = model, path
        return known[model_type, dtype]

    return get


def own_block(model, layer):
    """The modules whose outputs add up to the block."""
    modules = dict(model.named_modules())
    stack, _, number = str(layer).rpartition(".")
    for name, module in modules.items():
        in_layer = re.fullmatch(rf"{stack or '.*'}.*(layers|block)\.{number}(\.layer\.\d)?\.\w+", name)
        if in_layer and hasattr(module, "experts"):
            beside = modules.get(f"{name.rpartition('.')[0]}.shared_mlp")
            return [module, *([beside] if beside is not None else [])]
    raise AssertionError(f"no block {layer}")


def own_forward(model, layer, x):
    """(output (T, H) float32, chosen experts (T, K) or None) of transformers' own block."""
    block, *beside = own_block(model, layer)
    chosen = []
    hook = block.experts.register_forward_pre_hook(
        lambda module, args, kwargs: chosen.extend(
            a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and not a.is_floating_point()
        ),
        with_kwargs=True,
    )
    x = torch.from_numpy(x)[None].to(next(block.parameters()).dtype)
    with torch.no_grad():
        outputs = [module(x) for module in (block, *beside)]
    hook.remove()
    y = sum(o[0] if isinstance(o, tuple) else o for o in outputs)
    return y.reshape(x.shape[1:]).float().numpy(), (chosen[0].numpy() if chosen else None)


def assert_same_experts(ours, theirs):
    """As sets: the order of equal weights is not defined there."""
    np.testing.assert_array_equal(np.sort(ours, axis=1), np.sort(theirs, axis=1))


@pytest.mark.parametrize("model_type", MODELS)
def test_float32(built, rng, model_type):
    model, path = built(model_type)
    layers = list_moe_layers(path)
    assert layers
    for number in layers:
        layer = MoeLayer.from_pretrained(path, number)
        assert layer.config.dtype == "float32"
        x = random_array(rng, TOKENS, 32)
        expected, chosen = own_forward(model, number, x)
        y, routing = layer(x)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        if chosen is not None and chosen.ndim == 2:
            assert_same_experts(routing.expert_indices, chosen)


#: Sizes that fill no vector, many experts, other flags; inputs so large that every limit is met.
VARIANTS = [
    ("mixtral", {"num_local_experts": 70, "num_experts_per_tok": 7, "intermediate_size": 33, "hidden_act": "gelu"}),
    ("olmoe", {"num_experts": 31, "num_experts_per_tok": 1, "intermediate_size": 7, "norm_topk_prob": True}),
    ("qwen2_moe", {"num_experts": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 23, "norm_topk_prob": True}),
    ("deepseek_v2", {"topk_method": "greedy", "n_shared_experts": 1}),
    ("deepseek_v3", {"n_routed_experts": 64, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 3}),
    ("deepseek_v3", {"norm_topk_prob": False, "n_shared_experts": 3, "moe_intermediate_size": 7}),
    ("dots1", {"norm_topk_prob": False, "n_group": 2, "topk_group": 1}),
    ("axk2", {"n_group": None, "topk_group": None}),
    ("phimoe", {"num_local_experts": 16, "router_jitter_noise": 0.05}),
    ("gpt_oss", {"hidden_act": "gelu", "swiglu_alpha": 1.0, "swiglu_limit": 0.5, "intermediate_size": 63}),
    ("deepseek_v4", {"swiglu_limit": 0.5, "scoring_func": "sigmoid"}),
    ("minimax_m3_vl_text", {"swiglu_limit": 0.5}),
    ("glm5_next_text", {"swiglu_limit": 0.5}),
    ("longcat_flash", {"zero_expert_num": 5}),
    ("lfm2_moe", {"use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 0.7}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    ("laguna", {"moe_router_logit_softcapping": 0.0, "moe_routed_scaling_factor": 2.5}),
    ("nemotron_h", {"mlp_hidden_act": "silu", "n_shared_experts": 2}),
    ("switch_transformers", {"expert_capacity": 1, "num_experts": 2}),
]


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=lambda value: value if type(value) is str else "")
def test_other_configs(rng, tmp_path, model_type, changes):
    model = build(model_type, **changes)
    if any(hasattr(module, "_is_expert_parallel") for module in model.modules()):
        model.set_experts_implementation("eager")  # grouped_mm does not take widths such as 7
    model.save_pretrained(tmp_path)
    number = list_moe_layers(tmp_path)[-1]
    layer = MoeLayer.from_pretrained(tmp_path, number)
    x = 3 * random_array(rng, TOKENS, 32)
    expected, chosen = own_forward(model, number, x)
    y, routing = layer(x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    if chosen is not None and chosen.ndim == 2:
        assert_same_experts(routing.expert_indices, chosen)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "qwen2_moe", "gpt_oss", "nemotron_h", "granitemoeshared"])
def test_broken_checkpoints_are_refused(built, tmp_path, model_type):
    """Whatever is missing, of another shape or no number: CheckpointError, or a layer that works."""
    _, path = built(model_type)
    number = list_moe_layers(path)[-1]
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    config = json.loads((path / "config.json").read_text())

    def attempt(config=config, tensors=tensors):
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "model.safetensors")
        layer = MoeLayer.from_pretrained(tmp_path, number)
        layer(np.zeros((2, layer.config.input_dim), np.float32))

    attempt()
    about = ("expert", "group", "hidden", "intermediate", "scaling", "limit", "act", "norm_topk", "topk_method")
    for name in [name for name in config if any(word in name for word in about)]:
        others = [config | {name: value} for value in (None, [1], {}, "x", -1, 0, 1.5)]
        for changed in [*others, {key: value for key, value in config.items() if key != name}]:
            with contextlib.suppress(CheckpointError):
                attempt(changed)
    block = [name for name in tensors if re.search(rf"layers\.{number}\.(mlp|mixer|block_sparse_moe|shared_mlp)", name)]
    assert block
    for name in block:
        array = tensors[name]
        for wrong in (array.reshape(-1, 1), array[..., :-1].copy(), np.array(0, "f"), np.zeros((0, 4), "f")):
            with pytest.raises(CheckpointError, match="tensor"):
                attempt(tensors=tensors | {name: wrong})
        is_granites_router = model_type == "granitemoeshared" and "router" in name  # its experts have other names
        with pytest.raises(CheckpointError, match="is no Mixture" if is_granites_router else re.escape(name)):
            attempt(tensors={other: array for other, array in tensors.items() if other != name})


@pytest.mark.parametrize("model_type", MODELS)
def test_bfloat16(built, rng, model_type):
    model, path = built(model_type, "bfloat16")
    number = list_moe_layers(path)[-1]
    layer = MoeLayer.from_pretrained(path, number)
    assert layer.config.dtype == "bfloat16"
    x = random_array(rng, TOKENS, 32)
    x = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    expected, _ = own_forward(model, number, x)
    y, _ = layer(x)
    # Their logits are rounded to bfloat16, so a few tokens choose other experts.
    error = np.abs(y - expected).max(axis=1) / np.abs(expected).max()
    assert np.median(error) < 2**-7
    assert np.mean(error < 2**-5) > 0.8


def test_every_family_is_compared():
    within = {"qwen3_omni_moe_thinker": "qwen3_omni_moe_text"}  # a model, and the family of its language model
    assert set(FAMILIES) == {within.get(name, name) for name in MODELS}


def test_a_config_for_text_within_another(built, rng, tmp_path):
    model, path = built("llama4_text")
    for file in path.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": config}))
    x = random_array(rng, 5, 32)
    expected, _ = own_forward(model, 1, x)
    np.testing.assert_allclose(MoeLayer.from_pretrained(tmp_path, 1)(x)[0], expected, rtol=1e-4, atol=1e-5)
