"""Each alert comes when its cause is there, once, and never in a run that is well."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from fakes import tiny_policy
from test_loop import make_run, rows

from grpo_core.config.sections import LossConfig, ModelConfig, RewardConfig, RunConfig, TrainerConfig
from grpo_core.distributed.signals import RunFailed
from grpo_core.monitor.alerts import ALERTS, Alerts
from grpo_core.scoring.scoring import Reward
from grpo_core.training import checkpoint
from grpo_core.training.trainer import train

WELL = {
    "adapter_norm": 1.0, "skipped": 0, "learning_rate": 1e-4, "tied_groups": 0.3, "truncated": 0.1, "kl": 0.02, "entropy": 0.4,
    "ratio": 1.0, "logprob_gap": 1e-6, "failed/correct_answer": 0.0,
}  # fmt: skip


def seen(change, steps=30, config=None):
    """The step (from 1) and the sentence of all that is said of rows that are well but for change(step)."""
    alerts, said = Alerts(config or RunConfig()), []
    for step in range(steps):
        row = {**WELL, "adapter_norm": 1 + step / 1e9, **change(step)}
        said += [(step + 1, sentence) for sentence in alerts.update(row)]
    return said


def test_a_run_that_is_well_has_none():
    assert seen(lambda step: {}) == []
    assert (
        seen(
            lambda step: {
                "tied_groups": float(step % 10 > 0),
                "truncated": float(step % 10 > 0),
                "kl": 3.0 * (step % 6 == 0),
            }
        )
        == []
    )
    assert seen(lambda step: {"entropy": 0.1 if step < 10 else 0.9}) == []
    assert seen(lambda step: {"entropy": 2.0 - step / 20, "skipped": 1, "adapter_norm": 1.0}) == []
    assert seen(lambda step: {name: 0.0 for name in ("kl",) if step % 2}) == []


@pytest.mark.parametrize("change, step, sentence", [
    (lambda step: {"adapter_norm": 1.0}, 10, "the adapter has not moved in 10 steps"),
    (lambda step: {"learning_rate": 1e-4 * (step < 7)}, 8, "the learning rate is 0"),
    (lambda step: {"tied_groups": 1.0}, 10, "in 10 steps all completions of every prompt had the same reward"),
    (lambda step: {"truncated": 0.96 if step > 2 else 0.1}, 13, "in 10 steps nearly every completion was cut off"),
    (lambda step: {"kl": 1.2 if step > 2 else 0.1}, 8, "the KL from the reference is above 1 nat a token"),
    (lambda step: {"entropy": 0.4 if step < 10 else 1.5}, 14, "the entropy has tripled since the run began"),
    (lambda step: {"entropy": 0.4 if step < 10 else 1e-5}, 15, "the entropy is below 0.001 nats"),
    (lambda step: {"ratio": 1.01 if step == 3 else 1.0}, 4, "the ratio is not 1"),
    (lambda step: {"logprob_gap": 0.5}, 5, "sampler and trainer disagree by more than 0.01"),
], ids=["adapter", "learning_rate", "tied", "truncated", "kl", "entropy_high", "entropy_low", "ratio", "gap"])  # fmt: skip
def test_each_comes_at_its_time_and_once(change, step, sentence):
    (said,) = seen(change)
    assert said[0] == step and said[1].startswith(sentence) and len(said[1].splitlines()) == 1


def test_the_ratio_may_move_off_policy():
    assert seen(lambda step: {"ratio": 1.1}, config=RunConfig(trainer=TrainerConfig(num_minibatches=2))) == []


@pytest.mark.parametrize("precision, has_bf16, limit", [
    ("fp32", False, 0.01), ("bf16", False, 0.3), ("auto", False, 0.01), ("auto", True, 0.3),
])  # fmt: skip
def test_fault_5_the_bound_of_the_gap_is_that_of_the_resolved_precision(precision, has_bf16, limit, monkeypatch):
    """FAULTS #5: auto is float32 on a CPU, and bf16 on a GPU that has it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: has_bf16)
    config = RunConfig(model=ModelConfig(precision=precision))
    assert seen(lambda step: {"logprob_gap": 0.9 * limit}, config=config) == []
    ((step, sentence),) = seen(lambda step: {"logprob_gap": 2 * limit}, config=config)
    assert step == 5 and f"more than {limit} nats" in sentence


LOGGED = RunConfig(  # on a GPU
    model=ModelConfig(precision="bf16"), rewards=[RewardConfig("combined"), RewardConfig("correct_answer", weight=0.0)]
)


