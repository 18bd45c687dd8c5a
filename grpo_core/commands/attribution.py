"""Attribute a batch's gradient to its tokens: dL/dl of every token, and shares of classes of tokens.

The loss L depends on the weights through the outputs of `policy.forward`: the log-prob l of every token, and its
entropy and divergence if the objective uses them. The part of the gradient g that comes from the tokens of a class c is
g_c = sum_{t in c} dL/dl_t grad l_t. The parts of a partition add up to g, even if the loss of a token depends on the
whole completion. All gradients are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_core.batch import TrainBatch, take
from grpo_core.counts import quantify
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
    """The loss and the gradient of a batch, and the part of every token in them."""

    loss: float
    gradient: list[Tensor]  # of policy.parameters()
    logprobs: Tensor  # [B, C]
    token_loss: Tensor  # [B, C] times the token weight; sums to the loss without the entropy bonus
    weight: Tensor  # [B, C] dL/dl
    surrogate_weight: Tensor  # [B, C] dL/dl of the surrogate alone, without KL and entropy bonus

    def norm(self) -> float:
        """Return the L2 norm of the gradient."""
        return dot(self.gradient, self.gradient) ** 0.5


def compute_attribution(
    policy: Policy, objective: Objective, budget: Budget, batch: TrainBatch, control: Control
) -> Attribution:
    """Compute loss and gradient of `batch` as one minibatch, and the parts of its tokens."""
    gradient = [torch.zeros_like(p, dtype=torch.float32) for p in policy.parameters()]
    logprobs, token_loss, weight, surrogate_weight = (
        torch.zeros_like(batch.rollouts.rollout_logprobs) for _ in range(4)
    )
    batch_loss = 0.0
    for packing, micro, tokens, loss, totals in _yield_micro_batches(policy, objective, budget, batch, control):
        batch_loss += float(loss.detach())
        micro_token_loss = _weighted_token_loss(objective, micro, tokens, totals, control)
        surrogate = _weighted_token_loss(objective, micro, tokens, totals, replace(control, kl_coef=0.0)).sum()
        rows = packing.rows
        logprobs.index_copy_(0, rows, tokens.logprobs.detach())
        token_loss.index_copy_(0, rows, micro_token_loss.detach())
        surrogate_weight.index_copy_(0, rows, torch.autograd.grad(surrogate, tokens.logprobs, retain_graph=True)[0])
        weight.index_copy_(0, rows, torch.autograd.grad(loss, tokens.logprobs, retain_graph=True)[0])
        parts = torch.autograd.grad(loss, policy.parameters(), allow_unused=True)
        for total, part in zip(gradient, parts, strict=True):
            if part is not None:
                total.add_(part)
    return Attribution(batch_loss, gradient, logprobs, token_loss, weight, surrogate_weight)


def compute_gradient_shares(
    policy: Policy,
    objective: Objective,
    budget: Budget,
    batch: TrainBatch,
    control: Control,
    gradient: list[Tensor],
    classes: Classes,
) -> dict:
    """Compute the share of the gradient <g_c, g> / |g|^2 of every class, by partition and class; None if g is 0.

    The shares of a partition of the trained tokens sum to 1. A share may be below 0 or above 1.
    """
    square = dot(gradient, gradient)
    products = {name: dict.fromkeys(masks, 0.0) for name, masks in classes.items()}
    for packing, _, tokens, loss, _ in _yield_micro_batches(policy, objective, budget, batch, control):
        outputs = [x for x in (tokens.logprobs, tokens.entropy, tokens.divergence) if x is not None and x.requires_grad]
        slopes = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
        outputs = [output for output, slope in zip(outputs, slopes, strict=True) if slope is not None]
        slopes = [slope for slope in slopes if slope is not None]
        for name, masks in classes.items():
            for label, mask in masks.items():
                class_slopes = [slope * mask[packing.rows] for slope in slopes]
                if any(slope.any() for slope in class_slopes):
                    part = torch.autograd.grad(
                        outputs, policy.parameters(), class_slopes, retain_graph=True, allow_unused=True
                    )
                    products[name][label] += dot(part, gradient)
    return {
        name: {label: value / square if square else None for label, value in labels.items()}
        for name, labels in products.items()
    }


def compute_weight_shares(attribution: Attribution, classes: Classes) -> dict:
    """Compute the share of every class in sum |dL/dl|, by partition and class; None if the sum is 0."""
    size = attribution.weight.abs().double()
    total = float(size.sum())
    return {
        name: {label: float(size[mask].sum()) / total if total else None for label, mask in masks.items()}
        for name, masks in classes.items()
    }


def classify_tokens(batch: TrainBatch, attribution: Attribution) -> Classes:
    """Return four partitions of the trained tokens, without empty classes.

    They are by the sign of the advantage, the length of the completion, clipped or kept, and end of sequence or not.
    A token is clipped if A is not 0 and the surrogate's dL/dl is 0, whether by the loss, loss.off_policy_mask or a
    rollout correction that masks. Tokens that loss.top_entropy leaves out are a class of their own.
    """
    mask, advantages, lengths = batch.loss_mask, batch.advantages, batch.rollouts.lengths()
    in_surrogate = torch.ones_like(mask) if batch.surrogate_mask is None else batch.surrogate_mask
    has_gradient, has_signal = attribution.surrogate_weight != 0, in_surrogate & (advantages != 0)
    is_end = _find_end_tokens(batch)
    partitions = {
        "advantage": {"A > 0": advantages > 0, "A < 0": advantages < 0, "A = 0": advantages == 0},
        "length": _split_at_deciles(lengths[mask.any(dim=1)], lengths[:, None]),
        "clip": {
            "kept": has_gradient & has_signal,
            "clipped": ~has_gradient & has_signal,
            "A = 0": in_surrogate & (advantages == 0),
            "entropy too low": ~in_surrogate,
        },
        "end": {"end of sequence": is_end, "other tokens": ~is_end},
    }
    return {
        name: {label: mask & tokens for label, tokens in labels.items() if (mask & tokens).any()}
        for name, labels in partitions.items()
    }


def dot(left: list[Tensor | None], right: list[Tensor]) -> float:
    """Return the inner product of two gradients over all parameters, summed in float64. None counts as 0."""
    pairs = zip(left, right, strict=True)
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs if a is not None)


def _yield_micro_batches(
    policy: Policy, objective: Objective, budget: Budget, batch: TrainBatch, control: Control
) -> Iterator[tuple[Packing, TrainBatch, TokenStats, Tensor, Totals]]:
    """Yield the micro-batches of the batch, as in the training update, with their outputs and parts of the loss."""
    plan = policy.plan(batch.rollouts, budget, rows_to_train(objective, batch, control))
    totals = count_over_ranks(objective, batch, len(plan))
    for packing in plan:
        micro = take(batch, packing.rows)
        tokens = forward_with_gradient(policy, objective, micro.rollouts, packing, control)
        yield packing, micro, tokens, micro_loss(objective, micro, tokens, totals, control, Stats()), totals


def _weighted_token_loss(
    objective: Objective, micro: TrainBatch, tokens: TokenStats, totals: Totals, control: Control
) -> Tensor:
    """Return the loss of every token times its weight, [b, C]."""
    old_logprobs = tokens.logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
    values = token_loss(objective, micro, tokens, old_logprobs, control, Stats())
    return values * token_weights(micro.loss_mask, average=objective.average, totals=totals, dtype=values.dtype)


def _split_at_deciles(trained: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Split `lengths` [B, 1] at the deciles of `trained` [n], the lengths of the trained completions.

    Equal lengths are in the same class, so there may be fewer than ten.
    """
    if not len(trained):
        return {}
    ordered = trained.sort().values
    # the i-th decile ends at the ceil(i n / 10)-th length
    longest_of_each = sorted({int(ordered[(i * len(ordered) + 9) // 10 - 1]) for i in range(1, 11)})
    classes, shortest = {}, int(ordered[0])
    for longest in longest_of_each:
        label = quantify(longest, "token") if longest == shortest else f"{shortest:,} to {quantify(longest, 'token')}"
        classes[label] = (lengths >= shortest) & (lengths <= longest)
        shortest = longest + 1
    return classes


def _find_end_tokens(batch: TrainBatch) -> Tensor:
    """Return a mask of the tokens that end a turn, [B, C] bool; none for a last turn that was cut off."""
    rollouts, turns = batch.rollouts, batch.rollouts.turns
    following = F.pad(turns[:, 1:], (0, 1), value=-1)
    places = torch.arange(turns.shape[1], device=turns.device)
    is_cut_off = rollouts.truncated[:, None] & (places == rollouts.valid_lengths()[:, None] - 1)
    return (turns >= 0) & (turns != following) & ~is_cut_off
