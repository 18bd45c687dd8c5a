"""Losses that compare with the sampler: by hand, one token at a time. tests/test_parity_2026.py has their authors' numbers."""

import math

import pytest
import torch

from grpo_core.objective.losses import LOSSES

log = math.log


def one_token(name, p, q, advantage, *, old=None, **args):
    """(loss, gradient, clip_frac) of one token of probability p, q for the sampler, and `old` before the update (q)."""
    x = torch.tensor([[log(p)]], dtype=torch.double, requires_grad=True)
    old, rollout = (torch.tensor([[log(value)]], dtype=torch.double) for value in (old or q, q))
    out = LOSSES.build(name, args)(x, old, torch.tensor([[advantage]]).double(), torch.ones(1, 1).bool(), rollout)
    (gradient,) = torch.autograd.grad(out.per_token_loss.sum(), x)
    return out.per_token_loss.item(), gradient.item(), out.diagnostics["clip_frac"].item()


# p, q, advantage, is the token trained?  delta_low = 0.1, delta_high = 0.2
TABLE = [
    (0.5, 0.35, +1.0, True), (0.5, 0.25, +1.0, False), (0.5, 0.25, -1.0, True), (0.2, 0.25, -1.0, True),
    (0.2, 0.35, -1.0, False), (0.2, 0.35, +1.0, True), (0.5, 0.35, -1.0, True),
]  # fmt: skip


@pytest.mark.parametrize("p, q, advantage, trained", TABLE)
@pytest.mark.parametrize("name", ["dppo_tv", "prime_rl"])
def test_a_token_leaves_the_region_only_on_the_side_that_its_advantage_pushes_to(name, p, q, advantage, trained):
    args = {"delta_low": 0.1, "delta_high": 0.2} | ({"kl_tau": 0.0} if name == "prime_rl" else {})
    _, gradient, clip_frac = one_token(name, p, q, advantage, **args)
    assert clip_frac == (not trained)
    assert gradient == (pytest.approx(-advantage * p / q) if trained else 0)  # r = p / q, as the old policy is the sampler's


def test_dppo_tv_is_reinforce_with_the_capped_detached_ratio_to_the_old_policy():
    loss, gradient, clip_frac = one_token("dppo_tv", 0.3, 0.25, 2.0, old=0.1, cap=2.0)
    assert gradient == pytest.approx(-2.0 * 2.0) and clip_frac == 1 and loss == pytest.approx(-2.0 * 2.0 * log(0.3))
    assert one_token("dppo_tv", 0.3, 0.25, 2.0, old=0.2)[1] == pytest.approx(-2.0 * 1.5)


def test_dppo_kl_is_bounded_by_the_divergence_of_drawn_or_not():
    def divergence(p, q):
        return q * log(q / p) + (1 - q) * log((1 - q) / (1 - p))

    p, q = 0.5, 0.3  # divergence 0.0823
    bound = divergence(p, q)
    for factor, trained in ((1.01, True), (0.99, False)):
        assert one_token("dppo_kl", p, q, 1.0, delta_high=bound * factor, delta_low=0.0)[2] == (not trained)
        assert one_token("dppo_kl", q, p, -1.0, delta_low=divergence(q, p) * factor, delta_high=0.0)[2] == (not trained)
    assert one_token("dppo_kl", p, q, -1.0, delta_low=0.0, delta_high=0.0)[1] == pytest.approx(p / q)  # back to the sampler
    assert one_token("dppo_kl", q, p, 1.0, delta_low=0.0, delta_high=0.0)[1] == pytest.approx(-q / p)


@pytest.mark.parametrize("name", ["prime_rl", "ipo"])
@pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])
def test_the_penalty_acts_on_every_token_and_the_ratio_has_its_gradient(name, advantage):
    p, q, tau = 0.3, 0.28, 0.25
    d, r = log(p / q), p / q
    loss, gradient, _ = one_token(name, p, q, advantage, kl_tau=tau, adv_tau=0.5)
    assert loss == pytest.approx(-0.5 * advantage * r + tau * d * d)
    assert gradient == pytest.approx(-0.5 * advantage * r + 2 * tau * d)
    far = one_token(name, 0.9, 0.1, 1.0, kl_tau=tau)  # masked: the penalty alone is left
    assert far[1] == pytest.approx(2 * tau * log(9)) and far[2] == 1


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("p, trained", [(0.34, True), (0.36, False), (0.16, True), (0.14, False)])
def test_ipo_asks_for_no_sign(p, trained, advantage):
    assert one_token("ipo", p, 0.25, advantage, threshold=0.1)[2] == (not trained)
