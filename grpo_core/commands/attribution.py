"""Attribute a batch's gradient to its tokens: dL/dl of every token, and the share and the pull of classes of tokens.

The loss L reads the weights through what `policy.forward` says of every token: its log-prob l (and its entropy or its
divergence, where the objective has them). The part g_c of the gradient g that comes through the tokens of a class c is
sum_{t in c} dL/dl_t grad l_t, so the parts of a partition add up to g, also where a token's loss reads the whole
completion. All gradients are in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_core.batch import TrainBatch, take
from grpo_core.model.packing import Budget, Packing
from grpo_core.model.policy import Policy, TokenStats
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.objective import Objective
from grpo_core.objective.token_weights import Totals, token_weights
from grpo_core.training.control import Control
from grpo_core.training.update import count_over_ranks, forward_with_gradient, micro_loss, rows_to_train, token_loss

Classes = dict[str, dict[str, Tensor]]  # partition -> class -> [B, C] bool


@dataclass(frozen=True)
class Attribution:
    """A batch's loss and gradient, and every token's part in them."""

    loss: float
    gradient: list[Tensor]  # of policy.parameters()
    logprobs: Tensor  # [B, C]
    token_loss: Tensor  # [B, C] averaged: they add up to the loss, but for an entropy bonus
    weight: Tensor  # [B, C] dL/dl
    surrogate_weight: Tensor  # [B, C] that of the surrogate alone, without the KL and the entropy bonus

    def norm(self) -> float:
        """L2 norm of the gradient."""
        return dot(self.gradient, self.gradient) ** 0.5


def attribute(policy: Policy, objective: Objective, budget: Budget, batch: TrainBatch, control: Control) -> Attribution:
    """The loss of `batch` as one minibatch, its gradient, and the tokens' parts."""
    gradient = [torch.zeros_like(p, dtype=torch.float32) for p in policy.parameters()]
    logprobs, each, weight, surrogate = (torch.zeros_like(batch.rollouts.rollout_logprobs) for _ in range(4))
    total = 0.0
    for packing, micro, tokens, loss, totals in _micro_batches(policy, objective, budget, batch, control):
        total += float(loss.detach())
        values = _token_losses(objective, micro, tokens, totals, control)
        alone = _token_losses(objective, micro, tokens, totals, replace(control, kl_coef=0.0)).sum()
        rows = packing.rows
        logprobs.index_copy_(0, rows, tokens.logprobs.detach())
        each.index_copy_(0, rows, values.detach())
        surrogate.index_copy_(0, rows, torch.autograd.grad(alone, tokens.logprobs, retain_graph=True)[0])
        weight.index_copy_(0, rows, torch.autograd.grad(loss, tokens.logprobs, retain_graph=True)[0])
        parts = torch.autograd.grad(loss, policy.parameters(), allow_unused=True)
        for whole, part in zip(gradient, parts, strict=True):
            if part is not None:
                whole.add_(part)
    return Attribution(total, gradient, logprobs, each, weight, surrogate)


def pulls(
    policy: Policy,
    objective: Objective,
    budget: Budget,
    batch: TrainBatch,
    control: Control,
    gradient: list[Tensor],
    classes: Classes,
) -> dict:
    """<g_c, g> / |g|^2 by partition and class: 1 in all over a partition of the trained tokens. None where g is 0."""
    square = dot(gradient, gradient)
    found = {name: dict.fromkeys(masks, 0.0) for name, masks in classes.items()}
    for packing, _, tokens, loss, _ in _micro_batches(policy, objective, budget, batch, control):
        outputs = [x for x in (tokens.logprobs, tokens.entropy, tokens.divergence) if x is not None and x.requires_grad]
        slopes = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
        used = [(output, slope) for output, slope in zip(outputs, slopes, strict=True) if slope is not None]
        for name, masks in classes.items():
            for label, mask in masks.items():
                chosen = mask[packing.rows]
                given = [slope * chosen for _, slope in used]
                if any(x.any() for x in given):
                    part = torch.autograd.grad(
                        [output for output, _ in used],
                        policy.parameters(),
                        given,
                        retain_graph=True,
                        allow_unused=True,
                    )
                    found[name][label] += dot(part, gradient)
    return {
        name: {label: value / square if square else None for label, value in labels.items()}
        for name, labels in found.items()
    }


