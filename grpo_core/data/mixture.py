"""Mix several sources: which of them each prompt of a step is from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_core.random_keys import make_generator, make_key

MIN_OFFSETS = 1024  # that are drawn at once


class Mixture:
    """The sources of the prompts of every step, a function of (seed, step).

    A source with the share p of the weights has p N prompts of a step's N, rounded up or down at random so that p N is
    the mean, at random positions. The rounding of a step depends on one number from 0 to 1, its offset. The offsets of
    all steps are one stream of draws, so the prompts of all earlier steps are counted in a few array operations.
    """

    def __init__(self, weights: Sequence[float], prompts_per_step: int, seed: int) -> None:
        shares = np.cumsum(np.asarray(weights, dtype=float))
        self.bounds, self.prompts_per_step, self.seed = shares / shares[-1], prompts_per_step, seed
        self._offsets = np.empty(0)  # of the first steps
        self._before = np.zeros((1, len(shares)), dtype=int)  # prompts of each source before each of these steps

    def draw(self, step: int) -> np.ndarray:
        """Return the number of the source of each prompt of a step, [N] over all ranks."""
        counts = self.count(step)[1]
        sources = np.repeat(np.arange(len(counts)), counts)
        if len(counts) == 1:
            return sources
        return make_generator(make_key("sources", self.seed, step)).permutation(sources)

    def count(self, step: int) -> tuple[list[int], list[int]]:
        """Return the numbers of prompts of each source before `step`, and in it."""
        if len(self.bounds) == 1:
            return [step * self.prompts_per_step], [self.prompts_per_step]
        if step >= len(self._offsets):
            self._count_steps(max(MIN_OFFSETS, 2 * (step + 1)))
        before, after = self._before[step], self._before[step + 1]
        return before.tolist(), (after - before).tolist()

    def _count_steps(self, number: int) -> None:
        """Count the prompts of each source before each of the first `number` steps.

        The prompt with the number i of N lies at (i + offset) / N, and belongs to the source whose part of the line
        from 0 to 1 holds that place.
        """
        self._offsets = make_generator(make_key("source_shares", self.seed)).random(number)
        ends = np.ceil(self.bounds * self.prompts_per_step - self._offsets[:, None]).astype(int)  # [number, sources]
        ends = np.clip(ends, 0, self.prompts_per_step)
        ends[:, -1] = self.prompts_per_step
        counts = np.diff(ends, axis=1, prepend=0)
        self._before = np.concatenate([np.zeros_like(counts[:1]), np.cumsum(counts, axis=0)])
