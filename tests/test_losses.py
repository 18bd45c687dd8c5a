"""Every registered loss, present and future, obeys these laws; a hand table covers what laws cannot see."""

import math

import pytest
import torch

from grpo_core.losses import AVERAGES, KLS, LOSSES, Totals, token_weights

B, C = 6, 7


@pytest.fixture(params=sorted(LOSSES.functions))
def loss_fn(request):
    return LOSSES.build(request.param)


@pytest.fixture(params=sorted(AVERAGES.functions))
def average(request):
    return request.param


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 1, 4, 3, 7, 2])
    mask = torch.arange(C) < lengths[:, None]
    logprobs = -torch.rand(B, C, generator=generator, dtype=torch.double) * 3
    advantages = torch.randn(B, 1, generator=generator, dtype=torch.double)
    return logprobs, advantages, mask


def weights(mask, average, of=None):
    of = mask if of is None else of
    totals = Totals(tokens=of.sum(), completions=torch.tensor(len(of)), max_new_tokens=C)
    return token_weights(mask, average=average, totals=totals).double()


def total(loss_fn, logprobs, old, advantages, mask, w):
    return (loss_fn(logprobs, old, advantages, mask).per_token_loss * w).sum()


def test_a_loss_is_unreduced_and_its_diagnostics_are_detached(loss_fn, batch):
    logprobs, advantages, mask = batch
    logprobs.requires_grad_()
    out = loss_fn(logprobs, logprobs.detach(), advantages, mask)
    assert out.per_token_loss.shape == (B, C)
    assert {"ratio", "clip_frac"} <= out.diagnostics.keys()
    assert all(d.shape == (B, C) and not d.requires_grad for d in out.diagnostics.values())


def test_the_first_step_is_reinforce(loss_fn, average, batch):
    """Before any update the ratio is 1, and every loss pulls a token by -A * weight."""
    logprobs, advantages, mask = batch
    w = weights(mask, average)
    logprobs.requires_grad_()
    out = loss_fn(logprobs, logprobs.detach(), advantages, mask)
    (out.per_token_loss * w).sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages * w)
    assert (out.diagnostics["ratio"] == 1).all() and (out.diagnostics["clip_frac"] == 0).all()


def test_cutting_a_step_up_does_not_change_its_gradient(loss_fn, average, batch):
    """Any split into micro-batches and ranks sums to the one-batch gradient."""
    logprobs, advantages, mask = batch
    old = logprobs + 0.3 * torch.sin(torch.arange(B * C).view(B, C))
    whole = logprobs.clone().requires_grad_()
    total(loss_fn, whole, old, advantages, mask, weights(mask, average)).backward()
    for split in ([1, 5], [2, 2, 2], [1] * B):
        parts = logprobs.clone().requires_grad_()
        for lp, o, a, m in zip(*(x.split(split) for x in (parts, old, advantages, mask)), strict=True):
            total(loss_fn, lp, o, a, m, weights(m, average, of=mask)).backward()
        torch.testing.assert_close(parts.grad, whole.grad)


def test_padding_has_no_gradient_and_cannot_leak(loss_fn, average, batch):
    logprobs, advantages, mask = batch
    old = logprobs + 0.1
    a = logprobs.clone().requires_grad_()
    b = logprobs.masked_fill(~mask, -50.0).requires_grad_()
    for x in (a, b):
        total(loss_fn, x, old, advantages, mask, weights(mask, average)).backward()
    assert (a.grad[~mask] == 0).all() and (a.grad[mask] != 0).any()
    torch.testing.assert_close(a.grad, b.grad)


def test_zero_advantage_is_zero_gradient(loss_fn, batch):
    logprobs, advantages, mask = batch
    logprobs.requires_grad_()
    total(loss_fn, logprobs, logprobs.detach() - 0.1, 0 * advantages, mask, weights(mask, "token")).backward()
    assert (logprobs.grad == 0).all()


def test_old_logprobs_get_no_gradient(loss_fn, batch):
    """Descending must raise the log-probs of good tokens, whatever the loss: the sign is right."""
    logprobs, advantages, mask = batch
    x = logprobs.clone().requires_grad_()
    total(loss_fn, x, logprobs, advantages, mask, weights(mask, "token")).backward()
    assert ((-x.grad * advantages)[mask] > 0).all()


