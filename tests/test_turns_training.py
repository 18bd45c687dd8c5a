"""Training on several turns: what was given has no gradient and counts in no average, however the rows are computed."""

from dataclasses import replace

import pytest
import torch
from fakes import frozen_batch, tiny_policy, with_objective
from test_loop import make_run, rows
from test_packing import Recorder, grouped_rollouts
from test_policy import naive_logprobs
from test_turns_batch import whole
from turn_fakes import ScriptedTurns, with_turns

from grpo_core.batch import take
from grpo_core.commands.attribution import compute_attribution
from grpo_core.config.sections import LossConfig
from grpo_core.model.memory import Budgets
from grpo_core.model.packing import Budget
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.corrections import CORRECTIONS
from grpo_core.objective.inputs import CORRECTION_INPUTS, LOSS_INPUTS, REJECTION_INPUTS, select_tokens
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.policy_loss import PolicyLoss
from grpo_core.objective.rejections import REJECTIONS
from grpo_core.objective.returns import close_gaps, turn_returns
from grpo_core.objective.token_weights import AVERAGES, Totals, token_weights
from grpo_core.objective.truncation import soft_penalty
from grpo_core.sampling.sampler import Sampler
from grpo_core.scoring.scoring import Scores
from grpo_core.training import update as update_module
from grpo_core.training.freeze import freeze
from grpo_core.training.rollouts import _replace_scores, _tied, _truncate, compute_step_advantages
from grpo_core.training.saved_batches import _concatenate, read_dump
from grpo_core.training.trainer import train
from grpo_core.training.update import update_policy

B, C = 6, 9


def values_with_gaps():
    """The inputs of losses, corrections and rejections; where tokens were given, log-probs are 0."""
    generator = torch.Generator().manual_seed(0)
    mask = with_turns(grouped_rollouts(groups=2, group_size=3, width=C)).completion_mask
    old = -3 * torch.rand(B, C, generator=generator, dtype=torch.double) - 0.1
    noise = [0.3 * torch.randn(B, C, generator=generator, dtype=torch.double) for _ in range(5)]
    tokens = {
        "logprobs": old + noise[0], "old_logprobs": old, "rollout_logprobs": old + noise[1], "ref_logprobs": old + noise[2],
        "teacher_logprobs": old + noise[3], "entropy": -old, "sum_p_squared": old.exp(),
        "draws": torch.rand(B, C, generator=generator, dtype=torch.double), "advantages": noise[4],
    }  # fmt: skip
    tokens = {name: torch.where(mask, value, 0.0) for name, value in tokens.items()}
    return {**tokens, "completion_mask": mask, "rewards": torch.arange(B, dtype=torch.double)[:, None] % 2}


def both(call):
    """What `call` returns for values with gaps and for the same without, each with the drawn tokens in front."""
    gaps = values_with_gaps()
    mask = gaps["completion_mask"]
    closed = {name: close_gaps(value, mask) if value.shape == mask.shape else value for name, value in gaps.items()}
    assert not torch.equal(closed["completion_mask"], mask)
    results = []
    for values in (gaps, closed):
        values["logprobs"] = values["logprobs"].requires_grad_()
        out = call(values)
        results.append(out if values is closed or out.shape != mask.shape else close_gaps(out, mask))
    return [out * closed["completion_mask"] if out.shape == mask.shape else out for out in results]


def gradient_of_loss(loss_fn, values):
    values = {**values, "selected": select_tokens(loss_fn, {k: v.detach() for k, v in values.items()})}
    loss = LOSS_INPUTS.call(loss_fn, values).per_token_loss
    weights = torch.cos(values["old_logprobs"])
    [gradient] = torch.autograd.grad((loss * weights * values["completion_mask"]).sum(), values["logprobs"])
    assert (gradient[~values["completion_mask"]] == 0).all()
    return torch.where(values["completion_mask"], loss.detach() + 10 * gradient, 0.0)


@pytest.mark.parametrize("name", LOSSES.functions)
def test_a_loss_of_a_token_does_not_depend_on_what_was_given_between(name):
    got, want = both(lambda values: gradient_of_loss(LOSSES.get(name), values))
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("inputs, function", [
    *((CORRECTION_INPUTS, CORRECTIONS.get(name)) for name in CORRECTIONS.functions),
    *((REJECTION_INPUTS, REJECTIONS.get(name)) for name in REJECTIONS.functions),
])  # fmt: skip
def test_corrections_and_rejections_do_not_either(inputs, function):
    def call(values):
        out = inputs.call(function, {name: value.detach() for name, value in values.items()})
        return torch.zeros(1) if out is None else out.double()

    got, want = both(call)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", AVERAGES.functions)
