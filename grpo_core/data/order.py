"""The order of the tasks of one source: an endless sequence of epochs, each a seeded permutation."""

from __future__ import annotations

import numpy as np

from grpo_core.random_keys import make_generator, make_key


class EpochOrder:
    """An endless sequence of epochs of `count` tasks; each is a permutation, a function of the seed and the epoch.

    A source with a name has permutations of its own.
    """

    def __init__(self, count: int, seed: int, source: str = "") -> None:
        self.count, self.seed, self._names = count, seed, (source,) if source else ()
        self._epoch, self._permutation = -1, np.empty(0, dtype=int)

    def take(self, start: int, count: int) -> list[int]:
        """Return the tasks at the places from `start` on."""
        taken = []
        for place in range(start, start + count):
            epoch, offset = divmod(place, self.count)
            taken.append(int(self.permutation(epoch)[offset]))
        return taken

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the tasks in the order of an epoch."""
        if epoch != self._epoch:
            generator = make_generator(make_key("data_order", self.seed, epoch, *self._names))
            self._epoch, self._permutation = epoch, generator.permutation(self.count)
        return self._permutation

    def ranks(self, epoch: int) -> np.ndarray:
        """Return the place of each task in the order of an epoch."""
        return np.argsort(self.permutation(epoch))
