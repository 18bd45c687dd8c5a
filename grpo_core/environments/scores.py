"""The rewards of an environment beside those of the reward functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.config.sections import ENVIRONMENT_REWARD
from grpo_core.environments.driver import PlayedCompletion
from grpo_core.scoring.scoring import Scores


def add_environment(scores: Scores, played: Sequence[PlayedCompletion], *, label: str, weight: float | None) -> Scores:
    """Return the scores with the turns of the completions, and with the environment's rewards in them.

    The reward named `environment` is the sum of the rewards of a completion's turns, 0 if there are none, and NaN where
    the environment failed. With `weight` None, as for tools, there is no such reward, but a failure still counts as
    one. A completion that the other rewards cannot score, and to which the environment gave no reward, is left out. A
    turn without a reward has the reward 0 in `turn_rewards`, as have all turns of a completion that failed.
    """
    if not played:
        return scores
    shape = scores.rewards.shape
    failed = _shape([x.failure is not None for x in played], shape)
    reasons = dict.fromkeys(x.failure for x in played if x.failure is not None)
    failures = (*scores.failures, *(f"{label} {reason}" for reason in [*reasons][:1]))
    everything = {"turns": tuple(played), "failed": scores.failed | {ENVIRONMENT_REWARD: failed}, "failures": failures}
    width = max(len(completion.turns) for completion in played)  # max_turns may be any number, as for "no limit"
    by_turn = torch.full((len(played), width), math.nan, device="cpu")
    for row, completion in enumerate(played):
        for number, turn in enumerate(completion.turns):
            by_turn[row, number] = 0.0 if completion.failure else turn.reward or 0.0
    by_turn = by_turn.view(*shape, width)
    if weight is None:
        return replace(scores, turn_rewards=0 * by_turn, **everything)
    own = by_turn.nansum(dim=-1).masked_fill(failed, math.nan)
    has_own = _shape([any(turn.reward is not None for turn in x.turns) for x in played], shape) & ~failed
    return replace(
        scores,
        rewards=_add(scores, own, has_own, weight),
        by_name={**scores.by_name, ENVIRONMENT_REWARD: own},
        weights=(*scores.weights, weight),
        turn_rewards=weight * by_turn,
        **everything,
    )


def _add(scores: Scores, own: Tensor, has_own: Tensor, weight: float) -> Tensor:
    """Return the sum of all rewards, [N, G]."""
    if weight == 0:
        return scores.rewards
    if not any(scores.weights):
        return weight * own
    others = scores.rewards
    total = others.nan_to_num() + weight * own.nan_to_num()
    return total.masked_fill(others.isnan() & ~has_own, math.nan)


def _shape(values: Sequence[bool], shape: torch.Size) -> Tensor:
    return torch.tensor(values, dtype=torch.bool, device="cpu").view(shape)
