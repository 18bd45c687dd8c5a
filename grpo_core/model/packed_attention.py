"""Attention over a packed forward (packing.py), for every model that uses transformers' attention interface.

`attend` takes the place of "sdpa" in that interface. The name in a model's configuration stays "sdpa", because models
compare it and run other code with another name. Calls without a packing compute what sdpa computes. Attention is
causal, so rows padded on the right need no mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from grpo_core.batch import Rollouts, take
from grpo_core.model.families import FAMILIES, has_recurrent_layers, head_dim
from grpo_core.model.packing import AttentionRows, Budget, Layout, Packing, Segments, plan
from grpo_core.model.rotation import Rotations
from grpo_core.model.trial import EXACT_DTYPES, is_same, without_trace
from grpo_core.schema import ConfigError, summarize_error

LONG_ROW = 72  # tokens
ROUGH_ROW_TOLERANCE = 0.15  # relative, of the hidden states of one row in 16 bits
MAX_HEAD_DIM = 192  # that flash attention's backward supports on every GPU
WIDE_HEAD_CAPABILITIES = {(8, 0), (9, 0), (10, 0)}  # compute capabilities of GPUs where it supports wider heads
# arguments of an attention function that change the scores or the tokens that are seen
UNSUPPORTED = ("position_bias", "softcap", "s_aux", "indices", "block_table", "cache")
# without cuDNN, which plans a kernel for every new shape: hardly two micro-batches have the same
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def find_layout(model: PreTrainedModel, hidden: Callable[[Rollouts, Packing], Tensor]) -> Layout:
    """Return the fastest layout in which `hidden` gives the same hidden states as in the layout "grid".

    The model is not changed.
    """
    if has_recurrent_layers(model):  # their state would go from one row to the next
        return "grid"
    config = model.config.get_text_config()
    has_window = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    family = FAMILIES.get(config.model_type)
    if has_window and not (family and family.passes_window):
        return "grid"
    if config._attn_implementation != "sdpa":
        return "grid"
    candidates: list[Layout] = ["segments", "rows"] if supports_segments(model) else ["rows"]
    with without_trace(model):
        return next((layout for layout in candidates if _matches_grid(model, hidden, layout)), "grid")


def supports_segments(model: PreTrainedModel) -> bool:
    """Return whether flash attention for segments of any length supports the model's heads, dtype and device."""
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return False
    capability = torch.cuda.get_device_capability(model.device)
    # checked here, because find_layout tries only the forward
    supports_backward = head_dim(model.config) <= MAX_HEAD_DIM or capability in WIDE_HEAD_CAPABILITIES
    return capability[0] >= 8 and supports_backward and hasattr(torch.ops.aten, "_flash_attention_forward")


def check_grid(
    model: PreTrainedModel, hidden: Callable[[Rollouts, Packing], Tensor], body: nn.Module, rotations: Rotations
) -> None:
    """Check that two rows in a grid have the hidden states that `body`, the model without its head, gives each alone.

    In 16 bits a token may go to another expert, so there the best row counts. The model is not changed.

    Raises:
        ConfigError: the states differ, or the model cannot compute a grid.
    """
    rollouts, problem = _make_long_rows(model), None
    with without_trace(model):
        try:
            same = []
            for packing in plan(rollouts, Budget(math.inf), layout="grid", rotations=rotations):
                part, rows = take(rollouts, packing.rows), packing.rows.tolist()
                states = hidden(part, packing).split(part.lengths().tolist())
                alone = [_compute_alone(body, rollouts, row) for row in rows]
                same += [
                    is_same(*pair, rough_tolerance=ROUGH_ROW_TOLERANCE) for pair in zip(states, alone, strict=True)
                ]
            if not (all(same) if model.dtype in EXACT_DTYPES else any(same)):
                problem = "gives other hidden states than that of each row alone"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the model does not accept a mask or positions, or fails with them
            problem = f"fails ({summarize_error(error)})"
    if problem:
        raise ConfigError(
            f"the {model.config.model_type} model at model.path is not supported: its forward of several rows that are "
            f"padded on the right {problem}"
        )


def _make_long_rows(model: PreTrainedModel) -> Rollouts:
    """Return two rows of different lengths, longer than the windows and chunks of most models where these are small."""
    config = model.config.get_text_config()
    width = min(LONG_ROW, getattr(config, "max_position_embeddings", None) or LONG_ROW) // 2
    ids = torch.arange(4 * width, device=model.device).view(2, 2 * width) % config.vocab_size
    mask = torch.ones(2, width, dtype=torch.bool, device=ids.device)
    mask[1, -2:] = False
    return Rollouts(ids[:, :width], mask, ids[:, width:], mask, torch.zeros(2, width, device=ids.device), mask[:, -1])


