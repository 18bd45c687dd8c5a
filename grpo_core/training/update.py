"""The policy update: one optimizer step for each minibatch, and the order of operations of the loss."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.batch import Rollouts, TrainBatch, take
from grpo_core.distributed import ranks, signals, watchdog
from grpo_core.model.memory import retry_in_halves
from grpo_core.model.packing import Packing, Plan
from grpo_core.model.policy import TokenStats
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.corrections import corrected_old_logprobs, off_policy_mask
from grpo_core.objective.token_weights import Totals, entropy_weights, token_weights
from grpo_core.registry import get_fact
from grpo_core.training import checkpoint
from grpo_core.training.control import Control
from grpo_core.training.run import Run


def update_policy(run: Run, batch: TrainBatch, step: int, control: Control, stats: Stats) -> dict[str, float]:
    """One optimizer step per minibatch; its micro-batches' gradients add up to the minibatch's, over all ranks.

    Adds to `stats` what is to be averaged over ranks, and returns the numbers that all ranks share.
    """
    config, trainer, results = run.config, run.config.trainer, []
    ranks.seed_all(config.seed, step, ranks.rank())  # dropout
    shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    with run.policy.training():
        for minibatch in batch.minibatches(
            trainer.num_minibatches, trainer.num_passes, config.sampling.group_size, shuffle
        ):
            plan = run.policy.plan(minibatch.rollouts, run.budgets.update, rows_to_train(run, minibatch, control))
            totals = count_over_ranks(run, minibatch, len(plan))
            fits = accumulate(run, minibatch, plan, totals, control, stats)
            if ranks.all_max(torch.tensor(float(not fits))):
                end_out_of_memory(run, step, control, nothing_changed=not results)
            if len(plan) == 0:  # nothing to learn: the names in the log stay the same
                micro_loss(run, *nothing_of(minibatch), totals, control, stats)
            stats.add_total("micro_batches", torch.tensor(float(len(plan))))
            results.append(run.engine.step())
    return {
        "grad_norm": sum(result.grad_norm for result in results) / len(results),
        "learning_rate": results[-1].learning_rate,
        "skipped": sum(not result.applied for result in results),
        "adapter_norm": float(run.policy.norm()),
        "epoch": (step + 1) / run.steps_per_epoch,
        "kl_coef": control.kl_coef,
        "entropy_coef": control.entropy_bonus,
    }


def accumulate(run: Run, minibatch: TrainBatch, plan: Plan, totals: Totals, control: Control, stats: Stats) -> bool:
    """Forward and backward of every micro-batch; whether memory was enough for them."""

    def forward_and_backward(packing: Packing) -> None:
        micro, seen = take(minibatch, packing.rows), Stats()
        tokens = forward_with_gradient(run, micro.rollouts, packing, control)
        run.engine.backward(micro_loss(run, micro, tokens, totals, control, seen))
        stats.merge(seen)

    halved = tokens = 0
    try:
        for packing in plan:
            watchdog.beat("update")
            halved += retry_in_halves(run.policy, minibatch.rollouts, packing, forward_and_backward)
            tokens += packing.tokens
    except torch.OutOfMemoryError:
        return False
    stats.add_total("memory_retries", torch.tensor(float(halved)))
    stats.add_total("tokens_updated", torch.tensor(float(tokens)))
    return True


def rows_to_train(run: Run, minibatch: TrainBatch, control: Control) -> list[int]:
    """The rows that the gradient depends on: without a KL or an entropy bonus, not those whose advantage is 0."""
    config, rows = run.config.loss, minibatch.loss_mask.any(dim=1)
    only_surrogate = control.entropy_bonus == 0 and config.entropy_target is None
    only_surrogate &= control.kl_coef == 0 or config.kl_in == "reward"
    if only_surrogate and run.skips_ties:
        rows = rows & (minibatch.advantages.squeeze(1) != 0)
    return rows.nonzero().squeeze(1).tolist()


def nothing_of(minibatch: TrainBatch) -> tuple[TrainBatch, TokenStats]:
    """A row of which no token is trained."""
    one = take(minibatch, torch.zeros(1, dtype=torch.long))
    zeros = torch.zeros_like(one.rollouts.rollout_logprobs)
    return replace(one, loss_mask=torch.zeros_like(one.loss_mask)), TokenStats(zeros, zeros, zeros)


def forward_with_gradient(run: Run, rollouts: Rollouts, packing: Packing, control: Control) -> TokenStats:
    """What the loss needs of a micro-batch's tokens, [b, C] each."""
    in_loss = control.kl_coef > 0 and run.config.loss.kl_in == "loss"
    divergence = run.kl_fn if in_loss and get_fact(run.kl_fn, "full_vocabulary") else None
    return run.policy.forward(rollouts, packing, entropy_gradient=control.entropy_bonus > 0, divergence=divergence)


