"""Run a training job: set up, take the steps (`trainer.train`), export the adapter and log a summary."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_core.config.sections import RunConfig
from grpo_core.counts import quantify
from grpo_core.distributed import signals, watchdog
from grpo_core.monitor import run_lock
from grpo_core.monitor.run_log import describe_evaluation
from grpo_core.report.eval_sets import label_set, split_sets
from grpo_core.schema import ConfigError
from grpo_core.scoring.scoring import close_rewards
from grpo_core.training import checkpoint
from grpo_core.training.run import Run
from grpo_core.training.setup import setup
from grpo_core.training.trainer import train as train_loop


def train(config: RunConfig) -> Path:
    """Train as `config` describes and return the run folder, which holds the adapter and all other output.

    Raises:
        ConfigError: the configuration cannot be run; nothing was written.
        Interrupted: a signal stopped the run; its `is_saved` tells whether a checkpoint was written.
        RunFailed: the run could not continue.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(f"train takes a configuration, as load_config returns it, and not {config!r:.60}")
    with signals.handle_signals(), run_lock.released_at_end():
        run, tokenizer = setup(config)
        with close_at_end(run):
            train_loop(run)
            adapter = run.folder / "adapter"
            checkpoint.export(adapter, run.policy, tokenizer)
            run.log.info(describe_best(run) + format_summary(run.folder, adapter, config.selecting_set))
    return run.folder


@contextmanager
def close_at_end(run: Run) -> Iterator[None]:
    """Close the log and the rewards' processes and stop the watchdog when the block ends.

    If a signal ended it, log how to resume.
    """
    try:
        yield
    except signals.Interrupted as signal:
        manner = "after writing a checkpoint" if signal.is_saved else "without a checkpoint of its last step"
        run.log.info(f"stopped by {signal} {manner}; {checkpoint.describe_resume(run.folder)}")
        raise
    finally:
        run.log.close()
        functions = [*(reward.function for reward in run.rewards), run.eval_reward, *run.eval_rewards.values()]
        close_rewards({id(function): function for function in functions}.values())
        if run.environments is not None:
            run.environments.close()
        watchdog.stop()
        gc.unfreeze()


def describe_best(run: Run) -> str:
    """Return a line about the checkpoint that checkpoint.keep_best has kept; "" if that is off."""
    selection = run.selection
    if not run.config.checkpoint.keep_best or selection.best_step is None:
        return ""
    folder = run.folder / "checkpoints"
    is_kept = checkpoint.find_best_step(folder) == selection.best_step
    place = f": {folder / checkpoint.BEST}" if is_kept else ", whose checkpoint could not be kept"
    name = run.config.selecting_set
    measured = f" on {name}" if name else ""
    after = quantify(selection.best_step, "step")
    return f"best:   accuracy {selection.best_accuracy:.1%}{measured} after {after}{place}\n"


def format_summary(folder: Path, adapter: Path, selecting: str = "") -> str:
    """Return the last lines of the log: accuracy before and after training, and the adapter's folder.

    `selecting` names the evaluation set that selects.
    """
    path, rows, lines = folder / "evaluation.jsonl", [], []
    if path.exists():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if rows:
        for title, row in (("before:", rows[0]), ("after: ", rows[-1])):
            for name, result in split_sets(row).items():
                label = f" {label_set(name, selecting)}:" if name else ""
                lines.append(f"{title}{label} {describe_evaluation(result)}")
    return "\n".join([*lines, f"adapter: {adapter}"])
