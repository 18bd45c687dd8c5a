"""The replaced layers against the modules' own: values and gradients; what only looks known stays as it was."""

import copy
import inspect
import os

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from test_sampler import MODELS
from tiny_models import make_config, make_model
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from grpo_core.model import fast_layers
from grpo_core.model.families import FAMILIES, UNADAPTABLE, head_dim
from grpo_core.model.optional_kernels import find_optional_kernels, use_convolution_kernel

KERNELS = os.environ.get("TRITON_INTERPRET") == "1"


def replaced(model):
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama, untied", "mistral", "gpt2"])
def test_a_model_computes_the_same_with_the_same_gradient(name, dropout):
    kind, config, _ = MODELS[name]
    torch.manual_seed(0)
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "o_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(kind(config), PeftLoraConfig(r=4, target_modules=targets, lora_dropout=dropout))
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key or parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    ours = copy.deepcopy(theirs)
    fast_layers.install(ours)
    assert len(replaced(ours)) == (0 if name == "gpt2" else 3)
    ids = torch.arange(2, 12).view(2, 5)
    results = []
    for model in (theirs, ours):
        for training in (False, True):
            model.train(training)
            torch.manual_seed(1)
            logits = model(ids).logits
            grads = torch.autograd.grad(torch.sin(logits).sum(), [p for p in model.parameters() if p.requires_grad])
            with model.disable_adapter():
                results.append([logits, *grads, model(ids).logits])
    for mine, want in zip(results[2:], results[:2], strict=True):
        assert max(float(x.abs().max()) for x in want[1:-1]) > 0.1
        torch.testing.assert_close(mine, want, atol=2e-4, rtol=1e-4)


def test_what_only_looks_known_is_left_alone():
    config = Gemma2Config(
        **{
            key: value
            for key, value in MODELS["gemma2"][1].to_dict().items()
            if key
            in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
            )
        }
    )
    model = Gemma2ForCausalLM(config)  # its norm multiplies by 1 + weight, its MLP has another activation
    fast_layers.install(model)
    assert replaced(model) == set()


def test_all_weights_can_be_trained():
    torch.manual_seed(0)
    mlp, norm = Qwen2MLP(MODELS["qwen2"][1]), Qwen2RMSNorm(MODELS["qwen2"][1].hidden_size)
    x = torch.randn(3, MODELS["qwen2"][1].hidden_size, requires_grad=True)
    for module in (mlp, norm):
        want = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
        fast_layers.install(module)
        ours = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
        torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_table_of_families_says_what_transformers_does(model_type):
    [(kind, config, _)] = [MODELS[name] for name in MODELS if name.split(",")[0] == model_type][:1]
    model, family = kind(config), FAMILIES[model_type]
    layer = model.model.layers[0]
    assert family.mlp_class in (type(layer.mlp).__name__, None)
    assert ("sliding_window=" in inspect.getsource(type(layer.self_attn).forward)) == family.passes_window
    norms = {name for name, _ in layer.named_children() if name.endswith("norm")}
    assert norms == {name for name in family.norms if name is not None}
    assert type(model.model.embed_tokens).__name__ == family.embedding_class
    widths = {None: [], "head": [head_dim(config)] * 2, "width": [head_dim(config) * n for n in (config.num_attention_heads, config.num_key_value_heads)]}
    attention = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    assert [len(norm.weight) for norm in attention if norm is not None] == widths[family.query_norm]
    for part, names in ((layer.self_attn, family.qkv), (layer.mlp, family.gate_up)):
        assert {name for name, _ in part.named_children() if name.endswith("_proj")} - {"o_proj", "down_proj"} == set(names)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), *(["cpu"] if KERNELS else [])])
