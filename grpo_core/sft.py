"""Supervised warm-up through the same policy, loss weights and engine: a rollout whose completion we already have.

The loss is `reinforce` with advantage 1 and the token average, which is the usual mean cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from grpo_core import distributed
from grpo_core.batch import Rollouts, Task, TrainBatch
from grpo_core.config import AdvantageConfig, LossConfig, RunConfig, SftConfig
from grpo_core.data import TaskStream, load_splits, load_tokenizer, make_tasks, template_fields
from grpo_core.engine import Engine
from grpo_core.losses import LOSSES
from grpo_core.policy import load_policy, wrap
from grpo_core.sampler import Sampler, eos_ids
from grpo_core.schema import ConfigError
from grpo_core.setup import open_log, run_folder, start
from grpo_core.tiny import new_model
from grpo_core.trainer import Run, due, evaluate_now, update_policy


def run_sft(config: RunConfig) -> Path:
    """Train on the data's own answers; returns the folder with the model (or adapter) and tokenizer.

    Raises:
        ConfigError: a template that names a column the data lacks, and what `setup` raises.
    """
    config = replace(config, loss=LossConfig(name="reinforce", average="token", kl_coef=0.0), advantage=AdvantageConfig("dr_grpo"))
    dtype = start(config)
    folder, _ = run_folder(config)
    rows, eval_rows = load_splits(config.data, config.evaluation.num_tasks, config.seed)
    for target in config.sft.targets:
        for name in template_fields(target.template):
            if name not in rows.column_names:
                raise ConfigError(f"sft.targets uses {{{name}}}, but the data has the columns {', '.join(rows.column_names)}")
    temperature = config.sampling.temperature
    if config.sft.new_model:
        texts = [" ".join(str(value) for value in row.values()) for row in rows]
        base, tokenizer = new_model(texts, **config.sft.new_model)
        policy = wrap(base.to(dtype), config.model, config.lora, temperature=temperature)
    else:
        tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        policy = load_policy(config.model, config.lora, dtype=dtype, temperature=temperature)
    tasks, _ = make_tasks(rows, config.data, tokenizer)
    eval_tasks, _ = make_tasks(eval_rows, config.data, tokenizer)
    stream = TaskStream(tasks, config.trainer.completions_per_step, config.seed, distributed.rank(), distributed.world_size())
    num_steps = config.trainer.num_steps or max(1, int(config.trainer.epochs * stream.steps_per_epoch))
    engine = Engine(policy.model, config, dtype=dtype, total_steps=num_steps, world_size=distributed.world_size())
    policy.model.eval()
    sampler = Sampler(policy.causal_lm, tokenizer, max_new_tokens=config.sampling.max_new_tokens, temperature=temperature)
    run = Run(
        config=config, folder=folder, start_step=0, num_steps=num_steps, tasks=stream, eval_tasks=eval_tasks, policy=policy,
        sampler=sampler, engine=engine, rewards=[], advantage_fn=None, loss_fn=LOSSES.build("reinforce"),
        log=open_log(folder, config, 0, num_steps), steps_per_epoch=stream.steps_per_epoch,
    )  # fmt: skip
    eos = min(eos_ids(policy.causal_lm, tokenizer))
    for step in range(num_steps):
        with run.log.phase("update"):
            rollouts = supervised_rollouts(run.tasks.batch(step), config.sft, tokenizer, eos, sampler.device)
            stats, numbers = update_policy(run, TrainBatch(rollouts, torch.ones(len(rollouts), 1, device=sampler.device)), step)
        stats.total("tokens", rollouts.lengths().sum())
        run.log.record(step, {"step": step, **stats.reduce(), **numbers}, lambda row: f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  {row['seconds']:.2f} s")
        if due(config.evaluation.every, step + 1, run) or step + 1 == num_steps:
            evaluate_now(run, step + 1)
    output = Path(config.sft.output or folder / "model")
    if distributed.is_main():
        policy.model.to(distributed.precision(config.sft.save_precision))
        policy.save(output)
        tokenizer.save_pretrained(output)
    distributed.barrier()
    run.log.close()
    return output


def supervised_rollouts(
    tasks: Sequence[Task], config: SftConfig, tokenizer: PreTrainedTokenizerBase, eos: int, device: torch.device
) -> Rollouts:
    """The tasks' targets as rollouts. Which template a task gets depends on its seed, in proportion to the shares."""
    shares = np.cumsum([target.share for target in config.targets])
    texts = []
    for task in tasks:
        place = np.searchsorted(shares, np.random.default_rng(task.seed).random() * shares[-1], side="right")
        texts.append(config.targets[place].template.format(**task.columns))
    targets = [ids + [eos] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    prompt_ids, prompt_mask = right_padded([task.prompt_ids for task in tasks], device)
    ids, mask = right_padded(targets, device)
    ended = torch.zeros(len(tasks), dtype=torch.bool, device=device)
    return Rollouts(prompt_ids, prompt_mask, ids, mask, torch.zeros(ids.shape, device=device), ended, tuple(texts))


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, [B, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]
