"""What a run takes on a GPU, computed from shapes alone: each part against a count by hand, and the cards that suffice."""

import re
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(ROOT / "benchmarks"))
import four_bits

from grpo_core.config.files import load
from grpo_core.model import memory_estimate
from grpo_core.model.memory import RESERVED_BYTES
from grpo_core.model.memory_estimate import CUDA_BYTES, MemoryEstimate, estimate, find_smallest_card
from grpo_core.model.quantized import QuantizedLinear
from grpo_core.model.quantized_loading import find_quantizable

CONFIGURATIONS = {  # name -> shape, longest prompt and completion, smallest card for nf4 and for bf16
    "gpu_8gb_3b": ("3b", (256, 2048), 6, 12), "gpu_8gb_7b": ("7b", (256, 768), 8, 24), "gpu_24gb_32b": ("32b", (256, 512), 24, None),
}  # fmt: skip


def make_model(kind, sizes, quantize, lora_rank=16):
    """Return a model of the shape without weights; its q, k, v and o have trained factors."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.bfloat16).requires_grad_(False)
        for name in find_quantizable(model):
            layer = model.get_submodule(name)
            if quantize:
                new = QuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16, "meta")
                model.set_submodule(name, new.requires_grad_(False))
            if "self_attn" in name:
                factor = torch.nn.Parameter(torch.empty(lora_rank, layer.in_features + layer.out_features))
                model.get_submodule(name).register_parameter("factor", factor)
    return model


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_cards_of_the_shipped_configurations(name):
    shape, longest, nf4, bf16 = CONFIGURATIONS[name]
    config, (kind, sizes) = load(ROOT / "configs" / f"{name}.yaml"), four_bits.SHAPES[shape]
    assert longest == (config.data.max_prompt_tokens, config.sampling.max_new_tokens) and config.model.quantize == "nf4"
    for quantize, card in ((True, nf4), (False, bf16)):
        parts = estimate(make_model(kind, sizes, quantize), longest=longest, group_size=8, adapter_on_gpu=False)
        assert find_smallest_card(parts.needed) == card, parts


def test_each_part_is_the_count_by_hand():
    kind, sizes = four_bits.SHAPES["7b"]
    parts = estimate(make_model(kind, sizes, True), longest=(100, 200), group_size=4, adapter_on_gpu=True)
    attention, mlp = 3584 * (3584 + 512 + 512) + 3584 * 3584, 3 * 3584 * 18_944
    small = 28 * (3584 + 2 * 512 + 2 * 3584) + 3584 + 2 * 152_064 * 3584  # biases, norms, embeddings and head
    assert parts.weights == round(28 * (attention + mlp) * (0.5 + (1 + 8 / 256) / 64)) + 2 * small
    assert parts.weights == pytest.approx(5.55e9, rel=0.01)
    trained = 28 * 16 * (2 * (3584 + 3584) + 2 * (3584 + 512))
    assert parts.adapter == trained * (2 + 4 + 4 + 12)
    assert parts.cache == 2 * 2 * 28 * 4 * 128 * (100 + 4 * 200)
    longer = estimate(make_model(kind, sizes, True), longest=(100, 400), group_size=4, adapter_on_gpu=False)
    assert longer.update > parts.update and longer.adapter == trained * 10
    single = estimate(make_model(kind, sizes, True), longest=(1, 1), group_size=1, adapter_on_gpu=False, double_quant=False)
    assert single.weights - parts.weights == pytest.approx(28 * (attention + mlp) / 64 * (3 - 8 / 256))


def test_the_table_of_what_fits_where_is_computed():
    """The first table of docs/memory.md, for the shapes of benchmarks/four_bits.py."""
    rows = re.findall(r"^\| Qwen\S+-(\S+)B \| (.*?) GB \| (\S+).*? \| (.*?) GB \| (\d+) GB \|$", (ROOT / "docs" / "memory.md").read_text(), re.M)
    assert len(rows) == len(four_bits.SHAPES) == 5
    for name, bf16, bf16_card, nf4, nf4_card in rows:
        kind, sizes = four_bits.SHAPES[f"{name}b"]
        for quantize, need, card in ((False, bf16, bf16_card), (True, nf4, nf4_card)):
            parts = estimate(make_model(kind, sizes, quantize), longest=(256, 1024), group_size=8, adapter_on_gpu=False)
            assert f"{parts.needed / 1e9:.1f}" == need and str(find_smallest_card(parts.needed) or "none") == card, name


def test_sampling_and_update_take_turns():
    parts = MemoryEstimate(weights=3_000_000_000, adapter=0, cache=900_000_000, sampler=0, update=1_800_000_000)
    assert parts.needed == CUDA_BYTES + RESERVED_BYTES + 5e9 and find_smallest_card(parts.needed) == 6
    assert find_smallest_card(6.01e9) == 8 and find_smallest_card(24.1e9) is None


def test_a_model_type_that_is_not_known_has_no_estimate():
    with torch.device("meta"):
        mixture = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", num_hidden_layers=1, num_experts=2, num_experts_per_tok=1))
        other = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1))
    for model in (mixture, other):
        assert memory_estimate.estimate(model, longest=(8, 8), group_size=2, adapter_on_gpu=True) is None
