"""Turns by a script: rollouts in which some tokens were given, and an environment whose answers are a function of the row."""

from dataclasses import replace

import torch

from grpo_core.batch import Rollouts
from grpo_core.sampling.turns import Answer


def with_turns(rollouts: Rollouts, seed=5) -> Rollouts:
    """The rollouts with some of their tokens given; the first and the last token of a row are drawn."""
    mask, generator = rollouts.completion_mask, torch.Generator().manual_seed(seed)
    last = torch.arange(mask.shape[1]) == mask.sum(dim=1, keepdim=True) - 1
    drawn = mask & (last | (torch.rand(mask.shape, generator=generator) < 0.6))
    drawn[:, 0] = mask[:, 0]
    begins = drawn & ~torch.cat([torch.zeros_like(drawn[:, :1]), drawn[:, :-1]], dim=1)
    turns = torch.where(drawn, begins.cumsum(dim=1) - 1, -1).to(torch.int16)
    logprobs = rollouts.rollout_logprobs * drawn
    return replace(rollouts, completion_mask=drawn, valid_mask=mask, turn_ids=turns, rollout_logprobs=logprobs)


class ScriptedTurns:
    """Answers that depend on the row and the turn alone. An answer comes `delay(row, number)` calls after its turn.

    `script(row, number, turn)` returns the ids of an answer, None for the end, or a pair of ids and the next limit.
    """

    def __init__(self, script, *, limits=None, delay=lambda row, number: 0, first_limit=None):
        self.script, self.limits, self.delay, self.first_limit = script, limits, delay, first_limit
        self.turns, self.tokens, self.waiting, self.calls, self.waits = {}, {}, [], 0, 0

    def report(self, turns):
        for turn in turns:
            assert turn.row not in [row for row, _, _ in self.waiting], "a row reports a turn while it waits"
            ended = self.turns.setdefault(turn.row, [])
            ended.append((list(turn.ids), turn.ended_by))
            self.tokens[turn.row] = self.tokens.get(turn.row, 0) + len(turn.ids)
            self.waiting.append((turn.row, self.calls + self.delay(turn.row, len(ended) - 1), turn))

    def take_answers(self, wait):
        self.calls += 1
        self.waits += wait
        assert self.waiting or not wait, "nothing to wait for"
        if wait:
            self.calls = max(self.calls, 1 + min(at for _, at, _ in self.waiting))
        due = [(row, turn) for row, at, turn in self.waiting if at < self.calls]
        self.waiting = [entry for entry in self.waiting if entry[1] >= self.calls]
        return [self._answer(row, turn) for row, turn in due]

    def _answer(self, row, turn):
        answer = None if turn.ended_by == "limit" else self.script(row, len(self.turns[row]) - 1, turn)
        ids, limit = answer if isinstance(answer, tuple) else (answer, None)
        if ids is not None and self.limits is not None and self.tokens[row] + len(ids) >= int(self.limits[row]):
            ids = None
        if ids is not None:
            self.tokens[row] += len(ids)
        return Answer(row, ids, limit)
