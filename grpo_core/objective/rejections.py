"""Rejections: tokens and completions that a step does not train, because sampler and trainer differ too much there.

A rejection is fn(old_logprobs, rollout_logprobs, advantages, completion_mask) -> the tokens to keep, [B, C] or [B, 1]
bool. It is computed once per step, over the rows of all ranks and before micro-batches are cut, and what it rejects
leaves the loss mask: so it leaves the numerator and the denominator of every average.

    v      exp(l_old - l_roll), the importance weight of a token
    k1     log v
    k2     (log v)**2 / 2
    k3     v - 1 - log v

The mean of k3 over tokens of the sampler estimates KL(sampler || trainer) without being negative.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from grpo_core.objective.policy_loss import row_mean
from grpo_core.registry import Registry
from grpo_core.schema import ConfigError

REJECTIONS = Registry("rejection")

Estimator = Literal["k1", "k2", "k3"]


@REJECTIONS.register("none")
def keep_all(
    old_logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor
) -> Tensor | None:
    """all tokens are kept"""
    return None


@REJECTIONS.register("token")
def reject_tokens(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    estimator: Estimator = "k3",
    low: float | None = None,
    high: float = 0.1,
) -> Tensor:
    """keep tokens whose estimator (k1, k2 or k3) is from low to high; low null: no bound

    For k1 the bounds are those of log v. verl's token_k1, token_k2 and token_k3; its bounds of k1 are on 1 / v.
    """
    _check_bounds(low, high)
    return _is_within(_estimate(old_logprobs, rollout_logprobs, completion_mask, estimator), low, high)


@REJECTIONS.register("sequence")
def reject_sequences(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    estimator: Estimator = "k3",
    over: Literal["sum", "mean", "max"] = "mean",
    low: float | None = None,
    high: float = 0.1,
) -> Tensor:
    """keep completions whose sum, mean or max of the estimator over tokens is from low to high; low null: no bound

    The mean and the largest k3 are the trust-region masks of arXiv:2512.23075; verl's seq_sum, seq_mean and seq_max.
    """
    _check_bounds(low, high)
    values = _estimate(old_logprobs, rollout_logprobs, completion_mask, estimator)
    if over == "max":
        whole = values.masked_fill(~completion_mask, -math.inf).amax(dim=1, keepdim=True)
        whole = torch.where(completion_mask.any(dim=1, keepdim=True), whole, 0.0)
    else:
        whole = values.sum(dim=1, keepdim=True) if over == "sum" else row_mean(values, completion_mask)
    return _is_within(whole, low, high)


@REJECTIONS.register("geometric")
def reject_by_geometric_mean(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    low: float = 0.999,
    high: float = 1.002,
) -> Tensor:
    """keep completions whose geometric mean of v, exp(mean_t log v), is from low to high

    The bounds are those of NeMo-RL and OpenRLHF; the tokens that stay keep their own v as weight.
    """
    if not 0 < low <= high:
        raise ConfigError(f"low is {low} and high is {high}; both must satisfy 0 < low <= high")
    mean = row_mean(_estimate(old_logprobs, rollout_logprobs, completion_mask, "k1"), completion_mask)
    return _is_within(mean, math.log(low), math.log(high))


@REJECTIONS.register("m2po", breaks={"rows": "the bound is on the mean of all tokens of the step"})
def reject_by_second_moment(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    threshold: float = 0.04,
) -> Tensor:
    """reject the tokens of the largest (log v)**2 until the mean of the rest is below threshold; one token stays

    M2PO, arXiv:2510.01161.
    """
    if not threshold > 0:
        raise ConfigError(f"threshold is {threshold}; it must be above 0")
    squares = 2 * _estimate(old_logprobs, rollout_logprobs, completion_mask, "k2")
    ordered, places = squares[completion_mask].sort()
    means = ordered.cumsum(dim=0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    count = int((means < threshold).sum().clamp(min=1))  # the means rise, because the values do
    keep_drawn = torch.zeros_like(ordered, dtype=torch.bool)
    keep_drawn[places[:count]] = True
    keep = completion_mask.clone()
    keep[completion_mask] = keep_drawn
    return keep


@REJECTIONS.register("vaco")
def reject_by_total_variation(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    low: float | None = None,
    high: float = 0.2,
) -> Tensor:
    """where mean_t abs(v - 1) of a completion is not from low to high, reject its tokens with A log v > 0

    Without low there is no lower bound. The mean estimates twice the total variation. The tokens that are kept pull it
    down. VACO, arXiv:2603.01365; open-instruct has the bounds without the half, as here.
    """
    _check_bounds(low, high)
    log_v = _estimate(old_logprobs, rollout_logprobs, completion_mask, "k1")
    variation = row_mean(log_v.expm1().abs(), completion_mask)
    return _is_within(variation, low, high) | (advantages * log_v <= 0)


def _estimate(old_logprobs: Tensor, rollout_logprobs: Tensor, completion_mask: Tensor, estimator: Estimator) -> Tensor:
    """Return k1, k2 or k3 of each token, [B, C], 0 where masked; log v is clamped to +-20."""
    log_v = ((old_logprobs - rollout_logprobs) * completion_mask).clamp(-20, 20)
    if estimator == "k1":
        return log_v
    return log_v.square() / 2 if estimator == "k2" else log_v.expm1() - log_v


def _is_within(values: Tensor, low: float | None, high: float) -> Tensor:
    return (values <= high) if low is None else (values <= high) & (values >= low)


def _check_bounds(low: float | None, high: float) -> None:
    if low is not None and not low <= high:
        raise ConfigError(f"low is {low} and high is {high}; low must be at most high")
