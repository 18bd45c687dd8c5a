"""The option `--dry-run` of `train` and `launch`: print what a run would do, sample one group, and write nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.commands.open_policy import load_checkpoint
from grpo_core.commands.sample import format_turns
from grpo_core.config.checks import prompts_per_rank
from grpo_core.config.formula import render
from grpo_core.config.precision import dtype_name, resolve_dtype
from grpo_core.config.sections import ENVIRONMENT_REWARD, EngineConfig, RunConfig
from grpo_core.counts import name_interval, quantify
from grpo_core.data.eval_sets import group_by_set
from grpo_core.data.rows import describe_eval_source
from grpo_core.data.tasks_on_disk import prompt_lengths
from grpo_core.distributed import ranks
from grpo_core.environments.setup import label_environment, make_environments, sample_turns
from grpo_core.model.families import head_dim
from grpo_core.model.memory import RESERVED_BYTES, Taught, find_budgets
from grpo_core.model.memory_estimate import CARDS, CUDA_BYTES, estimate, find_smallest_card
from grpo_core.model.policy import Policy, load_policy
from grpo_core.model.quantized import Sizes, count_weights
from grpo_core.model.quantized_loading import describe_quantization
from grpo_core.model.quieten import quieten
from grpo_core.model.reward_model import RewardModel
from grpo_core.model.teacher import Teacher, load_teacher
from grpo_core.monitor.progress import show_elapsed
from grpo_core.objective.rewards import REWARDS
from grpo_core.random_keys import make_key
from grpo_core.report.eval_sets import label_set
from grpo_core.schema import ConfigError, printable
from grpo_core.scoring.reward_call import find_missing_columns
from grpo_core.scoring.scoring import Reward, Scores, build_reward, close_rewards, score
from grpo_core.training.checkpoint import load_outcomes
from grpo_core.training.deepspeed_config import deepspeed_config
from grpo_core.training.difficulty import make_pass_rates
from grpo_core.training.lr_schedule import learning_rate_schedule
from grpo_core.training.prepare import Prepared, check_routing, make_rewards, make_sampler, prepare, prepare_teacher
from grpo_core.training.resume import RunStart, check_num_steps, look_up_start
from grpo_core.training.run_dir import describe_later, describe_unwritable, holds_run
from grpo_core.training.setup import count_steps, find_longest_teacher_prompt, list_held_out, make_stream

MAX_SHOWN_CHARACTERS = 400  # of each completion


def run_dry_run(config: RunConfig, processes: int) -> int:
    """Print the sections of the preview, each as soon as it is known.

    Raises:
        ConfigError: as in `preview`.
    """
    for section in preview(config, processes):
        print(section, end="\n\n", flush=True)
    return 0


def preview(config: RunConfig, processes: int) -> Iterator[str]:
    """Yield the sections of the preview of a run in `processes` processes; of a resumed run, from its next step on.

    Raises:
        ConfigError: the run could not start; raised before the weights load where the error can be known by then. Or a
            reward fails on every completion of the group.
    """
    quieten()
    ranks.seed_all(make_key("new_weights", config.seed))
    per_rank, dtype = prompts_per_rank(config, processes), resolve_dtype(config.model.precision)
    folder = Path(config.output_dir) / config.name
    if problem := describe_unwritable(folder):
        raise ConfigError(f"the run folder {folder} (output_dir and name) cannot be written: {problem}")
    start = _find_existing(config, folder)
    yield "Objective\n" + _indent(render(config))
    prepared = prepare_teacher(config, prepare(config))
    tokenizer, tasks = prepared.tokenizer, prepared.tasks
    num_steps = count_steps(config, len(tasks), config.prompts_per_step)
    if start is not None:
        check_num_steps(start, num_steps)
    sizes = describe_sizes(config, prepared, processes, per_rank)
    lines = [sizes, *list_held_out(config, prepared), *_describe_start(start, num_steps)]
    yield "Sizes\n" + _indent("\n".join(lines))
    if warnings := [*prepared.warnings, *(start.warnings if start else [])]:
        yield "Warnings\n" + _indent("\n".join(warnings))
    step = start.step if start else 0
    rates = make_pass_rates(config, tasks)
    if rates and start and start.checkpoint:
        rates.load(load_outcomes(start.checkpoint))
    first = make_stream(config, tasks, config.prompts_per_step, rates).batch(step)[0]
    if step < num_steps:
        yield f"First prompt{_of_step(step)}, as the model receives it\n" + _indent(describe_prompt(first, tokenizer))
        if first.teacher_prompt_ids:
            teacher_task = replace(first, prompt_ids=first.teacher_prompt_ids)
            yield "The same prompt, as the teacher receives it\n" + _indent(describe_prompt(teacher_task, tokenizer))
    with show_elapsed("loading the model"):
        lora = start.lora(config) if start else config.lora
        policy = load_policy(config.model, lora, dtype=dtype, temperature=config.sampling.temperature)
        if start and start.checkpoint:
            load_checkpoint(policy, start.checkpoint)
        teacher = load_teacher(config, policy, dtype, ranks.device())
        policy.model.to(ranks.device())
        check_routing(config, policy)
        rewards = make_rewards(config)
    yield "Memory of one process\n" + _indent(describe_memory(config, policy, tasks, per_rank, teacher, rewards))
    if step < num_steps:
        yield from _preview_group(config, policy, tokenizer, first, rewards, step)
    conflict = _describe_conflict(folder, config)
    yield f"Nothing was written. Without --dry-run the run folder would be {folder}{conflict}."


def _preview_group(
    config: RunConfig,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rewards: Sequence[Reward],
    step: int,
) -> Iterator[str]:
    group, failures = describe_group(config, policy, tokenizer, task, rewards)
    yield f"One group{_of_step(step)}, sampled and scored\n" + _indent(group)
    if failures:
        raise ConfigError(failures[0])


def _find_existing(config: RunConfig, folder: Path) -> RunStart | None:
    """Return the start of a run that would be resumed or replaced; None if there is none.

    Raises:
        ConfigError: the run cannot be resumed with this configuration, or another process writes it.
    """
    if folder.is_dir() and (config.resume is not None or config.overwrite):
        return look_up_start(config)
    return None


def _describe_start(start: RunStart | None, num_steps: int) -> list[str]:
    """Return a line about the steps that a resumed run has left."""
    if start is None or start.checkpoint is None:
        return []
    taken, left = quantify(start.step, "step"), num_steps - start.step
    if not left:
        return [f"resumed from {start.checkpoint} after {taken}: there are no more to take"]
    more = "step is" if left == 1 else "steps are"
    lines = [f"resumed from {start.checkpoint} after {taken}: {left:,} {more} left"]
    if start.goes_back:
        later = [*describe_later(start.folder, start.step), "rows, saved batches and answers of a judge"]
        lines.append(f"what the run has written after these would be discarded: {', '.join(later)}")
    return lines


def _of_step(step: int) -> str:
    return f" of step {step + 1:,}" if step else ""


def describe_sizes(config: RunConfig, prepared: Prepared, processes: int, per_rank: int) -> str:
    """Return the numbers of prompts, completions, tokens, steps and optimizer steps, one per line."""
    sampling, trainer, engine = config.sampling, config.trainer, config.engine
    tasks, eval_tasks, left_out = prepared.tasks, prepared.eval_tasks, prepared.num_too_long
    per_step, lengths = config.prompts_per_step, prompt_lengths(tasks)
    steps = count_steps(config, len(tasks), per_step)
    updates = trainer.num_minibatches * trainer.num_passes
    dropped = f" ({quantify(left_out, 'more prompt is', 'more prompts are')} too long and left out)" if left_out else ""
    if left_out and config.data.long_prompts == "truncate_left":
        dropped = f" ({quantify(left_out, 'of them is', 'of them are')} too long and cut on the left)"
    lines = [
        f"{quantify(trainer.completions_per_step, 'completion')} per step = "
        f"{quantify(processes, 'process', 'processes')} × "
        f"{quantify(per_rank, 'prompt')} × "
        f"{sampling.group_size} (sampling.group_size)",
        f"at most {quantify(trainer.completions_per_step * sampling.max_new_tokens, 'new token')} per step = "
        f"{trainer.completions_per_step} × {sampling.max_new_tokens} (sampling.max_new_tokens)",
        f"prompts of {quantify(round(sum(lengths) / len(lengths)), 'token')} on average and {max(lengths):,} at most",
        f"{quantify(updates, 'optimizer step')} per step = "
        f"{quantify(trainer.num_minibatches, 'minibatch', 'minibatches')} × "
        f"{quantify(trainer.num_passes, 'pass', 'passes')}, "
        f"with {quantify(trainer.completions_per_step // trainer.num_minibatches, 'completion')} each",
        f"{quantify(steps, 'step')} = {quantify(steps * per_step / len(tasks), 'epoch')} of "
        f"{quantify(len(tasks), 'prompt')}{dropped}",
        f"{quantify(steps * updates, 'optimizer step')} in total; {describe_learning_rate(engine, steps * updates)}",
        f"{quantify(len(eval_tasks), 'evaluation problem')}{_describe_source(config, eval_tasks)}, evaluated "
        f"{_describe_evaluation(config, eval_tasks)}",
    ]
    return "\n".join(lines)


def describe_learning_rate(engine: EngineConfig, total_steps: int) -> str:
    """Return the learning rate of the first optimizer steps, and its schedule after them."""
    factor, warmup = learning_rate_schedule(engine.schedule, engine.warmup_steps, total_steps), engine.warmup_steps
    first, peak = (f"{engine.learning_rate * factor(step):g}" for step in (0, min(warmup, total_steps - 1)))
    if not warmup:
        return f"the learning rate is {first} and follows engine.schedule {engine.schedule}"
    rise = f"the learning rate rises from {first} to {peak}"
    if total_steps <= warmup:
        return f"{rise}, below engine.learning_rate ({engine.learning_rate:g}), as engine.warmup_steps is {warmup:,}"
    return f"{rise} in optimizer step {warmup + 1:,}, then follows engine.schedule {engine.schedule}"


def _describe_source(config: RunConfig, eval_tasks: list[Task]) -> str:
    sets, selecting = group_by_set(eval_tasks), config.selecting_set
    parts = [f"{len(tasks)} in {label_set(name, selecting)}" for name, tasks in sets.items() if name]
    path, rows = describe_eval_source(config.data)
    return f" ({', '.join(parts)})" if parts else f" from {path} ({rows})" if eval_tasks else ""


def _describe_evaluation(config: RunConfig, eval_tasks: list[Task]) -> str:
    every = config.evaluation.every
    if not eval_tasks:
        return "never"
    if not every:
        return "before and after training"
    interval = "epoch" if every == "epoch" else name_interval(int(every), "step")
    return f"before and after training and every {interval}"


def describe_prompt(task: Task, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt's text with its special tokens, and its length in tokens."""
    return f"{printable(tokenizer.decode(task.prompt_ids))}\n[{quantify(len(task.prompt_ids), 'token')}]"


