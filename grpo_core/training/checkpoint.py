"""Write and read checkpoints, and export the trained adapter or model.

A checkpoint is a folder step-NNNNNN. The main rank writes it under a temporary name, syncs it to disk and renames it,
which is atomic: a checkpoint is complete or absent. It holds tensors as safetensors and numbers as JSON, so loading
unpickles nothing, and SHA256SUMS over both, which `sha256sum -c` checks. Nothing in it depends on the number of
processes. The outcomes of every prompt so far are among the tensors. Batches and noise need no saving: a batch is a
function of (seed, step) and of these outcomes, the noise of sampling and dropout one of (seed, step). With
checkpoint.keep_best the link `best` names the checkpoint of the best evaluation, which is kept beside the newest.
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

from grpo_core.config.files import flatten
from grpo_core.config.sections import RunConfig, SourceConfig
from grpo_core.counts import quantify
from grpo_core.data.pass_rates import PREFIX
from grpo_core.distributed import ranks
from grpo_core.environments import recording
from grpo_core.model.finite_weights import check_finite
from grpo_core.model.policy import Policy
from grpo_core.monitor.file_modes import apply_umask
from grpo_core.schema import ConfigError
from grpo_core.scoring.judge import CONNECTION
from grpo_core.scoring.judge import NAME as JUDGE
from grpo_core.training.control import Control
from grpo_core.training.run import Run

TENSORS, META, SUMS = "tensors.safetensors", "meta.json", "SHA256SUMS"
BEST = "best"  # link to the checkpoint with the best accuracy

# Prefixes of the configuration keys that may differ between a checkpoint and the run that resumes from it, because they
# change no number of a step. evaluation.num_tasks is not among them: it can change which rows are held out.
MAY_DIFFER = (
    *("resume", "overwrite", "preset", "name", "output_dir", "log", "checkpoint", "debug", "alerts"),
    *("trainer.num_steps", "trainer.epochs", "trainer.tokens_per_micro_batch"),
    *("trainer.max_skipped_steps", "trainer.max_restarts", "trainer.max_failed_rewards", "trainer.early_stopping"),
    *("trainer.reward_timeout", "trainer.hang_timeout", "environment.timeout"),
    *("model.gradient_checkpointing", "engine.deepspeed", "sampling.rows_at_once", "sampling.decoder"),
    *("evaluation.every", "evaluation.batch_size", "evaluation.reward", "sft.output", "sft.save_precision"),
    "data.max_unjudged",
)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())


def describe_resume(run_folder: Path) -> str:
    """Return from where a run that has ended early can be resumed."""
    checkpoints = list_checkpoints(run_folder / "checkpoints")
    if not checkpoints:
        return "no checkpoint has been written"
    return f"resume={run_folder} continues the run from {checkpoints[-1].name}"


def find_best_step(folder: Path) -> int | None:
    """Return the step of the checkpoint in `folder` that the link `best` names, or None without one."""
    link = folder / BEST
    step = os.readlink(link).removeprefix("step-") if link.is_symlink() else ""
    return int(step) if step.isdecimal() and (folder / f"step-{step}").exists() else None


def describe_damage(checkpoint: Path) -> str | None:
    """Return a description of the damage to a checkpoint's files, or None if they are intact."""
    try:
        lines = (checkpoint / SUMS).read_text(encoding="utf-8").splitlines()
        digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        if sorted(digests) != sorted((TENSORS, META)):
            return f"{SUMS} does not list exactly {TENSORS} and {META}"
        for name, digest in digests.items():
            if _digest(checkpoint / name) != digest:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or SUMS).name} cannot be read: {error_text(error)}"
    except UnicodeDecodeError:
        return f"{SUMS} is not UTF-8 text"
    return None


def is_checkpoint(path: Path) -> bool:
    """Return True if `path` is the folder of a checkpoint in a run folder, whether or not its files are complete."""
    return path.is_dir() and (path.parent.parent / "config.yaml").exists() and path in list_checkpoints(path.parent)


