"""Policy losses, KL estimators and averages: pure functions of tensors.

A loss maps log-probs [B, C] to an unreduced loss [B, C]. It does not average, look at padding, or know about
micro-batches and ranks: `token_weights` says how much each token counts, once per optimizer step, and the trainer's
loss is (per_token_loss * token_weights).sum(). So no gradient can depend on how a step is cut into pieces.

On policy the ratio is 1 and the value of most losses is the (zero-mean) advantage: a loss of 0.0 is normal. Its
gradient is not zero; watch the reward and grad_norm.

    B completions, C tokens in the longest one; column t is completion token t; l = log-prob of the token.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_core.registry import Registry

LOSSES = Registry("loss")
KLS = Registry("kl")
AVERAGES = Registry("average")


@dataclass(frozen=True)
class PolicyLoss:
    per_token_loss: Tensor  # [B, C]
    diagnostics: dict[str, Tensor] = field(default_factory=dict)  # name -> [B, C] detached; averaged over tokens


@LOSSES.register("grpo")
def grpo_loss(
    logprobs: Tensor,  # [B, C] policy, with gradient
    old_logprobs: Tensor,  # [B, C] policy before this step's first update
    advantages: Tensor,  # [B, 1]
    completion_mask: Tensor,  # [B, C]
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> PolicyLoss:
    """-min(rA, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(l - l_old) per token.

    arXiv:2402.03300; clip_high > clip_low is clip-higher of DAPO, arXiv:2503.14476.
    """
    return _clipped((logprobs - old_logprobs).exp(), advantages, clip_low, clip_high)


@LOSSES.register("gspo")
def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PolicyLoss:
    """As grpo with one ratio a sequence, exp(mean_t(l - l_old)), gradient through the mean. arXiv:2507.18071."""
    log_ratio = ((logprobs - old_logprobs) * completion_mask).sum(dim=1, keepdim=True)
    ratio = (log_ratio / completion_mask.sum(dim=1, keepdim=True).clamp(min=1)).exp().expand_as(logprobs)
    return _clipped(ratio, advantages, clip_low, clip_high)


@LOSSES.register("cispo")
def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    cap: float = 5.0,
) -> PolicyLoss:
    """-sg(min(r, cap)) A l: a truncated, detached ratio weighs REINFORCE, so no token loses its gradient.

    `cap` is the ratio itself at which it is cut; other trainers give eps_high or 1 + eps_high under the same name.
    arXiv:2506.13585.
    """
    ratio = (logprobs - old_logprobs).exp().detach()
    return PolicyLoss(
        -ratio.clamp(max=cap) * advantages * logprobs, {"ratio": ratio, "clip_frac": (ratio > cap).float()}
    )


@LOSSES.register("reinforce")
def reinforce_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor) -> PolicyLoss:
    """-A l. With A = 1 it is the supervised loss."""
    ratio = (logprobs - old_logprobs).exp().detach()
    return PolicyLoss(-advantages * logprobs, {"ratio": ratio, "clip_frac": torch.zeros_like(ratio)})


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> PolicyLoss:
    """PPO's pessimistic surrogate (arXiv:1707.06347); the clip only ever removes an incentive."""
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    clipped = (surrogate < ratio * advantages).float()
    return PolicyLoss(-surrogate, {"ratio": ratio.detach(), "clip_frac": clipped})


@KLS.register("k3")
def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1, d = l_ref - l, [B, C]: never negative, 0 where the two agree, unbiased in value on policy.

    http://joschu.net/blog/kl-approx.html; used by arXiv:2402.03300. d is clamped to +-20 against overflow.
    """
    difference = (ref_logprobs - logprobs).clamp(-20, 20)
    return difference.expm1() - difference


@dataclass(frozen=True)
class Totals:
    """Counts over a whole optimizer step: all micro-batches, all ranks."""

    tokens: Tensor  # completion tokens
    completions: Tensor
    max_new_tokens: int  # the configured length limit, not the longest row


@AVERAGES.register("sequence")
def sequence_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / (n_i * completions): every completion counts the same, long or short. arXiv:2402.03300."""
    lengths = completion_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return completion_mask / (lengths * totals.completions)


@AVERAGES.register("token")
def token_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / tokens: every token counts the same. DAPO, arXiv:2503.14476."""
    return completion_mask / totals.tokens


@AVERAGES.register("constant")
def constant_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / (completions * max_new_tokens): no length in it, so no length bias. Dr. GRPO, arXiv:2503.20783."""
    return completion_mask / (totals.completions * totals.max_new_tokens)


def token_weights(completion_mask: Tensor, *, average: str, totals: Totals) -> Tensor:
    """How much each token counts in the loss, [B, C] float; 0 where masked.

    Raises:
        ConfigError: `average` is not a known name.
    """
    return AVERAGES.get(average)(completion_mask.float(), totals)
