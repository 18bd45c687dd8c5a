"""Policy losses that compare the policy with the sampler, token by token.

p is the policy's probability of the token, exp(l), and q the sampler's, exp(l_roll). A trust region on p - q leaves a
rare token more room than a bound on the ratio does: from 0.001 to 0.002 the ratio doubles, and the distribution hardly
changes. The other symbols are those of losses.py.
"""

import torch
from torch import Tensor

from grpo_core.objective.policy_loss import (
    DETACHED,
    LOSSES,
    PULLS_BACK,
    PolicyLoss,
    check_advantages,
    token_ratio,
    weighted,
)
from grpo_core.schema import ConfigError


@LOSSES.register("dppo_tv", breaks={"gradcheck": DETACHED})
def dppo_tv_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    rollout_logprobs: Tensor,
    *,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    cap: float = 20.0,
) -> PolicyLoss:
    """-sg(min(r, cap)) M A l, M = 0 where A > 0 and p - q > delta_high, or A < 0 and q - p > delta_low

    DPPO with the total variation of the drawn token, arXiv:2602.04879. verl compares with l_old where this compares
    with l_roll, and sets cap to 3 unless its clip_ratio_c is given.
    """
    _check_bounds(delta_low=delta_low, delta_high=delta_high, cap=cap)
    change = (logprobs.exp() - rollout_logprobs.exp()).detach()
    keep = torch.where(advantages > 0, change <= delta_high, change >= -delta_low)
    return _masked_reinforce(logprobs, old_logprobs, advantages, keep, cap)


@LOSSES.register("dppo_kl", breaks={"gradcheck": DETACHED})
def dppo_kl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    rollout_logprobs: Tensor,
    *,
    delta_low: float = 0.05,
    delta_high: float = 0.05,
    cap: float = 20.0,
) -> PolicyLoss:
    """-sg(min(r, cap)) M A l, M = 0 where A > 0, p > q and K > delta_high, or A < 0, p < q and K > delta_low

    K is the KL divergence of (p, 1 - p) from (q, 1 - q): q log(q / p) + (1 - q) log((1 - q) / (1 - p)).
    arXiv:2602.04879; in verl 1e-8 is added to both terms of the second fraction, as here.
    """
    _check_bounds(delta_low=delta_low, delta_high=delta_high, cap=cap)
    p, q = logprobs.detach().exp(), rollout_logprobs.exp()
    divergence = q * (rollout_logprobs - logprobs.detach()) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    kept_above, kept_below = (divergence <= delta_high) | (p <= q), (divergence <= delta_low) | (p >= q)
    return _masked_reinforce(
        logprobs, old_logprobs, advantages, torch.where(advantages > 0, kept_above, kept_below), cap
    )


@LOSSES.register("prime_rl", ratio="token", breaks={"zero_advantage": PULLS_BACK})
def prime_rl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    rollout_logprobs: Tensor,
    *,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
) -> PolicyLoss:
    """-M adv_tau A r + kl_tau (l - l_roll)**2, r = exp(l - l_roll), M as in dppo_tv

    The default loss of prime-rl: the mask of DPPO (arXiv:2602.04879) and the penalty of Kimi K2.5 (arXiv:2602.02276).
    The ratio has a gradient and no cap, and the penalty acts on masked tokens too.
    """
    _check_bounds(delta_low=delta_low, delta_high=delta_high)
    change = (logprobs.exp() - rollout_logprobs.exp()).detach()
    keep = torch.where(advantages > 0, change <= delta_high, change >= -delta_low)
    return _masked_ratio(logprobs, advantages, rollout_logprobs, keep, adv_tau, kl_tau)


@LOSSES.register("ipo", ratio="token", breaks={"zero_advantage": PULLS_BACK})
def ipo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    rollout_logprobs: Tensor,
    *,
    threshold: float = 0.1,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
) -> PolicyLoss:
    """-M adv_tau A r + kl_tau (l - l_roll)**2, r = exp(l - l_roll), M = 0 where abs(p - q) > threshold

    As in prime-rl, whose name it is: https://github.com/PrimeIntellect-ai/prime-rl. A token leaves the trust region
    whatever the sign of its advantage.
    """
    _check_bounds(threshold=threshold)
    keep = (logprobs.exp() - rollout_logprobs.exp()).detach().abs() <= threshold
    return _masked_ratio(logprobs, advantages, rollout_logprobs, keep, adv_tau, kl_tau)


def _masked_reinforce(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, keep: Tensor, cap: float
) -> PolicyLoss:
    """Return -sg(min(r, cap)) A l of the tokens to keep, 0 of the others."""
    ratio = token_ratio(logprobs, old_logprobs).detach()
    return weighted(ratio.clamp(max=cap) * keep, ratio, ~keep | (ratio > cap), advantages, logprobs)


def _masked_ratio(
    logprobs: Tensor, advantages: Tensor, rollout_logprobs: Tensor, keep: Tensor, adv_tau: float, kl_tau: float
) -> PolicyLoss:
    """Return -adv_tau A r of the tokens to keep, and the penalty kl_tau (l - l_roll)**2 of all."""
    check_advantages(advantages, logprobs)
    ratio = token_ratio(logprobs, rollout_logprobs)
    penalty = kl_tau * (logprobs - rollout_logprobs).square()
    loss = torch.where(keep, -adv_tau * advantages * ratio, 0.0) + penalty
    return PolicyLoss(loss, {"ratio": ratio.detach(), "clip_frac": (~keep).to(loss.dtype)})


def _check_bounds(cap: float | None = None, **bounds: float) -> None:
    """Raise ConfigError unless every bound is at least 0, and the cap of the ratio above 0."""
    for name, value in bounds.items():
        if not value >= 0:
            raise ConfigError(f"{name} is {value}; it must be at least 0")
    if cap is not None and not cap > 0:
        raise ConfigError(f"cap is {cap}; it is a bound on the ratio and must be above 0")