def shares(attribution: Attribution, classes: Classes) -> dict:
    """The share of sum |dL/dl| by partition and class; None where that is 0."""
    size = attribution.weight.abs().double()
    whole = float(size.sum())
    return {
        name: {label: float(size[mask].sum()) / whole if whole else None for label, mask in masks.items()}
        for name, masks in classes.items()
    }


def classify(batch: TrainBatch, attribution: Attribution) -> Classes:
    """Four partitions of the trained tokens: sign of A, length of the completion, clipped or kept, end or not.

    A token is clipped where the surrogate's dL/dl is 0 and A is not; other bounds that take its gradient count too
    (loss.off_policy_mask, a masking rollout correction). What loss.top_entropy leaves out is a class of its own.
    """
    mask, column, lengths = batch.loss_mask, batch.advantages, batch.rollouts.lengths()
    acting = torch.ones_like(mask) if batch.surrogate_mask is None else batch.surrogate_mask
    pulled, signal = attribution.surrogate_weight != 0, acting & (column != 0)
    partitions = {
        "advantage": {"A > 0": column > 0, "A < 0": column < 0, "A = 0": column == 0},
        "length": _deciles(lengths[mask.any(dim=1)], lengths[:, None]),
        "clip": {
            "kept": pulled & signal,
            "clipped": ~pulled & signal,
            "A = 0": acting & (column == 0),
            "entropy too low": ~acting,
        },
        "end": {"end of sequence": (end := _ends(batch)), "other tokens": ~end},
    }
    found = {
        name: {label: mask & chosen for label, chosen in labels.items() if (mask & chosen).any()}
        for name, labels in partitions.items()
    }
    return found


def dot(one: list[Tensor | None], other: list[Tensor]) -> float:
    """<one, other> over all weights, added up in float64."""
    pairs = zip(one, other, strict=True)
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs if a is not None)


def _micro_batches(
    policy: Policy, objective: Objective, budget: Budget, batch: TrainBatch, control: Control
) -> Iterator[tuple[Packing, TrainBatch, TokenStats, Tensor, Totals]]:
    """The forwards that the batch divides into, as the trainer's update has them, with their parts of the loss."""
    plan = policy.plan(batch.rollouts, budget, rows_to_train(objective, batch, control))
    totals = count_over_ranks(objective, batch, len(plan))
    for packing in plan:
        micro = take(batch, packing.rows)
        tokens = forward_with_gradient(policy, objective, micro.rollouts, packing, control)
        yield packing, micro, tokens, micro_loss(objective, micro, tokens, totals, control, Stats()), totals


def _token_losses(
    objective: Objective, micro: TrainBatch, tokens: TokenStats, totals: Totals, control: Control
) -> Tensor:
    old_logprobs = tokens.logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
    values = token_loss(objective, micro, tokens, old_logprobs, control, Stats())
    return values * token_weights(micro.loss_mask, average=objective.average, totals=totals, dtype=values.dtype)


def _deciles(trained: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Classes of `lengths` [B, 1] between the deciles of `trained` [n]; equal lengths are in the same one."""
    if not len(trained):
        return {}
    ordered = trained.sort().values
    edges = sorted({int(ordered[(i * len(ordered) + 9) // 10 - 1]) for i in range(1, 11)})  # the longest of each
    found, below = {}, int(ordered[0]) - 1
    for edge in edges:
        label = f"{edge} tokens" if edge == below + 1 else f"{below + 1} to {edge} tokens"
        found[label], below = (lengths > below) & (lengths <= edge), edge
    return found


def _ends(batch: TrainBatch) -> Tensor:
    """The end-of-sequence tokens that the policy chose, [B, C] bool."""
    rollouts = batch.rollouts
    last = (
        torch.arange(rollouts.completion_ids.shape[1], device=rollouts.truncated.device)
        == rollouts.lengths()[:, None] - 1
    )
    return last & ~rollouts.truncated[:, None]
