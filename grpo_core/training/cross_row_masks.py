"""The masks and weights of an optimizer step in which a row depends on other rows.

    loss.rejection              the tokens that are not trained because sampler and trainer differ too much there
    loss.normalize_correction   the mean by which the weights of the rollout correction are divided
    the loss's `selects`        the tokens that the loss treats apart, such as those of the highest covariance

They are computed once for each optimizer step, over the rows of all ranks and before micro-batches are cut. The number
of ranks and the size of micro-batches therefore do not change them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_core.batch import TrainBatch
from grpo_core.distributed import ranks
from grpo_core.model.packing import Budget
from grpo_core.model.policy import Policy
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.inputs import CORRECTION_INPUTS, REJECTION_INPUTS, select_tokens
from grpo_core.objective.objective import Objective
from grpo_core.random_keys import Key, torch_seed
from grpo_core.training.freeze import forward_all


@torch.no_grad()
def add_cross_row_masks(
    policy: Policy,
    objective: Objective,
    budget: Budget,
    minibatch: TrainBatch,
    key: Key,  # of the random numbers for a choice among equals
    stats: Stats,
    *,
    is_first: bool,  # no optimizer step has used the batch, so the policy's log-probs are the old ones
) -> TrainBatch:
    """Return this rank's minibatch with the masks and weights that depend on all rows. A collective.

    A forward without gradient and without dropout computes the policy's log-probs where the loss chooses tokens and an
    optimizer step was taken since the batch was frozen.
    """
    if not objective.needs_cross_row_masks:
        return minibatch
    old = minibatch.frozen_logprobs if minibatch.old_logprobs is None else minibatch.old_logprobs
    if old is None:  # the batch was read from a file
        old = forward_all(policy, budget, minibatch.rollouts).logprobs
    if objective.normalize_correction:
        minibatch = replace(minibatch, correction_scale=_scale_correction(objective, minibatch, old))
    whole = _gather(minibatch, old_logprobs=old)
    rows = slice(ranks.rank() * len(minibatch), (ranks.rank() + 1) * len(minibatch))
    if objective.rejects:
        keep = REJECTION_INPUTS.call(objective.rejection_fn, whole).expand_as(whole["completion_mask"])
        whole["completion_mask"] = whole["completion_mask"] & keep
        minibatch = _reject(minibatch, _own(keep, rows, minibatch), objective.rejection_in, stats)
    if objective.selects:
        logprobs = old if is_first else forward_all(policy, budget, minibatch.rollouts).logprobs
        generator = torch.Generator("cpu").manual_seed(torch_seed(key))
        draws = torch.rand(whole["old_logprobs"].shape, generator=generator, device="cpu")
        whole |= {"logprobs": _gather_rows(logprobs, whole["old_logprobs"].shape[1]), "draws": draws.to(old.device)}
        selected = _own(select_tokens(objective.loss_fn, whole), rows, minibatch)
        stats.add_mean("selected", selected, minibatch.loss_mask)
        minibatch = replace(minibatch, selected=selected)
    return minibatch


def correction_inputs(batch: TrainBatch, old_logprobs: Tensor) -> dict[str, Tensor | None]:
    """Return the inputs of the rollout correction by name, [B, C] or [B, 1]."""
    return {
        "old_logprobs": old_logprobs,
        "rollout_logprobs": batch.rollouts.rollout_logprobs,
        "completion_mask": batch.loss_mask,
        "advantages": batch.advantages,
        "ref_logprobs": batch.ref_logprobs,
        "rewards": batch.shaped_rewards,
    }


def _scale_correction(objective: Objective, minibatch: TrainBatch, old_logprobs: Tensor) -> Tensor:
    """Return 1 / (mean weight over the tokens, or over the completions, of all ranks), [B, 1]; 1 where it is 0."""
    weights = CORRECTION_INPUTS.call(objective.correction_fn, correction_inputs(minibatch, old_logprobs))
    mask = minibatch.loss_mask
    counted = mask if weights.shape[1] > 1 else mask.any(dim=1, keepdim=True)
    total, count = ranks.all_sum(torch.stack([(weights * counted).sum().double(), counted.sum().double()]))
    scale = count / total if total > 0 else torch.ones_like(count)
    return scale.to(weights.dtype).expand(len(minibatch), 1)


def _reject(minibatch: TrainBatch, keep: Tensor, place: str, stats: Stats) -> TrainBatch:
    """Take the tokens that are not kept out of the loss, or out of the surrogate alone."""
    mask = minibatch.loss_mask
    stats.add_mean("rejected", ~keep, mask)
    if place == "loss":
        return replace(minibatch, loss_mask=mask & keep)
    own = minibatch.surrogate_mask
    return replace(minibatch, surrogate_mask=keep if own is None else own & keep)


def _gather(minibatch: TrainBatch, old_logprobs: Tensor) -> dict[str, Tensor]:
    """Return the inputs that depend on no choice, [B of all ranks, C of the widest rank]. A collective."""
    inputs = {
        "old_logprobs": old_logprobs,
        "rollout_logprobs": minibatch.rollouts.rollout_logprobs,
        "advantages": minibatch.advantages.expand_as(old_logprobs),
        "completion_mask": minibatch.loss_mask,
    }
    width = int(ranks.all_max(torch.tensor(float(old_logprobs.shape[1]), device="cpu")))
    return {name: _gather_rows(values, width) for name, values in inputs.items()}


def _gather_rows(values: Tensor, width: int) -> Tensor:
    return ranks.all_rows(F.pad(values, (0, width - values.shape[1])))


def _own(values: Tensor, rows: slice, minibatch: TrainBatch) -> Tensor:
    """Return this rank's part of [B of all ranks, C of the widest rank]."""
    mask = minibatch.loss_mask
    return values[rows, : mask.shape[1]].to(mask.device)
