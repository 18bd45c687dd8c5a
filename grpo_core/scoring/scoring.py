"""Score completions: call every reward on a batch and return the weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_core.batch import Task
from grpo_core.objective.rewards import OTHER_REWARDS, REWARDS
from grpo_core.registry import get_fact
from grpo_core.schema import keyword_arguments
from grpo_core.scoring.async_reward import AsyncReward, is_async
from grpo_core.scoring.judge import NAME as JUDGE
from grpo_core.scoring.judge import Judge, JudgeSettings
from grpo_core.scoring.kept_answers import KeptAnswers
from grpo_core.scoring.reward_call import RewardOutcome, attempt
from grpo_core.scoring.reward_worker import RewardWorker

RunningReward = RewardWorker | AsyncReward | Judge  # takes a batch by `submit`, and returns its `result` later


@dataclass(frozen=True)
class Reward:
    """A reward function with its arguments bound, its weight, and the name that it is logged under."""

    name: str
    weight: float
    function: Callable | RunningReward
    reads_others: bool = False  # called after the others, with their values (`rewards.reads_other_rewards`)
    sources: tuple[str, ...] = ()  # names of the sources whose completions it scores; (): all
    configured: str | None = None  # its name in the configuration, if that is another


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch of completions: N prompts with G completions each."""

    rewards: Tensor  # [N, G] the weighted sum; NaN where no reward has a value
    by_name: dict[str, Tensor]  # name -> [N, G] before the weight; NaN where the reward has no value
    weights: tuple[float, ...] = ()  # K, in the order of by_name
    failed: dict[str, Tensor] = field(default_factory=dict)  # name -> [N, G] bool, where the reward failed
    failures: tuple[str, ...] = ()  # one sentence for each reward that failed
    # [N, G, T] the parts of `rewards` that came with each turn, weighted; NaN where a completion has no such turn
    turn_rewards: Tensor | None = None
    turns: tuple[Any, ...] = ()  # B records of turns (environments/driver.py); () where a completion is one turn


def build_reward(name: str, args: dict[str, Any] | None = None, *, timeout: float) -> Callable | RunningReward:
    """Return the reward `name` with its arguments bound.

    A reward from a user's file, or with the fact `own_process`, runs in a process of its own. Such a reward, or an
    async one, may take `timeout` seconds for a batch; its argument `reward_timeout`, if it has one, is `timeout` unless
    `args` sets it. A judge has a budget of its own.

    Raises:
        ConfigError: there is no such reward, or it does not take `args`.
    """
    args = dict(args or {})
    if "reward_timeout" in keyword_arguments(REWARDS.get(name)):
        args.setdefault("reward_timeout", timeout)
    function = REWARDS.build(name, args)
    if name == JUDGE:
        return Judge(JudgeSettings(**args), KeptAnswers(None))
    if ".py:" in name or get_fact(function, "own_process"):
        return RewardWorker(name, args, timeout)
    return AsyncReward(function, timeout) if is_async(function) else function


def close_rewards(functions: Iterable[Callable | RunningReward]) -> None:
    """End the processes of rewards that have their own, and the calls of async rewards."""
    for function in functions:
        if isinstance(function, RunningReward):
            function.close()


def start_step(rewards: Iterable[Reward], step: int) -> None:
    """Give the rewards that have a budget for each step a new one, for `step` of the run."""
    for reward in rewards:
        if isinstance(reward.function, Judge):
            reward.function.start_step(step)


def ask_ahead(rewards: Iterable[Reward], tasks: Sequence[Task]) -> Callable[[int, list[str]], None] | None:
    """Return a function that lets judges begin with the completions of a task; None without a judge.

    It changes no value: `score` gives all completions to every reward, and a judge that has begun has its answers
    sooner.
    """
    judges = [(reward.function, reward.sources) for reward in rewards if isinstance(reward.function, Judge)]

    def ask(number: int, completions: list[str]) -> None:
        for judge, sources in judges:
            if not sources or tasks[number].source in sources:
                judge.ask_ahead(completions, make_columns([tasks[number]] * len(completions)))

    return ask if judges else None


def make_columns(rows: Sequence[Task]) -> dict[str, list[Any]]:
    """Return the columns and the prompts that a reward may read, with a value per completion."""
    columns = {name: [task.columns[name] for task in rows] for name in rows[0].columns}
    return {**columns, "prompts": [task.prompt for task in rows]}


def score(
    rewards: Sequence[Reward],
    tasks: Sequence[Task],  # N
    completions: Sequence[str],  # B = N * G texts, prompt-major
    group_size: int,
) -> Scores:
    """Call every reward on all completions and return their values and the weighted sum.

    Rewards in processes of their own and async rewards run at the same time. Rewards that read the values of others run
    after all others.

    Where a reward returns None or fails (see `reward_call.attempt`), the sum omits it. A completion without any reward
    has the sum NaN.
    """
    columns = make_columns([task for task in tasks for _ in range(group_size)])
    outcomes = _call_all(rewards, list(completions), columns, group_size)
    by_name, failed, failures = {}, {}, []
    for reward in rewards:
        outcome = outcomes[reward.name]
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
    rewards: Sequence[Reward], completions: list[str], columns: dict[str, Any], group_size: int
) -> dict[str, RewardOutcome]:
    """Return the outcome of every reward by its name."""
    first, second = ([reward for reward in rewards if reward.reads_others == late] for late in (False, True))
    outcomes = _call_together(first, completions, columns, group_size)
    if not second:
        return outcomes
    others = {name: outcome.values for name, outcome in outcomes.items()}
    return outcomes | _call_together(second, completions, {**columns, OTHER_REWARDS: others}, group_size)


def _call_together(
    rewards: Sequence[Reward], completions: list[str], columns: dict[str, Any], group_size: int
) -> dict[str, RewardOutcome]:
    running = {reward.name: reward.function for reward in rewards if isinstance(reward.function, RunningReward)}
    for function in running.values():  # those that load again do so side by side, before any batch has its time limit
        if isinstance(function, RewardWorker):
            function.wait_until_ready()
    for function in running.values():
        function.submit(completions, columns, group_size)
    here = {  # meanwhile
        reward.name: attempt(reward.function, completions, columns, group_size)
        for reward in rewards
        if reward.name not in running
    }
    return here | {name: function.result() for name, function in running.items()}
