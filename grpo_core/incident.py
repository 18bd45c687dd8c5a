"""What is kept of a step that went wrong, for a look at leisure: its batch, its tasks and its numbers."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from grpo_core import distributed
from grpo_core.batch import Task, TrainBatch


def record(folder: Path, step: int, tasks: list[Task], batch: TrainBatch, row: dict[str, Any]) -> None:
    """Write <folder>/incidents/step-<step>-rank-<rank>.safetensors and .json, or as much of them as the disk takes."""
    name = f"step-{step:06d}-rank-{distributed.rank()}"
    tensors = {**_tensors(batch.rollouts), **_tensors(batch)}
    told = {
        "step": step,
        "tasks": [task.index for task in tasks],
        "seeds": [list(task.seed) for task in tasks],
        "row": {key: value if math.isfinite(value) else None for key, value in row.items()},  # JSON has no nan
    }
    try:
        (folder / "incidents").mkdir(exist_ok=True)
        save_file(tensors, folder / "incidents" / f"{name}.safetensors")
        (folder / "incidents" / f"{name}.json").write_text(json.dumps(told, indent=1, default=str), encoding="utf-8")
    except (OSError, SafetensorError):
        pass  # the run matters more


def _tensors(record: Any) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    kept = {name: value.detach().cpu() for name, value in values.items() if isinstance(value, torch.Tensor)}
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in kept.items()}  # shared by none
