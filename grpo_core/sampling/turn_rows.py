"""The turns of the rows of one call of a decoder: where each began, which rows wait for an answer, which are over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grpo_core.sampling.turns import Answer, EndedTurn, TurnEnd, Turns

FindStop = Callable[[Sequence[int]], int | None]  # tokens of a turn up to the one that completes its first stop string


class TurnRows:
    """The turns of B rows. A place is the number of a token in its row's completion, drawn and given tokens counted."""

    def __init__(self, turns: Turns, limits: Sequence[int], find_stop: FindStop | None) -> None:
        self.turns, self.limits, self.find_stop = turns, [*limits], find_stop
        rows = len(self.limits)
        self.starts = [0] * rows  # place of the first token of the newest turn
        self.places = [0] * rows  # tokens of the completion; of a row that draws, those before its newest turn
        self.waiting: set[int] = set()
        self.over: set[int] = set()
        self._drawn: list[list[tuple[int, int]]] = [[] for _ in range(rows)]  # first place of each turn, and its end
        self._is_cut_off = [False] * rows

    def turn_limits(self, turn_limit: int | None, rows: Sequence[int]) -> list[int]:
        """Return the place at which the newest turn of each of `rows` must end, if it may have `turn_limit` tokens."""
        return [
            self.limits[row] if turn_limit is None else min(self.limits[row], self.starts[row] + turn_limit)
            for row in rows
        ]

    def report(self, rows: Sequence[int], ids: Sequence[Sequence[int]], has_eos: Sequence[bool]) -> None:
        """Report the turns that `rows` have ended, whose ids are `ids`; each is cut after its first stop string."""
        ended = []
        for row, turn, is_eos in zip(rows, ids, has_eos, strict=True):
            assert turn and row not in self.waiting and row not in self.over
            end = None if self.find_stop is None else self.find_stop(turn)
            turn = turn[:end]
            self.places[row] = self.starts[row] + len(turn)
            is_full = self.places[row] >= self.limits[row]
            by: TurnEnd = "stop" if end else "eos" if is_eos else "limit" if is_full else "turn_limit"
            self._drawn[row].append((self.starts[row], self.places[row]))
            self._is_cut_off[row] = by == "limit"
            self.waiting.add(row)
            ended.append(EndedTurn(row, turn, by))
        if ended:
            self.turns.report(ended)

    def take_answers(self, *, wait: bool) -> list[Answer]:
        """Return the answers that have come, in the order of their rows; the rows draw their next turn, or are over."""
        answers = sorted(self.turns.take_answers(wait), key=lambda answer: answer.row)
        for answer in answers:
            row = answer.row
            assert row in self.waiting, f"row {row} has an answer, but no turn without one"
            self.waiting.remove(row)
            if answer.ids is None:
                self.over.add(row)
                continue
            self.places[row] += len(answer.ids)
            self.starts[row] = self.places[row]
            assert self.places[row] < self.limits[row], f"the answer to row {row} leaves no room for another token"
            assert answer.turn_limit is None or answer.turn_limit >= 1
        return answers

    def lengths(self) -> Tensor:
        """Return the tokens of each completion, [B]."""
        return torch.tensor(self.places, device="cpu")

    def ended(self) -> Tensor:
        """Return whether each completion has ended otherwise than by having no room for another token, [B] bool."""
        return ~torch.tensor(self._is_cut_off, device="cpu")

    def turn_ids(self, width: int) -> Tensor:
        """Return the number of the turn of every drawn token, -1 elsewhere, [B, width] int16."""
        numbers = torch.full((len(self.limits), width), -1, dtype=torch.int16, device="cpu")
        for row, turns in enumerate(self._drawn):
            for number, (start, end) in enumerate(turns):
                numbers[row, start:end] = number
        return numbers


class WatchedTurns:
    """Turns that record whether one was reported: the call then cannot be repeated, as a turn is answered once."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.first_limit = turns, turns.first_limit
        self.any_reported = False

    def report(self, turns: Sequence[EndedTurn]) -> None:
        """Receive turns that have ended."""
        self.any_reported = True
        self.turns.report(turns)

    def take_answers(self, wait: bool) -> list[Answer]:
        """Return the answers that have come."""
        return self.turns.take_answers(wait)
