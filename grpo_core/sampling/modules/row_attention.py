"""The attention of one new token per row over static memory of keys and values: in torch, and by kernels on a GPU.

`attend_rows` and `store_tokens` define the operations; row_attention_kernels.py has the same for a GPU. A kernel is
compared with the definition when it is first used with sizes and settings, on the values of that call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_core.model.trial import is_same
from grpo_core.sampling.modules.layer_memory import LayerMemory

TOLERANCE, ROUGH_TOLERANCE = 1e-4, 0.02  # relative, of the attention of one step


class RowAttention:
    """The attention of one new token per row, by `kernels` where they compute what torch computes."""

    def __init__(self, kernels: Any = None) -> None:
        self._kernels = kernels
        self._verdicts: dict[tuple, bool] = {}  # whether a kernel is used, for each kind of call

    def store(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
        """Store k and v [R, kv_heads, 1, D] in `keys` and `values` [R, kv_heads, T, D] at the positions [R]."""
        arguments = (k, v, keys, values, position)

        def is_right() -> bool:
            at = torch.arange(len(k), device=k.device), slice(None), position
            self._kernels.store_tokens(*arguments)
            return torch.equal(keys[at], k[:, :, 0]) and torch.equal(values[at], v[:, :, 0])

        if self._uses_kernel(("store", *_describe(k, v, keys, values)), is_right, [k, v, keys, values]):
            self._kernels.store_tokens(*arguments)
        else:
            store_tokens(*arguments)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
        layer: LayerMemory,
        scale: float,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return the attention [R, 1, heads, D] of queries [R, heads, 1, D] to keys [R, kv_heads, T, D]."""
        arguments, options = (query, keys, values, position), {"softcap": softcap, "sinks": sinks}
        options |= {"window": layer.window, "is_chunked": layer.is_chunked and layer.window is not None}

        def is_right() -> bool:
            ours = self._kernels.attend_rows(*arguments, scale, **options)
            theirs = attend_rows(*arguments, layer.first_visible(position), scale, softcap=softcap, sinks=sinks)
            return is_same(ours, theirs, TOLERANCE, ROUGH_TOLERANCE)

        key = ("attend", *_describe(query, keys, values), layer.window, layer.is_chunked, softcap, sinks is None)
        if self._uses_kernel(key, is_right, [query, keys, values]):
            return self._kernels.attend_rows(*arguments, scale, **options)
        return attend_rows(*arguments, layer.first_visible(position), scale, softcap=softcap, sinks=sinks)

    def _uses_kernel(self, key: tuple, is_right: Callable[[], bool], tensors: list[Tensor]) -> bool:
        if self._kernels is None:
            return False
        if key not in self._verdicts:
            sizes = max(x.shape[3] for x in tensors)
            is_supported = len({x.dtype for x in tensors}) == 1 and sizes <= self._kernels.MAX_DIM
            self._verdicts[key] = is_supported and _passes(is_right)
        return self._verdicts[key]


def _describe(*tensors: Tensor) -> tuple:
    """Return what selects a kernel: dtypes, heads and their sizes."""
    return tuple((x.dtype, x.shape[1], x.shape[3]) for x in tensors)


def _passes(trial: Callable[[], bool]) -> bool:
    try:
        return trial()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a kernel that this GPU cannot run, for example for want of shared memory
        return False


def store_tokens(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
    """Store k and v [R, kv_heads, 1, D] in `keys` and `values` [R, kv_heads, T, D] at the positions [R]."""
    row = torch.arange(len(k), device=k.device)
    keys[row, :, position], values[row, :, position] = k[:, :, 0], v[:, :, 0]


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    first: Tensor | None,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention [R, 1, heads, D] of queries [R, heads, 1, D] to the keys [R, kv_heads, T, D] of a row.

    A row sees the tokens from `first` [R] to `position` [R]. `softcap` bounds the scores, and `sinks` [heads] has the
    logit of a sink for each head. Query heads that share a key head are treated as positions, so that keys need not be
    repeated.
    """
    rows, heads, _, dim = query.shape
    grouped = query.reshape(rows, keys.shape[1], heads // keys.shape[1], dim)
    scores = grouped @ keys.transpose(2, 3) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = (scores + make_bias(position, first, keys.shape[2], query.dtype)).float()
    if sinks is not None:
        column = sinks.view(1, keys.shape[1], -1, 1).expand(rows, -1, -1, 1)
        weights = torch.cat([scores, column.float()], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return (weights.to(values.dtype) @ values).reshape(rows, 1, heads, values.shape[-1])


def make_bias(position: Tensor, first: Tensor | None, tokens: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of `tokens` tokens: the least number where a row sees none, [R, 1, 1, T]."""
    at = torch.arange(tokens, device=position.device)
    visible = at <= position[:, None]
    if first is not None:
        visible &= at >= first[:, None]
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill(~visible, torch.finfo(dtype).min)[:, None, None]