def describe_memory(
    config: RunConfig,
    policy: Policy,
    tasks: Sequence[Task],
    per_rank: int,
    teacher: Teacher | None = None,
    rewards: Sequence[Reward] = (),
) -> str:
    """Return the bytes of weights, gradients, optimizer state and key-value cache, and a card that suffices, in lines.

    On a GPU the largest micro-batches are tried, and the peak of allocated memory is added.
    """
    of_teacher = [] if teacher is None else [weight for _, weight in teacher.own_parameters()]
    own = {id(weight) for weight in of_teacher}
    of_policy = [weight for weight in policy.model.parameters() if id(weight) not in own]
    sizes = count_weights(of_policy, policy.model)
    trained = sum(p.numel() for p in policy.parameters())
    rows, longest = per_rank * config.sampling.group_size, max(prompt_lengths(tasks))
    rows_at_once = min(rows, config.sampling.rows_at_once or rows)
    cache = rows_at_once * (longest + config.sampling.max_new_tokens) * cache_bytes_per_token(policy)
    zero = deepspeed_config(config, policy.causal_lm.dtype, 1)["zero_optimization"]
    offload = (zero.get("offload_optimizer") or {}).get("device")
    is_offloaded = offload not in (None, "none")
    device = f"in {offload} memory" if is_offloaded else "on the device of the weights"
    lines = [
        f"{_format_bytes(sizes.bytes)} weights ({sizes.count:,} parameters, {_describe_dtype(policy.causal_lm)})",
        f"{_format_bytes(trained * 4)} gradients of {trained:,} trained parameters, summed in float32",
        f"{_format_bytes(trained * 12)} float32 copy of the trained parameters and Adam's two moments, {device}, "
        f"divided among the processes",
        f"at most {_format_bytes(cache)} keys and values while sampling {quantify(rows_at_once, 'completion')} of "
        f"{longest} + "
        f"{quantify(config.sampling.max_new_tokens, 'token')}; fewer are sampled at once if they do not fit",
    ]
    others = [] if teacher is None else [("teacher", teacher.policy.model, of_teacher)]
    models = [reward.function for reward in rewards if isinstance(reward.function, RewardModel)]
    others += [("reward model", None, [*model.parameters()]) for model in models]
    lines[1:1] = [_describe_other(*other) for other in reversed(others) if other[2]]
    other_bytes = sum(p.numel() * (2 if p.is_floating_point() else 1) for *_, weights in others for p in weights)
    lines += describe_cards(config, policy, (longest, config.sampling.max_new_tokens), not is_offloaded, other_bytes)
    if not torch.cuda.is_available():
        return "\n".join(lines)
    torch.cuda.reset_peak_memory_stats()
    with show_elapsed("trying what fits into memory"):
        taught = None if teacher is None else Taught(teacher, find_longest_teacher_prompt(tasks))
        find_budgets(config, policy, (longest, config.sampling.max_new_tokens), rows, lines.append, taught)
    peak = torch.cuda.max_memory_allocated()
    return "\n".join([*lines, f"{_format_bytes(peak)} allocated at most while these were tried"])


