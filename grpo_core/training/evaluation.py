"""Accuracy on held-out tasks, with its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from grpo_core.batch import SamplingParams, Task
from grpo_core.distributed import ranks
from grpo_core.monitor.completion_rows import completion_rows
from grpo_core.monitor.progress import progress_bar
from grpo_core.sampling.sampler import Sampler
from grpo_core.scoring.reward_worker import RewardWorker
from grpo_core.scoring.scoring import Reward, score
from grpo_core.training.eval_statistics import wilson_interval
from grpo_core.training.run import Run

STREAM = 0x6576616C  # keeps the noise of evaluation apart from that of training
GREEDY = SamplingParams(greedy=True)
CORRECT = "of the evaluation"  # its name in a failure's sentence


def evaluate(
    sampler: Sampler,
    tasks: Sequence[Task],
    reward: Callable | RewardWorker,
    *,
    batch_size: int,
    settings: SamplingParams = GREEDY,
    shown: int = 0,
    warn: Callable[[Sequence[str]], object] = list,  # told why the reward failed; called on every rank
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Accuracy of one completion a task over all ranks: it is correct where `reward` gives 1.0.

    Returns accuracy, correct, n, ci_low, ci_high (Wilson, 95 %) and failed, the tasks that the reward failed on; and on
    the main rank a row for each of the first `shown` tasks with its completion. Tasks that cannot be scored count as
    wrong. Where it is not greedy, a task's noise depends on its own seed and row, and the settings are returned too.
    """
    placed = [(i, replace(task, seed=(*task.seed, task.index, STREAM))) for i, task in enumerate(tasks)]
    mine = sorted(placed[ranks.rank() :: ranks.world_size()], key=lambda task: len(task[1].prompt_ids))
    counts, failures, rows = torch.zeros(2), [], []  # correct, failed
    with progress_bar(len(mine), "evaluating", "task") as progress:
        for start in range(0, len(mine), batch_size):
            places, part = zip(*mine[start : start + batch_size], strict=True)
            rollouts = sampler.generate(part, 1, settings=settings)
            scores = score([Reward(CORRECT, 1.0, reward)], part, rollouts.completions, 1)
            failures += scores.failures
            correct = scores.rewards.flatten() == 1.0
            counts += torch.stack([correct.sum(), scores.failed[CORRECT].sum()])
            part_rows = completion_rows(part, rollouts, {"correct": correct.tolist()}, first_sample=None)
            rows += [(i, row) for i, row in zip(places, part_rows, strict=True) if i < shown]
            progress.update(len(part))
    warn(failures)
    right, failed = map(int, ranks.all_sum(counts).tolist())
    low, high = wilson_interval(right, len(tasks))
    how = {} if settings.greedy else {k: v for k, v in asdict(settings).items() if v is not None and k != "greedy"}
    interval = {"ci_low": low, "ci_high": high}
    result = {"accuracy": right / len(tasks), "correct": right, "n": len(tasks), **interval, "failed": failed, **how}
    everywhere = sorted((row for part in ranks.gather(rows) for row in part), key=lambda row: row[0])
    return result, [row for _, row in everywhere]


def evaluate_now(run: Run, steps_taken: int) -> str | None:
    """Accuracy on the held-out tasks, into the log; a sentence if its reward failed on too many."""
    if not run.eval_tasks:
        return None
    chosen, limit = run.config.evaluation, run.config.trainer.max_failed_rewards
    settings = SamplingParams(
        chosen.temperature or 1.0, not chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p
    )
    given = {"batch_size": chosen.batch_size, "settings": settings, "warn": run.log.warn}
    given["shown"] = run.config.log.evaluation_completions
    with run.log.phase("evaluate"):
        result, shown = evaluate(run.sampler, run.eval_tasks, run.eval_reward, **given)
        result |= run.held_out()
    run.log.log_evaluation(steps_taken, result, shown)
    if result["failed"] <= limit * result["n"]:
        return None
    return (
        f"evaluation.reward {chosen.reward} failed on {result['failed']} of {result['n']} tasks, "
        f"more than trainer.max_failed_rewards ({limit:g}) allows"
    )
