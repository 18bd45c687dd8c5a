"""The record `Run`: the parts of a run that setup.py builds and the loop's functions read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from grpo_core.batch import Task
from grpo_core.config.sections import RunConfig
from grpo_core.data.pass_rates import PassRates
from grpo_core.model.memory import Budgets
from grpo_core.monitor.run_log import RunLog
from grpo_core.objective.objective import Objective
from grpo_core.scoring.scoring import Reward
from grpo_core.training.control import Control
from grpo_core.training.selection import Selection


@dataclass(frozen=True)
class Run:
    """The parts of a run. The fields of type Any are named for what the loop calls, so that tests can pass fakes."""

    config: RunConfig
    folder: Path
    start_step: int
    num_steps: int
    control: Control  # coefficients before start_step
    tasks: Any  # TaskStream: batch(step) -> this rank's N tasks; replacements(step, attempt) -> N others
    eval_tasks: list[Task]
    policy: Any  # Policy
    sampler: Any  # Sampler: generate(tasks, group_size) -> Rollouts
    engine: Any  # Engine: backward(loss) any number of times, then step()
    rewards: list[Reward]
    eval_reward: Any  # a reward function; 1.0 counts as correct
    objective: Objective
    budgets: Budgets
    log: RunLog
    steps_per_epoch: Fraction | int
    selection: Selection = field(default_factory=Selection)  # this and pass_rates are the state that changes in place
    pass_rates: PassRates | None = None  # of the training tasks; None: no reward says which completions are right
    eval_rewards: Mapping[str, Any] = field(default_factory=dict)  # those of sources with their own, by evaluation set
    teacher: Any = None  # Teacher, or None
    environments: Any = None  # Environments, or None where a completion is one turn
    job: str = "train"  # the command: train or sft
    # further numbers of an evaluation of these tasks; a collective
    held_out: Callable[[list[Task]], dict[str, float]] = field(default=lambda tasks: {})
