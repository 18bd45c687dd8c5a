"""The GRPO loop: sample, score, freeze the batch, update."""

from __future__ import annotations

import math

from grpo_core.batch import Task, TrainBatch
from grpo_core.distributed import ranks, signals
from grpo_core.monitor.aggregates import Stats
from grpo_core.monitor.alerts import Alerts
from grpo_core.training import checkpoint, saved_batches
from grpo_core.training.control import Control, adapt
from grpo_core.training.evaluation import evaluate_now
from grpo_core.training.freeze import forward_all, freeze, measure_exact_kl
from grpo_core.training.rollouts import advantages_over_ranks, collect, rewards_to_learn_from
from grpo_core.training.run import Run
from grpo_core.training.update import update_policy


def train(run: Run) -> None:
    """Take the run's steps; step s is a function of the weights and the control before it and of (seed, s)."""
    config, control, alerts = run.config, run.control, Alerts(run.config)
    sound = (run.start_step, control)  # before the first of the last steps that were skipped
    if run.start_step == 0 and (failed := evaluate_now(run, 0)):
        raise signals.RunFailed(failed)
    for step in range(run.start_step, run.num_steps):
        stats = Stats()
        # N tasks, B = N * G completions, rewards [N, G]
        tasks, rollouts, scores = ranks.raise_on_all_ranks(collect, run, step, stats)
        run.log.warn(scores.failures)
        with run.log.phase("freeze"):
            rewards, trained = rewards_to_learn_from(run, rollouts, scores, control.kl_coef, stats)  # [N, G] both
            advantages = advantages_over_ranks(run, rewards, rollouts, scores, stats)  # [N, G]
            batch = freeze(run, rollouts, advantages, trained)
            if config.log.exact_kl_every and step % config.log.exact_kl_every == 0:
                measure_exact_kl(run, rollouts, step, stats)
        kept = saved_batches.tensors_before_update(run, step, batch, scores, forward_all)
        with run.log.phase("update"):
            numbers = update_policy(run, batch, step, control, stats)
        row = run.log.log_step(step, tasks, rollouts, scores, rewards, advantages, stats, numbers)
        saved_batches.write_dump(run, step, tasks, batch, kept, row, forward_all)
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
        finish_step(run, step + 1, control, alerts.update(row), alerts.check_failed_rewards())


def finish_step(run: Run, steps_taken: int, control: Control, alerts: list[str], failed: str | None) -> None:
    """Evaluation and checkpoint where they are due; the end where a signal, an alert or failed rewards ask for it."""
    config, last = run.config, steps_taken == run.num_steps
    for sentence in alerts:
        run.log.info(f"warning: {sentence}")
    if alerts and config.alerts == "stop":
        failed = failed or f"alerts is stop, and {alerts[0]}"
    signal = 0 if last else signals.received_signal()
    if (due(config.evaluation.every, steps_taken, run) or last) and not (signal or failed):
        failed = evaluate_now(run, steps_taken)
    saved = True
    if due(config.checkpoint.every, steps_taken, run) or last or signal or failed:
        with run.log.phase("checkpoint"):
            saved = checkpoint.save(run, steps_taken, control)
    if failed:
        raise signals.RunFailed(failed)
    if signal:
        raise signals.Interrupted(signal)
    if last and not saved:
        raise signals.RunFailed(f"the last checkpoint could not be written to {run.folder}")


def keep_what_went_wrong(run: Run, step: int, tasks: list[Task], batch: TrainBatch, row: dict[str, float]) -> None:
    """Keep the batch of a step whose gradient was not finite; fp16's overflows are its loss scale finding its place."""
    if not run.engine.scales_loss or not math.isfinite(row["loss"]):
        saved_batches.write_incident(run.folder, step, tasks, batch, row)


def end_after_too_many(run: Run, steps_taken: int, first: int, control: Control) -> None:
    """Raise RunFailed if all of too many steps since `first` were skipped, with a checkpoint of the time before."""
    if steps_taken - first < run.config.trainer.max_skipped_steps:
        return
    checkpoint.save(run, first, control)
    raise signals.RunFailed(
        f"the gradient was not finite in {steps_taken - first} steps in a row, from step {first} on; they changed "
        f"nothing, and a checkpoint of the time before them is in {run.folder / 'checkpoints'}"
    )


def due(every: int | str, steps_taken: int, run: Run) -> bool:
    """Whether something that happens `every` so many steps (or "epoch") happens after `steps_taken`."""
    period = run.steps_per_epoch if every == "epoch" else every
    return bool(period) and steps_taken % period == 0
