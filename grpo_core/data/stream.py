"""The training tasks in the order of their use: which tasks belong to a (step, rank)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from grpo_core.batch import Task
from grpo_core.data.rows import permutation


class TaskStream:
    """The training tasks in the order of their use: an endless row of seeded permutations, one an epoch.

    `batch(step)` is a function of (seed, step) and of nothing that happened before, so resuming needs one integer. The
    prompts of a step do not depend on the number of ranks; rank r has the r-th part of them.
    """

    def __init__(
        self, tasks: Sequence[Task], prompts_per_step: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        assert prompts_per_step % world_size == 0 and tasks
        self.tasks, self.prompts_per_step, self.seed = tasks, prompts_per_step, seed
        share = prompts_per_step // world_size
        self.positions = range(rank * share, (rank + 1) * share)
        self._epoch, self._order = -1, np.empty(0, dtype=int)

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in one epoch, at least 1."""
        return max(1, len(self.tasks) // self.prompts_per_step)

    def batch(self, step: int) -> list[Task]:
        """This rank's N tasks of `step`, each with the seed of its completions."""
        return [
            replace(self._at(step * self.prompts_per_step + position), seed=(self.seed, step, position))
            for position in self.positions
        ]

    def replacements(self, step: int, attempt: int) -> list[Task]:
        """This rank's N tasks to take the places of tied ones in the `attempt`-th (from 1) resampling of `step`.

        Drawn from the whole data by (seed, step, attempt), so that what was resampled before is nobody's business.
        """
        total, whole = len(self.tasks), self.prompts_per_step
        generator = np.random.default_rng((self.seed, step, attempt, 2))
        rows = generator.choice(total, whole, replace=whole > total)
        return [
            replace(self.tasks[rows[position]], seed=(self.seed, step, attempt * whole + position))
            for position in self.positions
        ]

    def _at(self, place: int) -> Task:
        epoch, offset = divmod(place, len(self.tasks))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self.tasks), self.seed, epoch)
        return self.tasks[self._order[offset]]
