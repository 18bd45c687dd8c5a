"""The rows that the plain decoder extends by one token at a time, in three methods.

- "padded": prompts of any length together, padded on the left, with a cache. The model must ignore the padding: layers
  with attention by the mask, layers with a recurrent state by keeping it out of the state.
- "cached": prompts of one length together, with a cache and without padding.
- "uncached": prompts of one length together, and the whole rows are computed again for every token. It is slow, and
  needs nothing from the model.

Rows are copied and removed through `reorder_cache`, which every cache of transformers has for beam search. Keys and
values, and the states of recurrent layers, therefore stay with their row.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

Method = Literal["padded", "cached", "uncached"]
METHODS: tuple[Method, ...] = ("padded", "cached", "uncached")  # the fastest first


class LiveRows(Protocol):
    """Rows that began with prompts and grow."""

    def prefill(self) -> Tensor:
        """Return the logits [N, V] after the prompts."""

    def select(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, in this order; a row may occur several times."""

    def append(self, tokens: Tensor) -> Tensor:
        """Return the logits [rows, V] after one more token [rows] of each row."""


def begin(method: Method, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> LiveRows:
    """Return rows of these prompts; they have one length unless the method is "padded"."""
    if method == "padded":
        return PaddedRows(model, *pad_left(prompts, pad_id, model.device))
    assert len({len(prompt) for prompt in prompts}) == 1, "prompts of different lengths need padding"
    ids = torch.tensor([[*prompt] for prompt in prompts], device=model.device)
    return CachedRows(model, ids) if method == "cached" else UncachedRows(model, ids)


class PaddedRows:
    """Rows with a cache, padded on the left."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor) -> None:
        self.model, self.ids, self.mask = model, ids, mask
        self.cache = DynamicCache(config=model.config)

    def prefill(self) -> Tensor:
        """Return the logits [N, V] after the prompts."""
        return self._forward(self.ids)

    def select(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, in this order."""
        self.cache.reorder_cache(indices)
        self.mask = self.mask[indices]

    def append(self, tokens: Tensor) -> Tensor:
        """Return the logits [rows, V] after one more token [rows] of each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self._forward(tokens[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        positions = (self.mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return next_logits(self.model, ids, self.cache, attention_mask=self.mask.long(), position_ids=positions)


class CachedRows:
    """Rows of one length with a cache."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.cache = DynamicCache(config=model.config)

    def prefill(self) -> Tensor:
        """Return the logits [N, V] after the prompts."""
        return next_logits(self.model, self.ids, self.cache)

    def select(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, in this order."""
        self.cache.reorder_cache(indices)

    def append(self, tokens: Tensor) -> Tensor:
        """Return the logits [rows, V] after one more token [rows] of each row."""
        return next_logits(self.model, tokens[:, None], self.cache)


class UncachedRows:
    """Rows of one length without a cache."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model, ids

    def prefill(self) -> Tensor:
        """Return the logits [N, V] after the prompts."""
        return next_logits(self.model, self.ids)

    def select(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, in this order."""
        self.ids = self.ids[indices]

    def append(self, tokens: Tensor) -> Tensor:
        """Return the logits [rows, V] after one more token [rows] of each row."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        return next_logits(self.model, self.ids)


def next_logits(model: Any, ids: Tensor, cache: DynamicCache | None = None, **options: Tensor) -> Tensor:
    """Return the logits [rows, V] after the last of the tokens `ids` [rows, T].

    Arguments that the model's forward does not have are left out, and the cache has the name that it has there.
    """
    names = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    values = {**options, "logits_to_keep": 1, "use_cache": cache is not None}
    arguments = {name: value for name, value in values.items() if takes_any or name in names}
    if cache is not None:
        arguments["cache_params" if "cache_params" in names else "past_key_values"] = cache
    return model(input_ids=ids, **arguments).logits[:, -1]


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the prompts' token ids padded on the left, and the mask of their tokens, both [N, P]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]
