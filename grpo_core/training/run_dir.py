"""Where a run lies, whether it may be written there, and which checkpoint it goes on from."""

from __future__ import annotations

import tempfile
from pathlib import Path

from grpo_core.config.sections import RunConfig
from grpo_core.distributed import ranks
from grpo_core.schema import ConfigError
from grpo_core.training.checkpoint import damage, steps


def run_folder(config: RunConfig) -> tuple[Path, Path | None, list[str]]:
    """The folder of this run, the checkpoint to go on from, and what is to be said of damaged ones; on all ranks.

    That is <output_dir>/<name>, or with resume: FOLDER that one. A run that lies there is continued with resume: auto
    (or force), and removed with overwrite, when this one starts. Nothing is made yet. A collective.

    Raises:
        ConfigError: a run lies there and neither is asked for, there are checkpoints and all are damaged, or nothing
            can be written there.
    """
    found: tuple[Path, Path | None, list[str]] | str = ""
    if ranks.is_main():
        try:
            found = _find(config)
            _try_writing(found[0], f"the run folder {found[0]} (output_dir and name)")
        except ConfigError as error:
            found = str(error)
    found = ranks.broadcast_from_main(found)
    if isinstance(found, str):
        raise ConfigError(found)
    return found


def _find(config: RunConfig) -> tuple[Path, Path | None, list[str]]:
    named = config.resume in (None, "auto", "force")
    folder, damaged = Path(config.output_dir) / config.name if named else Path(config.resume), []
    if config.resume is None:
        if holds_a_run(folder) and not config.overwrite:
            raise ConfigError(
                f"{folder} holds a run already; resume=auto goes on with it, overwrite=true puts this one in its "
                f"place, and name=... starts another beside it"
            )
        return folder, None, []
    for checkpoint in reversed(steps(folder / "checkpoints")):
        problem = damage(checkpoint)
        if problem is None:
            return folder, checkpoint, damaged
        damaged.append(f"{checkpoint} is damaged ({problem}): going on from the one before")
    if damaged:
        raise ConfigError(f"every checkpoint in {folder} is damaged: {problem}; start under another name")
    return folder, None, []


def check_output(folder: Path, key: str) -> None:
    """Raise ConfigError where a folder that `key` names could not be made or written; leaves nothing. A collective."""
    problem = ""
    if ranks.is_main():
        try:
            _try_writing(folder, f"{key} is {folder}, which")
        except ConfigError as error:
            problem = str(error)
    if problem := ranks.broadcast_from_main(problem):
        raise ConfigError(problem)


def _try_writing(folder: Path, what: str) -> None:
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if new:
            folder.rmdir()
    except OSError as error:
        raise ConfigError(f"{what} cannot be written: {error.strerror}") from None


def holds_a_run(folder: Path) -> bool:
    """Whether a step was taken there."""
    metrics = folder / "metrics.jsonl"
    return bool(steps(folder / "checkpoints")) or (metrics.exists() and metrics.stat().st_size > 0)
