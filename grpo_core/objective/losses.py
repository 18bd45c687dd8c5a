"""Policy losses: pure functions of tensors.

A loss maps log-probs [B, C] to an unreduced loss [B, C]. It does not average, look at padding, or know about
micro-batches and ranks: `averages.token_weights` says how much each token counts, once per optimizer step, and the
trainer's loss is (per_token_loss * token_weights).sum(). So no gradient can depend on how a step is cut into pieces.

On policy the ratio is 1 and the value of most losses is the (zero-mean) advantage: a loss of 0.0 is normal. Its
gradient is not zero; watch the reward and grad_norm.

    B completions, C tokens in the longest one; column t is completion token t
    l, l_old   log-prob of the token, now and before this step's first update
    r          exp(l - l_old); for a whole completion exp(mean_t(l - l_old)), written R
    sg         stop-gradient

The first line of a docstring is the formula in the function's own arguments; it is what `python -m grpo_core losses`
shows and what config.yaml carries. Facts about a loss (attributes, see registry.py):

    ratio              "token" or "sequence": what its ratio is of; left out where it has none that the gradient sees
    averages           the averages that it is defined with, where others make it another loss
    corrects_rollout   it has the correction of the sampler's log-probs in it, through l_old
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_core.registry import Registry
from grpo_core.schema import ConfigError

LOSSES = Registry("loss")

DETACHED = "the ratio is detached: the gradient is that of -A l times a weight, not of the value"


@dataclass(frozen=True)
class PolicyLoss:
    per_token_loss: Tensor  # [B, C]
    diagnostics: dict[str, Tensor] = field(default_factory=dict)  # name -> [B, C] detached; averaged over tokens


def token_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """r = exp(l - l_old), [B, C], with gradient. The difference is clamped to +-20, so that it is finite."""
    return (logprobs - old_logprobs).clamp(-20, 20).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    """R = exp(mean_t(l - l_old)), the same in all of a row's columns, [B, C]; gradient through the mean."""
    return _row_mean((logprobs - old_logprobs).clamp(-20, 20), completion_mask).exp().expand_as(logprobs)


@LOSSES.register("grpo", ratio="token")
def grpo_loss(
    logprobs: Tensor,  # [B, C] policy, with gradient
    old_logprobs: Tensor,  # [B, C] policy before this step's first update
    advantages: Tensor,  # [B, 1]
    completion_mask: Tensor,  # [B, C]
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
) -> PolicyLoss:
    """-min(min(r, delta) A, clip(r, 1 - clip_low, 1 + clip_high) A)

    arXiv:2402.03300. clip_high > clip_low is DAPO's clip-higher, arXiv:2503.14476. `delta` (null: none), above
    1 + clip_high, bounds what a token with A < 0 can weigh: two-sided clipping, arXiv:2505.07291.
    """
    return _clipped(token_ratio(logprobs, old_logprobs), advantages, clip_low, clip_high, delta)


@LOSSES.register("dual_clip", ratio="token")
def dual_clip_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    c: float = 3.0,
) -> PolicyLoss:
    """-max(min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), c A) where A < 0, and grpo's where A >= 0

    The loss of a token with A < 0 stops growing at -c A, and with it the gradient. Above 1 + clip_high, c is grpo's
    `delta`. arXiv:1912.09729.
    """
    if not c > 1:
        raise ConfigError(f"c is {c}; it must be above 1")
    return _clipped(token_ratio(logprobs, old_logprobs), advantages, clip_low, clip_high, c=c)


@LOSSES.register("gspo", ratio="sequence", averages=("sequence",))
def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    delta: float | None = None,
) -> PolicyLoss:
    """-min(min(R, delta) A, clip(R, 1 - clip_low, 1 + clip_high) A)

    grpo with one ratio a completion. arXiv:2507.18071.
    """
    return _clipped(sequence_ratio(logprobs, old_logprobs, completion_mask), advantages, clip_low, clip_high, delta)


@LOSSES.register(
    "gspo_token",
    ratio="sequence",
    averages=("sequence",),
    breaks={"gradcheck": "sg(R) exp(l - sg l) has R's value only"},
)
def gspo_token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PolicyLoss:
    """-min(r' A, clip(r', 1 - clip_low, 1 + clip_high) A), r' = sg(R) exp(l - sg(l))

    gspo in value; each token's gradient is its own, so that advantages could differ within a row. arXiv:2507.18071.
    """
    ratio = sequence_ratio(logprobs, old_logprobs, completion_mask).detach() * (logprobs - logprobs.detach()).exp()
    return _clipped(ratio, advantages, clip_low, clip_high)


@LOSSES.register("luspo", ratio="sequence", averages=("row_sum",))
def luspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PolicyLoss:
    """-min(R A, clip(R, 1 - clip_low, 1 + clip_high) A)

    gspo's surrogate; with the average row_sum, which makes it unbiased in length. arXiv:2602.05261.
    """
    return _clipped(sequence_ratio(logprobs, old_logprobs, completion_mask), advantages, clip_low, clip_high)


@LOSSES.register("gmpo", ratio="sequence", averages=("sequence",))
def gmpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> PolicyLoss:
    """-exp(mean_t(d)) A, d = min(l - l_old, clip_high) where A > 0, max(l - l_old, -clip_low) where A < 0

    The geometric mean of the clipped token ratios, so that one token cannot carry a completion away; clipping is in
    log space and, as in PPO, only where it removes an incentive. arXiv:2507.20673.
    """
    _check_bounds(clip_low, clip_high, lowest=None)
    difference = (logprobs - old_logprobs).clamp(-20, 20)
    kept = torch.where(
        advantages > 0,
        difference.clamp(max=clip_high),
        torch.where(advantages < 0, difference.clamp(min=-clip_low), 0.0),
    )
    ratio = _row_mean(kept, completion_mask).exp().expand_as(logprobs)
    clipped = (kept != difference) & (advantages != 0)
    return PolicyLoss(-ratio * advantages, {"ratio": difference.exp().detach(), "clip_frac": clipped.float()})


