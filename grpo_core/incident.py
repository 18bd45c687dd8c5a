"""What is kept of a step that went wrong, for a look at leisure: its batch, its tasks and its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_core import batches
from grpo_core.batch import Task, TrainBatch


def record(folder: Path, step: int, tasks: list[Task], batch: TrainBatch, row: dict[str, Any]) -> None:
    """Write <folder>/incidents/step-<step>-rank-<rank>.safetensors and .json, or as much of them as the disk takes."""
    tensors = {**batches.tensors_of(batch.rollouts), **batches.tensors_of(batch)}
    told = {
        "step": step,
        "tasks": [task.index for task in tasks],
        "seeds": [list(task.seed) for task in tasks],
        "row": batches.numbers(row),
    }
    batches.write(folder / "incidents", step, tensors, told)
