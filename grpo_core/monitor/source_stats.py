"""The metrics of each of several sources: source/NAME/reward and so on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo_core.batch import Rollouts, Task
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.advantages import tied_groups
from grpo_core.scoring.scoring import Scores
from grpo_core.scoring.sources import select_source


def add_source_stats(
    stats: Stats, sources: Sequence[str], tasks: Sequence[Task], rollouts: Rollouts, scores: Scores
) -> None:
    """Add the metrics of every named source; they are means over nothing if the step has none of its prompts."""
    shape = scores.rewards.shape  # [N, G]
    lengths, truncated = (values.view(shape).cpu() for values in (rollouts.lengths(), rollouts.truncated))
    tied = tied_groups(scores.rewards)
    for source in filter(None, sources):
        mask = select_source(scores.rewards, tasks, source)
        stats.add_mean(f"source/{source}/prompts", mask[:, 0], torch.ones(len(tasks), dtype=torch.bool))
        stats.add_mean(f"source/{source}/reward", scores.rewards, mask & ~scores.rewards.isnan())
        stats.add_mean(f"source/{source}/tied_groups", tied, mask[:, 0])
        stats.add_mean(f"source/{source}/length", lengths, mask)
        stats.add_mean(f"source/{source}/truncated", truncated, mask)