def describe_cards(
    config: RunConfig, policy: Policy, longest: tuple[int, int], adapter_on_gpu: bool, other_bytes: int
) -> list[str]:
    """Return lines about the memory that a GPU needs, computed from shapes, beside `other_bytes` of other models."""
    parts = estimate(
        policy.causal_lm, longest=longest, group_size=config.sampling.group_size, adapter_on_gpu=adapter_on_gpu
    )
    if parts is None:
        return [f"what a GPU needs is not computed for the model type {policy.causal_lm.config.model_type}"]
    needed = parts.needed + other_bytes
    smallest = find_smallest_card(needed)
    verdict = f"a card with {smallest} GB suffices" if smallest else f"a card with {CARDS[-1]} GB does not suffice"
    if smallest and smallest > CARDS[0]:
        verdict += f", and one with {CARDS[CARDS.index(smallest) - 1]} GB does not"
    return [
        f"computed for a GPU in 16 bits: {_format_bytes(parts.weights + other_bytes)} frozen weights, "
        f"{_format_bytes(parts.adapter)} trained weights with their gradient"
        f"{' and the state of the optimizer' if adapter_on_gpu else ''}, "
        f"{_format_bytes(parts.sampling)} while sampling one group, "
        f"{_format_bytes(parts.update)} in the update of one completion of {quantify(sum(longest), 'token')} with "
        f"gradient checkpointing",
        f"{_format_bytes(needed)} in all, with {_format_bytes(CUDA_BYTES + RESERVED_BYTES)} for CUDA and other "
        f"buffers: {verdict}",
    ]


