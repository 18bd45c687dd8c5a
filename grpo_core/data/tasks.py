"""Read the tasks of a run, or take those that the launcher has read for the ranks that it forks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.config.sections import RunConfig
from grpo_core.data.eval_sets import load_eval_sets
from grpo_core.data.prompts import make_tasks
from grpo_core.data.rows_on_disk import RowsOnDisk
from grpo_core.data.tasks_on_disk import make_tasks_on_disk

# to train on, to evaluate on, the numbers of prompts of both that were too long, and sentences about bad rows
Tasks = tuple[Sequence[Task], list[Task], tuple[int, int], list[str]]

_offered: tuple[Any, Tasks] | None = None  # the keys that the tasks depend on, and the tasks


def read_tasks(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Tasks:
    """Load the rows of a run and turn them into tasks.

    Raises:
        ConfigError: as `load_eval_sets` and `make_tasks`.
    """
    rows, sets = load_eval_sets(config)
    notes: list[str] = []
    tasks: Sequence[Task]
    if isinstance(rows, RowsOnDisk):
        tasks, num_too_long = make_tasks_on_disk(rows, config.data, tokenizer, notes)
    else:
        tasks, num_too_long = make_tasks(rows, config.data, tokenizer, notes)
    eval_tasks: list[Task] = []
    num_eval_too_long = 0
    for name, eval_rows in sets.items():
        set_tasks, num_too_long_in_set = make_tasks(eval_rows, config.data, tokenizer, notes)
        eval_tasks += [replace(task, eval_set=name) for task in set_tasks]
        num_eval_too_long += num_too_long_in_set
    return tasks, eval_tasks, (num_too_long, num_eval_too_long), notes


def offer_tasks(config: RunConfig, tasks: Tasks) -> None:
    """Keep the tasks of a run for `find_offered_tasks` in this process and its forks."""
    global _offered
    _offered = (_source(config), tasks)


def find_offered_tasks(config: RunConfig) -> Tasks | None:
    """Return the tasks that were offered for this data and tokenizer, or None."""
    return _offered[1] if _offered is not None and _offered[0] == _source(config) else None


def _source(config: RunConfig) -> tuple:
    evaluation = config.evaluation
    model = config.model
    return config.data, evaluation.num_tasks, evaluation.sets, model.path, model.revision, model.trust_remote_code
