"""Weights in 4 bits: the format, the layer, LoRA on it, and the decoders, each against dequantised weights."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from fakes import Alphabet, FixedTasks
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from test_sampler import MODELS
from torch import nn

from grpo_core.model import fast_layers, quantized
from grpo_core.model.policy import Policy
from grpo_core.model.quantized import (
    QuantizedLinear,
    can_join,
    dequantize,
    find_quantized,
    join,
    multiply,
    quantize,
    split,
    split_rows,
    to_plain,
)
from grpo_core.model.quantized_loading import find_quantizable
from grpo_core.sampling import decode_ops
from grpo_core.sampling.decode_ops import TorchOps
from grpo_core.sampling.joined_linear import JoinedLinear, QuantizedWeights, SeparateWeights
from grpo_core.sampling.sampler import Sampler

functions = pytest.importorskip("bitsandbytes").functional
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
DOUBLE = pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make_layer(inputs, outputs, bias=False, double=True, dtype=torch.float32, seed=0):
    """Return a layer in 4 bits, and a plain one with the same values."""
    layer = QuantizedLinear(inputs, outputs, bias, dtype, DEVICE)
    layer.quantized = quantize(random(outputs, inputs, seed=seed), double)
    plain = nn.Linear(inputs, outputs, bias=bias, device=DEVICE, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(dequantize(layer.quantized, dtype))
    if bias:
        layer.bias.data.copy_(random(outputs, seed=seed + 1))
        plain.bias.copy_(layer.bias)
    return layer, plain


def quantize_model(model, double=True):
    """Quantise the layers of a model that was made without files."""
    for name in find_quantizable(model):
        plain = model.get_submodule(name)
        layer = QuantizedLinear(plain.in_features, plain.out_features, plain.bias is not None, plain.weight.dtype)
        layer.quantized, layer.bias = quantize(plain.weight, double), plain.bias
        model.set_submodule(name, layer.requires_grad_(False))
    return model


def make_models(name="qwen2", double=True, dtype=torch.float32, **changes):
    """Return a model of a family in 4 bits with LoRA, and one of the same values with whole weights."""
    kind, config, _ = MODELS[name]
    torch.manual_seed(0)
    config = type(config)(**{**config.to_dict(), "hidden_size": 64, "intermediate_size": 128, **changes})
    config._attn_implementation = "eager"  # sdpa does not bound the scores of Gemma 2
    base = quantize_model(kind(config).to(dtype), double)
    models = [base, copy.deepcopy(base)]
    to_plain(models[1], dtype)
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    models = [get_peft_model(model, PeftLoraConfig(r=4, target_modules=targets), autocast_adapter_dtype=False) for model in models]
    for model in models:
        generator = torch.Generator().manual_seed(1)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(dtype)
        model.to(DEVICE)
    return models


def dequantize_plainly(weight):
    """The definition: a number of 16, chosen by 4 bits, times the maximum of its block."""
    index = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).view(-1)[: weight.shape[0] * weight.shape[1]]
    maxima = weight.scales.maxima().repeat_interleave(64)[: len(index)]
    return (weight.scales.code[index.int()] * maxima).view(weight.shape)


@DOUBLE
@pytest.mark.parametrize("shape", [(96, 64), (7, 33), (5, 30), (6, 96), (64, 160), (320, 512)])
def test_the_values_are_those_of_the_definition(shape, double):
    """On a CPU those of bitsandbytes are not, for widths that are no multiple of 64."""
    weight = quantize(random(*shape) * torch.arange(1, shape[0] + 1, device=DEVICE)[:, None], double)
    want = dequantize_plainly(weight)
    torch.testing.assert_close(dequantize(weight, torch.float32), want, atol=1e-6, rtol=1e-5)
    out = torch.empty(shape[0] * shape[1] + 5, device=DEVICE)
    torch.testing.assert_close(dequantize(weight, torch.float32, out), want, atol=1e-6, rtol=1e-5)


@DOUBLE
@pytest.mark.parametrize("shape", [(96, 64), (320, 512)])
def test_the_values_are_those_of_bitsandbytes(shape, double):
    weight = random(*shape)
    packed, state = functions.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    ours = quantize(weight, double)
    assert torch.equal(ours.packed, packed.view(-1))
    theirs = functions.dequantize_4bit(packed, state)
    torch.testing.assert_close(dequantize(ours, torch.float32), theirs, atol=1e-6, rtol=1e-5)
    error = (dequantize(ours, torch.float32) - weight).abs().max()
    assert error < 0.2 * weight.abs().max()
    assert torch.equal(dequantize(ours, torch.bfloat16), dequantize(ours, torch.float32).bfloat16())  # rounded once
    assert torch.equal(quantize(weight.bfloat16(), double).packed, quantize(weight.bfloat16().float(), double).packed)


@DOUBLE
def test_slices_and_a_buffer_change_no_value(double, monkeypatch):
    weight = random(96, 128)
    whole = quantize(weight, double)
    monkeypatch.setattr(quantized, "SLICE", 1 << 10)
    cut = quantize(weight, double)
    assert all(torch.equal(x, y) for x, y in zip(whole.scales.tensors(), cut.scales.tensors(), strict=True))
    assert torch.equal(whole.packed, cut.packed)
    buffer = torch.full((20_000,), 7.0, device=DEVICE)
    values = dequantize(whole, torch.float32, buffer)
    assert values.data_ptr() == buffer.data_ptr() and torch.equal(values, dequantize(whole, torch.float32))
    assert torch.equal(buffer[96 * 128 :], torch.full_like(buffer[96 * 128 :], 7.0))


def test_the_bytes_of_a_weight():
    bits = {double: 8 * quantize(random(1024, 1024), double).bytes / 2**20 for double in (False, True)}
    assert bits[False] == 4.5 and bits[True] == 4 + 8 / 64 + 64 / (64 * 256)


@DOUBLE
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_and_its_gradient(double, bias):
    layer, plain = make_layer(192, 80, bias, double)
    x = random(2, 5, 192, seed=3).requires_grad_()
    ours, theirs = layer(x), plain(x)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(torch.sin(y).sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads)
    bias_value = random(80, seed=4).requires_grad_()
    ours, theirs = multiply(x, layer.quantized, bias_value), F.linear(x, plain.weight, bias_value)
    grads = [torch.autograd.grad(torch.sin(y).sum(), (x, bias_value)) for y in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_whole_weights_are_not_stored_for_the_backward():
    layer, _ = make_layer(256, 128)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.numel()) or x, lambda x: x):
        layer(random(3, 256).requires_grad_()).sum()
    assert max(stored, default=0) < 256 * 128 / 2


def test_a_change_of_the_dtype_changes_no_weight_in_4_bits():
    layer, _ = make_layer(128, 64, bias=True)
    want = dequantize(layer.quantized, torch.float32)
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16 and layer.weight.dtype == torch.uint8
    assert torch.equal(dequantize(layer.quantized, torch.float32), want)


@DOUBLE
def test_joined_weights_are_those_of_the_layers_without_a_copy(double):
    unit = 512 if double else 2  # rows of 96 values until a block ends with a row
    sizes = [2 * unit, unit, 3]
    weights = [quantize(random(rows, 96, seed=rows), double) for rows in sizes]
    assert can_join(weights[:2]) and not can_join(weights[::-1])
    joined = join(weights[:2])
    want = torch.cat([dequantize(weight, torch.float32) for weight in weights[:2]])
    assert torch.equal(dequantize(joined, torch.float32), want)
    for part, weight in zip(split(joined, sizes[:2]), weights, strict=False):
        assert torch.equal(dequantize(part, torch.float32), dequantize(weight, torch.float32))
        assert part.packed.untyped_storage().data_ptr() == joined.packed.untyped_storage().data_ptr()
    parts = split_rows(joined, unit * 96)
    assert [part.shape[0] for part in parts] == 3 * [unit]
    assert torch.equal(torch.cat([dequantize(part, torch.float32) for part in parts]), want)


@DOUBLE
@pytest.mark.parametrize("fast", [False, True])
def test_lora_on_a_model_in_4_bits_has_the_gradient_of_the_dequantised_model(double, fast):
    ours, theirs = make_models(double=double)
    assert find_quantized(ours) and not find_quantized(theirs)
    if fast:
        fast_layers.install(ours)
        assert any("forward" in vars(module) and hasattr(module, "lora_A") for module in ours.modules())
    ids = torch.arange(2, 12, device=DEVICE).view(2, 5)
    results = []
    for model in (ours, theirs):
        logits = model(ids).logits
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append([logits, *torch.autograd.grad(torch.sin(logits).sum(), trained)])
        with torch.no_grad(), model.disable_adapter():  # the reference
            results[-1].append(model(ids).logits)
    assert all(x.abs().max() > 1e-3 for x in results[1][1:-1]) and not torch.equal(results[1][0], results[1][-1])
    for mine, want in zip(*results, strict=True):
        torch.testing.assert_close(mine, want, atol=2e-4, rtol=1e-3)


def test_gradients_in_bf16_are_as_near_as_those_of_a_plain_model_in_bf16():
    exact = make_models()[1]
    ids = torch.arange(2, 12, device=DEVICE).view(2, 5)
    grads = []
    for model in (exact, *make_models(dtype=torch.bfloat16)):
        loss = torch.sin(model(ids).logits.float()).sum()
        trained = [p for p in model.parameters() if p.requires_grad]
        grads.append(torch.cat([g.flatten().float() for g in torch.autograd.grad(loss, trained)]))
    errors = [float((grad - grads[0]).norm() / grads[0].norm()) for grad in grads[1:]]
    assert errors[0] < 2 * errors[1] and errors[0] < 0.3, errors


@pytest.mark.parametrize("decoder", ["auto", "modules", "plain"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2"])
@DOUBLE
def test_the_sampler_draws_with_the_trainers_logprobs(name, decoder, double):
    model, _ = make_models(name, double)
    policy = Policy(model, temperature=1.0, chunk_size=7)
    notes = []
    sampler = Sampler(policy.causal_lm, Alphabet(), max_new_tokens=6, decoder=decoder, notify=notes.append)
    rollouts = sampler.generate(FixedTasks().batch(0), 4)
    with torch.no_grad():
        trainer = policy.forward(rollouts, next(iter(policy.plan(rollouts)))).logprobs
    mask = rollouts.completion_mask
    torch.testing.assert_close(rollouts.rollout_logprobs[mask], trainer[mask], atol=2e-3, rtol=1e-3)
    assert sampler.decoder_name == {"auto": "fused"}.get(decoder, decoder) and not notes


def make_joined(rank=3, double=True, dtype=torch.float32, outputs=(512, 256), bias=True, ops=None):
    """Return layers with the same input as one product in 4 bits, and the plain layers; each has LoRA."""
    pairs = [make_layer(256, count, bias, double, dtype, seed) for seed, count in enumerate(outputs)]
    targets = [f"{i}" for i in range(len(outputs))]
    settings = PeftLoraConfig(r=rank, lora_alpha=6, target_modules=targets)
    models = []
    for layers in zip(*pairs, strict=True):
        model = get_peft_model(nn.ModuleDict(dict(zip(targets, layers, strict=True))), settings, autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(5)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(DEVICE, dtype)
        models.append([model.base_model.model[name] for name in targets])
    joined = JoinedLinear(models[0], ops or TorchOps(), dtype)
    joined.refresh()
    return joined, models[1]


@DOUBLE
@pytest.mark.parametrize("outputs", [(512, 256), (512, 40), (64,)])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_joined_layers_in_4_bits_compute_the_plain_layers(outputs, rows, double, monkeypatch):
    monkeypatch.setattr(decode_ops, "MAX_BUFFER_VALUES", 1 << 16)  # several parts
    joined, plain = make_joined(double=double, outputs=outputs)
    kind = SeparateWeights if double and 40 in outputs else QuantizedWeights  # 256 maxima of blocks end with no row
    assert isinstance(joined.weights, kind)
    x = random(rows, 256, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(joined(x), torch.cat([layer(x) for layer in plain], dim=1), atol=1e-3, rtol=1e-4)


def test_the_decoder_computes_with_the_bytes_of_the_model(monkeypatch):
    """After sampling there is one copy of the 4 bits, without a change, and it is that of the decoder."""
    made, make = [], QuantizedWeights.__init__
    monkeypatch.setattr(QuantizedWeights, "__init__", lambda self, *words: made.append(self) or make(self, *words))
    model, _ = make_models(hidden_size=128, intermediate_size=256)
    before = {name: dequantize(layer.quantized, torch.float32) for name, layer in find_quantized(model).items()}
    Sampler(model, Alphabet(), max_new_tokens=3).generate(FixedTasks().batch(0), 2)
    after = find_quantized(model)
    assert all(torch.equal(dequantize(layer.quantized, torch.float32), before[name]) for name, layer in after.items())
    memory = {storage.data_ptr(): storage.nbytes() for storage in (layer.weight.untyped_storage() for layer in after.values())}
    assert sum(memory.values()) == sum(layer.weight.numel() for layer in after.values())
    used = {weights.weight.packed.untyped_storage().data_ptr() for weights in made}
    assert used == memory.keys() and len(used) < len(after)  # some are joined


@pytest.mark.skipif(not KERNELS, reason="needs Triton")
@DOUBLE
@pytest.mark.parametrize("rows", [1, 16, 33, 64])
@pytest.mark.parametrize("outputs, inputs, rank, bias", [(96, 128, 0, False), (200, 192, 5, True), (64, 576, 16, False)])
def test_the_triton_product_is_the_product_of_dequantised_weights(outputs, inputs, rank, bias, rows, double):
    from grpo_core.sampling.kernels import four_bit_kernels as kernels

    weight, x = quantize(random(outputs, inputs), double), random(rows, inputs, seed=1)
    b, a = random(outputs, seed=2) if bias else None, random(rank, inputs, seed=3) if rank else None
    want = F.linear(x, dequantize(weight, torch.float32), b)
    for settings in (None, kernels.Settings(32, 1, 4, 2, 1), kernels.Settings(32, 2, 4, 2, 3, "load"), kernels.Settings(16, 1, 4, 1, 2, "select")):
        y, inner = kernels.multiply(x, weight, b, a, settings)
        torch.testing.assert_close(y, want, atol=1e-3, rtol=1e-4)
        assert (inner is None) == (rank == 0)
        if rank:
            torch.testing.assert_close(inner, x @ a.t(), atol=1e-3, rtol=1e-4)
    if rows == 64:
        assert not kernels.fits(random(65, inputs), weight)


@pytest.mark.skipif(not KERNELS, reason="needs Triton")
def test_the_triton_product_rounds_weights_as_dequantize_does():
    from grpo_core.sampling.kernels import four_bit_kernels as kernels

    weight, x = quantize(random(64, 256)), torch.eye(256, device=DEVICE, dtype=torch.float16)[:16]
    y, _ = kernels.multiply(x, weight, None, None, kernels.Settings(32, 1, 4, 2, 1))
    assert torch.equal(y, dequantize(weight, torch.float16).t()[:16])


def test_peft_is_imported_without_bitsandbytes_and_finds_it_afterwards():
    code = (
        "import sys, grpo_core.model.adapter; print('bitsandbytes' in sys.modules); from peft.import_utils import is_bnb_4bit_available; "
        "from transformers.utils import is_bitsandbytes_available; print(is_bnb_4bit_available(), is_bitsandbytes_available())"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-2:] == ["False", "True True"]
