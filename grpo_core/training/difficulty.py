"""Note which completions of a step were right, and update the curriculum."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo_core.batch import Task
from grpo_core.config.sections import RunConfig
from grpo_core.data.pass_rates import PassRates
from grpo_core.monitor.aggregates import Stats
from grpo_core.scoring.scoring import Scores
from grpo_core.scoring.sources import select_source
from grpo_core.training.run import Run


def make_pass_rates(config: RunConfig, tasks: Sequence[Task]) -> PassRates | None:
    """Return the pass rates before the first step, or None if no training reward says which completions are right."""
    parts = [config.of_source(name) for name in config.source_names]
    is_measured = any(reward.name == part.evaluation.reward for part in parts for reward in part.rewards)
    return PassRates(tasks) if is_measured else None


def note_outcomes(run: Run, tasks: Sequence[Task], scores: Scores) -> None:
    """Note the groups of this rank: a completion is right if evaluation.reward is 1.0, as in the evaluation."""
    if run.pass_rates is None:
        return
    values = torch.full_like(scores.rewards, torch.nan)  # [N, G]
    for source in dict.fromkeys(task.source for task in tasks):
        reward = run.config.of_source(source).evaluation.reward
        measured = scores.by_name.get(run.config.label_reward(reward))
        if measured is not None:
            values = torch.where(select_source(values, tasks, source), measured, values)
    passed, judged = (values == 1.0).sum(dim=1), (~values.isnan()).sum(dim=1)
    run.pass_rates.note(tasks, passed.tolist(), judged.tolist())


def update_curriculum(run: Run, step: int, stats: Stats) -> None:
    """Add the step's outcomes on all ranks to the pass rates, and move the curriculum on. A collective."""
    if run.pass_rates is None:
        return
    visits = run.pass_rates.end_step()
    run.tasks.end_step(step, visits)
    if run.config.data.curriculum.is_on:
        share = 1.0 - run.tasks.count_awake() / len(run.tasks.tasks)
        stats.add_max("resting_prompts", torch.tensor(share, device="cpu"))
