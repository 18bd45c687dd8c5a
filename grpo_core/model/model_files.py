"""Check the files of a model's folder before a library reads them, and explain what a library raises about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from grpo_core.config.damaged_files import describe_damage, read_weight_names
from grpo_core.config.lora_checks import ADAPTER_WEIGHTS
from grpo_core.config.text_files import parse_json, read_text
from grpo_core.schema import first_line, summarize_error

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # transformers takes the first of them that is there
INDEX = ".index.json"  # what follows the name of the weights in that of their index, if they are in several files
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
)


def describe_bad_files(folder: Path) -> str | None:
    """Return a sentence about the first damaged file of a model's folder; None if none is seen or it is no folder.

    The configuration and the beginnings of the weights are read. A file that is not there is no damage, but for one
    that an index of the weights names.
    """
    if not folder.is_dir():
        return None
    for name, hint in ((CONFIG, ""), (GENERATION_CONFIG, "; correct it or delete it")):
        if (folder / name).exists() and (problem := _describe_bad_mapping(folder / name)):
            return problem + hint
    settings = read_config(folder).get("quantization_config")
    if settings is not None and not (isinstance(settings, dict) and "quant_method" in settings):
        return f"quantization_config in its {CONFIG} is {settings!r}; it must be a mapping with a quant_method"
    for file in _list_weight_files(folder, WEIGHTS):
        if problem := describe_damage(file):
            return problem
        if file.name.endswith(INDEX) and not _is_index(_read_json(file)):
            return f"{file.name} has no mapping weight_map from the weights to their files"
    return None


def describe_bad_tokenizer(folder: Path) -> str | None:
    """Return a sentence about the first damaged JSON file of a tokenizer; None if none is seen."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    return next((problem for file in files if (problem := _describe_bad_mapping(file))), None)


def list_weight_names(folder: Path) -> set[str]:
    """Return the names of the weights in the safetensors files of a folder; empty if there are none."""
    names: set[str] = set()
    for file in _list_weight_files(folder, WEIGHTS[:1]):
        if file.suffix == ".safetensors":
            names |= read_weight_names(file)
    return names


def describe_pickle(folder: Path) -> str | None:
    """Return a sentence about a file of weights in the older format that cannot be read; None if there is none."""
    for file in [*_list_weight_files(folder, WEIGHTS), *_list_weight_files(folder, ADAPTER_WEIGHTS)]:
        if file.suffix != ".bin":
            continue
        try:
            content = torch.load(file, map_location="meta", weights_only=True)
        except Exception:  # of many types
            return (
                f"{file.name} is damaged, or holds objects other than weights, which are not loaded because they could "
                f"run code; use a file in the format safetensors"
            )
        if not isinstance(content, Mapping):
            return f"{file.name} holds a {type(content).__name__} and no mapping of names to weights"
    return None


def describe_bad_config(error: Exception, values: Mapping[str, Any]) -> str:
    """Return a clause about config.json, which holds `values`, from the error that its use has raised.

    Some errors have only a name that transformers does not know, so its place in the configuration is looked up.
    """
    unknown = error.args[0] if isinstance(error, KeyError) and error.args else getattr(error, "name", None)
    for path, value in _list_values(values):
        if (
            value == unknown
            and (value is not None or path.endswith("rope_type"))
            and isinstance(error, LookupError | AttributeError)
        ):
            return f"{path} in its {CONFIG} is {value!r}, which transformers does not know"
    has_sentence = isinstance(error, ValueError) or type(error).__name__.startswith("Strict")
    return f"its {CONFIG} cannot be used: {first_line(error) if has_sentence else summarize_error(error)}"


def _list_values(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _list_values(value, f"{prefix}{name}.")
        elif isinstance(value, str) or value is None:
            yield f"{prefix}{name}", value


def _list_weight_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the files with a model's weights that transformers reads: one, or an index and those that it names."""
    for name in names:
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}{INDEX}").exists():
            content = _read_json(index)
            files = dict.fromkeys(content["weight_map"].values()) if _is_index(content) else {}
            return [index, *(folder / file for file in files)]
    return []


def _is_index(content: Mapping[str, Any]) -> bool:
    files = content.get("weight_map")
    return isinstance(files, dict) and all(isinstance(file, str) for file in files.values())


def _describe_bad_mapping(file: Path) -> str | None:
    if problem := describe_damage(file):
        return problem
    return None if isinstance(parse_json(read_text(file), file.name), dict) else f"{file.name} holds no mapping"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the mapping in config.json; empty if there is none."""
    return _read_json(folder / CONFIG)


def _read_json(file: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; empty if it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
