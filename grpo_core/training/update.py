"""The policy update: one optimizer step for each minibatch. `token_loss` is the order of operations of the loss."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.batch import Rollouts, TrainBatch, take
from grpo_core.distributed import ranks, signals, watchdog
from grpo_core.model.logprobs import TeacherStates
from grpo_core.model.memory import retry_in_halves
from grpo_core.model.packing import Packing, Plan
from grpo_core.model.policy import Policy, TokenStats
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.corrections import corrected_old_logprobs, off_policy_mask, sampler_distances
from grpo_core.objective.diagnostics import describe_wrong_diagnostics
from grpo_core.objective.inputs import CORRECTION_INPUTS, LOSS_INPUTS
from grpo_core.objective.objective import Objective
from grpo_core.objective.policy_loss import PolicyLoss
from grpo_core.objective.token_weights import Totals, mean_weights, token_weights
from grpo_core.random_keys import make_key, torch_seed
from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError
from grpo_core.training import checkpoint
from grpo_core.training.control import Control
from grpo_core.training.cross_row_masks import add_cross_row_masks, correction_inputs
from grpo_core.training.distillation import compute_teacher_states
from grpo_core.training.run import Run


def update_policy(run: Run, batch: TrainBatch, step: int, control: Control, stats: Stats) -> dict[str, float]:
    """Take one optimizer step for each minibatch; the gradients of its micro-batches add up, over all ranks.

    Adds to `stats` what is averaged over ranks, and returns the numbers that all ranks share.

    Raises:
        RunFailed: a micro-batch does not fit into the memory of some rank, not in halves either.
    """
    config, trainer, results = run.config, run.config.trainer, []
    ranks.seed_all(make_key("dropout", config.seed, step, ranks.rank()))
    shuffle = torch.Generator("cpu").manual_seed(torch_seed(make_key("minibatches", config.seed, step)))
    minibatches = batch.minibatches(trainer.num_minibatches, trainer.num_passes, config.sampling.group_size, shuffle)
    for index, minibatch in enumerate(minibatches):
        key, is_first = make_key("selection", config.seed, step, index), index == 0
        budget = run.budgets.forward
        minibatch = add_cross_row_masks(run.policy, run.objective, budget, minibatch, key, stats, is_first=is_first)
        rows = rows_to_train(run.objective, minibatch, control)
        has_echo = run.objective.echo_coef > 0
        plan = run.policy.plan(minibatch.rollouts, run.budgets.update, rows, predict_given=has_echo)
        totals = count_over_ranks(run.objective, minibatch, len(plan))
        with run.policy.training():
            fits = accumulate_gradients(run, minibatch, plan, totals, control, stats)
        if ranks.all_max(torch.tensor(float(not fits), device="cpu")):
            fail_out_of_memory(run, step, control, weights_unchanged=not results)
        if len(plan) == 0:  # no row to train here, but every rank must reduce the metrics of the same names
            micro_loss(run.objective, *untrained_row(run, minibatch), totals, control, stats)
        stats.add_total("micro_batches", torch.tensor(float(len(plan)), device="cpu"))
        results.append(run.engine.step())
    return {
        "grad_norm": sum(result.grad_norm for result in results) / len(results),
        "learning_rate": results[-1].learning_rate,
        "skipped": sum(not result.applied for result in results),
        "adapter_norm": float(run.policy.norm()),
        "epoch": float((step + 1) / run.steps_per_epoch),  # tasks seen / tasks
        "kl_coef": control.kl_coef,
        "entropy_coef": control.active_entropy_coef,
    }


def accumulate_gradients(
    run: Run, minibatch: TrainBatch, plan: Plan, totals: Totals, control: Control, stats: Stats
) -> bool:
    """Run forward and backward of every micro-batch; return whether the memory was enough for them."""

    def forward_and_backward(packing: Packing) -> None:
        micro, micro_stats = take(minibatch, packing.rows), Stats()
        teacher = compute_teacher_states(run, micro)
        tokens = forward_with_gradient(run.policy, run.objective, micro.rollouts, packing, control, teacher)
        run.engine.backward(micro_loss(run.objective, micro, tokens, totals, control, micro_stats))
        stats.merge(micro_stats)

    retries = tokens = 0
    try:
        for packing in plan:  # the layout of one micro-batch's forward
            watchdog.beat("update")
            retries += retry_in_halves(run.policy, minibatch.rollouts, packing, forward_and_backward)
            tokens += packing.tokens
    except torch.OutOfMemoryError:
        return False
    stats.add_total("memory_retries", torch.tensor(float(retries), device="cpu"))
    stats.add_total("tokens_updated", torch.tensor(float(tokens), device="cpu"))
    return True


def rows_to_train(objective: Objective, minibatch: TrainBatch, control: Control) -> list[int]:
    """Return the rows that the gradient depends on.

    These are the rows with trained tokens, without those whose advantages are all 0 if no term of the objective learns
    from them. With `echo_coef`, rows that have tokens given by an environment are added, whatever their advantages.
    """
    rows = minibatch.loss_mask.any(dim=1)
    if not objective.needs_tied_rows(control.kl_coef, control.active_entropy_coef):
        rows = rows & (minibatch.advantages != 0).any(dim=1)
    if objective.echo_coef:
        rows = rows | minibatch.rollouts.given.any(dim=1)
    return rows.nonzero().squeeze(1).tolist()


def count_over_ranks(objective: Objective, minibatch: TrainBatch, micro_batches: int) -> Totals:
    """Count what one optimizer step is averaged over: all micro-batches, all ranks. A collective.

    Rows that are left out of the forward count like all others.
    """
    mask = minibatch.loss_mask
    positive = _positive_mask(objective, minibatch).sum() if objective.positive_nll_coef else 0
    given = minibatch.rollouts.given.sum() if objective.echo_coef else 0
    counts = {
        "tokens": mask.sum(),
        "completions": len(mask),
        "entropy_tokens": _surrogate_tokens(minibatch).sum(),
        "micro_batches": micro_batches,
        "positive_tokens": positive,
        "given_tokens": given,
    }
    sums = ranks.all_sum(torch.stack([torch.as_tensor(count, device=mask.device) for count in counts.values()]))
    totals = dict(zip(counts, sums, strict=True))
    totals["micro_batches"] = totals["micro_batches"].clamp(min=1)
    return Totals(max_new_tokens=objective.max_new_tokens, **totals)


def forward_with_gradient(
    policy: Policy,
    objective: Objective,
    rollouts: Rollouts,
    packing: Packing,
    control: Control,
    teacher: TeacherStates | None = None,
) -> TokenStats:
    """Compute the statistics of a micro-batch's tokens that the loss needs, [b, C] each."""
    kl_in_loss = control.kl_coef > 0 and objective.kl_in == "loss"
    divergence = objective.kl_fn if kl_in_loss and objective.kl_needs_vocabulary else None
    options = {"entropy_gradient": control.active_entropy_coef > 0, "divergence": divergence, "teacher": teacher}
    return policy.forward(rollouts, packing, router_balance=objective.router_aux_coef > 0, **options)


