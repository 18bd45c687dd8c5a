"""Decode with the model's own forward, one token for all rows at a time. It serves every architecture.

Every prompt is prefilled once, and its cache is copied to the rows of its group. Rows that end are removed at once.
How rows share a forward, and what is cached, is the decoder's method (live_rows.py). Turns are drawn in rounds
(turn_rounds.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_core.model.rotation import find_rotations, split_by_rotation
from grpo_core.model.routing import Routers
from grpo_core.sampling.draw import draw, restrict
from grpo_core.sampling.end_of_sequence import is_eos
from grpo_core.sampling.live_rows import LiveRows, Method, begin
from grpo_core.sampling.recorded_rows import RecordedRows
from grpo_core.sampling.request import DecodeRequest, Draws
from grpo_core.sampling.turn_rounds import TurnRounds

STOP_EVERY = 8  # tokens between two looks for stop strings, for which all texts are decoded; 1 where a user watches


class PlainDecoder:
    """A decoder that calls the model itself. It defines the completions that other decoders must draw too.

    `method` must be one that computes the same as the model without a cache; `find_method` finds it. With `routers`,
    the experts that they choose are recorded.
    """

    def __init__(
        self,
        model: Any,
        pad_id: int,
        eos_ids: Sequence[int],
        method: Method = "padded",
        routers: Routers | None = None,
    ) -> None:
        self.model, self.pad_id, self.method, self.routers = model, pad_id, method, routers
        self.eos = torch.tensor(sorted(eos_ids), device=model.device)

    def release(self) -> None:
        """Do nothing: no memory is held between calls."""

    @torch.no_grad()
    def decode(self, request: DecodeRequest, max_rows: int) -> Draws:
        """Draw the completions of `request`, at most `max_rows` of them at once."""
        draws = self._make_draws(request)
        if request.turns is not None:
            draws = TurnRounds(request, partial(self.decode, max_rows=max_rows), draws).run()
        else:
            self._decode_turn(request, max_rows, draws)
        used = int(draws.lengths.max())
        tables = {name: getattr(draws, name) for name in ("ids", "logprobs", "routed_experts", "turn_ids")}
        return replace(draws, **{name: table[:, :used] for name, table in tables.items() if table is not None})

    def _decode_turn(self, request: DecodeRequest, max_rows: int, draws: Draws) -> None:
        """Draw the completions of a request without turns, and write them to `draws`."""
        rows, device = len(request.limits), self.model.device
        uniforms = None if request.noise is None else request.noise().to(device)
        lengths = [len(request.prompts[row // request.group_size]) for row in range(rows)]
        for part in split_by_rotation(range(rows), lengths, self._key):
            for numbers in torch.tensor(part, device=device).split(max_rows):
                self._decode_rows(request, numbers, uniforms, draws)

    def _make_draws(self, request: DecodeRequest) -> Draws:
        """Return draws with places for all tokens of a request."""
        shape, device = (len(request.limits), int(request.limits.max())), self.model.device
        draws = Draws(
            ids=torch.full(shape, self.pad_id, device=device),
            logprobs=torch.zeros(shape, device=device),
            lengths=torch.zeros(shape[0], dtype=torch.long, device=device),
            ended=torch.zeros(shape[0], dtype=torch.bool, device=device),
        )
        if self.routers is None:
            return draws
        return self._with_experts(draws, max(len(prompt) for prompt in request.prompts), self.routers)

    def _with_experts(self, draws: Draws, prompt_width: int, routers: Routers) -> Draws:
        """Return `draws` with places for the experts of all tokens."""
        rows, width = draws.ids.shape
        none = torch.zeros(rows, 1, len(routers), routers.top_k, dtype=routers.dtype, device=draws.ids.device)
        return replace(
            draws,
            prompt_routed_experts=none.repeat(1, prompt_width, 1, 1),
            routed_experts=none.repeat(1, width, 1, 1),
        )

    def _key(self, length: int) -> tuple[int, ...]:
        """Return a key that is equal for lengths of prompts that can share a forward."""
        rotation = find_rotations(self.model.config).key(length)
        return rotation if self.method == "padded" else (*rotation, length)

    def start(self, prompts: Sequence[Sequence[int]]) -> LiveRows:
        """Return rows of these prompts, which must be able to share a forward."""
        rows = begin(self.method, self.model, prompts, self.pad_id)
        return rows if self.routers is None else RecordedRows(rows, self.routers)

    def _decode_rows(self, request: DecodeRequest, rows: Tensor, uniforms: Tensor | None, draws: Draws) -> None:
        """Draw the completions of `rows` and write them to `draws`."""
        settings, limits = request.settings, request.limits.to(rows.device)
        prompts, counts = (rows // request.group_size).unique_consecutive(return_counts=True)
        live = self.start([request.prompts[i] for i in prompts.tolist()])
        logits = live.prefill().repeat_interleave(counts, dim=0)
        if isinstance(live, RecordedRows) and draws.prompt_routed_experts is not None:
            experts = live.prompt_experts.repeat_interleave(counts, dim=0)
            draws.prompt_routed_experts[rows, -experts.shape[1] :] = experts
        live.select(torch.arange(len(prompts), device=rows.device).repeat_interleave(counts))
        for t in range(draws.ids.shape[1]):
            logits = restrict(logits, settings) if settings.restricted else logits
            token, logprob = draw(logits, settings.temperature, None if uniforms is None else uniforms[rows, t])
            ended = is_eos(token, self.eos)
            draws.ids[rows, t], draws.logprobs[rows, t] = token, logprob
            draws.lengths[rows], draws.ended[rows] = t + 1, ended
            if request.watch is not None:
                request.watch(rows.tolist(), token.tolist())
            continues = ~ended & (t + 1 < limits[rows])
            if request.is_stopped is not None and (request.watch is not None or (t + 1) % STOP_EVERY == 0):
                continues &= ~request.is_stopped(draws.ids[rows], draws.lengths[rows])
            if not continues.all():
                if request.on_ended is not None:
                    ended_rows = rows[~continues]
                    request.on_ended(ended_rows, draws.ids[ended_rows], draws.lengths[ended_rows])
                rows, token = rows[continues], token[continues]
                live.select(continues.nonzero().squeeze(1))
            if len(rows) == 0:
                return
            logits = live.append(token)
            if isinstance(live, RecordedRows) and draws.routed_experts is not None:
                draws.routed_experts[rows, t] = live.newest_experts
