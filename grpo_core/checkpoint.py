"""What is kept on disk: the run folder, checkpoints, the adapter.

A checkpoint is a folder step-NNNNNN that is whole or not there.
Every rank writes its engine state into a folder with a working name; when all have, the main rank adds meta.json and
gives the folder its name, which is atomic. The newest folder with a proper name is the one to go on from. Besides
the engine's there are two states: a reference that moves, and coefficients that adapt (in meta.json). Nothing else
needs saving: the batch, the sampling noise and the dropout noise are functions of (seed, step).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from grpo_core import distributed
from grpo_core.config import RunConfig
from grpo_core.control import Control
from grpo_core.policy import Policy
from grpo_core.run import Run
from grpo_core.schema import ConfigError

REFERENCE = "reference.pt"  # only where the reference moves

# what may differ between a checkpoint and the run that goes on from it
FREE = ("resume", "preset", "name", "output_dir", "log", "checkpoint", "trainer.num_steps", "trainer.epochs", "sft")
FREE += ("evaluation.every", "evaluation.batch_size", "evaluation.reward")  # not num_tasks: it may hold rows out


def run_folder(config: RunConfig) -> tuple[Path, Path | None]:
    """The folder of this run and the checkpoint to go on from, the same on all ranks. Nothing is made yet.

    A new run takes <output_dir>/<name>, or <name>-2, -3, ... where that exists: no run overwrites another. With
    resume: auto the newest of these that has a checkpoint is continued.
    """
    base = Path(config.output_dir) / config.name
    folder, latest = base, None
    if distributed.is_main():
        number, found = 1, []
        while folder.exists():
            found = steps(folder / "checkpoints")[-1:] or found
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
        if config.resume is not None and found:
            latest = found[0]
            folder = latest.parent.parent
    return distributed.from_main((folder, latest))


def save(run: Run, next_step: int, control: Control) -> None:
    """Write <run folder>/checkpoints/step-<next_step> and keep the newest `checkpoint.keep`. A collective."""
    folder, config = run.folder / "checkpoints", run.config
    final = folder / f"step-{next_step:06d}"
    working = folder / f".{final.name}.part"
    if distributed.is_main():
        for leftover in folder.glob(".step-*.part"):
            shutil.rmtree(leftover)
        working.mkdir(parents=True)
    distributed.barrier()
    run.engine.save(working)
    distributed.barrier()  # every shard is written now
    if distributed.is_main():
        if (reference := run.policy.reference_state()) is not None:
            torch.save([value.cpu() for value in reference], working / REFERENCE)
        meta = {"next_step": next_step, "world_size": distributed.world_size()}
        meta |= {"control": asdict(control), "config": asdict(config)}
        (working / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in working.rglob("*"):
            _sync(path)
        if final.exists():  # the same step of a run that was resumed from an older checkpoint
            shutil.rmtree(final)
        os.replace(working, final)
        _sync(folder)
        for old in steps(folder)[: -config.checkpoint.keep]:
            shutil.rmtree(old)
    distributed.barrier()


def steps(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*"))


def read_meta(checkpoint: Path, config: RunConfig) -> tuple[int, Control]:
    """The step that a run continuing from `checkpoint` takes first, and its control.

    Raises:
        ConfigError: the checkpoint is of another configuration, whose differing keys are named, or number of processes.
    """
    meta = json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))
    if meta["world_size"] != distributed.world_size():
        raise ConfigError(
            f"{checkpoint} was written by {meta['world_size']} processes; "
            f"resume with as many, not {distributed.world_size()}"
        )
    then, now = flatten(meta["config"]), flatten(asdict(config))
    differing = [
        key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key) and not key.startswith(FREE)
    ]
    if differing:
        shown = ", ".join(f"{key} ({then.get(key)!r} then, {now.get(key)!r} now)" for key in differing[:5])
        raise ConfigError(
            f"{checkpoint} is of another configuration: {shown}; start under another name instead of resuming"
        )
    return meta["next_step"], Control(**meta["control"])


def load(checkpoint: Path, run: Run) -> None:
    """Put the weights, the optimizer and a reference that moves back to where they were. A collective."""
    run.engine.load(checkpoint)
    if (checkpoint / REFERENCE).exists():
        run.policy.load_reference(torch.load(checkpoint / REFERENCE, weights_only=True))


def export(folder: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the adapter (or the model, where there is none) and its tokenizer for others to load. A collective."""
    if distributed.is_main():
        policy.save(folder)
        tokenizer.save_pretrained(folder)
    distributed.barrier()


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for name, value in tree.items() for k, v in flatten(value, f"{prefix}.{name}".lstrip(".")).items()}


def _sync(path: Path) -> None:
    """Make sure that it is on the disk and not only in a cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
