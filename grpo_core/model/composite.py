"""Name the modules of a text model as the composite model does that plain transformers opens.

Of a composite model, which has a text model and towers, a run loads only the text model. Plain transformers opens some
composite models whole. The files of an adapter have the names of the model that plain transformers opens, so that PEFT
loads them there, and whole names of modules, so that PEFT refuses them on another class. A run reads both kinds of
names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
)

from grpo_core.model.lora_patterns import PATTERNS, read_values

PEFT_PREFIX = "base_model.model."  # of every key in an adapter's file
ATTRIBUTE = "names_in_composite"  # of a text model that was loaded from a composite one


def find_auto_class(whole: PretrainedConfig) -> type[Any]:
    """Return the class of transformers whose from_pretrained opens a model of this configuration."""
    is_multimodal = type(whole) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(whole) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    return AutoModelForMultimodalLM if is_multimodal else AutoModelForCausalLM


def find_names(whole: PretrainedConfig, text: nn.Module) -> dict[str, str]:
    """Return the prefixes of names in the text model, each with the prefix in the model that transformers opens.

    They are equal if transformers opens the text model itself. Empty if it cannot build the composite one.
    """
    try:
        with torch.device("meta"):
            opened = find_auto_class(whole).from_config(whole)
    except Exception:  # it needs a package that is not installed; then nobody can open it here
        return {}
    modules = [(_name_of(model, model.get_input_embeddings()), model) for model in (text, opened)]
    bodies = [name.rpartition(".")[0] for name, _ in modules]
    heads = [_name_of(model, model.get_output_embeddings()) for _, model in modules]
    pairs = zip((bodies[0], heads[0]), (bodies[1], heads[1]), strict=True)
    return {inner: outer for inner, outer in pairs if inner and outer}


def _name_of(model: nn.Module, module: nn.Module | None) -> str:
    return next((name for name, other in model.named_modules() if other is module), "")


def names_of(model: Any) -> dict[str, str]:
    """Return what `find_names` returned when the model was loaded."""
    return getattr(model, ATTRIBUTE, {})


def map_keys(model: Any) -> dict[str, str] | None:
    """Return PEFT's key_mapping for an adapter's files; None if their names are those of the model."""
    return {rf"^{re.escape(outer)}\.": f"{inner}." for inner, outer in names_of(model).items()} or None


def rename_files(
    folder: Path, names: Mapping[str, str], targeted: Iterable[str], copied: Sequence[str], adapted: Sequence[str]
) -> None:
    """Rename what the files of an adapter in `folder` name, from the text model to the composite model.

    `targeted` are the names of all modules that have an adapter, also another one, `copied` those of modules that are
    trained whole, and `adapted` those of `targeted` and of adapted weights.
    """
    file = folder / "adapter_model.safetensors"
    weights = {key.removeprefix(PEFT_PREFIX): x for key, x in load_file(file).items()}
    renamed = {PEFT_PREFIX + rename(name, names): x for name, x in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    own = {*targeted} & {name.partition(".lora_")[0] for name in weights}
    fitting = _fit_both(settings, own, copied, names)
    fitting |= {key: _fit_patterns(settings[key], adapted, names) for key in PATTERNS if settings.get(key)}
    path.write_text(json.dumps(fitting, indent=2), encoding="utf-8")


def rename(name: str, names: Mapping[str, str]) -> str:
    """Return the name that a module or weight of the text model has in the composite model."""
    for inner, outer in names.items():
        if name.startswith(f"{inner}."):
            return outer + name.removeprefix(inner)
    return name


def _fit_both(
    settings: dict[str, Any], targeted: Iterable[str], copied: Sequence[str], names: Mapping[str, str]
) -> dict[str, Any]:
    """Return an adapter's settings that mean the same modules in the text model and in the composite model.

    A short name such as q_proj would also mean modules of a tower. So the modules with an adapter become one regular
    expression. The modules that are copied get their whole names, of which PEFT needs the last letters alone:
    model.language_model.norm ends in model.norm. In other names the prefix is left out.
    """
    fitting = dict(settings)
    if settings.get("target_modules"):
        fitting |= {"target_modules": _match_modules(sorted(targeted), names), "exclude_modules": None}
        fitting |= {"layers_to_transform": None, "layers_pattern": None}
    if settings.get("modules_to_save") and all(outer.endswith(inner) for inner, outer in names.items()):
        fitting["modules_to_save"] = [*copied]
    if settings.get("target_parameters"):
        fitting["target_parameters"] = [_shorten(name, names) for name in settings["target_parameters"]]
    if isinstance(tokens := settings.get("trainable_token_indices"), dict):
        fitting["trainable_token_indices"] = {_shorten(name, names): value for name, value in tokens.items()}
    return fitting


def _shorten(name: str, names: Mapping[str, str]) -> str:
    """Return a name, or an expression that begins with one, without the prefix that the composite model has not."""
    prefixes = [prefix for inner in names for prefix in (f"{inner}.", re.escape(f"{inner}."))]
    prefixes += [f"^{prefix}" for prefix in prefixes]
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)


def _fit_patterns(patterns: Mapping[str, Any], adapted: Sequence[str], names: Mapping[str, str]) -> dict[str, Any]:
    """Return patterns that give the adapted modules and weights the same values in both models.

    They are `patterns` without prefixes; where these match other modules, a name for each.
    """
    values = read_values(patterns, adapted)
    shorter = {_shorten(pattern, names): value for pattern, value in patterns.items()}
    shorter = dict(sorted(shorter.items()))  # as PEFT does when it writes them again
    outer = read_values(shorter, [rename(name, names) for name in adapted])
    if read_values(shorter, adapted) == values and [*outer.values()] == [*values.values()]:
        return shorter
    return {re.escape(_shorten(name, names)): value for name, value in values.items() if value is not None}


def _match_modules(targeted: Iterable[str], names: Mapping[str, str]) -> str:
    r"""Return a regular expression of the modules' names in both models.

    >>> _match_modules(["model.layers.0.q", "model.layers.1.q"], {"model": "model.text"})
    '(?:model|model\\.text)\\.layers\\.(?:0|1)\\.(?:q)'
    """
    numbers: dict[tuple[str, str, str], list[str]] = {}  # of the layers, by prefix, what is before, and what is after
    for name in targeted:
        prefix = next((x for x in names if name.startswith(f"{x}.") or name == x), "")
        before, number, after = re.fullmatch(r"(.*?)(?:\.(\d+)\.(.*))?", name.removeprefix(prefix)).groups()  # type: ignore[union-attr]
        numbers.setdefault((prefix, before, after or ""), []).extend([number] if number else [])
    ends: dict[tuple[str, str, str], list[str]] = {}
    for (prefix, before, after), layers in numbers.items():
        ends.setdefault((prefix, before, "|".join(layers)), []).append(re.escape(after))
    parts = []
    for (prefix, before, layers), last in ends.items():
        prefixes = [re.escape(name) for name in dict.fromkeys((prefix, names.get(prefix, "")))]
        begin = f"(?:{'|'.join(prefixes)})" if prefix else ""
        end = rf"\.(?:{layers})\.(?:{'|'.join(last)})" if layers else ""
        parts.append(begin + re.escape(before) + end)
    return "|".join(parts)
