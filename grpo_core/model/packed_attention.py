"""Attention over a packed row of tokens, for every model that calls transformers' attention interface.

`install` puts it in the place of a model's sdpa. Without a packing it is sdpa, so sampling and everything else that
calls the model notices nothing. Under causal attention, rows padded on the right need no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grpo_core.batch import Rollouts
from grpo_core.model.packing import AttentionRows, Budget, Layout, Packing, Segments, plan

NAME = "sdpa_packed"
# the sliding window of others may be in the mask alone, which packing does not use
TELL_ATTENTION_THE_WINDOW = {"mistral", "qwen2", "qwen3"}
LARGE_CARDS = {
    (8, 0),
    (9, 0),
    (10, 0),
}  # compute capabilities; elsewhere flash attention's backward may refuse wide heads
# cuDNN's plans a kernel anew for every shape, and no two micro-batches have the same
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def install(model: PreTrainedModel) -> bool:
    """Let the model's forward take `packing`; False where its attention is another one than sdpa."""
    if model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = NAME
    return model.config._attn_implementation == NAME


def layout(model: PreTrainedModel, hidden: Callable[[Rollouts, Packing], Tensor]) -> Layout:
    """The first layout in which `hidden`, the model's hidden states, are those of a padded grid."""
    config = model.config
    windows = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if (windows and config.model_type not in TELL_ATTENTION_THE_WINDOW) or not install(model):
        return "grid"
    candidates: list[Layout] = ["segments", "rows"] if has_segments(model) else ["rows"]
    return next((one for one in candidates if _agrees(model, hidden, one)), "grid")


def has_segments(model: PreTrainedModel) -> bool:
    """Whether flash attention's kernel for segments of any length is there for this model's heads, dtype and device."""
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return False
    config, capability = model.config, torch.cuda.get_device_capability(model.device)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    backward = dim <= 192 or capability in LARGE_CARDS  # what `layout` tries is forward alone
    return capability[0] >= 8 and backward and hasattr(torch.ops.aten, "_flash_attention_forward")


def _agrees(model: PreTrainedModel, hidden: Callable[[Rollouts, Packing], Tensor], which: Layout) -> bool:
    """Whether two rows' hidden states are in this layout those of a padded grid; False where either fails."""
    ids = torch.arange(12, device=model.device).view(2, 6) % model.config.vocab_size
    mask = torch.tensor([[True] * 3, [True, True, False]], device=ids.device)
    rollouts = Rollouts(ids[:, :3], mask, ids[:, 3:], mask, torch.zeros(2, 3, device=ids.device), mask[:, 2])
    try:
        packed, grid = (hidden(rollouts, one) for x in (which, "grid") for one in plan(rollouts, Budget(99), layout=x))
    except Exception:  # a model that does not take what others take
        return False
    allowed = 1e-3 if packed.dtype == torch.float32 else 0.05
    return bool((packed - grid).float().norm() <= allowed * grid.float().norm())


def attend(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, key heads, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    packing: AttentionRows | Segments | None = None,
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
    if isinstance(packing, Segments):
        tokens = (x[0].transpose(0, 1) for x in (query, key, value))
        return _in_segments(*tokens, packing, dropout, scaling, sliding_window)[None], None
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


def _in_segments(
    query: Tensor,  # [T, heads, D]
    key: Tensor,  # [T, key heads, D]
    value: Tensor,
    packing: Segments,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """[T, heads, D]: a prompt's queries once for all rows that share it, a completion's with their row's keys."""
    how, n = (dropout, scaling, window), packing.shared
    prompt, completion, row = packing.longest
    outputs = [_flash(query[:n], key[:n], value[:n], packing.prompts, packing.prompts, prompt, prompt, *how)]
    if completion:
        k, v = packing.spread(key), packing.spread(value)
        outputs.append(_flash(query[n:], k, v, packing.completions, packing.rows, completion, row, *how))
    return torch.cat(outputs)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_queries: Tensor,
    of_keys: Tensor,
    most_queries: int,
    most_keys: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Segment by segment causal attention of the last of the keys; arXiv:2307.08691, torch's own build of it."""
    return torch.ops.aten._flash_attention_forward(
        query, key, value, of_queries, of_keys, most_queries, most_keys, dropout, True, False, scale=scaling,
        window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
    )[0]  # fmt: skip


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
