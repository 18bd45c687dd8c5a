"""Count, before a run starts, the gold answers that its rewards cannot judge."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grpo_core.batch import Task
from grpo_core.config.sections import RewardConfig, RunConfig
from grpo_core.counts import quantify
from grpo_core.data.eval_sets import group_by_set, name_set
from grpo_core.data.rows import Row, name_split
from grpo_core.data.tasks_on_disk import list_rows, select_tasks
from grpo_core.objective.rewards import REWARDS
from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError

MAX_EXAMPLES = 3
MAX_EXAMPLE_CHARS = 40


def check_gold_answers(
    config: RunConfig,
    tasks: Sequence[Task],
    eval_tasks: Sequence[Task],
    source: str | None = None,  # of the evaluation tasks; default: as configured
) -> list[str]:
    """Return a sentence for each reward that cannot judge some of the gold answers; three of them are shown.

    Raises:
        ConfigError: they are more than the share data.max_unjudged of the training or of the evaluation tasks.
    """
    sentences = []
    train_source = name_split(config.data.path, config.data.split)
    uses = [(f"reward {reward.name}", reward, tasks, "training", train_source) for reward in config.rewards]
    name = config.evaluation.reward
    for eval_set, set_tasks in group_by_set(eval_tasks).items():
        title = f"evaluation.reward {name}" + (f" (set {eval_set})" if eval_set else "")
        uses.append((title, RewardConfig(name), set_tasks, "evaluation", source or name_set(config, eval_set)))
    for title, reward, rows, kind, place in uses:
        for column, unread in find_unjudged(reward, rows).items():
            examples = ", ".join(f"row {index + 1} {_shorten(value)}" for index, value in unread.examples)
            sentence = (
                f"{title} cannot judge {unread.count:,} of {quantify(len(rows), 'value')} of the column {column!r} in "
                f"the {kind} data, {place}: {examples}"
            )
            if unread.count > config.data.max_unjudged * len(rows):
                raise ConfigError(
                    f"{sentence}; {_describe_remedy(config, kind)}, {_describe_place(config, column, unread)}"
                    f"{'' if unread.count == len(rows) else 'leave such rows out with data.bad_rows: drop, '}"
                    f"or raise data.max_unjudged ({config.data.max_unjudged:g})"
                )
            effect = "count as wrong" if kind == "evaluation" else "are left out of this reward"
            sentences.append(f"{sentence}; they {effect}")
    return sentences


def drop_unjudged(
    config: RunConfig, tasks: Sequence[Task], eval_tasks: Sequence[Task]
) -> tuple[Sequence[Task], list[Task], list[str]]:
    """Leave out tasks whose gold answers cannot be judged, if data.bad_rows is drop, and report their number.

    These are training tasks that no reward with a gold answer can judge, and evaluation tasks that evaluation.reward
    cannot judge. If no task would be left, all of them stay, and `check_gold_answers` refuses the run.
    """
    if config.data.bad_rows != "drop":
        return tasks, eval_tasks, []
    sentences, parts = [], []
    uses = (("training", config.rewards, tasks), ("evaluation", [RewardConfig(config.evaluation.reward)], eval_tasks))
    for kind, rewards, rows in uses:
        readers = [reader for reward in rewards if (reader := _list_readers(reward))]
        pairs = list_rows(rows) if readers else ()
        unjudged = [i for i, (_, row) in enumerate(pairs) if not any(_can_judge(row, reader) for reader in readers)]
        if not unjudged or len(unjudged) == len(rows):
            parts.append(rows)
            continue
        left_out = set(unjudged)
        parts.append(select_tasks(rows, [i for i in range(len(rows)) if i not in left_out]))
        examples = ", ".join(f"row {rows[i].index + 1}" for i in unjudged[:MAX_EXAMPLES])
        sentences.append(
            f"{quantify(len(unjudged), 'row is', 'rows are')} left out of {quantify(len(rows), 'row')} of the {kind} "
            f"data, because data.bad_rows is drop and no reward can judge the gold answer: {examples}"
        )
    return parts[0], list(parts[1]), sentences


@dataclass
class Unjudged:
    """The gold answers of one column that a reward cannot judge."""

    count: int = 0
    examples: list[tuple[int, Any]] = field(default_factory=list)  # number of the row, and the value


def find_unjudged(reward: RewardConfig, tasks: Sequence[Task]) -> dict[str, Unjudged]:
    """Return the gold answers that a reward cannot judge, by the column with them; only columns that have some."""
    unread: dict[str, Unjudged] = {}
    readers = _list_readers(reward)
    for index, row in list_rows(tasks) if readers else ():
        for column, read in readers.items():
            if read(row[column]) is None:
                part = unread.setdefault(column, Unjudged())
                part.count += 1
                part.examples += [(index, row[column])] if part.count <= MAX_EXAMPLES else []
    return unread


def _list_readers(reward: RewardConfig) -> dict[str, Callable[[Any], Any]]:
    """Return the columns with the gold answers of a reward, each with the function that reads it, arguments bound."""
    readers = {}
    for column, read in (get_fact(REWARDS.get(reward.name), "gold") or {}).items():
        names = [*inspect.signature(read).parameters][1:]
        readers[column] = partial(read, **{name: value for name, value in reward.args.items() if name in names})
    return readers


def _can_judge(row: Row, readers: dict[str, Callable[[Any], Any]]) -> bool:
    """Return whether a row has a gold answer in every column; a missing column is reported by `check_columns`."""
    values = [(row[column], read) for column, read in readers.items() if column in row]
    return all(value is not None and read(value) is not None for value, read in values)


def _describe_remedy(config: RunConfig, kind: str) -> str:
    """Return the first part of the advice: a reward that may be able to judge the answers."""
    if kind == "training":
        return "use a reward that can (math_equal, text_match and choice_match are built in, or one of your own)"
    others = [reward.name for reward in config.rewards if reward.name != config.evaluation.reward]
    example = others[0] if others else "math_equal or text_match"
    return f"set evaluation.reward to one that can, such as {example}, or evaluation.num_tasks to 0"


def _describe_place(config: RunConfig, column: str, unread: Unjudged) -> str:
    """Return the second part of the advice: where else the answers may be, such as inside of the values."""
    value, path = unread.examples[0][1], config.data.columns.get(column, column)
    if isinstance(value, (list, tuple)) and value and isinstance(value[-1], Mapping):
        value, path = value[-1], f"{path}.-1"
    if not isinstance(value, Mapping) or not value:
        return "name another column with data.columns, "
    key = "content" if "content" in value else next(iter(value))
    return f"name a place in these values, such as data.columns.{column}={path}.{key}, "


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_EXAMPLE_CHARS else f"{text[: MAX_EXAMPLE_CHARS - 4]} ...{text[-1]}"
