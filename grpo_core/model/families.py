"""The one table of facts about model types. Everything else about a model is read from it or measured.

A model type without a row gets the general code: sampling by the model's own forward, the model's own MLP, and packed
attention only without a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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


def head_dim(config: Any) -> int:
    """Return the dimension of an attention head, which not every model's configuration states."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
