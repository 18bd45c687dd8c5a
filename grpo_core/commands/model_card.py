"""The model card of an exported model: its origin, how to load it, its accuracy, its training and its limits."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grpo_core.commands.evaluate import name_folder
from grpo_core.commands.evaluate_table import format_figure
from grpo_core.commands.open_policy import OpenedPolicy
from grpo_core.config.formula import render
from grpo_core.config.lora_checks import PLAIN_KEYS
from grpo_core.config.precision import DTYPES, dtype_name
from grpo_core.config.sections import DataConfig, LoraConfig, RunConfig
from grpo_core.counts import quantify
from grpo_core.data.encoding import apply_chat_template
from grpo_core.data.eval_sets import describe_set
from grpo_core.data.prompts import list_template_fields
from grpo_core.model.composite import find_auto_class
from grpo_core.model.loading import is_composite, load_whole_config
from grpo_core.model.quantized_loading import describe_configured, find_stored_bits
from grpo_core.monitor.run_log import describe_evaluation
from grpo_core.objective.reward_labels import label_rewards
from grpo_core.report.eval_sets import collect_accuracies, label_set
from grpo_core.report.run_reader import RunFolder, read_run

LIBRARIES = ("torch", "transformers", "peft", "deepspeed")
EXAMPLE_QUESTION = "What is 12 + 30?"  # used where the template asks for a question
EXAMPLE_PROMPT = "Why is the sky blue?"  # used otherwise

LOAD_ADAPTER = """\
import torch
from peft import PeftModel
from transformers import {classes}, AutoTokenizer

folder = "."  # the folder of this file, or the name of the hub repository
base = "{base}"{comment}
{config}{quantization}model = {auto}.from_pretrained(base, dtype={dtype}{options})
model = PeftModel.from_pretrained(model, folder)
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
"""
LOAD_CONFIG = """\
config = AutoConfig.from_pretrained(base{options})
config.get_text_config().update({rope})
"""
LOAD_QUANTIZATION = """\
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="{kind}", bnb_4bit_use_double_quant={double}, bnb_4bit_compute_dtype={dtype}
)
"""
LOAD_MERGED = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file, or the name of the hub repository
model = AutoModelForCausalLM.from_pretrained(folder, dtype={dtype}{trust})
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
"""
GENERATE = """\
prompt = {prompt!r}
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens={special})
output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False{stop})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def make_card(opened: OpenedPolicy, adapter: bool, dtype: str, gap: str | None) -> str:
    """Return the card as Markdown with the hub's front matter. It contains no path of this machine.

    `gap` describes the difference between the logits of the exported model and those of the trained policy.
    """
    config, run = opened.config, read_run(opened.folder) if opened.folder else None
    title = config.name if run else base_name(opened)
    parts = [_front_matter(opened, adapter), f"# {title}\n\n{_describe_model(opened, adapter, run)}"]
    parts.append(f"## How to load it\n\n```python\n{_loading_code(opened, adapter, dtype)}```")
    if gap:
        merged = "merged in float32 and " if opened.has_adapter else ""
        parts.append(
            f"The model was {merged}written in {dtype_name(DTYPES[dtype])}. The difference of its logits from "
            f"those of the trained policy, {gap}."
        )
    if run:
        parts.append(f"## Accuracy\n\n{_describe_accuracy(config, opened.folder, run, opened.steps)}")
        parts.append(f"## Training data\n\n{_describe_data(config)}")
        if not run.is_supervised:
            parts.append(f"## Objective\n\n```text\n{render(config)}\n```")
        parts.append(f"## Training\n\n{_describe_training(config, run, opened.steps)}")
        parts.append(f"## Limits\n\n{_describe_limits(config, run)}")
    return "\n\n".join(parts) + "\n"


def base_name(opened: OpenedPolicy) -> str:
    """Return the base model's hub id, its path in this package if it is built in, or the name of its folder."""
    path = opened.config.model.path
    if path.startswith("builtin:"):
        return path.replace("builtin:", "grpo_core/builtin/")
    return _hide_folders(path)


