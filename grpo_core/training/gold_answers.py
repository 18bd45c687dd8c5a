"""Count, before a run starts, the gold answers that its rewards cannot judge."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from grpo_core.batch import Task
from grpo_core.config.sections import RewardConfig, RunConfig
from grpo_core.counts import quantify
from grpo_core.data.eval_sets import group_by_set, name_set
from grpo_core.data.rows import name_split
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
            examples = ", ".join(
                f"row {task.index + 1} {_shorten(task.columns[column])}" for task in unread[:MAX_EXAMPLES]
            )
            sentence = (
                f"{title} cannot judge {len(unread):,} of {quantify(len(rows), 'value')} of the column {column!r} in "
                f"the {kind} data, {place}: {examples}"
            )
            if len(unread) > config.data.max_unjudged * len(rows):
                raise ConfigError(
                    f"{sentence}; {_describe_remedy(config, kind)}, name another column with data.columns, or raise "
                    f"data.max_unjudged ({config.data.max_unjudged:g})"
                )
            effect = "count as wrong" if kind == "evaluation" else "are left out of this reward"
            sentences.append(f"{sentence}; they {effect}")
    return sentences


def find_unjudged(reward: RewardConfig, tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """Return the tasks that a reward cannot judge, by the column with the gold answer; only columns that have some."""
    unread: dict[str, list[Task]] = {}
    for column, read in (get_fact(REWARDS.get(reward.name), "gold") or {}).items():
        names = [*inspect.signature(read).parameters][1:]
        args = {name: value for name, value in reward.args.items() if name in names}
        rows = [task for task in tasks if read(task.columns[column], **args) is None]
        if rows:
            unread[column] = rows
    return unread


def _describe_remedy(config: RunConfig, kind: str) -> str:
    """Return the first part of the advice: a reward that may be able to judge the answers."""
    if kind == "training":
        return "use a reward that can (text_match and choice_match are built in, or one of your own)"
    others = [reward.name for reward in config.rewards if reward.name != config.evaluation.reward]
    example = others[0] if others else "text_match"
    return f"set evaluation.reward to one that can, such as {example}, or evaluation.num_tasks to 0"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_EXAMPLE_CHARS else f"{text[: MAX_EXAMPLE_CHARS - 4]} ...{text[-1]}"