def save(run: Run, next_step: int, control: Control, good_step: int | None = None) -> bool:
    """Write <run folder>/checkpoints/step-<next_step> and delete others (`prune`). A collective.

    Return True if the checkpoint was written. If it cannot be written (a full disk), the earlier checkpoints stay and
    a warning with the reason is logged.
    """
    problem = None
    tensors = copy_to_main(run.engine.tensors())
    if ranks.is_main():
        for i, value in enumerate(run.policy.reference_state() or ()):
            tensors[f"reference/{i}"] = value.cpu()
        if run.pass_rates is not None:
            tensors |= run.pass_rates.tensors()
        meta = {"next_step": next_step, "job": run.job, "world_size": ranks.world_size(), "control": asdict(control)}
        meta |= {
            "engine": run.engine.numbers(),
            "fingerprints": compute_fingerprints(run),
            "selection": run.selection.state(),
            "config": asdict(run.config),
        }
        folder = run.folder / "checkpoints"
        try:
            if log_problem := run.log.flush():  # the rows up to a checkpoint must be on disk before it
                raise OSError(log_problem)
            _write(folder, f"step-{next_step:06d}", tensors, meta)
            if run.config.checkpoint.keep_best and run.selection.best_step == next_step:
                _link_best(folder, f"step-{next_step:06d}")
        except (OSError, SafetensorError) as error:
            problem = error_text(error)
        else:
            good_step = next_step if good_step is None else good_step
            if left := prune(folder, run.config.checkpoint.keep, next_step, good_step):
                run.log.info(f"warning: an old checkpoint cannot be deleted ({left}); the run continues")
            if left := prune_recordings(run.folder, run.config.checkpoint.keep, good_step):
                run.log.info(f"warning: old answers of environments cannot be deleted ({left}); the run continues")
    problem = ranks.broadcast_from_main(problem)
    if problem:
        run.log.info(
            f"warning: the checkpoint after {quantify(next_step, 'step')} could not be written ({problem}); earlier "
            "checkpoints stay"
        )
    return problem is None


def prune(folder: Path, keep: int, written: int, good_step: int) -> str | None:
    """Delete checkpoints: those after the one just written at step `written`, and all but the newest `keep`.

    The run does not continue from checkpoints after `written`: they are damaged, or have the state within a streak of
    skipped steps. The newest checkpoint up to `good_step`, which has the state before such a streak, stays, and so does
    the best one. Return the reason if a checkpoint cannot be deleted.
    """
    best = find_best_step(folder)
    paths = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(folder)}
    remaining = sorted(step for step in paths if step <= written)[-keep:]
    remaining += [max((step for step in paths if step <= good_step), default=written)]
    remaining += [best] if best is not None and best <= written else []
    problem = None
    for step, path in paths.items():
        if step not in remaining:
            try:
                path.unlink() if path.is_symlink() else shutil.rmtree(path)
            except OSError as error:
                problem = error_text(error)
    if find_best_step(folder) is None:
        (folder / BEST).unlink(missing_ok=True)
    return problem


def prune_recordings(folder: Path, keep: int, good_step: int) -> str | None:
    """Delete recorded answers of environments, except those of steps that a resume repeats or that have a saved batch.

    A resume repeats at most the steps after the oldest checkpoint. A checkpoint that is there only because it is the
    best does not count: a run goes back to it only if it is named, and everything after it is then discarded. Return
    the reason if answers cannot be deleted.
    """
    steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints")]
    first = min([*steps[-keep:], *[step for step in steps if step <= good_step][-1:]], default=0)
    saved = {int(path.name.split("-")[1]) for path in (folder / "batches").glob("step-*-rank-*.json")}
    try:
        recording.drop_recordings(folder / recording.FOLDER, lambda step: step >= first or step in saved)
    except OSError as error:
        return error_text(error)
    return None


