"""Decode completions of several turns in rounds, with a decoder that knows no turns.

In a round, all rows that are not over draw their turn. Then all answers are awaited, and the next round begins with the
prompt and the completion so far as a new prompt. It is slow, needs nothing from the model, and defines the completions
that a decoder with turns must draw too, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.sampling.request import DecodeRequest, Draws
from grpo_core.sampling.turn_rows import TurnRows


class TurnRounds:
    """The rounds of one call. `decode` draws completions of one turn; `draws` has places for all tokens."""

    def __init__(self, request: DecodeRequest, decode: Callable[[DecodeRequest], Draws], draws: Draws) -> None:
        assert request.turns is not None
        self.request, self.decode, self.draws = request, decode, draws
        self.turns = TurnRows(request.turns, request.limits.tolist(), request.find_stop)
        rows = len(request.limits)
        self.prompts = [[*request.prompts[row // request.group_size]] for row in range(rows)]
        self.uniforms = None if request.noise is None else request.noise()

    def run(self) -> Draws:
        """Return the completions, whose tokens beyond their ends are padding."""
        request, turns = self.request, self.turns
        assert request.turns is not None
        rows: Sequence[int] = range(len(self.prompts))
        limits = turns.turn_limits(request.turns.first_limit, rows)
        part = replace(request, turns=None, on_ended=None, limits=torch.tensor(limits, device="cpu"))
        while rows:
            self._store(self.decode(part), rows)
            next_limits = self._take_answers(len(rows))
            self._pass_on([row for row in rows if row in turns.over])
            rows = [row for row in rows if row not in turns.over]
            if rows:
                part = self._ask(rows, [next_limits[row] for row in rows])
        draws = self.draws
        draws.lengths.copy_(turns.lengths())
        draws.ended.copy_(turns.ended())
        return replace(draws, turn_ids=turns.turn_ids(draws.ids.shape[1]).to(draws.ids.device))

    def _store(self, drawn: Draws, rows: Sequence[int]) -> None:
        """Report the turns that `rows` have drawn, and write them to the draws."""
        draws, turns = self.draws, self.turns
        ids = [row[:n] for row, n in zip(drawn.ids.tolist(), drawn.lengths.tolist(), strict=True)]
        turns.report(rows, ids, drawn.ended.tolist())
        for i, row in enumerate(rows):
            start, end = turns.starts[row], turns.places[row]
            draws.ids[row, start:end] = drawn.ids[i, : end - start]
            draws.logprobs[row, start:end] = drawn.logprobs[i, : end - start]
            experts = draws.prompt_routed_experts, draws.routed_experts
            if experts[0] is not None and experts[1] is not None:
                assert drawn.prompt_routed_experts is not None and drawn.routed_experts is not None
                prompt = len(self.prompts[row])
                before = drawn.prompt_routed_experts[i, -(prompt + start) :]  # of the prompt and the completion so far
                experts[0][row, -prompt:], experts[1][row, :start] = before[:prompt], before[prompt:]
                experts[1][row, start:end] = drawn.routed_experts[i, : end - start]

    def _take_answers(self, count: int) -> dict[int, int]:
        """Await `count` answers and write them to the draws. Return the places at which the next turns must end."""
        limits: dict[int, int] = {}
        while len(limits) < count:
            for answer in self.turns.take_answers(wait=True):
                [limits[answer.row]] = self.turns.turn_limits(answer.turn_limit, [answer.row])
                if answer.ids:
                    end = self.turns.starts[answer.row]
                    given = torch.tensor([*answer.ids], device=self.draws.ids.device)
                    self.draws.ids[answer.row, end - len(given) : end] = given
                    if self.request.watch is not None:
                        for token in answer.ids:
                            self.request.watch([answer.row], [token])
        return limits

    def _pass_on(self, rows: Sequence[int]) -> None:
        """Pass on the rows that are over."""
        if self.request.on_ended is not None and rows:
            index = torch.tensor(rows, device=self.draws.ids.device)
            self.request.on_ended(index, self.draws.ids[index], self.turns.lengths()[rows])

    def _ask(self, rows: Sequence[int], limits: Sequence[int]) -> DecodeRequest:
        """Return the request for the next turns of `rows`, which must end at these places."""
        places, watch = [self.turns.starts[row] for row in rows], self.request.watch
        lengths = torch.tensor([limit - place for limit, place in zip(limits, places, strict=True)], device="cpu")

        def watch_rows(numbers: list[int], tokens: list[int]) -> None:
            assert watch is not None
            watch([rows[i] for i in numbers], tokens)

        return replace(
            self.request,
            prompts=[
                [*self.prompts[row], *self.draws.ids[row, :place].tolist()]
                for row, place in zip(rows, places, strict=True)
            ],
            group_size=1,
            limits=lengths,
            noise=None if self.uniforms is None else self._noise_from(rows, places, int(lengths.max())),
            watch=None if watch is None else watch_rows,
            turns=None,
            on_ended=None,
        )

    def _noise_from(self, rows: Sequence[int], places: Sequence[int], width: int) -> Callable[[], Tensor]:
        """Return a function that returns the noise of `rows` from these places on, [R, width]."""
        assert self.uniforms is not None
        at = torch.tensor(places, device=self.uniforms.device)[:, None]
        at = (at + torch.arange(width, device=at.device)).clamp(max=self.uniforms.shape[1] - 1)
        uniforms = self.uniforms[torch.tensor(rows, device=at.device)].gather(1, at)
        return lambda: uniforms
