"""Count steps in a row that `Engine.step` has skipped, keep their batches, and end the run after too many.

`Engine.step` itself leaves the weights unchanged where the gradient is not finite; this module reads its result from
the step's metrics. Weights that are not finite end the run at once.
"""

from __future__ import annotations

import math
from typing import NoReturn

from grpo_core.batch import Task, TrainBatch
from grpo_core.counts import quantify
from grpo_core.distributed import signals
from grpo_core.training import checkpoint, saved_batches
from grpo_core.training.control import Control
from grpo_core.training.run import Run


class SkippedSteps:
    """The current streak of skipped steps. Every rank sees the same."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.good_step, self.control = run.start_step, run.control  # state before the streak of skipped steps

    def record(self, step: int, tasks: list[Task], batch: TrainBatch, row: dict[str, float], control: Control) -> None:
        """Note a step's `row` of metrics and the coefficients after it; keep the batch of a skipped step. Collective.

        fp16 skips steps while its loss scale finds its place; those leave no batch, unless the loss is not finite.

        Raises:
            RunFailed: every optimizer step of `trainer.max_skipped_steps` steps in a row was skipped. A checkpoint of
                the state before them is there. Or the weights are not finite after this step; the checkpoints are
                those written before.
        """
        if row["skipped"] and (not self.run.engine.scales_loss or not math.isfinite(row["loss"])):
            saved_batches.write_incident(self.run.folder, step, tasks, batch, row)
        if row["skipped"] < self.run.objective.steps_per_batch:
            if not math.isfinite(row["adapter_norm"]):
                self.fail_not_finite(step)
            self.good_step, self.control = step + 1, control
            return
        streak = step + 1 - self.good_step
        if streak < self.run.config.trainer.max_skipped_steps:
            return
        is_saved = checkpoint.save(self.run, self.good_step, self.control)
        place = f"in {self.run.folder / 'checkpoints'}" if is_saved else "not written; the warning above has the reason"
        raise signals.RunFailed(
            f"the gradient was not finite in {quantify(streak, 'step')} in a row, from step {self.good_step + 1} on; "
            f"they changed nothing, and a checkpoint of the state before them is {place}"
        )

    def fail_not_finite(self, step: int) -> NoReturn:
        """Raise RunFailed for weights that an update of `step` made NaN or infinite."""
        earlier = checkpoint.list_checkpoints(self.run.folder / "checkpoints")
        advice = f"; {earlier[-1]} was written before" if earlier else ", and no checkpoint was written before"
        raise signals.RunFailed(
            f"step {step + 1} made weights NaN or infinite (adapter_norm){advice}; lower engine.learning_rate"
        )
