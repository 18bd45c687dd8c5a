"""Supervised fine-tuning as a warm-up. It uses the policy, token weights and engine of GRPO training.

A batch consists of rollouts whose completions are the targets. The loss is `reinforce` with advantage 1 and the token
average, which equals the mean cross-entropy per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_core.batch import Rollouts, Task, TrainBatch
from grpo_core.config.precision import DTYPES, dtype_name
from grpo_core.config.sections import DataConfig, RunConfig, use_supervised_objective
from grpo_core.counts import quantify
from grpo_core.data.encoding import find_turn_end
from grpo_core.data.eval_sets import group_by_set, load_eval_sets, name_set
from grpo_core.data.rows import name_split
from grpo_core.data.tasks import select_source
from grpo_core.data.tasks_on_disk import split_into_parts
from grpo_core.distributed import ranks, signals
from grpo_core.model.loading import load_generation_config
from grpo_core.model.new_model import new_model
from grpo_core.model.policy import load_policy, wrap
from grpo_core.monitor import run_lock
from grpo_core.monitor.aggregates import Stats
from grpo_core.monitor.alerts import Alerts
from grpo_core.monitor.progress import show_elapsed
from grpo_core.random_keys import make_key
from grpo_core.sampling.end_of_sequence import find_eos_ids, find_eos_ids_of
from grpo_core.schema import ConfigError
from grpo_core.training import checkpoint, run_dir
from grpo_core.training.freeze import forward_all
from grpo_core.training.job import close_at_end, describe_best
from grpo_core.training.prepare import Prepared, prepare
from grpo_core.training.resume import check_num_steps, find_and_lock_start, restore_run
from grpo_core.training.run import Run
from grpo_core.training.setup import build_run, count_steps, describe_tasks, initialise_process, note_tasks
from grpo_core.training.sft_conversations import (
    build_conversation_rollouts,
    choose_conversations,
    find_answered_column,
)
from grpo_core.training.sft_targets import build_target_rollouts, find_longest_target
from grpo_core.training.skipped_steps import SkippedSteps
from grpo_core.training.trainer import begin, evaluate_save_or_stop, remaining_steps
from grpo_core.training.update import update_policy

MakeTargets = Callable[[Sequence[Task]], tuple[Rollouts, Tensor]]  # the tasks' targets, and the trained tokens [B, C]

TEMPERATURE = 1.0  # the cross-entropy of the unscaled logits, whatever temperature GRPO samples at later
COLUMNS = (  # columns of metrics.jsonl; the other metrics of an update need sampled completions
    *("step", "loss", "tokens", "grad_norm", "learning_rate", "epoch", "adapter_norm", "skipped"),
    *("tokens_updated", "micro_batches", "memory_retries"),
)


def run_sft(config: RunConfig) -> Path:
    """Train on the targets of the data and return the folder with the adapter (with lora.r 0 the model) and tokenizer.

    Raises:
        ConfigError: see `setup`.
        signals.Interrupted: a signal stopped the run; its `is_saved` tells whether a checkpoint was written.
        signals.RunFailed: the run cannot continue.
    """
    kind = "adapter" if config.lora.r else "model"
    with signals.handle_signals(), run_lock.released_at_end():
        run, tokenizer, make_targets = setup(config)
        output = Path(config.sft.output or run.folder / kind)
        with close_at_end(run):
            train(run, make_targets)
            if config.sft.save_precision != "auto":
                run.policy.model.to(DTYPES[config.sft.save_precision])
            checkpoint.export(output, run.policy, tokenizer)
            run.log.info(f"{describe_best(run)}{kind}: {output}")
    return output


def setup(config: RunConfig) -> tuple[Run, PreTrainedTokenizerBase, MakeTargets]:
    """Build the run, restore its checkpoint if it resumes, and write config.yaml.

    Raises:
        ConfigError: the configuration cannot be run. Wherever possible this is raised before the model loads.
    """
    dtype = initialise_process(config)
    config = use_supervised_loss(config)
    run_start = find_and_lock_start(config, "sft")
    if config.sft.output:
        run_dir.check_writable(Path(config.sft.output), "sft.output")
    base, tokenizer = _new_base(config) if config.sft.new_model else (None, None)
    prepared = prepare(
        config, tokenizer=tokenizer, model_config=base.config if base else None, scores_training_tasks=False
    )
    column = find_conversations(config, prepared.tasks)
    longest = longest_whole = 0
    if column:
        ends = _find_ends_before_loading(config, prepared, base)
        prepared, longest, longest_whole = choose_conversations(
            prepared, column, config.data, _name_source_of_tasks(config), *ends
        )
    check_num_steps(run_start, count_steps(config, len(prepared.tasks), config.trainer.completions_per_step))
    note_tasks(config, prepared, config.trainer.completions_per_step)
    longest = longest or find_longest(config, prepared)
    if base:
        policy = wrap(base.to(dtype), config.model, config.lora, temperature=TEMPERATURE)
    else:
        with show_elapsed("loading the model"):
            policy = load_policy(config.model, run_start.lora(config), dtype=dtype, temperature=TEMPERATURE)
    per_step = config.trainer.completions_per_step
    run = build_run(config, run_start, policy, prepared, per_step, dtype, longest)
    make_targets = find_target_maker(run, prepared.tokenizer, column)
    run = replace(run, job="sft", held_out=partial(compute_held_out_loss, run, make_targets))
    restore_run(run, run_start)
    run.log.info(
        f"{describe_tasks(config, prepared)}, {quantify(run.num_steps, 'step')} of "
        f"{_describe_lengths(per_step, longest, longest_whole)} on "
        f"{quantify(ranks.world_size(), 'process', 'processes')}, {dtype_name(dtype)}"
    )
    return run, prepared.tokenizer, make_targets


def _describe_lengths(per_step: int, longest: int, longest_whole: int) -> str:
    """Return what a step trains: targets of up to `longest` tokens, or conversations of up to `longest_whole`."""
    if not longest_whole:
        return f"{quantify(per_step, 'target')} of up to {quantify(longest, 'token')}"
    return (
        f"{quantify(per_step, 'conversation')} of up to {quantify(longest_whole, 'token')}, up to {longest:,} of them "
        f"from the assistant's first turn on,"
    )


def find_conversations(config: RunConfig, tasks: Sequence[Task]) -> str | None:
    """Return the column with the conversations to train on; None for sft.targets.

    Raises:
        ConfigError: there are several sources, and one of them has conversations.
    """
    for i, name in enumerate(config.source_names):
        column = find_answered_column(config.of_source(name).data, select_source(tasks, name))
        if column is not None and name:
            raise ConfigError(
                f"data.sources[{i}] ({name}) has conversations in the column {column!r}; sft trains the conversations "
                f"of one source only, so name it in data.path"
            )
    return column


def find_longest(config: RunConfig, prepared: Prepared) -> int:
    """Return the token count of the longest target of sft.targets.

    Raises:
        ConfigError: see `find_longest_target`.
    """
    return max(
        find_longest_target(config.sft, part, prepared.tokenizer, prepared.model_config, source)
        for tasks, source in _name_sources(config, prepared)
        for part in split_into_parts(tasks)
    )


def find_target_maker(run: Run, tokenizer: PreTrainedTokenizerBase, column: str | None) -> MakeTargets:
    """Return the function that builds the targets: the conversations of `column`, or those of sft.targets."""
    config, device = run.config, run.sampler.device
    eos_ids = find_eos_ids(run.policy.causal_lm, tokenizer)
    eos = _choose_end(tokenizer, config.data, eos_ids)

    def make_targets(tasks: Sequence[Task]) -> tuple[Rollouts, Tensor]:
        if column is not None:
            return build_conversation_rollouts(tasks, column, config.data, tokenizer, eos_ids, eos, device)
        rollouts = build_target_rollouts(tasks, config=config.sft, tokenizer=tokenizer, eos=eos, device=device)
        return rollouts, rollouts.completion_mask

    return make_targets


def _find_ends_before_loading(
    config: RunConfig, prepared: Prepared, base: PreTrainedModel | None
) -> tuple[set[int], int]:
    """Return the tokens that end a completion, and the one that ends a target, before the weights are loaded."""
    generation_config = base.generation_config if base else load_generation_config(config.model)
    eos_ids = find_eos_ids_of(generation_config, prepared.model_config, prepared.tokenizer)
    return eos_ids, _choose_end(prepared.tokenizer, config.data, eos_ids)


def _choose_end(tokenizer: PreTrainedTokenizerBase, config: DataConfig, eos_ids: set[int]) -> int:
    """Return the end of a target that the chat template does not end: its own, else the tokenizer's."""
    eos = find_turn_end(tokenizer, config, eos_ids)
    if eos is None:
        eos = min(eos_ids) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return eos