@LOSSES.register("cispo", breaks={"gradcheck": DETACHED})
def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    cap: float = 5.0,
) -> PolicyLoss:
    """-sg(min(r, cap)) A l

    A truncated, detached ratio weighs REINFORCE, so no token loses its gradient. `cap` is the ratio itself at which it
    is cut; TRL gives it as epsilon_high, open-instruct as 1 + epsilon_high, and verl cuts from below too.
    arXiv:2506.13585.
    """
    if not cap > 0:
        raise ConfigError(f"cap is {cap}; it is a ratio and must be above 0")
    ratio = token_ratio(logprobs, old_logprobs).detach()
    return _weighted(ratio.clamp(max=cap), ratio, ratio > cap, advantages, logprobs)


@LOSSES.register("sapo", ratio="token")
def sapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> PolicyLoss:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau = tau_pos where A > 0, else tau_neg

    A soft gate in place of the clip, of slope 1 at r = 1. The pull r sech(tau (r - 1) / 2)^2 is greatest near r = 2 and
    fades beyond. arXiv:2511.20347.
    """
    if not (tau_pos > 0 and tau_neg > 0):
        raise ConfigError(f"tau_pos is {tau_pos} and tau_neg {tau_neg}; both must be above 0")
    ratio = token_ratio(logprobs, old_logprobs)
    tau = torch.where(advantages > 0, tau_pos, tau_neg).to(ratio.dtype)
    gate = 4 / tau * torch.sigmoid(tau * (ratio - 1))
    return PolicyLoss(-gate * advantages, {"ratio": ratio.detach(), "clip_frac": torch.zeros_like(ratio.detach())})


@LOSSES.register("vespo", corrects_rollout=True, breaks={"gradcheck": DETACHED})
def vespo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> PolicyLoss:
    """-sg(exp(lam + k s - lam exp(s))) A l, s = sum_t(l - l_old)

    (k, lam) = (k_pos, lambda_pos) where A >= 0, else (k_neg, lambda_neg): a weight of the whole completion's ratio
    that is 1 on policy, greatest at a ratio of k / lam, and falls on both sides of that. l - l_old is clamped to +-20
    and s to [log 1e-8, 20].
    arXiv:2602.10693.
    """
    if not (lambda_pos > 0 and lambda_neg > 0):
        raise ConfigError(f"lambda_pos is {lambda_pos} and lambda_neg {lambda_neg}; both must be above 0")
    difference = (logprobs - old_logprobs).detach().clamp(-20, 20)
    s = (difference * completion_mask).sum(dim=1, keepdim=True).clamp(-18.420680743952367, 20)
    k = torch.where(advantages >= 0, k_pos, k_neg).to(s.dtype)
    lam = torch.where(advantages >= 0, lambda_pos, lambda_neg).to(s.dtype)
    weight = (lam + k * s - lam * s.exp()).exp().expand_as(logprobs)
    return _weighted(weight, difference.exp(), torch.zeros_like(difference), advantages, logprobs)


@LOSSES.register("reinforce")
def reinforce_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor) -> PolicyLoss:
    """-A l

    Williams 1992. With A = 1 it is the supervised loss.
    """
    ratio = token_ratio(logprobs, old_logprobs).detach()
    return _weighted(torch.ones_like(ratio), ratio, torch.zeros_like(ratio), advantages, logprobs)


@LOSSES.register("gpg")
def gpg_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor) -> PolicyLoss:
    """-A l

    With the advantage gpg, which carries the factor completions / (completions in groups that are not tied): it is of
    the whole step and not of a micro-batch, so it cannot be taken here. arXiv:2504.02546.
    """
    return reinforce_loss(logprobs, old_logprobs, advantages, completion_mask)


def _clipped(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    delta: float | None = None,
    c: float | None = None,
) -> PolicyLoss:
    """PPO's pessimistic surrogate (arXiv:1707.06347); the clip only ever removes an incentive."""
    _check_bounds(clip_low, clip_high, lowest=1.0)
    if delta is not None and not delta > 1 + clip_high:
        raise ConfigError(f"delta is {delta}; it must be above 1 + clip_high ({1 + clip_high:g}), or null")
    free = ratio if delta is None else ratio.clamp(max=delta)
    surrogate = torch.minimum(free * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if c is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, c * advantages), surrogate)
    clipped = (surrogate != ratio * advantages).float()
    return PolicyLoss(-surrogate, {"ratio": ratio.detach(), "clip_frac": clipped})


def _weighted(weight: Tensor, ratio: Tensor, clipped: Tensor, advantages: Tensor, logprobs: Tensor) -> PolicyLoss:
    """-weight A l with a weight that has no gradient."""
    return PolicyLoss(-weight * advantages * logprobs, {"ratio": ratio, "clip_frac": clipped.float()})


def _row_mean(values: Tensor, completion_mask: Tensor) -> Tensor:
    """Mean over each row's own tokens, [B, 1]; 0 for a row without any."""
    return (values * completion_mask).sum(dim=1, keepdim=True) / completion_mask.sum(dim=1, keepdim=True).clamp(min=1)


def _check_bounds(clip_low: float, clip_high: float, lowest: float | None) -> None:
    if not (clip_low >= 0 and clip_high >= 0 and (lowest is None or clip_low <= lowest)):
        bound = "" if lowest is None else " and clip_low at most 1"
        raise ConfigError(
            f"clip_low is {clip_low} and clip_high {clip_high}; both are distances from 1 and must be at least 0{bound}"
        )
