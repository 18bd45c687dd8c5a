"""KL divergence between the policy and the reference for each token, [B, C]: estimators and the exact value.

An estimator is fn(logprobs, ref_logprobs, old_logprobs) -> [B, C]; the third argument is optional. It uses d = l_ref -
l of the drawn token, clamped to +-20 against overflow. If the tokens are drawn from the policy, the mean of k1 and the
mean of k3 are KL(policy || reference).

Training uses the gradient of an estimator, not its value. For a token drawn from the policy after a fixed prefix, the
expected gradient is 0 with k1, the gradient of KL(reference || policy) with k3, and the gradient of KL(policy ||
reference) with k2. No estimator accounts for a token's effect on the tokens after it; with loss.kl_in reward, the
advantage does.

A function with the attribute `full_vocabulary` takes log-probs of whole distributions, [..., V], and returns [...].
"""

from torch import Tensor

from grpo_core.registry import Registry

KLS = Registry("kl")


@KLS.register("k1")
def kl_k1(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """-d

    The value is unbiased and can be negative. http://joschu.net/blog/kl-approx.html.
    """
    return -_difference(logprobs, ref_logprobs)


@KLS.register("k2")
def kl_k2(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """d^2 / 2

    The value is biased; on policy the gradient is unbiased. http://joschu.net/blog/kl-approx.html.
    """
    return _difference(logprobs, ref_logprobs).square() / 2


@KLS.register("k3")
def kl_k3(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """exp(d) - d - 1

    Never negative, and 0 where the policy and the reference agree. On policy the value is unbiased. arXiv:2402.03300;
    http://joschu.net/blog/kl-approx.html.
    """
    difference = _difference(logprobs, ref_logprobs)
    return difference.expm1() - difference


@KLS.register("abs")
def kl_abs(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """|d|

    Called `abs` in verl. It is a distance, not an estimate of the KL.
    """
    return _difference(logprobs, ref_logprobs).abs()


@KLS.register("k3_corrected")
def kl_k3_corrected(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """r (exp(d) - d - 1), r = exp(l - l_old) with gradient

    Value and gradient are unbiased even where an older policy drew the tokens. DeepSeek-V3.2, arXiv:2512.02556.
    """
    return (logprobs - old_logprobs).clamp(-20, 20).exp() * kl_k3(logprobs, ref_logprobs)


@KLS.register("k1+")
def kl_k1_straight_through(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """-d in value, the gradient of d^2 / 2

    Called `k1+` in verl. On policy both the value and the gradient are unbiased.
    """
    return _straight_through(kl_k1(logprobs, ref_logprobs), kl_k2(logprobs, ref_logprobs))


@KLS.register("k3+")
def kl_k3_straight_through(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """exp(d) - d - 1 in value, the gradient of d^2 / 2

    Called `k3+` in verl. On policy the value has low variance and the gradient is unbiased.
    """
    return _straight_through(kl_k3(logprobs, ref_logprobs), kl_k2(logprobs, ref_logprobs))


@KLS.register("exact", full_vocabulary=True)
def kl_exact(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """sum_v p_v (log p_v - log p_ref_v), v the vocabulary

    The exact KL of the next-token distribution, [..., V] -> [...]. It costs one forward of the reference for each
    micro-batch. The caller passes the tokens in chunks.
    """
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(dim=-1)


def kl_forward(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """sum_v q_v (log q_v - log p_v), q the other distribution

    KL(other || policy), [..., V] -> [...]: the policy learns to cover everything that the other may say, where `exact`,
    KL(policy || other), lets it choose.
    """
    return (other_logprobs.exp() * (other_logprobs - logprobs)).sum(dim=-1)


TEACHER_KLS = {"reverse": kl_exact, "forward": kl_forward}  # values of teacher.kl


def _difference(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return d = l_ref - l, clamped to +-20."""
    return (ref_logprobs - logprobs).clamp(-20, 20)


def _straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """Return a tensor with the value of `value` and the gradient of `gradient`."""
    return gradient + (value - gradient).detach()
