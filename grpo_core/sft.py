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

from grpo_core import checkpoint, distributed
from grpo_core.batch import Rollouts, Task, TrainBatch
from grpo_core.config import AdvantageConfig, LossConfig, RunConfig, SftConfig
from grpo_core.data import load_tokenizer, template_fields
from grpo_core.policy import Policy, load_policy, wrap
from grpo_core.rows import load_splits
from grpo_core.sampler import eos_ids
from grpo_core.schema import ConfigError
from grpo_core.setup import all_tasks, assemble, start
from grpo_core.stats import Stats
from grpo_core.tiny import new_model
from grpo_core.trainer import due, evaluate_now, update_policy


def run_sft(config: RunConfig) -> Path:
    """Train on the data's own answers; returns the folder with the model (or adapter) and tokenizer.

    Raises:
        ConfigError: a template that names a column the data lacks, and what `setup` raises.
    """
    supervised = LossConfig(name="reinforce", average="token", kl_coef=0.0)
    config = replace(config, loss=supervised, advantage=AdvantageConfig("dr_grpo"))
    dtype = start(config)
    folder, _, _ = checkpoint.run_folder(config)
    policy, tokenizer = starting_point(config, dtype)
    tasks, eval_tasks, _ = all_tasks(config, tokenizer)
    for target in config.sft.targets:
        for name in template_fields(target.template):
            if name not in tasks[0].columns:
                raise ConfigError(f"sft.targets uses {{{name}}}, but the columns are {', '.join(tasks[0].columns)}")
    eos = min(eos_ids(policy.causal_lm, tokenizer))
    texts = [target.template.format(**task.columns) for target in config.sft.targets for task in tasks]
    longest = max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) + 1  # the end
    run = assemble(
        config,
        folder,
        policy,
        tokenizer,
        tasks,
        eval_tasks,
        config.trainer.completions_per_step,
        dtype,
        longest_completion=longest,
    )
    for step in range(run.num_steps):
        with run.log.phase("update"):
            rollouts = supervised_rollouts(run.tasks.batch(step), config.sft, tokenizer, eos, run.sampler.device)
            ones, stats = torch.ones(len(rollouts), 1, device=run.sampler.device), Stats()
            numbers = update_policy(run, TrainBatch(rollouts, ones, rollouts.completion_mask), step, run.control, stats)
        stats.total("tokens", rollouts.lengths().sum())
        run.log.record(step, {"step": step, **stats.reduce(), **numbers}, _line)
        if due(config.evaluation.every, step + 1, run) or step + 1 == run.num_steps:
            evaluate_now(run, step + 1)
    output = Path(config.sft.output or folder / "model")
    policy.model.to(distributed.precision(config.sft.save_precision))
    checkpoint.export(output, policy, tokenizer)
    run.log.say(f"model: {output}")
    run.log.close()
    return output


def starting_point(config: RunConfig, dtype: torch.dtype) -> tuple[Policy, PreTrainedTokenizerBase]:
    """model.path with its tokenizer, or a new small model with a tokenizer learned from the training rows."""
    if not config.sft.new_model:
        policy = load_policy(config.model, config.lora, dtype=dtype, temperature=config.sampling.temperature)
        return policy, load_tokenizer(config.model.path, config.model.trust_remote_code)
    rows, _ = load_splits(config.data, config.evaluation.num_tasks, config.seed)
    base, tokenizer = new_model([" ".join(map(str, row.values())) for row in rows], **config.sft.new_model)
    return wrap(base.to(dtype), config.model, config.lora, temperature=config.sampling.temperature), tokenizer


def _line(row: dict[str, float]) -> str:
    return f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  {row['seconds']:.2f} s"


def supervised_rollouts(
    tasks: Sequence[Task], config: SftConfig, tokenizer: PreTrainedTokenizerBase, eos: int, device: torch.device
) -> Rollouts:
    """The tasks' targets as rollouts. Which template a task gets depends on its seed, in proportion to the shares."""
    shares = np.cumsum([target.share for target in config.targets])
    texts = []
    for task in tasks:
        place = np.searchsorted(shares, np.random.default_rng(task.seed).random() * shares[-1], side="right")
        texts.append(config.targets[place].template.format(**task.columns))
    targets = [[*ids, eos] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
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
