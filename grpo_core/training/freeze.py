"""Everything the loss compares against, computed once, before the first gradient of a step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.batch import Rollouts, TrainBatch, take
from grpo_core.distributed import ranks
from grpo_core.model.memory import retry_in_halves
from grpo_core.model.packing import Packing
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.corrections import quantile
from grpo_core.objective.kl import kl_exact
from grpo_core.registry import get_fact
from grpo_core.training.run import Run

EQUAL_ENTROPY = 1e-5  # nats: tokens after the same prefix differ by rounding alone, and stay together
EXACT_KL_ROWS = 8  # of each rank


@torch.no_grad()
def freeze(run: Run, rollouts: Rollouts, advantages: Tensor, trained: Tensor | None = None) -> TrainBatch:
    """Everything the loss compares against, computed once, before the first gradient. `trained` [N, G] bool: all.

    Old log-probs cost a forward only where the batch is used more than once; a batch that is used once has ratio 1.
    """
    config, trainer = run.config.loss, run.config.trainer
    rollouts = replace(rollouts, completions=())  # the loss reads no text
    device, mask = rollouts.completion_ids.device, rollouts.completion_mask
    if trained is not None:
        mask = mask & trained.reshape(-1, 1).to(device)
    several = trainer.num_minibatches * trainer.num_passes > 1
    old_logprobs = surrogate_mask = ref_logprobs = None
    if several or config.top_entropy < 1:
        old_logprobs, entropy = forward_all(run, rollouts)
        surrogate_mask = top_entropy_mask(entropy, mask, config.top_entropy) if config.top_entropy < 1 else None
    if config.kl_coef > 0 and config.kl_in == "loss" and not get_fact(run.kl_fn, "full_vocabulary"):
        with run.policy.reference():
            ref_logprobs, _ = forward_all(run, rollouts)
    column = advantages.reshape(-1, 1).to(device)
    return TrainBatch(rollouts, column, mask, surrogate_mask, old_logprobs if several else None, ref_logprobs)


def forward_all(run: Run, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [B, C], as many tokens at once as fit."""
    logprobs, entropy = (torch.zeros_like(rollouts.rollout_logprobs) for _ in range(2))

    def forward(packing: Packing) -> None:
        part = run.policy.forward(take(rollouts, packing.rows), packing)
        logprobs.index_copy_(0, packing.rows, part.logprobs)
        entropy.index_copy_(0, packing.rows, part.entropy)

    for packing in run.policy.plan(rollouts, run.budgets.forward):
        retry_in_halves(run.policy, rollouts, packing, forward)
    return logprobs, entropy


def top_entropy_mask(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """The `share` of the step's tokens, over all ranks, whose entropy is highest, [B, C] bool. arXiv:2506.01939.

    A collective.
    """
    everywhere = ranks.all_rows(entropy[mask].float())
    if len(everywhere) == 0:
        return mask
    return mask & (entropy >= quantile(everywhere, 1 - share) - EQUAL_ENTROPY)


@torch.no_grad()
def measure_exact_kl(run: Run, rollouts: Rollouts, step: int, stats: Stats) -> None:
    """The KL from the reference over the whole vocabulary, at a sample of tokens of few rows, as kl_exact."""
    draw = torch.Generator().manual_seed(run.config.seed * 1_000_003 + step)
    rows = take(replace(rollouts, completions=()), torch.randperm(len(rollouts), generator=draw)[:EXACT_KL_ROWS])
    places = rows.completion_mask.nonzero()
    chosen = places[torch.randperm(len(places), generator=draw)[: run.config.log.exact_kl_tokens].to(places.device)]
    keep = torch.zeros_like(rows.completion_mask)
    keep[chosen.unbind(dim=1)] = True
    for packing in run.policy.plan(rows, run.budgets.forward):
        stats.add_mean(
            "kl_exact", run.policy.divergence(take(rows, packing.rows), packing, kl_exact, keep[packing.rows])
        )
