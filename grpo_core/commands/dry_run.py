"""`train --dry-run`: what a run would do, said before anything is written: its arithmetic, its objective, one group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.config.checks import prompts_per_rank
from grpo_core.config.formula import render
from grpo_core.config.sections import RunConfig
from grpo_core.data.stream import TaskStream
from grpo_core.distributed import ranks
from grpo_core.model.loading import load_model_config, load_tokenizer
from grpo_core.model.memory import find_budgets
from grpo_core.model.policy import Policy, load_policy
from grpo_core.monitor.progress import working
from grpo_core.schema import printable
from grpo_core.scoring.scoring import score
from grpo_core.training.prepare import (
    all_tasks,
    check_before_loading,
    check_columns,
    make_rewards,
    make_sampler,
    quieten,
)
from grpo_core.training.run_dir import holds_a_run

LONGEST = 400  # characters of a completion that are shown


def preview(config: RunConfig, processes: int) -> Iterator[str]:
    """The sections of the preview of a run in so many processes, each when it is known. Writes nothing.

    Raises:
        ConfigError: anything that would stop the run, before the weights load where that can be told.
    """
    quieten()
    ranks.seed_all(config.seed)
    per_rank, dtype = prompts_per_rank(config, processes), ranks.resolve_dtype(config.model.precision)
    yield "What is minimised\n" + _indent(render(config))
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    tasks, eval_tasks, left_out = all_tasks(config, tokenizer)
    check_columns(config, tasks, eval_tasks)
    check_before_loading(
        config, load_model_config(config.model), tokenizer, [task.prompt_ids for task in (*tasks, *eval_tasks)]
    )
    yield "A step\n" + _indent(arithmetic(config, tasks, eval_tasks, left_out, processes, per_rank))
    first = TaskStream(tasks, config.prompts_per_step, config.seed).batch(0)[0]
    yield "The first prompt, as the model sees it\n" + _indent(prompt(first, tokenizer))
    with working("loading the model"):
        policy = load_policy(config.model, config.lora, dtype=dtype, temperature=config.sampling.temperature)
        policy.model.to(ranks.device())
    yield "Memory of one process at its worst\n" + _indent(memory(config, policy, tasks, per_rank))
    yield "One group, sampled and scored\n" + _indent(group(config, policy, tokenizer, first))
    folder = Path(config.output_dir) / config.name
    taken = ", where another run lies (resume=auto, overwrite=true or another name)" if holds_a_run(folder) else ""
    yield f"Nothing was written. Without --dry-run this run would be in {folder}{taken}."


def arithmetic(
    config: RunConfig, tasks: list[Task], eval_tasks: list[Task], left_out: int, processes: int, per_rank: int
) -> str:
    """Prompts, completions, tokens and optimizer steps."""
    sampling, trainer, engine = config.sampling, config.trainer, config.engine
    per_step, most = config.prompts_per_step, max(len(task.prompt_ids) for task in tasks)
    steps = trainer.num_steps or max(1, int(trainer.epochs * len(tasks) / per_step))
    updates = trainer.num_minibatches * trainer.num_passes
    mean = sum(len(task.prompt_ids) for task in tasks) / len(tasks)
    every = config.evaluation.every
    between = "" if not every else ", and every epoch" if every == "epoch" else f", and every {every} steps"
    evaluated = f"before and after{between}" if eval_tasks else "never"
    lines = [
        f"{trainer.completions_per_step} completions = {processes} processes × {per_rank} prompts × "
        f"{sampling.group_size} (sampling.group_size)",
        f"at most {trainer.completions_per_step * sampling.max_new_tokens:,} new tokens = "
        f"{trainer.completions_per_step} × {sampling.max_new_tokens} (sampling.max_new_tokens), after prompts of "
        f"{mean:.0f} tokens on average and {most} at most",
        f"{updates} optimizer steps = {trainer.num_minibatches} minibatches × {trainer.num_passes} passes, "
        f"{trainer.completions_per_step // trainer.num_minibatches} completions each",
        f"{steps} steps = {steps * per_step / len(tasks):.3g} epochs of {len(tasks):,} prompts"
        + (f" ({left_out} more are too long)" if left_out else ""),
        f"{steps * updates:,} optimizer steps in all; the learning rate rises to {engine.learning_rate:g} in "
        f"{engine.warmup_steps} of them, then {engine.schedule}",
        f"{len(eval_tasks)} held-out problems, evaluated {evaluated}",
    ]
    return "\n".join(lines)


def prompt(task: Task, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt's text with its special tokens, and its length."""
    return f"{printable(tokenizer.decode(task.prompt_ids))}\n[{len(task.prompt_ids)} tokens]"


