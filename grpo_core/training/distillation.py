"""On-policy distillation: the teacher's log-probs of a step's completions, and their part in advantages and loss.

The advantage of a token is coef (l_teacher - l_old): its sum over a completion drawn from the policy is an unbiased
estimate of -KL(policy || teacher). arXiv:2306.13649, arXiv:2601.19897. It does not depend on the group, so tied groups
are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.batch import Frozen, Rollouts, Task, TrainBatch
from grpo_core.model.logprobs import TeacherStates
from grpo_core.model.quantized import count_weights
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.objective import Objective
from grpo_core.sampling.live_rows import pad_left
from grpo_core.training.freeze import forward_all
from grpo_core.training.run import Run


@torch.no_grad()
def ask_teacher(run: Run, tasks: Sequence[Task], frozen: Frozen, stats: Stats) -> Frozen:
    """Return `frozen` with the teacher's prompts and its log-probs of the drawn tokens; unchanged without a teacher."""
    if run.teacher is None:
        return frozen
    with run.log.phase("teacher"):
        frozen = replace(frozen, **make_teacher_prompts(tasks, frozen.rollouts))
        own_bytes = count_weights([p for _, p in run.teacher.own_parameters()], run.teacher.policy.model).bytes
        stats.add_max("teacher_weights_gb", torch.tensor(own_bytes / 1e9, dtype=torch.double, device="cpu"))
        if not run.objective.needs_teacher:
            return frozen
        with run.teacher.active() as model:
            logprobs = forward_all(model, run.budgets.teacher, show_teacher(frozen)).logprobs
        assert frozen.logprobs is not None  # freeze has computed them
        stats.add_mean("teacher_kl", frozen.logprobs - logprobs, frozen.loss_mask)
        return replace(frozen, teacher_logprobs=logprobs)


def make_teacher_prompts(tasks: Sequence[Task], rollouts: Rollouts) -> dict[str, Tensor]:
    """Return the prompts that the teacher sees, by field of `Frozen`; none if they are the policy's."""
    prompts = [task.teacher_prompt_ids for task in tasks if task.teacher_prompt_ids is not None]
    if not prompts:
        return {}
    assert len(prompts) == len(tasks)
    repeats, device = len(rollouts) // len(tasks), rollouts.completion_ids.device
    ids, mask = (x.repeat_interleave(repeats, dim=0) for x in pad_left(prompts, 0, device))
    return {"teacher_prompt_ids": ids, "teacher_prompt_mask": mask}


def show_teacher(batch: Frozen | TrainBatch) -> Rollouts:
    """Return the rollouts of `batch` with the teacher's prompts; the teacher's own routers choose the experts."""
    rollouts = batch.rollouts.without_routing()
    if batch.teacher_prompt_ids is None:
        return rollouts
    return replace(rollouts, prompt_ids=batch.teacher_prompt_ids, prompt_mask=batch.teacher_prompt_mask)


def add_teacher_advantages(objective: Objective, frozen: Frozen, advantages: Tensor) -> Tensor:
    """Return the advantages [N, G] or [N, G, C] plus coef (l_teacher - l_old) of each trained token, [B, C].

    Without a teacher, and with coef 0, they are returned as they are.
    """
    if not (objective.has_teacher and objective.teacher_coef):
        return advantages
    assert frozen.teacher_logprobs is not None and frozen.logprobs is not None
    mask = frozen.loss_mask
    of_rewards = advantages.reshape(len(mask), -1).to(mask.device)
    taught = objective.teacher_coef * (frozen.teacher_logprobs - frozen.logprobs)
    return of_rewards + torch.where(mask, taught, 0.0)


def compute_teacher_states(run: Run, micro: TrainBatch) -> TeacherStates | None:
    """Return the teacher's distributions at a micro-batch's tokens; None where the loss has no KL to them."""
    if run.objective.teacher_kl_fn is None or run.teacher is None:
        return None
    return run.teacher.states(show_teacher(micro), run.budgets.teacher, run.objective.teacher_kl_fn)