@pytest.mark.parametrize("correct, reward, step", [
    ([0.5] * 8 + [0.1] * 22, [1.0] * 8 + [2.0] * 22, 12),  # four of the last five steps
    ([0.5] * 8 + [0.1] * 22, [1.0] * 30, None),  # nothing else is paid for
    ([0.5] * 8 + [0.1] * 22, [1.0] * 8 + [0.9] * 22, None),
    ([0.5] * 8 + [0.3] * 22, [1.0] * 8 + [2.0] * 22, None),
    ([0.12] * 8 + [0.03] * 22, [1.0] * 8 + [2.0] * 22, None),  # of few problems that is chance
    ([0.5] * 8 + [None] * 22, [1.0] * 8 + [2.0] * 22, None),  # the reward could not tell
])  # fmt: skip
def test_what_is_counted_falls_while_what_is_paid_rises(correct, reward, step):
    def change(i):
        return {"rewards/correct_answer": correct[i], "reward": reward[i]}

    said = seen(change, config=LOGGED)
    assert [at for at, _ in said] == [step] * (step is not None)
    assert all(sentence.startswith("correct_answer has fallen below half of what it was") for _, sentence in said)
    assert seen(change, config=RunConfig(rewards=[RewardConfig("combined")])) == []


def test_the_published_recipes_reward_is_noticed_after_ten_steps():
    """By the metrics of docs/results, part 6, where accuracy was 0 by then; that all was cut off came 20 steps in."""
    kept = [json.loads(line) for line in (ROOT / "benchmarks/results/runs/reward_hacking/metrics.jsonl").open()]
    said = seen(lambda step: kept[step], steps=len(kept), config=LOGGED)
    assert [(at, sentence[:14]) for at, sentence in said][:2] == [(10, "correct_answer"), (21, "in 10 steps ne")]
    honest = [json.loads(line) for line in (ROOT / "benchmarks/results/runs/word_problems/metrics.jsonl").open()]
    assert seen(lambda step: honest[step], steps=len(honest), config=LOGGED) == []


def test_failed_rewards_are_counted_over_the_last_ten_steps():
    alerts, told = Alerts(RunConfig(trainer=TrainerConfig(max_failed_rewards=0.25))), []
    for step in range(20):
        alerts.update({**WELL, "failed/correct_answer": float(5 <= step < 12)})
        told.append(alerts.check_failed_rewards())
    assert [step for step, sentence in enumerate(told) if sentence] == list(range(6, 19))
    assert told[7] == (
        "reward correct_answer failed on 38% of the completions of the last 8 steps, more than trainer.max_failed_rewards (0.25) allows"
    )


def test_one_batch_that_fails_early_ends_nothing_and_a_reward_that_never_works_ends_at_once():
    def told(*shares):
        alerts = Alerts(RunConfig())
        return [
            alerts.update({**WELL, "failed/correct_answer": share}) == [] and alerts.check_failed_rewards() is not None
            for share in shares
        ]

    assert told(0.0, 1.0, 0.0, 0.0) == [False] * 4 and told(0.9, 0.9, 0.9) == [False, False, True]
    assert told(1.0) == [True]


def level(run, mode="warn", **more):
    """The run with a reward that never differs."""
    rewards = [Reward("good", 1.0, lambda completions: [0.0] * len(completions))]
    return replace(run, config=replace(run.config, alerts=mode, **more), rewards=rewards)


def test_a_run_with_nothing_to_learn_says_so_and_why(tmp_path, capsys):
    train(level(make_run(tmp_path, num_steps=12)))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert [line.removeprefix("warning: ")[:15] for line in warnings] == ["the adapter has", "in 10 steps all"]


def test_with_stop_the_run_ends_with_a_checkpoint(tmp_path):
    with pytest.raises(RunFailed, match="alerts is stop, and the adapter has not moved in 10 steps"):
        train(level(make_run(tmp_path, num_steps=12), "stop"))
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == ["step-000010"] and len(
        rows(tmp_path)
    ) == 10


def test_a_learning_rate_that_is_far_too_high_runs_away(tmp_path, capsys):
    train(make_run(tmp_path, num_steps=25, learning_rate=0.5, tokens_per_micro_batch=1000, loss=LossConfig(kl_coef=1e-6, average="token")))
    out = capsys.readouterr().out
    assert "the KL from the reference is above 1 nat" in out or "the entropy is below 0.001" in out


def test_the_norm_sees_the_smallest_step():
    policy = tiny_policy(lora_noise=0.5)
    before = policy.norm()
    with torch.no_grad():
        next(p for p in policy.parameters() if p.abs().max() > 0.1).add_(1e-7)
    assert policy.norm() != before


def test_names_are_distinct():
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)
