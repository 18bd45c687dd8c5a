"""The `train` command: run a training job and return its exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_core.commands.errors import print_error
from grpo_core.commands.gc_pause import pause_gc
from grpo_core.config.files import load
from grpo_core.config.sections import RunConfig
from grpo_core.distributed import ranks, signals


def run_train(config: Path, overrides: Sequence[str] = ()) -> int:
    """Train with GRPO and return the exit code of `run_job`.

    Raises:
        ConfigError: the configuration is wrong, or the run cannot be set up with it.
    """
    loaded = load(config, overrides)
    with pause_gc():
        from grpo_core.training import job  # takes seconds, so a mistake in the configuration is reported before it

    return run_job(job.train, loaded)


def run_job(job: Callable[[RunConfig], Any], config: RunConfig) -> int:
    """Run `job(config)`. Return 0, 3 if the run could not go on, or 128 + n if signal n stopped it."""
    ranks.die_with_launcher()
    try:
        job(config)
    except signals.Interrupted as signal:
        return signal.exit_code
    except signals.RunFailed as error:
        print_error(str(error))
        return 3
    ranks.shutdown()
    return 0