def test_averages_count_drawn_tokens(name):
    def call(values):
        mask = values["completion_mask"]
        totals = Totals(tokens=mask.sum(), completions=torch.tensor(B), max_new_tokens=C, micro_batches=torch.tensor(1))
        return token_weights(mask, average=name, totals=totals, dtype=torch.double)

    got, want = both(call)
    torch.testing.assert_close(got, want)


def update(run, batch):
    run = replace(run, engine=Recorder(run.policy.parameters()))
    stats = Stats()
    update_policy(run, batch, 0, run.control, stats)
    return run.engine.gradient, stats.reduce()


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_gradient_is_that_of_drawn_tokens_whatever_the_micro_batches(tmp_path, average, minibatches):
    """Against rows of which every token is predicted, with a loss on those that were drawn."""
    advantages, seen = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), []
    rollouts = with_turns(grouped_rollouts(groups=4, group_size=8))
    for i, budget in enumerate((10_000, 1, 40, 10_000)):
        run = make_run(tmp_path / str(i), policy=tiny_policy(lora_noise=0.1), kl_coef=0.1, num_minibatches=minibatches)
        run = replace(with_objective(run, average=average), budgets=Budgets(*2 * [Budget(budget)]))
        batch = frozen_batch(run, rollouts, advantages)
        if i == 0:
            batch = replace(frozen_batch(run, whole(rollouts), advantages), loss_mask=rollouts.completion_mask)
        seen.append(update(run, batch))
    assert seen[0][0].abs().max() > 1e-3
    for gradient, row in seen[1:]:
        torch.testing.assert_close(gradient, seen[0][0], atol=1e-6, rtol=1e-4)
        assert {k: row[k] for k in ("entropy", "kl", "ratio")} == pytest.approx({k: seen[0][1][k] for k in ("entropy", "kl", "ratio")}, rel=1e-4)


def test_given_tokens_have_no_part_in_the_gradient(tmp_path):
    run = make_run(tmp_path, policy=tiny_policy(lora_noise=0.1), kl_coef=0.1)
    rollouts = with_turns(grouped_rollouts(groups=4, group_size=8))
    batch = frozen_batch(run, rollouts, torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))
    attribution = compute_attribution(run.policy, run.objective, Budget(60), batch, run.control)
    drawn = rollouts.completion_mask
    for values in (attribution.weight, attribution.token_loss, attribution.logprobs):
        assert (values[~drawn] == 0).all() and (values[drawn] != 0).all()


class TurnSampler(Sampler):
    """A sampler all of whose completions are answered by a script."""

    def generate(self, tasks, group_size, **options):
        def script(row, number, turn):
            return None if number == 2 else [4 + (row + number) % 8] * ((row + number) % 3)

        limits = [self.max_new_tokens] * (len(tasks) * group_size)
        turns = ScriptedTurns(script, limits=limits, first_limit=3, delay=lambda row, number: row % 3)
        return super().generate(tasks, group_size, turns=turns, **options)


def test_a_run_of_several_turns_trains_at_the_samplers_log_probs(tmp_path):
    run = make_run(tmp_path, num_steps=3, num_minibatches=2, kl_coef=0.01)
    run = replace(run, sampler=TurnSampler(run.policy.causal_lm, run.sampler.tokenizer, max_new_tokens=12))
    rollouts = run.sampler.generate(run.tasks.batch(0), 8)
    assert (rollouts.valid & ~rollouts.completion_mask).sum() > 10
    train(run)
    for row in rows(tmp_path):
        assert row["logprob_gap_max"] < 1e-4 and row["length"] < 12
    first = rows(tmp_path)[0]
    assert first["length"] == pytest.approx(rollouts.lengths().float().mean()) and first["grad_norm"] > 0


