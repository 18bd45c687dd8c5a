"""The `sft` command: supervised fine-tuning on the answers in the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo_core.commands.train import run_job
from grpo_core.config.files import load


def run_sft(config: Path, overrides: Sequence[str] = ()) -> int:
    """Fine-tune on the data's own answers and return the exit code of `run_job`.

    Raises:
        ConfigError: the configuration is wrong, or the run cannot be set up with it.
    """
    loaded = load(config, overrides, supervised=True)
    from grpo_core.training import sft  # takes seconds, so a mistake in the configuration is reported before it

    return run_job(sft.run_sft, loaded)
