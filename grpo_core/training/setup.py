"""From a configuration to a `Run`: everything that happens once, before the first step."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from grpo_core.config.checks import prompts_per_rank
from grpo_core.config.formula import list_remarks
from grpo_core.config.sections import RunConfig
from grpo_core.data.stream import TaskStream
from grpo_core.distributed import ranks
from grpo_core.model.loading import dtype_name, resolve_dtype
from grpo_core.model.memory import find_budgets
from grpo_core.model.policy import Policy, load_policy
from grpo_core.monitor import trackers
from grpo_core.monitor.progress import show_elapsed
from grpo_core.monitor.run_log import RunLog
from grpo_core.sampling.end_of_sequence import describe_eos_mismatch
from grpo_core.scoring.scoring import build_reward
from grpo_core.training import checkpoint, run_dir
from grpo_core.training.control import Control, first_control
from grpo_core.training.deepspeed_config import deepspeed_config
from grpo_core.training.engine import Engine
from grpo_core.training.prepare import Prepared, build_objective, make_rewards, make_sampler, prepare, quieten
from grpo_core.training.run import Run


def setup(config: RunConfig) -> tuple[Run, PreTrainedTokenizerBase]:
    """Build the run, continue from a checkpoint where asked to, and write config.yaml.

    Raises:
        ConfigError: anything the user asked for that cannot be run, before the model loads where that can be told.
    """
    dtype = start(config)
    per_rank = prompts_per_rank(config, ranks.world_size())
    beginning = find_beginning(config)
    prepared = prepare(config)
    with show_elapsed("loading the model"):
        policy = load_policy(config.model, config.lora, dtype=dtype, temperature=config.sampling.temperature)
    run = assemble(config, beginning, policy, prepared, config.prompts_per_step, dtype)
    if config.reference.every:
        policy.move_reference()  # the adapter is fresh: it starts as the base model
    go_on(run, beginning)
    sampling, trainer = config.sampling, config.trainer
    run.log.info(
        f"{described_tasks(config, prepared)}, "
        f"{run.num_steps} steps of {trainer.completions_per_step} completions = {ranks.world_size()} processes "
        f"× {per_rank} prompts × {sampling.group_size}, "
        f"{dtype_name(dtype)}"
    )
    for remark in list_remarks(config):
        run.log.info(f"note: {remark}")
    if config.lora.dropout and trainer.num_minibatches * trainer.num_passes > 1:
        run.log.info("lora.dropout is above 0 with several optimizer steps per batch: the ratios carry dropout noise")
    gc.collect()
    gc.freeze()  # what lives as long as the run: no collection in a step needs to look at it
    return run, prepared.tokenizer


@dataclass(frozen=True)
class Beginning:
    """Where a run starts: in its folder, anew or from a checkpoint."""

    folder: Path
    checkpoint: Path | None
    meta: dict[str, Any]  # what the checkpoint holds beside tensors
    overridden: list[str]  # keys of the configuration that differ, with resume: force
    damaged: list[str]  # a sentence for each checkpoint that was passed over

    @property
    def step(self) -> int:
        """Steps that were taken before."""
        return self.meta.get("next_step", 0)

    def control(self, config: RunConfig) -> Control:
        """The coefficients as they are before the next step."""
        return Control(**self.meta["control"]) if self.checkpoint else first_control(config.loss)


def find_beginning(config: RunConfig) -> Beginning:
    """The run folder, and the checkpoint there that `config` goes on from. A collective.

    Raises:
        ConfigError: what `run_dir.run_folder` and `checkpoint.read_meta` raise.
    """
    folder, latest, damaged = run_dir.run_folder(config)
    meta, overridden = checkpoint.read_meta(latest, config) if latest else ({}, [])
    return Beginning(folder, latest, meta, overridden, damaged)


def go_on(run: Run, beginning: Beginning) -> None:
    """Load the checkpoint, where there is one, and say what is to be said of it and of the model's code.

    Raises:
        ConfigError: what `checkpoint.load` raises.
    """
    config, latest = run.config, beginning.checkpoint
    if config.model.trust_remote_code:
        run.log.info(f"model.trust_remote_code is on: code that came with {config.model.path} runs in this process")
    for sentence in beginning.damaged:
        run.log.info(f"warning: {sentence}")
    if latest:
        overridden = beginning.overridden + checkpoint.load(latest, beginning.meta, run)
        run.log.info(f"resumed from {latest} after {run.start_step} steps")
        if overridden:
            run.log.info(f"warning: resume=force went on in spite of {', '.join(overridden)}")
    elif config.resume:
        run.log.info(f"resume: {config.resume}, but there is no checkpoint: starting from the beginning")


def described_tasks(config: RunConfig, prepared: Prepared) -> str:
    """How many tasks there are, in words."""
    what_of_them = "cut on the left" if config.data.long_prompts == "truncate_left" else "left out"
    return (
        f"{len(prepared.tasks)} tasks ({prepared.num_too_long} {what_of_them}: prompt over "
        f"{config.data.max_prompt_tokens} tokens)"
    )


def assemble(
    config: RunConfig,
    beginning: Beginning,
    policy: Policy,
    prepared: Prepared,
    tasks_per_step: int,  # over all ranks
    dtype: torch.dtype,
    longest_completion: int | None = None,  # default: what the sampler may draw
) -> Run:
    """The parts of a run around a policy and its tasks."""
    trainer, world_size = config.trainer, ranks.world_size()
    tokenizer, tasks = prepared.tokenizer, prepared.tasks
    stream = TaskStream(tasks, tasks_per_step, config.seed, ranks.rank(), world_size)
    num_steps = trainer.num_steps or max(1, int(trainer.epochs * len(tasks) / tasks_per_step))
    total_steps = num_steps * trainer.num_minibatches * trainer.num_passes
    engine = Engine(policy.model, config, dtype=dtype, total_steps=total_steps, world_size=world_size)
    policy.model.eval()  # DeepSpeed leaves it in training mode
    log = RunLog(beginning.folder, config, beginning.step, num_steps)
    log.flops_per_token = policy.flops_per_token()
    if sentence := describe_eos_mismatch(policy.causal_lm, tokenizer):
        log.info(f"warning: {sentence}")
    longest = (max(len(task.prompt_ids) for task in tasks), longest_completion or config.sampling.max_new_tokens)
    rows = trainer.completions_per_step // world_size // trainer.num_minibatches
    return Run(
        config=config,
        folder=beginning.folder,
        start_step=beginning.step,
        num_steps=num_steps,
        control=beginning.control(config),
        steps_per_epoch=stream.steps_per_epoch,
        tasks=stream,
        eval_tasks=prepared.eval_tasks,
        policy=policy,
        sampler=make_sampler(config.sampling, policy, tokenizer, log.info),
        engine=engine,
        rewards=make_rewards(config),
        eval_reward=build_reward(config.evaluation.reward, timeout=trainer.reward_timeout),
        objective=build_objective(config),
        budgets=find_budgets(config, policy, longest, rows, log.info),
        log=log,
    )


def start(config: RunConfig) -> torch.dtype:
    """Join the other ranks, seed, check the DeepSpeed JSON, and return the run's precision."""
    if not config.log.verbose:
        quieten()
    trackers.check_installed(config)
    ranks.setup(config.trainer.hang_timeout)
    ranks.seed_all(config.seed)
    dtype = resolve_dtype(config.model.precision)
    deepspeed_config(config, dtype, ranks.world_size())
    return dtype