def _describe_other(name: str, model: Any, weights: Sequence[torch.nn.Parameter]) -> str:
    """Return the size of the weights of a model beside the policy; `model` has those in 4 bits, if there are any."""
    sizes = Sizes(sum(p.numel() for p in weights), _count_bytes(weights))
    sizes = sizes if model is None else count_weights(weights, model)
    return f"{_format_bytes(sizes.bytes)} weights of the {name} ({sizes.count:,} parameters)"


def _describe_dtype(model: PreTrainedModel) -> str:
    kind = describe_quantization(model)
    return dtype_name(model.dtype) + (f", and the layers' products in {kind}" if kind else "")


def cache_bytes_per_token(policy: Policy) -> int:
    """Return the bytes of keys and values of one token over all layers."""
    config = policy.causal_lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim(config) * policy.causal_lm.dtype.itemsize


def describe_group(
    config: RunConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, task: Task, rewards: Sequence[Reward]
) -> tuple[str, list[str]]:
    """Sample and score one group; return its completions with their rewards, and what `list_failures` returns."""
    lines: list[str] = []
    sampler = make_sampler(config.sampling, policy, tokenizer, lines.append)
    with show_elapsed("sampling one group"):
        environments = make_environments(config, sampler)
        rollouts, turns = sample_turns(sampler, environments, [task], config.sampling.group_size)
    rewards = [reward for reward in rewards if not reward.sources or task.source in reward.sources]
    scores = score(rewards, [task], rollouts.completions, config.sampling.group_size)
    if environments is not None:
        scores = environments.add_to_scores(scores, turns)
        environments.close()
    lines += scores.failures
    texts = [format_turns(played) for played in turns] or rollouts.completions
    for i, (text, length) in enumerate(zip(texts, rollouts.lengths().tolist(), strict=True)):
        by_name = ", ".join(
            f"{name} {_format_reward(scores, float(values[0, i]), i, name)}" for name, values in scores.by_name.items()
        )
        truncated = ", truncated" if rollouts.truncated[i] else ""
        ellipsis = " ..." if len(text) > MAX_SHOWN_CHARACTERS else ""
        reward = f"reward {_format_reward(scores, float(scores.rewards[0, i]), i)} ({by_name}), " if by_name else ""
        lines += [f"({i + 1})  {reward}{quantify(length, 'token')}{truncated}"]
        lines += [f"     {line}" for line in f"{printable(text[:MAX_SHOWN_CHARACTERS])}{ellipsis}".splitlines()]
    scored = scores.rewards[~scores.rewards.isnan()]
    if len(scored) and scored.max() == scored.min():
        lines.append("all rewards are equal, so this group has advantage 0 and contributes no gradient")
    return "\n".join(lines), list_failures(config, task, rollouts.completions, scores)


