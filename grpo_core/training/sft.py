"""Supervised warm-up through the same policy, loss weights and engine: a rollout whose completion we already have.

The loss is `reinforce` with advantage 1 and the token average, which is the usual mean cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_core.batch import Rollouts, Task, TrainBatch
from grpo_core.config.sections import AdvantageConfig, LossConfig, ReferenceConfig, RunConfig
from grpo_core.data.rows import load_splits
from grpo_core.distributed import ranks, signals
from grpo_core.model.loading import DTYPES, dtype_name
from grpo_core.model.new_model import new_model
from grpo_core.model.policy import load_policy, wrap
from grpo_core.monitor.aggregates import Stats
from grpo_core.monitor.alerts import Alerts
from grpo_core.monitor.progress import show_elapsed
from grpo_core.sampling.end_of_sequence import find_eos_ids
from grpo_core.schema import ConfigError
from grpo_core.training import checkpoint, run_dir
from grpo_core.training.freeze import forward_all
from grpo_core.training.job import closing
from grpo_core.training.prepare import prepare
from grpo_core.training.run import Run
from grpo_core.training.setup import assemble, described_tasks, find_beginning, go_on, start
from grpo_core.training.sft_targets import longest_target, supervised_rollouts
from grpo_core.training.skipped_steps import SkippedSteps
from grpo_core.training.trainer import begin, finish_step
from grpo_core.training.update import update_policy

Answers = Callable[[Sequence[Task]], Rollouts]  # tasks with their targets

TEMPERATURE = 1.0  # the cross-entropy is the model's own, whatever training samples at later
COLUMNS = (  # of metrics.jsonl; what else an update measures compares with a sampler
    *("step", "loss", "tokens", "grad_norm", "learning_rate", "epoch", "adapter_norm", "skipped"),
    *("tokens_updated", "micro_batches", "memory_retries"),
)


def run_sft(config: RunConfig) -> Path:
    """Train on the data's own answers; returns the folder with the model (with lora.r the adapter) and the tokenizer.

    Raises:
        ConfigError: what `setup` raises.
        signals.Interrupted: a signal asked for the end; a checkpoint is there.
        signals.RunFailed: the run cannot go on.
    """
    kind = "adapter" if config.lora.r else "model"
    with signals.handle_signals():
        run, tokenizer, answers = setup(config)
        output = Path(config.sft.output or run.folder / kind)
        with closing(run):
            train(run, answers)
            if config.sft.save_precision != "auto":
                run.policy.model.to(DTYPES[config.sft.save_precision])
            checkpoint.export(output, run.policy, tokenizer)
            run.log.info(f"{kind}: {output}")
    return output


def setup(config: RunConfig) -> tuple[Run, PreTrainedTokenizerBase, Answers]:
    """Build the run, continue from a checkpoint where asked to, and write config.yaml.

    Raises:
        ConfigError: anything the user asked for that cannot be run, before the model loads where that can be told.
    """
    dtype = start(config)
    config = supervised(config)
    beginning = find_beginning(config)
    if config.sft.output:
        run_dir.check_output(Path(config.sft.output), "sft.output")
    base, tokenizer = _new_base(config) if config.sft.new_model else (None, None)
    prepared = prepare(
        config, tokenizer=tokenizer, model_config=base.config if base else None, scores_training_tasks=False
    )
    tokenizer, model_config = prepared.tokenizer, prepared.model_config
    longest = max(
        longest_target(config.sft, prepared.tasks, tokenizer, model_config),
        longest_target(config.sft, prepared.eval_tasks, tokenizer, model_config, "the evaluation data"),
    )
    if base:
        policy = wrap(base.to(dtype), config.model, config.lora, temperature=TEMPERATURE)
    else:
        with show_elapsed("loading the model"):
            policy = load_policy(config.model, config.lora, dtype=dtype, temperature=TEMPERATURE)
    per_step = config.trainer.completions_per_step
    run = assemble(config, beginning, policy, prepared, per_step, dtype, longest)
    end = tokenizer.eos_token_id
    eos = min(find_eos_ids(policy.causal_lm, tokenizer)) if end is None else end
    answers = partial(supervised_rollouts, config=config.sft, tokenizer=tokenizer, eos=eos, device=run.sampler.device)
    run = replace(run, held_out=partial(held_out_loss, run, answers))
    go_on(run, beginning)
    run.log.info(
        f"{described_tasks(config, prepared)}, {run.num_steps} steps of {per_step} targets of up to "
        f"{longest} tokens on {ranks.world_size()} processes, {dtype_name(dtype)}"
    )
    return run, tokenizer, answers


def supervised(config: RunConfig) -> RunConfig:
    """`config` with the supervised loss in the place of its own. It is what checkpoints and config.yaml say.

    Raises:
        ConfigError: what cannot be of a supervised run.
    """
    trainer, world_size = config.trainer, ranks.world_size()
    for key in ("num_minibatches", "num_passes"):
        if getattr(trainer, key) != 1:
            raise ConfigError(f"trainer.{key} is {getattr(trainer, key)}; sft takes one optimizer step a batch: 1")
    if trainer.completions_per_step % world_size:
        raise ConfigError(
            f"trainer.completions_per_step is {trainer.completions_per_step}; it must be a multiple of the processes "
            f"({world_size})"
        )
    if config.sft.new_model and config.lora.r:
        raise ConfigError(
            f"lora.r is {config.lora.r}, but sft.new_model makes a new model, all of which is trained: lora.r must be 0"
        )
    loss = LossConfig(name="reinforce", average="token", kl_coef=0.0)
    return replace(config, loss=loss, advantage=AdvantageConfig("dr_grpo"), reference=ReferenceConfig())


def train(run: Run, answers: Answers) -> None:
    """Take the run's steps; step s is a function of the weights before it and of (seed, s).

    Raises:
        signals.Interrupted, signals.RunFailed: as `run_sft` does.
    """
    alerts, skipped_steps = Alerts(run.config), SkippedSteps(run)
    begin(run)
    for step in range(run.start_step, run.num_steps):
        tasks, stats = run.tasks.batch(step), Stats()
        with run.log.phase("update"):
            rollouts = replace(answers(tasks), completions=())  # the loss reads no text
            ones = torch.ones(len(rollouts), 1, device=rollouts.completion_ids.device)
            batch = TrainBatch(rollouts, ones, rollouts.completion_mask)
            numbers = update_policy(run, batch, step, run.control, stats)
        stats.add_total("tokens", rollouts.lengths().sum())
        row = {"step": step, **stats.reduce(), **numbers}
        row = {name: row[name] for name in COLUMNS}
        run.log.log_row(step, row, _line)
        skipped_steps.see(step, tasks, batch, row, run.control)
        finish_step(run, step + 1, run.control, alerts.update(row), None)


@torch.no_grad()
def held_out_loss(run: Run, answers: Answers) -> dict[str, float]:
    """Cross-entropy of the evaluation tasks' targets: `loss`, the mean in nats of all their `tokens`. A collective.

    Which of several templates a task gets depends on its row alone: it is the same at every time, in every run.
    """
    mine = run.eval_tasks[ranks.rank() :: ranks.world_size()]
    counts = torch.zeros(2, dtype=torch.double)
    if mine:
        rollouts = replace(answers([replace(task, seed=(task.index,)) for task in mine]), completions=())
        logprobs, _ = forward_all(run.policy, run.budgets.forward, rollouts)
        counts = torch.stack([-logprobs.double().sum(), rollouts.lengths().sum()]).cpu()
    nats, tokens = ranks.all_sum(counts).tolist()
    return {"loss": nats / tokens, "tokens": int(tokens)}


def _new_base(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A new small model with a tokenizer learned from the training rows."""
    rows, _ = load_splits(config.data, config.evaluation.num_tasks)
    return new_model([" ".join(map(str, row.values())) for row in rows], **config.sft.new_model)


def _line(row: dict[str, float]) -> str:
    skipped = "  update skipped: gradient not finite" if row["skipped"] else ""
    return f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  {row['seconds']:.2f} s{skipped}"