def test_the_kernels_are_their_definitions(device):
    from grpo_core.model import kernels

    torch.manual_seed(0)
    grad, gate, up = (torch.randn(3, 1001, device=device) for _ in range(3))
    torch.testing.assert_close(kernels.silu_mul(gate, up), fast_layers.silu_mul(gate, up))
    ours, want = (room.silu_mul_backward(grad, gate, up) for room in (kernels, fast_layers))
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), *(["cpu"] if KERNELS else [])])
@pytest.mark.parametrize("gating", ["none", "after", "before"])
@pytest.mark.parametrize("columns, width", [(96, 96), (130, 65), (64, 16)])
def test_the_norm_kernel_is_its_definition(device, columns, width, gating):
    from grpo_core.model.layer_kernels import Norm

    torch.manual_seed(0)
    inputs = [torch.randn(5, 3, columns, device=device, requires_grad=True) for _ in range(1 if gating == "none" else 2)]
    weight, eps, offset = torch.randn(columns, device=device), 1e-3, 0.5
    x, gate = inputs[0], inputs[-1]
    groups = (x * torch.nn.functional.silu(gate) if gating == "before" else x).unflatten(-1, (-1, width))
    want = (groups * (groups.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * (offset + weight)
    want = want * torch.nn.functional.silu(gate) if gating == "after" else want
    ours = Norm.apply(x, None if gating == "none" else gate, weight, width, eps, offset, gating)
    grad = torch.randn_like(ours)
    results = [[y, *torch.autograd.grad(y, inputs, grad)] for y in (ours, want)]
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), *(["cpu"] if KERNELS else [])])
@pytest.mark.parametrize("channels, taps, length, has_bias, activation", [
    (70, 4, 37, True, "silu"), (64, 3, 70, False, None), (5, 4, 2, False, "silu"), (65, 2, 33, True, None),
])  # fmt: skip
def test_the_convolution_kernel_is_its_definition(device, channels, taps, length, has_bias, activation):
    from grpo_core.model.layer_kernels import CausalConvolution

    torch.manual_seed(0)
    x = torch.randn(3, channels, length, device=device, requires_grad=True)
    weight, bias = torch.randn(channels, taps, device=device), torch.randn(channels, device=device) if has_bias else None
    want = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=channels)[..., :length]
    want = want if activation is None else torch.nn.functional.silu(want)
    ours = CausalConvolution.apply(x, weight, bias, activation is not None)
    grad = torch.randn_like(ours)
    results = [[y, *torch.autograd.grad(y, x, grad)] for y in (ours, want)]
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name, norms", [
    ("qwen3_5_text", {"Qwen3_5RMSNorm", "Qwen3_5RMSNormGated"}), ("gemma3_text", {"Gemma3RMSNorm"}),
    ("granitemoehybrid", {"GraniteMoeHybridRMSNormGated"}), ("olmo_hybrid", {"OlmoHybridRMSNormGated"}), ("falcon_h1", set()),
])  # fmt: skip
def test_norms_and_convolutions_of_a_gpu_compute_the_same_with_the_same_gradient(name, norms, monkeypatch):
    """In float32, against the model's own functions on a CPU."""
    torch.manual_seed(0)
    theirs = make_model(make_config(name, 64))
    theirs = get_peft_model(theirs, PeftLoraConfig(r=4, target_modules="all-linear", exclude_modules=UNADAPTABLE.get(name)))
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key or parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.arange(2, 92).view(2, 45) % 64
    results, ours = [], copy.deepcopy(theirs).cuda()
    fast_layers.install(ours)
    assert norms <= replaced(ours)
    for kernel in find_optional_kernels(ours):
        monkeypatch.setattr(kernel.file, kernel.name, kernel.function)  # restored after the test
    for model in (theirs, ours):
        if model is ours:
            use_convolution_kernel(ours, lambda: ours(ids.cuda()))
        logits = model.eval()(ids.to(model.device)).logits
        results.append([x.cpu() for x in (logits, *torch.autograd.grad(torch.sin(logits).sum(), [p for p in model.parameters() if p.requires_grad]))])
    torch.testing.assert_close(*results, atol=2e-3, rtol=1e-3)
    kernels = [kernel.function for kernel in find_optional_kernels(ours) if kernel.name == "causal_conv1d_fn"]
    assert all(hasattr(function, "for_other_calls") for function in kernels) and bool(kernels) == (name != "gemma3_text")
