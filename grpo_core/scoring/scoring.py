"""Scores: every reward called on a batch, each of your own in a process of its own, and added up by weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_core.batch import Task
from grpo_core.objective.rewards import REWARDS
from grpo_core.scoring.reward_call import Outcome, attempt
from grpo_core.scoring.reward_worker import Worker


@dataclass(frozen=True)
class Reward:
    """A reward with its arguments bound, under the name it is logged by."""

    name: str
    weight: float
    function: Callable[..., list[float | None]] | Worker


@dataclass(frozen=True)
class Scores:
    rewards: Tensor  # [N, G] the weighted sum; NaN where no reward could tell
    by_name: dict[str, Tensor]  # name -> [N, G], NaN for None
    failed: dict[str, Tensor] = field(default_factory=dict)  # name -> [N, G] bool, where the reward went wrong
    failures: tuple[str, ...] = ()  # a sentence for each reward that did


def build_reward(name: str, args: dict[str, Any] | None = None, *, timeout: float) -> Callable | Worker:
    """The reward `name`. One from a user's file gets a process of its own, which may take `timeout` seconds a batch.

    Raises:
        ConfigError: it is not there, or does not take `args`.
    """
    function = REWARDS.build(name, args)
    return Worker(name, args or {}, timeout) if ".py:" in name else function


def score(
    rewards: Sequence[Reward],
    tasks: Sequence[Task],  # N
    completions: Sequence[str],  # B = N * G texts, prompt-major
    group_size: int,
) -> Scores:
    """Call every reward on all completions, workers at the same time, and add them up by weight.

    A None is left out of its sum, and so is what a reward failed on (rewards.attempt says when it does).
    """
    rows = [task for task in tasks for _ in range(group_size)]
    columns = {name: [task.columns[name] for task in rows] for name in rows[0].columns}
    columns["prompts"] = [task.prompt for task in rows]
    outcomes = _outcomes([reward.function for reward in rewards], list(completions), columns)
    by_name, failed, failures = {}, {}, []
    for reward, outcome in zip(rewards, outcomes, strict=True):
        numbers = [math.nan if value is None else value for value in outcome.values]
        by_name[reward.name] = torch.tensor(numbers, dtype=torch.float32).view(-1, group_size)
        failed[reward.name] = torch.tensor(outcome.failed).view(-1, group_size)
        if outcome.why:
            failures.append(f"reward {reward.name} {outcome.why}")
    stacked = torch.stack(list(by_name.values()))  # [K, N, G]
    weights = torch.tensor([reward.weight for reward in rewards]).view(-1, 1, 1)
    counted = ~stacked.isnan() & (weights != 0)  # weight 0: logged and nothing else
    total = torch.where(counted, stacked * weights, 0.0).sum(dim=0)
    return Scores(total.masked_fill(~counted.any(dim=0), math.nan), by_name, failed, tuple(failures))


def _outcomes(functions: list[Callable | Worker], completions: list[str], columns: dict[str, Any]) -> list[Outcome]:
    for function in functions:
        if isinstance(function, Worker):
            function.ask(completions, columns)
    return [
        function.answer() if isinstance(function, Worker) else attempt(function, completions, columns)
        for function in functions
    ]
