"""Masks and weights that depend on other rows, and the terms of the loss that came with them. Two ranks: test_engine.py."""

import math
from dataclasses import replace

import pytest
import torch
from fakes import frozen_batch, ragged_rollouts, tiny_policy, with_objective
from test_loop import make_run

from grpo_core.config.function_checks import try_loss
from grpo_core.config.sections import LossConfig
from grpo_core.distributed import ranks
from grpo_core.model.policy import TokenStats
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.advantages import ADVANTAGES, compute_advantages
from grpo_core.objective.corrections import CORRECTIONS, sampler_distances
from grpo_core.objective.covariance_losses import covariance, select_highest, select_in_band
from grpo_core.objective.inputs import select_tokens
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.policy_loss import PolicyLoss
from grpo_core.objective.rejections import REJECTIONS
from grpo_core.objective.returns import close_gaps, discounted_returns, open_gaps, place_at_end, whiten_tokens
from grpo_core.objective.truncation import penalize_length
from grpo_core.random_keys import make_key
from grpo_core.schema import ConfigError
from grpo_core.training import cross_row_masks
from grpo_core.training.control import first_control
from grpo_core.training.cross_row_masks import add_cross_row_masks
from grpo_core.training.update import count_over_ranks, micro_loss, rows_to_train, update_policy

KEY = make_key("selection", 0, 0, 0)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, num_steps=2, policy=tiny_policy(lora_noise=0.05))


def gradient(run, batch, stats=None):
    """d loss / d log-probs of a batch, [B, C], on policy."""
    totals = count_over_ranks(run.objective, batch, 1)
    tokens = run.policy.forward(batch.rollouts)
    leaf = tokens.logprobs.detach().requires_grad_()
    tokens = TokenStats(leaf, tokens.entropy, tokens.sum_p_squared)
    loss = micro_loss(run.objective, batch, tokens, totals, first_control(run.config.loss), stats or Stats())
    return torch.autograd.grad(loss, leaf)[0], leaf.detach()


def look(run, batch, *, is_first=True, key=KEY, stats=None):
    return add_cross_row_masks(run.policy, run.objective, run.budgets.forward, batch, key, stats or Stats(), is_first=is_first)


def test_nothing_is_computed_where_nothing_looks_at_other_rows(run, monkeypatch):
    batch = frozen_batch(run, ragged_rollouts(), torch.ones(8, 1))
    assert batch.frozen_logprobs is None and look(run, batch) is batch


def test_rejected_tokens_leave_the_loss_or_the_surrogate_alone(run):
    """From the surrogate: they still count in the denominator, and keep their KL."""
    rollouts = ragged_rollouts()
    gaps = run.policy.forward(rollouts).logprobs.detach() - rollouts.rollout_logprobs
    high = float(gaps[rollouts.completion_mask].median())
    reject = REJECTIONS.build("token", {"estimator": "k1", "high": high})
    for place in ("loss", "surrogate"):
        own = with_objective(run, rejection_fn=reject, rejection_in=place)
        batch = frozen_batch(own, ragged_rollouts(), torch.ones(8, 1))
        mask, v = batch.loss_mask, batch.frozen_logprobs - batch.rollouts.rollout_logprobs
        keep = mask & (v <= high)
        assert 0 < keep.sum() < mask.sum()
        stats = Stats()
        seen = look(own, batch, stats=stats)
        assert stats.reduce()["rejected"] == pytest.approx(1 - float(keep.sum() / mask.sum()))
        slope, _ = gradient(own, seen)
        torch.testing.assert_close(slope, -keep.float() / (keep.sum() if place == "loss" else mask.sum()))
        assert torch.equal(seen.loss_mask, keep if place == "loss" else mask)


