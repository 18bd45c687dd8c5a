"""Divergence from the reference, per token, [B, C]: estimators from the drawn token's log-probs, or the whole sum.

An estimator is fn(logprobs, ref_logprobs, old_logprobs) -> [B, C] and may leave the third out. d = l_ref - l, clamped
to +-20 against overflow. Under tokens drawn from the policy, the mean of k1 and of k3 is KL(policy || reference).

What acts is the gradient, not the value. At a token, its prefix given and drawn from the policy, the expected gradient
of k1 is 0, that of k3 is the gradient of KL(reference || policy), and that of k2 the gradient of KL(policy ||
reference). None of them knows that a token also chooses the prefixes of later ones; the KL in the reward does.

A function with the fact `full_vocabulary` gets whole distributions of log-probs [..., V] and returns [...].
"""

from torch import Tensor

from grpo_core.registry import Registry

KLS = Registry("kl")


@KLS.register("k1")
def kl_k1(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """-d

    Unbiased in value and of either sign. http://joschu.net/blog/kl-approx.html.
    """
    return -_difference(logprobs, ref_logprobs)


@KLS.register("k2")
def kl_k2(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """d^2 / 2

    Biased in value; its gradient is unbiased on policy. http://joschu.net/blog/kl-approx.html.
    """
    return _difference(logprobs, ref_logprobs).square() / 2


@KLS.register("k3")
def kl_k3(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """exp(d) - d - 1

    Never negative, 0 where the two agree, unbiased in value on policy. arXiv:2402.03300;
    http://joschu.net/blog/kl-approx.html.
    """
    difference = _difference(logprobs, ref_logprobs)
    return difference.expm1() - difference


@KLS.register("abs")
def kl_abs(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """|d|

    verl's `abs`. A distance; no estimate of the KL.
    """
    return _difference(logprobs, ref_logprobs).abs()


@KLS.register("k3_corrected")
def kl_k3_corrected(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """r (exp(d) - d - 1), r = exp(l - l_old) with gradient

    Unbiased in value and gradient also where the tokens are of an older policy. DeepSeek-V3.2, arXiv:2512.02556.
    """
    return (logprobs - old_logprobs).clamp(-20, 20).exp() * kl_k3(logprobs, ref_logprobs)


@KLS.register("k1+")
def kl_k1_straight_through(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """-d in value, the gradient of d^2 / 2

    verl's `k1+`: an unbiased value and an unbiased gradient.
    """
    return _straight_through(kl_k1(logprobs, ref_logprobs), kl_k2(logprobs, ref_logprobs))


@KLS.register("k3+")
def kl_k3_straight_through(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """exp(d) - d - 1 in value, the gradient of d^2 / 2

    verl's `k3+`: the low-variance value with an unbiased gradient.
    """
    return _straight_through(kl_k3(logprobs, ref_logprobs), kl_k2(logprobs, ref_logprobs))


@KLS.register("exact", full_vocabulary=True)
def kl_exact(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """sum_v p_v (log p_v - log p_ref_v), v the vocabulary

    Over the whole vocabulary: nothing is estimated at the place itself. One reference forward a micro-batch, and the
    sum is taken in chunks. [..., V] -> [...].
    """
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(dim=-1)


def _difference(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return (ref_logprobs - logprobs).clamp(-20, 20)


def _straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    return gradient + (value - gradient).detach()
