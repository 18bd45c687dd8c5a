"""The interface between a decoder and what answers the turns of completions while other rows decode.

A completion is a sequence of stretches of tokens: drawn by the policy, or given by an environment. A turn is a stretch
of drawn tokens; it ends with an end-of-sequence token, a stop string, its own limit of tokens, or the completion's. The
decoder reports a turn that has ended and goes on with other rows. Later it takes the answers that have come: tokens
that are appended to the row, after which the policy draws the next turn; or the end of the completion.

Laws:
- The noise of a token depends on its row and its place in the completion alone, given tokens counted.
- A given token is computed like a drawn one, in a step of its own, but nothing is drawn for it. So a decoder's
  computation needs nothing new, and the keys, values and states of earlier turns stay where they are.
- A row that waits keeps its memory. What the others compute meanwhile does not change it.
- The steps of a decoder depend on the answers and on the calls of `take_answers` that returned them, and on no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

TurnEnd = Literal["eos", "stop", "turn_limit", "limit"]  # `limit`: the completion may have no more tokens


@dataclass(frozen=True)
class EndedTurn:
    """A turn that a row has drawn. `ids` are the tokens of the turn alone, the one that ends it included."""

    row: int
    ids: Sequence[int]
    ended_by: TurnEnd


@dataclass(frozen=True)
class Answer:
    """The answer to a row's newest turn: tokens to append, or with None the end of the completion.

    turn_limit: The greatest number of tokens of the next turn, at least 1; None: as many as the completion may have.
    """

    row: int
    ids: Sequence[int] | None
    turn_limit: int | None = None


class Turns(Protocol):
    """The answers to the turns of one call of a decoder.

    Every ended turn that is reported gets exactly one answer, also one that ended by `limit`, whose answer is the end.
    The tokens of an answer leave room for at least one more token of the row; otherwise its answer is the end.
    """

    first_limit: int | None  # tokens of a completion's first turn

    def report(self, turns: Sequence[EndedTurn]) -> None:
        """Receive turns that have ended. It returns at once."""

    def take_answers(self, wait: bool) -> list[Answer]:
        """Return the answers that have come since the last call; with `wait`, at least one, as soon as there is one."""
