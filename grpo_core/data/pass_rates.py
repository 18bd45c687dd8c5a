"""Keep the pass rate of every training prompt: how many of its completions so far were right.

Each rank notes the groups that it has scored. At the end of a step the ranks exchange them, so every rank holds the
same numbers, whatever the number of ranks. They are part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grpo_core.batch import Task
from grpo_core.data.tasks_on_disk import identify_tasks
from grpo_core.distributed import ranks

PREFIX = "prompts/"  # of the tensors in a checkpoint


class Visit(NamedTuple):
    """One group of completions: the place of its prompt in the step, the place of its task, and its outcome."""

    place: int  # in the step; the prompts that replace others come after those of the step
    task: int  # place of the task among the training tasks
    passed: int  # completions that were right
    judged: int  # completions that could be judged

    @property
    def is_solved(self) -> bool:
        """Return whether every completion that could be judged was right."""
        return 0 < self.judged == self.passed


class PassRates:
    """The outcomes of all training tasks so far, one number per task in the order of the tasks.

    `passed` and `judged` count completions, `streak` the last groups in a row that were solved, and `due` is the epoch
    in which a curriculum draws the task next (`curriculum.py`). A group that could not be judged changes nothing.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._places = {name: place for place, name in enumerate(identify_tasks(tasks))}
        self.passed, self.judged, self.streak, self.due = (np.zeros(len(tasks), dtype=np.int32) for _ in range(4))
        self._visits: list[Visit] = []  # of this rank in this step

    def note(self, tasks: Sequence[Task], passed: Sequence[int], judged: Sequence[int]) -> None:
        """Note the outcomes of this rank's groups; they count from the end of the step on."""
        for task, num_passed, num_judged in zip(tasks, passed, judged, strict=True):
            place = int(task.seed[-1])
            self._visits.append(Visit(place, self._places[task.source, task.index], num_passed, num_judged))

    def end_step(self) -> list[Visit]:
        """Count the groups of all ranks, and return them in the order of their places in the step. A collective."""
        own = torch.tensor(self._visits, dtype=torch.long, device="cpu").view(-1, 4)
        visits = [Visit(*row) for row in sorted(ranks.all_rows(own).tolist())]
        self._visits = []
        for visit in visits:
            if visit.judged:
                self.passed[visit.task] += visit.passed
                self.judged[visit.task] += visit.judged
                self.streak[visit.task] = self.streak[visit.task] + 1 if visit.is_solved else 0
        return visits

    def rate(self, task: int) -> float:
        """Return the share of a task's completions that were right; NaN before the first."""
        return float(self.passed[task]) / float(self.judged[task]) if self.judged[task] else float("nan")

    def tensors(self) -> dict[str, Tensor]:
        """Return what `load` takes, each [number of tasks]."""
        return {f"{PREFIX}{name}": torch.from_numpy(values.copy()) for name, values in self._arrays().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state in a checkpoint; without one, or with that of other tasks, the numbers stay 0."""
        for name, values in self._arrays().items():
            saved = tensors.get(f"{PREFIX}{name}")
            if saved is not None and len(saved) == len(values):
                values[:] = saved.numpy()

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"passed": self.passed, "judged": self.judged, "streak": self.streak, "due": self.due}