@pytest.mark.parametrize("name, counted", [("token_truncate", "tokens"), ("sequence_truncate", "rows")])
def test_normalised_weights_have_mean_1_over_what_they_belong_to(run, name, counted):
    correction = CORRECTIONS.build(name, {"clip_max": 1.5})
    own = with_objective(run, correction_fn=correction, normalize_correction=True)
    batch = look(own, frozen_batch(own, ragged_rollouts(), torch.ones(8, 1)))
    weights = correction(batch.frozen_logprobs, batch.rollouts.rollout_logprobs, batch.loss_mask) * batch.correction_scale
    mean = weights[batch.loss_mask].mean() if counted == "tokens" else weights.mean()
    torch.testing.assert_close(mean, torch.tensor(1.0))
    slope, _ = gradient(own, batch)
    torch.testing.assert_close(slope, -weights * batch.loss_mask / batch.loss_mask.sum())


def test_the_choice_of_a_later_optimizer_step_is_by_the_policy_as_it_is_then(run):
    own = with_objective(run, loss_fn=LOSSES.build("kl_cov", {"share": 0.2}), steps_per_batch=2)
    batch = frozen_batch(own, ragged_rollouts(), torch.randn(8, 1, generator=torch.Generator().manual_seed(0)))
    first = look(own, batch).selected
    with torch.no_grad():
        for parameter in own.policy.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    mask = batch.loss_mask
    later = look(own, batch, is_first=False).selected
    c = covariance(own.policy.forward(batch.rollouts).logprobs.detach(), batch.advantages, mask)
    assert torch.equal(later, (c >= c[mask].topk(int(0.2 * mask.sum())).values[-1]) & mask)
    assert not torch.equal(first, later) and torch.equal(look(own, batch).selected, first)


