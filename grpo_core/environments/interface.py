"""The interface of an environment, a class in a user's file of which each completion gets an object of its own.

    from grpo_core import Reply, Turn

    class Calculator:
        def __init__(self, row: dict, seed: int, *, digits: int = 6): ...
        def step(self, turn: Turn) -> str | Reply | None: ...

`row` has the columns of the data and the prompt's text as `prompt`. `seed` is a function of the run's seed, the step,
the prompt and the number of the completion. `step` may be async. It returns text, which is appended to the completion;
None, which ends the completion; or a `Reply`, which may have a reward, too. An optional method `close` is called after
the end. Arguments after the * are the configuration, environment.args.

An environment is a function of the row, the seed and the turns: where its process has ended, the object is made again
and receives the earlier turns again.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

from grpo_core.schema import show_value
from grpo_core.scoring.reward_call import MAX_REWARD

MAX_CHARACTERS = 1_000_000  # of an answer, which has at most as many tokens as fit into a completion
SURROGATE = re.compile("[\ud800-\udfff]")
ADDRESS = re.compile(r" at 0x[0-9a-f]+>")  # of an object without a text of its own; it differs from object to object


@dataclass(frozen=True)
class Turn:
    """A turn that the policy has drawn."""

    text: str  # of this turn alone
    completion: str  # all text after the prompt so far: turns and answers, this turn included
    number: int  # from 0
    ended_by: str  # eos, stop, turn_limit (max_turn_tokens), or limit: the completion has no more tokens


@dataclass(frozen=True)
class Reply:
    """The answer of an environment to a turn."""

    text: str | None = None  # appended to the completion; None: the completion ends
    reward: float | None = None  # of the turn; None: the turn has none


@dataclass(frozen=True)
class Answered:
    """A reply that was checked, as it is sent to the trainer."""

    texts: tuple[str, ...] | None  # of the messages that answer the turn; None: the completion ends
    reward: float | None = None
    calls: int = 0  # of tools
    errors: int = 0  # calls that got an error as their answer


class Environment(Protocol):
    """The object of one completion."""

    def step(self, turn: Turn) -> Any:
        """Return the answer to a turn: text, a Reply, None, or an awaitable of one of them."""


class WrongReply(Exception):
    """A step returned something else than a reply; the message is a verb phrase."""


def read_reply(value: Any) -> Answered:
    """Return what a step has returned, checked.

    Raises:
        WrongReply: it is neither text, a Reply nor None, or has a text or a reward that cannot be used.
    """
    if isinstance(value, Answered):  # of the built-in tools
        for text in value.texts or ():
            _check_text(text)
        return value
    reply = value if isinstance(value, Reply) else Reply(value)
    if reply.text is not None and not isinstance(reply.text, str):
        place = "a Reply whose text is " if isinstance(value, Reply) else ""
        raise WrongReply(f"returned {place}{_describe(reply.text)}; it must be text, a Reply, or None for the end")
    if reply.text is not None:
        _check_text(reply.text)
    return Answered(None if reply.text is None else (reply.text,), _read_reward(reply.reward))


def _describe(value: Any) -> str:
    """Return a value in a few words, without an address."""
    text = show_value(value, 1000)
    return f"an object of the type {type(value).__name__}" if ADDRESS.search(text) else text[:40]


def _check_text(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise WrongReply(f"returned a text of {len(text):,} characters; it may have {MAX_CHARACTERS:,}")
    if SURROGATE.search(text):
        raise WrongReply("returned text with a lone surrogate, half of a character")


def _read_reward(reward: Any) -> float | None:
    if reward is None:
        return None
    try:
        number = math.nan if isinstance(reward, (str, bytes)) else float(reward)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= MAX_REWARD:
        raise WrongReply(f"returned the reward {_describe(reward)}; it must be None or a number from -1e6 to 1e6")
    return number
