"""Order the training tasks: which tasks belong to which step and rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby

import numpy as np

from grpo_core.batch import Task
from grpo_core.config.sections import CurriculumConfig
from grpo_core.data.curriculum import CurriculumOrder
from grpo_core.data.mixture import Mixture
from grpo_core.data.order import EpochOrder
from grpo_core.data.pass_rates import PassRates, Visit
from grpo_core.data.tasks_on_disk import identify_tasks
from grpo_core.random_keys import Key, make_generator, make_key


@dataclass(frozen=True)
class _Part:
    """The tasks of one source: `first` is the place of its first task among all."""

    source: str
    first: int
    order: EpochOrder | CurriculumOrder

    def awake(self) -> np.ndarray:
        """Return the tasks that will not rest in the next epoch of a curriculum."""
        return self.order.awake() if isinstance(self.order, CurriculumOrder) else np.arange(self.order.count)


class TaskStream:
    """The training tasks as an endless sequence of epochs, each a seeded permutation of all tasks.

    With several sources each has epochs of its own, and `mixture` says how many prompts of a step are of which source.

    Without a curriculum `batch(step)` is a function of (seed, step), so a resumed run needs only the number of its next
    step. The prompts of a step do not depend on the number of ranks; rank r has the r-th of `world_size` equal parts.

    With a curriculum, `batch(step)` depends on the pass rates too, which a checkpoint holds. It is then defined for the
    next step only, and `end_step` moves on.
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
        weights: Mapping[str, float] | None = None,  # of the sources, whose tasks stand one after another
    ) -> None:
        assert prompts_per_step % world_size == 0 and tasks
        self.tasks, self.prompts_per_step, self.seed = tasks, prompts_per_step, seed
        share = prompts_per_step // world_size
        self.positions = range(rank * share, (rank + 1) * share)  # of this rank's tasks in a step
        self.mixture = Mixture(list((weights or {"": 1.0}).values()), prompts_per_step, seed)
        self.parts, first = [], 0
        for source, group in groupby(identify_tasks(tasks), key=lambda name: name[0]):
            order = EpochOrder(len([*group]), seed, source)
            if curriculum is None or not curriculum.is_on:
                self.parts.append(_Part(source, first, order))
            else:
                assert rates is not None
                self.parts.append(_Part(source, first, CurriculumOrder(curriculum, order, rates, first)))
            first += order.count
        assert [part.source for part in self.parts] == [*(weights or {"": 1.0})]

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

        They are drawn from all tasks of the same source, without those that rest in a curriculum, by (seed, step,
        attempt), so they do not depend on which tasks were replaced before.
        """
        count, drawn = self.prompts_per_step, np.empty(self.prompts_per_step, dtype=int)
        sources = self.mixture.draw(step)
        for number, part in enumerate(self.parts):
            own = make_key("replacement", self.seed, step, attempt, *([part.source] if part.source else []))
            awake, places = part.awake(), np.flatnonzero(sources == number)
            indices = make_generator(own).choice(len(awake), len(places), replace=len(places) > len(awake))
            drawn[places] = part.first + awake[indices]
        return [
            replace(self.tasks[drawn[position]], seed=self._key(step, attempt * count + position))
            for position in self.positions
        ]

    def end_step(self, step: int, visits: Sequence[Visit]) -> None:
        """Move a curriculum on to the step after `step`, with the outcomes of its groups over all ranks."""
        starts, counts = self.mixture.count(step)
        for part, start, count in zip(self.parts, starts, counts, strict=True):
            if isinstance(part.order, CurriculumOrder):
                part.order.end_step(part.order.take(start, count), visits)

    def count_awake(self) -> int:
        """Return the number of tasks that will not rest in the next epoch of a curriculum."""
        return sum(len(part.awake()) for part in self.parts)

    def _draw(self, step: int) -> np.ndarray:
        """Return the places of all ranks' tasks of `step` among the tasks."""
        sources, drawn = self.mixture.draw(step), np.empty(self.prompts_per_step, dtype=int)
        for number, (part, start, count) in enumerate(zip(self.parts, *self.mixture.count(step), strict=True)):
            drawn[sources == number] = [part.first + row for row in part.order.take(start, count)]
        return drawn

    def _key(self, step: int, position: int) -> Key:
        """Return the key of the completions of one prompt; replacements have positions beyond those of the step."""
        return make_key("train", self.seed, step, position)
