"""What `setup` built: one frozen record that the loop's functions are handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from grpo_core.batch import Task
from grpo_core.config.sections import RunConfig
from grpo_core.model.memory import Budgets
from grpo_core.monitor.run_log import RunLog
from grpo_core.scoring.scoring import Reward
from grpo_core.training.control import Control


@dataclass(frozen=True)
class Run:
    """The parts of a run. Each knows its job and none of the others."""

    config: RunConfig
    folder: Path
    start_step: int
    num_steps: int
    control: Control  # as it is before start_step
    tasks: Any  # .batch(step) -> this rank's N tasks; .replacements(step, attempt) -> N others
    eval_tasks: list[Task]
    policy: Any  # .plan(rollouts, budget, rows), .forward(rollouts, packing), .reference(), ...
    sampler: Any  # .generate(tasks, group_size) -> Rollouts
    engine: Any  # .backward(loss), any number of times, then .step()
    rewards: list[Reward]
    eval_reward: Any  # as a Reward's function; 1.0 is correct
    truncation_fn: Callable  # see truncation.py
    advantage_fn: Callable[..., Tensor]  # see advantages.py
    loss_fn: Callable  # see losses.py
    kl_fn: Callable  # see kl.py
    correction_fn: Callable  # see corrections.py
    budgets: Budgets
    skips_ties: bool  # a row with advantage 0 has no part in the gradient, whatever the others are
    log: RunLog
    steps_per_epoch: int
    held_out: Callable[[], dict[str, float]] = dict  # what else an evaluation measures; a collective
