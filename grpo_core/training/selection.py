"""Select by held-out accuracy: remember the best evaluation, and end a run whose accuracy no longer rises.

The state is a function of the evaluations so far, and part of every checkpoint. A resumed run therefore keeps the same
checkpoint as best and stops at the same step as a run that was never interrupted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from grpo_core.config.sections import RunConfig
from grpo_core.counts import quantify

ROUNDING = 1e-9  # of a difference of two accuracies


@dataclass
class Selection:
    """The best evaluation of the selecting set, and the number of evaluations since an improvement."""

    measure: str = ""  # the set and the reward; another measure cannot be compared
    last_step: int = -1  # of the last evaluation
    best_step: int | None = None
    best_accuracy: float = -1.0  # the highest; of equal ones the earliest counts
    mark: float = -1.0  # accuracy at the last improvement of at least trainer.early_stopping_delta
    stale: int = 0  # evaluations since then

    def record(self, step: int, accuracy: float, delta: float) -> None:
        """Record the accuracy after `step` steps; an evaluation that a resumed run repeats counts once."""
        if step <= self.last_step:
            return
        self.last_step = step
        if accuracy > self.best_accuracy:
            self.best_step, self.best_accuracy = step, accuracy
        gain = accuracy - self.mark
        if gain > 0 and gain >= delta - ROUNDING:
            self.mark, self.stale = accuracy, 0
        else:
            self.stale += 1

    def has_stalled(self, config: RunConfig) -> bool:
        """Return whether trainer.early_stopping evaluations in a row were no improvement."""
        return 0 < config.trainer.early_stopping <= self.stale

    def restore(self, state: dict[str, Any] | None, config: RunConfig) -> None:
        """Restore the state in a checkpoint, unless another set or reward measures the accuracy now."""
        self.measure = describe_measure(config)
        if state and state["measure"] == self.measure:
            vars(self).update(state)

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes."""
        return asdict(self)


def describe_measure(config: RunConfig) -> str:
    """Return what the accuracy that selects is measured with."""
    name = config.selecting_set
    return f"{config.of_source(name).evaluation.reward}{f' on {name}' if name else ''}"


def describe_stall(selection: Selection, config: RunConfig, steps_taken: int, num_steps: int) -> str:
    """Return the sentence with which a run ends early."""
    name, delta = config.selecting_set, config.trainer.early_stopping_delta
    measured, least = f" on {name}" if name else "", f" by {delta:g}" if delta else ""
    return (
        f"early stopping: the accuracy{measured} has not risen{least} above {selection.mark:.1%} in "
        f"{quantify(selection.stale, 'evaluation')} (trainer.early_stopping); the run ends after {steps_taken:,} of "
        f"{quantify(num_steps, 'step')}"
    )
