"""Score completions: call every reward on a batch and add the results up by weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_core.batch import Task
from grpo_core.objective.rewards import REWARDS
from grpo_core.registry import get_fact
from grpo_core.scoring.reward_call import RewardOutcome, attempt
from grpo_core.scoring.reward_worker import RewardWorker


@dataclass(frozen=True)
class Reward:
    """A reward function with its arguments bound, its weight, and the name that it is logged under."""

    name: str
    weight: float
    function: Callable[..., list[float | None]] | RewardWorker
    sources: tuple[str, ...] = ()  # names of the sources whose completions it scores; (): all


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch of completions: N prompts with G completions each."""

    rewards: Tensor  # [N, G] the weighted sum; NaN where no reward has a value
    by_name: dict[str, Tensor]  # name -> [N, G] before the weight; NaN where the reward has no value
    weights: tuple[float, ...] = ()  # K, in the order of by_name
    failed: dict[str, Tensor] = field(default_factory=dict)  # name -> [N, G] bool, where the reward failed
    failures: tuple[str, ...] = ()  # one sentence for each reward that failed


def build_reward(name: str, args: dict[str, Any] | None = None, *, timeout: float) -> Callable | RewardWorker:
    """Return the reward `name` with its arguments bound.

    A reward from a user's file, or with the fact `own_process`, runs in a process of its own, which may take `timeout`
    seconds for a batch.

    Raises:
        ConfigError: there is no such reward, or it does not take `args`.
    """
    function = REWARDS.build(name, args)
    return RewardWorker(name, args or {}, timeout) if ".py:" in name or get_fact(function, "own_process") else function


def close_workers(functions: Iterable[Callable | RewardWorker]) -> None:
    """End the processes of rewards that have their own."""
    for function in functions:
        if isinstance(function, RewardWorker):
            function.close()


def score(
    rewards: Sequence[Reward],
    tasks: Sequence[Task],  # N
    completions: Sequence[str],  # B = N * G texts, prompt-major
    group_size: int,
) -> Scores:
    """Call every reward on all completions, those in processes of their own in parallel, and add them up by weight.

    Where a reward returns None or fails (see `reward_call.attempt`), it is left out of the sum. Without rewards the
    sum is NaN.
    """
    rows = [task for task in tasks for _ in range(group_size)]
    columns = {name: [task.columns[name] for task in rows] for name in rows[0].columns}
    columns["prompts"] = [task.prompt for task in rows]
    outcomes = _call_all([reward.function for reward in rewards], list(completions), columns)
    by_name, failed, failures = {}, {}, []
    for reward, outcome in zip(rewards, outcomes, strict=True):
        values = [math.nan if value is None else value for value in outcome.values]
        by_name[reward.name] = torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, group_size)
        failed[reward.name] = torch.tensor(outcome.failed, device="cpu").view(-1, group_size)
        if outcome.why:
            failures.append(f"reward {reward.name} {outcome.why}")
    if not rewards:  # a teacher alone trains
        return Scores(torch.full((len(tasks), group_size), math.nan, device="cpu"), {})
    stacked = torch.stack(list(by_name.values()))  # [K, N, G] for K rewards
    weights = tuple(reward.weight for reward in rewards)
    factors = torch.tensor(weights, device="cpu").view(-1, 1, 1)
    is_counted = ~stacked.isnan() & (factors != 0)  # a reward of weight 0 is only logged
    total = torch.where(is_counted, stacked * factors, 0.0).sum(dim=0)
    return Scores(total.masked_fill(~is_counted.any(dim=0), math.nan), by_name, weights, failed, tuple(failures))


def _call_all(
    functions: list[Callable | RewardWorker], completions: list[str], columns: dict[str, Any]
) -> list[RewardOutcome]:
    workers = [function for function in functions if isinstance(function, RewardWorker)]
    for worker in workers:  # those that load again do so side by side, before any batch has its time limit
        worker.wait_until_ready()
    for worker in workers:
        worker.submit(completions, columns)
    return [
        function.result() if isinstance(function, RewardWorker) else attempt(function, completions, columns)
        for function in functions
    ]
