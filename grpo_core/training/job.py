"""A whole training job: set up, train, write the adapter, say what came of it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_core.config.sections import RunConfig
from grpo_core.distributed import signals, watchdog
from grpo_core.monitor.run_log import describe_evaluation
from grpo_core.training import checkpoint
from grpo_core.training.run import Run
from grpo_core.training.setup import setup
from grpo_core.training.trainer import train as train_loop


def train(config: RunConfig) -> Path:
    """Train as `config` says; returns the run folder, in which the adapter and everything else is.

    Raises:
        ConfigError: something that cannot be run; nothing was written.
        Interrupted: a signal asked for an end, and there is a checkpoint.
        RunFailed: the run could not go on.
    """
    with signals.handle_signals():
        run, tokenizer = setup(config)
        with closing(run):
            train_loop(run)
            adapter = run.folder / "adapter"
            checkpoint.export(adapter, run.policy, tokenizer)
            run.log.info(summary(run.folder, adapter))
    return run.folder


@contextmanager
def closing(run: Run) -> Iterator[None]:
    """Inside, a run goes to its end; afterwards nothing of it is left running in this process."""
    try:
        yield
    except signals.Interrupted as signal:
        run.log.info(f"stopped by {signal} with a checkpoint; resume={run.folder} goes on")
        raise
    finally:
        run.log.close()
        watchdog.stop()
        gc.unfreeze()


def summary(folder: Path, adapter: Path) -> str:
    """The last lines: accuracy before and after, and where the adapter is."""
    path, lines = folder / "evaluation.jsonl", []
    if path.exists() and (rows := [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]):
        lines = [f"before: {describe_evaluation(rows[0])}", f"after:  {describe_evaluation(rows[-1])}"]
    return "\n".join([*lines, f"adapter: {adapter}"])
