"""Accuracy on held-out tasks, with its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch

from grpo_core import distributed
from grpo_core.batch import Task
from grpo_core.draw import Decoding
from grpo_core.estimates import wilson_interval
from grpo_core.progress import bar
from grpo_core.reward_worker import Worker
from grpo_core.sampler import Sampler
from grpo_core.scoring import Reward, score

STREAM = 0x6576616C  # keeps the noise of evaluation apart from that of training
GREEDY = Decoding(greedy=True)
CORRECT = "of the evaluation"  # its name in a failure's sentence


def evaluate(
    sampler: Sampler,
    tasks: Sequence[Task],
    reward: Callable | Worker,
    *,
    batch_size: int,
    settings: Decoding = GREEDY,
    warn: Callable[[Sequence[str]], object] = list,  # told why the reward failed; called on every rank
) -> dict[str, float]:
    """Accuracy of one completion a task over all ranks: it is correct where `reward` gives 1.0.

    Returns accuracy, correct, n, ci_low, ci_high (Wilson, 95 %) and failed, the tasks that the reward failed on. Tasks
    that cannot be scored count as wrong. Where it is not greedy, a task's noise depends on its own seed and row, and
    the settings are returned too.
    """
    tasks = [replace(task, seed=(*task.seed, task.index, STREAM)) for task in tasks]
    mine = sorted(tasks[distributed.rank() :: distributed.world_size()], key=lambda task: len(task.prompt_ids))
    counts, failures = torch.zeros(2), []  # correct, failed
    with bar(len(mine), "evaluating", "task") as shown:
        for start in range(0, len(mine), batch_size):
            part = mine[start : start + batch_size]
            rollouts = sampler.generate(part, 1, settings=settings)
            scores = score([Reward(CORRECT, 1.0, reward)], part, rollouts.completions, 1)
            failures += scores.failures
            counts += torch.stack([(scores.rewards == 1.0).sum(), scores.failed[CORRECT].sum()])
            shown.update(len(part))
    warn(failures)
    correct, failed = map(int, distributed.all_sum(counts).tolist())
    low, high = wilson_interval(correct, len(tasks))
    how = {} if settings.greedy else {k: v for k, v in asdict(settings).items() if v is not None and k != "greedy"}
    interval = {"ci_low": low, "ci_high": high}
    return {"accuracy": correct / len(tasks), "correct": correct, "n": len(tasks), **interval, "failed": failed, **how}