def restore_best(run: Run) -> None:
    """Set the link `best` to the best checkpoint, if the run was killed between writing the two."""
    folder, step = run.folder / "checkpoints", run.selection.best_step
    if ranks.is_main() and run.config.checkpoint.keep_best and step is not None and find_best_step(folder) != step:
        name = f"step-{step:06d}"
        if (folder / name).exists():
            _link_best(folder, name)


def _link_best(folder: Path, name: str) -> None:
    """Let the link `best` name a checkpoint; the link is complete or as before."""
    working = folder / f".{BEST}.part"
    working.unlink(missing_ok=True)
    working.symlink_to(name)
    os.replace(working, folder / BEST)


def _write(folder: Path, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    working = folder / f".{name}.part"
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    try:
        working.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, working / TENSORS)
        (working / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        apply_umask(working / TENSORS)
        sums = "".join(f"{_digest(working / part)}  {part}\n" for part in (TENSORS, META))
        (working / SUMS).write_text(sums, encoding="utf-8")
        for path in (*working.iterdir(), working):
            _sync(path)
        if (folder / name).exists():  # the run was resumed from an older checkpoint and reached this step again
            os.replace(folder / name, folder / f".{name}.old")
        os.replace(working, folder / name)
        _sync(folder)
        shutil.rmtree(folder / f".{name}.old", ignore_errors=True)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise


def read_meta(checkpoint: Path, config: RunConfig, job: str = "train") -> tuple[dict[str, Any], list[str]]:
    """Return the metadata that `save` wrote, and the keys whose values differ from `config` (only with resume: force).

    Raises:
        ConfigError: the configuration differs from the checkpoint's, and resume is not force; or another job than
            `job` (train or sft) wrote it.
    """
    meta = json.loads((checkpoint / META).read_text(encoding="utf-8"))
    if (other := meta.get("job", job)) != job:
        raise ConfigError(f"cannot resume from {checkpoint} with {job}, because it belongs to a run of {other}")
    configs = (asdict(RunConfig()), meta["config"], asdict(config))
    defaults, saved, current = (flatten(_without_connections(values)) for values in configs)
    keys = saved.keys() | current.keys()
    empty = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}  # {} in one of them
    differing = [
        f"{key} ({then!r} in the checkpoint, {current.get(key)!r} now)"
        for key in sorted(keys - empty)
        if (then := saved.get(key, defaults.get(key))) != current.get(key)  # a checkpoint may be older than a key
        and not key.startswith(MAY_DIFFER)
    ]
    if differing and config.resume != "force":
        raise ConfigError(
            f"cannot resume from {checkpoint}, because the configuration differs: {', '.join(differing[:5])}; start a "
            f"new run with another name, or use resume=force to resume anyway"
        )
    return meta, differing


