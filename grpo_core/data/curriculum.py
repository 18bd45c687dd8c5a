"""Order the training tasks by what is known of their difficulty.

Every task is due in an epoch, the first in epoch 0. The next prompts are those that are due first, in the order of the
seeded permutation of that epoch; a prompt that was drawn is due again in the next epoch. Two rules let a task rest, so
that it is due later:

    rest_after     a task whose last `rest_after` groups were all solved rests for `rest_epochs` epochs
    prefer         a task whose pass rate so far is outside of these bounds rests for one epoch

So the order is a function of the seed, the step and the kept pass rates, and not of the number of ranks. Where no task
rests it is the order without a curriculum. An epoch has the tasks that are due in it, and the next one follows without
a gap, also within a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_core.config.sections import CurriculumConfig
from grpo_core.data.order import EpochOrder
from grpo_core.data.pass_rates import PassRates, Visit


class CurriculumOrder:
    """The tasks from `first` on, `order.count` of them, as a sequence that depends on their pass rates.

    `take` returns the next tasks without a change; `end_step` moves on. Both count tasks from 0 within the source.
    """

    def __init__(self, config: CurriculumConfig, order: EpochOrder, rates: PassRates, first: int = 0) -> None:
        self.config, self.order, self.rates = config, order, rates
        self.rows = slice(first, first + order.count)

    def take(self, start: int, count: int) -> list[int]:
        """Return the next `count` tasks; the first `start`, those of the steps before, are in the pass rates."""
        due, taken = self.rates.due[self.rows].copy(), []
        while len(taken) < count:
            epoch = int(due.min())
            rows = np.flatnonzero(due == epoch)
            rows = rows[np.argsort(self.order.ranks(epoch)[rows])][: count - len(taken)]
            due[rows] += 1
            taken += rows.tolist()
        return taken

    def awake(self) -> np.ndarray:
        """Return the tasks that will not rest in the next epoch: those that are due in the current or the next one."""
        due = self.rates.due[self.rows]
        return np.flatnonzero(due <= due.min() + 1)

    def end_step(self, drawn: Sequence[int], visits: Sequence[Visit]) -> None:
        """Move on after a step that has drawn the tasks `drawn`, with the outcomes of its groups."""
        np.add.at(self.rates.due[self.rows], np.asarray(drawn, dtype=int), 1)
        for visit in visits:
            if visit.judged and self.rows.start <= visit.task < self.rows.stop:
                self.rates.due[visit.task] += self._rest(visit)

    def _rest(self, visit: Visit) -> int:
        """Return the number of epochs for which a task rests after a group."""
        config, rest = self.config, 0
        if config.rest_after and self.rates.streak[visit.task] >= config.rest_after:
            rest = config.rest_epochs
        if config.prefer and not config.prefer[0] <= self.rates.rate(visit.task) <= config.prefer[1]:
            rest = max(rest, 1)
        return rest