def _compute_alone(body: nn.Module, rollouts: Rollouts, row: int) -> Tensor:
    """Return the hidden states that predict the completion of one row, from a forward of its tokens and no more."""
    prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
    completion = rollouts.completion_ids[row][rollouts.valid[row]]
    ids = torch.cat([prompt, completion[:-1]])
    return body(ids[None], use_cache=False).last_hidden_state[0, len(prompt) - 1 :]


def _matches_grid(model: PreTrainedModel, hidden: Callable[[Rollouts, Packing], Tensor], layout: Layout) -> bool:
    """Return whether two rows have the same hidden states in `layout` as in a grid; False if either fails."""
    ids = torch.arange(12, device=model.device).view(2, 6) % model.config.get_text_config().vocab_size
    mask = torch.tensor([[True] * 3, [True, True, False]], device=ids.device)
    rollouts = Rollouts(ids[:, :3], mask, ids[:, 3:], mask, torch.zeros(2, 3, device=ids.device), mask[:, 2])
    try:
        [packed], [grid] = (
            [hidden(rollouts, packing) for packing in plan(rollouts, Budget(99), layout=name)]
            for name in (layout, "grid")
        )
    except Exception:  # the model does not accept the arguments of a packed forward
        return False
    return is_same(packed, grid)


class CannotPack(Exception):
    """A model's attention is not causal attention to all tokens of a row; its rows are computed in a grid."""


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
    attend_rows: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention of every token to the tokens of its row up to itself, [1, T, heads, D].

    `attend_rows` computes the attention of one new token per row instead (sampling/modules/module_model.py).

    Raises:
        CannotPack: the model does not attend causally to all tokens of the row, or adds something to the
            scores: it changed the mask of a packed forward, or passes what sdpa would have used.
    """
    if attend_rows is not None:
        options = {name: kwargs[name] for name in UNSUPPORTED if name in kwargs}
        return attend_rows(query, key, value, scaling, **options), None
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    if attention_mask is None or attention_mask.shape != (1, 1, 1, 1) or attention_mask.dtype != torch.bool:
        raise CannotPack("the model computes its own attention mask")
    is_causal = getattr(module, "is_causal", True) and kwargs.get("is_causal") in (None, True)
    if any(kwargs.get(name) is not None for name in UNSUPPORTED) or not is_causal:
        raise CannotPack("the model's attention is not causal attention to all tokens of a row")
    if isinstance(packing, Segments):
        tokens = (x[0].transpose(0, 1) for x in (query, key, value))
        return _attend_in_segments(*tokens, packing, dropout, scaling, sliding_window)[None], None
    return _attend_in_rows(query, key, value, packing, dropout, scaling, sliding_window), None


def _attend_in_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: AttentionRows,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Return the attention [1, T, heads, D], computed in rows of similar lengths."""
    spread = [packing.spread(x[0].transpose(0, 1)) for x in (query, key, value)]  # [M, heads, D]
    outputs, start = [], 0
    for rows, width in packing.buckets:
        q, k, v = (x[start : start + rows * width].unflatten(0, (rows, width)).transpose(1, 2) for x in spread)
        mask = None
        if window is not None and width > window:
            mask = torch.ones(width, width, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        with sdpa_kernel(BACKENDS):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start += rows * width
    return torch.cat(outputs).index_select(0, packing.back)[None]


def _attend_in_segments(
    query: Tensor,  # [T, heads, D]
    key: Tensor,  # [T, key heads, D]
    value: Tensor,
    segments: Segments,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Return the attention [T, heads, D]: first within the prompts, then of the completions to prompt and completion.

    The queries of a prompt are computed once for all rows that share it.
    """
    options, n = (dropout, scaling, window), segments.num_prompt_tokens
    longest_prompt, longest_completion, longest_row = segments.max_lengths
    prompts = segments.prompt_offsets
    outputs = [_flash(query[:n], key[:n], value[:n], prompts, prompts, longest_prompt, longest_prompt, *options)]
    if longest_completion:
        k, v = segments.spread(key), segments.spread(value)
        offsets = (segments.completion_offsets, segments.row_offsets)
        outputs.append(_flash(query[n:], k, v, *offsets, longest_completion, longest_row, *options))
    return torch.cat(outputs)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_queries: int,
    max_keys: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Return causal attention segment by segment, where the last query of a segment sees its last key.

    This is FlashAttention-2 (arXiv:2307.08691) as torch builds it.
    """
    return torch.ops.aten._flash_attention_forward(
        query, key, value, query_offsets, key_offsets, max_queries, max_keys, dropout, True, False, scale=scaling,
        window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
    )[0]  # fmt: skip


AttentionInterface.register("sdpa", attend)
