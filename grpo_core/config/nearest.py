"""Find the key that a user may have meant, in any section."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from grpo_core import trl_names, verl_names
from grpo_core.config.sections import RunConfig
from grpo_core.config.words import REGISTRIES, type_hints
from grpo_core.schema import keyword_arguments, list_known

CUTOFF = 0.75  # similarity of a name in another section; in its own section difflib's 0.6 is enough
MAX_SHOWN = 3
OTHER_NAMES = {  # names of other programs -> key
    "steps": "trainer.num_steps",
    "batch_size": "trainer.completions_per_step",
    "max_tokens": "sampling.max_new_tokens",
    "max_length": "sampling.max_new_tokens",
    "lora_rank": "lora.r",
    "rank": "lora.r",
    "optimizer": "engine.learning_rate",
    "output": "output_dir",
    "model_name_or_path": "model.path",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "stop_strings": "sampling.stop",
    "rope_scaling": "model.rope",
    "rope_parameters": "model.rope",
    "adapter": "lora.path",
}


def describe_unknown_key(section: str, name: str, names: Iterable[str], value: Any) -> str:
    """Return the rest of the message about an unknown key `name` of a section with the keys `names`."""
    names, key = list(names), f"{section}.{name}" if section else name
    if hint := verl_names.key_hint(key, value) or trl_names.key_hint(key, value):
        return hint
    if difflib.get_close_matches(name, names, n=1, cutoff=0.85) or not (keys := find_keys(name)):
        return list_known(name, names)
    if difflib.get_close_matches(name, names, n=1) and not _is_exact(name, keys[0]):
        return list_known(name, names)
    known = f"known: {', '.join(sorted(names))}"
    return f"{known} (did you mean {' or '.join(keys)}?)"


def find_keys(name: str) -> list[str]:
    """Return the dotted keys of any section that `name` may stand for, the likeliest first."""
    keys = [*list_keys(RunConfig, "")]
    exact = [key for key in keys if _is_exact(name, key)]
    if exact:
        return sorted(exact, key=lambda key: (key.count("."), key))[:MAX_SHOWN]
    if name in OTHER_NAMES:
        return [OTHER_NAMES[name]]
    by_last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = difflib.get_close_matches(name, by_last, n=1, cutoff=CUTOFF)
    return [by_last[close[0]]] if close else []


def list_keys(section: type, prefix: str) -> Iterator[str]:
    """Yield every key below a section, with the arguments of the registered functions."""
    hints = type_hints(section)
    for field in fields(section):
        key, kind = f"{prefix}{field.name}", hints[field.name]
        item = get_args(kind)[0] if get_origin(kind) is list else None
        yield key
        if is_dataclass(kind):
            yield from list_keys(kind, f"{key}.")
        elif is_dataclass(item):
            yield from list_keys(item, f"{key}[0].")
    if registry := REGISTRIES.get(prefix.removesuffix(".").removesuffix("[0]")):
        names = (name for function in registry.functions.values() for name in keyword_arguments(function))
        yield from (f"{prefix}args.{name}" for name in dict.fromkeys(names))


def _is_exact(name: str, key: str) -> bool:
    """Return True if `name` is the last part of a key, with or without underscores, or its initials."""
    last = key.rpartition(".")[2]
    words = last.split("_")
    initials = len(words) > 1 and name.lower() == "".join(word[:1] for word in words)
    return initials or name.lower().replace("-", "").replace("_", "") == last.replace("_", "")
