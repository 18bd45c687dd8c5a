"""A step's batch on disk: a pair of files for each rank, tensors as safetensors and the rest as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo_core.batch import Rollouts, Task, TrainBatch
from grpo_core.distributed import ranks
from grpo_core.monitor.completion_rows import completion_keys
from grpo_core.schema import ConfigError, finite_or_none
from grpo_core.scoring.scoring import Scores
from grpo_core.training import checkpoint
from grpo_core.training.freeze import forward_all
from grpo_core.training.run import Run

ON_THE_LEFT = ("prompt_ids", "prompt_mask")  # padded there; completions on the right


def write_files(folder: Path, step: int, tensors: dict[str, Tensor], told: dict[str, Any]) -> str | None:
    """Write this rank's step-<step>-rank-<rank>.safetensors and .json into `folder`, each whole or not at all.

    Returns what is in the way, in words, where the disk does not take them: the run matters more.
    """
    name = folder / f"step-{step:06d}-rank-{ranks.rank()}"
    try:
        folder.mkdir(exist_ok=True)
        _whole(name.with_suffix(".safetensors"), lambda path: save_file(tensors, path))
        text = json.dumps(told, default=str)
        _whole(name.with_suffix(".json"), lambda path: path.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        return (getattr(error, "strerror", None) or str(error)).strip()
    return None


def _whole(path: Path, make: Callable[[Path], Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        make(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def tensors_of(record: Rollouts | TrainBatch) -> dict[str, Tensor]:
    """The record's tensors by field, as copies on the CPU."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: copied(value) for name, value in values.items() if isinstance(value, Tensor)}


def copied(value: Tensor) -> Tensor:
    """A copy on the CPU that shares no memory, which safetensors would refuse."""
    return value.detach().to("cpu", copy=True).contiguous()


@dataclass(frozen=True)
class Dumped:
    """What debug.dump_batches wrote of a step, the rows of all ranks one after another."""

    folder: Path  # the run's
    step: int
    ranks: int
    batch: TrainBatch  # its old_logprobs are always there
    scores: Scores
    weights: dict[str, Tensor]  # the adapter's before the step, by name in the model; none with lora.r 0
    reference: list[Tensor]  # the adapter of a reference that moves
    row: dict[str, float | None]
    completions: list[dict[str, Any]]  # B, as in the JSON


def read_dump(path: Path) -> Dumped:
    """The batch that `path` belongs to: a file of any rank, or <run folder>/batches/step-000012.

    Raises:
        ConfigError: no such batch, a rank's files are missing, or they are not what was written.
    """
    found = re.fullmatch(r"(step-\d+)(-rank-\d+)?(\.safetensors|\.json)?", path.name)
    if not found:
        raise ConfigError(f"{path} is no batch; name <run folder>/batches/step-000012, or a file of it")
    names = [path.with_name(f"{found[1]}-rank-0")]
    try:
        told = [_json(names[0])]
        names += [path.with_name(f"{found[1]}-rank-{rank}") for rank in range(1, told[0]["ranks"])]
        told += [_json(name) for name in names[1:]]
        parts = [load_file(name.with_suffix(".safetensors")) for name in names]
        weights = {key.removeprefix("weight/"): x for key, x in parts[0].items() if key.startswith("weight/")}
        moving = sorted((key for key in parts[0] if key.startswith("reference/")), key=lambda key: int(key[10:]))
        rows = [{k: x for k, x in part.items() if not k.startswith(("weight/", "reference/"))} for part in parts]
        whole = {key: _put_together(key, [part[key] for part in rows]) for key in rows[0]}
        by_name = {key.removeprefix("rewards/"): x for key, x in whole.items() if key.startswith("rewards/")}
        return Dumped(
            path.absolute().parents[1],
            told[0]["step"],
            len(names),
            _record(TrainBatch, {**whole, "rollouts": _record(Rollouts, whole)}),
            Scores(whole["rewards"], by_name),
            weights,
            [parts[0][key] for key in moving],
            told[0]["row"],
            [completion for one in told for completion in one["completions"]],
        )
    except OSError as error:
        raise ConfigError(f"cannot read the batch {path}: {error.strerror or error} ({error.filename})") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(f"{path} is not a whole batch of debug.dump_batches: {error!r}") from None


def _json(name: Path) -> dict[str, Any]:
    return json.loads(name.with_suffix(".json").read_text(encoding="utf-8"))


