"""What takes tokens and completions out of the surrogate, or weighs them: all [B, C] or [B, 1], none with a gradient.

The sampler's distribution is not quite the trainer's: other kernels, another precision. A rollout correction weighs the
surrogate by v = exp(l_old - l_roll), bounded. A correction is fn(old_logprobs, rollout_logprobs, completion_mask) and
its bounds `clip_min` and `clip_max` are ratios; null is no bound. https://fengyao.notion.site/off-policy-rl.
"""

import torch
from torch import Tensor

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


def corrected_old_logprobs(old_logprobs: Tensor, weights: Tensor, completion_mask: Tensor) -> Tensor:
    """l_old - log w: how a loss with the correction in it (`corrects_rollout`) is given the weights.

    A weight of a whole completion is spread over its tokens. log w is held to [log 1e-8, 20], as vespo's s is.
    """
    log_weights = weights.log().clamp(-18.420680743952367, 20)
    if weights.shape[1] == 1:
        log_weights = log_weights / completion_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return old_logprobs - log_weights * completion_mask


def off_policy_mask(
    logprobs: Tensor,  # [B, C]
    rollout_logprobs: Tensor,  # [B, C]
    advantages: Tensor,  # [B, 1]
    completion_mask: Tensor,  # [B, C]
    delta: float,
) -> Tensor:
    """Completions that stay, [B, 1] bool: A >= 0, or mean_t(l_roll - l) <= delta. DeepSeek-V3.2, arXiv:2512.02556.

    A bad completion that the policy has already left tells it nothing more.
    """
    drift = ((rollout_logprobs - logprobs.detach()) * completion_mask).sum(dim=1, keepdim=True)
    return (advantages >= 0) | (drift / completion_mask.sum(dim=1, keepdim=True).clamp(min=1) <= delta)


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of values [n], linear between neighbours as torch.quantile, without its limit in size."""
    ordered = values.sort().values
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)


def _token_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    return ((old_logprobs - rollout_logprobs) * completion_mask).clamp(-20, 20).exp().detach()


def _sequence_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    gap = ((old_logprobs - rollout_logprobs) * completion_mask).sum(dim=1, keepdim=True)
    return gap.clamp(-20, 20).exp().detach()


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
        raise ConfigError(f"clip_min is {clip_min} and clip_max {clip_max}; they must be 0 <= clip_min <= clip_max")
    return low, high
