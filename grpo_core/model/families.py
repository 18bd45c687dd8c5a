"""The one table of facts about model types. Everything else about a model is read from it or measured.

A model type without a row gets the general code: sampling by the model's own forward, the model's own MLP, and packed
attention only without a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache


@dataclass(frozen=True)
class Family:
    """The facts about one `model_type` as transformers implements it.

    mlp_class: Name of the class of its MLP. That class computes down_proj(silu(gate_proj(x)) * up_proj(x)) without
        dropout or clamping, so `fast_layers` may replace its forward.
    passes_window: Its layers pass their sliding window to the attention function, where packed attention applies it.
        Other model types may have the window in the attention mask alone, which packed attention does not use.
    has_fused_decoder: Its layers are what sampling/fused_model.py computes: RMSNorm, rotary position embeddings in
        halves, grouped-query attention, SwiGLU, pre-norm residuals.
    normalizes_heads: RMSNorm is applied to every head of queries and keys before the rotation, with the weights of
        `self_attn.q_norm` and `self_attn.k_norm`.
    """

    mlp_class: str
    passes_window: bool
    has_fused_decoder: bool = True
    normalizes_heads: bool = False


FAMILIES = {
    "llama": Family("LlamaMLP", passes_window=False),  # has no sliding window
    "mistral": Family("MistralMLP", passes_window=True),
    "qwen2": Family("Qwen2MLP", passes_window=True),
    "qwen3": Family("Qwen3MLP", passes_window=True, normalizes_heads=True),
}

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
