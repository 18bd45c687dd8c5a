"""Built-in reward functions.

A reward is `fn(completions, prompts=..., **columns) -> list[float | None]`, one number for each completion. None means
that the completion cannot be scored; it is then left out of its group. The function receives the data columns that it
names as arguments, or all columns if it takes **kwargs. Its keyword-only arguments with a default are its
configuration. A user's function needs no registration: `name: file.py:function`.
"""

import re
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from grpo_core.registry import Registry

REWARDS = Registry("reward")

OPEN, CLOSE = "<think>", "</think>"

MAX_NUMBER_CHARS = 300  # a longer number counts as no number: exact arithmetic with it would be slow


@REWARDS.register("has_think_tags")
def has_think_tags(completions: Sequence[str], *, prompts: Sequence[str]) -> list[float]:
    """1.0 if the completion contains <think>...</think>, or closes a block that the prompt has opened; else 0.0."""
    return [float(CLOSE in text.partition(OPEN)[2]) for text in _with_opened_block(completions, prompts)]


@REWARDS.register("num_unique_chars")
def num_unique_chars(completions: Sequence[str]) -> list[float]:
    """The number of distinct characters in the completion."""
    return [float(len(set(text))) for text in completions]


@REWARDS.register("combined")
def combined(
    completions: Sequence[str], *, prompts: Sequence[str], think_weight: float = 0.7, diversity_weight: float = 0.3
) -> list[float]:
    """think_weight * has_think_tags + diversity_weight * num_unique_chars, the reward of the published recipe."""
    scores = zip(has_think_tags(completions, prompts=prompts), num_unique_chars(completions), strict=True)
    return [think_weight * think + diversity_weight * diversity for think, diversity in scores]


@REWARDS.register("think_format")
def think_format(completions: Sequence[str], *, prompts: Sequence[str]) -> list[float]:
    """1.0 if the completion is one block <think>...</think> that is not empty, and then an answer; else 0.0.

    No other text may come before the block, and the prompt may have opened it.
    """

    def well_formed(text: str) -> bool:
        if text.count(OPEN) != 1 or text.count(CLOSE) != 1:
            return False
        before, _, rest = text.partition(OPEN)
        thought, closed, answer = rest.partition(CLOSE)
        return bool(not before.strip() and closed and thought.strip() and answer.strip())

    return [float(well_formed(text)) for text in _with_opened_block(completions, prompts)]


@REWARDS.register("correct_answer", never_null=("answer",), answer=lambda text: final_number(text))
def correct_answer(completions: Sequence[str], *, answer: Sequence[Any], strict: bool = False) -> list[float | None]:
    r"""1.0 if the completion's final number equals that of the column `answer`, else 0.0; None if that has no number.

    The final number is the one after the last ####, else the one in the last \boxed{}, else (unless `strict`) the last
    number of the text. Thousands commas, currency signs, units, percent signs, decimals, simple fractions and signs are
    understood, and 18 equals 18.00.
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
    r"""Return the final number of `text` as an exact fraction, or None if it has none.

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
    """Return the first or the last number of `text`, or None if it has none."""
    matches = _NUMBER.finditer(text)
    match = next(matches, None)
    if last and (remaining := deque(matches, maxlen=1)):  # a list would be slow: a text may contain 50,000 numbers
        match = remaining[0]
    if match is None or len(match[0]) > MAX_NUMBER_CHARS:
        return None
    value = Fraction(match["value"].replace(",", ""))
    if match["under"] and int(match["under"]):
        value /= int(match["under"])
    before = text[: match.start()]
    is_hyphen = re.match(r"\w", before[-1:])
    is_subtraction = re.match(r"[\d)\]}]", before.rstrip()[-1:])
    has_minus = match["sign"] and not is_hyphen and not is_subtraction
    return -value if has_minus or match["inner_sign"] else value


def _with_opened_block(completions: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Return the completions, with <think> in front where the prompt ends with it."""
    pairs = zip(completions, prompts, strict=True)
    return [OPEN + text if prompt.rstrip().endswith(OPEN) else text for text, prompt in pairs]
