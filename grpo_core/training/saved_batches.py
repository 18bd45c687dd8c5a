"""Save a step's batch to disk and read it back: for each rank one safetensors file (tensors) and one JSON file."""

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

from grpo_core.batch import PADDING, Rollouts, Task, TrainBatch, pad_columns
from grpo_core.distributed import ranks
from grpo_core.monitor.completion_rows import completion_keys
from grpo_core.monitor.file_modes import apply_umask
from grpo_core.schema import ConfigError, finite_or_none
from grpo_core.scoring.scoring import Scores
from grpo_core.training import checkpoint
from grpo_core.training.freeze import forward_all
from grpo_core.training.run import Run

LEFT_PADDED = (
    "prompt_ids",
    "prompt_mask",
    "teacher_prompt_ids",
    "teacher_prompt_mask",
    "prompt_routed_experts",
)  # completions are padded on the right


def write_files(folder: Path, step: int, tensors: dict[str, Tensor], contents: dict[str, Any]) -> str | None:
    """Write this rank's step-<step>-rank-<rank>.safetensors and .json into `folder`, each complete or absent.

    Return the error message if they cannot be written, else None: a full disk must not end the run.
    """
    name = folder / f"step-{step:06d}-rank-{ranks.rank()}"
    try:
        folder.mkdir(exist_ok=True)
        _write_atomically(name.with_suffix(".safetensors"), lambda path: save_file(tensors, path))
        text = json.dumps(contents, default=str)
        _write_atomically(name.with_suffix(".json"), lambda path: path.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        return checkpoint.error_text(error)
    return None


def _write_atomically(path: Path, make: Callable[[Path], Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        make(part)
        apply_umask(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def collect_tensors(record: Rollouts | TrainBatch) -> dict[str, Tensor]:
    """Return CPU copies of the record's tensors, by field name."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: copy_to_cpu(value) for name, value in values.items() if isinstance(value, Tensor)}


def copy_to_cpu(value: Tensor) -> Tensor:
    """Return a CPU copy that shares no memory with other tensors, because safetensors refuses shared memory."""
    return value.detach().to("cpu", copy=True).contiguous()


@dataclass(frozen=True)
class DumpedBatch:
    """The batch of one step as saved by debug.dump_batches, with the rows of all ranks concatenated."""

    folder: Path  # the run folder
    step: int
    ranks: int
    batch: TrainBatch  # old_logprobs is never None
    scores: Scores
    weights: dict[str, Tensor]  # the adapter before the step, by parameter name; empty with lora.r 0
    reference: list[Tensor]  # the adapter of a moving reference; empty if the reference is the base model
    row: dict[str, float | None]  # the step's metrics
    completions: list[dict[str, Any]]  # [B] entries of the JSON files


def read_dump(path: Path) -> DumpedBatch:
    """Read the batch that `path` names: <run folder>/batches/step-000012, or one of its files.

    Raises:
        ConfigError: the path does not name a batch, or a file is missing or damaged.
    """
    match = re.fullmatch(r"(step-\d+)(-rank-\d+)?(\.safetensors|\.json)?", path.name)
    if not match:
        raise ConfigError(f"{path} does not name a batch; use <run folder>/batches/step-000012, or one of its files")
    names = [path.with_name(f"{match[1]}-rank-0")]
    try:
        contents = [_read_json(names[0])]
        names += [path.with_name(f"{match[1]}-rank-{rank}") for rank in range(1, contents[0]["ranks"])]
        contents += [_read_json(name) for name in names[1:]]
        parts = [load_file(name.with_suffix(".safetensors")) for name in names]
        weights = {key.removeprefix("weight/"): x for key, x in parts[0].items() if key.startswith("weight/")}
        reference = sorted((key for key in parts[0] if key.startswith("reference/")), key=lambda key: int(key[10:]))
        rows = [{k: x for k, x in part.items() if not k.startswith(("weight/", "reference/"))} for part in parts]
        whole = {key: _concatenate(key, [part[key] for part in rows]) for key in rows[0]}
        by_name = {key.removeprefix("rewards/"): x for key, x in whole.items() if key.startswith("rewards/")}
        return DumpedBatch(
            path.absolute().parents[1],
            contents[0]["step"],
            len(names),
            _build_record(TrainBatch, {**whole, "rollouts": _build_record(Rollouts, whole)}),
            Scores(whole["rewards"], by_name, turn_rewards=whole.get("turn_rewards")),
            weights,
            [parts[0][key] for key in reference],
            contents[0]["row"],
            [completion for part in contents for completion in part["completions"]],
        )
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""  # safetensors names the file in its text
        raise ConfigError(f"cannot read the batch {path}: {error.strerror or error}{place}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(f"{path} is damaged, or was not saved by debug.dump_batches: {error!r}") from None


def _read_json(name: Path) -> dict[str, Any]:
    return json.loads(name.with_suffix(".json").read_text(encoding="utf-8"))


def _build_record(kind: type, tensors: dict[str, Any]) -> Any:
    return kind(**{field.name: tensors[field.name] for field in fields(kind) if field.name in tensors})


def _concatenate(name: str, parts: list[Tensor]) -> Tensor:
    """Concatenate the ranks' rows; pad [B, width, ...] tensors to the largest width."""
    if name == "turn_rewards":
        width = max(part.shape[2] for part in parts)
        parts = [F.pad(part, (0, width - part.shape[2]), value=torch.nan) for part in parts]
    elif parts[0].dim() >= 2:
        width, padding = max(part.shape[1] for part in parts), PADDING.get(name, 0)
        parts = [pad_columns(part, width, name in LEFT_PADDED, padding) for part in parts]
    return torch.cat(parts)


DECIMALS = 5  # of the per-token numbers in the JSON


@torch.no_grad()
def start_dump(run: Run, step: int, batch: TrainBatch, scores: Scores) -> dict[str, Tensor] | None:
    """Return copies of this rank's tensors before the update, or None if debug.dump_batches does not select `step`."""
    every = run.config.debug.dump_batches
    if not every or (step % every and step != run.start_step):
        return None
    with run.log.phase("dump"):
        old_logprobs = batch.old_logprobs
        if old_logprobs is None:
            old_logprobs = forward_all(run.policy, run.budgets.forward, batch.rollouts).logprobs
        tensors = collect_tensors(batch.rollouts) | collect_tensors(replace(batch, old_logprobs=old_logprobs))
        tensors |= {f"rewards/{name}": values.clone() for name, values in scores.by_name.items()}
        tensors["rewards"] = scores.rewards.clone()
        if scores.turn_rewards is not None:
            tensors["turn_rewards"] = scores.turn_rewards.clone()
        if run.config.lora.r:
            named = run.policy.model.named_parameters()
            trained = ((f"weight/{name}", copy_to_cpu(p)) for name, p in named if p.requires_grad)
            moving = enumerate(run.policy.reference_state() or ())
            reference = ((f"reference/{i}", copy_to_cpu(value)) for i, value in moving)
            tensors |= checkpoint.copy_to_main(trained) | checkpoint.copy_to_main(reference)
    return tensors


@torch.no_grad()
def finish_dump(
    run: Run, step: int, tasks: list[Task], batch: TrainBatch, tensors: dict[str, Tensor] | None, row: dict
) -> None:
    """Write the tensors of `start_dump`, the step's metrics and the ratio of every token to <run folder>/batches.

    The ratio is exp(log-prob after the update - log-prob before it). If the files cannot be written, a warning is
    logged. A collective.
    """
    if tensors is None:
        return
    with run.log.phase("dump"):
        logprobs = forward_all(run.policy, run.budgets.forward, batch.rollouts).logprobs
        contents = {
            "step": step,
            "rank": ranks.rank(),
            "ranks": ranks.world_size(),
            "row": finite_or_none(row),
            "completions": _describe_completions(run.sampler.tokenizer, tasks, batch, tensors, logprobs.cpu()),
        }
        problem = write_files(run.folder / "batches", step, tensors, contents)
    run.log.warn([f"a batch could not be written to {run.folder / 'batches'} ({problem})"] if problem else [])


def _describe_completions(
    tokenizer: Any, tasks: list[Task], batch: TrainBatch, tensors: dict[str, Tensor], logprobs: Tensor
) -> list[dict[str, Any]]:
    """Return each completion's advantage and its tokens, with their log-probs before the update and their ratios.

    Completions of several turns have given tokens too, whose numbers are None, and for each token the number of its
    turn, -1 for a given one. Advantages that differ within a completion are listed for each token.
    """
    drawn, ids = tensors["completion_mask"], tensors["completion_ids"]
    mask, turn_ids = tensors.get("valid_mask", drawn), tensors.get("turn_ids")
    old = tensors["old_logprobs"].masked_fill(~drawn, torch.nan)
    ratio, advantages = (logprobs - old).exp(), batch.mean_advantages()
    by_token = tensors["advantages"] if tensors["advantages"].shape[1] > 1 else None
    text = {i: tokenizer.decode([i]) for i in ids[mask].unique().tolist()}
    keys = completion_keys(tasks, len(mask) // len(tasks))
    return [
        {
            **key,
            "advantage": round(advantages[i].item(), DECIMALS),
            "tokens": [text[token] for token in ids[i][tokens].tolist()],
            "logprobs": _round(old[i][tokens]),
            "ratio": _round(ratio[i][tokens]),
            **({} if turn_ids is None else {"turns": turn_ids[i][tokens].tolist()}),
            **({} if by_token is None else {"advantages": _round(by_token[i][tokens])}),
        }
        for i, (key, tokens) in enumerate(zip(keys, mask, strict=True))
    ]


def _round(values: Tensor) -> list[float | None]:
    return finite_or_none([round(x, DECIMALS) for x in values.tolist()])


def write_incident(folder: Path, step: int, tasks: list[Task], batch: TrainBatch, row: dict[str, Any]) -> None:
    """Write <folder>/incidents/step-<step>-rank-<rank>.safetensors and .json; a full disk is ignored."""
    tensors = {**collect_tensors(batch.rollouts), **collect_tensors(batch)}
    contents = {
        "step": step,
        "tasks": [task.index for task in tasks],
        "seeds": [list(task.seed) for task in tasks],
        "row": finite_or_none(row),
    }
    write_files(folder / "incidents", step, tensors, contents)
