"""Order the training tasks: which tasks belong to which step and rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from grpo_core.batch import Task
from grpo_core.config.sections import CurriculumConfig
from grpo_core.data.curriculum import CurriculumOrder
from grpo_core.data.order import EpochOrder
from grpo_core.data.pass_rates import PassRates, Visit
from grpo_core.random_keys import Key, make_generator, make_key


class TaskStream:
    """The training tasks as an endless sequence of epochs, each a seeded permutation of all tasks.

    `batch(step)` is a function of (seed, step) alone, so a resumed run needs only the number of its next step. The
    prompts of a step do not depend on the number of ranks; rank r has the r-th of `world_size` equal parts of them.

    With a curriculum, `batch(step)` is a function of the pass rates too, so it is that of the next step only, and
    `end_step` moves on.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        prompts_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        rates: PassRates | None = None,
        curriculum: CurriculumConfig | None = None,  # None: the pass rates do not change the order
    ) -> None:
        assert prompts_per_step % world_size == 0 and tasks
        self.tasks, self.prompts_per_step, self.seed = tasks, prompts_per_step, seed
        share = prompts_per_step // world_size
        self.positions = range(rank * share, (rank + 1) * share)  # of this rank's tasks in a step
        self.order: EpochOrder | CurriculumOrder = EpochOrder(len(tasks), seed)
        if curriculum is not None and curriculum.is_on:
            assert rates is not None
            self.order = CurriculumOrder(curriculum, self.order, rates)

    @property
    def steps_per_epoch(self) -> Fraction:
        """Steps in one epoch, which need not be a whole number: 100 tasks at 64 a step are 25/16 steps."""
        return Fraction(len(self.tasks), self.prompts_per_step)

    def batch(self, step: int) -> list[Task]:
        """Return this rank's N tasks of `step`, each with the key of its completions."""
        drawn = self._draw(step)
        return [replace(self.tasks[drawn[position]], seed=self._key(step, position)) for position in self.positions]

    def replacements(self, step: int, attempt: int) -> list[Task]:
        """Return N tasks that may replace this rank's tied ones in a resampling of `step`; `attempt` counts from 1.

        They are drawn from all tasks, without those that rest in a curriculum, by (seed, step, attempt), so they do not
        depend on which tasks were replaced before.
        """
        count, awake = self.prompts_per_step, np.arange(len(self.tasks))
        if isinstance(self.order, CurriculumOrder):
            awake = self.order.awake()
        generator = make_generator(make_key("replacement", self.seed, step, attempt))
        indices = awake[generator.choice(len(awake), count, replace=count > len(awake))]
        return [
            replace(self.tasks[indices[position]], seed=self._key(step, attempt * count + position))
            for position in self.positions
        ]

    def end_step(self, step: int, visits: Sequence[Visit]) -> None:
        """Move a curriculum on to the step after `step`, with the outcomes of its groups over all ranks."""
        if isinstance(self.order, CurriculumOrder):
            self.order.end_step(self._draw(step), visits)

    def _draw(self, step: int) -> list[int]:
        """Return the places of all ranks' tasks of `step` among the tasks."""
        return self.order.take(step * self.prompts_per_step, self.prompts_per_step)

    def _key(self, step: int, position: int) -> Key:
        """Return the key of the completions of one prompt; replacements have positions beyond those of the step."""
        return make_key("train", self.seed, step, position)
