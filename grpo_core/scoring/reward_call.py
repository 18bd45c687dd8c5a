"""Call one reward function on a batch and check what it returns."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence, Set, ValuesView
from dataclasses import dataclass
from typing import Any

from grpo_core.counts import quantify
from grpo_core.objective.reward_labels import OtherRewards
from grpo_core.objective.rewards import OTHER_REWARDS, takes_groups
from grpo_core.registry import get_fact
from grpo_core.schema import keyword_arguments, show_value, summarize_error
from grpo_core.scoring.event_loop import shared_loop

ERROR_OF_TEXT = re.compile("string indices must be integers|'str' object has no attribute")
MAX_REWARD = 1e6  # absolute value; beyond it a reward is a mistake, and float32 cannot resolve differences


@dataclass(frozen=True)
class RewardOutcome:
    """The result of one reward on a batch of completions."""

    values: list[float | None]  # one per completion; None where the reward returned None or failed
    failed: list[bool]  # one per completion
    why: str | None = None  # the reason of the first failure, as a verb phrase


def attempt(function: Callable, completions: list[str], columns: dict[str, Any], group_size: int = 1) -> RewardOutcome:
    """Call a reward and catch its failures.

    `columns` has one value per completion and name; `function` gets those that it has parameters for. It may be async,
    and take groups of `group_size` completions (`takes_groups`). It fails on all completions if it raises (or calls
    sys.exit), or does not return one value per completion, and on a single completion if its value is neither None nor
    a number of at most MAX_REWARD in absolute value.
    """

    def get_values() -> Any:
        values = call_reward(function, completions, columns, group_size)
        return shared_loop().run(values) if inspect.isawaitable(values) else values

    return collect_outcome(get_values, len(completions), group_size if takes_groups(function) else None)


def collect_outcome(get_values: Callable[[], Any], count: int, group_size: int | None = None) -> RewardOutcome:
    """Return the outcome of a reward on `count` completions: `get_values` returns its values or raises its failure.

    With `group_size` these are lists of the values of a group.
    """
    try:
        values = get_values()
        if group_size is not None:
            values, problem = _join_groups(values, count, group_size)
        else:
            problem = _describe_wrong_result(values)
        if problem:
            return failed_outcome(count, problem)
        values = list(values)
    except (Exception, SystemExit) as error:
        return failed_outcome(count, f"raised {summarize_error(error)}{_describe_messages(error)}")
    if len(values) != count:
        return failed_outcome(count, f"returned {quantify(len(values), 'value')} for {quantify(count, 'completion')}")
    numbers = [_to_number(value) for value in values]
    failed = [number is not None and math.isnan(number) for number in numbers]
    why = None
    if True in failed:
        first = failed.index(True)
        why = (
            f"returned {show_value(values[first])} for completion {first}; it must be None or a number from -1e6 to 1e6"
        )
    return RewardOutcome([None if bad else number for number, bad in zip(numbers, failed, strict=True)], failed, why)


def _describe_messages(error: BaseException) -> str:
    """Return a clause for an error of a reward that takes a completion for messages, as TRL's are; "" for others."""
    is_of_text = isinstance(error, (TypeError, AttributeError)) and ERROR_OF_TEXT.match(str(error))
    lines = [frame.line or "" for frame in traceback.extract_tb(error.__traceback__)] if is_of_text else []
    if not any("content" in line for line in lines):
        return ""
    return (
        "; completions and prompts are texts here, not lists of messages: write completion, not "
        "completion[0]['content']"
    )


def failed_outcome(count: int, why: str) -> RewardOutcome:
    """Return the outcome of a reward that failed on all of `count` completions."""
    return RewardOutcome([None] * count, [True] * count, why)


def find_missing_columns(function: Callable, columns: Collection[str]) -> list[str]:
    """Return the columns that `function` needs and data with `columns` does not have."""
    available = {*columns, "completions", "prompts", OTHER_REWARDS}
    bound = function.keywords if isinstance(function, functools.partial) else {}
    reads = get_fact(function, "reads")  # of the columns that its arguments name
    needed = [*list_needed_columns(function), *(reads(**bound) if reads else ())]
    return [name for name in needed if name not in available]


def list_needed_columns(function: Callable) -> list[str]:
    """Return the names of the parameters of `function` without a default, except that of the completions."""
    parameters = [*inspect.signature(function).parameters.values()]
    first = next((p for p in parameters if p.name == "completions"), *parameters[:1])
    others = [p for p in parameters if p is not first]
    return [p.name for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty]


def call_reward(function: Callable, completions: list[str], columns: dict[str, Any], group_size: int = 1) -> Any:
    """Return what `function` returns for copies of the completions and of the columns that it has parameters for.

    A keyword-only parameter with a default is configuration, so a column of that name is not passed. A function that
    takes groups gets a column's value once per group.
    """
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    configuration = keyword_arguments(function)
    by_group = takes_groups(function)

    def shape(values: Sequence[Any]) -> list[Any]:
        return _split_groups(values, group_size) if by_group else list(values)

    own: dict[str, Any] = {}  # copies, which the reward may change
    for name, values in columns.items():
        if name == OTHER_REWARDS and name in parameters:
            own[name] = OtherRewards({other: shape(numbers) for other, numbers in values.items()})
        elif (takes_all or name in parameters) and name not in configuration and name != OTHER_REWARDS:
            own[name] = [_copy(value) for value in (values[::group_size] if by_group else values)]
    if "completions" in parameters:
        return function(completions=shape(completions), **own)
    return function(shape(completions), **own)


def _split_groups(values: Sequence[Any], group_size: int) -> list[list[Any]]:
    return [list(values[start : start + group_size]) for start in range(0, len(values), group_size)]


def _join_groups(values: Any, count: int, group_size: int) -> tuple[list[Any], str | None]:
    """Return the values of all groups as one list, and why they are not N lists of G as a verb phrase, or None."""
    must = f"it must return {quantify(count // group_size, 'list')} of {quantify(group_size, 'value')}"
    if _describe_wrong_result(values):
        return [], f"returned {show_value(values)}; {must}"
    groups = list(values)
    if len(groups) * group_size != count:
        return [], f"returned {quantify(len(groups), 'list')}; {must}"
    for i, group in enumerate(groups):
        if _describe_wrong_result(group):
            return [], f"returned {show_value(group)} for group {i}; {must}"
        groups[i] = list(group)
        if len(groups[i]) != group_size:
            return [], f"returned {quantify(len(groups[i]), 'value')} for group {i}; {must}"
    return [value for group in groups for value in group], None


def _copy(value: Any) -> Any:
    """Return a value of a column that can be changed without changing the task."""
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value


def _describe_wrong_result(values: Any) -> str | None:
    """Return why the result of a reward cannot be a value for each completion, as a verb phrase, or None."""
    ordered = hasattr(values, "__iter__") and not isinstance(values, (str, bytes, bytearray, memoryview, Mapping, Set))
    if ordered or isinstance(values, ValuesView):
        return None
    kind = f"a {type(values).__name__}, " if isinstance(values, (Mapping, Set)) else ""
    return f"returned {kind}{show_value(values)}; it must return a list with a number for each"


def _to_number(value: Any) -> float | None:
    """Return a value that a reward returned as a float or None; NaN if it is not valid."""
    if value is None:
        return None
    if isinstance(value, (str, bytes)):
        return math.nan
    try:
        number = float(value)
    except Exception:  # of any class
        return math.nan
    return number if abs(number) <= MAX_REWARD else math.nan
