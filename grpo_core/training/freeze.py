"""Compute masks, old and reference log-probs: everything the loss compares with, before a step's first gradient."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.batch import Frozen, Rollouts, random_order, take
from grpo_core.distributed import ranks
from grpo_core.model.memory import retry_in_halves
from grpo_core.model.packing import Budget, Packing
from grpo_core.model.policy import Policy, TokenStats
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.corrections import quantile
from grpo_core.objective.kl import kl_exact
from grpo_core.objective.objective import Objective
from grpo_core.random_keys import make_key, torch_seed
from grpo_core.training.run import Run

OF_THE_POLICY = {"logprobs", "entropy", "sum_p_squared"}  # statistics of a forward of the policy
EQUAL_ENTROPY = 1e-5  # nats: tokens after the same prefix differ by rounding alone, and are kept or left out together
EXACT_KL_ROWS = 8  # completions of each rank at which the exact KL is measured


@torch.no_grad()
def freeze(
    policy: Policy, objective: Objective, budget: Budget, rollouts: Rollouts, trained: Tensor | None = None
) -> Frozen:
    """Return the rollouts with masks and log-probs; `trained` [N, G] bool masks the completions to train (all).

    Old log-probs cost a forward only where several optimizer steps share the batch (with one, the ratio is 1), where
    the advantages or a teacher's log-probs need the policy's, or where a mask or weight depends on other rows.
    Reference log-probs cost a forward only where something reads them.
    """
    rollouts = replace(rollouts, completions=())  # the loss reads no text
    mask = rollouts.completion_mask
    if trained is not None:
        mask = mask & trained.reshape(-1, 1).to(mask.device)
    reused = objective.steps_per_batch > 1
    own = surrogate_mask = ref_logprobs = None
    needs_logprobs = (
        objective.needs_cross_row_masks or objective.needs_teacher or "rollout_weights" in objective.advantage_needs
    )
    asked = OF_THE_POLICY & (objective.advantage_needs | ({"logprobs"} if needs_logprobs else set()))
    if reused or objective.top_entropy < 1 or asked:
        own = forward_all(policy, budget, rollouts)
        if objective.top_entropy < 1:
            surrogate_mask = top_entropy_mask(own.entropy, mask, objective.top_entropy)
    if objective.needs_reference:
        with policy.reference():
            ref_logprobs = forward_all(policy, budget, rollouts).logprobs
    old_logprobs = own.logprobs if own is not None and reused else None
    before = {name: getattr(own, name) for name in asked}
    if old_logprobs is not None and own is not None:
        before["routing_mismatch"] = own.routing_mismatch
    return Frozen(rollouts, mask, surrogate_mask, old_logprobs, ref_logprobs, **before)


def forward_all(policy: Policy, budget: Budget, rollouts: Rollouts) -> TokenStats:
    """Return the statistics of all completion tokens, [B, C] each, in forwards of at most `budget`."""
    names = OF_THE_POLICY | ({"routing_mismatch"} if policy.compares_routing(rollouts) else set())
    stats = TokenStats(**{name: torch.zeros_like(rollouts.rollout_logprobs) for name in names})

    def forward(packing: Packing) -> None:
        part = policy.forward(take(rollouts, packing.rows), packing)
        for name in names:
            getattr(stats, name).index_copy_(0, packing.rows, getattr(part, name))

    for packing in policy.plan(rollouts, budget):
        retry_in_halves(policy, rollouts, packing, forward)
    return stats


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
