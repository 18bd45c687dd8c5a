"""The `sft` command: supervised fine-tuning on the answers in the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo_core.commands.train import announce, run_job
from grpo_core.config.files import load_job
from grpo_core.config.shipped import find_configs
from grpo_core.data.forms import recognise
from grpo_core.monitor.progress import print_note


def run_sft(config: Path | None, overrides: Sequence[str] = ()) -> int:
    """Fine-tune on the data's own answers and return the exit code of `run_job`.

    Raises:
        ConfigError: the configuration is wrong, or the run cannot be set up with it.
    """
    default = find_configs() / "tiny_sft.yaml"
    loaded = load_job(config, overrides, default=default, notify=print_note, supervised=True, recognise=recognise)
    announce(loaded)
    from grpo_core.training import sft  # takes seconds, so a mistake in the configuration is reported before it

    return run_job(sft.run_sft, loaded)
