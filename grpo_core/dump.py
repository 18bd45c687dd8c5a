"""debug.dump_batches: a batch kept whole, and what its update did to every token; `replay` and `report` read it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_core import batches, checkpoint, distributed
from grpo_core.batch import Rollouts, Task, TrainBatch
from grpo_core.run import Run
from grpo_core.scoring import Scores

DIGITS = 5

Forward = Callable[[Run, Rollouts], tuple[Tensor, Tensor]]  # log-probs and entropies [B, C]


@torch.no_grad()
def before(run: Run, step: int, batch: TrainBatch, scores: Scores, forward: Forward) -> dict[str, Tensor] | None:
    """This rank's tensors as they are before the update, where `step` is one to be dumped; else None."""
    every = run.config.debug.dump_batches
    if not every or (step % every and step != run.start_step):
        return None
    with run.log.phase("dump"):
        old_logprobs = forward(run, batch.rollouts)[0] if batch.old_logprobs is None else batch.old_logprobs
        tensors = batches.tensors_of(batch.rollouts) | batches.tensors_of(replace(batch, old_logprobs=old_logprobs))
        tensors |= {f"rewards/{name}": values.clone() for name, values in scores.by_name.items()}
        tensors["rewards"] = scores.rewards.clone()
        if run.config.lora.r:
            trained = (
                (f"weight/{n}", batches.copied(p)) for n, p in run.policy.model.named_parameters() if p.requires_grad
            )
            moving = enumerate(run.policy.reference_state() or ())
            reference = ((f"reference/{i}", batches.copied(value)) for i, value in moving)
            tensors |= checkpoint.on_main(trained) | checkpoint.on_main(reference)
    return tensors


@torch.no_grad()
def after(
    run: Run,
    step: int,
    tasks: list[Task],
    batch: TrainBatch,
    tensors: dict[str, Tensor] | None,
    row: dict,
    forward: Forward,
) -> None:
    """Write what `before` kept, and the row and every token's ratio after / before, to <run folder>/batches.

    A disk that is full is said, and nothing more. A collective.
    """
    if tensors is None:
        return
    with run.log.phase("dump"):
        now = forward(run, batch.rollouts)[0].cpu()
        told = {
            "step": step,
            "rank": distributed.rank(),
            "ranks": distributed.world_size(),
            "row": batches.numbers(row),
        }
        told["completions"] = _completions(run.sampler.tokenizer, tasks, tensors, now)
        problem = batches.write(run.folder / "batches", step, tensors, told)
    run.log.warn([f"a batch could not be written to {run.folder / 'batches'} ({problem})"] if problem else [])


def _completions(tokenizer: Any, tasks: list[Task], tensors: dict[str, Tensor], now: Tensor) -> list[dict[str, Any]]:
    mask, ids, old = tensors["completion_mask"], tensors["completion_ids"], tensors["old_logprobs"]
    ratio, group_size = (now - old).exp(), len(mask) // len(tasks)
    piece = {i: tokenizer.decode([i]) for i in ids[mask].unique().tolist()}
    return [
        {
            "task": tasks[i // group_size].index,
            "sample": i % group_size,
            "advantage": round(tensors["advantages"][i].item(), DIGITS),
            "tokens": [piece[token] for token in ids[i][kept].tolist()],
            "logprobs": _rounded(old[i][kept]),
            "ratio": _rounded(ratio[i][kept]),
        }
        for i, kept in enumerate(mask)
    ]


def _rounded(values: Tensor) -> list[float | None]:
    return [round(x, DIGITS) if math.isfinite(x) else None for x in values.tolist()]
