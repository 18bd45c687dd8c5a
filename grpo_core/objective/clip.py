"""The clip of a policy loss: PPO's clipped surrogate, as a loss (`clipped_loss`) and as a quantity (`clip_surrogate`).

grpo, dual_clip, gspo, gspo_token and luspo (losses.py) and clip_cov (covariance_losses.py) call one of them. Losses
with another clip have it in their own body: gmpo clamps log-ratios; cispo (losses.py) and the losses of
sampler_losses.py that call `_masked_reinforce` clamp a detached ratio, which is a weight.
"""

import math

import torch
from torch import Tensor

from grpo_core.objective.policy_loss import PolicyLoss, check_advantages
from grpo_core.schema import ConfigError


def clip_surrogate(
    ratio: Tensor,  # [B, C]
    advantages: Tensor,  # [B, 1] or [B, C]
    clip_low: float,
    clip_high: float,
    delta: float | None = None,
    c: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return PPO's clipped surrogate and where it is clipped, [B, C] each; arXiv:1707.06347.

    The minimum of the two terms means that clipping can remove an incentive but never adds one. `delta` bounds the
    ratio where A < 0, `c` the loss there, at -c A.

    Raises:
        ConfigError: the bounds are not in their ranges.
    """
    check_clip_bounds(clip_low, clip_high, max_clip_low=1.0)
    check_advantages(advantages, ratio)
    if delta is not None and not delta > 1 + clip_high:
        raise ConfigError(f"delta is {delta}; it must be above 1 + clip_high ({1 + clip_high:g}), or null")
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    surrogate = torch.minimum(bounded * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if c is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, c * advantages), surrogate)
    return surrogate, surrogate != ratio * advantages


def clipped_loss(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    delta: float | None = None,
    c: float | None = None,
) -> PolicyLoss:
    """Return the loss of PPO's clipped surrogate, with the optional bounds `delta` (grpo) and `c` (dual_clip)."""
    surrogate, clipped = clip_surrogate(ratio, advantages, clip_low, clip_high, delta, c)
    return PolicyLoss(-surrogate, {"ratio": ratio.detach(), "clip_frac": clipped.float()})


def check_clip_bounds(clip_low: float, clip_high: float, max_clip_low: float = math.inf) -> None:
    """Raise ConfigError unless both bounds are at least 0, and `clip_low` at most `max_clip_low`."""
    if not (0 <= clip_low <= max_clip_low and clip_high >= 0):
        limit = "" if max_clip_low == math.inf else f", and clip_low at most {max_clip_low:g}"
        raise ConfigError(f"clip_low is {clip_low} and clip_high is {clip_high}; both must be at least 0{limit}")
