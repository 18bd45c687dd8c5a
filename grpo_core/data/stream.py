"""Order the training tasks: which tasks belong to which step and rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from grpo_core.batch import Task
from grpo_core.random_keys import Key, make_generator, make_key


class TaskStream:
    """The training tasks as an endless sequence of epochs, each a seeded permutation of all tasks.

    `batch(step)` is a function of (seed, step) alone, so a resumed run needs only the number of its next step. The
    prompts of a step do not depend on the number of ranks; rank r has the r-th of `world_size` equal parts of them.
    """

    def __init__(
        self, tasks: Sequence[Task], prompts_per_step: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        assert prompts_per_step % world_size == 0 and tasks
        self.tasks, self.prompts_per_step, self.seed = tasks, prompts_per_step, seed
        share = prompts_per_step // world_size
        self.positions = range(rank * share, (rank + 1) * share)  # of this rank's tasks in a step
        self._epoch, self._order = -1, np.empty(0, dtype=int)

    @property
    def steps_per_epoch(self) -> Fraction:
        """Steps in one epoch, which need not be a whole number: 100 tasks at 64 a step are 25/16 steps."""
        return Fraction(len(self.tasks), self.prompts_per_step)

    def batch(self, step: int) -> list[Task]:
        """Return this rank's N tasks of `step`, each with the key of its completions."""
        return [
            replace(self._task_at(step * self.prompts_per_step + position), seed=self._key(step, position))
            for position in self.positions
        ]

    def replacements(self, step: int, attempt: int) -> list[Task]:
        """Return N tasks that may replace this rank's tied ones in a resampling of `step`; `attempt` counts from 1.

        They are drawn from all tasks by (seed, step, attempt), so they do not depend on which tasks were replaced
        before.
        """
        count = self.prompts_per_step
        generator = make_generator(make_key("replacement", self.seed, step, attempt))
        indices = generator.choice(len(self.tasks), count, replace=count > len(self.tasks))
        return [
            replace(self.tasks[indices[position]], seed=self._key(step, attempt * count + position))
            for position in self.positions
        ]

    def _key(self, step: int, position: int) -> Key:
        """Return the key of the completions of one prompt; replacements have positions beyond those of the step."""
        return make_key("train", self.seed, step, position)

    def _task_at(self, place: int) -> Task:
        """Return the task at `place` in the endless sequence."""
        epoch, offset = divmod(place, len(self.tasks))
        if epoch != self._epoch:
            generator = make_generator(make_key("data_order", self.seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(len(self.tasks))
        return self.tasks[self._order[offset]]
