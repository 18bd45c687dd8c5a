"""The GRPO loop: sample, score, freeze the batch, update."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from grpo_core import checkpoint, distributed, dump, incident, interrupt, watchdog
from grpo_core.alerts import Alerts
from grpo_core.averages import Totals, entropy_weights, token_weights
from grpo_core.batch import Rollouts, Task, TrainBatch, take
from grpo_core.collect import advantages_over_ranks, collect, rewards_to_learn_from
from grpo_core.control import Control, adapt
from grpo_core.corrections import corrected_old_logprobs, off_policy_mask, quantile
from grpo_core.draw import Decoding
from grpo_core.evaluation import evaluate
from grpo_core.kl import kl_exact
from grpo_core.memory import in_halves_if_need_be
from grpo_core.packing import Packing, Plan
from grpo_core.policy import TokenStats
from grpo_core.registry import fact
from grpo_core.run import Run
from grpo_core.stats import Stats

EQUAL_ENTROPY = 1e-5  # nats: tokens after the same prefix differ by rounding alone, and stay together
EXACT_KL_ROWS = 8  # of each rank


def train(run: Run) -> None:
    """Take the run's steps; step s is a function of the weights and the control before it and of (seed, s)."""
    config, control, alerts = run.config, run.control, Alerts(run.config)
    sound = (run.start_step, control)  # before the first of the last steps that were skipped
    if run.start_step == 0 and (failed := evaluate_now(run, 0)):
        raise interrupt.RunFailed(failed)
    for step in range(run.start_step, run.num_steps):
        stats = Stats()
        # N tasks, B = N * G completions, rewards [N, G]
        tasks, rollouts, scores = distributed.together(collect, run, step, stats)
        run.log.warn(scores.failures)
        with run.log.phase("freeze"):
            rewards, trained = rewards_to_learn_from(run, rollouts, scores, control.kl_coef, stats)  # [N, G] both
            advantages = advantages_over_ranks(run, rewards, rollouts, scores, stats)  # [N, G]
            batch = freeze(run, rollouts, advantages, trained)
            if config.log.exact_kl_every and step % config.log.exact_kl_every == 0:
                measure_exact_kl(run, rollouts, step, stats)
        kept = dump.before(run, step, batch, scores, forward_all)
        with run.log.phase("update"):
            numbers = update_policy(run, batch, step, control, stats)
        row = run.log.step(step, tasks, rollouts, scores, rewards, advantages, stats, numbers)
        dump.after(run, step, tasks, batch, kept, row, forward_all)
        if not numbers["skipped"]:
            control = adapt(control, config.loss, row.get("kl"), row["entropy"], config.trainer.completions_per_step)
        else:
            keep_what_went_wrong(run, step, tasks, batch, row)
        if numbers["skipped"] == config.trainer.num_minibatches * config.trainer.num_passes:
            end_after_too_many(run, step + 1, *sound)
        else:
            sound = (step + 1, control)
        if config.reference.every and (step + 1) % config.reference.every == 0:
            run.policy.move_reference(config.reference.mixing)
        finish_step(run, step + 1, control, alerts.see(row), alerts.too_many_failed())


def finish_step(run: Run, steps_taken: int, control: Control, alerts: list[str], failed: str | None) -> None:
    """Evaluation and checkpoint where they are due; the end where a signal, an alert or failed rewards ask for it."""
    config, last = run.config, steps_taken == run.num_steps
    for sentence in alerts:
        run.log.say(f"warning: {sentence}")
    if alerts and config.alerts == "stop":
        failed = failed or f"alerts is stop, and {alerts[0]}"
    signal = 0 if last else interrupt.asked()
    if (due(config.evaluation.every, steps_taken, run) or last) and not (signal or failed):
        failed = evaluate_now(run, steps_taken)
    saved = True
    if due(config.checkpoint.every, steps_taken, run) or last or signal or failed:
        with run.log.phase("checkpoint"):
            saved = checkpoint.save(run, steps_taken, control)
    if failed:
        raise interrupt.RunFailed(failed)
    if signal:
        raise interrupt.Interrupted(signal)
    if last and not saved:
        raise interrupt.RunFailed(f"the last checkpoint could not be written to {run.folder}")


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
    if config.kl_coef > 0 and config.kl_in == "loss" and not fact(run.kl_fn, "full_vocabulary"):
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
        in_halves_if_need_be(run.policy, rollouts, packing, forward)
    return logprobs, entropy


