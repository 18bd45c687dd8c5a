"""What is kept on disk: the run folder, checkpoints, the adapter.

A checkpoint is a folder step-NNNNNN that is whole or not there: the main rank writes it under a working name, syncs it,
and gives it its name, which is atomic. It holds tensors as safetensors and numbers as JSON, so nothing is unpickled,
and SHA256SUMS over both (`sha256sum -c` reads it). Nothing in it depends on the number of processes. The batch, the
sampling noise and the dropout noise are functions of (seed, step) and need no saving.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_core.config.sections import RunConfig
from grpo_core.distributed import ranks
from grpo_core.model.policy import Policy
from grpo_core.schema import ConfigError
from grpo_core.training.control import Control
from grpo_core.training.run import Run

TENSORS, META, SUMS = "tensors.safetensors", "meta.json", "SHA256SUMS"

# what may differ between a checkpoint and the run that goes on from it
FREE = (
    "resume",
    "overwrite",
    "preset",
    "name",
    "output_dir",
    "log",
    "checkpoint",
    "debug",
    "trainer.num_steps",
    "trainer.epochs",
    "sft.output",
    "sft.save_precision",
)
FREE += (
    "trainer.max_skipped_steps",
    "trainer.max_restarts",
    "trainer.reward_timeout",
    "trainer.max_failed_rewards",
    "trainer.hang_timeout",
    "alerts",
    "trainer.tokens_per_micro_batch",
    "model.gradient_checkpointing",
    "engine.deepspeed",
)
FREE += ("sampling.rows_at_once", "sampling.decoder")
FREE += ("evaluation.every", "evaluation.batch_size", "evaluation.reward")  # not num_tasks: it may hold rows out


def steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None where nothing is."""
    try:
        lines = (checkpoint / SUMS).read_text(encoding="utf-8").splitlines()
        wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        if sorted(wanted) != sorted((TENSORS, META)):
            return f"{SUMS} does not name its files"
        for name, digest in wanted.items():
            if _digest(checkpoint / name) != digest:
                return f"{name} is not what was written"
    except (OSError, UnicodeDecodeError) as error:
        return in_words(error)
    return None


def save(run: Run, next_step: int, control: Control) -> bool:
    """Write <run folder>/checkpoints/step-<next_step> and keep the newest `checkpoint.keep`. A collective.

    Returns whether it was written. Where it cannot be (a full disk), the ones before stay and the log says why.
    """
    problem = None
    tensors = on_main(run.engine.tensors())
    if ranks.is_main():
        for i, value in enumerate(run.policy.reference_state() or ()):
            tensors[f"reference/{i}"] = value.cpu()
        meta = {"next_step": next_step, "world_size": ranks.world_size(), "control": asdict(control)}
        meta |= {"engine": run.engine.numbers(), "fingerprints": fingerprints(run), "config": asdict(run.config)}
        folder = run.folder / "checkpoints"
        try:
            if why := run.log.flush():  # a checkpoint stands for rows that are there
                raise OSError(why)
            _write(folder, f"step-{next_step:06d}", tensors, meta)
            for old in steps(folder)[: -run.config.checkpoint.keep]:
                shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            problem = in_words(error)
    problem = ranks.broadcast_from_main(problem)
    if problem:
        run.log.info(f"warning: the checkpoint after {next_step} steps could not be written ({problem}); going on")
    return problem is None


def _write(folder: Path, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    working = folder / f".{name}.part"
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    try:
        working.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, working / TENSORS)
        (working / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        sums = "".join(f"{_digest(working / part)}  {part}\n" for part in (TENSORS, META))
        (working / SUMS).write_text(sums, encoding="utf-8")
        for path in (*working.iterdir(), working):
            _sync(path)
        if (folder / name).exists():  # the same step of a run that was resumed from an older checkpoint
            os.replace(folder / name, folder / f".{name}.old")
        os.replace(working, folder / name)
        _sync(folder)
        shutil.rmtree(folder / f".{name}.old", ignore_errors=True)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise


def read_meta(checkpoint: Path, config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """What `save` wrote beside the tensors, and the keys of the configuration that differ (with resume: force).

    Raises:
        ConfigError: the checkpoint is of another configuration, whose differing keys are named.
    """
    meta = json.loads((checkpoint / META).read_text(encoding="utf-8"))
    then, now = flatten(meta["config"]), flatten(asdict(config))
    differing = [
        f"{key} ({then.get(key)!r} then, {now.get(key)!r} now)"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not key.startswith(FREE)
    ]
    if differing and config.resume != "force":
        raise ConfigError(
            f"{checkpoint} is of another configuration: {', '.join(differing[:5])}; "
            f"start under another name, or go on regardless with resume=force"
        )
    return meta, differing


def load(checkpoint: Path, meta: dict[str, Any], run: Run) -> list[str]:
    """Put weights, optimizer and a reference that moves back to where they were; returns what force overrode.

    Raises:
        ConfigError: other data or another model under the same name, or weights of other shapes.
    """
    then, now = meta["fingerprints"], fingerprints(run)
    differing = [f"{key} (other than then)" for key in now if then.get(key) != now[key]]
    if differing and run.config.resume != "force":
        raise ConfigError(
            f"{checkpoint} is of another run: {' and '.join(differing)}; "
            f"start under another name, or go on regardless with resume=force"
        )
    tensors = load_file(checkpoint / TENSORS)
    reference = [tensors.pop(f"reference/{i}") for i in range(sum(name.startswith("reference/") for name in tensors))]
    run.engine.load(tensors, meta["engine"])
    if reference and run.policy.reference_state() is not None:
        run.policy.load_reference(reference)
    return differing


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint by their names in the model, in float32."""
    tensors = load_file(checkpoint / TENSORS)
    return {name.removeprefix("weight/"): value for name, value in tensors.items() if name.startswith("weight/")}


def fingerprints(run: Run) -> dict[str, str]:
    """What a path in the configuration stands for: short digests of the rows and of the frozen weights."""
    rows, weights = hashlib.sha256(), hashlib.sha256()
    for task in run.tasks.tasks:
        rows.update(json.dumps([task.prompt_ids, task.columns], default=str).encode())
    for name, weight in run.policy.model.named_parameters():
        if not weight.requires_grad:
            first = weight.detach().flatten()[:8].to(torch.bfloat16).tolist()  # the same in every precision
            weights.update(f"{name} {tuple(weight.shape)} {first}".encode())
    return {"the rows of data.path": rows.hexdigest()[:16], "the weights of model.path": weights.hexdigest()[:16]}


def export(folder: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the adapter (or the model, where there is none) and its tokenizer for others to load. A collective."""
    if ranks.is_main():
        policy.save(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form, which nobody has filled in
        tokenizer.save_pretrained(folder)
    ranks.barrier()


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for name, value in tree.items() for k, v in flatten(value, f"{prefix}.{name}".lstrip(".")).items()}


def in_words(error: Exception) -> str:
    """An error of the file system, without its number."""
    return (getattr(error, "strerror", None) or str(error)).strip()


def on_main(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """All of them on the main rank's CPU, nothing elsewhere: every rank takes part in making each."""
    kept = {}
    for name, value in tensors:
        if ranks.is_main():
            kept[name] = value.cpu()
    return kept


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _sync(path: Path) -> None:
    """Make sure that it is on the disk and not only in a cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
