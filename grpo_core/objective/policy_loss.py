"""The return value of a policy loss, the registry of losses, and the ratios that losses share.

The clip of the ratio is in clip.py. The losses that compare with the policy before the step's first update are in
losses.py, those that compare with the sampler in sampler_losses.py, and those that choose tokens by the covariance of
log-prob and advantage in covariance_losses.py.
"""

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