def test_a_length_limit_is_one_of_all_tokens(tmp_path):
    run = with_objective(make_run(tmp_path), truncation_fn=soft_penalty, max_new_tokens=9)
    rollouts = take(with_turns(grouped_rollouts(groups=1, group_size=4)), torch.arange(4))
    rewards, _ = _truncate(run.objective, rollouts, torch.zeros(1, 4))
    expected = ((9 - 1.8 - rollouts.valid_lengths()) / 1.8).clamp(-1, 0)
    torch.testing.assert_close(rewards[0], expected)
    assert not torch.equal(rollouts.lengths(), rollouts.valid_lengths())


def turn_scores(rollouts, group_size):
    """Rewards of which a part came with each turn."""
    turns = rollouts.turns.view(-1, group_size, rollouts.completion_ids.shape[1]).amax(dim=2) + 1
    place = torch.arange(int(turns.max()))
    parts = torch.randn(*turns.shape, len(place), generator=torch.Generator().manual_seed(2))
    parts = parts.masked_fill(place >= turns[..., None], torch.nan)
    rewards = parts.nansum(dim=2) + torch.rand(turns.shape, generator=torch.Generator().manual_seed(3))
    return Scores(rewards, {"good": rewards}, (1.0,), {"good": torch.zeros(turns.shape, dtype=torch.bool)}, (), parts)


def test_advantages_of_turns_reach_their_tokens(tmp_path):
    run = with_objective(make_run(tmp_path), advantage_fn=ADVANTAGES.get("turn_level"))
    rollouts = with_turns(grouped_rollouts(groups=4, group_size=8))
    scores = turn_scores(rollouts, 8)
    frozen = freeze(run.policy, run.objective, run.budgets.forward, rollouts)
    values = compute_step_advantages(run.objective, scores.rewards, rollouts, scores, Stats(), frozen)
    returns = turn_returns(scores.rewards, scores.turn_rewards, rollouts.turns.view(4, 8, -1).long())
    torch.testing.assert_close(returns[..., 0], scores.rewards)
    for n in range(4):
        for t in range(returns.shape[2]):
            expected = returns[n, :, t] - returns[n, :, t].nanmean()
            for g in range(8):
                own = values[n, g][rollouts.turns.view(4, 8, -1)[n, g] == t]
                torch.testing.assert_close(own, expected[g].expand(len(own)), atol=1e-5, rtol=0)
    batch = frozen.with_advantages(values, scores.rewards)
    assert batch.advantages.shape == rollouts.completion_ids.shape and (batch.advantages[~rollouts.completion_mask] == 0).all()


def test_a_group_is_tied_if_its_turns_are(tmp_path):
    run = with_objective(make_run(tmp_path), advantage_fn=ADVANTAGES.get("turn_level"))
    rewards = torch.ones(3, 2)
    parts = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], [[0.5, torch.nan], [0.5, 0.5]]])
    scores = Scores(rewards, {}, turn_rewards=parts)
    assert _tied(run.objective, rewards, scores).tolist() == [True, False, True]
    assert _tied(make_run(tmp_path / "other").objective, rewards, scores).all()


def test_rewards_of_turns_are_replaced_and_saved(tmp_path):
    first, second = (turn_scores(with_turns(grouped_rollouts(groups=n, group_size=4, width=w)), 4) for n, w in ((3, 4), (1, 9)))
    assert first.turn_rewards.shape[2] < second.turn_rewards.shape[2]
    merged = _replace_scores(first, torch.tensor([1]), second).turn_rewards
    width = first.turn_rewards.shape[2]
    torch.testing.assert_close(merged[1], second.turn_rewards[0], equal_nan=True)
    torch.testing.assert_close(merged[[0, 2], :, :width], first.turn_rewards[[0, 2]], equal_nan=True)
    assert merged[[0, 2], :, width:].isnan().all()
    joined = _concatenate("turn_rewards", [first.turn_rewards, second.turn_rewards])
    assert joined.shape[:2] == (4, 4) and joined[:3, :, width:].isnan().all()


