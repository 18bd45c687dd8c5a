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
from dataclasses import dataclass
from typing import Any, Protocol

from grpo_core.scoring.reward_call import MAX_REWARD

MAX_CHARACTERS = 1_000_000  # of an answer, which has at most as many tokens as fit into a completion


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
class ToolReply(Reply):
    """The answer of the tools to a turn with calls."""

    calls: int = 0


class Environment(Protocol):
    """The object of one completion."""

    def step(self, turn: Turn) -> Any:
        """Return the answer to a turn: text, a Reply, None, or an awaitable of one of them."""


class WrongReply(Exception):
    """A step returned something else than a reply; the message is a verb phrase."""


def read_reply(value: Any) -> Reply:
    """Return what a step has returned as a Reply.

    Raises:
        WrongReply: it is none.
    """
    reply = value if isinstance(value, Reply) else Reply(value)
    if reply.text is not None and not isinstance(reply.text, str):
        place = "a Reply whose text is " if isinstance(value, Reply) else ""
        raise WrongReply(f"returned {place}{repr(reply.text)[:40]}; it must be text, a Reply, or None for the end")
    if reply.text is not None and len(reply.text) > MAX_CHARACTERS:
        raise WrongReply(f"returned a text of {len(reply.text):,} characters; it may have {MAX_CHARACTERS:,}")
    try:
        (reply.text or "").encode()
    except UnicodeEncodeError as error:
        raise WrongReply(f"returned text with {error.object[error.start]!a}, half of a character") from None
    reward = reply.reward
    try:
        number = None if reward is None or isinstance(reward, (str, bytes)) else float(reward)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if (reward is None) != (number is None) or (number is not None and not abs(number) <= MAX_REWARD):
        raise WrongReply(f"returned the reward {repr(reward)[:40]}; it must be None or a number from -1e6 to 1e6")
    return reply if number is None else _with_reward(reply, number)


def _with_reward(reply: Reply, reward: float) -> Reply:
    calls = getattr(reply, "calls", 0)
    return ToolReply(reply.text, reward, calls) if calls else Reply(reply.text, reward)
