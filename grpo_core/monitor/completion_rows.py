"""Completions as rows of a JSON Lines file: the columns that all such files of a run share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from grpo_core.batch import Rollouts, Task
from grpo_core.schema import finite_or_none

Row = dict[str, Any]


def completion_keys(tasks: Sequence[Task], group_size: int, first_sample: int | None = 0) -> list[Row]:
    """Return the columns that identify each completion: its source, the task's row in the data set, and the sample.

    Completions are prompt-major, and the samples of a task are numbered from `first_sample`; None leaves `sample` and
    the source out, as where evaluation sets are answered, which have its name.
    """
    if first_sample is None:
        return [{"task": task.index} for task in tasks for _ in range(group_size)]
    samples = range(first_sample, first_sample + group_size)
    return [
        {**({"source": task.source} if task.source else {}), "task": task.index, "sample": sample}
        for task in tasks
        for sample in samples
    ]


def make_turn_columns(turns: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the columns that records of turns add to the rows of completions, one value per completion each.

    `turns` are those of environments/driver.py; without any there are no columns. `environment_failure` says why the
    environment failed, as a verb phrase, or is null; `answer_without_room` whether an answer that does not fit into the
    completion has ended it.
    """
    if not turns:
        return {}
    return {
        "turns": [[asdict(turn) for turn in completion.turns] for completion in turns],
        "tool_calls": [completion.calls for completion in turns],
        "given_tokens": [completion.given_tokens for completion in turns],
        "environment_failure": [completion.failure for completion in turns],
        "answer_without_room": [completion.lacks_room for completion in turns],
    }


def completion_rows(
    tasks: Sequence[Task], rollouts: Rollouts, columns: Mapping[str, Sequence[Any]], first_sample: int | None = 0
) -> list[Row]:
    """Return a row for each completion: its keys, prompt, text, `columns`, length in tokens, and truncated.

    Each of `columns` has one value per completion, [B]. A float that is not finite becomes None.
    """
    group_size = len(rollouts) // len(tasks)
    lengths, truncated = rollouts.lengths().tolist(), rollouts.truncated.tolist()
    rows = [
        {
            **key,
            "prompt": tasks[i // group_size].prompt,
            "text": rollouts.completions[i],
            **{name: values[i] for name, values in columns.items()},
            "length": lengths[i],
            "truncated": truncated[i],
        }
        for i, key in enumerate(completion_keys(tasks, group_size, first_sample))
    ]
    return finite_or_none(rows)
