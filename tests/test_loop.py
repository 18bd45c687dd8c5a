"""The whole loop on a CPU with a two-layer model: it learns a bandit, and what it writes is right."""

import json
from dataclasses import replace

import pytest
import torch
from fakes import Alphabet, FixedTasks, TorchEngine, frozen_batch, tiny_policy, with_objective
from safetensors.torch import load_file

from grpo_core.batch import Task
from grpo_core.config.sections import (  # fmt: skip
    CheckpointConfig,
    EvaluationConfig,
    LogConfig,
    LossConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    TrainerConfig,
)
from grpo_core.distributed.signals import RunFailed
from grpo_core.model.memory import Budgets
from grpo_core.model.packing import Budget
from grpo_core.monitor.aggregates import Stats
from grpo_core.monitor.run_log import RunLog
from grpo_core.objective.losses import PolicyLoss
from grpo_core.sampling.sampler import Sampler
from grpo_core.scoring.scoring import Reward, score
from grpo_core.training.control import first_control
from grpo_core.training.evaluation import evaluate_now
from grpo_core.training.prepare import build_objective
from grpo_core.training.run import Run
from grpo_core.training.trainer import train
from grpo_core.training.update import update_policy

GOOD = "h"


def count_good(completions):
    return [float(text.count(GOOD)) for text in completions]


def make_run(
    folder, num_steps=25, loss="grpo", kl_coef=0.0, policy=None, learning_rate=2e-2, change=None, **trainer
) -> Run:
    """A run on fakes. `loss` may be a whole LossConfig, and `config` a function that changes the configuration."""
    policy = policy or tiny_policy()
    loss = loss if isinstance(loss, LossConfig) else LossConfig(name=loss, kl_coef=kl_coef, average="token")
    config = RunConfig(
        sampling=SamplingConfig(group_size=8, max_new_tokens=5),
        rewards=[RewardConfig("good")],
        loss=loss,
        trainer=TrainerConfig(**{"completions_per_step": 32, "tokens_per_micro_batch": 48, **trainer}),
        evaluation=EvaluationConfig(num_tasks=0),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(every=10),
    )
    config = change(config) if change else config
    folder.mkdir(parents=True, exist_ok=True)
    return Run(
        config=config, folder=folder, start_step=0, num_steps=num_steps, tasks=FixedTasks(), eval_tasks=[], policy=policy,
        sampler=Sampler(policy.causal_lm, Alphabet(), max_new_tokens=5), engine=TorchEngine(policy.parameters(), learning_rate),
        rewards=[Reward("good", 1.0, count_good)], eval_reward=count_good, control=first_control(config.loss),
        objective=build_objective(config),
        log=RunLog(folder, config, 0, num_steps), steps_per_epoch=1,
        budgets=Budgets(*2 * [Budget(config.trainer.tokens_per_micro_batch)]),
    )  # fmt: skip


