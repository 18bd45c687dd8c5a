"""The `train` command: run a training job and return its exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_core.commands.errors import print_error
from grpo_core.commands.gc_pause import pause_gc
from grpo_core.config.files import load_job
from grpo_core.config.paths import split_resume
from grpo_core.config.sections import RunConfig
from grpo_core.data.forms import recognise
from grpo_core.distributed import ranks, signals
from grpo_core.monitor.progress import print_note, print_on_main


def run_train(config: Path | None, overrides: Sequence[str] = ()) -> int:
    """Train with GRPO and return the exit code of `run_job`.

    Raises:
        ConfigError: the configuration is wrong, or the run cannot be set up with it.
    """
    loaded = load_job(config, overrides, notify=print_note, recognise=recognise)
    if ranks.RUN_FOLDER_VARIABLE not in os.environ:  # else the launcher has said so
        announce(loaded)
    with pause_gc():
        from grpo_core.training import job  # takes seconds, so a mistake in the configuration is reported before it

    return run_job(job.train, loaded)


def announce(config: RunConfig) -> None:
    """Print at once which run is started; the imports before the next line take seconds."""
    named = split_resume(config.resume) if config.resume not in (None, "auto", "force") else None
    folder = named[0] if named else Path(config.output_dir) / config.name
    print_on_main(f"run {folder}: loading")


def run_job(job: Callable[[RunConfig], Any], config: RunConfig) -> int:
    """Run `job(config)`. Return 0, 3 if the run could not go on, or 128 + n if signal n stopped it.

    If a collective fails because another rank has ended, LOST_RANK_CODE is returned. That rank's launcher names it, and
    the traceback of this rank, a consequence, is printed with log.verbose only.
    """
    ranks.die_with_launcher()
    try:
        job(config)
    except signals.Interrupted as signal:
        return signal.exit_code
    except signals.RunFailed as error:
        print_error(str(error))
        return 3
    except RuntimeError as error:
        if not ranks.is_lost_rank(error):
            raise
        if config.log.verbose:
            traceback.print_exc()
        if ranks.RUN_FOLDER_VARIABLE not in os.environ:
            print(f"grpo_core: rank {ranks.rank()} lost its connection to another rank", file=sys.stderr)
        return ranks.LOST_RANK_CODE
    ranks.shutdown()
    return 0