# ratio, advantage, does the token still pull?   clip_low = 0.2, clip_high = 0.4
CLIP_TABLE = [(1.5, +1, False), (1.3, +1, True), (0.5, +1, True), (1.5, -1, True), (0.9, -1, True), (0.7, -1, False)]


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("ratio, advantage, pulls", CLIP_TABLE)
def test_clipping_only_ever_removes_incentive(name, ratio, advantage, pulls):
    loss_fn = LOSSES.build(name, {"clip_low": 0.2, "clip_high": 0.4})
    old = torch.full((1, 3), -1.0)
    logprobs = (old + math.log(ratio)).requires_grad_()
    out = loss_fn(logprobs, old, torch.tensor([[float(advantage)]]), torch.ones(1, 3, dtype=torch.bool))
    out.per_token_loss.sum().backward()
    assert (logprobs.grad != 0).all() == pulls and (logprobs.grad == 0).all() != pulls
    assert out.diagnostics["clip_frac"].mean() == (not pulls)


def test_values_by_hand():
    """Two tokens with ratios 2 and 1/2, A = 1 and -1."""
    old, mask = torch.zeros(2, 2).double(), torch.ones(2, 2, dtype=torch.bool)
    logprobs = torch.tensor([[2.0, 0.5], [2.0, 0.5]]).double().log()
    advantages = torch.tensor([[1.0], [-1.0]]).double()

    def value(name, **args):
        return LOSSES.build(name, args)(logprobs, old, advantages, mask).per_token_loss

    close = torch.testing.assert_close
    close(value("grpo", clip_low=0.2, clip_high=0.3), torch.tensor([[-1.3, -0.5], [2.0, 0.8]]).double())
    close(value("gspo"), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).double())  # the ratios' geometric mean is 1
    close(value("cispo", cap=1.5), torch.tensor([[-1.5, -0.5], [1.5, 0.5]]).double() * logprobs)
    close(value("reinforce"), torch.tensor([[-1.0], [1.0]]).double() * logprobs)


def test_gspo_ignores_padding_in_its_mean():
    mask = torch.tensor([[True, True, False]])
    logprobs, old = torch.tensor([[0.2, 0.4, 9.0]]), torch.zeros(1, 3)
    ratio = LOSSES.build("gspo")(logprobs, old, torch.ones(1, 1), mask).diagnostics["ratio"]
    torch.testing.assert_close(ratio[0, 0], torch.tensor(0.3).exp())


def test_k3_is_nonnegative_zero_at_agreement_unbiased_and_finite():
    kl_k3 = KLS.get("k3")
    p, q = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([0.2, 0.2, 0.6]).double().log()
    assert (kl_k3(p, q) >= 0).all() and (kl_k3(p, p) == 0).all()
    torch.testing.assert_close((p.exp() * kl_k3(p, q)).sum(), (p.exp() * (p - q)).sum())
    assert kl_k3(torch.tensor([-300.0]), torch.tensor([0.0])).isfinite().all()


def test_k3_pulls_towards_the_reference():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    KLS.get("k3")(logprobs, torch.tensor([-2.0, -1.0])).sum().backward()
    assert logprobs.grad[0] > 0 > logprobs.grad[1]  # descending lowers the first, raises the second


def test_weights_by_hand():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    totals = Totals(tokens=torch.tensor(12), completions=torch.tensor(4), max_new_tokens=10)  # another rank has as many

    def w(average):
        return token_weights(mask, average=average, totals=totals)

    torch.testing.assert_close(w("sequence"), torch.tensor([[1 / 8, 1 / 8, 0, 0], [1 / 16] * 4]))
    torch.testing.assert_close(w("token"), torch.tensor([[1 / 12, 1 / 12, 0, 0], [1 / 12] * 4]))
    torch.testing.assert_close(w("constant"), torch.tensor([[1 / 40, 1 / 40, 0, 0], [1 / 40] * 4]))


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_weights_of_a_whole_step_sum_to_one(batch, name):
    assert weights(batch[2], name).sum() == pytest.approx(1.0)


def test_names_and_arguments_are_checked():
    with pytest.raises(ValueError, match="unknown key loss.args.epsilon; known: clip_high, clip_low"):
        LOSSES.build("grpo", {"epsilon": 0.2})
    with pytest.raises(ValueError, match="loss.args.clip_low is 'wide'; it must be a number"):
        LOSSES.build("grpo", {"clip_low": "wide"})
    with pytest.raises(ValueError, match="unknown loss 'grpoo'.*did you mean grpo"):
        LOSSES.get("grpoo")
