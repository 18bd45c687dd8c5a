"""The tasks of a large data set: a prompt is rendered and tokenised again each time that a step asks for its task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig
from grpo_core.data.columns import check_names, rename
from grpo_core.data.prompts import (
    PromptForm,
    check_any_left,
    check_form,
    encode_rows,
    find_prompt_form,
    handle_bad_rows,
    handle_long_prompts,
    make_prompt,
    refuse_long_prompts,
)
from grpo_core.data.rows_on_disk import CHUNK, Row, RowsOnDisk
from grpo_core.schema import ConfigError


class TasksOnDisk(Sequence[Task]):
    """Tasks as a sequence; in memory are their places in the file and the lengths of their prompts."""

    def __init__(
        self,
        rows: RowsOnDisk,
        lengths: np.ndarray,
        form: PromptForm,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.rows, self.lengths = rows, lengths
        self.form, self.config, self.tokenizer = form, config, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Task: ...
    @overload
    def __getitem__(self, place: slice) -> TasksOnDisk: ...
    def __getitem__(self, place: int | slice) -> Task | TasksOnDisk:
        if isinstance(place, slice):
            return self.select(np.arange(len(self))[place])
        return self._make(self.rows.select([place]))[0]

    def __iter__(self) -> Iterator[Task]:
        for part in self.parts():
            yield from part

    def parts(self) -> Iterator[list[Task]]:
        """Yield the tasks in order, as many at once as fit into memory."""
        for start in range(0, len(self), CHUNK):
            yield self._make(self.rows[start : start + CHUNK])

    def select(self, places: Sequence[int] | np.ndarray) -> TasksOnDisk:
        """Return the tasks at some places of this sequence."""
        places = np.asarray(places, dtype=np.int64)
        return TasksOnDisk(self.rows.select(places), self.lengths[places], self.form, self.config, self.tokenizer)

    def _make(self, rows: RowsOnDisk) -> list[Task]:
        encoded, faults = encode_rows(rows, self.form, self.config, self.tokenizer)
        if faults:
            raise ConfigError(f"{rows.source} has changed since the start: {next(iter(faults.values()))}")
        handle_long_prompts(encoded, self.config, self.tokenizer)
        return [Task(int(rows.numbers[i]), x.prompt, x.ids, x.row) for i, x in encoded.items()]


def make_tasks_on_disk(
    rows: RowsOnDisk, config: DataConfig, tokenizer: PreTrainedTokenizerBase, notes: list[str] | None = None
) -> tuple[TasksOnDisk, int]:
    """Return the rows as tasks, and the number of prompts longer than max_prompt_tokens, as `prompts.make_tasks` does.

    The data is read once to find the rows that can be tasks.

    Raises:
        ConfigError: as `make_tasks`.
    """
    check_names(rows, config.columns)
    rows = rows.map(partial(rename, columns=config.columns))
    form = find_prompt_form(rows, config)
    check_form(rows[0], form, config, tokenizer)
    places: list[int] = []
    lengths: list[int] = []
    faults: dict[int, str] = {}  # by the numbers of the rows
    too_long: dict[int, int] = {}
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        encoded, bad = encode_rows(part, form, config, tokenizer)
        faults |= {int(part.numbers[i]): fault for i, fault in bad.items()}
        if faults and config.bad_rows == "error":
            break
        long = handle_long_prompts(encoded, config, tokenizer)
        too_long |= {int(part.numbers[i]): length for i, length in long.items()}
        places += [start + i for i in encoded]
        lengths += [len(x.ids) for x in encoded.values()]
    handle_bad_rows(faults, len(rows), rows.source, config, notes)
    refuse_long_prompts(too_long, len(rows), rows.source, config)
    check_any_left(places, config)
    chosen = rows.select(np.asarray(places))
    return TasksOnDisk(chosen, np.asarray(lengths, dtype=np.int32), form, config, tokenizer), len(too_long)


def prompt_lengths(tasks: Sequence[Task]) -> Sequence[int]:
    """Return the numbers of tokens of the tasks' prompts."""
    return tasks.lengths.tolist() if isinstance(tasks, TasksOnDisk) else [len(task.prompt_ids) for task in tasks]


def identify_tasks(tasks: Sequence[Task]) -> list[tuple[str, int]]:
    """Return the source and the number of the row of each task; data on disk is one source without a name."""
    if isinstance(tasks, TasksOnDisk):
        return [("", number) for number in tasks.rows.numbers.tolist()]
    return [(task.source, task.index) for task in tasks]


def list_rows(tasks: Sequence[Task]) -> Iterator[tuple[int, Row]]:
    """Yield the number and the columns of each task, without its prompt."""
    if not isinstance(tasks, TasksOnDisk):
        yield from ((task.index, task.columns) for task in tasks)
        return
    for number, row in zip(tasks.rows.numbers.tolist(), tasks.rows, strict=True):
        yield number, make_prompt(row, tasks.form, tasks.config, tasks.tokenizer)[0]


def select_tasks(tasks: Sequence[Task], places: Sequence[int]) -> Sequence[Task]:
    """Return the tasks at some places of the sequence."""
    return tasks.select(places) if isinstance(tasks, TasksOnDisk) else [tasks[place] for place in places]


def split_into_parts(tasks: Sequence[Task]) -> Iterator[Sequence[Task]]:
    """Yield the tasks in parts that fit into memory: in one, if they are there."""
    return tasks.parts() if isinstance(tasks, TasksOnDisk) else iter([tasks])