def _without_connections(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without how its judges are reached, which may differ: no answer depends on it."""

    def strip(rewards: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {**reward, "args": {key: value for key, value in reward["args"].items() if key not in CONNECTION}}
            if reward["name"] == JUDGE
            else reward
            for reward in rewards
        ]

    data = config.get("data", {})
    newer = asdict(SourceConfig(path=""))  # a checkpoint may be older than a key
    sources = [{**newer, **source, "rewards": strip(source.get("rewards", []))} for source in data.get("sources", [])]
    return {**config, "rewards": strip(config.get("rewards", [])), "data": {**data, "sources": sources}}


def load(checkpoint: Path, meta: dict[str, Any], run: Run) -> list[str]:
    """Restore the weights, the optimizer and a moving reference; return the differences that resume: force ignored.

    Raises:
        ConfigError: data.path or model.path has other content than when the checkpoint was written (and resume is not
            force), or the weights have other shapes or values that are not finite.
    """
    saved, current = meta["fingerprints"], compute_fingerprints(run)
    differing = [key for key in current if saved.get(key) != current[key]]
    if differing:
        older = compute_fingerprints(run, by_name=False)
        differing = [key for key in differing if saved.get(key) != older[key]]
    if differing and run.config.resume != "force":
        raise ConfigError(
            f"cannot resume from {checkpoint}, because {' and '.join(differing)} have changed since it was written; "
            f"start a new run with another name, or use resume=force to resume anyway"
        )
    tensors = load_file(checkpoint / TENSORS)
    num_reference = sum(name.startswith("reference/") for name in tensors)
    reference = [tensors.pop(f"reference/{i}") for i in range(num_reference)]
    outcomes = {name: tensors.pop(name) for name in [*tensors] if name.startswith(PREFIX)}
    if run.pass_rates is not None:
        run.pass_rates.load(outcomes)
    run.engine.load(tensors, meta["engine"])
    check_finite(run.policy.model, f"the checkpoint {checkpoint}")
    if reference and run.policy.reference_state() is not None:
        run.policy.load_reference(reference)
    return differing


def read_steps(checkpoint: Path) -> int:
    """Return the number of steps that were taken before a checkpoint."""
    return json.loads((checkpoint / META).read_text(encoding="utf-8"))["next_step"]


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return the trained weights of a checkpoint by parameter name, in float32."""
    tensors = load_file(checkpoint / TENSORS)
    return {name.removeprefix("weight/"): value for name, value in tensors.items() if name.startswith("weight/")}


def load_outcomes(checkpoint: Path) -> dict[str, Tensor]:
    """Return the outcomes of the prompts in a checkpoint, which `PassRates.load` takes."""
    return {name: value for name, value in load_file(checkpoint / TENSORS).items() if name.startswith(PREFIX)}


def compute_fingerprints(run: Run, *, by_name: bool = True) -> dict[str, str]:
    """Return short digests of the content of data.path (rows), model.path and the teacher (frozen weights).

    They detect that a path in the configuration has other content than when the checkpoint was written. The keys are
    part of the checkpoint format and appear in messages. Weights are in the order of their names, since the order in
    the model changes in its forward, where PEFT replaces the weights of lora.target_parameters. Older checkpoints have
    the order in the model, without `by_name`.
    """
    rows = hashlib.sha256()
    for task in run.tasks.tasks:
        rows.update(json.dumps([task.prompt_ids, task.columns], default=str).encode())
    taught = run.teacher.own_parameters() if run.teacher else []
    of_teacher = {id(weight) for _, weight in taught}
    named = run.policy.model.named_parameters()
    frozen = [(name, weight) for name, weight in named if not weight.requires_grad and id(weight) not in of_teacher]
    if by_name:
        frozen, taught = (sorted(pairs, key=lambda pair: pair[0]) for pairs in (frozen, taught))
    digests = {"the rows of data.path": rows.hexdigest()[:16], "the weights of model.path": _digest_weights(frozen)}
    return digests | ({"the weights of the teacher": _digest_weights(taught)} if taught else {})


def _digest_weights(named: Iterable[tuple[str, Tensor]]) -> str:
    weights = hashlib.sha256()
    for name, weight in named:
        first = weight.detach().flatten()[:8].to(torch.bfloat16).tolist()  # equal in every precision
        weights.update(f"{name} {tuple(weight.shape)} {first}".encode())
    return weights.hexdigest()[:16]


def export(folder: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the adapter (the whole model if it has no adapter) and the tokenizer to `folder`. A collective."""
    if ranks.is_main():
        policy.save(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's unfilled model card
        tokenizer.save_pretrained(folder)
    ranks.barrier()


def error_text(error: Exception) -> str:
    """Return the message of a file-system error without its number."""
    return (getattr(error, "strerror", None) or str(error)).strip()


def copy_to_main(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return all tensors on the CPU of the main rank, and nothing on the others.

    Every rank iterates over `tensors`, because producing one may be a collective.
    """
    copies = {}
    for name, value in tensors:
        if ranks.is_main():
            copies[name] = value.cpu()
    return copies


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or folder from the operating system's cache to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