def micro_loss(
    objective: Objective, micro: TrainBatch, tokens: TokenStats, totals: Totals, control: Control, stats: Stats
) -> Tensor:
    """Return a micro-batch's part of its minibatch's loss, a scalar. With l the log-prob of a token, the loss is

      sum(token_loss * token_weights)
      - entropy_coef * mean entropy
      - positive_nll_coef * mean l of the tokens of positive examples (VAPO, arXiv:2504.05118)
      - echo_coef * mean l of the given tokens (ECHO, arXiv:2605.24517)
      + router_aux_coef * mean load-balancing loss of a completion

    The means are over the optimizer step: all micro-batches, all ranks.
    """
    mask, all_logprobs = micro.loss_mask, tokens.logprobs
    if objective.echo_coef:  # the policy loss sees 0 at given tokens, as everywhere else; ECHO reads them below
        tokens = replace(tokens, logprobs=all_logprobs.masked_fill(micro.rollouts.given, 0.0))
    old_logprobs = tokens.logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
    loss = token_loss(objective, micro, tokens, old_logprobs, control, stats)
    loss = (loss * token_weights(mask, average=objective.average, totals=totals, dtype=loss.dtype)).sum()
    if control.active_entropy_coef > 0:
        counted = totals.tokens if totals.entropy_tokens is None else totals.entropy_tokens
        weights = mean_weights(_surrogate_tokens(micro), counted, dtype=loss.dtype)
        loss = loss - control.active_entropy_coef * (tokens.entropy * weights).sum()
    if tokens.router_balance is not None:
        loss = loss + objective.router_aux_coef * tokens.router_balance.sum() / totals.completions
        stats.add_mean("router_aux_loss", tokens.router_balance, mask.any(dim=1, keepdim=True))
    if objective.positive_nll_coef:
        positive = _positive_mask(objective, micro)
        weights = mean_weights(positive, totals.positive_tokens, dtype=loss.dtype)
        loss = loss - objective.positive_nll_coef * (tokens.logprobs * weights).sum()
        stats.add_mean("positive_nll", -tokens.logprobs, positive)
    if objective.echo_coef:
        given = micro.rollouts.given
        weights = mean_weights(given, totals.given_tokens, dtype=loss.dtype)
        loss = loss - objective.echo_coef * (all_logprobs * weights).sum()
        stats.add_mean("echo", -all_logprobs, given)

    gap = (old_logprobs - micro.rollouts.rollout_logprobs).abs()
    stats.add_mean("entropy", tokens.entropy, mask)
    stats.add_mean("logprob_gap", gap, mask)
    stats.add_max("logprob_gap_max", gap * mask)
    mismatch = tokens.routing_mismatch if micro.old_logprobs is None else micro.routing_mismatch
    if mismatch is not None:
        stats.add_mean("routing_mismatch", mismatch, mask)
    for name, distance in sampler_distances(old_logprobs, micro.rollouts.rollout_logprobs, mask).items():
        stats.add_mean(name, distance, mask)
    stats.add_total("loss", loss / objective.steps_per_batch)
    return loss


