"""Compute masks, old and reference log-probs: everything the loss compares with, before a step's first gradient."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.batch import Frozen, Rollouts, random_order, take
from grpo_core.distributed import ranks
from grpo_core.model.memory import retry_in_halves
from grpo_core.model.packing import Budget, Packing
from grpo_core.model.policy import Policy
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.corrections import quantile
from grpo_core.objective.kl import kl_exact
from grpo_core.objective.objective import Objective
from grpo_core.random_keys import make_key, torch_seed
from grpo_core.training.run import Run

EQUAL_ENTROPY = 1e-5  # nats: tokens after the same prefix differ by rounding alone, and are kept or left out together
EXACT_KL_ROWS = 8  # completions of each rank at which the exact KL is measured


@torch.no_grad()
def freeze(
    policy: Policy, objective: Objective, budget: Budget, rollouts: Rollouts, trained: Tensor | None = None
) -> Frozen:
    """Return the rollouts with their masks and log-probs; `trained` [N, G] bool are the completions to train (all).

    Old log-probs cost a forward only where several optimizer steps share the batch: with one, the ratio is 1. Reference
    log-probs cost one only where the loss has a KL that reads them.
    """
    rollouts = replace(rollouts, completions=())  # the loss reads no text
    mask = rollouts.completion_mask
    if trained is not None:
        mask = mask & trained.reshape(-1, 1).to(mask.device)
    reused = objective.steps_per_batch > 1
    old_logprobs = surrogate_mask = ref_logprobs = None
    if reused or objective.top_entropy < 1:
        old_logprobs, entropy = forward_all(policy, budget, rollouts)
        if objective.top_entropy < 1:
            surrogate_mask = top_entropy_mask(entropy, mask, objective.top_entropy)
    if objective.has_kl and objective.kl_in == "loss" and not objective.kl_needs_vocabulary:
        with policy.reference():
            ref_logprobs, _ = forward_all(policy, budget, rollouts)
    return Frozen(rollouts, mask, surrogate_mask, old_logprobs if reused else None, ref_logprobs)


def forward_all(policy: Policy, budget: Budget, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies of all completion tokens, [B, C] each, in forwards of at most `budget`."""
    logprobs, entropy = (torch.zeros_like(rollouts.rollout_logprobs) for _ in range(2))

    def forward(packing: Packing) -> None:
        part = policy.forward(take(rollouts, packing.rows), packing)
        logprobs.index_copy_(0, packing.rows, part.logprobs)
        entropy.index_copy_(0, packing.rows, part.entropy)

    for packing in policy.plan(rollouts, budget):
        retry_in_halves(policy, rollouts, packing, forward)
    return logprobs, entropy


def top_entropy_mask(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """Return the `share` of the step's tokens, over all ranks, whose entropy is highest, [B, C] bool. arXiv:2506.01939.

    A collective.
    """
    everywhere = ranks.all_rows(entropy[mask].float())
    if len(everywhere) == 0:
        return mask
    return mask & (entropy >= quantile(everywhere, 1 - share) - EQUAL_ENTROPY)


@torch.no_grad()
def measure_exact_kl(run: Run, rollouts: Rollouts, step: int, stats: Stats) -> None:
    """Add `kl_exact`, the KL from the reference over the whole vocabulary, where `log.exact_kl_every` asks for it.

    It is a mean over `log.exact_kl_tokens` tokens of a few completions of each rank.
    """
    settings = run.config.log
    if not settings.exact_kl_every or step % settings.exact_kl_every:
        return
    generator = torch.Generator("cpu").manual_seed(torch_seed(make_key("exact_kl", run.config.seed, step)))
    rows = take(replace(rollouts, completions=()), random_order(len(rollouts), generator)[:EXACT_KL_ROWS])
    places = rows.completion_mask.nonzero()
    drawn = places[random_order(len(places), generator)[: settings.exact_kl_tokens].to(places.device)]
    measured = torch.zeros_like(rows.completion_mask)
    measured[drawn.unbind(dim=1)] = True
    for packing in run.policy.plan(rows, run.budgets.forward):
        kl = run.policy.divergence(take(rows, packing.rows), packing, kl_exact, measured[packing.rows])
        stats.add_mean("kl_exact", kl)