def memory(config: RunConfig, policy: Policy, tasks: list[Task], per_rank: int) -> str:
    """Weights, optimizer and key-value cache by their sizes; what an update takes is tried, on a GPU."""
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.parameters())
    rows, longest = per_rank * config.sampling.group_size, max(len(task.prompt_ids) for task in tasks)
    at_once = min(rows, config.sampling.rows_at_once or rows)
    cache = at_once * (longest + config.sampling.max_new_tokens) * cache_bytes_per_token(policy)
    offloaded = config.engine.deepspeed.get("zero_optimization", {}).get("offload_optimizer", {}).get("device")
    where = f"in {offloaded} memory" if offloaded not in (None, "none") else "beside the weights"
    lines = [
        f"{_gb(weights)} weights ({sum(p.numel() for p in policy.model.parameters()):,} parameters, {_name(policy)})",
        f"{_gb(trained * 4)} gradients of {trained:,} trained parameters, summed in float32",
        f"{_gb(trained * 12)} their float32 copy and Adam's two moments, {where}, divided among the processes",
        f"at most {_gb(cache)} keys and values while sampling {at_once} completions of {longest} + "
        f"{config.sampling.max_new_tokens} tokens (given back before the update; halved where it does not fit)",
    ]
    if not torch.cuda.is_available():
        return "\n".join([*lines, "what an update takes beside that is tried on a GPU; there is none here"])
    said: list[str] = []
    torch.cuda.reset_peak_memory_stats()
    with working("trying what fits into memory"):
        find_budgets(config, policy, (longest, config.sampling.max_new_tokens), rows, said.append)
    peak = torch.cuda.max_memory_allocated()
    return "\n".join([*lines, *said, f"{_gb(peak)} allocated at the most while that was tried"])


def cache_bytes_per_token(policy: Policy) -> int:
    """Bytes of keys and values that one token holds in all layers."""
    config = policy.causal_lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * policy.causal_lm.dtype.itemsize


def group(config: RunConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, task: Task) -> str:
    """A prompt's completions with their rewards."""
    said: list[str] = []
    sampler, rewards = make_sampler(config.sampling, policy, tokenizer, said.append), make_rewards(config)
    with working("sampling one group"):
        rollouts = sampler.generate([task], config.sampling.group_size)
    scores = score(rewards, [task], rollouts.completions, config.sampling.group_size)
    lines = [*said, *scores.failures]
    for i, (text, length) in enumerate(zip(rollouts.completions, rollouts.lengths().tolist(), strict=True)):
        told = "  ".join(f"{name} {float(values[0, i]):.4g}" for name, values in scores.by_name.items())
        cut = ", cut off" if rollouts.truncated[i] else ""
        shown = printable(text) if len(text) <= LONGEST else f"{printable(text[:LONGEST])} ..."
        lines += [f"({i + 1})  reward {float(scores.rewards[0, i]):.4g} = {told}  [{length} tokens{cut}]"]
        lines += [f"     {line}" for line in shown.splitlines()]
    spread = scores.rewards[~scores.rewards.isnan()]
    if len(spread) and spread.max() == spread.min():
        lines.append("all rewards are equal, so this group would teach nothing")
    return "\n".join(lines)


def _name(policy: Policy) -> str:
    return str(policy.causal_lm.dtype).removeprefix("torch.")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
