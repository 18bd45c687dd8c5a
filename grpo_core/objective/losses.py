"""Policy losses: pure functions of tensors.

A loss maps log-probs [B, C] to an unreduced loss [B, C]. It does not average, does not handle padding, and does not
know about micro-batches and ranks. Losses with PPO's clip call `clipped_loss` of clip.py.

`token_weights.token_weights` fixes the weight of every token once per optimizer step, and the trainer's loss is
(per_token_loss * token_weights).sum(). The gradient therefore does not depend on how a step is cut into micro-batches.

On policy the ratio is 1, and most losses have the value of the advantage with its sign changed, whose mean is zero. A
loss of 0.0 is therefore normal, and its gradient is not zero: watch the reward and grad_norm instead.

    B completions, C tokens in the longest one; column t is completion token t
    l, l_old   log-prob of the token, now and before this step's first update
    r          ratio of a token, exp(l - l_old)
    R          ratio of a completion, exp(mean_t(l - l_old))
    sg         stop-gradient

The first line of a registered loss's docstring is its formula, written with the function's own arguments.
`python -m grpo_core losses` prints it, and config.yaml starts with it. A loss may have these attributes (registry.py):

    ratio              "token" or "sequence", the kind of ratio that the gradient passes through; not set without one
    averages           values of loss.average that the loss is defined with; with another value it is another loss
    corrects_rollout   True where the loss applies the rollout correction itself, through l_old
    selects            a function that chooses tokens among those of the whole optimizer step, from SELECTION_INPUTS
                       (inputs.py); the loss asks for its choice, [B, C] bool, by the name `selected`
"""

import math

import torch
from torch import Tensor

from grpo_core.objective import covariance_losses, sampler_losses  # noqa: F401 - they register their losses
from grpo_core.objective.clip import check_clip_bounds, clipped_loss
from grpo_core.objective.policy_loss import (
    DETACHED,
    LOSSES,
    PULLS_BACK,
    PolicyLoss,
    by_sign,
    check_advantages,
    row_mean,
    sequence_ratio,
    token_ratio,
    weighted,
)
from grpo_core.schema import ConfigError

__all__ = ["LOSSES", "PolicyLoss", "sequence_ratio", "token_ratio"]


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

    arXiv:2402.03300. With clip_high > clip_low it is DAPO's clip-higher, arXiv:2503.14476. `delta` is an upper bound
    on the ratio of a token with A < 0 (two-sided clipping, arXiv:2505.07291). It must be above 1 + clip_high; null
    means no bound.
    """
    return clipped_loss(token_ratio(logprobs, old_logprobs), advantages, clip_low, clip_high, delta)


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

    The loss of a token with A < 0 is at most -c A, and there its gradient is 0. Where c is above 1 + clip_high, c acts
    as `delta` of grpo does. arXiv:1912.09729.
    """
    if not c > 1:
        raise ConfigError(f"c is {c}; it must be above 1")
    return clipped_loss(token_ratio(logprobs, old_logprobs), advantages, clip_low, clip_high, c=c)


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

    The surrogate of grpo with one ratio for each completion. arXiv:2507.18071.
    """
    return clipped_loss(sequence_ratio(logprobs, old_logprobs, completion_mask), advantages, clip_low, clip_high, delta)


@LOSSES.register(
    "gspo_token",
    ratio="sequence",
    averages=("sequence",),
    breaks={"gradcheck": "sg(R) exp(l - sg(l)) has the value of R but not its gradient"},
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

    The value is that of gspo. The gradient of a token depends on that token alone, so advantages could differ within a
    completion. arXiv:2507.18071.
    """
    ratio = sequence_ratio(logprobs, old_logprobs, completion_mask).detach() * (logprobs - logprobs.detach()).exp()
    return clipped_loss(ratio, advantages, clip_low, clip_high)


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

    The surrogate of gspo, to be used with the average row_sum, which removes the length bias. arXiv:2602.05261.
    """
    return clipped_loss(sequence_ratio(logprobs, old_logprobs, completion_mask), advantages, clip_low, clip_high)


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

    exp(mean_t(d)) is the geometric mean of the clipped token ratios, so no single token dominates a completion.
    Differences are clipped in log space and, as in PPO, only on the side where clipping removes an incentive.
    arXiv:2507.20673.
    """
    check_clip_bounds(clip_low, clip_high)
    check_advantages(advantages, logprobs)
    difference = (logprobs - old_logprobs).clamp(-20, 20)
    bounded_below = torch.where(advantages < 0, difference.clamp(min=-clip_low), 0.0)
    bounded = torch.where(advantages > 0, difference.clamp(max=clip_high), bounded_below)
    ratio = row_mean(bounded, completion_mask).exp().expand_as(logprobs)
    clipped = (bounded != difference) & (advantages != 0)
    return PolicyLoss(-ratio * advantages, {"ratio": difference.exp().detach(), "clip_frac": clipped.float()})


