"""The learning rate's schedule: a linear warm-up, then the decay."""

from __future__ import annotations

import math
from collections.abc import Callable


def learning_rate_schedule(kind: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at optimizer step k = 0, 1, ..., as a function of k.

    The warm-up rises linearly and starts above 0. `kind` is constant, linear or cosine. The last step still learns: the
    decay reaches 0 at step `total_steps`, which is never taken.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[kind]

    return factor
