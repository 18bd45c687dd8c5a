"""Rollout corrections and other weights and masks of the surrogate, [B, C] or [B, 1], without gradient.

The sampler computes log-probs with other kernels and another precision than the trainer, so its distribution differs
slightly from the trainer's. A rollout correction multiplies the surrogate by the importance weight v = exp(l_old -
l_roll), which it bounds. https://fengyao.notion.site/off-policy-rl.

A correction is fn(old_logprobs, rollout_logprobs, completion_mask) -> weights, or None for no weights. Its arguments
`clip_min` and `clip_max` are bounds on v, or on its product or geometric mean over a completion; null means no bound.
With loss.normalize_correction the weights are divided by their mean over the optimizer step.
"""

import math

import torch
from torch import Tensor

from grpo_core.objective.policy_loss import row_mean
from grpo_core.registry import Registry
from grpo_core.schema import ConfigError

CORRECTIONS = Registry("rollout correction")


@CORRECTIONS.register("none")
def no_correction(old_logprobs: Tensor, rollout_logprobs: Tensor, completion_mask: Tensor) -> Tensor | None:
    """1"""
    return None


@CORRECTIONS.register("token_truncate")
def token_truncate(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    completion_mask: Tensor,
    *,
    clip_min: float | None = None,
    clip_max: float | None = 2.0,
) -> Tensor:
    """clip(v, clip_min, clip_max) of each token"""
    return _truncate(_token_ratio(old_logprobs, rollout_logprobs, completion_mask), clip_min, clip_max)


@CORRECTIONS.register("token_mask")
def token_mask(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    completion_mask: Tensor,
    *,
    clip_min: float | None = None,
    clip_max: float | None = 2.0,
) -> Tensor:
    """v of each token, 0 outside [clip_min, clip_max]"""
    return _mask(_token_ratio(old_logprobs, rollout_logprobs, completion_mask), clip_min, clip_max)


@CORRECTIONS.register("sequence_truncate")
def sequence_truncate(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    completion_mask: Tensor,
    *,
    clip_min: float | None = None,
    clip_max: float | None = 2.0,
) -> Tensor:
    """clip(prod_v, clip_min, clip_max), prod_v the product of a completion's v"""
    return _truncate(_sequence_ratio(old_logprobs, rollout_logprobs, completion_mask), clip_min, clip_max)


@CORRECTIONS.register("sequence_mask")
def sequence_mask(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    completion_mask: Tensor,
    *,
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
) -> Tensor:
    """prod_v, the product of a completion's v, 0 outside [clip_min, clip_max]"""
    return _mask(_sequence_ratio(old_logprobs, rollout_logprobs, completion_mask), clip_min, clip_max)


@CORRECTIONS.register("geometric_truncate")
def geometric_truncate(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    completion_mask: Tensor,
    *,
    clip_min: float | None = None,
    clip_max: float | None = 2.0,
) -> Tensor:
    """clip(mean_v, clip_min, clip_max), mean_v the geometric mean of a completion's v

    The sequence level of open-instruct and AReaL. arXiv:2507.18071 has the same mean for the policy's ratio.
    """
    return _truncate(_geometric_ratio(old_logprobs, rollout_logprobs, completion_mask), clip_min, clip_max)


@CORRECTIONS.register("geometric_mask")
def geometric_mask(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    completion_mask: Tensor,
    *,
    clip_min: float | None = None,
    clip_max: float | None = 2.0,
) -> Tensor:
    """mean_v, the geometric mean of a completion's v, 0 outside [clip_min, clip_max]"""
    return _mask(_geometric_ratio(old_logprobs, rollout_logprobs, completion_mask), clip_min, clip_max)


def sampler_distances(old_logprobs: Tensor, rollout_logprobs: Tensor, completion_mask: Tensor) -> dict[str, Tensor]:
    """Return two distances between sampler and trainer, as metric -> [B, C] values whose mean over tokens it is.

    `rollout_kl` is v - 1 - log v, whose mean estimates KL(sampler || trainer); `rollout_chi2` is v**2 - 1, whose mean
    estimates the chi-squared divergence of the trainer's distribution from the sampler's.
    """
    v = _token_ratio(old_logprobs, rollout_logprobs, completion_mask)
    return {"rollout_kl": v - 1 - v.log(), "rollout_chi2": v.square() - 1}


def corrected_old_logprobs(old_logprobs: Tensor, weights: Tensor, completion_mask: Tensor) -> Tensor:
    """Return l_old - log w, [B, C], the old log-probs for a loss with the attribute `corrects_rollout`.

    The loss then computes a ratio that contains the weights w, [B, C] or [B, 1]. A completion's weight is divided
    evenly among its tokens in log space. log w is clamped to [log 1e-8, 20], as s of vespo is.
    """
    log_weights = weights.log().clamp(math.log(1e-8), 20)
    if weights.shape[1] == 1:  # one weight for each completion
        log_weights = log_weights / completion_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return old_logprobs - log_weights * completion_mask


def off_policy_mask(
    logprobs: Tensor,  # [B, C]
    rollout_logprobs: Tensor,  # [B, C]
    advantages: Tensor,  # [B, 1]
    completion_mask: Tensor,  # [B, C]
    delta: float,
) -> Tensor:
    """Return the completions to train, [B, 1] bool: A >= 0, or mean_t(l_roll - l) <= delta.

    A completion with A < 0 that the policy has already become unlikely to produce is left out. DeepSeek-V3.2,
    arXiv:2512.02556.
    """
    drift = ((rollout_logprobs - logprobs.detach()) * completion_mask).sum(dim=1, keepdim=True)
    return (advantages >= 0) | (drift / completion_mask.sum(dim=1, keepdim=True).clamp(min=1) <= delta)


def quantile(values: Tensor, q: float) -> Tensor:
    """Return the q-quantile of values [n] with linear interpolation, as torch.quantile does, for any n.

    torch.quantile refuses more than 16 million values.
    """
    ordered = values.sort().values
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)


def _token_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    """Return v = exp(l_old - l_roll) of each token, [B, C]; the exponent is clamped to +-20."""
    return ((old_logprobs - rollout_logprobs) * completion_mask).clamp(-20, 20).exp().detach()


def _sequence_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    """Return the product of v over each completion, [B, 1]; the exponent is clamped to +-20."""
    gap = ((old_logprobs - rollout_logprobs) * completion_mask).sum(dim=1, keepdim=True)
    return gap.clamp(-20, 20).exp().detach()


def _geometric_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    """Return the geometric mean of v over each completion, [B, 1]; the mean of the logs is clamped to +-20."""
    return row_mean(old_logprobs - rollout_logprobs, completion_mask).clamp(-20, 20).exp().detach()


def _truncate(ratio: Tensor, clip_min: float | None, clip_max: float | None) -> Tensor:
    low, high = _bounds(clip_min, clip_max)
    return ratio.clamp(low, high)


def _mask(ratio: Tensor, clip_min: float | None, clip_max: float | None) -> Tensor:
    low, high = _bounds(clip_min, clip_max)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def _bounds(clip_min: float | None, clip_max: float | None) -> tuple[float, float]:
    low = 0.0 if clip_min is None else clip_min
    high = torch.inf if clip_max is None else clip_max
    if not 0 <= low <= high:
        raise ConfigError(
            f"clip_min is {clip_min} and clip_max is {clip_max}; both must satisfy 0 <= clip_min <= clip_max"
        )
    return low, high