def _hide_folders(path: str) -> str:
    """Return a hub id as it is, and only the last part of a path on this machine."""
    is_local = path.startswith(("/", ".", "~")) or Path(path).exists()
    return Path(path).name if is_local else path


def _is_hub_id(path: str) -> bool:
    return _hide_folders(path) == path and path.count("/") == 1


def _front_matter(opened: OpenedPolicy, adapter: bool) -> str:
    config, lines = opened.config, ["---", "pipeline_tag: text-generation"]
    lines.append(f"library_name: {'peft' if adapter else 'transformers'}")
    if _is_hub_id(config.model.path):
        lines += [f"base_model: {config.model.path}", f"base_model_relation: {'adapter' if adapter else 'finetune'}"]
    paths = [config.of_source(name).data.path for name in config.source_names]
    hub_ids = [path for path in dict.fromkeys(paths) if _is_hub_id(path)]
    if opened.folder and hub_ids:
        lines += ["datasets:", *(f"- {path}" for path in hub_ids)]
    return "\n".join([*lines, "tags:", "- grpo", "- grpo_core", *(["- lora"] if config.lora.r else []), "---"])


def _describe_model(opened: OpenedPolicy, adapter: bool, run: RunFolder | None) -> str:
    kind = f"A LoRA adapter (rank {opened.config.lora.r}) for" if adapter else "A causal language model, made from"
    whole, classes = load_whole_config(opened.config.model), ""
    if is_composite(whole):  # it was loaded without the towers
        kind += " the text model of"
        fit = f"It fits the model that {find_auto_class(whole).__name__} opens, and no other class of this model."
        classes = f" {fit}" if adapter else ""
    method = "supervised fine-tuning" if run and run.is_supervised else "GRPO"
    training = f", trained by {method} with grpo_core" if run else ""
    quantization = ""
    if bits := describe_configured(opened.config.model):
        merged = "" if adapter else ", which were then dequantised, and the adapter merged into them"
        quantization = f" The weights of the base's layers were in 4 bits ({bits}) in training{merged}."
    return f"{kind} {base_name(opened)}{training}.{classes}{quantization}"


def _loading_code(opened: OpenedPolicy, adapter: bool, dtype: str) -> str:
    config = opened.config.of_source(opened.config.source_names[0])
    text = opened.policy.causal_lm.config.get_text_config()
    trust = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    options = (f", revision={config.model.revision!r}" if config.model.revision else "") + trust
    auto = find_auto_class(load_whole_config(config.model)).__name__ if adapter else ""
    values = {"base": base_name(opened), "dtype": DTYPES[dtype], "auto": auto, "classes": auto, "config": ""}
    values["trust"] = trust
    is_here = base_name(opened) != config.model.path  # not on the hub
    values["comment"] = "  # put the folder of the base model here" if is_here else ""
    if config.model.rope:
        rope = {name: getattr(text, name) for name in ("rope_parameters", "max_position_embeddings")}
        values["config"] = LOAD_CONFIG.format(options=options, rope=rope)
        values["classes"], options = f"AutoConfig, {auto}", f"{options}, config=config"
    values["quantization"] = ""
    if config.model.quantize and not find_stored_bits(load_whole_config(config.model)):
        values["quantization"] = LOAD_QUANTIZATION.format(
            kind=config.model.quantize, double=config.model.double_quant, dtype=values["dtype"]
        )
        values["classes"], options = (
            f"{values['classes']}, BitsAndBytesConfig",
            f"{options}, quantization_config=quantization",
        )
    values["options"] = options
    load = (LOAD_ADAPTER if adapter else LOAD_MERGED).format(**values)
    prompt = _fill_with_example(config.data.template)
    special = True
    if config.data.prompt == "chat":
        text = prompt or EXAMPLE_QUESTION
        turns = [{"role": "system", "content": config.data.system}] if config.data.system else []
        turns.append({"role": "user", "content": text})
        prompt = apply_chat_template(opened.tokenizer, turns, config.data)
        special = False
    texts = config.sampling.stop_strings
    stop = f", stop_strings={texts!r}, tokenizer=tokenizer" if texts else ""
    longest = config.sampling.max_new_tokens
    return load + GENERATE.format(prompt=prompt or EXAMPLE_PROMPT, special=special, max_new_tokens=longest, stop=stop)


