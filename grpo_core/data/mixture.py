"""Mix several sources: which of them each prompt of a step is from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_core.random_keys import make_generator, make_key


class Mixture:
    """The sources of the prompts of every step, a function of (seed, step).

    A source with the share p of the weights has p N prompts of a step's N, rounded up or down at random so that p N is
    the mean, at random positions.
    """

    def __init__(self, weights: Sequence[float], prompts_per_step: int, seed: int) -> None:
        shares = np.cumsum(np.asarray(weights, dtype=float))
        self.bounds, self.prompts_per_step, self.seed = shares / shares[-1], prompts_per_step, seed
        self._step, self._counts = 0, np.zeros(len(shares), dtype=int)  # prompts of each source before a step

    def draw(self, step: int) -> np.ndarray:
        """Return the number of the source of each prompt of a step, [N] over all ranks."""
        if len(self.bounds) == 1:
            return np.zeros(self.prompts_per_step, dtype=int)
        generator = make_generator(make_key("sources", self.seed, step))
        places = (np.arange(self.prompts_per_step) + generator.random()) / self.prompts_per_step
        sources = np.searchsorted(self.bounds[:-1], places, side="right")
        return generator.permutation(sources)

    def count(self, step: int) -> tuple[list[int], list[int]]:
        """Return the numbers of prompts of each source before `step`, and in it."""
        if len(self.bounds) == 1:
            return [step * self.prompts_per_step], [self.prompts_per_step]
        if step < self._step:
            self._step, self._counts = 0, np.zeros_like(self._counts)
        while self._step < step:
            self._counts = self._counts + self._count_in(self._step)
            self._step += 1
        return self._counts.tolist(), self._count_in(step).tolist()

    def _count_in(self, step: int) -> np.ndarray:
        return np.bincount(self.draw(step), minlength=len(self.bounds))
