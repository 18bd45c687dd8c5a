"""Resume a run: find its folder and newest sound checkpoint before the model loads, and restore the run afterwards.

A run that was killed at any place and resumed is bitwise equal to one that never stopped: the batch, the sampling noise
and the dropout noise of a step are functions of (seed, step), and checkpoint.py saves everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_core.config.paths import split_resume
from grpo_core.config.sections import LoraConfig, RunConfig
from grpo_core.counts import quantify
from grpo_core.monitor import run_lock
from grpo_core.schema import ConfigError
from grpo_core.training import checkpoint, run_dir
from grpo_core.training.control import Control, first_control
from grpo_core.training.run import Run


@dataclass(frozen=True)
class RunStart:
    """The state from which a run starts: its folder and, if it resumes, its checkpoint."""

    folder: Path
    checkpoint: Path | None
    meta: dict[str, Any]  # the checkpoint's metadata; empty for a new run
    overridden: list[str]  # configuration keys that differ from the checkpoint's (resume: force)
    warnings: list[str]  # one for each damaged checkpoint
    goes_back: bool = False  # resume names the checkpoint, so what the run has written after it is discarded

    @property
    def step(self) -> int:
        """Index of the first step to take: 0 for a new run."""
        return self.meta.get("next_step", 0)

    def control(self, config: RunConfig) -> Control:
        """Return the coefficients of the next step."""
        return Control(**self.meta["control"]) if self.checkpoint else first_control(config.loss)

    def lora(self, config: RunConfig) -> LoraConfig:
        """Return the section lora, without the adapter to start from if a checkpoint takes its place."""
        return replace(config.lora, path=None) if self.checkpoint else config.lora


def find_and_lock_start(config: RunConfig, job: str = "train") -> RunStart:
    """Find where a run starts, as `look_up_start`, and lock its folder. A collective.

    Raises:
        ConfigError: see `look_up_start` and `run_lock.acquire`.
    """
    start = look_up_start(config, job)
    run_lock.acquire(start.folder)
    return start


def look_up_start(config: RunConfig, job: str = "train") -> RunStart:
    """Find the run folder and the checkpoint from which `config` resumes. A collective.

    `job` is the command that trains: train or sft.

    Raises:
        ConfigError: see `run_dir.find_run_folder` and `checkpoint.read_meta`.
    """
    folder, latest, warnings = run_dir.find_run_folder(config)
    meta, overridden = checkpoint.read_meta(latest, config, job) if latest else ({}, [])
    is_path = config.resume not in (None, "auto", "force")
    goes_back = is_path and (split_resume(str(config.resume)) or (folder, None))[1] is not None
    return RunStart(folder, latest, meta, overridden, warnings, goes_back)


def check_num_steps(start: RunStart, num_steps: int) -> None:
    """Check that the run can go on to `num_steps` steps, with the schedule of the learning rate for that number.

    Raises:
        ConfigError: it has taken more steps, or its schedule has brought the learning rate to 0.
    """
    if start.checkpoint and num_steps < start.step:
        raise ConfigError(
            f"trainer.num_steps is {num_steps}, but the run in {start.folder} has taken "
            f"{quantify(start.step, 'step')}; it must be at least {start.step}, or train a shorter run from the start "
            f"under another name"
        )
    schedule = start.meta.get("engine", {}).get("schedule", {})
    has_ended = any(schedule.get("base_lrs", [1.0])) and not any(schedule.get("_last_lr", [1.0]))
    if start.step and num_steps > start.step and has_ended:
        model = start.folder / "model"  # of sft without an adapter
        source = f"its model ({model})" if model.is_dir() else _advise_export(start.folder)
        raise ConfigError(
            f"trainer.num_steps is {num_steps}, but the run in {start.folder} has finished its "
            f"{quantify(start.step, 'step')}, and "
            f"its learning rate is 0; start a new run from {source}, or train a longer run from the start under "
            f"another name"
        )


def _advise_export(folder: Path) -> str:
    return f"its exported model (python -m grpo_core export {folder})"


def restore_run(run: Run, start: RunStart) -> None:
    """Restore the run's checkpoint, if there is one, and log notes and warnings about it and the model's code.

    Raises:
        ConfigError: see `checkpoint.load`.
    """
    config, latest = run.config, start.checkpoint
    run.selection.restore(start.meta.get("selection"), config)
    if config.model.trust_remote_code:
        run.log.info(
            f"model.trust_remote_code is on: this process runs Python code that belongs to {config.model.path}"
        )
    for sentence in start.warnings:
        run.log.info(f"warning: {sentence}")
    if latest:
        overridden = start.overridden + checkpoint.load(latest, start.meta, run)
        discarded = run_dir.discard_later(run.folder, run.start_step) if start.goes_back else []
        rows = run.log.drop_later_rows()
        checkpoint.restore_best(run)
        run.log.info(f"resumed from {latest} after {quantify(run.start_step, 'step')}")
        if start.goes_back:
            discarded += [f"the rows of {quantify(rows, 'step')}"] if rows else []
            run.log.info(f"discarded, because resume names this checkpoint: {', '.join(discarded) or 'nothing'}")
        if overridden:
            run.log.info(
                f"warning: resume=force ignored these differences from the checkpoint: {', '.join(overridden)}"
            )
        return
    run.log.drop_later_rows()
    if config.resume:
        run.log.info(f"resume is {config.resume}, but {run.folder} has no checkpoint; the run starts with step 1")