def _fill_with_example(template: str) -> str | None:
    """Return a template with an example question in its only column; None if it has several or none."""
    columns = {*list_template_fields(template)}
    return template.format(**dict.fromkeys(columns, EXAMPLE_QUESTION)) if len(columns) == 1 else None


def _describe_accuracy(config: RunConfig, folder: Path, run: RunFolder, steps: int | None = None) -> str:
    """Return the accuracy before and after training, and the result of the `evaluate` command if there is one.

    `steps` are those taken before the checkpoint that is described; None stands for the end of the run.
    """
    lines = []
    accuracies = collect_accuracies(run.evaluation)
    for eval_set, rows in accuracies.items():
        path, split = describe_set(config, eval_set)
        label = f"{label_set(eval_set, config.selecting_set)}: " if eval_set else ""
        lines.append(f"{label or 'On '}{_hide_folders(path)} ({split}):\n")
        after = rows[-1:] if steps is None else [row for row in rows if row["step"] == steps]
        for name, row in (("before", rows[0]), *(("after", row) for row in after)):
            lines.append(f"- {name} ({quantify(int(row['step']), 'step')}): {describe_evaluation(_counts_to_int(row))}")
        if eval_set:
            lines.append("")
    if any(accuracies):
        lines.append(
            "The set that selects may have chosen the checkpoint and the end of the run, so its accuracy is too high; "
            "a reported set has chosen nothing.\n"
        )
    if result := _read_evaluation(config, folder, steps):
        lines += _evaluation_table(result)
    return "\n".join(lines) if lines else "The model was not evaluated."


def _evaluation_table(result: dict[str, Any]) -> list[str]:
    """Return the result of the `evaluate` command as lines of a Markdown table."""
    columns = [name for name in ("base", "policy") if name in result]
    data, sampling = result["data"], result["sampling"]
    samples = ""
    if sampling["samples"]:
        samples = (
            f", and {quantify(sampling['samples'], 'sample')} per problem at temperature {sampling['temperature']:g}"
        )
    lines = [
        "",
        f"On {quantify(data['problems'], 'problem')} of {_hide_folders(data['path'])} ({data['split']}), answers of "
        "up to "
        f"{quantify(sampling['max_new_tokens'], 'token')}{samples}, with 95 % intervals:",
        "",
        f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}",
    ]
    labels = label_rewards(name.removeprefix("reward ") for name in result["policy"])  # older files name whole paths
    for name in result["policy"]:
        cells = (format_figure(name, _none_to_nan(result[column][name])) for column in columns)
        label = labels[name.removeprefix("reward ")]
        lines.append(f"| {'reward ' * name.startswith('reward ')}{label} | {' | '.join(cells)} |")
    if "paired" in result:
        paired = result["paired"]
        lines += [
            "",
            f"Greedy answers against the base model: {quantify(paired['won'], 'problem')} won, {paired['lost']} lost, "
            f"McNemar's p = {paired['p']:.2g}.",
        ]
    return lines


def _read_evaluation(config: RunConfig, folder: Path, steps: int | None) -> dict[str, Any] | None:
    """Read what `evaluate` wrote for the weights after `steps`, or at the end of the run.

    None if it is missing, or its completions had another limit than the run's.

    The command writes it for the run's own problems only; results on other data have a folder of another name.
    """
    file = folder / name_folder(steps) / "evaluate.json"
    if not file.exists():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    return result if result["sampling"]["max_new_tokens"] == config.sampling.max_new_tokens else None


