"""Completions by the model's own forward, one token for all rows at a time: any architecture, and what is right.

Every prompt is prefilled once and its cache fanned out to the rows of its group. A row that has ended leaves at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from grpo_core.batch import SamplingParams
from grpo_core.sampling.draw import Draws, draw, restrict


class PlainDecoder:
    """Draws completions from `model`'s live weights."""

    def __init__(self, model: Any, pad_id: int, eos_ids: Sequence[int]) -> None:
        self.model, self.pad_id = model, pad_id
        self.eos = torch.tensor(sorted(eos_ids), device=model.device)
        self.watch: Callable[[list[int], list[int]], None] | None = None  # told rows and their tokens as they are drawn

    def release(self) -> None:
        """Nothing is held between calls."""

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        noise: Callable[[], Tensor] | None,
        limits: Tensor,
        settings: SamplingParams,
        slots: int,
    ) -> Draws:
        """`group_size` completions of every prompt, at most limits [B] tokens each, B = N * G rows, prompt-major.

        noise() [B, T] float64 are the uniforms, None where settings.greedy. At most `slots` rows are decoded at once.
        """
        shape, device = (len(limits), int(limits.max())), self.model.device
        out = Draws(
            torch.full(shape, self.pad_id, device=device),
            torch.zeros(shape, device=device),
            torch.zeros(shape[0], dtype=torch.long, device=device),
            torch.zeros(shape[0], dtype=torch.bool, device=device),
        )
        uniform = None if noise is None else noise().to(device)
        for first in range(0, shape[0], slots):
            rows = torch.arange(first, min(first + slots, shape[0]), device=device)
            self._wave(prompts, group_size, rows, uniform, limits.to(device), settings, out)
        used = int(out.lengths.max())
        return Draws(out.ids[:, :used], out.logprobs[:, :used], out.lengths, out.ended)

    def _wave(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        rows: Tensor,
        noise: Tensor | None,
        limits: Tensor,
        settings: SamplingParams,
        out: Draws,
    ) -> None:
        """The completions of `rows`, written to `out`."""
        which, counts = (rows // group_size).unique_consecutive(return_counts=True)
        ids, mask = left_padded([prompts[i] for i in which.tolist()], self.pad_id, self.model.device)
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask, mask, cache).repeat_interleave(counts, dim=0)
        cache.batch_select_indices(torch.arange(len(which), device=rows.device).repeat_interleave(counts))
        mask = mask.repeat_interleave(counts, dim=0)
        for t in range(out.ids.shape[1]):
            logits = restrict(logits, settings) if settings.restricted else logits
            token, logprob = draw(logits, settings.temperature, None if noise is None else noise[rows, t])
            ended = torch.isin(token, self.eos)
            out.ids[rows, t], out.logprobs[rows, t], out.lengths[rows], out.ended[rows] = token, logprob, t + 1, ended
            if self.watch is not None:
                self.watch(rows.tolist(), token.tolist())
            going = ~ended & (t + 1 < limits[rows])
            if not going.all():
                rows, token, mask = rows[going], token[going], mask[going]
                cache.batch_select_indices(going.nonzero().squeeze(1))
            if len(rows) == 0:
                return
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._forward(token[:, None], mask[:, -1:], mask, cache)

    def _forward(self, ids: Tensor, new: Tensor, seen: Tensor, cache: DynamicCache) -> Tensor:
        """Next-token logits [rows, V] after `ids`; `seen` masks everything up to and including them."""
        positions = (seen.long().cumsum(dim=1) - 1).clamp(min=0)[:, -new.shape[1] :]
        return self.model(
            input_ids=ids,
            attention_mask=seen.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and their mask, [N, P]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]
