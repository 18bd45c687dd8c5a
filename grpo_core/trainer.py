"""The GRPO loop: sample, score, freeze the batch, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_core import checkpoint, distributed
from grpo_core.batch import Rollouts, Task, TrainBatch, split
from grpo_core.config import RunConfig
from grpo_core.evaluation import evaluate
from grpo_core.losses import KLS, Totals, token_weights
from grpo_core.metrics import RunLog, Stats
from grpo_core.rewards import REWARDS, Reward, score


@dataclass(frozen=True)
class Run:
    """What `setup` built. Each part knows its job and none of the others."""

    config: RunConfig
    folder: Path
    start_step: int
    num_steps: int
    tasks: Any  # .batch(step) -> this rank's N tasks
    eval_tasks: list[Task]
    policy: Any  # .logprobs_and_entropy(rollouts), .reference(), .training(), .norm(), .save(folder)
    sampler: Any  # .generate(tasks, group_size) -> Rollouts
    engine: Any  # .backward(loss), .step()
    rewards: list[Reward]
    advantage_fn: Callable[[Tensor], Tensor]  # [N, G] -> [N, G]
    loss_fn: Callable  # see losses.py
    log: RunLog
    steps_per_epoch: int


def train(run: Run) -> None:
    """Take the run's steps; step s is a function of the weights before it and of (seed, s)."""
    config, group_size = run.config, run.config.sampling.group_size
    if run.start_step == 0:
        evaluate_now(run, 0)
    for step in range(run.start_step, run.num_steps):
        with run.log.phase("sample"):
            tasks = run.tasks.batch(step)  # this rank's N tasks
            rollouts = run.sampler.generate(tasks, group_size)  # B = N * G rows
        with run.log.phase("reward"):
            scores = score(run.rewards, tasks, rollouts.completions, group_size)
        advantages = run.advantage_fn(scores.rewards)  # [N, G]
        with run.log.phase("freeze"):
            batch = freeze(run, rollouts, advantages)
        with run.log.phase("update"):
            stats, numbers = update_policy(run, batch, step)
        run.log.step(step, tasks, rollouts, scores, advantages, stats, numbers)
        if due(config.evaluation.every, step + 1, run) or step + 1 == run.num_steps:
            evaluate_now(run, step + 1)
        if due(config.checkpoint.every, step + 1, run) or step + 1 == run.num_steps:
            with run.log.phase("checkpoint"):
                checkpoint.save(run.folder / "checkpoints", step + 1, run.engine, config)


@torch.no_grad()
def freeze(run: Run, rollouts: Rollouts, advantages: Tensor) -> TrainBatch:
    """Everything the loss compares against, computed once, before the first gradient.

    Old log-probs cost a forward only where the batch is used more than once; a batch that is used once has ratio 1.
    """
    trainer, old_logprobs, ref_logprobs = run.config.trainer, None, None
    if trainer.num_minibatches * trainer.num_passes > 1:
        old_logprobs = all_logprobs(run, rollouts)
    if run.config.loss.kl_coef > 0:
        with run.policy.reference():
            ref_logprobs = all_logprobs(run, rollouts)
    column = advantages.reshape(-1, 1).to(rollouts.completion_ids.device)
    return TrainBatch(rollouts, column, old_logprobs, ref_logprobs)


def all_logprobs(run: Run, rollouts: Rollouts) -> Tensor:
    """Log-probs [B, C] in micro-batches."""
    return torch.cat([run.policy.logprobs(micro) for micro in split(rollouts, run.config.trainer.micro_batch_size)])


def update_policy(run: Run, batch: TrainBatch, step: int) -> tuple[Stats, dict[str, float]]:
    """One optimizer step per minibatch; its micro-batches' gradients add up to the minibatch's, over all ranks.

    Returns what is to be averaged over ranks, and the numbers that all ranks share.
    """
    config, trainer, stats, results = run.config, run.config.trainer, Stats(), []
    distributed.seed_all(config.seed, step, distributed.rank())  # dropout
    shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    with run.policy.training():
        for minibatch in batch.minibatches(
            trainer.num_minibatches, trainer.num_passes, config.sampling.group_size, shuffle
        ):
            totals = count_over_ranks(minibatch, config.sampling.max_new_tokens)
            for micro in split(minibatch, trainer.micro_batch_size):
                run.engine.backward(micro_loss(run, micro, totals, stats))
            results.append(run.engine.step())
    return stats, {
        "grad_norm": sum(result.grad_norm for result in results) / len(results),
        "learning_rate": results[-1].learning_rate,
        "skipped": sum(not result.applied for result in results),
        "adapter_norm": float(run.policy.norm()),
        "epoch": (step + 1) / run.steps_per_epoch,
    }


def micro_loss(run: Run, micro: TrainBatch, totals: Totals, stats: Stats) -> Tensor:
    """A micro-batch's part of its minibatch's loss, a scalar: surrogate, + kl_coef * KL, * token_weights, summed."""
    config, mask = run.config.loss, micro.rollouts.completion_mask
    logprobs, entropy = run.policy.logprobs_and_entropy(micro.rollouts)  # [b, C], the first with gradient
    old_logprobs = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
    kl = torch.zeros_like(logprobs)
    if micro.ref_logprobs is not None:
        kl = KLS.get(config.kl)(logprobs, micro.ref_logprobs)
    surrogate = run.loss_fn(logprobs, old_logprobs, micro.advantages, mask)
    per_token_loss = surrogate.per_token_loss + config.kl_coef * kl
    loss = (per_token_loss * token_weights(mask, average=config.average, totals=totals)).sum()

    gap = (old_logprobs - micro.rollouts.rollout_logprobs).abs()
    for name, values in (*surrogate.diagnostics.items(), ("kl", kl), ("entropy", entropy), ("logprob_gap", gap)):
        stats.mean(name, values, mask)
    stats.max("logprob_gap_max", gap * mask)
    stats.total("loss", loss / (run.config.trainer.num_minibatches * run.config.trainer.num_passes))
    return loss


def count_over_ranks(minibatch: TrainBatch, max_new_tokens: int) -> Totals:
    """Completion tokens and completions of one optimizer step: all micro-batches, all ranks. A collective."""
    mask = minibatch.rollouts.completion_mask
    counts = distributed.all_sum(torch.stack([mask.sum(), torch.tensor(len(mask), device=mask.device)]))
    return Totals(tokens=counts[0], completions=counts[1], max_new_tokens=max_new_tokens)


def evaluate_now(run: Run, steps_taken: int) -> None:
    """Greedy accuracy on the held-out tasks, into the log."""
    if run.eval_tasks:
        reward = REWARDS.build(run.config.evaluation.reward)
        with run.log.phase("evaluate"):
            result = evaluate(run.sampler, run.eval_tasks, reward, batch_size=run.config.evaluation.batch_size)
        run.log.evaluation(steps_taken, result)


def due(every: int | str, steps_taken: int, run: Run) -> bool:
    """Whether something that happens `every` so many steps (or "epoch") happens after `steps_taken`."""
    period = run.steps_per_epoch if every == "epoch" else every
    return bool(period) and steps_taken % period == 0