def _counts_to_int(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of evaluation.jsonl with its counts as integers."""
    return {**row, **{name: int(row[name]) for name in ("correct", "n", "failed") if row.get(name) is not None}}


def _none_to_nan(figure: dict[str, Any]) -> dict[str, Any]:
    return {key: float("nan") if value is None else value for key, value in figure.items()}


def _describe_data(config: RunConfig) -> str:
    weights = {source.name: source.weight for source in config.data.sources}
    parts = [_describe_source(config.of_source(name).data) for name in config.source_names]
    titles = [f"- source {name}, weight {weight:g}\n" for name, weight in weights.items()] or [""]
    return "\n".join(f"{title}{part}" for title, part in zip(titles, parts, strict=True))


def _describe_source(data: DataConfig) -> str:
    subset = f", subset {data.subset}" if data.subset else ""
    system = f", system `{data.system!r}`" if data.system else ""
    lines = [
        f"- data: {_hide_folders(data.path)}{subset}, split {data.split}",
        f"- prompt ({data.prompt}): `{data.template!r}`{system}",
    ]
    if data.columns:
        lines.append(f"- columns: {', '.join(f'{ours} is {theirs}' for ours, theirs in data.columns.items())}")
    return "\n".join(lines)


def _describe_training(config: RunConfig, run: RunFolder, checkpoint_steps: int | None) -> str:
    trainer, engine, lora = config.trainer, config.engine, config.lora
    taken = [row for row in run.metrics if checkpoint_steps is None or row["step"] < checkpoint_steps]
    seconds = sum(row.get("seconds") or 0.0 for row in taken)
    tokens = sum(row.get("tokens") or 0.0 for row in taken)
    steps = f"{len(run.metrics):,}"
    if checkpoint_steps is not None and checkpoint_steps != len(run.metrics):
        steps = f"{checkpoint_steps:,} (a checkpoint of a run of {steps})"
    adapter = f"rank {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {lora.target_modules}"
    others = {f.name: getattr(lora, f.name) for f in fields(lora) if f.name not in (*PLAIN_KEYS, "path")}
    others = {name: value for name, value in others.items() if value != getattr(LoraConfig(), name)}
    adapter += "".join(f", {name} {value}" for name, value in others.items())
    rows = [
        ("steps", f"{steps} of {quantify(trainer.completions_per_step, 'completion')}"),
        ("tokens", f"{tokens:,.0f} in {seconds / 3600:.2f} hours"),
        ("optimizer", f"AdamW, learning rate {engine.learning_rate:g}"),
        ("schedule", f"{quantify(engine.warmup_steps, 'warm-up step')}, then {engine.schedule}"),
        (
            "optimizer steps per step",
            f"{quantify(trainer.num_minibatches, 'minibatch', 'minibatches')} × "
            f"{quantify(trainer.num_passes, 'pass', 'passes')}",
        ),
        ("LoRA", adapter if lora.r else "none: all weights are trained"),
        ("versions", ", ".join(f"{name} {version(name)}" for name in LIBRARIES)),
    ]
    if not run.is_supervised:
        sampling = config.sampling
        groups = f"groups of {sampling.group_size} at temperature {sampling.temperature:g}"
        rows.insert(2, ("sampling", f"{groups}, up to {quantify(sampling.max_new_tokens, 'token')}"))
    return "\n".join(f"- {name}: {text}" for name, text in rows)


def _describe_limits(config: RunConfig, run: RunFolder) -> str:
    if run.is_supervised:
        return "The model imitates the answers of its training data. Only what is reported above was measured."
    names = [reward.name for reward in config.all_rewards if reward.weight]
    names = [config.label_reward(name) for name in names]
    source = f"these rewards only: {', '.join(names)}" if names else "a teacher and no reward"
    if names and config.teacher.trains:
        source += ", and a teacher"
    return (
        f"The model was trained on one form of prompt, with {source}. Other prompts were "
        f"not tested, nor whether the text before an answer is correct."
    )