def test_the_forward_for_a_choice_has_no_dropout(tmp_path, monkeypatch):
    """The second optimizer step's log-probs are the policy's own, as it is before that step."""
    policy = tiny_policy(lora_noise=0.05, dropout=0.5)
    run = with_objective(make_run(tmp_path, policy=policy, num_passes=2), loss_fn=LOSSES.build("kl_cov", {"share": 0.2}))
    seen, forward_all = [], cross_row_masks.forward_all

    def watch(model, budget, rollouts):
        own = forward_all(model, budget, rollouts)
        seen.append((own.logprobs, forward_all(model, budget, rollouts).logprobs, any(m.training for m in model.model.modules())))
        return own

    batch = frozen_batch(run, ragged_rollouts(), torch.randn(8, 1, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(cross_row_masks, "forward_all", watch)
    update_policy(run, batch, 0, run.control, Stats())
    assert len(seen) == 1 and torch.equal(*seen[0][:2]) and not seen[0][2]


def test_a_choice_among_too_many_is_drawn_by_its_key(run):
    args = {"share": 0.1, "cov_low": 1e-3, "cov_high": 100.0}
    own = with_objective(run, loss_fn=LOSSES.build("clip_cov", args))
    batch = frozen_batch(own, ragged_rollouts(), torch.randn(8, 1, generator=torch.Generator().manual_seed(0)))
    chosen = [look(own, batch, key=make_key("selection", 0, step, 0)).selected for step in (0, 0, 1)]
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    assert all(int(x.sum()) == int(0.1 * batch.loss_mask.sum()) for x in chosen)


def test_covariance_and_choices_by_hand():
    logprobs = torch.tensor([[-1.0, -3.0], [-2.0, 9.0]])
    advantages, mask = torch.tensor([[1.0], [-2.0]]), torch.tensor([[True, True], [True, False]])
    c = covariance(logprobs, advantages, mask)  # means: A 0, l -2
    torch.testing.assert_close(c, torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    draws = torch.tensor([[0.9, 0.1], [0.5, 0.0]])
    assert select_highest(logprobs, logprobs, advantages, mask, draws, share=0.5).tolist() == [[True, False], [False, False]]
    assert select_highest(logprobs, logprobs, advantages, mask, draws, share=0.99).tolist() == [[True, False], [True, False]]
    bounds = {"clip_low": 0.2, "clip_high": 0.2, "cov_low": -2.0, "cov_high": 2.0}
    for share, expected in ((0.4, [[False, True], [False, False]]), (0.7, [[False, True], [True, False]])):
        assert select_in_band(logprobs, logprobs, advantages, mask, draws, share=share, **bounds).tolist() == expected
    old = logprobs - torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # the first token is clipped, so it is no candidate
    assert select_in_band(logprobs, old, advantages, mask, draws, share=1.0, **bounds).tolist() == [[False, True], [True, False]]


def test_the_covariance_of_one_token_and_of_none_is_0():
    logprobs, advantages = torch.tensor([[-1.0, -3.0]]), torch.tensor([[2.0]])
    for mask in ([[True, False]], [[False, False]]):
        mask = torch.tensor(mask)
        assert covariance(logprobs, advantages, mask).tolist() == [[0.0, 0.0]]
        chosen = select_highest(logprobs, logprobs, advantages, mask, torch.zeros(1, 2), share=0.5)
        assert torch.equal(chosen, mask)


def test_the_covariance_losses_by_hand():
    x = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    old, mask = torch.tensor([[-1.1, -1.1, -2.0]]), torch.ones(1, 3, dtype=torch.bool)
    selected = torch.tensor([[True, False, True]])
    clip_cov = LOSSES.build("clip_cov", {})(x, old, torch.ones(1, 1), mask, selected).per_token_loss
    torch.testing.assert_close(clip_cov, -torch.tensor([[0.0, math.exp(0.1), 0.0]]))
    kl_cov = LOSSES.build("kl_cov", {"kl_coef": 0.5})(x, old, torch.ones(1, 1), mask, selected).per_token_loss
    torch.testing.assert_close(kl_cov, torch.tensor([[-math.exp(0.1) + 0.05, -math.exp(0.1), -math.exp(1.0) + 0.5]]))
    torch.testing.assert_close(
        torch.autograd.grad(kl_cov.sum(), x)[0], torch.tensor([[-math.exp(0.1) + 0.5, -math.exp(0.1), -math.exp(1.0) + 0.5]])
    )


def test_a_loss_whose_choice_cannot_be_is_refused(monkeypatch):
    def loss(logprobs, old_logprobs, advantages, completion_mask, selected, *, share: float = 0.5):
        return PolicyLoss(-advantages * logprobs * ~selected)

    monkeypatch.setitem(LOSSES.functions, "mine", loss)
    with pytest.raises(ConfigError, match="loss mine asks for selected, but has no attribute selects"):
        try_loss("mine", {})
    loss.selects = lambda logprobs, old, advantages, mask, draws, *, share: draws < share
    assert try_loss("mine", {"share": 0.4}) is not None
    inputs = {"draws": torch.tensor([[0.3, 0.45]])}
    for args, expected in (({}, [[True, True]]), ({"share": 0.4}, [[True, False]])):
        values = {**dict.fromkeys(("logprobs", "old_logprobs", "advantages", "completion_mask")), **inputs}
        assert select_tokens(LOSSES.build("mine", args), values).tolist() == expected
    loss.selects = lambda logprobs, old, advantages, mask, draws: draws
    with pytest.raises(ConfigError, match=r"loss mine: its function selects must return a tensor \[B, C\] of bool"):
        try_loss("mine", {})
    loss.selects = lambda logprobs, old: 0
    with pytest.raises(ConfigError, match="the function selects of loss mine cannot be called: too many positional arguments"):
        try_loss("mine", {})
    loss.selects = lambda logprobs, old, advantages, mask, draws, rollout: draws < 0.5
    with pytest.raises(ConfigError, match="selects of loss mine asks for rollout .did you mean rollout_logprobs"):
        try_loss("mine", {})
    loss.selects = lambda logprobs, old, advantages, mask, draws, rollout_logprobs: rollout_logprobs < old
    assert try_loss("mine", {}) is not None


def test_the_log_ratio_penalty_acts_on_every_trained_token(run):
    own = with_objective(run, log_ratio_coef=0.3)
    batch = frozen_batch(own, ragged_rollouts(), torch.zeros(8, 1))
    assert len(rows_to_train(own.objective, batch, first_control(own.config.loss))) == 8  # a tied group learns from it
    slope, logprobs = gradient(own, batch)
    expected = 0.6 * (logprobs - batch.rollouts.rollout_logprobs) * batch.loss_mask / batch.loss_mask.sum()
    torch.testing.assert_close(slope, expected)


def test_positive_examples_are_averaged_over_their_own_tokens(run):
    own = with_objective(run, positive_nll_coef=0.5, positive_nll_above=0.5)
    rollouts, rewards = ragged_rollouts(), torch.tensor([[1.0, 0.0, 0.5, 1.0, math.nan, 1.0, 0.0, 0.0]])
    frozen = frozen_batch(own, rollouts, torch.zeros(8, 1))
    batch = type(frozen)(frozen.rollouts, frozen.advantages, frozen.loss_mask, shaped_rewards=rewards.view(8, 1))
    assert len(rows_to_train(own.objective, batch, first_control(own.config.loss))) == 8
    positive = batch.loss_mask & (rewards.view(8, 1) > 0.5)
    slope, _ = gradient(own, batch)
    torch.testing.assert_close(slope, -0.5 * positive / positive.sum())


def test_the_terms_beside_the_surrogate_are_those_of_the_configuration(tmp_path):
    loss = LossConfig(log_ratio_coef=0.2, positive_nll_coef=0.3, positive_nll_above=0.7)
    objective = make_run(tmp_path, loss=loss).objective
    assert (objective.log_ratio_coef, objective.positive_nll_coef, objective.positive_nll_above) == (0.2, 0.3, 0.7)


def test_no_mask_or_weight_of_the_surrogate_acts_on_the_log_ratio_penalty(run):
    correction = CORRECTIONS.build("token_truncate", {"clip_max": 1.2})
    plain = with_objective(run, correction_fn=correction, off_policy_mask=0.0)
    own = with_objective(plain, log_ratio_coef=0.3)
    rollouts = ragged_rollouts()
    rollouts = replace(rollouts, rollout_logprobs=5 * rollouts.rollout_logprobs)  # above the policy's and below them
    batch = frozen_batch(own, rollouts, torch.randn(8, 1, generator=torch.Generator().manual_seed(0)))
    batch = replace(batch, surrogate_mask=(torch.arange(6) % 2 == 0).expand(8, 6))
    stats = Stats()
    slope, logprobs = gradient(own, batch, stats)
    assert 0 < stats.reduce()["off_policy_kept"] < 1
    gaps = (logprobs - rollouts.rollout_logprobs) * batch.loss_mask
    assert (gaps > 0).any() and (gaps < 0).any()
    torch.testing.assert_close(slope - gradient(plain, batch)[0], 0.6 * gaps / batch.loss_mask.sum())


def test_positive_examples_are_the_trained_tokens_of_all_ranks(run, monkeypatch):
    """Tokens that the surrogate leaves out are among them, and completions that are not trained are not."""
    own = with_objective(run, positive_nll_coef=0.5, positive_nll_above=0.5)
    rewards = torch.tensor([[1.0, 0.0, 0.5, 1.0, math.nan, 1.0, 0.0, 0.0]]).view(8, 1)
    batch = frozen_batch(own, ragged_rollouts(), torch.zeros(8, 1), torch.arange(8) != 3)
    surrogate_mask = (torch.arange(6) % 2 == 0).expand(8, 6)
    old = batch.rollouts.rollout_logprobs
    batch = replace(batch, shaped_rewards=rewards, surrogate_mask=surrogate_mask, old_logprobs=old)
    positive = batch.loss_mask & (rewards > 0.5)
    monkeypatch.setattr(ranks, "all_sum", lambda values: 2 * values)  # another rank has the same rows
    stats = Stats()
    slope, logprobs = gradient(own, batch, stats)
    torch.testing.assert_close(slope, -0.25 * positive / positive.sum())
    assert stats.reduce()["positive_nll"] == pytest.approx(-float(logprobs[positive].mean()))


def test_the_likelihood_of_one_positive_token_and_of_none(run):
    own = with_objective(run, positive_nll_coef=0.5)
    batch = frozen_batch(own, ragged_rollouts(), torch.zeros(8, 1))
    one = torch.zeros_like(batch.loss_mask)
    one[0, 0] = True
    for reward, expected in ((1.0, -0.5 * one), (0.0, 0.0 * one)):
        slope, _ = gradient(own, replace(batch, loss_mask=one, shaped_rewards=torch.full((8, 1), reward)))
        torch.testing.assert_close(slope, expected)


def test_geometric_corrections_and_distances_by_hand():
    rollout = torch.tensor([[-1.0, -2.0, -7.0]])
    old = rollout + torch.tensor([[math.log(2.0), math.log(0.5) + math.log(4.0), 5.0]])
    mask = torch.tensor([[True, True, False]])  # v is 2 and 2, the geometric mean 2
    for name, args, weight in (
        ("geometric_truncate", {"clip_max": None}, 2.0), ("geometric_truncate", {"clip_max": 1.5}, 1.5),
        ("geometric_mask", {"clip_max": 1.5}, 0.0), ("geometric_mask", {"clip_min": 1.9, "clip_max": 2.1}, 2.0),
    ):  # fmt: skip
        torch.testing.assert_close(CORRECTIONS.build(name, args)(old, rollout, mask), torch.tensor([[weight]]))
    distances = sampler_distances(old, rollout, mask)
    torch.testing.assert_close(distances["rollout_kl"], torch.tensor([[1 - math.log(2.0), 1 - math.log(2.0), 0.0]]))
    torch.testing.assert_close(distances["rollout_chi2"], torch.tensor([[3.0, 3.0, 0.0]]))


def test_returns_by_hand():
    mask = torch.tensor([[True, False, True, True, False]])
    torch.testing.assert_close(place_at_end(torch.tensor([2.0]), mask), torch.tensor([[0.0, 0, 0, 2, 0]]))
    rewards = torch.tensor([[1.0, 9.0, 2.0, 4.0, 9.0]])
    torch.testing.assert_close(discounted_returns(rewards, mask, 0.5), torch.tensor([[3.0, 0, 4, 4, 0]]))
    closed = close_gaps(rewards, mask)
    assert closed.tolist() == [[1.0, 2.0, 4.0, 9.0, 9.0]]
    torch.testing.assert_close(open_gaps(closed, mask), rewards * mask)
    whitened = whiten_tokens(rewards, mask)  # of 1, 2, 4: mean 7/3, variance 7/3
    torch.testing.assert_close(whitened, (rewards - 7 / 3) / math.sqrt(7 / 3) * mask)


def test_length_penalty_by_hand():
    rewards, lengths = torch.tensor([[1.0, 0.0, math.nan, 1.0]]), torch.tensor([[10.0, 20.0, 5.0, 40.0]])
    expected = rewards - 0.3 * (2 / 3) * lengths / 40
    torch.testing.assert_close(penalize_length(rewards, lengths, 0.3), expected, equal_nan=True)
    with pytest.raises(ConfigError, match="coef is -1"):
        penalize_length(rewards, lengths, -1)


def test_returns_of_one_token_of_none_and_of_unscored_completions():
    mask = torch.tensor([[True, False]])
    assert whiten_tokens(torch.tensor([[3.0, 5.0]]), mask).tolist() == [[0.0, 0.0]]
    assert whiten_tokens(torch.tensor([[3.0, 5.0]]), torch.zeros_like(mask)).tolist() == [[0.0, 0.0]]
    both = whiten_tokens(torch.tensor([[3.0, 5.0]]), torch.ones_like(mask), eps=0.0)  # the variance of two is 2
    torch.testing.assert_close(both, torch.tensor([[-1.0, 1.0]]) / math.sqrt(2.0))
    rewards, lengths = torch.tensor([[1.0, math.nan, 0.0]]), torch.tensor([[2.0, 1.0, 1.0]])
    tokens = torch.tensor([[[True, True], [True, False], [True, False]]])
    function = ADVANTAGES.build("reinforce_plus_plus", {"gamma": 0.5, "eps": 0.0})
    values = compute_advantages(function, rewards, lengths=lengths, completion_mask=tokens)
    spread = math.sqrt((0.0**2 + 0.5**2 + 0.5**2) / 2)  # the returns are 0.5, 1 and 0; the second completion has none
    centered = torch.tensor([[[0.0, 0.5], [0.0, 0.0], [-0.5, 0.0]]])
    torch.testing.assert_close(values, centered / spread)
    function = ADVANTAGES.build("reinforce_plus_plus", {"gamma": 0.5, "eps": 0.3})
    values = compute_advantages(function, rewards, lengths=lengths, completion_mask=tokens)
    torch.testing.assert_close(values, centered / math.sqrt(spread**2 + 0.3**2))


def test_the_optimal_token_baseline_by_hand():
    """Two completions of a group; with probabilities of 1/2 and sums of squares of 1/2, every token adds w**2 / 2."""
    rewards, mask = torch.tensor([[1.0, 0.0]]), torch.tensor([[[True, True], [True, False]]])
    half = torch.full((1, 2, 2), 0.5)
    weights = torch.tensor([[[1.0, 1.0], [2.0, 1.0]]])
    function = ADVANTAGES.get("optimal_token_baseline")
    inputs = {"completion_mask": mask, "logprobs": half.log(), "sum_p_squared": half, "rollout_weights": weights}
    values = compute_advantages(function, rewards, **inputs)
    baseline = 1 * 0.5 / (0.5 + 4 * 0.5)  # W is 0.5 and 2 at the first token; alone at the second, there is nothing to compare
    torch.testing.assert_close(values, torch.tensor([[[1 - baseline, 0.0], [-baseline, 0.0]]]))


def test_extreme_gaps_and_clips_are_bounded_and_counted():
    old, mask = torch.tensor([[0.0, 0.0]]), torch.tensor([[True, True]])
    weights = CORRECTIONS.build("geometric_truncate", {"clip_max": None})(old, old - 100, mask)
    torch.testing.assert_close(weights, torch.tensor([[math.exp(20.0)]]))
    logprobs = torch.tensor([[-1.0, -1.0, -1.0]])
    before = logprobs - torch.tensor([[1.0, -1.0, 0.0]]).sign() * math.log(2.0)
    out = LOSSES.build("cispo", {"floor": 0.8, "cap": 1.2})(logprobs, before, torch.ones(1, 1), torch.ones(1, 3, dtype=torch.bool))
    assert out.diagnostics["clip_frac"].tolist() == [[1.0, 1.0, 0.0]]


def test_the_edges_of_rejections():
    rollout, mask = torch.zeros(2, 2), torch.tensor([[True, True], [False, False]])
    far = torch.tensor([[1.0, -0.5], [0.0, 0.0]])
    keep = REJECTIONS.build("m2po", {"threshold": 0.04})(far, rollout, torch.ones(2, 2), mask)
    assert keep.tolist() == [[False, True], [False, False]]  # one token stays, that of the smallest square
    some = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    keep = REJECTIONS.build("vaco", {"high": 0.2})(some, rollout, torch.ones(2, 1), mask)
    assert keep.expand(2, 2).tolist() == [[False, True], [True, True]]  # log v = 0 does not raise the variation
    args = {"estimator": "k1", "over": "max", "low": -0.1, "high": 0.5}
    assert REJECTIONS.build("sequence", args)(some, rollout, torch.ones(2, 1), mask).tolist() == [[False], [True]]
    bounds = {"estimator": "k1", "low": 0.0, "high": 0.0}  # a bound itself is kept, and 0 is one
    signs = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert REJECTIONS.build("token", bounds)(signs, rollout, torch.ones(2, 1), mask | True).tolist() == 2 * [[False, True]]
    no_low = REJECTIONS.build("token", bounds | {"low": None})(signs, rollout, torch.ones(2, 1), mask | True)
    assert no_low.tolist() == [[False, True], [True, True]]
    bounds = {"estimator": "k1", "low": -20.0, "high": 20.0}  # log v is clamped to +-20 before it is judged
    far = torch.tensor([[100.0, -100.0], [0.0, 0.0]])
    assert REJECTIONS.build("token", bounds)(far, rollout, torch.ones(2, 1), mask)[0].tolist() == [True, True]


def test_vaco_by_hand():
    """v is 1.5 and 0.9, so the variation is 0.3: outside the bounds the first token leaves for A > 0, else the second."""
    log_v = torch.tensor([[1.5, 0.9, 9.0], [1.0, 1.0, 1.0]]).log()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    exact = float(log_v[0, :2].expm1().abs().sum() / 2)

    def keep(advantage, **bounds):
        reject = REJECTIONS.build("vaco", bounds)
        return reject(log_v - 1, -torch.ones(2, 3), torch.tensor([[advantage], [1.0]]), mask).expand(2, 3)[:, :2].tolist()

    for bounds in ({}, {"high": 0.29}, {"low": 0.31, "high": 1.0}, {"low": 0.1, "high": 0.29}):
        for advantage, expected in ((2.0, [False, True]), (-2.0, [True, False]), (0.0, [True, True])):
            assert keep(advantage, **bounds) == [expected, [True, True]]
    for bounds in ({"high": 0.31}, {"low": 0.29, "high": 0.31}, {"high": exact}, {"low": exact, "high": exact}):
        assert keep(2.0, **bounds) == keep(-2.0, **bounds) == 2 * [[True, True]]
    log_v[0, 0] = math.log(1.2)  # 0.15, and up to 0.2 is allowed; a completion above does not take others with it
    assert keep(2.0) == 2 * [[True, True]] and keep(2.0, high=0.14) == [[False, True], [True, True]]


def test_rejection_by_the_geometric_mean_by_hand():
    log_v = torch.tensor([[0.2, 0.4, 5.0], [-0.2, -0.4, 0.0], [9.0, 9.0, 9.0], [0.0, 0.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, True, False], [False] * 3, [True, True, False]])

    def keep(**bounds):
        reject = REJECTIONS.build("geometric", bounds)
        return reject(log_v - 1, -torch.ones(4, 3), torch.ones(4, 1), mask).expand(4, 3)[:, 0].tolist()

    above, below = math.exp(0.3), math.exp(-0.3)  # the geometric means; without a token, and where all v are 1, it is 1
    assert keep(low=below - 0.001, high=above + 0.001) == [True, True, True, True]
    assert keep(low=below + 0.001, high=above + 0.001) == [True, False, True, True]
    assert keep(low=below - 0.001, high=above - 0.001) == [False, True, True, True]
    assert keep(low=above - 0.001, high=above + 0.001) == [True, False, False, False]
    assert keep(low=1.0, high=1.0) == [False, False, True, True]  # the bounds themselves are kept
    for gap, expected in ((0.0015, True), (0.0025, False), (-0.0005, True), (-0.0015, False)):  # 0.999 to 1.002
        log_v = torch.full((4, 3), gap)
        assert keep() == [expected, expected, True, expected]


@pytest.mark.parametrize("name, args, message", [
    ("vaco", {"low": 0.3}, "low is 0.3 and high is 0.2; low must be at most high"),
    ("token", {"low": 0.3}, "low is 0.3 and high is 0.1; low must be at most high"),
    ("sequence", {"low": 0.3}, "low is 0.3 and high is 0.1; low must be at most high"),
    ("geometric", {"low": 1.1}, "low is 1.1 and high is 1.002; both must satisfy 0 < low <= high"),
    ("geometric", {"low": 0.0}, "low is 0.0 and high is 1.002; both must satisfy 0 < low <= high"),
    ("m2po", {"threshold": 0.0}, "threshold is 0.0; it must be above 0"),
])  # fmt: skip
def test_bounds_of_rejections_are_checked(name, args, message):
    with pytest.raises(ConfigError, match=message):
        REJECTIONS.build(name, args)(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 1), torch.ones(2, 2, dtype=torch.bool))


def test_rewards_at_the_end_of_groups_and_the_best_of_two():
    mask = torch.tensor([[[True, True, True], [True, True, False]]])
    placed = place_at_end(torch.tensor([[2.0, 3.0]]), mask)
    assert placed.tolist() == [[[0.0, 0.0, 2.0], [0.0, 3.0, 0.0]]]
    values = compute_advantages(ADVANTAGES.build("grpo_passk", {"eps": 0.0}), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(values, torch.tensor([[math.sqrt(2.0), 0.0]]))  # the spread of two is sqrt(1 / 2)
