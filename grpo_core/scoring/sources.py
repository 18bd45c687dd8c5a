"""Score completions whose tasks come from several sources: each reward sees those of its own sources only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_core.batch import Task
from grpo_core.scoring.scoring import Reward, Scores, score


def score_by_source(
    rewards: Sequence[Reward],
    tasks: Sequence[Task],  # N
    completions: Sequence[str],  # B = N * G texts, prompt-major
    group_size: int,
) -> Scores:
    """Return the scores of all completions as `score` gives them, source by source.

    A reward is NaN, and has not failed, where a task's source is not among its own. Every reward has its row in
    `by_name`, also in a step without a task of its sources. Rewards of one name share a row.
    """
    if not any(reward.sources for reward in rewards):
        return score(rewards, tasks, completions, group_size)
    shape, names = (len(tasks), group_size), dict.fromkeys(reward.name for reward in rewards)
    total = torch.full(shape, math.nan, device="cpu")
    by_name = {name: total.clone() for name in names}
    failed = {name: torch.zeros(shape, dtype=torch.bool, device="cpu") for name in names}
    failures: list[str] = []
    for source in dict.fromkeys(task.source for task in tasks):
        places = [place for place, task in enumerate(tasks) if task.source == source]
        texts = [text for place in places for text in completions[place * group_size : (place + 1) * group_size]]
        own = [reward for reward in rewards if not reward.sources or source in reward.sources]
        part = score(own, [tasks[place] for place in places], texts, group_size)
        rows = torch.tensor(places, device="cpu")
        put = [(total, part.rewards), *((by_name[name], values) for name, values in part.by_name.items())]
        put += [(failed[name], values) for name, values in part.failed.items()]
        for whole, values in put:
            whole[rows] = values
        failures += part.failures
    return Scores(total, by_name, list_weights(rewards), failed, tuple(failures))


def list_weights(rewards: Sequence[Reward]) -> tuple[float, ...]:
    """Return the weight of every name, in the order of the names: of several the first that is not 0."""
    weights: dict[str, float] = {}
    for reward in rewards:
        weights[reward.name] = weights.get(reward.name) or reward.weight
    return tuple(weights.values())


def select_source(values: Tensor, tasks: Sequence[Task], source: str) -> Tensor:
    """Return a mask of the shape of `values` [N, ...] that is true for the tasks of a source."""
    mask = torch.tensor([task.source == source for task in tasks], device="cpu")
    return mask.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