def test_a_saved_batch_of_several_turns_is_read_back(tmp_path):
    run = make_run(tmp_path, num_steps=1, kl_coef=0.01, change=lambda config: replace(config, debug=replace(config.debug, dump_batches=1)))
    run = replace(run, sampler=TurnSampler(run.policy.causal_lm, run.sampler.tokenizer, max_new_tokens=12))
    train(run)
    dumped = read_dump(tmp_path / "batches" / "step-000000")
    rollouts = dumped.batch.rollouts
    assert (rollouts.valid & ~rollouts.completion_mask).any() and torch.equal(rollouts.completion_mask, rollouts.turn_ids >= 0)
    for row, entry in enumerate(dumped.completions):
        drawn = rollouts.completion_mask[row, : int(rollouts.valid[row].sum())]
        assert len(entry["tokens"]) == len(drawn) and [ratio is not None for ratio in entry["ratio"]] == drawn.tolist()


@pytest.mark.parametrize("budget", [10_000, 1, 60])
def test_echo_trains_what_was_given_and_leaves_the_rest_as_it_is(tmp_path, budget):
    """The gradient without, plus that of the mean -l of given tokens, also of rows that are otherwise not trained."""
    rollouts = with_turns(grouped_rollouts(groups=4, group_size=8))
    advantages, trained = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), torch.ones(4, 8, dtype=torch.bool)
    advantages[1], trained[2] = 0.0, False
    gradients = {}
    for coef in (0.0, 0.3):
        run = make_run(tmp_path / str(coef), policy=tiny_policy(lora_noise=0.1), loss=LossConfig(name="grpo", average="token", echo_coef=coef))
        assert run.objective.echo_coef == coef
        run = replace(run, budgets=Budgets(*2 * [Budget(budget)]))
        gradients[coef], row = update(run, frozen_batch(run, rollouts, advantages, trained))
        assert ("echo" in row) == (coef > 0)
    policy = tiny_policy(lora_noise=0.1)
    naive = naive_logprobs(policy, whole(rollouts))
    loss = -(naive * rollouts.given).sum() / rollouts.given.sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters())])
    torch.testing.assert_close(gradients[0.3] - gradients[0.0], 0.3 * expected, atol=1e-6, rtol=1e-3)
    assert row["echo"] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_echo_keeps_given_tokens_when_a_micro_batch_is_halved(tmp_path, monkeypatch):
    rollouts, seen = with_turns(grouped_rollouts(groups=4, group_size=8)), []
    forward = update_module.forward_with_gradient
    for fails in (False, True):
        run = with_objective(make_run(tmp_path / str(fails), policy=tiny_policy(lora_noise=0.1)), echo_coef=0.3)
        run = replace(run, budgets=Budgets(*2 * [Budget(10_000)]))
        left = [1] if fails else []

        def forward_or_fail(*args, left=left):
            if left:
                left.pop()
                raise torch.OutOfMemoryError
            return forward(*args)

        monkeypatch.setattr(update_module, "forward_with_gradient", forward_or_fail)
        seen.append(update(run, frozen_batch(run, rollouts, torch.zeros(4, 8))))
    assert seen[1][1]["memory_retries"] == 1 and seen[0][0].abs().max() > 1e-3
    torch.testing.assert_close(seen[1][0], seen[0][0], atol=1e-6, rtol=1e-4)


def inverse(logprobs, old_logprobs, advantages, completion_mask, rollout_logprobs):
    """A loss that divides by the policy's probability."""
    return PolicyLoss(-(rollout_logprobs - logprobs).exp() * advantages)


def test_echo_does_not_let_a_loss_see_given_tokens(tmp_path):
    """Their log-probs are computed for ECHO, where the sampler's are 0; a loss must not divide the two."""
    rollouts, advantages = with_turns(grouped_rollouts(groups=2, group_size=8)), torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    run = with_objective(make_run(tmp_path), loss_fn=inverse, echo_coef=1e-30)
    batch = frozen_batch(run, rollouts, advantages)
    seen = []
    for coef in (1e-30, 0.0):
        own = replace(run.objective, echo_coef=coef)
        [packing] = run.policy.plan(rollouts, predict_given=coef > 0)
        tokens = run.policy.forward(rollouts, packing)
        if coef:
            assert (tokens.logprobs[rollouts.given] < 0).all()
            tokens = replace(tokens, logprobs=torch.where(rollouts.given, tokens.logprobs - 200, tokens.logprobs))
        totals = update_module.count_over_ranks(own, batch, 1)
        loss = update_module.micro_loss(own, batch, tokens, totals, run.control, Stats())
        seen.append(torch.autograd.grad(loss, run.policy.parameters(), retain_graph=True))
    for got, want in zip(*seen, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want)
