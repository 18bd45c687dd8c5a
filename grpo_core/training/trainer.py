"""The GRPO loop: sample, score, freeze the batch, compute advantages, update."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_core.distributed import ranks, signals
from grpo_core.monitor.aggregates import Stats
from grpo_core.monitor.alerts import Alerts
from grpo_core.training import checkpoint, saved_batches
from grpo_core.training.control import Control, next_control
from grpo_core.training.difficulty import update_curriculum
from grpo_core.training.distillation import ask_teacher
from grpo_core.training.evaluation import evaluate_now
from grpo_core.training.freeze import freeze, measure_exact_kl
from grpo_core.training.rollouts import collect, compute_step_advantages, shape_rewards
from grpo_core.training.run import Run
from grpo_core.training.selection import describe_stall
from grpo_core.training.skipped_steps import SkippedSteps
from grpo_core.training.update import update_policy


def train(run: Run) -> None:
    """Take the run's steps. Step s is a function of (seed, s) and of the state before it, which checkpoints hold.

    The state is the weights, the optimizer, the coefficients and, for a curriculum, the outcomes of the prompts. This
    rank has N prompts with G completions each, B = N * G rows, padded to C tokens.

    Raises:
        Interrupted: a signal asked for an end; its `is_saved` tells whether a checkpoint was written.
        RunFailed: the run cannot go on.
    """
    control, objective, policy, log = run.control, run.objective, run.policy, run.log
    budget = run.budgets.forward  # the largest forward without gradient that fits into memory
    alerts, skipped_steps = Alerts(run.config), SkippedSteps(run)
    begin(run)
    for step in remaining_steps(run):
        stats = Stats()
        tasks, rollouts, scores = ranks.call_and_share_errors(collect, run, step, stats)
        with log.phase("freeze"):
            rewards, trained = shape_rewards(objective, policy, budget, rollouts, scores, control.kl_coef, stats)
            frozen = freeze(policy, objective, budget, rollouts, trained)  # old and reference log-probs, [B, C]
        frozen = ask_teacher(run, tasks, frozen, stats)  # the teacher's log-probs, [B, C], if there is one
        with log.phase("freeze"):
            advantages = compute_step_advantages(objective, rewards, rollouts, scores, stats, frozen)  # [N, G(, C)]
            batch = frozen.with_advantages(advantages, rewards)
            measure_exact_kl(run, rollouts, step, stats)
        dump = saved_batches.start_dump(run, step, batch, scores)
        with log.phase("update"):
            numbers = update_policy(run, batch, step, control, stats)
        update_curriculum(run, step, stats)
        row = log.log_step(step, tasks, rollouts, scores, rewards, batch.mean_advantages(), stats, numbers)
        saved_batches.finish_dump(run, step, tasks, batch, dump, row)
        log.warn(scores.failures)
        control = next_control(control, run.config, row)
        skipped_steps.record(step, tasks, batch, row, control)
        reference = run.config.reference
        if reference.every and (step + 1) % reference.every == 0:
            policy.move_reference(reference.mixing)
        warnings, failure = alerts.update(row), alerts.check_failed_rewards()
        evaluate_save_or_stop(run, step + 1, control, warnings, failure, skipped_steps.good_step)


def begin(run: Run) -> None:
    """Evaluate the policy before the run's first step, if the run is new or was interrupted before this evaluation.

    If a signal has been received, the run ends here, after writing a checkpoint.

    Raises:
        Interrupted: a signal asked for an end.
        RunFailed: the evaluation's reward failed on too many tasks.
    """
    step, is_saved = run.start_step, False
    evaluation_is_missing = step == 0 or (is_evaluation_due(run, step) and not run.log.has_evaluation(step))
    signal = signals.received_signal()
    if evaluation_is_missing and not signal and (failure := evaluate_now(run, step)):
        raise signals.RunFailed(failure)
    signal = signal or signals.received_signal()
    if signal or (evaluation_is_missing and is_best(run, step)):
        with run.log.phase("checkpoint"):
            is_saved = checkpoint.save(run, step, run.control)
    if signal:
        raise signals.Interrupted(signal, is_saved=is_saved)


def remaining_steps(run: Run) -> Iterator[int]:
    """Yield the steps to take: all up to the last, or fewer where trainer.early_stopping ends the run."""
    for step in range(run.start_step, run.num_steps):
        if run.selection.has_stalled(run.config):
            run.log.info(describe_stall(run.selection, run.config, step, run.num_steps))
            return
        yield step


def is_best(run: Run, steps_taken: int) -> bool:
    """Return whether the policy after `steps_taken` steps is to be kept as the best so far."""
    return run.config.checkpoint.keep_best and run.selection.best_step == steps_taken


def is_evaluation_due(run: Run, steps_taken: int) -> bool:
    """Return whether the policy is evaluated after `steps_taken` steps."""
    return steps_taken == run.num_steps or is_due(run.config.evaluation.every, steps_taken, run)


def evaluate_save_or_stop(
    run: Run,
    steps_taken: int,
    control: Control,
    warnings: list[str],
    failure: str | None,
    good_step: int | None = None,  # first step of the current streak of skipped steps; default: `steps_taken`
) -> None:
    """Evaluate and save a checkpoint where they are due; end the run where a signal, an alert or a failure asks for it.

    Raises:
        Interrupted, RunFailed: as `train`.
    """
    config, is_last = run.config, steps_taken == run.num_steps
    for warning in warnings:
        run.log.info(f"warning: {warning}")
    if warnings and config.alerts == "stop":
        failure = failure or f"alerts is stop, and {warnings[0]}"
    signal = 0 if is_last else signals.received_signal()
    if is_evaluation_due(run, steps_taken) and not (signal or failure):
        failure = evaluate_now(run, steps_taken)
    is_last = is_last or run.selection.has_stalled(config)
    save_is_due = is_due(config.checkpoint.every, steps_taken, run) or is_last or is_best(run, steps_taken)
    is_saved = False
    if save_is_due or signal or failure:
        with run.log.phase("checkpoint"):
            is_saved = checkpoint.save(run, steps_taken, control, good_step)
    if failure:
        raise signals.RunFailed(failure)
    if signal:
        raise signals.Interrupted(signal, is_saved=is_saved)
    if is_last and not is_saved:
        raise signals.RunFailed(f"the last checkpoint could not be written to {run.folder}")


def is_due(every: int | str, steps_taken: int, run: Run) -> bool:
    """Return True every `every` steps; with "epoch", after the step that takes the epoch's last task."""
    if isinstance(every, str):
        return steps_taken // run.steps_per_epoch > (steps_taken - 1) // run.steps_per_epoch
    return bool(every) and steps_taken % every == 0
