"""Policy losses that hold back the tokens which make the entropy collapse. arXiv:2505.22617.

To first order, an update changes the entropy of the policy by minus the covariance of log-prob and advantage. A few
tokens have most of it. Each token's part is

    c = (A - mean(A)) (l - mean(l)),   means over the trained tokens of the optimizer step

These losses treat the tokens of high c apart. Which ones is chosen over the rows of all ranks, by the function that a
loss names as its attribute `selects`; the loss asks for the choice by the name `selected`.
"""

import torch
from torch import Tensor

from grpo_core.objective.clip import clip_surrogate
from grpo_core.objective.policy_loss import LOSSES, PolicyLoss, check_advantages, token_ratio
from grpo_core.schema import ConfigError


def covariance(logprobs: Tensor, advantages: Tensor, completion_mask: Tensor) -> Tensor:
    """Return c of each token, [B, C]; 0 where masked."""
    count = completion_mask.sum().clamp(min=1)
    advantages = advantages.expand_as(logprobs)
    centered = [x - (x * completion_mask).sum() / count for x in (advantages, logprobs)]
    return centered[0] * centered[1] * completion_mask


def select_in_band(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    draws: Tensor,  # [B, C] random numbers, uniform
    *,
    clip_low: float,
    clip_high: float,
    share: float,
    cov_low: float,
    cov_high: float,
) -> Tensor:
    """Return the tokens with cov_low < c < cov_high that the clip leaves alone, [B, C] bool.

    They are at most the share `share` of the step's tokens, and one at least; if there are more, they are drawn.
    """
    if not (0 < share <= 1 and cov_low < cov_high):
        raise ConfigError(
            f"share is {share}, cov_low {cov_low} and cov_high {cov_high}; share must be above 0 and at most 1, and "
            f"cov_low below cov_high"
        )
    c = covariance(logprobs, advantages, completion_mask)
    clipped = clip_surrogate(token_ratio(logprobs, old_logprobs), advantages, clip_low, clip_high)[1]
    candidates = (c > cov_low) & (c < cov_high) & ~clipped & completion_mask
    return _first(draws.masked_fill(~candidates, torch.inf), completion_mask, share) & candidates


@LOSSES.register(
    "clip_cov",
    ratio="token",
    selects=select_in_band,
    breaks={"on_policy": "the tokens that it holds back have no gradient, on policy either"},
)
def clip_cov_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    selected: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
) -> PolicyLoss:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), 0 for the share of tokens with cov_low < c < cov_high

    c = (A - mean(A)) (l - mean(l)) over the step's tokens. If more than the share `share` of the tokens lie in the
    band, that many are drawn. Clip-Cov, arXiv:2505.22617; the defaults are verl's.
    """
    surrogate, clipped = clip_surrogate(token_ratio(logprobs, old_logprobs), advantages, clip_low, clip_high)
    ratio = token_ratio(logprobs, old_logprobs).detach()
    loss = torch.where(selected, 0.0, -surrogate)
    return PolicyLoss(loss, {"ratio": ratio, "clip_frac": (clipped | selected).float()})


def select_highest(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor, draws: Tensor, *, share: float
) -> Tensor:
    """Return the share `share` of the step's tokens with the highest c, one at least, [B, C] bool."""
    if not 0 < share <= 1:
        raise ConfigError(f"share is {share}; it must be above 0 and at most 1")
    c = covariance(logprobs, advantages, completion_mask)
    return _first((-c).masked_fill(~completion_mask, torch.inf), completion_mask, share) & completion_mask


@LOSSES.register(
    "kl_cov",
    ratio="token",
    selects=select_highest,
    breaks={"zero_advantage": "the penalty of the tokens with the highest covariance acts whatever the advantage"},
)
def kl_cov_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    selected: Tensor,
    *,
    share: float = 2e-4,
    kl_coef: float = 0.1,
) -> PolicyLoss:
    """-r A, + kl_coef abs(l - l_old) for the share of tokens with the highest c

    c = (A - mean(A)) (l - mean(l)) over the step's tokens. Nothing is clipped. KL-Cov, arXiv:2505.22617; the defaults
    are verl's.
    """
    if not kl_coef >= 0:
        raise ConfigError(f"kl_coef is {kl_coef}; it must be at least 0")
    check_advantages(advantages, logprobs)
    ratio = token_ratio(logprobs, old_logprobs)
    loss = -ratio * advantages + kl_coef * (logprobs - old_logprobs).abs() * selected
    return PolicyLoss(loss, {"ratio": ratio.detach(), "clip_frac": selected.float()})


def _first(order: Tensor, completion_mask: Tensor, share: float) -> Tensor:
    """Return the share `share` of the trained tokens that come first in `order` [B, C], one at least; [B, C] bool."""
    count = max(1, int(share * int(completion_mask.sum())))
    chosen = torch.zeros(order.numel(), dtype=torch.bool, device=order.device)
    chosen[order.flatten().argsort(stable=True)[:count]] = True
    return chosen.view_as(order)
