"""What a run takes on a GPU, computed from shapes alone: each part against a count by hand, and the cards that suffice."""

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_core.model import memory_estimate
from grpo_core.model.memory import RESERVED_BYTES
from grpo_core.model.memory_estimate import CUDA_BYTES, MemoryEstimate, estimate, find_smallest_card
from grpo_core.model.quantized import QuantizedLinear
from grpo_core.model.quantized_loading import find_quantizable

SHAPES = {  # sizes as on the models' cards; the longest prompt and completion of the configuration; cards for nf4 and bf16
    "gpu_8gb_3b": ("qwen2", (256, 2048), 6, 12, {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }),
    "gpu_8gb_7b": ("qwen2", (256, 768), 8, 24, {
        "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "tie_word_embeddings": False,
    }),
    "gpu_24gb_32b": ("qwen3", (256, 512), 24, None, {
        "vocab_size": 151_936, "hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    }),
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


@pytest.mark.parametrize("name", SHAPES)
def test_the_cards_of_the_shipped_configurations(name):
    assert (ROOT / "configs" / f"{name}.yaml").exists()
    kind, longest, nf4, bf16, sizes = SHAPES[name]
    for quantize, card in ((True, nf4), (False, bf16)):
        parts = estimate(make_model(kind, sizes, quantize), longest=longest, group_size=8, adapter_on_gpu=False)
        assert find_smallest_card(parts.needed) == card, parts


def test_each_part_is_the_count_by_hand():
    kind, _, _, _, sizes = SHAPES["gpu_8gb_7b"]
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
