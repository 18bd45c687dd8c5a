"""Measure the accuracy on held-out tasks, with a confidence interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from grpo_core.batch import SamplingParams, Task
from grpo_core.counts import quantify
from grpo_core.data.eval_sets import group_by_set
from grpo_core.distributed import ranks
from grpo_core.environments.setup import Environments, sample_turns
from grpo_core.monitor.completion_rows import completion_rows, make_turn_columns
from grpo_core.monitor.progress import progress_bar
from grpo_core.random_keys import Key, make_key
from grpo_core.report.eval_sets import merge_sets
from grpo_core.sampling.sampler import Sampler
from grpo_core.scoring.scoring import Reward, RunningReward, score
from grpo_core.training.eval_statistics import wilson_interval
from grpo_core.training.run import Run

GREEDY = SamplingParams(greedy=True)
REWARD_NAME = "of the evaluation"  # completes "reward ..." in the warning about a failure


def evaluate(
    sampler: Sampler,
    tasks: Sequence[Task],
    reward: Callable | RunningReward,
    *,
    batch_size: int,
    settings: SamplingParams = GREEDY,
    num_rows: int = 0,
    environments: Environments | None = None,
    warn: Callable[[Sequence[str]], object] = list,  # receives the reasons why the reward failed; called on every rank
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Sample one completion per task and measure the accuracy over all ranks; a reward of 1.0 counts as correct.

    Return a mapping with accuracy, correct, n, ci_low, ci_high (Wilson, 95 %), failed, the number of tasks on which the
    reward failed, and with environments environment_failed, the number on which they failed; and, on the main rank, one
    row per completion of the first `num_rows` tasks. A task that cannot be scored counts as wrong. Unless sampling is
    greedy, the mapping also holds the sampling settings, and the noise of a task depends only on its key and row.
    """
    indexed = [(i, replace(task, seed=_make_task_key(task))) for i, task in enumerate(tasks)]
    mine = sorted(indexed[ranks.rank() :: ranks.world_size()], key=lambda pair: len(pair[1].prompt_ids))
    counts = torch.zeros(3, device="cpu")  # correct, failed, failed environments
    failures, rows = [], []
    name = tasks[0].eval_set if tasks else ""
    with progress_bar(len(tasks), f"evaluating{f' {name}' if name else ''}", "task") as progress:
        for start in range(0, len(mine), batch_size):
            indices, part = zip(*mine[start : start + batch_size], strict=True)
            rollouts, turns = sample_turns(sampler, environments, part, 1, settings=settings)
            scores = score([Reward(REWARD_NAME, 1.0, reward)], part, rollouts.completions, 1)
            failures += [*scores.failures, *(environments.list_problems(turns) if environments else ())]
            correct = scores.rewards.flatten() == 1.0
            broken = torch.tensor(sum(played.failure is not None for played in turns))
            counts += torch.stack([correct.sum(), scores.failed[REWARD_NAME].sum(), broken])
            columns = {"correct": correct.tolist(), **make_turn_columns(turns)}
            part_rows = completion_rows(part, rollouts, columns, first_sample=None)
            rows += [(i, row) for i, row in zip(indices, part_rows, strict=True) if i < num_rows]
            seen = min(start + batch_size, len(mine))
            progress.update(len(tasks) * seen // len(mine) - progress.count)  # as if the other ranks were as fast
    warn(failures)
    right, failed, num_broken = map(int, ranks.all_sum(counts).tolist())
    all_rows = sorted((row for part in ranks.gather(rows) for row in part), key=lambda pair: pair[0])
    result = _summarise(right, failed, len(tasks), settings)
    if environments is not None:
        result["environment_failed"] = num_broken
    return result, [row for _, row in all_rows]


def _summarise(right: int, failed: int, count: int, settings: SamplingParams) -> dict[str, float]:
    low, high = wilson_interval(right, count)
    sampling = {}
    if not settings.greedy:
        sampling = {k: v for k, v in asdict(settings).items() if v is not None and k != "greedy"}
    numbers = {"accuracy": right / count, "correct": right, "n": count, "ci_low": low, "ci_high": high}
    return {**numbers, "failed": failed, **sampling}


def _make_task_key(task: Task) -> Key:
    own = (task.eval_set,) if task.eval_set else ()
    return make_key("evaluation", *task.seed, *own, task.index)


def evaluate_now(run: Run, steps_taken: int) -> str | None:
    """Evaluate every set of held-out tasks and log the results; return a sentence if the reward failed too often."""
    if not run.eval_tasks:
        return None
    config, limit = run.config.evaluation, run.config.trainer.max_failed_rewards
    settings = SamplingParams(
        config.temperature or 1.0, not config.temperature, config.top_k, config.top_p, config.min_p
    )
    results, rows = {}, []
    with run.log.phase("evaluate"):
        for name, tasks in group_by_set(run.eval_tasks).items():
            results[name], set_rows = evaluate(
                run.sampler,
                tasks,
                run.eval_rewards.get(name, run.eval_reward),
                batch_size=config.batch_size,
                settings=settings,
                num_rows=run.config.log.evaluation_completions,
                environments=run.environments,
                warn=run.log.warn,
            )
            results[name] |= run.held_out(tasks)
            rows += [{"set": name, **row} if name else row for row in set_rows]
    run.log.log_evaluation(steps_taken, merge_sets(results), rows)
    for name, result in results.items():
        if result["failed"] > limit * result["n"]:
            reward = run.config.of_source(name).evaluation.reward
            return (
                f"evaluation.reward {reward} failed on {result['failed']:,} of {quantify(result['n'], 'task')}"
                f"{f' of the set {name}' if name else ''}, more than trainer.max_failed_rewards ({limit:g}) allows"
            )
    accuracy = results[run.config.selecting_set]["accuracy"]
    run.selection.record(steps_taken, accuracy, run.config.trainer.early_stopping_delta)
    return None
