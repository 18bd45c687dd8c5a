"""Rewards: completions and the task's columns in, one number a completion out.

A reward is `fn(completions, prompts=..., **columns) -> list[float | None]`; None means that it cannot be told, and the
completion is left out of its group. A function gets only the columns it names, or all of them if it takes **kwargs.
Its keyword-only arguments with a default are its configuration. Your own needs no registration: `file.py:function`.
"""

import inspect
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from grpo_core.batch import Task
from grpo_core.registry import Registry
from grpo_core.schema import ConfigError, in_short, keyword_arguments

REWARDS = Registry("reward")

OPEN, CLOSE = "<think>", "</think>"


@REWARDS.register("has_think_tags")
def has_think_tags(completions: Sequence[str], *, prompts: Sequence[str]) -> list[float]:
    """1.0 if the completion holds <think>...</think>. A block that the prompt has opened may be closed here."""
    return [float(bool(re.search(r"<think>.*?</think>", text, re.S))) for text in _opened(completions, prompts)]


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


@REWARDS.register("correct_answer")
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
        (?:\s?/\s?(?P<under>\d+)(?![\d.,]*\d))?""",
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
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1 if last else 0]
    value = Fraction(match["value"].replace(",", ""))
    if match["under"] and int(match["under"]):
        value /= int(match["under"])
    minus = match["sign"] and not re.search(
        r"[\d)\]}]\s*$|\w$", text[: match.start()]
    )  # else a subtraction or a hyphen
    negative = bool(minus or match["inner_sign"])
    return -value if negative else value


def _opened(completions: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """The completions, with the opening tag in front where the prompt ended on it."""
    pairs = zip(completions, prompts, strict=True)
    return [OPEN + text if prompt.rstrip().endswith(OPEN) else text for text, prompt in pairs]


@dataclass(frozen=True)
class Reward:
    """A reward function with its arguments bound, under the name it is logged by."""

    name: str
    weight: float
    function: Callable[..., list[float | None]]


@dataclass(frozen=True)
class Scores:
    rewards: Tensor  # [N, G] the weighted sum; NaN where no reward could tell
    by_name: dict[str, Tensor]  # name -> [N, G], NaN for None


def score(
    rewards: Sequence[Reward],
    tasks: Sequence[Task],  # N
    completions: Sequence[str],  # B = N * G texts, prompt-major
    group_size: int,
) -> Scores:
    """Call every reward on all completions and add them up by weight. A None is left out of its sum.

    Raises:
        ConfigError: a reward raised, or did not return a finite number or None for each completion.
    """
    rows = [task for task in tasks for _ in range(group_size)]
    available = {name: [task.columns[name] for task in rows] for name in rows[0].columns}
    available["prompts"] = [task.prompt for task in rows]
    by_name = {}
    for reward in rewards:
        try:
            values = _call(reward.function, list(completions), available)
        except Exception as error:
            raise ConfigError(f"reward {reward.name} raised {in_short(error)}") from error
        numbers = _numbers(reward.name, values, len(rows))
        by_name[reward.name] = torch.tensor(numbers, dtype=torch.float32).view(-1, group_size)
    stacked = torch.stack(list(by_name.values()))  # [K, N, G]
    weights = torch.tensor([reward.weight for reward in rewards]).view(-1, 1, 1)
    counted = ~stacked.isnan() & (weights != 0)  # weight 0: logged and nothing else
    total = torch.where(counted, stacked * weights, 0.0).sum(dim=0)
    return Scores(total.masked_fill(~counted.any(dim=0), math.nan), by_name)


def _numbers(name: str, values: Any, count: int) -> list[float]:
    """What a reward returned as floats, NaN for None."""
    if isinstance(values, str) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise ConfigError(f"reward {name} returned {values!r}; it must return a list with a number for each completion")
    if len(values) != count:
        raise ConfigError(f"reward {name} returned {len(values)} values for {count} completions")
    numbers = []
    for i, value in enumerate(values):
        try:
            number = math.nan if value is None or isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if value is not None and not math.isfinite(number):
            what = repr(value)[:40]
            raise ConfigError(f"reward {name} returned {what} for completion {i}; it must be a finite number, or None")
        numbers.append(number)
    return numbers


def missing_columns(function: Callable, columns: Collection[str]) -> list[str]:
    """What `function` needs and data with these columns does not have."""
    given = {*columns, "completions", "prompts"}
    _, *others = inspect.signature(function).parameters.values()
    named = (p.name for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty)
    return [name for name in named if name not in given]


def _call(function: Callable, completions: list[str], available: dict[str, Any]) -> list[float | None]:
    """Hand over the completions and the columns that `function` takes; its configuration is never a column's."""
    parameters = inspect.signature(function).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    configured = keyword_arguments(function)
    columns = {k: v for k, v in available.items() if (everything or k in parameters) and k not in configured}
    if "completions" in parameters:
        return function(completions=completions, **columns)
    return function(completions, **columns)