def _record(kind: type, tensors: dict[str, Any]) -> Any:
    return kind(**{field.name: tensors[field.name] for field in fields(kind) if field.name in tensors})


def _put_together(name: str, parts: list[Tensor]) -> Tensor:
    """The ranks' rows one after another, the narrower ones padded."""
    if parts[0].dim() == 2:
        width = max(part.shape[1] for part in parts)
        sides = [(width - part.shape[1], 0) if name in ON_THE_LEFT else (0, width - part.shape[1]) for part in parts]
        parts = [F.pad(part, side) for part, side in zip(parts, sides, strict=True)]
    return torch.cat(parts)


DIGITS = 5  # of the numbers of each token in the JSON


@torch.no_grad()
def start_dump(run: Run, step: int, batch: TrainBatch, scores: Scores) -> dict[str, Tensor] | None:
    """Copy this rank's tensors before the update, where debug.dump_batches asks for `step`; else return None."""
    every = run.config.debug.dump_batches
    if not every or (step % every and step != run.start_step):
        return None
    with run.log.phase("dump"):
        old_logprobs = batch.old_logprobs
        if old_logprobs is None:
            old_logprobs, _ = forward_all(run.policy, run.budgets.forward, batch.rollouts)
        tensors = tensors_of(batch.rollouts) | tensors_of(replace(batch, old_logprobs=old_logprobs))
        tensors |= {f"rewards/{name}": values.clone() for name, values in scores.by_name.items()}
        tensors["rewards"] = scores.rewards.clone()
        if run.config.lora.r:
            named = run.policy.model.named_parameters()
            trained = ((f"weight/{name}", copied(p)) for name, p in named if p.requires_grad)
            moving = enumerate(run.policy.reference_state() or ())
            reference = ((f"reference/{i}", copied(value)) for i, value in moving)
            tensors |= checkpoint.on_main(trained) | checkpoint.on_main(reference)
    return tensors


@torch.no_grad()
def finish_dump(
    run: Run, step: int, tasks: list[Task], batch: TrainBatch, tensors: dict[str, Tensor] | None, row: dict
) -> None:
    """Write the tensors of `start_dump`, the row of metrics, and every token's ratio after / before the update.

    They go to <run folder>/batches. A full disk costs a warning. A collective.
    """
    if tensors is None:
        return
    with run.log.phase("dump"):
        logprobs, _ = forward_all(run.policy, run.budgets.forward, batch.rollouts)
        contents = {
            "step": step,
            "rank": ranks.rank(),
            "ranks": ranks.world_size(),
            "row": finite_or_none(row),
            "completions": _completions(run.sampler.tokenizer, tasks, tensors, logprobs.cpu()),
        }
        problem = write_files(run.folder / "batches", step, tensors, contents)
    run.log.warn([f"a batch could not be written to {run.folder / 'batches'} ({problem})"] if problem else [])


def _completions(
    tokenizer: Any, tasks: list[Task], tensors: dict[str, Tensor], logprobs: Tensor
) -> list[dict[str, Any]]:
    """Each completion with its advantage, and its tokens with their log-probs before the update and their ratios."""
    mask, ids, old = tensors["completion_mask"], tensors["completion_ids"], tensors["old_logprobs"]
    ratio = (logprobs - old).exp()
    text = {i: tokenizer.decode([i]) for i in ids[mask].unique().tolist()}
    keys = completion_keys(tasks, len(mask) // len(tasks))
    return [
        {
            **key,
            "advantage": round(tensors["advantages"][i].item(), DIGITS),
            "tokens": [text[token] for token in ids[i][tokens].tolist()],
            "logprobs": _rounded(old[i][tokens]),
            "ratio": _rounded(ratio[i][tokens]),
        }
        for i, (key, tokens) in enumerate(zip(keys, mask, strict=True))
    ]


def _rounded(values: Tensor) -> list[float | None]:
    return finite_or_none([round(x, DIGITS) for x in values.tolist()])


def write_incident(folder: Path, step: int, tasks: list[Task], batch: TrainBatch, row: dict[str, Any]) -> None:
    """Write <folder>/incidents/step-<step>-rank-<rank>.safetensors and .json, or what the disk has room for."""
    tensors = {**tensors_of(batch.rollouts), **tensors_of(batch)}
    told = {
        "step": step,
        "tasks": [task.index for task in tasks],
        "seeds": [list(task.seed) for task in tasks],
        "row": finite_or_none(row),
    }
    write_files(folder / "incidents", step, tensors, told)
