"""Attention over a packed row of tokens, for every model that calls transformers' attention interface.

`install` puts it in the place of a model's sdpa. Without a packing it is sdpa, so sampling and everything else that
calls the model notices nothing. Under causal attention, rows padded on the right need no mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grpo_core.packing import AttentionRows

NAME = "sdpa_packed"
# cuDNN's plans a kernel anew for every shape, and no two micro-batches have the same
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def install(model: PreTrainedModel) -> bool:
    """Let the model's forward take `packing`; False where its attention is another one than sdpa."""
    if model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = NAME
    return model.config._attn_implementation == NAME


def attend(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, key heads, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    packing: AttentionRows | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Every token attends to its row's tokens up to itself; [1, T, heads, D]."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    spread = [packing.spread(x[0].transpose(0, 1)) for x in (query, key, value)]  # [M, heads, D]
    outputs, start = [], 0
    for rows, width in packing.buckets:
        q, k, v = (x[start : start + rows * width].unflatten(0, (rows, width)).transpose(1, 2) for x in spread)
        mask = None
        if sliding_window is not None and width > sliding_window:
            mask = torch.ones(width, width, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
        with sdpa_kernel(BACKENDS):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start += rows * width
    return torch.cat(outputs).index_select(0, packing.back)[None], None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
