"""Rewards: completions and the task's columns in, one number a completion out.

A reward is `fn(completions, prompts=..., **columns) -> list[float | None]`; None means that it cannot be told, and the
completion is left out of its group. A function gets only the columns it names, or all of them if it takes **kwargs.
Its keyword-only arguments with a default are its configuration. Your own needs no registration: `file.py:function`.
"""

import re
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from grpo_core.registry import Registry

REWARDS = Registry("reward")

OPEN, CLOSE = "<think>", "</think>"

LONGEST_NUMBER = 300  # digits


@REWARDS.register("has_think_tags")
def has_think_tags(completions: Sequence[str], *, prompts: Sequence[str]) -> list[float]:
    """1.0 if the completion holds <think>...</think>. A block that the prompt has opened may be closed here."""
    return [float(CLOSE in text.partition(OPEN)[2]) for text in _opened(completions, prompts)]


@REWARDS.register("num_unique_chars")
def num_unique_chars(completions: Sequence[str]) -> list[float]:
    """The count of distinct characters."""
    return [float(len(set(text))) for text in completions]


@REWARDS.register("combined")
def combined(
    completions: Sequence[str], *, prompts: Sequence[str], think_weight: float = 0.7, diversity_weight: float = 0.3
) -> list[float]:
    """The published recipe's: think_weight * has_think_tags + diversity_weight * num_unique_chars (a raw count)."""
    scores = zip(has_think_tags(completions, prompts=prompts), num_unique_chars(completions), strict=True)
    return [think_weight * think + diversity_weight * diversity for think, diversity in scores]


@REWARDS.register("think_format")
def think_format(completions: Sequence[str], *, prompts: Sequence[str]) -> list[float]:
    """1.0 for exactly one well-formed block, first and not empty, and then an answer: <think>...</think>answer."""

    def well_formed(text: str) -> bool:
        if text.count(OPEN) != 1 or text.count(CLOSE) != 1:
            return False
        before, _, rest = text.partition(OPEN)
        thought, closed, answer = rest.partition(CLOSE)
        return bool(not before.strip() and closed and thought.strip() and answer.strip())

    return [float(well_formed(text)) for text in _opened(completions, prompts)]


@REWARDS.register("correct_answer", never_null=("answer",), answer=lambda text: final_number(text))
def correct_answer(completions: Sequence[str], *, answer: Sequence[Any], strict: bool = False) -> list[float | None]:
    r"""1.0 if the completion's final number equals the gold answer's; None where the gold answer has no number.

    The final number stands after the last ####, else in the last \boxed{}, else (unless `strict`) is the last in the
    text. Thousands commas, currency signs, units, percent signs, decimals, simple fractions and signs are understood,
    and 18 equals 18.00.
    """
    scores: list[float | None] = []
    for text, gold in zip(completions, answer, strict=True):
        expected = final_number(str(gold))
        scores.append(None if expected is None else float(final_number(text, strict=strict) == expected))
    return scores


_NUMBER = re.compile(
    r"""(?P<sign>-)?(?:[$€£¥]\s?(?P<inner_sign>-)?)?
        (?P<value>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d) | \d+(?:\.\d+)? | (?<!\d)\.\d+)
        (?:\s?/\s?(?P<under>\d++)(?![.,]++\d))?""",
    re.X,
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


def final_number(text: str, *, strict: bool = False) -> Fraction | None:
    r"""The number that `text` ends on, exactly; None if there is none.

    >>> final_number("so she has 3 + 4 = 7 left.\n#### 1,234.50 dollars")
    Fraction(2469, 2)
    """
    text = text.replace("−", "-").replace("\\$", "$").replace("\\,", "").replace("{,}", ",")
    _, marker, after = text.rpartition("####")
    if marker:
        return _number(after, last=False)
    if boxes := _BOXED.findall(text):
        return _number(re.sub(r"\\d?frac\s*\{(-?\d+)\}\s*\{(\d+)\}", r"\1/\2", boxes[-1]), last=False)
    return None if strict else _number(text, last=True)


def _number(text: str, *, last: bool) -> Fraction | None:
    found = _NUMBER.finditer(text)
    match = next(found, None)
    if last and (rest := deque(found, maxlen=1)):  # no list of them all: a text may hold 50,000
        match = rest[0]
    if match is None or len(match[0]) > LONGEST_NUMBER:
        return None
    value = Fraction(match["value"].replace(",", ""))
    if match["under"] and int(match["under"]):
        value /= int(match["under"])
    before = text[: match.start()]
    joined = re.match(r"\w", before[-1:]) or re.match(r"[\d)\]}]", before.rstrip()[-1:])  # a hyphen or a subtraction
    minus = match["sign"] and not joined
    negative = bool(minus or match["inner_sign"])
    return -value if negative else value


def _opened(completions: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """The completions, with the opening tag in front where the prompt ended on it."""
    pairs = zip(completions, prompts, strict=True)
    return [OPEN + text if prompt.rstrip().endswith(OPEN) else text for text, prompt in pairs]
