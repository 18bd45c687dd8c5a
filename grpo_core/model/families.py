"""The one table of facts about model types. Everything else about a model is read from it or measured.

A model type without a row gets the general code: sampling by the model's own forward, the model's own MLP, and packed
attention only without a sliding window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from transformers import DynamicCache


class LayerNorms(NamedTuple):
    """The names of a layer's norms: of the inputs of its attention and its MLP, and of their outputs.

    The norm of an output is applied before the output is added to the residual stream.
    """

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


NORMS_OF_INPUTS = LayerNorms("input_layernorm", None, "post_attention_layernorm", None)
NORMS_ON_BOTH_SIDES = LayerNorms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
NORMS_OF_OUTPUTS = LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


@dataclass(frozen=True)
class Scales:
    """The factors and bounds that a model applies between its layers' products.

    embedding: Factor of the embeddings.
    residual: Factor of what attention and MLP add to the residual stream.
    logit_divisor: The logits are divided by it.
    logit_cap, score_cap: Bound c of the logits, and of the scores of attention: c tanh(x / c) takes the place of x.
    """

    embedding: float = 1.0
    residual: float = 1.0
    logit_divisor: float = 1.0
    logit_cap: float | None = None
    score_cap: float | None = None


@dataclass(frozen=True)
class ExpertLayers:
    """The facts about the mixtures of experts of a model type: layers whose MLP has a router and `experts`.

    The router is a product whose largest outputs choose the experts, which are gated MLPs with joined weights.

    router: Name of the router in the MLP.
    normalizes: Whether the weights of the chosen experts are their softmax, instead of parts of the softmax over all;
        or the name of the key of the configuration that says so.
    has_rounded_weights: The weights of experts are rounded to the dtype of the model.
    has_bias: Experts have biases.
    is_transposed: The weights of an expert are [inputs, outputs].
    is_interleaved: Gates and ups alternate; otherwise all gates come first.
    is_clamped: Gates and ups are clamped to the `limit` of the experts, gates are multiplied by their `alpha` in the
        sigmoid, and 1 is added to ups.
    """

    router: str = "gate"
    normalizes: bool | str = True
    has_rounded_weights: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_interleaved: bool = False
    is_clamped: bool = False

    def is_normalized(self, config: Any) -> bool:
        """Return whether the weights of the chosen experts are their softmax."""
        return bool(getattr(config, self.normalizes)) if isinstance(self.normalizes, str) else self.normalizes


@dataclass(frozen=True)
class Family:
    """The facts about one `model_type` as transformers implements it.

    mlp_class: Name of the class of its MLP, if that class computes down_proj(silu(gate_proj(x)) * up_proj(x)) without
        dropout or clamping, so that `fast_layers` may replace its forward.
    passes_window: Its layers pass their sliding window to the attention function, where packed attention applies it.
        Other model types may have the window in the attention mask alone, which packed attention does not use.
    has_fused_decoder: Its layers are what sampling/fused_model.py computes: RMSNorm, grouped-query attention, a gated
        MLP, residuals. The fields below say what differs.
    qkv, gate_up: Names of the linear layers of `self_attn` and `mlp` whose outputs, side by side, are queries, keys and
        values, and gate and up.
    norms: Names of the norms of a layer.
    norm_offset: Every norm multiplies by the sum of this and its weight.
    query_norm: Queries and keys are normalized before the rotation, with the weights of `self_attn.q_norm` and
        `self_attn.k_norm`: every head by itself ("head"), or all heads together ("width").
    activation: Name of the key of the configuration that has the activation of the gate.
    embedding_class: Name of the class of its embeddings.
    rotation_per_type: Every type of layer (`layer_types` of the configuration) has its own rotation.
    rotated_layers: Name of the list in the configuration that has 0 for every layer without rotation.
    find_scales: Returns the scales of a configuration for weights of a dtype.
    experts: The facts about its mixtures of experts, if any of its layers can have one.
    has_sinks: Each head of attention has a logit in `self_attn.sinks`, which takes part in the softmax without a value.
    rotation_is_doubled: Its rotary embedding returns every angle twice, for both halves of a head.
    """

    mlp_class: str | None
    passes_window: bool
    has_fused_decoder: bool = True
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    norms: LayerNorms = NORMS_OF_INPUTS
    norm_offset: float = 0.0
    query_norm: Literal["head", "width"] | None = None
    activation: str = "hidden_act"
    embedding_class: str = "Embedding"
    rotation_per_type: bool = False
    rotated_layers: str | None = None
    find_scales: Callable[[Any, torch.dtype], Scales] = lambda config, dtype: Scales()
    experts: ExpertLayers | None = None
    has_sinks: bool = False
    rotation_is_doubled: bool = True


def _gemma_scales(config: Any, dtype: torch.dtype) -> Scales:
    embedding = float(torch.tensor(config.hidden_size**0.5, device="cpu").to(dtype))
    return Scales(embedding, logit_cap=getattr(config, "final_logit_softcapping", None))


def _gemma2_scales(config: Any, dtype: torch.dtype) -> Scales:
    return replace(_gemma_scales(config, dtype), score_cap=config.attn_logit_softcapping)


def _granite_scales(config: Any, dtype: torch.dtype) -> Scales:
    return Scales(config.embedding_multiplier, config.residual_multiplier, config.logits_scaling)


FAMILIES = {
    "llama": Family("LlamaMLP", passes_window=False),  # has no sliding window
    "mistral": Family("MistralMLP", passes_window=True),
    "qwen2": Family("Qwen2MLP", passes_window=True),
    "qwen3": Family("Qwen3MLP", passes_window=True, query_norm="head"),
    "gemma": Family(
        None, passes_window=False, norm_offset=1.0, embedding_class="GemmaTextScaledWordEmbedding",
        find_scales=_gemma_scales,
    ),
    "gemma2": Family(
        None, passes_window=True, norms=NORMS_ON_BOTH_SIDES, norm_offset=1.0, activation="hidden_activation",
        embedding_class="Gemma2TextScaledWordEmbedding", find_scales=_gemma2_scales,
    ),
    "gemma3_text": Family(
        None, passes_window=True, norms=NORMS_ON_BOTH_SIDES, norm_offset=1.0, query_norm="head", rotation_per_type=True,
        activation="hidden_activation", embedding_class="Gemma3TextScaledWordEmbedding", find_scales=_gemma_scales,
    ),
    "phi3": Family(None, passes_window=True, qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "smollm3": Family("SmolLM3MLP", passes_window=True, rotated_layers="no_rope_layers"),
    "olmo2": Family("Olmo2MLP", passes_window=False, norms=NORMS_OF_OUTPUTS, query_norm="width"),
    "olmo3": Family(
        "Olmo3MLP", passes_window=True, norms=NORMS_OF_OUTPUTS, query_norm="width", rotation_per_type=True
    ),
    "granite": Family("GraniteMLP", passes_window=False, find_scales=_granite_scales),
    "qwen3_moe": Family(
        "Qwen3MoeMLP", passes_window=True, query_norm="head", experts=ExpertLayers(normalizes="norm_topk_prob")
    ),
    "mixtral": Family(None, passes_window=True, gate_up=(), experts=ExpertLayers(has_rounded_weights=False)),
    "gpt_oss": Family(
        None, passes_window=True, gate_up=(), has_sinks=True, rotation_is_doubled=False, experts=ExpertLayers(
            router="router", has_bias=True, is_transposed=True, is_interleaved=True, is_clamped=True
        ),
    ),
}  # fmt: skip

# Linear layers that PEFT does not adapt in these model types: kernels read their weight without calling the layer
UNADAPTABLE = {name: ("out_proj", "conv1d") for name in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")}


def head_dim(config: Any) -> int:
    """Return the dimension of an attention head, which not every model's configuration states."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def has_recurrent_layers(model: Any) -> bool:
    """Return whether layers of the model keep a state that every token changes, instead of keys and values."""
    if getattr(model, "_is_stateful", False):
        return True
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # a model type whose cache transformers cannot make from the configuration
        return True
    return any(base.__name__.startswith("LinearAttention") for layer in layers for base in type(layer).__mro__)
