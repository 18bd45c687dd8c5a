"""Build a `Run` from a configuration: everything that happens once, before the first step."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.config.checks import prompts_per_rank
from grpo_core.config.formula import list_remarks
from grpo_core.config.precision import dtype_name, resolve_dtype
from grpo_core.config.sections import RunConfig, TrainerConfig
from grpo_core.counts import quantify
from grpo_core.data.pass_rates import PassRates
from grpo_core.data.stream import TaskStream
from grpo_core.data.tasks_on_disk import TasksOnDisk, prompt_lengths
from grpo_core.distributed import ranks
from grpo_core.environments.setup import make_environments
from grpo_core.model.lora_targets import describe_frozen_experts, describe_untied
from grpo_core.model.memory import Taught, find_budgets
from grpo_core.model.policy import Policy, load_policy
from grpo_core.model.quieten import quieten
from grpo_core.model.teacher import Teacher, load_teacher
from grpo_core.monitor import trackers
from grpo_core.monitor.progress import print_note, show_elapsed
from grpo_core.monitor.run_log import RunLog
from grpo_core.random_keys import make_key
from grpo_core.sampling.end_of_sequence import describe_eos_mismatch
from grpo_core.training.deepspeed_config import deepspeed_config
from grpo_core.training.difficulty import make_pass_rates
from grpo_core.training.engine import Engine, check_deepspeed
from grpo_core.training.prepare import (
    Prepared,
    build_objective,
    check_routing,
    make_eval_rewards,
    make_rewards,
    make_sampler,
    prepare,
    prepare_teacher,
)
from grpo_core.training.resume import RunStart, check_num_steps, find_and_lock_start, restore_run
from grpo_core.training.run import Run
from grpo_core.training.task_notes import list_held_out, list_leaks


def setup(config: RunConfig) -> tuple[Run, PreTrainedTokenizerBase]:
    """Build the run, restore its checkpoint if it resumes, and write config.yaml.

    Raises:
        ConfigError: the configuration cannot be run. Wherever possible this is raised before the model loads.
    """
    dtype = initialise_process(config)
    per_rank = prompts_per_rank(config, ranks.world_size())
    start = find_and_lock_start(config)
    prepared = prepare_teacher(config, prepare(config))
    check_num_steps(start, count_steps(config, len(prepared.tasks), config.prompts_per_step))
    note_tasks(config, prepared, config.prompts_per_step)
    with show_elapsed("loading the model"):
        policy = load_policy(
            config.model,
            start.lora(config),
            dtype=dtype,
            temperature=config.sampling.temperature,
            replays_routing=config.sampling.replay_routing,
        )
        teacher = load_teacher(config, policy, dtype, ranks.device())
    run = build_run(config, start, policy, prepared, config.prompts_per_step, dtype, teacher=teacher)
    run.sampler.check_model()
    check_routing(config, policy)
    if config.reference.every:
        policy.start_reference()
    restore_run(run, start)
    sampling, trainer = config.sampling, config.trainer
    run.log.info(
        f"{describe_tasks(config, prepared)}, "
        f"{quantify(run.num_steps, 'step')} of {quantify(trainer.completions_per_step, 'completion')} = "
        f"{quantify(ranks.world_size(), 'process', 'processes')} "
        f"× {quantify(per_rank, 'prompt')} × {sampling.group_size}, "
        f"{dtype_name(dtype)}"
    )
    for remark in list_remarks(config):
        run.log.info(f"note: {remark}")
    if config.lora.dropout and trainer.num_minibatches * trainer.num_passes > 1:
        run.log.info(
            "note: lora.dropout is above 0 with several optimizer steps per batch; dropout adds noise to the ratios"
        )
    gc.collect()
    gc.freeze()  # these objects live as long as the run, so garbage collections in a step skip them
    return run, prepared.tokenizer


def describe_tasks(config: RunConfig, prepared: Prepared) -> str:
    """Return the number of tasks and of prompts that were too long, as text."""
    treatment = "dropped"
    if config.data.long_prompts == "truncate_left":
        treatment = "cut on the left" + (", with the system turn" if config.data.prompt == "chat" else "")
        if bos := getattr(prepared.tokenizer, "bos_token", None):
            treatment += f", behind the begin token {bos}"
    return (
        f"{quantify(len(prepared.tasks), 'task')} ({prepared.num_too_long:,} {treatment}, because the prompt has "
        "more than "
        f"{quantify(config.data.max_prompt_tokens, 'token')})"
    )


def count_steps(config: RunConfig, num_tasks: int, tasks_per_step: int) -> int:
    """Return the number of steps of the run."""
    return config.trainer.num_steps or max(1, int(config.trainer.epochs * num_tasks / tasks_per_step))


def note_tasks(config: RunConfig, prepared: Prepared, tasks_per_step: int) -> None:
    """Print how many tasks are held out, prompts that are trained and evaluated, and the number of steps."""
    for sentence in [*list_held_out(config, prepared), *list_leaks(prepared)]:
        print_note(sentence)
    note_steps(config, len(prepared.tasks), tasks_per_step)


def note_steps(config: RunConfig, num_tasks: int, tasks_per_step: int) -> None:
    """Print how many steps the run has and why, if no key sets their number."""
    if config.trainer.num_steps is None:
        epochs, steps = config.trainer.epochs, count_steps(config, num_tasks, tasks_per_step)
        origin = ", the default" if epochs == TrainerConfig.epochs else ""
        print_note(
            f"trainer.num_steps is not set, so the run has {quantify(steps, 'step')}: trainer.epochs "
            f"({epochs:g}{origin}) "
            f"× {quantify(num_tasks, 'task')} / {tasks_per_step:,} in each step"
        )


def build_run(
    config: RunConfig,
    start: RunStart,
    policy: Policy,
    prepared: Prepared,
    tasks_per_step: int,  # over all ranks
    dtype: torch.dtype,
    longest_completion: int | None = None,  # tokens; default: sampling.max_new_tokens
    teacher: Teacher | None = None,
) -> Run:
    """Build the engine, sampler, rewards, objective, memory budgets and log, and return them as a `Run`."""
    trainer, world_size = config.trainer, ranks.world_size()
    tokenizer, tasks, eval_rewards = prepared.tokenizer, prepared.tasks, make_eval_rewards(config)
    rates = make_pass_rates(config, tasks) if longest_completion is None else None  # sft samples nothing
    stream = make_stream(config, tasks, tasks_per_step, rates)
    num_steps = count_steps(config, len(tasks), tasks_per_step)
    total_steps = num_steps * trainer.num_minibatches * trainer.num_passes
    engine = Engine(policy.model, config, dtype=dtype, total_steps=total_steps, world_size=world_size)
    policy.model.eval()  # DeepSpeed switches it to training mode
    log = RunLog(start.folder, config, start.step, num_steps)
    log.flops_per_token = policy.flops_per_token()
    _log_notes(log, policy, prepared)
    longest = (max(prompt_lengths(tasks)), longest_completion or config.sampling.max_new_tokens)
    rows = trainer.completions_per_step // world_size // trainer.num_minibatches
    taught = None if teacher is None else Taught(teacher, find_longest_teacher_prompt(tasks))
    rewards = make_rewards(config, start.folder)  # before the budgets: a reward model takes memory
    sampler = make_sampler(config.sampling, policy, tokenizer, log.info, records_routing=True)
    options = {"folder": start.folder, "rank": ranks.rank(), "warn": log.info}
    return Run(
        config=config,
        folder=start.folder,
        start_step=start.step,
        num_steps=num_steps,
        control=start.control(config),
        steps_per_epoch=stream.steps_per_epoch,
        tasks=stream,
        eval_tasks=prepared.eval_tasks,
        policy=policy,
        sampler=sampler,
        engine=engine,
        rewards=rewards,
        eval_reward=next(iter(eval_rewards.values())),
        eval_rewards=eval_rewards,
        objective=build_objective(config),
        budgets=find_budgets(config, policy, longest, rows, log.info, taught),
        log=log,
        pass_rates=rates,
        teacher=teacher,
        environments=make_environments(config, sampler, **options) if longest_completion is None else None,
    )


def _log_notes(log: RunLog, policy: Policy, prepared: Prepared) -> None:
    if sentence := describe_eos_mismatch(policy.causal_lm, prepared.tokenizer):
        log.info(f"warning: {sentence}")
    for sentence in (describe_frozen_experts(policy.model), describe_untied(policy.model)):
        if sentence:
            log.info(f"note: {sentence}")
    for sentence in prepared.warnings:
        log.info(f"warning: {sentence}")


def make_stream(
    config: RunConfig, tasks: Sequence[Task], tasks_per_step: int, rates: PassRates | None = None
) -> TaskStream:
    """Return this rank's tasks in the order of the steps; without pass rates there is no curriculum."""
    curriculum = None if rates is None else config.data.curriculum
    return TaskStream(
        tasks,
        tasks_per_step,
        config.seed,
        ranks.rank(),
        ranks.world_size(),
        rates=rates,
        curriculum=curriculum,
        weights={source.name: source.weight for source in config.data.sources},
    )


def find_longest_teacher_prompt(tasks: Sequence[Task]) -> int:
    """Return the tokens of the longest prompt that the teacher sees."""
    if isinstance(tasks, TasksOnDisk):  # which has no prompts of a teacher
        return max(prompt_lengths(tasks))
    return max(len(task.teacher_prompt_ids or task.prompt_ids) for task in tasks)


def initialise_process(config: RunConfig) -> torch.dtype:
    """Join the process group, seed the generators and check the DeepSpeed JSON; return the run's dtype."""
    if not config.log.verbose:
        quieten()
    trackers.check_installed(config)
    ranks.setup(config.trainer.hang_timeout)
    ranks.seed_all(make_key("new_weights", config.seed))
    dtype = resolve_dtype(config.model.precision)
    check_deepspeed(deepspeed_config(config, dtype, ranks.world_size()))
    return dtype
