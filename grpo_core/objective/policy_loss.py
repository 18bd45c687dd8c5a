"""The return value of a policy loss, the registry of losses, and the ratios that losses share.

losses.py has the losses that compare with the policy before the step's first update, sampler_losses.py those that
compare with the sampler, and covariance_losses.py those that choose tokens by the covariance of log-prob and advantage.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_core.registry import Registry
from grpo_core.schema import ConfigError

LOSSES = Registry("loss")

DETACHED = "the ratio is detached, so the gradient is that of -A l times a weight and not that of the value"
PULLS_BACK = "its penalty on the log-ratio acts on every token, whatever the advantage"


@dataclass(frozen=True)
class PolicyLoss:
    """The return value of a loss: one number for each token, and quantities to log."""

    per_token_loss: Tensor  # [B, C], with gradient
    diagnostics: dict[str, Tensor] = field(default_factory=dict)  # metric name -> [B, C], detached; logged as the mean


def token_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return the ratio of each token, r = exp(l - l_old), [B, C], with gradient.

    The difference is clamped to +-20, so that the ratio is finite.
    """
    return (logprobs - old_logprobs).clamp(-20, 20).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    """Return the ratio of each completion, R = exp(mean_t(l - l_old)), repeated in all columns, [B, C], with gradient.

    Each token's difference is clamped to +-20 before the mean is taken.
    """
    return row_mean((logprobs - old_logprobs).clamp(-20, 20), completion_mask).exp().expand_as(logprobs)


def check_advantages(advantages: Tensor, logprobs: Tensor) -> None:
    """Raise ConfigError unless advantages are [B, 1] or [B, C]; [B] would be spread over the columns where B is C."""
    if advantages.dim() != 2 or advantages.shape not in ((len(logprobs), 1), logprobs.shape):
        rows, columns = logprobs.shape
        raise ConfigError(
            f"advantages have the shape {list(advantages.shape)}; they must be [B, 1] = [{rows}, 1] or [B, C] = "
            f"[{rows}, {columns}]"
        )


def weighted(weight: Tensor, ratio: Tensor, clipped: Tensor, advantages: Tensor, logprobs: Tensor) -> PolicyLoss:
    """Return the loss -weight A l, where `weight` has no gradient."""
    check_advantages(advantages, logprobs)
    return PolicyLoss(-weight * advantages * logprobs, {"ratio": ratio, "clip_frac": clipped.float()})


def row_mean(values: Tensor, completion_mask: Tensor) -> Tensor:
    """Return the mean over the tokens of each row, [B, 1]; 0 for a row without tokens."""
    return (values * completion_mask).sum(dim=1, keepdim=True) / completion_mask.sum(dim=1, keepdim=True).clamp(min=1)


def by_sign(positive: Tensor, if_positive: float, otherwise: float, like: Tensor) -> Tensor:
    """Return one of two numbers for each element of `positive`, in the dtype of `like`.

    torch.where of two Python floats would round them to torch's default dtype first.
    """
    yes, no = (torch.full((), number, dtype=like.dtype, device=like.device) for number in (if_positive, otherwise))
    return torch.where(positive, yes, no)


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


def check_clip_bounds(clip_low: float, clip_high: float, max_clip_low: float = math.inf) -> None:
    """Raise ConfigError unless both bounds are at least 0, and `clip_low` at most `max_clip_low`."""
    if not (0 <= clip_low <= max_clip_low and clip_high >= 0):
        limit = "" if max_clip_low == math.inf else f", and clip_low at most {max_clip_low:g}"
        raise ConfigError(f"clip_low is {clip_low} and clip_high is {clip_high}; both must be at least 0{limit}")
