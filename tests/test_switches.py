"""Every switch of the objective through the whole loop, on a two-layer model."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from fakes import FixedTasks, frozen_batch, ragged_rollouts, tiny_policy, with_objective
from safetensors.torch import load_file
from test_loop import GOOD, count_good, make_run, rows

from grpo_core.batch import replace_rows, split, take
from grpo_core.config.files import build
from grpo_core.config.presets import PRESETS, get_preset
from grpo_core.config.sections import (
    AdvantageConfig,
    FunctionConfig,
    LogConfig,
    LossConfig,
    ReferenceConfig,
    RunConfig,
    SamplingConfig,
)
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.kl import kl_exact
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.token_weights import token_weights
from grpo_core.scoring.scoring import Reward
from grpo_core.training.control import adapt, first_control
from grpo_core.training.freeze import top_entropy_mask
from grpo_core.training.rollouts import collect, compute_step_advantages, shape_rewards
from grpo_core.training.trainer import train
from grpo_core.training.update import count_over_ranks, forward_with_gradient, micro_loss

EVERYTHING = LossConfig(
    average="token", kl="k3_corrected", kl_coef=0.1, entropy_coef=0.05, top_entropy=0.5, off_policy_mask=0.02,
    rollout_correction=FunctionConfig("token_truncate", {"clip_max": 1.5}),
)  # fmt: skip


def sampling(**more):
    return lambda config: replace(config, sampling=replace(config.sampling, **more))


def parameters(run):
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


def whole_loss(run, batch, control, stats, logprobs=None):
    """The loss of a batch that is one micro-batch; `logprobs` take the place of the policy's."""
    [packing] = run.policy.plan(batch.rollouts)
    tokens = forward_with_gradient(run.policy, run.objective, batch.rollouts, packing, control)
    tokens = tokens if logprobs is None else replace(tokens, logprobs=logprobs)
    return micro_loss(run.objective, batch, tokens, count_over_ranks(run.objective, batch, 1), control, stats)


def zeros(completions):
    return [0.0] * len(completions)


# --- the micro-batch


@pytest.mark.parametrize("loss", [
    EVERYTHING,
    replace(EVERYTHING, kl="exact", average="sequence"),
    replace(EVERYTHING, name="vespo", average="constant", rollout_correction=FunctionConfig("sequence_mask")),
    replace(EVERYTHING, kl="k1", kl_in="reward", name="luspo", average="row_sum"),
], ids=["everything", "exact", "vespo", "reward"])  # fmt: skip
def test_no_switch_depends_on_the_micro_batch(tmp_path, loss):
    ends, losses, counts = [], [], []
    for size in (1, 1000):
        run = make_run(tmp_path / str(size), num_steps=2, loss=loss, policy=tiny_policy(lora_noise=0.1),
                       tokens_per_micro_batch=size, num_minibatches=2, num_passes=2,
                       change=lambda c: replace(c, seed=1, truncation=FunctionConfig("mask_loss")))  # fmt: skip
        before = parameters(run)
        run.engine.by_gradient_descent()
        train(run)
        ends.append(parameters(run))
        losses.append([row["loss"] for row in rows(tmp_path / str(size))])
        counts.append(sum(row["micro_batches"] for row in rows(tmp_path / str(size))))
    assert counts[0] > counts[1] == 8  # one for each optimizer step
    torch.testing.assert_close(*ends, atol=1e-6, rtol=0)
    assert (ends[0] - before).abs().max() > 1e-3
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_micro_token_does_depend_on_it(tmp_path):
    ends = []
    for size in (20, 1000):
        run = make_run(
            tmp_path / str(size),
            num_steps=1,
            loss=LossConfig(average="micro_token", kl_coef=0),
            tokens_per_micro_batch=size,
        )
        train(run)
        ends.append(parameters(run))
    assert (ends[0] - ends[1]).abs().max() > 1e-4


def test_a_micro_batch_is_one_whatever_it_holds(tmp_path):
    """8 rows in micro-batches of at most 3 are three: micro_token's weights add up to 1."""
    run = make_run(tmp_path)
    batch = frozen_batch(run, ragged_rollouts(8), torch.zeros(1, 8))
    totals = count_over_ranks(run.objective, batch, 3)
    weights = [token_weights(m.loss_mask, average="micro_token", totals=totals) for m in split(batch, 3)]
    assert totals.micro_batches == 3 and [float(w.sum()) for w in weights] == pytest.approx([1 / 3] * 3)


