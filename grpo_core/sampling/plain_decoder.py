"""Decode with the model's own forward, one token for all rows at a time. It serves every architecture.

Every prompt is prefilled once, and its cache is copied to the rows of its group. Rows that end are removed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from grpo_core.model.rotation import find_rotations, split_by_rotation
from grpo_core.sampling.draw import draw, restrict
from grpo_core.sampling.request import DecodeRequest, Draws

STOP_EVERY = 8  # tokens between two looks for stop strings, for which all texts are decoded; 1 where a user watches


class PlainDecoder:
    """A decoder that calls the model itself. It defines the completions that other decoders must draw too."""

    def __init__(self, model: Any, pad_id: int, eos_ids: Sequence[int]) -> None:
        self.model, self.pad_id = model, pad_id
        self.eos = torch.tensor(sorted(eos_ids), device=model.device)

    def release(self) -> None:
        """Do nothing: no memory is held between calls."""

    @torch.no_grad()
    def decode(self, request: DecodeRequest, max_rows: int) -> Draws:
        """Draw the completions of `request`, at most `max_rows` of them at once."""
        shape, device = (len(request.limits), int(request.limits.max())), self.model.device
        draws = Draws(
            ids=torch.full(shape, self.pad_id, device=device),
            logprobs=torch.zeros(shape, device=device),
            lengths=torch.zeros(shape[0], dtype=torch.long, device=device),
            ended=torch.zeros(shape[0], dtype=torch.bool, device=device),
        )
        uniforms = None if request.noise is None else request.noise().to(device)
        lengths = [len(request.prompts[row // request.group_size]) for row in range(shape[0])]
        for part in split_by_rotation(range(shape[0]), lengths, find_rotations(self.model.config).key):
            for rows in torch.tensor(part, device=device).split(max_rows):
                self._decode_rows(request, rows, uniforms, draws)
        used = int(draws.lengths.max())
        return Draws(draws.ids[:, :used], draws.logprobs[:, :used], draws.lengths, draws.ended)

    def _decode_rows(self, request: DecodeRequest, rows: Tensor, uniforms: Tensor | None, draws: Draws) -> None:
        """Draw the completions of `rows` and write them to `draws`."""
        settings, limits = request.settings, request.limits.to(rows.device)
        prompts, counts = (rows // request.group_size).unique_consecutive(return_counts=True)
        ids, mask = pad_left([request.prompts[i] for i in prompts.tolist()], self.pad_id, self.model.device)
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask, mask, cache).repeat_interleave(counts, dim=0)
        cache.batch_select_indices(torch.arange(len(prompts), device=rows.device).repeat_interleave(counts))
        mask = mask.repeat_interleave(counts, dim=0)
        for t in range(draws.ids.shape[1]):
            logits = restrict(logits, settings) if settings.restricted else logits
            token, logprob = draw(logits, settings.temperature, None if uniforms is None else uniforms[rows, t])
            ended = torch.isin(token, self.eos)
            draws.ids[rows, t], draws.logprobs[rows, t] = token, logprob
            draws.lengths[rows], draws.ended[rows] = t + 1, ended
            if request.watch is not None:
                request.watch(rows.tolist(), token.tolist())
            continues = ~ended & (t + 1 < limits[rows])
            if request.is_stopped is not None and (request.watch is not None or (t + 1) % STOP_EVERY == 0):
                continues &= ~request.is_stopped(draws.ids[rows], draws.lengths[rows])
            if not continues.all():
                rows, token, mask = rows[continues], token[continues], mask[continues]
                cache.batch_select_indices(continues.nonzero().squeeze(1))
            if len(rows) == 0:
                return
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._forward(token[:, None], mask[:, -1:], mask, cache)

    def _forward(self, ids: Tensor, new_mask: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Return the next-token logits [rows, V] after `ids`. `mask` covers the cached tokens and the new ones."""
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -new_mask.shape[1] :]
        return self.model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the prompts' token ids padded on the left, and the mask of their tokens, both [N, P]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]