def use_supervised_loss(config: RunConfig) -> RunConfig:
    """Return `config` with the supervised loss instead of its own; checkpoints and config.yaml hold the result.

    Raises:
        ConfigError: a setting that a supervised run does not support.
    """
    trainer, world_size = config.trainer, ranks.world_size()
    for key in ("num_minibatches", "num_passes"):
        if getattr(trainer, key) != 1:
            raise ConfigError(
                f"trainer.{key} is {getattr(trainer, key)}; it must be 1 for sft: one optimizer step per batch"
            )
    if trainer.completions_per_step % world_size:
        raise ConfigError(
            f"trainer.completions_per_step is {trainer.completions_per_step}; it must be a multiple of the number of "
            f"processes, {world_size}"
        )
    if config.sft.new_model and config.lora.r:
        raise ConfigError(f"lora.r is {config.lora.r}; it must be 0 with sft.new_model, which trains all weights")
    return use_supervised_objective(config)


def train(run: Run, make_targets: MakeTargets) -> None:
    """Take the run's steps. Step s depends only on the weights before it and on (seed, s).

    Raises:
        signals.Interrupted, signals.RunFailed: see `run_sft`.
    """
    alerts, skipped_steps = Alerts(run.config), SkippedSteps(run)
    begin(run)
    for step in remaining_steps(run):
        tasks, stats = run.tasks.batch(step), Stats()
        with run.log.phase("update"):
            rollouts, loss_mask = make_targets(tasks)
            rollouts = replace(rollouts, completions=())  # the loss reads no text
            ones = torch.ones(len(rollouts), 1, device=rollouts.completion_ids.device)
            batch = TrainBatch(rollouts, ones, loss_mask)
            numbers = update_policy(run, batch, step, run.control, stats)
        stats.add_total("tokens", loss_mask.sum())
        row = {"step": step, **stats.reduce(), **numbers}
        row = {name: row[name] for name in COLUMNS}
        run.log.log_row(step, row, _format_row)
        skipped_steps.record(step, tasks, batch, row, run.control)
        evaluate_save_or_stop(run, step + 1, run.control, alerts.update(row), None, skipped_steps.good_step)


