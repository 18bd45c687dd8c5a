"""Find a run's folder and the checkpoint to resume from, check that it can be written, and discard what comes later."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from grpo_core.config.paths import split_resume
from grpo_core.config.sections import RunConfig
from grpo_core.counts import quantify
from grpo_core.distributed import ranks
from grpo_core.environments import recording
from grpo_core.monitor import run_lock
from grpo_core.schema import ConfigError
from grpo_core.scoring.kept_answers import drop_answers_from
from grpo_core.training.checkpoint import BEST, describe_damage, error_text, find_best_step, list_checkpoints

STEP = re.compile(r"step-(\d+)")  # in the names of checkpoints and of saved batches


def find_run_folder(config: RunConfig) -> tuple[Path, Path | None, list[str]]:
    """Return the run folder, the checkpoint to resume from, and a warning for each damaged checkpoint.

    The folder is <output_dir>/<name>, or FOLDER with resume: FOLDER or resume: FOLDER/checkpoints/step-N. If it holds a
    run, resume: auto (or force) continues that run, and overwrite removes it when the new run starts. This function
    creates and removes nothing.
    A collective: every rank gets the same result.

    Raises:
        ConfigError: another process writes the run; the folder holds a run and neither resume nor overwrite is set; all
            of its checkpoints are damaged, or the one that resume names; or the folder cannot be written.
    """
    result: tuple[Path, Path | None, list[str]] | str = ""  # a string is the message of an error
    if ranks.is_main():
        try:
            result = _find_on_main(config)
            _check_writable_on_main(result[0], f"the run folder {result[0]} (output_dir and name)")
        except ConfigError as error:
            result = str(error)
        except OSError as error:
            result = f"the run folder {error.filename} (output_dir and name) cannot be read: {error.strerror}"
    result = ranks.broadcast_from_main(result)
    if isinstance(result, str):
        raise ConfigError(result)
    return result


def _find_on_main(config: RunConfig) -> tuple[Path, Path | None, list[str]]:
    folder, named = Path(config.output_dir) / config.name, None
    if config.resume not in (None, "auto", "force"):
        folder, named = split_resume(config.resume) or (Path(config.resume), None)
    run_lock.check_not_written(folder)
    if config.overwrite and folder.is_symlink():
        raise ConfigError(
            f"overwrite is true, but {folder} is a symbolic link; remove the link, or start a run with another name"
        )
    if config.resume is None:
        if holds_run(folder) and not config.overwrite:
            raise ConfigError(
                f"{folder} already holds a run; use resume=auto to continue it, overwrite=true to replace it, or "
                f"another name to start a new run beside it"
            )
        return folder, None, []
    if named:
        if problem := describe_damage(named):
            raise ConfigError(f"resume is {config.resume!r}, but that checkpoint is damaged ({problem}); name another")
        return folder, named, []
    warnings = []
    for checkpoint in reversed(list_checkpoints(folder / "checkpoints")):
        problem = describe_damage(checkpoint)
        if problem is None:
            return folder, checkpoint, warnings
        warnings.append(f"{checkpoint} is damaged ({problem}); the checkpoint before it is used")
    if warnings:
        raise ConfigError(f"every checkpoint in {folder} is damaged: {problem}; start a new run with another name")
    return folder, None, []


def check_writable(folder: Path, key: str) -> None:
    """Raise ConfigError if `folder`, the value of `key`, cannot be written, or belongs to a run that is being written.

    Leave no trace. A collective.
    """
    problem = ""
    if ranks.is_main():
        try:
            run_lock.check_not_written(folder, key)
            _check_writable_on_main(folder, f"{key} {folder}" if key.startswith("-") else f"{key} is {folder}, which")
        except ConfigError as error:
            problem = str(error)
    if problem := ranks.broadcast_from_main(problem):
        raise ConfigError(problem)


def _check_writable_on_main(folder: Path, subject: str) -> None:
    if problem := describe_unwritable(folder, keep_parents=True):
        raise ConfigError(f"{subject} cannot be written: {problem}")


def describe_unwritable(folder: Path, *, keep_parents: bool = False) -> str | None:
    """Return why no file can be written to `folder`, which may not exist yet, or None.

    Leave no trace, or with `keep_parents` the folders above it: several runs that start at once may need them.
    """
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    problem = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = error_text(error)
    for path in new[:1] if keep_parents and problem is None else new:
        with contextlib.suppress(OSError):
            path.rmdir()
    return problem


def holds_run(folder: Path) -> bool:
    """Return True if `folder` holds a run that has taken a step."""
    metrics = folder / "metrics.jsonl"
    return bool(list_checkpoints(folder / "checkpoints")) or (metrics.exists() and metrics.stat().st_size > 0)


def describe_later(folder: Path, step: int) -> list[str]:
    """Return the checkpoints after `step` as a list that is empty or has one noun phrase."""
    names = [path.name for path in list_checkpoints(folder / "checkpoints") if _read_step(path) > step]
    return [f"the {'checkpoint' if len(names) == 1 else 'checkpoints'} {', '.join(names)}"] if names else []


def discard_later(folder: Path, step: int) -> list[str]:
    """Remove what a run has written after its first `step` steps.

    These are checkpoints, saved batches, and recorded answers of a judge and of environments.

    Return what was removed, as noun phrases. The newest go first, so that what is left is a run at every moment. A
    collective.

    Raises:
        ConfigError: something cannot be removed.
    """
    removed: list[str] | str = ""  # a string is the message of an error
    if ranks.is_main():
        try:
            removed = _discard_on_main(folder, step)
        except OSError as error:
            removed = (
                f"{error.filename}, which comes after {quantify(step, 'step')}, cannot be removed: {error.strerror}"
            )
    removed = ranks.broadcast_from_main(removed)
    if isinstance(removed, str):
        raise ConfigError(removed)
    return removed


def _discard_on_main(folder: Path, step: int) -> list[str]:
    removed, checkpoints = describe_later(folder, step), folder / "checkpoints"
    for path in reversed(list_checkpoints(checkpoints)):
        if _read_step(path) > step:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    if os.path.lexists(checkpoints / BEST) and find_best_step(checkpoints) is None:
        (checkpoints / BEST).unlink()
        removed.append("the link checkpoints/best")
    batches = [path for path in (folder / "batches").glob("step-*") if _read_step(path) >= step]
    for path in batches:
        path.unlink()
    if batches:
        removed.append(quantify(len({_read_step(path) for path in batches}), "saved batch", "saved batches"))
    if answers := drop_answers_from(folder / "judge", step):
        removed.append(quantify(answers, "answer of the judge", "answers of the judge"))
    if steps := recording.drop_recordings(folder / recording.FOLDER, lambda recorded: recorded < step):
        removed.append(f"the answers of environments of {quantify(steps, 'step')}")
    return removed


def _read_step(path: Path) -> int:
    """Return the step in the name of a file or folder, -1 without one."""
    match = STEP.match(path.name)
    return int(match[1]) if match else -1
