"""The card of an exported model: what it is, what it was trained on and for, how well it does, how to load it."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grpo_core.commands.evaluate import cell, short
from grpo_core.commands.open_policy import Opened
from grpo_core.config.formula import render
from grpo_core.config.sections import RunConfig
from grpo_core.monitor.run_log import describe
from grpo_core.report.run_reader import RunFolder, read_run

LIBRARIES = ("torch", "transformers", "peft", "deepspeed")

ADAPTER = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies, or the repository's name
model = AutoModelForCausalLM.from_pretrained("{base}", dtype=torch.{dtype})
model = PeftModel.from_pretrained(model, folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
MERGED = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies, or the repository's name
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.{dtype})
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
ASK = """\
prompt = {prompt!r}
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens={special})
output = model.generate(**inputs, max_new_tokens={longest}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
TORCH = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def card(opened: Opened, adapter: bool, dtype: str, gap: str | None) -> str:
    """The card as Markdown with the hub's front matter. No path of this machine enters it."""
    config, run = opened.config, read_run(opened.folder) if opened.folder else None
    parts = [_front(opened, adapter), f"# {config.name if run else base_name(opened)}\n\n{_what(opened, adapter, run)}"]
    parts.append(f"## How to load it\n\n```python\n{_code(opened, adapter, dtype)}```")
    if gap:
        parts.append(f"Merged in float32 and written in {dtype}; against base and adapter, {gap}.")
    if run:
        parts.append(f"## How well it does\n\n{_accuracy(config, opened.folder, run)}")
        parts.append(f"## What it was trained on\n\n{_data(config)}")
        if not run.is_supervised:
            parts.append(f"## What was minimised\n\n```text\n{render(config)}\n```")
        parts.append(f"## The training in numbers\n\n{_numbers(config, run)}")
        parts.append(f"## Limits\n\n{_limits(config, run)}")
    return "\n\n".join(parts) + "\n"


def base_name(opened: Opened) -> str:
    """The base model's hub id; the built-in one's place in this package; of another folder its name alone."""
    path = opened.config.model.path
    return path.replace("builtin:", "grpo_core/builtin/") if path.startswith("builtin:") else _public(path)


def _public(path: str) -> str:
    """A hub id as it is; of a folder or a file of this machine only its name."""
    local = path.startswith(("/", ".", "~")) or Path(path).exists()
    return Path(path).name if local else path


def _is_hub(path: str) -> bool:
    return _public(path) == path and path.count("/") == 1


def _front(opened: Opened, adapter: bool) -> str:
    config, lines = opened.config, ["---", "pipeline_tag: text-generation"]
    lines.append(f"library_name: {'peft' if adapter else 'transformers'}")
    if _is_hub(config.model.path):
        lines += [f"base_model: {config.model.path}", f"base_model_relation: {'adapter' if adapter else 'finetune'}"]
    if opened.folder and _is_hub(config.data.path):
        lines += ["datasets:", f"- {config.data.path}"]
    return "\n".join([*lines, "tags:", "- grpo", "- grpo_core", *(["- lora"] if config.lora.r else []), "---"])


def _what(opened: Opened, adapter: bool, run: RunFolder | None) -> str:
    how = "supervised fine-tuning" if run and run.is_supervised else "GRPO"
    kind = f"A LoRA adapter (rank {opened.config.lora.r}) for" if adapter else "A causal language model, made from"
    trained = f", trained by {how} with grpo_core" if run else ""
    return f"{kind} {base_name(opened)}{trained}."


def _code(opened: Opened, adapter: bool, dtype: str) -> str:
    config = opened.config
    load = (ADAPTER if adapter else MERGED).format(base=base_name(opened), dtype=TORCH[dtype])
    prompt = "Why is the sky blue?"
    if "{question}" in config.data.template and config.data.prompt == "template":
        prompt = config.data.template.replace("{question}", "What is 12 + 30?")
    special = True
    if config.data.prompt == "chat":
        text = config.data.template.replace("{question}", "What is 12 + 30?")
        turns = [{"role": "system", "content": config.data.system}] if config.data.system else []
        turns.append({"role": "user", "content": text})
        prompt = opened.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        special = False
    return load + ASK.format(prompt=prompt, special=special, longest=config.sampling.max_new_tokens)


def _accuracy(config: RunConfig, folder: Path, run: RunFolder) -> str:
    """Before and after, from the run's evaluations; and what `evaluate` found, where it was asked."""
    lines = []
    rows = [row for row in run.evaluation if row.get("accuracy") is not None]
    for name, row in (("before", rows[0]), ("after", rows[-1])) if rows else ():
        lines.append(f"- {name} ({row['step']:.0f} steps): {describe(_whole(row))}")
    if result := _evaluated(config, folder):
        shown = [name for name in ("base", "policy") if name in result]
        data, how = result["data"], result["sampling"]
        sampled = (
            f", and {how['samples']} samples of each at temperature {how['temperature']:g}" if how["samples"] else ""
        )
        lines += [
            "",
            f"On {data['problems']} problems of {_public(data['path'])} ({data['split']}), answers of up to "
            f"{how['max_new_tokens']} tokens{sampled}, with 95 % intervals:",
            "",
            f"| | {' | '.join(shown)} |\n|---|{'---|' * len(shown)}",
        ]
        for name in result["policy"]:
            cells = (cell(name, _known(result[one][name])) for one in shown)
            lines.append(f"| {short(name)} | {' | '.join(cells)} |")
        if "paired" in result:
            paired = result["paired"]
            lines += [
                "",
                f"Against the base: {paired['won']} won, {paired['lost']} lost, McNemar's p = {paired['p']:.2g}.",
            ]
    return "\n".join(lines) if lines else "It was not evaluated."


def _evaluated(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """What `evaluate` found on the run's own problems, answered as in the run; nothing else belongs on the card."""
    file = folder / "evaluate" / "evaluate.json"
    if not file.exists():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    return result if result["sampling"]["max_new_tokens"] == config.sampling.max_new_tokens else None


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its counts as whole numbers."""
    return {**row, **{name: int(row[name]) for name in ("correct", "n", "failed") if row.get(name) is not None}}


def _known(value: dict[str, Any]) -> dict[str, Any]:
    return {key: float("nan") if inner is None else inner for key, inner in value.items()}


def _data(config: RunConfig) -> str:
    data, lines = config.data, [f"- data: {_public(config.data.path)}"]
    lines[0] += (f", subset {data.subset}" if data.subset else "") + f", split {data.split}"
    lines.append(
        f"- prompt ({data.prompt}): `{data.template!r}`" + (f", system `{data.system!r}`" if data.system else "")
    )
    if data.columns:
        lines.append(f"- columns: {', '.join(f'{ours} is {theirs}' for ours, theirs in data.columns.items())}")
    return "\n".join(lines)


def _numbers(config: RunConfig, run: RunFolder) -> str:
    trainer, engine, lora = config.trainer, config.engine, config.lora
    seconds = sum(row.get("seconds") or 0.0 for row in run.metrics)
    tokens = sum(row.get("tokens") or 0.0 for row in run.metrics)
    adapter = f"rank {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {lora.target_modules}"
    rows = [
        ("steps", f"{len(run.metrics):,} of {trainer.completions_per_step} completions"),
        ("tokens", f"{tokens:,.0f} in {seconds / 3600:.2f} hours"),
        ("optimizer", f"AdamW, learning rate {engine.learning_rate:g}"),
        ("schedule", f"{engine.warmup_steps} warm-up steps, then {engine.schedule}"),
        ("updates a step", f"{trainer.num_minibatches} minibatches × {trainer.num_passes} passes"),
        ("LoRA", adapter if lora.r else "none: all weights"),
        ("versions", ", ".join(f"{name} {version(name)}" for name in LIBRARIES)),
    ]
    if not run.is_supervised:
        sampling = config.sampling
        how = f"groups of {sampling.group_size} at temperature {sampling.temperature:g}"
        rows.insert(2, ("sampling", f"{how}, up to {sampling.max_new_tokens} tokens"))
    return "\n".join(f"- {name}: {text}" for name, text in rows)


def _limits(config: RunConfig, run: RunFolder) -> str:
    if run.is_supervised:
        return "It imitates the answers of its training data. Nothing but what is reported above was measured."
    paid = ", ".join(reward.name for reward in config.rewards if reward.weight)
    return (
        f"It was rewarded for {_named(paid)} and for nothing else, on prompts of one form. What it does on others, and "
        f"whether what it writes on the way to an answer is right, was not measured."
    )


def _named(rewards: str) -> str:
    """Rewards without the paths of their files."""
    return ", ".join(Path(name).name if ".py:" in name else name for name in rewards.split(", "))
