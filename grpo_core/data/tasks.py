"""Read the tasks of a run, or take those that the launcher has read for the ranks that it forks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.config.sections import RunConfig
from grpo_core.data.eval_sets import check_source_overlap, load_eval_sets
from grpo_core.data.prompts import make_tasks
from grpo_core.data.rows_on_disk import RowsOnDisk
from grpo_core.data.tasks_on_disk import make_tasks_on_disk
from grpo_core.schema import ConfigError

# to train on, to evaluate on, the numbers of prompts of both that were too long, and sentences about bad rows
Tasks = tuple[Sequence[Task], list[Task], tuple[int, int], list[str]]

_offered: tuple[Any, Tasks] | None = None  # the keys that the tasks depend on, and the tasks


def read_tasks(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Tasks:
    """Load the rows of a run and turn them into tasks; those of several sources stand one after another.

    Raises:
        ConfigError: as `load_eval_sets` and `make_tasks`; the message names the source.
    """
    if not config.data.sources:
        return _read_source(config, tokenizer)
    check_source_overlap(config)
    tasks: list[Task] = []
    eval_tasks: list[Task] = []
    notes: list[str] = []
    num_too_long = num_eval_too_long = 0
    for i, name in enumerate(config.source_names):
        with naming_source(i, name):
            part, eval_part, numbers, sentences = _read_source(config.of_source(name), tokenizer)
        tasks += [replace(task, source=name) for task in part]
        eval_tasks += [replace(task, source=name, eval_set=name) for task in eval_part]
        num_too_long, num_eval_too_long = num_too_long + numbers[0], num_eval_too_long + numbers[1]
        notes += name_in_sentences(i, name, sentences)
    return tasks, eval_tasks, (num_too_long, num_eval_too_long), notes


@contextmanager
def naming_source(number: int, name: str) -> Iterator[None]:
    """Name a source in the message of a ConfigError that is raised inside; "" has no name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"data.sources[{number}] ({name}): {error}" if name else str(error)) from error


def name_in_sentences(number: int, name: str, sentences: Sequence[str]) -> list[str]:
    """Return sentences about a source with its name in front; "" has no name."""
    return [f"data.sources[{number}] ({name}): {sentence}" if name else sentence for sentence in sentences]


def select_source(tasks: Sequence[Task], name: str) -> Sequence[Task]:
    """Return the tasks of a source; "" has all."""
    return [task for task in tasks if task.source == name] if name else tasks


def _read_source(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Tasks:
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
    return (
        config.data,
        config.tools,
        evaluation.num_tasks,
        evaluation.sets,
        model.path,
        model.revision,
        model.trust_remote_code,
    )
