"""Make the rows of a task of Reasoning Gym: question, answer, metadata, and the generator that made them.

The items are a function of the task and its arguments. The split of an item is a function of its question, so the
splits are disjoint for all sizes, and a question that comes up again is left out.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from grpo_core.config.gym_tasks import PREFIX, open_gym_task
from grpo_core.schema import ConfigError

HELD_OUT = 4  # one in so many questions belongs to the test split
DEFAULT_ROWS = 1_000  # of a split; making an item takes up to 50 ms

_made: dict[str, _Items] = {}  # task and arguments -> its items so far


def make_gym_rows(path: str, args: dict[str, Any], split: str, limit: int | None) -> list[dict[str, Any]]:
    """Return the first `limit` rows of a split, by default 1,000, or all that the task has if they are fewer.

    Raises:
        ConfigError: there is no such split, or as `open_gym_task`.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"data.path is {path!r}, whose splits are train and test, and not {split!r}")
    key = json.dumps([path, args], default=str, sort_keys=True)
    if key not in _made:
        _made[key] = _Items(path, args)
    return _made[key].take(split, DEFAULT_ROWS if limit is None else limit)


class _Items:
    """The items of a task, made when they are needed."""

    def __init__(self, path: str, args: dict[str, Any]) -> None:
        self._dataset = open_gym_task(path, args)
        self._generator = {"task": path.removeprefix(PREFIX), "args": args}
        self._rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
        self._questions: set[str] = set()
        self._next = 0

    def take(self, split: str, count: int) -> list[dict[str, Any]]:
        """Return the first `count` rows of a split."""
        rows = self._rows[split]
        while len(rows) < count and self._next < len(self._dataset):
            item = self._dataset[self._next]
            self._next += 1
            question = item["question"]
            if question not in self._questions:
                self._questions.add(question)
                is_test = zlib.crc32(question.encode()) % HELD_OUT == 0
                own = {"question": question, "answer": item["answer"], "metadata": item["metadata"]}
                self._rows["test" if is_test else "train"].append({**own, "generator": self._generator})
        return rows[:count]
