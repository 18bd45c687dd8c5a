"""One call of one reward on a batch, whatever the reward does short of ending or hanging this process."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from grpo_core.schema import keyword_arguments, summarize_error

LARGEST = 1e6  # a reward beyond it is a mistake, and float32 would not tell its neighbours apart


@dataclass(frozen=True)
class Outcome:
    """What a reward made of a batch."""

    values: list[float | None]  # one a completion; None where it could not tell, and where it failed
    failed: list[bool]  # where it failed
    why: str | None = None  # the first failure, in words


def attempt(function: Callable, completions: list[str], columns: dict[str, Any]) -> Outcome:
    """Call a reward, whatever it does short of ending or hanging this process.

    It fails on all completions where it raises (or calls sys.exit) or does not return a list with one value for each,
    and on those whose value is neither None nor a number of at most a million in size.
    """
    try:
        values = _call(function, completions, columns)
        if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
            return failure(
                len(completions), f"returned {repr(values)[:40]}; it must return a list with a number for each"
            )
        values = list(values)
    except (Exception, SystemExit) as error:
        return failure(len(completions), f"raised {summarize_error(error)}")
    if len(values) != len(completions):
        return failure(len(completions), f"returned {len(values)} values for {len(completions)} completions")
    numbers = [_number_or_none(value) for value in values]
    failed = [math.isnan(number or 0.0) for number in numbers]
    why = None
    if True in failed:
        first = failed.index(True)
        why = f"returned {repr(values[first])[:40]} for completion {first}; it must be None or a number up to a million"
    return Outcome([None if bad else number for number, bad in zip(numbers, failed, strict=True)], failed, why)


def failure(count: int, why: str) -> Outcome:
    """The outcome of a reward that failed on all of `count` completions."""
    return Outcome([None] * count, [True] * count, why)


def missing_columns(function: Callable, columns: Collection[str]) -> list[str]:
    """What `function` needs and data with these columns does not have."""
    given = {*columns, "completions", "prompts"}
    return [name for name in needed_columns(function) if name not in given]


def needed_columns(function: Callable) -> list[str]:
    """The names of what `function` must be given, after the completions."""
    _, *others = inspect.signature(function).parameters.values()
    return [p.name for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty]


def _call(function: Callable, completions: list[str], available: dict[str, Any]) -> list[float | None]:
    """Hand over the completions and the columns that `function` takes; its configuration is never a column's."""
    parameters = inspect.signature(function).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    configured = keyword_arguments(function)
    columns = {k: v for k, v in available.items() if (everything or k in parameters) and k not in configured}
    if "completions" in parameters:
        return function(completions=completions, **columns)
    return function(completions, **columns)


def _number_or_none(value: Any) -> float | None:
    """A value that a reward returned, nan where it is no value for one."""
    try:
        number = None if value is None else math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if number is None or abs(number) <= LARGEST else math.nan
