"""The plug-in for Hugging Face transformers against transformers' own implementations."""

import copy
import io
import logging

import pytest

torch = pytest.importorskip("torch", reason="the plug-in is for torch: pip install torch")
transformers = pytest.importorskip("transformers", reason="pip install transformers, after torch")

from helpers import run_python  # noqa: E402
from test_families import build  # noqa: E402

from moe_numba.integrations import transformers as plugin  # noqa: E402

plugin.register()

pytestmark = pytest.mark.filterwarnings("ignore")  # those of torch and transformers

#: Models whose experts differ: plain, shared beside, groups, transposed with biases, clamped gates, no gate.
MODEL_TYPES = [
    "olmoe",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "deepseek_v4",
    "minimax_m3_vl_text",
    "nemotron_h",
    "aria_text",
    "granitemoe",
    "phimoe",
]


@pytest.fixture(autouse=True)
def warnings_again(caplog):
    plugin._said.clear()
    caplog.set_level(logging.WARNING)


def said(caplog):
    """What the plug-in said; transformers has things to say about the small models too."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("moe_numba")]


def model_of(model_type, dtype="float32", implementation="moe_numba"):
    model = build(model_type, dtype)
    model.set_experts_implementation(implementation)
    return model


def experts_module(model):
    return next(m for m in model.modules() if hasattr(m, "_is_expert_parallel"))


def call(module, tokens=19, top_k=2, seed=0):
    """Inputs of an experts module."""
    torch.manual_seed(seed)
    h = module.down_proj.shape[2 if module.is_transposed else 1]
    indices = torch.stack([torch.randperm(module.num_experts)[:top_k] for _ in range(tokens)])
    return torch.randn(tokens, h).to(module.down_proj.dtype), indices.reshape(tokens, top_k), torch.rand(tokens, top_k)


def both(module, *args):
    """(ours, eager) on the same inputs."""
    results = []
    for name in ("moe_numba", "eager"):
        module.config._experts_implementation = name
        with torch.no_grad():
            results.append(module(*args))
    module.config._experts_implementation = "moe_numba"
    return results


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts(caplog, model_type, dtype):
    module = experts_module(model_of(model_type, dtype))
    for tokens in (1, 19, 200):
        args = call(module, tokens)
        ours, eager = both(module, *args)
        assert ours.dtype == eager.dtype == args[0].dtype
        tolerance = 1e-5 if dtype == "float32" else 2**-6
        assert (ours - eager).abs().max() <= tolerance * eager.abs().max()
    assert not said(caplog)


@pytest.mark.parametrize("model_type", [*MODEL_TYPES[:5], "minimax_m3_vl_text", "nemotron_h", "aria_text"])
def test_generates_the_same_tokens(model_type):
    model = model_of(model_type)
    torch.manual_seed(1)
    prompt = torch.randint(1, 64, (2, 7))
    texts = []
    for name in ("moe_numba", "eager"):
        model.set_experts_implementation(name)
        options = {"do_sample": False, "max_new_tokens": 64, "min_new_tokens": 64, "pad_token_id": 0}
        texts.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **options))
    assert texts[0].shape == (2, 71)
    assert torch.equal(*texts)


def test_from_pretrained_knows_the_name(tmp_path):
    build("olmoe").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_numba")
    assert "moe_numba" in str(model.get_experts_implementation())
    with torch.no_grad():
        logits = model(torch.arange(1, 9)[None]).logits
        model.set_experts_implementation("eager")
        expected = model(torch.arange(1, 9)[None]).logits
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_weights_are_torchs_own_memory(model_type, dtype):
    module = experts_module(model_of(model_type, dtype))
    both(module, *call(module))
    experts = plugin._experts_of(module)
    for array, parameter in ((experts.up, module.gate_up_proj), (experts.down, module.down_proj)):
        assert array.ctypes.data == parameter.data_ptr()
        assert array.nbytes == parameter.nbytes


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_changed_and_replaced_weights_are_noticed(model_type):
    module = experts_module(model_of(model_type, "bfloat16"))
    args = call(module)
    before, _ = both(module, *args)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    ours, eager = both(module, *args)
    assert not torch.equal(ours, before)
    assert (ours - eager).abs().max() <= 2**-6 * eager.abs().max()
    module.float()
    args = (args[0].float(), *args[1:])
    ours, eager = both(module, *args)
    assert (ours - eager).abs().max() <= 1e-5 * eager.abs().max()


def test_models_built_in_inference_mode():
    with torch.inference_mode():
        module = experts_module(model_of("gpt_oss", "bfloat16"))
        ours, eager = both(module, *call(module))
        assert (ours - eager).abs().max() <= 2**-6 * eager.abs().max()


def test_models_can_be_copied_and_saved():
    model = model_of("olmoe")
    module = experts_module(model)
    args = call(module)
    ours, _ = both(module, *args)
    other = experts_module(copy.deepcopy(model))
    assert torch.equal(both(other, *args)[0], ours)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert set(model.state_dict()) == set(build("olmoe").state_dict())


def assert_falls_back(caplog, module, args, reason):
    module.config._experts_implementation = "moe_numba"
    for _ in range(3):
        result = module(*args)
    messages = said(caplog)
    assert len(messages) == 1
    assert reason in messages[0]
    module.config._experts_implementation = "grouped_mm"
    assert torch.equal(result, module(*args))
    return result


def test_gradients_are_transformers_own(caplog):
    module = experts_module(model_of("olmoe"))
    x, indices, weights = call(module)
    x.requires_grad_()
    result = assert_falls_back(caplog, module, (x, indices, weights), "gradients")
    result.sum().backward()
    assert x.grad.abs().sum() > 0
    assert module.down_proj.grad.abs().sum() > 0


def test_other_dtypes_fall_back(caplog):
    module = experts_module(model_of("olmoe")).half()
    with torch.no_grad():
        assert_falls_back(caplog, module, call(module), "float16")


def test_norms_of_experts_fall_back(caplog):
    module = experts_module(model_of("olmoe"))
    module.has_post_expert_norm = True
    module.post_expert_norm = torch.nn.RMSNorm(32)
    with torch.no_grad():
        assert_falls_back(caplog, module, call(module), "normalised")


def test_unknown_gates_fall_back(caplog):
    module = experts_module(model_of("olmoe"))
    module._apply_gate = lambda x: x.chunk(2, dim=-1)[0].sin()
    with torch.no_grad():
        assert_falls_back(caplog, module, call(module), "activation")


@pytest.mark.parametrize("limit", [7.0, 30.0, 1000.0])
def test_limits_are_recognised_however_large(limit):
    module = experts_module(model_of("olmoe"))
    module.limit = limit
    silu = torch.nn.functional.silu

    def clamped(x):
        gate, up = x.chunk(2, dim=-1)
        return silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    module._apply_gate = clamped
    expected = {"swiglu_limit": limit, "swiglu_alpha": 1.0, "swiglu_beta": 0.0}
    assert plugin._recognise_gate(module) == ("swiglu", expected)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activations_are_recognised(caplog, activation):
    module = experts_module(model_of("olmoe"))
    module.act_fn = transformers.activations.ACT2FN[activation]
    ours, eager = both(module, *call(module))
    assert (ours - eager).abs().max() <= 1e-5 * eager.abs().max()
    assert not said(caplog)


def test_experts_of_other_processes_add_nothing():
    module = experts_module(model_of("olmoe"))
    module._is_expert_parallel = True
    x, indices, weights = call(module, 40)
    elsewhere = torch.rand(indices.shape) < 0.5
    ours, _ = both(module, x, torch.where(elsewhere, module.num_experts, indices), weights)
    expected, _ = both(module, x, indices, torch.where(elsewhere, 0.0, weights))
    assert torch.allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_tokens_and_strided_tokens(dtype):
    module = experts_module(model_of("olmoe", dtype))
    x, indices, weights = call(module, 20)
    empty, _ = both(module, x[:0], indices[:0], weights[:0])
    assert empty.shape == (0, 32)
    ours, eager = both(module, x.T.contiguous().T, indices, weights)
    assert (ours - eager).abs().max() <= 2**-6 * eager.abs().max()


def test_results_do_not_depend_on_the_batch():
    module = experts_module(model_of("olmoe", "bfloat16"))
    args = call(module, 30)
    together, _ = both(module, *args)
    for t in range(30):
        alone, _ = both(module, *(a[t : t + 1] for a in args))
        assert torch.equal(alone[0], together[t])


def test_importing_the_package_does_not_import_torch():
    printed, _ = run_python("import sys, moe_numba; print('torch' in sys.modules)")
    assert printed.strip() == "False"