def _format_reward(scores: Scores, value: float, sample: int, name: str | None = None) -> str:
    """Return a reward of a sample as text; the sum of all rewards without a name, which fails where any fails."""
    if not math.isnan(value):
        return f"{value:.4g}"
    failed = [values for key, values in scores.failed.items() if name in (None, key)]
    return "failed" if any(bool(values[0, sample]) for values in failed) else "none"


def list_failures(config: RunConfig, task: Task, completions: Sequence[str], scores: Scores) -> list[str]:
    """Return a sentence for each reward that fails on every completion of a group, evaluation.reward included.

    trainer.max_failed_rewards 1 allows that.
    """
    if config.trainer.max_failed_rewards >= 1:
        return []
    part, failures = config.of_source(task.source), list(scores.failures)
    labels = {ENVIRONMENT_REWARD: label_environment(config)}
    failed = [f"{labels.get(name, f'reward {name}')} " for name, values in scores.failed.items() if values.all()]
    name = part.evaluation.reward
    is_new = part.evaluation.num_tasks and config.label_reward(name) not in scores.by_name
    if is_new and not find_missing_columns(REWARDS.get(name), task.columns):
        function = build_reward(name, timeout=config.trainer.reward_timeout)
        outcome = score([Reward(name, 1.0, function)], [task], completions, len(completions))
        close_rewards([function])
        failures += [why.replace(f"reward {name} ", "evaluation.reward ", 1) for why in outcome.failures]
        failed += ["evaluation.reward "] if outcome.failed[name].all() else []
    number = quantify(len(completions), "completion")
    return [f"{why}, on all {number} of a group" for why in failures if why.startswith(tuple(failed))]


def _describe_conflict(folder: Path, config: RunConfig) -> str:
    if not holds_run(folder):
        return ""
    if config.overwrite:
        return ", and the run in it would be replaced"
    if config.resume is not None:
        return ", and the run in it would be continued"
    return ", which already holds a run (set resume=auto, overwrite=true or another name)"


def _count_bytes(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _format_bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