def micro_loss(
    run: Run, micro: TrainBatch, tokens: TokenStats, totals: Totals, control: Control, stats: Stats
) -> Tensor:
    """A micro-batch's part of its minibatch's loss, a scalar: token_loss * token_weights, less the entropy bonus."""
    config, mask = run.config.loss, micro.loss_mask
    old_logprobs = tokens.logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
    loss = token_loss(run, micro, tokens, old_logprobs, control, stats)
    loss = (loss * token_weights(mask, average=config.average, totals=totals, dtype=loss.dtype)).sum()
    if control.entropy_bonus > 0:
        acting = mask if micro.surrogate_mask is None else mask & micro.surrogate_mask
        bonus = (tokens.entropy * entropy_weights(acting, totals, dtype=loss.dtype)).sum()
        loss = loss - control.entropy_bonus * bonus

    gap = (old_logprobs - micro.rollouts.rollout_logprobs).abs()
    stats.add_mean("entropy", tokens.entropy, mask)
    stats.add_mean("logprob_gap", gap, mask)
    stats.add_max("logprob_gap_max", gap * mask)
    stats.add_total("loss", loss / (run.config.trainer.num_minibatches * run.config.trainer.num_passes))
    return loss


def token_loss(
    run: Run, micro: TrainBatch, tokens: TokenStats, old_logprobs: Tensor, control: Control, stats: Stats
) -> Tensor:
    """The loss of every token, [b, C]. This function is the order of operations:

    surrogate, * off-policy mask, * top-entropy mask, * rollout correction, + kl_coef KL.
    """
    config, mask, rollout_logprobs = run.config.loss, micro.loss_mask, micro.rollouts.rollout_logprobs
    weight = run.correction_fn(old_logprobs, rollout_logprobs, mask)  # [b, C] or [b, 1], or None
    inside = weight is not None and get_fact(run.loss_fn, "corrects_rollout")
    compared = corrected_old_logprobs(old_logprobs, weight, mask) if inside else old_logprobs

    surrogate = run.loss_fn(tokens.logprobs, compared, micro.advantages, mask)
    loss = surrogate.per_token_loss
    if config.off_policy_mask is not None:
        kept = off_policy_mask(tokens.logprobs, rollout_logprobs, micro.advantages, mask, config.off_policy_mask)
        loss = loss * kept
        stats.add_mean("off_policy_kept", kept, mask.any(dim=1, keepdim=True))
    if micro.surrogate_mask is not None:
        loss = loss * micro.surrogate_mask
    if weight is not None:
        loss = loss if inside else loss * weight
        stats.add_weights("rollout_weight", weight, mask if weight.shape[1] > 1 else mask.any(dim=1, keepdim=True))
    if control.kl_coef > 0 and config.kl_in == "loss":
        kl = tokens.divergence
        if kl is None:
            kl = run.kl_fn(tokens.logprobs, micro.ref_logprobs, old_logprobs)
        loss = loss + control.kl_coef * kl
        stats.add_mean("kl", kl, mask)
    for name, values in surrogate.diagnostics.items():
        stats.add_mean(name, values, mask)
    return loss


def count_over_ranks(run: Run, minibatch: TrainBatch, micro_batches: int) -> Totals:
    """What one optimizer step is averaged over: all micro-batches, all ranks. A collective.

    Rows that are left out of the forward count like all others.
    """
    mask = minibatch.loss_mask
    acting = mask if minibatch.surrogate_mask is None else mask & minibatch.surrogate_mask
    here = [mask.sum(), len(mask), acting.sum(), micro_batches]
    tokens, completions, entropy_tokens, all_micro_batches = ranks.all_sum(
        torch.stack([torch.as_tensor(count, device=mask.device) for count in here])
    )
    return Totals(
        tokens, completions, run.config.sampling.max_new_tokens, entropy_tokens, all_micro_batches.clamp(min=1)
    )


def end_out_of_memory(run: Run, step: int, control: Control, *, nothing_changed: bool) -> None:
    """Raise RunFailed, with a checkpoint of before this step unless one of its minibatches has changed the weights."""
    if nothing_changed:
        checkpoint.save(run, step, control)
    raise signals.RunFailed(
        f"a micro-batch of step {step + 1} does not fit into the GPU's memory, not in halves either; lower "
        f"trainer.tokens_per_micro_batch or sampling.max_new_tokens, or switch model.gradient_checkpointing on; "
        f"resume={run.folder} goes on from the last checkpoint"
    )