def top_entropy_mask(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """The `share` of the step's tokens, over all ranks, whose entropy is highest, [B, C] bool. arXiv:2506.01939.

    A collective.
    """
    everywhere = distributed.all_rows(entropy[mask].float())
    if len(everywhere) == 0:
        return mask
    return mask & (entropy >= quantile(everywhere, 1 - share) - EQUAL_ENTROPY)


def update_policy(run: Run, batch: TrainBatch, step: int, control: Control, stats: Stats) -> dict[str, float]:
    """One optimizer step per minibatch; its micro-batches' gradients add up to the minibatch's, over all ranks.

    Adds to `stats` what is to be averaged over ranks, and returns the numbers that all ranks share.
    """
    config, trainer, results = run.config, run.config.trainer, []
    distributed.seed_all(config.seed, step, distributed.rank())  # dropout
    shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    with run.policy.training():
        for minibatch in batch.minibatches(
            trainer.num_minibatches, trainer.num_passes, config.sampling.group_size, shuffle
        ):
            plan = run.policy.plan(minibatch.rollouts, run.budgets.update, rows_to_train(run, minibatch, control))
            totals = count_over_ranks(run, minibatch, len(plan))
            fits = accumulate(run, minibatch, plan, totals, control, stats)
            if distributed.all_max(torch.tensor(float(not fits))):
                end_out_of_memory(run, step, control, nothing_changed=not results)
            if len(plan) == 0:  # nothing to learn: the names in the log stay the same
                micro_loss(run, *nothing_of(minibatch), totals, control, stats)
            stats.total("micro_batches", torch.tensor(float(len(plan))))
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
        stats.add(seen)

    halved = tokens = 0
    try:
        for packing in plan:
            watchdog.beat("update")
            halved += in_halves_if_need_be(run.policy, minibatch.rollouts, packing, forward_and_backward)
            tokens += packing.tokens
    except torch.OutOfMemoryError:
        return False
    stats.total("memory_retries", torch.tensor(float(halved)))
    stats.total("tokens_updated", torch.tensor(float(tokens)))
    return True


def end_out_of_memory(run: Run, step: int, control: Control, *, nothing_changed: bool) -> None:
    """Raise RunFailed, with a checkpoint of before this step unless one of its minibatches has changed the weights."""
    if nothing_changed:
        checkpoint.save(run, step, control)
    raise interrupt.RunFailed(
        f"a micro-batch of step {step + 1} does not fit into the GPU's memory, not in halves either; lower "
        f"trainer.tokens_per_micro_batch or sampling.max_new_tokens, or switch model.gradient_checkpointing on; "
        f"resume={run.folder} goes on from the last checkpoint"
    )


def keep_what_went_wrong(run: Run, step: int, tasks: list[Task], batch: TrainBatch, row: dict[str, float]) -> None:
    """Keep the batch of a step whose gradient was not finite; fp16's overflows are its loss scale finding its place."""
    if not run.engine.scales_loss or not math.isfinite(row["loss"]):
        incident.record(run.folder, step, tasks, batch, row)


def end_after_too_many(run: Run, steps_taken: int, first: int, control: Control) -> None:
    """Raise RunFailed if all of too many steps since `first` were skipped, with a checkpoint of the time before."""
    if steps_taken - first < run.config.trainer.max_skipped_steps:
        return
    checkpoint.save(run, first, control)
    raise interrupt.RunFailed(
        f"the gradient was not finite in {steps_taken - first} steps in a row, from step {first} on; they changed "
        f"nothing, and a checkpoint of the time before them is in {run.folder / 'checkpoints'}"
    )


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
    divergence = run.kl_fn if in_loss and fact(run.kl_fn, "full_vocabulary") else None
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
    stats.mean("entropy", tokens.entropy, mask)
    stats.mean("logprob_gap", gap, mask)
    stats.max("logprob_gap_max", gap * mask)
    stats.total("loss", loss / (run.config.trainer.num_minibatches * run.config.trainer.num_passes))
    return loss


def token_loss(
    run: Run, micro: TrainBatch, tokens: TokenStats, old_logprobs: Tensor, control: Control, stats: Stats
) -> Tensor:
    """The loss of every token, [b, C]. This function is the order of operations:

    surrogate, * off-policy mask, * top-entropy mask, * rollout correction, + kl_coef KL.
    """
    config, mask, rollout_logprobs = run.config.loss, micro.loss_mask, micro.rollouts.rollout_logprobs
    weight = run.correction_fn(old_logprobs, rollout_logprobs, mask)  # [b, C] or [b, 1], or None
    inside = weight is not None and fact(run.loss_fn, "corrects_rollout")
    compared = corrected_old_logprobs(old_logprobs, weight, mask) if inside else old_logprobs

    surrogate = run.loss_fn(tokens.logprobs, compared, micro.advantages, mask)
    loss = surrogate.per_token_loss
    if config.off_policy_mask is not None:
        kept = off_policy_mask(tokens.logprobs, rollout_logprobs, micro.advantages, mask, config.off_policy_mask)
        loss = loss * kept
        stats.mean("off_policy_kept", kept, mask.any(dim=1, keepdim=True))
    if micro.surrogate_mask is not None:
        loss = loss * micro.surrogate_mask
    if weight is not None:
        loss = loss if inside else loss * weight
        stats.weights("rollout_weight", weight, mask if weight.shape[1] > 1 else mask.any(dim=1, keepdim=True))
    if control.kl_coef > 0 and config.kl_in == "loss":
        kl = tokens.divergence
        if kl is None:
            kl = run.kl_fn(tokens.logprobs, micro.ref_logprobs, old_logprobs)
        loss = loss + control.kl_coef * kl
        stats.mean("kl", kl, mask)
    for name, values in surrogate.diagnostics.items():
        stats.mean(name, values, mask)
    return loss


def count_over_ranks(run: Run, minibatch: TrainBatch, micro_batches: int) -> Totals:
    """What one optimizer step is averaged over: all micro-batches, all ranks. A collective.

    Rows that are left out of the forward count like all others.
    """
    mask = minibatch.loss_mask
    acting = mask if minibatch.surrogate_mask is None else mask & minibatch.surrogate_mask
    here = [mask.sum(), len(mask), acting.sum(), micro_batches]
    tokens, completions, entropy_tokens, all_micro_batches = distributed.all_sum(
        torch.stack([torch.as_tensor(count, device=mask.device) for count in here])
    )
    return Totals(
        tokens, completions, run.config.sampling.max_new_tokens, entropy_tokens, all_micro_batches.clamp(min=1)
    )


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
        stats.mean("kl_exact", run.policy.divergence(take(rows, packing.rows), packing, kl_exact, keep[packing.rows]))


def evaluate_now(run: Run, steps_taken: int) -> str | None:
    """Accuracy on the held-out tasks, into the log; a sentence if its reward failed on too many."""
    if not run.eval_tasks:
        return None
    chosen, limit = run.config.evaluation, run.config.trainer.max_failed_rewards
    settings = Decoding(chosen.temperature or 1.0, not chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p)
    given = {"batch_size": chosen.batch_size, "settings": settings, "warn": run.log.warn}
    given["shown"] = run.config.log.evaluation_completions
    with run.log.phase("evaluate"):
        result, shown = evaluate(run.sampler, run.eval_tasks, run.eval_reward, **given)
        result |= run.held_out()
    run.log.evaluation(steps_taken, result, shown)
    if result["failed"] <= limit * result["n"]:
        return None
    return (
        f"evaluation.reward {chosen.reward} failed on {result['failed']} of {result['n']} tasks, "
        f"more than trainer.max_failed_rewards ({limit:g}) allows"
    )


def due(every: int | str, steps_taken: int, run: Run) -> bool:
    """Whether something that happens `every` so many steps (or "epoch") happens after `steps_taken`."""
    period = run.steps_per_epoch if every == "epoch" else every
    return bool(period) and steps_taken % period == 0