@LOSSES.register("cispo", breaks={"gradcheck": DETACHED})
def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    cap: float = 5.0,
    floor: float = 0.0,
) -> PolicyLoss:
    """-sg(clip(r, floor, cap)) A l

    REINFORCE weighted by the detached ratio, which is truncated at `cap`; unlike clipping, this leaves every token a
    gradient. Both bounds are ratios: TRL calls the cap epsilon_high, open-instruct writes it as 1 + epsilon_high, and
    in verl the bounds are 1 - clip_ratio_low and 1 + clip_ratio_high. arXiv:2506.13585.
    """
    if not cap > 0:
        raise ConfigError(f"cap is {cap}; it is a bound on the ratio and must be above 0")
    if not 0 <= floor <= cap:
        raise ConfigError(f"floor is {floor}; it is a bound on the ratio, from 0 to cap ({cap:g})")
    ratio = token_ratio(logprobs, old_logprobs).detach()
    return weighted(ratio.clamp(floor, cap), ratio, (ratio > cap) | (ratio < floor), advantages, logprobs)


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

    A sigmoid with slope 1 at r = 1 replaces the clip. A token's gradient, in units of REINFORCE's, is
    r sech(tau (r - 1) / 2)^2: greatest near r = 2 and decreasing beyond. arXiv:2511.20347.
    """
    if not (tau_pos > 0 and tau_neg > 0):
        raise ConfigError(f"tau_pos is {tau_pos} and tau_neg is {tau_neg}; both must be above 0")
    check_advantages(advantages, logprobs)
    ratio = token_ratio(logprobs, old_logprobs)
    tau = by_sign(advantages > 0, tau_pos, tau_neg, ratio)
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

    (k, lam) is (k_pos, lambda_pos) where A >= 0, else (k_neg, lambda_neg). The weight depends on exp(s), the ratio of
    the whole completion: it is 1 on policy, greatest where exp(s) is k / lam, and decreasing on both sides of that.
    l - l_old is clamped to +-20, and s to [log 1e-8, 20]. arXiv:2602.10693.
    """
    if not (lambda_pos > 0 and lambda_neg > 0):
        raise ConfigError(f"lambda_pos is {lambda_pos} and lambda_neg is {lambda_neg}; both must be above 0")
    check_advantages(advantages, logprobs)
    difference = (logprobs - old_logprobs).detach().clamp(-20, 20)
    s = (difference * completion_mask).sum(dim=1, keepdim=True).clamp(math.log(1e-8), 20)
    k = by_sign(advantages >= 0, k_pos, k_neg, s)
    lam = by_sign(advantages >= 0, lambda_pos, lambda_neg, s)
    weight = (lam + k * s - lam * s.exp()).exp().expand_as(logprobs)
    return weighted(weight, difference.exp(), torch.zeros_like(difference), advantages, logprobs)


@LOSSES.register("reinforce")
def reinforce_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor) -> PolicyLoss:
    """-A l

    Williams 1992. With A = 1 it is the supervised negative log-likelihood.
    """
    ratio = token_ratio(logprobs, old_logprobs).detach()
    return weighted(torch.ones_like(ratio), ratio, torch.zeros_like(ratio), advantages, logprobs)


@LOSSES.register("dro", breaks={"zero_advantage": PULLS_BACK, "clip": "far from the old policy the pull is stronger"})
def dro_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    beta: float = 0.5,
) -> PolicyLoss:
    """-A l + beta / 2 (l - l_old)**2

    REINFORCE with a quadratic pull to the policy before the update, in place of a ratio; as in verl and Tinker. Direct
    reward optimisation, arXiv:2405.19107.
    """
    if not beta >= 0:
        raise ConfigError(f"beta is {beta}; it must be at least 0")
    check_advantages(advantages, logprobs)
    difference = logprobs - old_logprobs
    ratio = token_ratio(logprobs, old_logprobs).detach()
    loss = -advantages * logprobs + beta / 2 * difference.square()
    return PolicyLoss(loss, {"ratio": ratio, "clip_frac": torch.zeros_like(ratio)})


@LOSSES.register("gpg")
def gpg_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor) -> PolicyLoss:
    """-A l

    To be used with the advantage gpg, which contains the factor completions / (completions in groups that are not
    tied). That factor counts the whole step, and a loss sees one micro-batch. arXiv:2504.02546.
    """
    return reinforce_loss(logprobs, old_logprobs, advantages, completion_mask)