@torch.no_grad()
def compute_held_out_loss(run: Run, make_targets: MakeTargets, tasks: list[Task]) -> dict[str, float]:
    """Return the cross-entropy of evaluation targets: `loss`, the mean in nats over `tokens` tokens. A collective.

    The template of a task depends only on its row, so it is the same in every evaluation and every run.
    """
    mine = tasks[ranks.rank() :: ranks.world_size()]
    counts = torch.zeros(2, dtype=torch.double, device="cpu")
    if mine:
        keyed = [replace(task, seed=make_key("held_out", task.index)) for task in mine]
        rollouts, loss_mask = make_targets(keyed)
        logprobs = forward_all(run.policy, run.budgets.forward, replace(rollouts, completions=())).logprobs
        counts = torch.stack([-(logprobs.double() * loss_mask).sum(), loss_mask.sum()]).cpu()
    nats, tokens = ranks.all_sum(counts).tolist()
    return {"loss": nats / tokens, "tokens": int(tokens)}


def _name_sources(config: RunConfig, prepared: Prepared) -> Iterator[tuple[Sequence[Task], str]]:
    """Yield the training tasks of each source and the tasks of each evaluation set, with the names of their data."""
    for name in config.source_names:
        data = config.of_source(name).data
        yield select_source(prepared.tasks, name), f"the data, {name_split(data.path, data.split)}"
    for name, tasks in group_by_set(prepared.eval_tasks).items():
        yield tasks, f"the evaluation data, {name_set(config, name)}"


def _name_source_of_tasks(config: RunConfig) -> tuple[Callable[[Task], str], Callable[[Task], str]]:
    """Return the functions that name the data of a task for training and of one for evaluation, without sources."""
    data = config.data
    return (
        lambda task: f"the data, {name_split(data.path, data.split)}",
        lambda task: f"the evaluation data, {name_set(config, task.eval_set)}",
    )


def _new_base(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a new small model, and a tokenizer that was trained on the training rows."""
    rows = (row for name in config.source_names for row in load_eval_sets(config.of_source(name))[0])
    return new_model((" ".join(map(str, row.values())) for row in rows), **config.sft.new_model)


def _format_row(row: dict[str, float]) -> str:
    skipped = "  update skipped: gradient not finite" if row["skipped"] else ""
    return f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  {row['seconds']:.2f} s{skipped}"