def token_loss(
    objective: Objective, micro: TrainBatch, tokens: TokenStats, old_logprobs: Tensor, control: Control, stats: Stats
) -> Tensor:
    """Return the loss of every token, [b, C]. This function is the order of operations:

      surrogate * off_policy_mask * surrogate_mask * rollout_correction
      + kl_coef * kl + log_ratio_coef * (l - l_roll)**2 + teacher_kl_coef * kl_teacher

    surrogate_mask is 0 at tokens below the top entropies and at those that loss.rejection takes from the surrogate. A
    loss with its own rollout correction (the fact `corrects_rollout`) is not multiplied by it: it reads old_logprobs
    that contain the correction.

    Raises:
        ConfigError: the loss returned a diagnostic that cannot be logged.
    """
    mask, rollout_logprobs = micro.loss_mask, micro.rollouts.rollout_logprobs
    inputs = collect_inputs(micro, tokens, old_logprobs)
    correction = _compute_correction_for_loss(objective, micro, inputs)
    corrects_itself = bool(get_fact(objective.loss_fn, "corrects_rollout"))  # takes the correction through old_logprobs
    if correction is not None and corrects_itself:
        inputs["old_logprobs"] = corrected_old_logprobs(old_logprobs, correction, mask)

    surrogate = LOSS_INPUTS.call(objective.loss_fn, inputs)
    loss = surrogate.per_token_loss
    if objective.off_policy_mask is not None:
        on_policy = off_policy_mask(
            tokens.logprobs, rollout_logprobs, micro.advantages, mask, objective.off_policy_mask
        )
        loss = loss * on_policy
        stats.add_mean("off_policy_kept", on_policy, mask.any(dim=1, keepdim=True))
    if micro.surrogate_mask is not None:
        loss = loss * micro.surrogate_mask
    if correction is not None:
        if not corrects_itself:
            loss = loss * correction
        of_tokens = correction.shape[1] > 1
        stats.add_weights("rollout_weight", correction, mask if of_tokens else mask.any(dim=1, keepdim=True))
    if control.kl_coef > 0 and objective.kl_in == "loss":
        kl = tokens.divergence
        if kl is None:
            kl = objective.kl_fn(tokens.logprobs, micro.ref_logprobs, old_logprobs)
        loss = loss + control.kl_coef * kl
        stats.add_mean("kl", kl, mask)
    if objective.log_ratio_coef:  # Kimi K2.5, arXiv:2602.02276
        loss = loss + objective.log_ratio_coef * (tokens.logprobs - rollout_logprobs).square()
    if objective.teacher_kl_fn is not None:
        loss = loss + objective.teacher_kl_coef * tokens.teacher_divergence
        stats.add_mean("teacher_kl_exact", tokens.teacher_divergence, mask)
    _log_diagnostics(surrogate, mask, stats)
    return loss


