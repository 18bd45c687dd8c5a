"""KL estimators: value and gradient against the whole sum over a small vocabulary."""

import pytest
import torch

from grpo_core.objective.kl import KLS
from grpo_core.registry import get_fact

P = torch.tensor([0.5, 0.3, 0.2]).double().log()
Q = torch.tensor([0.2, 0.2, 0.6]).double().log()
ESTIMATORS = sorted(name for name, function in KLS.functions.items() if not get_fact(function, "full_vocabulary"))


def exact(logprobs, ref_logprobs):
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum()


def expected_gradient(name):
    """E over tokens drawn from the policy of the estimator's gradient, with respect to the policy's logits."""
    logits = P.clone().requires_grad_()
    logprobs = logits.log_softmax(dim=-1)
    estimate = KLS.get(name)(logprobs, Q, logprobs.detach())
    return torch.autograd.grad((P.exp() * estimate).sum(), logits)[0]


@pytest.mark.parametrize("name", ["k1", "k3", "k1+", "k3+", "k3_corrected"])
def test_its_mean_under_the_policy_is_the_kl(name):
    torch.testing.assert_close((P.exp() * KLS.get(name)(P, Q, P)).sum(), exact(P, Q))


@pytest.mark.parametrize("name", ["k2", "k1+", "k3+", "k3_corrected"])
def test_its_expected_gradient_is_that_of_the_kl(name):
    logits = P.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(exact(logits.log_softmax(dim=-1), Q), logits)
    torch.testing.assert_close(expected_gradient(name), wanted)


def test_the_expected_gradient_of_k1_is_zero_and_k3s_is_of_the_other_kl():
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(3).double())
    logits = P.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((Q.exp() * (Q - logits.log_softmax(dim=-1))).sum(), logits)
    torch.testing.assert_close(expected_gradient("k3"), wanted)


def test_the_correction_makes_k3_unbiased_off_policy():
    old = torch.tensor([0.1, 0.1, 0.8]).double().log()
    corrected = KLS.get("k3_corrected")(P, Q, old)
    torch.testing.assert_close((old.exp() * corrected).sum(), exact(P, Q))
    assert ((old.exp() * KLS.get("k3")(P, Q)).sum() - exact(P, Q)).abs() > 0.1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_it_is_zero_at_agreement_and_finite_far_from_it(name):
    assert (KLS.get(name)(P, P, P) == 0).all()
    far = torch.tensor([-300.0, 0.0], requires_grad=True)
    values = KLS.get(name)(far, torch.tensor([0.0, -300.0]), torch.tensor([-300.0, 0.0]))
    values.sum().backward()
    assert values.isfinite().all() and far.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"k1", "k1+"}))
def test_it_is_never_negative(name):
    assert (KLS.get(name)(P, Q, P) > 0).all()


@pytest.mark.parametrize("name", ["k2", "k3", "k1+", "k3+", "abs"])
def test_it_pulls_towards_the_reference(name):
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    KLS.get(name)(logprobs, torch.tensor([-2.0, -1.0])).sum().backward()
    assert logprobs.grad[0] > 0 > logprobs.grad[1]  # descending lowers the first, raises the second


def test_the_exact_one_is_the_sum():
    both = torch.stack([P, Q])
    torch.testing.assert_close(KLS.get("exact")(both, both.flip(dims=[0])), torch.stack([exact(P, Q), exact(Q, P)]))


def test_values_by_hand():
    d = torch.tensor([0.5])
    by_hand = {"k1": -0.5, "k2": 0.125, "abs": 0.5, "k3": 2.718281828**0.5 - 1.5}
    for name, value in by_hand.items():
        assert float(KLS.get(name)(torch.zeros(1), d)) == pytest.approx(value, abs=1e-6)
    assert float(KLS.get("k3_corrected")(torch.zeros(1), d, torch.tensor([-1.0]))) == pytest.approx(
        2.718281828 * by_hand["k3"], abs=1e-6
    )
