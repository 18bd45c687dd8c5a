"""Compute what a run takes on a GPU from the shapes of its model, without a GPU.

Every part is a count of bytes, not a measurement. The activations are those of one decoder layer and of the inputs of
all layers, which gradient checkpointing keeps, for a micro-batch of one completion of the greatest length: the least
that an update can take. The weights may be on the device meta.

Interface: `estimate` returns a `MemoryEstimate`, whose `needed` is the memory of a card that suffices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo_core.model.families import FAMILIES, head_dim
from grpo_core.model.logprobs import MAX_LOGIT_BYTES
from grpo_core.model.memory import RESERVED_BYTES
from grpo_core.model.quantized import BLOCK, NESTED_BLOCK, QuantizedLinear, find_quantized

CARDS = (6, 8, 12, 16, 24)  # GB
CUDA_BYTES = 0.5e9  # of a card that CUDA and its libraries take
ITEM = 2  # bytes of a number in bf16 and fp16
# numbers for each token that a layer keeps for its backward, or makes in it: multiples of the sizes of its tensors
HIDDEN_TENSORS = 8  # two residual streams, two norms and what they keep, the outputs of attention and MLP, gradients
HEAD_TENSORS = 6  # q, k and v, before and after the rotation, the output of attention, and gradients
INNER_TENSORS = 6  # gate, up, their activation, and the gradients of the three
SHARE = 0.9  # of the free memory that is planned with; the rest allows for fragmentation


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on a GPU."""

    weights: int  # frozen
    adapter: int  # trained weights, their summed gradient, DeepSpeed's buckets, and the optimizer if it is on the GPU
    cache: int  # keys and values of one group
    sampler: int  # other buffers while sampling
    update: int  # of one completion of the greatest length

    @property
    def needed(self) -> float:
        """The memory of a card that suffices: sampling and update take turns."""
        return CUDA_BYTES + self.weights + self.adapter + RESERVED_BYTES + max(self.sampling, self.update) / SHARE

    @property
    def sampling(self) -> int:
        """The memory that sampling adds to weights and adapter."""
        return self.cache + self.sampler


def estimate(
    model: Any, *, longest: tuple[int, int], group_size: int, adapter_on_gpu: bool, double_quant: bool = True
) -> MemoryEstimate | None:
    """Return what a model takes with an adapter on frozen weights; None for a model type that is not known.

    `longest` is the greatest number of tokens of a prompt and of a completion. With `adapter_on_gpu` the state of the
    optimizer is on the GPU. On the device meta the layers in 4 bits have no scales, which `double_quant` describes.
    """
    config = model.config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None or family.experts is not None:
        return None
    quantized = find_quantized(model)
    in_4_bits = {id(layer.weight) for layer in quantized.values()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain = sum(p.numel() for p in model.parameters() if not p.requires_grad and id(p) not in in_4_bits)
    weights = ITEM * plain + round(sum(_bytes_of(layer, double_quant) for layer in quantized.values()))
    tokens, layers, hidden = sum(longest), config.num_hidden_layers, config.hidden_size
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    kv_heads = kv_heads or heads
    per_token = 2 * layers * kv_heads * head_dim(config) * ITEM
    greatest = max((layer.in_features * layer.out_features for layer in quantized.values()), default=0)
    attention = (heads + 2 * kv_heads) * head_dim(config)
    of_layer = HIDDEN_TENSORS * hidden + HEAD_TENSORS * attention + INNER_TENSORS * config.intermediate_size
    return MemoryEstimate(
        weights=weights,
        adapter=trained * (ITEM + 4 + 2 * ITEM + (12 if adapter_on_gpu else 0)),
        cache=per_token * (longest[0] + group_size * longest[1]),
        sampler=2 * ITEM * trained + ITEM * min(greatest, 1 << 25) + group_size * 3 * 4 * config.vocab_size,
        update=ITEM * tokens * ((layers + 2) * hidden + of_layer) + 2 * ITEM * greatest + int(MAX_LOGIT_BYTES),
    )


def _bytes_of(layer: QuantizedLinear, double_quant: bool) -> float:
    """Return the bytes of a weight in 4 bits with its scales."""
    if layer.scales is not None:
        return layer.quantized.bytes
    count = layer.in_features * layer.out_features
    return count / 2 + count / BLOCK * (1 + 8 / NESTED_BLOCK if double_quant else 4)


def find_smallest_card(needed: float) -> int | None:
    """Return the smallest size of a card, in GB, that suffices for so many bytes; None if none does."""
    return next((size for size in CARDS if needed <= size * 1e9), None)