def _log_diagnostics(surrogate: PolicyLoss, mask: Tensor, stats: Stats) -> None:
    """Add what the loss returned to be logged; raise ConfigError if it cannot be, which may depend on the batch."""
    if problem := describe_wrong_diagnostics(surrogate.diagnostics, mask.shape):
        raise ConfigError(f"the loss (loss.name) {problem}")
    for name, values in surrogate.diagnostics.items():
        stats.add_mean(name, values, mask)


def _compute_correction_for_loss(
    objective: Objective, micro: TrainBatch, inputs: dict[str, Tensor | None]
) -> Tensor | None:
    """Return the weights of the rollout correction, [b, C] or [b, 1], or None without one."""
    weights = CORRECTION_INPUTS.call(objective.correction_fn, inputs)
    return weights if weights is None or micro.correction_scale is None else weights * micro.correction_scale


def collect_inputs(micro: TrainBatch, tokens: TokenStats, old_logprobs: Tensor) -> dict[str, Tensor | None]:
    """Return the inputs of the loss and of the correction by name, [b, C] or [b, 1]; objective/inputs.py lists them."""
    return {
        **correction_inputs(micro, old_logprobs),
        "logprobs": tokens.logprobs,
        "teacher_logprobs": micro.teacher_logprobs,
        "entropy": tokens.entropy.detach(),
        "sum_p_squared": tokens.sum_p_squared,
        "selected": micro.selected,
    }


def untrained_row(run: Run, minibatch: TrainBatch) -> tuple[TrainBatch, TokenStats]:
    """Return the minibatch's first row with an empty loss mask, and statistics of 0."""
    row = take(minibatch, torch.zeros(1, dtype=torch.long, device="cpu"))
    zeros = torch.zeros_like(row.rollouts.rollout_logprobs)
    tokens = TokenStats(
        *5 * [zeros],
        routing_mismatch=zeros if run.policy.compares_routing(row.rollouts) else None,
        router_balance=zeros[:, :1] if run.objective.router_aux_coef else None,
    )
    return replace(row, loss_mask=torch.zeros_like(row.loss_mask)), tokens


def fail_out_of_memory(run: Run, step: int, control: Control, *, weights_unchanged: bool) -> None:
    """Raise RunFailed; if this step has not changed the weights, write a checkpoint of the state before it."""
    if weights_unchanged:
        checkpoint.save(run, step, control)
    raise signals.RunFailed(
        f"a micro-batch of step {step + 1} does not fit into the GPU's memory, not in halves either; lower "
        f"trainer.tokens_per_micro_batch or sampling.max_new_tokens, or switch model.gradient_checkpointing on; "
        f"{checkpoint.describe_resume(run.folder)}"
    )


def _surrogate_tokens(batch: TrainBatch) -> Tensor:
    """The trained tokens that surrogate and entropy bonus act on, [B, C] bool."""
    return batch.loss_mask if batch.surrogate_mask is None else batch.loss_mask & batch.surrogate_mask


def _positive_mask(objective: Objective, batch: TrainBatch) -> Tensor:
    """The trained tokens of completions that are positive examples, [B, C] bool."""
    assert batch.shaped_rewards is not None  # build_objective sets the coefficient, and the loop the rewards
    return batch.loss_mask & (batch.shaped_rewards > objective.positive_nll_above)
