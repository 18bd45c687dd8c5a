"""In several processes: a few updates through DeepSpeed ZeRO-2 for each micro-batch size; rank 0 writes the weights.

torchrun --nproc-per-node 2 tests/workers/zero2.py OUT AVERAGE=MICRO_BATCH_SIZE,...  ...
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
from fakes import frozen_batch, ragged_rollouts, tiny_policy

from grpo_core.batch import take
from grpo_core.config.sections import (
    EngineConfig,
    FunctionConfig,
    LossConfig,
    RunConfig,
    SamplingConfig,
    TeacherConfig,
    TrainerConfig,
)
from grpo_core.distributed import ranks
from grpo_core.model.memory import Budgets
from grpo_core.model.packing import Budget
from grpo_core.model.teacher import Teacher
from grpo_core.monitor.run_log import Stats
from grpo_core.objective.losses import LOSSES
from grpo_core.training.control import first_control
from grpo_core.training.distillation import add_teacher_advantages
from grpo_core.training.engine import Engine
from grpo_core.training.freeze import freeze
from grpo_core.training.prepare import build_objective
from grpo_core.training.update import update_policy

STEPS, ROWS, PASSES = 3, 16, 2
TIES = "ties"  # for an average: no KL, and rows without an advantage
ALL_ROWS = "all_rows"  # for an average: what is chosen among the rows of both processes
CHOICE = {"share": 1.0, "cov_low": 0.05, "cov_high": 0.4}
M2 = 0.1
TAUGHT = "taught"  # for an average: no KL to the reference, and a teacher in the advantages and in the loss
TEACHER = TeacherConfig(path="another", coef=0.5, kl="reverse", kl_coef=0.3)
CLIP = {"clip_low": 0.05, "clip_high": 0.1}


def run_config(average, tokens):
    loss = LossConfig(average="token" if average in (TIES, TAUGHT) else average, kl_coef=0.0 if average in (TIES, TAUGHT) else 0.5)
    if average == ALL_ROWS:
        loss = LossConfig(
            name="clip_cov", args={**CLIP, **CHOICE}, average="token", kl_coef=0.0, normalize_correction=True,
            rejection=FunctionConfig("m2po", {"threshold": M2}), rollout_correction=FunctionConfig("token_truncate"),
        )  # fmt: skip
    return RunConfig(
        sampling=SamplingConfig(max_new_tokens=9),
        loss=loss,
        teacher=TEACHER if average == TAUGHT else TeacherConfig(),
        trainer=TrainerConfig(completions_per_step=ROWS, tokens_per_micro_batch=tokens, num_passes=PASSES),
        engine=EngineConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant", weight_decay=0.1, max_grad_norm=0.1, adam_eps=1e-6,
                            deepspeed={"zero_optimization": {"stage": 2, "overlap_comm": False}}),
    )  # fmt: skip


def make_teacher():
    policy = tiny_policy(seed=5, lora_noise=0.3)
    policy.model.requires_grad_(False)
    return Teacher(policy, shares_policy=False)


def step_data(step, average):
    """The whole step's rollouts and advantages; a rank has its part of the rows, at times with nothing to learn."""
    advantages = torch.randn(ROWS, generator=torch.Generator().manual_seed(step))
    if average == TIES:
        advantages[step::3] = 0
        advantages[ROWS // 2 :] *= step > 0
    rollouts = ragged_rollouts(ROWS, seed=step)
    if average == ALL_ROWS:  # a sampler that differs from the policy, by other amounts in the second half of the rows
        noise = torch.randn(rollouts.rollout_logprobs.shape, generator=torch.Generator().manual_seed(step))
        own = tiny_policy(lora_noise=0.1).forward(rollouts).logprobs.detach()
        noise[ROWS // 2 :] *= 2
        rollouts = replace(rollouts, rollout_logprobs=own + 0.3 * noise)
    return rollouts, advantages


def trained(average, sizes):
    """Weights, gradient norms and losses for each size."""
    rank, world = ranks.rank(), ranks.world_size()
    rows = torch.arange(rank * ROWS // world, (rank + 1) * ROWS // world)
    results, teacher = {}, make_teacher()
    for size in sizes:  # tokens of a micro-batch
        config, policy = run_config(average, size), tiny_policy(lora_noise=0.1)
        engine = Engine(policy.model, config, dtype=torch.float32, total_steps=STEPS * PASSES, world_size=world)
        policy.model.eval()
        objective = build_objective(config)
        if average != ALL_ROWS:
            objective = replace(objective, loss_fn=LOSSES.build("grpo", CLIP))
        run = SimpleNamespace(
            config=config, policy=policy, engine=engine, objective=objective, steps_per_epoch=1,
            budgets=Budgets(Budget(size), *2 * [Budget(2 * size)]), teacher=teacher if average == TAUGHT else None,
        )  # fmt: skip
        norms, losses = [], []
        for step in range(STEPS):
            rollouts, advantages = step_data(step, average)
            batch = frozen_batch(run, take(rollouts, rows), advantages[rows])
            if average == TAUGHT:
                frozen = freeze(policy, objective, run.budgets.forward, batch.rollouts)
                frozen = replace(frozen, teacher_logprobs=teacher.policy.logprobs(batch.rollouts))
                batch = frozen.with_advantages(add_teacher_advantages(objective, frozen, batch.advantages))
            stats = Stats()
            numbers = update_policy(run, batch, step, first_control(config.loss), stats)
            norms.append(numbers["grad_norm"])
            losses.append(stats.reduce()["loss"])
        results[size] = {
            "parameters": torch.cat([p.detach().flatten() for p in policy.parameters()]), "norms": norms, "losses": losses
        }  # fmt: skip
    return results


if __name__ == "__main__":
    ranks.setup()
    given = dict(word.split("=") for word in sys.argv[2:])
    found = {average: trained(average, [int(size) for size in sizes.split(",")]) for average, sizes in given.items()}
    if ranks.is_main():
        torch.save(found, sys.argv[1])
    ranks.barrier()
    ranks.shutdown()