def rows(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_it_learns_a_bandit(tmp_path):
    train(make_run(tmp_path, kl_coef=0.01))
    rewards = [row["reward"] for row in rows(tmp_path)]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert last > 3 * first and last > 1.5, (first, last)


def test_on_policy_the_first_ratio_is_one_and_old_logprobs_cost_nothing(tmp_path):
    run = make_run(tmp_path, num_steps=3)
    batch = frozen_batch(run, run.sampler.generate(run.tasks.batch(0), 8), torch.zeros(4, 8))
    assert batch.old_logprobs is None and batch.ref_logprobs is None
    train(run)
    for row in rows(tmp_path):
        assert row["ratio"] == 1.0 and row["clip_frac"] == 0.0
        assert row["logprob_gap_max"] < 1e-4  # sampler and trainer are the same distribution


def test_several_minibatches_and_passes_move_the_ratio(tmp_path):
    run = make_run(tmp_path, num_steps=2, num_minibatches=2, num_passes=2, kl_coef=1e-9)
    batch = frozen_batch(run, run.sampler.generate(run.tasks.batch(0), 8), torch.zeros(4, 8))
    torch.testing.assert_close(batch.old_logprobs, batch.rollouts.rollout_logprobs, atol=1e-4, rtol=0)
    train(run)
    assert run.engine.backwards == 2 * 4 * 2  # 2 steps × 4 minibatches of 16 rows × 2 micro-batches
    assert all(row["ratio"] != 1.0 and row["clip_frac"] > 0 for row in rows(tmp_path))


def test_the_reference_pulls(tmp_path):
    """With no reward to gain, a moved adapter goes back towards the base model."""
    policy = tiny_policy(lora_noise=0.2)
    run = make_run(tmp_path, num_steps=40, kl_coef=1.0, policy=policy, tokens_per_micro_batch=1000)
    train(replace(run, rewards=[Reward("good", 1.0, lambda completions: [0.0] * len(completions))]))
    kl = [row["kl"] for row in rows(tmp_path)]
    assert kl[0] > 0.05 and sum(kl[-10:]) < sum(kl[:10]) / 2  # means: one step's KL is noisy
    assert all(row["tied_groups"] == 1.0 for row in rows(tmp_path))


def test_the_micro_batch_size_changes_nothing(tmp_path):
    norms, updated = [], []
    for size in (1, 30, 1000):
        run = make_run(tmp_path / str(size), num_steps=2, tokens_per_micro_batch=size, kl_coef=0.1)
        before = torch.cat([p.detach().flatten() for p in run.policy.parameters()])
        run.engine.by_gradient_descent()
        train(run)
        norms.append(torch.cat([p.detach().flatten() for p in run.policy.parameters()]))
        updated.append(rows(tmp_path / str(size))[0]["tokens_updated"])
    tasks, drawn = run.tasks.batch(0), rows(tmp_path / "1", "completions")[:32]
    assert updated[0] == sum(len(tasks[i // 8].prompt_ids) + row["length"] - 1 for i, row in enumerate(drawn))
    assert updated[2] == updated[0] - sum(7 * len(task.prompt_ids) for task in tasks)  # prompts once for their eight
    torch.testing.assert_close(norms[1], norms[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(norms[2], norms[0], atol=1e-6, rtol=0)
    assert (norms[0] - before).abs().max() > 1e-3


def test_what_a_run_leaves_behind(tmp_path):
    run = make_run(tmp_path, num_steps=2, kl_coef=0.1)
    train(run)
    metrics, completions = rows(tmp_path), rows(tmp_path, "completions")
    wanted = {
        "step", "loss", "kl", "reward", "reward_std", "rewards/good", "rewards/good_std", "tied_groups", "length", "length_max",
        "truncated", "entropy", "ratio", "clip_frac", "logprob_gap", "logprob_gap_max", "grad_norm", "learning_rate",
        "adapter_norm", "tokens", "seconds", "seconds/sample", "seconds/reward", "seconds/freeze", "seconds/update",
        "tokens_per_second", "peak_memory_gb", "epoch", "skipped",
    }  # fmt: skip
    assert wanted <= metrics[0].keys() and [row["step"] for row in metrics] == [0, 1]
    assert len(completions) == 2 * 32
    of_first = [row for row in completions if row["step"] == 0]
    mean = sum(row["reward"] for row in of_first) / 32
    assert metrics[0]["reward"] == pytest.approx(mean)
    spread = (sum((row["reward"] - mean) ** 2 for row in of_first) / 32) ** 0.5
    assert metrics[0]["reward_std"] == metrics[0]["rewards/good_std"] == pytest.approx(spread, rel=1e-5)
    assert metrics[0]["tokens"] == sum(row["length"] for row in of_first)
    assert metrics[0]["truncated"] == pytest.approx(sum(row["truncated"] for row in of_first) / 32)
    for row in of_first:
        assert row["reward"] == row["rewards"]["good"] == row["text"].count(GOOD)
    for group in range(4):
        assert sum(row["advantage"] for row in of_first[8 * group : 8 * group + 8]) == pytest.approx(0, abs=1e-4)
    assert (tmp_path / "checkpoints" / "step-000002" / "meta.json").exists()


def test_unscored_completions_are_null_and_pull_nothing(tmp_path):
    run = make_run(tmp_path, num_steps=1)
    train(replace(run, rewards=[Reward("good", 1.0, lambda completions: [None, 1.0, 0.0, None] * 8)]))
    completions = rows(tmp_path, "completions")
    assert completions[0]["reward"] is None and completions[0]["advantage"] == 0 and completions[1]["advantage"] > 0
    assert rows(tmp_path)[0]["reward"] == 0.5


def test_dropout_noise_is_a_function_of_seed_and_step(tmp_path):
    results = []
    for state in (0, 1):
        torch.manual_seed(state)
        policy = tiny_policy(dropout=0.5, lora_noise=0.1)
        run = make_run(tmp_path / str(state), policy=policy)
        batch = frozen_batch(run, run.sampler.generate(run.tasks.batch(0), 8), torch.ones(4, 8))
        torch.manual_seed(state)  # whatever torch's state before
        stats = Stats()
        update_policy(run, batch, 7, run.control, stats)
        results.append(stats.reduce()["entropy"])
    assert results[0] == results[1]


def test_evaluation_is_greedy_or_as_its_settings_say_with_noise_of_each_tasks_own(tmp_path, monkeypatch):
    """Forty tasks with one prompt: greedy gives one completion, a temperature many, top_k 1 one again."""
    seen = []
    monkeypatch.setattr(
        "grpo_core.training.evaluation.score",
        lambda rewards, tasks, texts, size: (seen.append(texts), score(rewards, tasks, texts, size))[1],
    )
    tasks = [Task(i, "p", [5, 6, 7], {"answer": "1"}, (0,)) for i in range(40)]

    def texts(**settings):
        run = make_run(
            tmp_path, change=lambda config: replace(config, evaluation=EvaluationConfig(batch_size=16, **settings))
        )
        seen.clear()
        evaluate_now(replace(run, eval_tasks=tasks), 0)
        return [text for part in seen for text in part]

    assert len(set(texts())) == 1 and len(texts()) == 40
    assert len(set(texts(temperature=1.0))) > 20 and texts(temperature=1.0) == texts(temperature=1.0)
    assert len(set(texts(temperature=1.0, top_k=1))) == 1
    assert len(set(texts(temperature=1.0, min_p=1.0))) == len(set(texts(temperature=1.0, top_p=1e-6))) == 1


def test_the_first_held_out_answers_are_kept_in_the_order_of_their_tasks(tmp_path):
    tasks = [Task(10 + i, f"p{i}", [5, 6, 7][: 3 - i % 3], {"row": i}, (0,)) for i in range(5)]

    def even(completions, row):
        return [1.0 if r % 2 == 0 else 0.5 for r in row]

    def of(config, shown):
        log = replace(config.log, evaluation_completions=shown)
        return replace(config, log=log, evaluation=EvaluationConfig(batch_size=2))

    for shown in (0, 3):
        run = make_run(tmp_path / str(shown), change=lambda config, shown=shown: of(config, shown))
        evaluate_now(replace(run, eval_tasks=tasks, eval_reward=even), 7)
    assert not (tmp_path / "0" / "evaluation_completions.jsonl").exists()
    found, drawn = rows(tmp_path / "3", "evaluation_completions"), run.sampler.generate(tasks[:3], 1, greedy=True)
    assert [(row["step"], row["task"], row["prompt"]) for row in found] == [(7, 10, "p0"), (7, 11, "p1"), (7, 12, "p2")]
    assert [row["correct"] for row in found] == [True, False, True]
    assert rows(tmp_path / "3", "evaluation")[0]["correct"] == 3  # of five; half a point is not correct
    for name, values in (("text", drawn.completions), ("length", drawn.lengths()), ("truncated", drawn.truncated)):
        assert [row[name] for row in found] == [value if name == "text" else value.item() for value in values], name


def test_tasks_that_the_evaluations_reward_fails_on_are_counted_and_too_many_end_the_run(tmp_path, capsys):
    calls = []

    def fails_then(completions, row):
        calls.append(1)
        return [float("nan") if r < len(calls) else 1.0 for r in row]

    def of(config):
        return replace(
            config,
            evaluation=EvaluationConfig(batch_size=16, every=1),
            trainer=replace(config.trainer, max_failed_rewards=0.3),
        )

    run = make_run(tmp_path, num_steps=3, change=of)
    run = replace(run, eval_tasks=run.tasks.batch(0), eval_reward=fails_then)
    with pytest.raises(
        RunFailed,
        match=r"evaluation.reward correct_answer failed on 2 of 4 tasks, more than trainer.max_failed_rewards \(0.3\)",
    ):
        train(run)
    assert [(row["failed"], row["correct"]) for row in rows(tmp_path, "evaluation")] == [(1, 3), (2, 2)]
    out = capsys.readouterr().out
    assert "warning: reward of the evaluation returned nan for completion" in out and "; the reward failed on 1)" in out
    assert (tmp_path / "checkpoints" / "step-000001").exists()


def not_finite(at):
    """A loss that is nan in the steps `at`."""
    calls = [0]

    def loss(logprobs, old_logprobs, advantages, completion_mask):
        calls[0] += 1
        bad = torch.nan if calls[0] - 1 in at else 0.0
        return PolicyLoss(-advantages * (logprobs - old_logprobs).exp() + bad * logprobs, {})

    return loss


def test_a_step_that_is_not_finite_changes_nothing_and_is_kept(tmp_path):
    run = make_run(tmp_path, num_steps=4, tokens_per_micro_batch=10_000)
    run = with_objective(run, loss_fn=not_finite([1]), learns_from_ties=True)
    train(run)
    table = rows(tmp_path)
    assert [row["skipped"] for row in table] == [0, 1, 0, 0] and table[1]["loss"] is None
    norms = [row["adapter_norm"] for row in table]
    assert norms[0] == norms[1] != norms[2]
    kept = load_file(tmp_path / "incidents" / "step-000001-rank-0.safetensors")
    assert kept["completion_ids"].shape[0] == kept["advantages"].shape[0] == 32
    told = json.loads((tmp_path / "incidents" / "step-000001-rank-0.json").read_text())
    assert told["tasks"] == [0, 1, 2, 3] and told["step"] == 1 and len(list((tmp_path / "incidents").iterdir())) == 2


def test_too_many_steps_that_are_not_finite_end_the_run_as_it_was_before(tmp_path):
    run = make_run(tmp_path, num_steps=9, tokens_per_micro_batch=10_000, max_skipped_steps=3)
    run = with_objective(run, loss_fn=not_finite([1, 2, 4, 5, 6]), learns_from_ties=True)
    with pytest.raises(RunFailed, match="not finite in 3 steps in a row, from step 5 on"):
        train(run)
    assert len(rows(tmp_path)) == 7
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    meta = json.loads((checkpoint / "meta.json").read_text())
    assert checkpoint.name == "step-000004" and meta["next_step"] == 4