def test_every_switch_has_a_hand_in_the_loss(tmp_path):
    """The loss of one micro-batch, taken apart: each factor and term of FORMULAS' order, written out."""
    policy = tiny_policy(lora_noise=0.1)
    run = make_run(tmp_path, loss=EVERYTHING, policy=policy, num_minibatches=2)
    rollouts = replace(ragged_rollouts(8), rollout_logprobs=-2.5 * torch.ones(8, 6))
    advantages = torch.tensor([[1.0, -1.0, 0.5, -0.5], [2.0, -2.0, -1.0, 1.0]])
    trained = torch.tensor([[True] * 4, [True, True, True, False]])
    batch = frozen_batch(run, rollouts, advantages, trained)
    batch = replace(batch, old_logprobs=batch.old_logprobs + 0.1 * torch.sin(torch.arange(48.0)).view(8, 6))
    ours = whole_loss(run, batch, run.control, Stats())

    mask = rollouts.completion_mask & trained.view(8, 1)
    tokens = policy.forward(rollouts)
    with policy.reference():
        d = policy.logprobs(rollouts) - tokens.logprobs
    entropies = tokens.entropy[mask].detach()
    high = mask & (tokens.entropy >= torch.quantile(entropies, 0.5))
    column = advantages.view(8, 1)
    ratio = (tokens.logprobs - batch.old_logprobs).exp()
    surrogate = -torch.minimum(ratio * column, ratio.clamp(0.8, 1.2) * column)
    drift = ((-2.5 - tokens.logprobs) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    kept = (column >= 0) | (drift <= 0.02)
    weight = (batch.old_logprobs + 2.5).exp().clamp(max=1.5)
    loss = surrogate * kept * high * weight + 0.1 * ratio * (d.exp() - d - 1)
    by_hand = (loss * mask).sum() / mask.sum() - 0.05 * (tokens.entropy * high).sum() / high.sum()
    torch.testing.assert_close(ours, by_hand)
    assert 0 < kept.sum() < 8 and 0 < high.sum() < mask.sum() and (weight == 1.5).any() and (weight < 1.5).any()
    with torch.no_grad():
        assert ours != whole_loss(run, batch, replace(run.control, entropy_coef=0.0), Stats())


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_mask"])
def test_vespo_takes_the_rollout_correction_into_its_own_ratio(tmp_path, correction):
    """s = sum_t(l - l_old) + sum_t log w, and the surrogate is not weighed once more. arXiv:2602.10693."""
    loss = LossConfig(
        name="vespo", average="token", kl_coef=0.0, rollout_correction=FunctionConfig(correction, {"clip_max": 1.3})
    )
    run = make_run(tmp_path, loss=loss, policy=tiny_policy(lora_noise=0.1), num_minibatches=2)
    rollouts, column = ragged_rollouts(8), torch.tensor([[1.0], [-1.0]] * 4)
    mask = rollouts.completion_mask
    rollouts = replace(
        rollouts,
        rollout_logprobs=run.policy.logprobs(rollouts).detach()
        + 0.05 * torch.sin(torch.arange(48.0)).view(8, 6) * mask,
    )
    batch = frozen_batch(run, rollouts, column)
    batch = replace(batch, old_logprobs=batch.old_logprobs - 0.03 * mask)
    ours = whole_loss(run, batch, run.control, Stats())

    tokens, gap = run.policy.forward(rollouts).logprobs, (batch.old_logprobs - rollouts.rollout_logprobs) * mask
    if correction == "token_truncate":
        log_w = (gap.exp().clamp(max=1.3).log() * mask).sum(dim=1, keepdim=True)
    else:
        log_w = gap.sum(dim=1, keepdim=True)
        assert (log_w.exp() <= 1.3).all()
    s = ((tokens - batch.old_logprobs) * mask).sum(dim=1, keepdim=True).detach() + log_w
    k, lam = torch.where(column > 0, 2.0, 3.0), torch.where(column > 0, 3.0, 2.0)
    by_hand = -((lam + k * s - lam * s.exp()).exp() * column * tokens * mask).sum() / mask.sum()
    torch.testing.assert_close(ours, by_hand)
    assert log_w.abs().max() > 0.01


# --- dynamic sampling


def rows_above_100(completions, row):
    return [
        text.count(GOOD) + 0.01 * i if r >= 100 else 0.0
        for i, (text, r) in enumerate(zip(completions, row, strict=True))
    ]


def test_tied_groups_are_replaced_counted_and_bounded(tmp_path):
    run = make_run(tmp_path / "a", num_steps=2, change=sampling(dynamic_attempts=3))
    train(replace(run, rewards=[Reward("good", 1.0, rows_above_100)]))
    for row in rows(tmp_path / "a"):
        assert row["first_draw/tied_groups"] == 1.0 and row["tied_groups"] == 0.0
        assert row["resampled_groups"] == 4 and row["resampling_attempts"] == 1
        assert row["tokens_sampled"] > row["tokens"] and row["first_draw/reward"] == 0.0 < row["reward"]
    assert {row["task"] for row in rows(tmp_path / "a", "completions")} == {100, 101, 102, 103}
    run = make_run(tmp_path / "b", num_steps=1, change=sampling(dynamic_attempts=3))
    train(replace(run, rewards=[Reward("good", 1.0, zeros)]))
    (row,) = rows(tmp_path / "b")
    assert row["resampling_attempts"] == 3 and row["resampled_groups"] == 12 and row["tied_groups"] == 1.0


def test_a_group_whose_reward_failed_is_not_drawn_again(tmp_path):
    run = make_run(tmp_path, num_steps=1, change=sampling(dynamic_attempts=3))
    train(
        replace(
            run, rewards=[Reward("good", 1.0, lambda completions, row: [float("nan") if r == 2 else 0.0 for r in row])]
        )
    )
    (row,) = rows(tmp_path)
    assert row["failed/good"] == 0.25 and row["resampled_groups"] == 9


def test_a_reward_that_fails_on_what_was_drawn_again_is_told(tmp_path, capsys):
    run = make_run(tmp_path, num_steps=1, change=sampling(dynamic_attempts=1))
    train(
        replace(
            run,
            rewards=[Reward("good", 1.0, lambda completions, row: [float("nan") if r == 102 else 0.0 for r in row])],
        )
    )
    assert "warning: reward good returned nan for completion 16" in capsys.readouterr().out


def test_a_step_in_which_every_reward_failed_changes_nothing_and_the_run_goes_on(tmp_path):
    run, calls = make_run(tmp_path, num_steps=3, max_failed_rewards=1.0), []

    def fails_at_first(completions):
        calls.append(1)
        return None if len(calls) == 1 else count_good(completions)

    train(replace(run, rewards=[Reward("good", 1.0, fails_at_first)]))
    first, second, _ = rows(tmp_path)
    assert first["failed/good"] == 1 and first["reward"] is None and first["grad_norm"] == 0 and second["grad_norm"] > 0
    assert all(row["reward"] is None and row["advantage"] == 0 for row in rows(tmp_path, "completions")[:32])


def test_only_tied_groups_are_replaced_and_the_others_stay_as_they_were(tmp_path):
    def two_are_tied(completions, row):
        return [float(i) if r in (1, 3) or r >= 100 else 0.0 for i, r in enumerate(row)]

    plain = make_run(tmp_path / "a")
    plain = replace(plain, rewards=[Reward("good", 1.0, two_are_tied)])
    dynamic = replace(plain, config=sampling(dynamic_attempts=1)(plain.config))
    _, before, _ = collect(plain, 0, Stats())
    tasks, after, scores = collect(dynamic, 0, Stats())
    assert [task.index for task in tasks] == [100, 1, 102, 3]
    for row in range(32):
        same = before.completions[row] == after.completions[row] and torch.equal(
            before.completion_ids[row][before.completion_mask[row]],
            after.completion_ids[row][after.completion_mask[row]],
        )
        assert same == (row // 8 in (1, 3))
    assert (scores.rewards[[0, 2]] > 0).any() and torch.equal(scores.rewards, scores.by_name["good"])
    # what was put in is what was sampled: the trainer's log-probs are the sampler's, in every row
    torch.testing.assert_close(
        plain.policy.logprobs(after)[after.completion_mask],
        after.rollout_logprobs[after.completion_mask],
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("what", ["rewards", "mask"])
def test_groups_that_truncation_leaves_without_a_signal_are_replaced_too(tmp_path, what):
    def by_row(completions, row):
        return [i % 8 + 50.0 * (r not in (1, 3)) for i, r in enumerate(row)]

    def rows_1_and_3_are_cut_off(rewards, lengths, truncated, max_new_tokens):
        assert lengths.shape == truncated.shape == rewards.shape == (len(rewards), 8) and max_new_tokens == 5
        cut = (rewards.max(dim=1, keepdim=True).values < 50).expand_as(rewards)
        return (rewards * ~cut, torch.ones_like(cut)) if what == "rewards" else (rewards, ~cut)

    run = make_run(tmp_path, change=sampling(dynamic_attempts=1))
    run, stats = with_objective(replace(run, rewards=[Reward("good", 1.0, by_row)]), truncation_fn=rows_1_and_3_are_cut_off), Stats()
    tasks, _, _ = collect(run, 0, stats)
    assert [task.index for task in tasks] == [0, 101, 2, 103]
    assert stats.reduce()["first_draw/tied_groups"] == 0.5


def test_near_ties_count_as_ties(tmp_path):
    def almost(completions):
        return [1e-4 * (i % 3) for i in range(len(completions))]

    def levelled(config):
        return replace(config, advantage=AdvantageConfig(min_group_std=0.01))

    run = make_run(tmp_path, num_steps=1, change=levelled)
    train(replace(run, rewards=[Reward("good", 1.0, almost)]))
    (row,) = rows(tmp_path)
    assert row["tied_groups"] == 1.0 and row["advantage_abs"] == 0.0 and row["grad_norm"] == 0.0


def test_gdpo_has_a_signal_where_any_reward_that_counts_has_one(tmp_path):
    def up(completions):
        return [float(i % 2) for i in range(len(completions))]

    def down(completions):
        return [1.0 - i % 2 for i in range(len(completions))]

    for name, weights, tied in (("gdpo", (1.0, 1.0), 0.0), ("grpo", (1.0, 1.0), 1.0), ("gdpo", (0.0, 1.0), 1.0)):
        run = make_run(
            tmp_path / f"{name}{weights[0]}", change=lambda c, name=name: replace(c, advantage=AdvantageConfig(name))
        )
        second = down if weights[0] else zeros
        run = replace(run, rewards=[Reward("up", weights[0], up), Reward("down", weights[1], second)])
        stats = Stats()
        _, rollouts, scores = collect(run, 0, stats)
        compute_step_advantages(run.objective, scores.rewards, rollouts, scores, stats)
        assert stats.reduce()["tied_groups"] == tied


def test_rows_are_replaced_whatever_their_widths():
    wide, narrow = ragged_rollouts(4, prompt_width=7, width=9), ragged_rollouts(2, prompt_width=3, width=4, seed=1)
    wide, narrow = (
        replace(r, completions=tuple(f"{n}{i}" for i in range(len(r)))) for r, n in ((wide, "w"), (narrow, "n"))
    )
    for ours, theirs in ((wide, narrow), (take(narrow, torch.tensor([0, 1, 0, 1])), take(wide, torch.tensor([2, 3])))):
        mixed = replace_rows(ours, torch.tensor([1, 3]), theirs)
        for row, (source, i) in enumerate([(ours, 0), (theirs, 0), (ours, 2), (theirs, 1)]):
            for ids, mask in (("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask")):
                got = getattr(mixed, ids)[row][getattr(mixed, mask)[row]]
                assert torch.equal(got, getattr(source, ids)[i][getattr(source, mask)[i]])
            assert mixed.completions[row] == source.completions[i] and mixed.truncated[row] == source.truncated[i]
        assert mixed.prompt_mask[:, -1].all()  # prompts stay next to their completions


# --- rewards before they count


def test_the_kl_can_stand_in_the_reward(tmp_path):
    policy = tiny_policy(lora_noise=0.3)
    run = make_run(tmp_path, loss=LossConfig(kl="k1", kl_coef=0.5, kl_in="reward"), policy=policy)
    _, rollouts, scores = collect(run, 0, Stats())
    stats = Stats()
    rewards, trained = shape_rewards(run.objective, policy, run.budgets.forward, rollouts, scores, 0.5, stats)
    with torch.no_grad():
        gap = policy.logprobs(rollouts)
        with policy.reference():
            gap = gap - policy.logprobs(rollouts)
    torch.testing.assert_close(rewards, scores.rewards - 0.5 * gap.sum(dim=1).view(4, 8))
    assert gap.abs().max() > 0.1 and trained.all()
    assert stats.reduce()["kl"] == pytest.approx(float(gap.sum() / rollouts.completion_mask.sum()), rel=1e-4)
    batch = frozen_batch(run, rollouts, torch.zeros(4, 8))
    assert batch.ref_logprobs is None  # and not in the loss
    exact = replace(run.objective, kl_fn=kl_exact)
    ours = shape_rewards(exact, policy, run.budgets.forward, rollouts, scores, 0.5, Stats())[0]
    whole = policy.forward(rollouts, divergence=kl_exact).divergence.detach()
    torch.testing.assert_close(ours, scores.rewards - 0.5 * whole.sum(dim=1).view(4, 8))


def test_the_kl_in_the_reward_pulls_to_the_reference(tmp_path):
    policy = tiny_policy(lora_noise=0.5)
    run = make_run(tmp_path, num_steps=70, learning_rate=5e-3, tokens_per_micro_batch=1000, loss=LossConfig(kl="k1", kl_coef=1.0, kl_in="reward", average="token"), policy=policy,
                   change=lambda c: replace(c, advantage=AdvantageConfig("dr_grpo")))  # fmt: skip
    train(replace(run, rewards=[Reward("good", 1.0, zeros)]))
    kl = [row["kl"] for row in rows(tmp_path)]
    assert sum(kl[-10:]) / 10 < 0.6 * sum(kl[:3]) / 3


def test_the_shaped_reward_is_on_disk_where_it_may_differ(tmp_path):
    """5 tokens are the limit and a fifth of them the penalised end: -1 for 5 of them, nothing for 4."""
    train(make_run(tmp_path / "a", num_steps=1, change=lambda c: replace(c, truncation=FunctionConfig("soft_penalty"))))
    made = rows(tmp_path / "a", "completions")
    assert {row["length"] == 5 for row in made} == {True, False}
    for row in made:
        assert row["shaped_reward"] == row["reward"] - (row["length"] == 5)
    for group in range(4):
        part = made[8 * group : 8 * group + 8]
        mean = sum(row["shaped_reward"] for row in part) / 8
        assert all((row["advantage"] > 0) == (row["shaped_reward"] > mean) for row in part)
    train(make_run(tmp_path / "b", num_steps=1))
    assert all("shaped_reward" not in row for row in rows(tmp_path / "b", "completions"))


def test_truncated_completions_are_not_trained_when_masked(tmp_path):
    """5 tokens, no end among them: everything is truncated."""
    run = make_run(tmp_path, num_steps=1, change=lambda c: replace(c, truncation=FunctionConfig("mask_loss")))
    run.sampler.eos_ids = torch.tensor([10_000])
    train(run)
    (row,) = rows(tmp_path)
    assert row["truncated"] == 1.0 and row["grad_norm"] == 0.0 and row["loss"] == 0.0 and row["advantage_abs"] > 0


def test_the_masked_rows_tokens_leave_the_denominator(tmp_path):
    run = make_run(tmp_path)
    rollouts, advantages = ragged_rollouts(8), torch.ones(1, 8)
    trained = torch.tensor([[True, False] * 4])
    totals = count_over_ranks(run.objective, frozen_batch(run, rollouts, advantages, trained), 1)
    assert totals.tokens == rollouts.lengths()[::2].sum() and totals.completions == 8
    assert count_over_ranks(run.objective, frozen_batch(run, rollouts, advantages), 1).tokens == rollouts.lengths().sum()


def test_fault_17_a_step_without_any_reward_is_counted_and_the_run_goes_on(tmp_path):
    """FAULTS 17: one prompt a step whose gold answer has no number."""
    run, calls = make_run(tmp_path, num_steps=3, kl_coef=0.1), []

    def none_in_the_second_step(completions):
        calls.append(completions)
        return [None if len(calls) == 2 else value for value in count_good(completions)]

    train(replace(run, rewards=[Reward("good", 1.0, none_in_the_second_step)]))
    made = rows(tmp_path)
    assert [row.get("no_reward") for row in made] == [None, 1.0, None] and len(calls) == 3
    assert made[1]["reward"] is None and made[1]["advantage_abs"] == 0.0 and made[1]["skipped"] == 0
    assert made[2]["reward"] is not None and made[2]["grad_norm"] > 0


@pytest.mark.parametrize("average", ["token", "sequence", "micro_token"])
def test_fault_16_a_step_in_which_everything_is_cut_off_is_counted_and_the_run_goes_on(tmp_path, average):
    """FAULTS 16: truncation mask_loss_and_baseline leaves every completion of the step out."""
    truncation = FunctionConfig("mask_loss_and_baseline")
    run = make_run(tmp_path, num_steps=2, kl_coef=0.1, change=lambda c: replace(c, truncation=truncation, loss=replace(c.loss, average=average)))
    run.sampler.eos_ids = torch.tensor([10_000])
    before = [p.detach().clone() for p in run.policy.parameters()]
    train(run)
    for row in rows(tmp_path):
        assert row["no_reward"] == 1.0 and row["truncated"] == 1.0 and row["grad_norm"] == 0.0 and row["loss"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, run.policy.parameters(), strict=True))


def test_advantages_see_lengths_single_rewards_and_weights(tmp_path):
    run = make_run(tmp_path)
    rewards = [
        Reward("good", 1.0, count_good),
        Reward("long", 0.5, lambda completions: [float(len(c)) for c in completions]),
    ]
    seen = {}

    def spy(rewards, lengths, components, weights):
        seen.update(lengths=lengths, components=components, weights=weights)
        return rewards - rewards.mean(dim=1, keepdim=True)

    run = with_objective(replace(run, rewards=rewards), advantage_fn=spy)
    _, rollouts, scores = collect(run, 0, Stats())
    compute_step_advantages(run.objective, scores.rewards, rollouts, scores, Stats())
    assert torch.equal(seen["lengths"].flatten().long(), rollouts.lengths()) and seen["weights"].tolist() == [1.0, 0.5]
    assert torch.equal(seen["components"], torch.stack([*scores.by_name.values()]))
    out_of_the_baseline = scores.rewards.clone()
    out_of_the_baseline[0, 3] = float("nan")
    compute_step_advantages(replace(run.objective, advantage_fn=lambda rewards, components: seen.update(c=components) or 0 * rewards.nan_to_num()),
                          out_of_the_baseline, rollouts, scores, Stats())  # fmt: skip
    assert seen["c"][:, 0, 3].isnan().all() and seen["c"].isnan().sum() == 2


# --- masks and weights


def test_top_entropy_keeps_the_share_it_says():
    entropy = torch.rand(10, 20, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(10, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    kept = top_entropy_mask(entropy, mask, 0.25)
    assert not kept[~mask].any() and abs(kept.sum() - 0.25 * mask.sum()) <= 1
    assert entropy[kept].min() >= entropy[mask & ~kept].max()
    assert not top_entropy_mask(entropy, torch.zeros_like(mask), 0.25).any()


def test_tokens_of_low_entropy_are_not_pulled(tmp_path):
    run = make_run(tmp_path, loss=LossConfig(kl_coef=0.0, top_entropy=0.3))
    batch = frozen_batch(run, ragged_rollouts(8), torch.ones(1, 8))
    logprobs = run.policy.logprobs(batch.rollouts).detach().requires_grad_()
    whole_loss(run, batch, run.control, Stats(), logprobs).backward()
    assert torch.equal(logprobs.grad != 0, batch.surrogate_mask) and batch.surrogate_mask.any()
    assert batch.old_logprobs is None  # used once: the ratio stays exactly 1


def test_effective_sample_size_and_masks_are_in_the_log(tmp_path):
    loss = replace(EVERYTHING, rollout_correction=FunctionConfig("sequence_truncate"))
    train(make_run(tmp_path, num_steps=1, loss=loss))
    (row,) = rows(tmp_path)
    assert row["rollout_weight"] == pytest.approx(1.0, abs=1e-3) and row["rollout_weight_ess"] == pytest.approx(
        1.0, abs=1e-3
    )
    assert row["off_policy_kept"] == 1.0 and not any("square" in name for name in row)


# --- entropy, KL and the reference


def test_an_entropy_bonus_raises_the_entropy(tmp_path):
    policy = tiny_policy(lora_noise=0.3)
    run = make_run(tmp_path, num_steps=25, loss=LossConfig(kl_coef=0.0, entropy_coef=1.0), policy=policy, tokens_per_micro_batch=1000)
    train(replace(run, rewards=[Reward("good", 1.0, zeros)]))
    entropy = [row["entropy"] for row in rows(tmp_path)]
    assert entropy[-1] > entropy[0] + 0.1 and entropy[-1] > 0.95 * math.log(16)


def test_coefficients_adapt_and_are_logged(tmp_path):
    loss = LossConfig(
        kl_coef=0.1, kl_target=1e-3, kl_horizon=64, entropy_coef=0.0, entropy_target=1.0, entropy_delta=0.01
    )
    train(make_run(tmp_path, num_steps=25, loss=loss, learning_rate=5e-2, tokens_per_micro_batch=1000))
    made = rows(tmp_path)
    for before, after in itertools.pairwise(made):
        error = min(max(before["kl"] / 1e-3 - 1, -0.2), 0.2)
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + error * 32 / 64))
        assert (after["entropy_coef"] > 0) == (before["entropy"] <= 1.0)
    assert made[-1]["kl_coef"] > made[0]["kl_coef"] and {row["entropy_coef"] > 0 for row in made} == {True, False}


def test_the_exact_kl_pulls_and_is_measured_on_the_side(tmp_path):
    policy = tiny_policy(lora_noise=0.2)
    run = make_run(tmp_path, num_steps=25, loss=LossConfig(kl="exact", kl_coef=1.0, average="token"), policy=policy, tokens_per_micro_batch=1000,
                   change=lambda c: replace(c, log=LogConfig(exact_kl_every=5, exact_kl_tokens=40)))  # fmt: skip
    train(replace(run, rewards=[Reward("good", 1.0, zeros)]))
    made = rows(tmp_path)
    assert made[-1]["kl"] < made[0]["kl"] / 3
    assert [row["step"] for row in made if "kl_exact" in row] == [0, 5, 10, 15, 20]
    assert made[0]["kl_exact"] == pytest.approx(made[0]["kl"], rel=0.5) and made[0]["kl_exact"] > 0


def test_the_reference_moves_when_it_should(tmp_path):
    run = make_run(tmp_path, num_steps=5, loss=LossConfig(kl_coef=0.01, average="token"),
                   change=lambda c: replace(c, reference=ReferenceConfig(every=2)))  # fmt: skip
    run.policy.move_reference()
    train(run)
    kl = [row["kl"] for row in rows(tmp_path)]
    assert kl[0] == kl[2] == kl[4] == 0.0 and kl[1] > 0 and kl[3] > 0
    state = load_file(tmp_path / "checkpoints" / "step-000005" / "tensors.safetensors")
    assert all(torch.equal(state[f"reference/{i}"], value) for i, value in enumerate(run.policy.reference_state()))


# --- names


@pytest.mark.parametrize("name", sorted(LOSSES.functions))
def test_every_loss_learns_the_bandit_through_the_loop(tmp_path, name):
    train(make_run(tmp_path, num_steps=15, loss=name, num_passes=2, tokens_per_micro_batch=1000))
    rewards = [row["reward"] for row in rows(tmp_path)]
    assert sum(rewards[-3:]) > 3 * sum(rewards[:3])


@pytest.mark.parametrize("name", sorted(ADVANTAGES.functions))
def test_every_advantage_learns_the_bandit_through_the_loop(tmp_path, name):
    rate = {"pass_at_k": 5e-2}.get(name, 2e-2)
    run = make_run(
        tmp_path, learning_rate=rate, tokens_per_micro_batch=1000, change=lambda c: replace(c, advantage=AdvantageConfig(name))
    )
    train(run)
    rewards = [row["reward"] for row in rows(tmp_path)]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_learns_the_bandit_through_the_loop(tmp_path, name):
    def change(config):
        sections = get_preset(name)
        attempts = sections.pop("sampling")["dynamic_attempts"]
        objective = build(RunConfig, sections, "")
        chosen = {section: getattr(objective, section) for section in sections}
        return replace(
            config, sampling=SamplingConfig(group_size=8, max_new_tokens=5, dynamic_attempts=attempts), **chosen
        )

    policy = tiny_policy()
    run = make_run(tmp_path, policy=policy, change=change, tokens_per_micro_batch=1000)
    loss = run.config.loss
    run = with_objective(replace(run, tasks=FixedTasks()), loss_fn=LOSSES.build(loss.name, loss.args))
    train(run)
    rewards = [row["reward"] for row in rows(tmp_path)]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])


def test_a_mean_over_no_token_steers_nothing():
    config = LossConfig(kl_target=0.1, entropy_target=0.5, entropy_coef=0.1)
    control = first_control(config)
    assert adapt(control, config, math.nan, math.nan, 64) == control
    assert adapt(control, config, 0.3, 0.3, 64) != control
