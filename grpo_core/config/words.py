"""Read the words of a command line, `section.key=value`: the key's type is known before its value is parsed.

A key that takes text takes the word verbatim. A number, a truth value, a list and a mapping are read as YAML, without
YAML 1.1's octal and base-60 numbers. A word that opens a list or a mapping and does not close it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from grpo_core.config.environment_functions import ENVIRONMENTS
from grpo_core.config.sections import RunConfig
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.corrections import CORRECTIONS
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.rejections import REJECTIONS
from grpo_core.objective.rewards import REWARDS
from grpo_core.objective.truncation import TRUNCATIONS
from grpo_core.registry import Registry
from grpo_core.schema import ConfigError, argument_types, first_line, list_options

type_hints = cache(get_type_hints)  # a third of the time that a configuration takes

NULLS = ("", "~", "null", "Null", "NULL")  # as in YAML
INTEGER = re.compile(r"[+-]?\d+(_\d+)*")
ITEM = re.compile(r"(\w+)\[(\d+)\]")  # one item of a list: rewards[0]
TOKEN = re.compile(r"\"(?:\\.|[^\"\\])*\"|(?<![^\s\[{,:])'(?:''|[^'])*'|(?<!\S)#.*|[\[\]{}]")  # of YAML
CLOSING = {"[": "]", "{": "}"}
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)  # ValueError: a date such as 2024-13-45
REGISTRIES = {  # section with `name` and `args` -> the registry of its functions; rewards stands for its items
    "loss": LOSSES,
    "loss.rollout_correction": CORRECTIONS,
    "loss.rejection": REJECTIONS,
    "advantage": ADVANTAGES,
    "truncation": TRUNCATIONS,
    "rewards": REWARDS,
    "environment": ENVIRONMENTS,
}


def check_overrides(overrides: Iterable[str]) -> tuple[str, ...]:
    """Return the overrides that a program gave.

    Raises:
        ConfigError: they are no list of texts.
    """
    if isinstance(overrides, (str, bytes, Mapping)) or not isinstance(overrides, Iterable):
        raise ConfigError(f"overrides is {overrides!r}; it must be a list of texts, such as ['trainer.num_steps=5']")
    words = tuple(overrides)
    for word in words:
        if not isinstance(word, str):
            raise ConfigError(f"overrides has {word!r}; it must be a list of texts, such as ['trainer.num_steps=5']")
    return words


def split_word(word: str) -> tuple[str, str]:
    """Return the key and the text of a word `section.key=value`.

    Raises:
        ConfigError: the word has no key or no equals sign.
    """
    key, equals, text = word.partition("=")
    if not equals or not key:
        is_file = word.endswith((".yaml", ".yml", ".json"))
        advice = f"to use a config file, write --config {word}" if is_file else "write section.key=value"
        raise ConfigError(f"{word!r} is not an override; {advice}")
    return key, text


def find_type(key: str, data: Mapping[str, Any], words: Sequence[str] = ()) -> Any:
    """Return the type of a dotted key, and Any where there is no such key.

    An argument of a function has the type that the function declares. `data` and the later `words` name the function.
    """
    kind: Any = RunConfig
    parts = key.split(".")
    for i, part in enumerate(parts):
        item = ITEM.fullmatch(part)
        if is_dataclass(kind):
            kind = type_hints(kind).get(item[1] if item else part, Any)
            if item:
                kind = get_args(kind)[0] if get_origin(kind) is list else Any
        elif get_origin(kind) is dict and parts[i - 1] == "args" and i == len(parts) - 1:
            return _find_argument_type(parts[: i - 1], part, data, words)
        elif get_origin(kind) is dict and len(get_args(kind)) == 2:
            kind = get_args(kind)[1]
        else:
            return Any
    return kind


def _find_argument_type(sections: list[str], name: str, data: Any, words: Sequence[str]) -> Any:
    """Return the type of the argument `name` of the function that `sections` names."""
    section = ".".join(sections)
    registry = REGISTRIES.get(ITEM.sub(r"\1", section))
    named = get_in(data, section)
    function: Any = named.get("name") if isinstance(named, dict) else named  # an item of a list may be the name alone
    for word in words:
        key, _, text = word.partition("=")
        function = text if key == f"{section}.name" else function
    try:
        return argument_types(registry.get(function)).get(name, Any) if registry and function else Any
    except (ConfigError, TypeError):  # the check of the whole configuration reports it
        return Any


def get_in(data: Any, key: str, default: Any = None) -> Any:
    """Return the value of a dotted key in nested mappings and lists, or `default`."""
    for part in key.split("."):
        item = ITEM.fullmatch(part)
        data = data.get(item[1] if item else part) if isinstance(data, Mapping) else None
        if item:
            items = data if isinstance(data, list) else [data]  # one item needs no list
            data = items[int(item[2])] if int(item[2]) < len(items) else None
    return default if data is None else data


def parse_arguments(words: Sequence[str], registry: Registry | None = None, name: str = "") -> dict[str, Any]:
    """Return the arguments of the function `name` from words `argument=value`.

    Raises:
        ConfigError: a word has no equals sign, or there is no such function.
    """
    types = argument_types(registry.get(name)) if registry else {}
    arguments = {}
    for word in words:
        argument, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not an argument; write name=value")
        arguments[argument] = parse_value(text, types.get(argument, Any), argument)
    return arguments


def parse_value(text: str, kind: Any, key: str) -> Any:
    """Return the value that `text` has for a key of the type `kind`.

    A text that is no value of the type is returned as it is, or as YAML reads it: the check of the type reports it.

    Raises:
        ConfigError: the text begins as a list or a mapping, and is none.
    """
    if kind is Any:
        return _parse_yaml(text)
    options = list_options(kind)
    if type(None) in options and text in NULLS:
        return None
    item = next((get_args(option)[0] for option in options if get_origin(option) is list), None)
    takes_text = str in options or (is_dataclass(item) and type_hints(item)[fields(item)[0].name] is str)
    if any(is_dataclass(option) or (get_origin(option) or option) in (list, dict) for option in options):
        return _parse_structure(text, takes_text, item, key)
    for option in options:
        value = _parse_scalar(text, option)
        if value is not None:
            return value
    if takes_text or any(get_origin(option) is Literal for option in options):
        return text
    value = _parse_yaml(text)  # of a wrong type, for the message, but no 010, 0x10 or 1:30, which are numbers to YAML
    is_number = isinstance(value, int) or (isinstance(value, float) and float in options)
    return text if is_number and not isinstance(value, bool) else value


def _parse_scalar(text: str, kind: Any) -> Any:
    """Return `text` as a truth value, an integer or a number, or None if it is none."""
    if kind is bool:
        value = _parse_yaml(text)
        return value if isinstance(value, bool) else None
    if kind is int:
        return int(text) if INTEGER.fullmatch(text.strip()) else None
    if kind is float:
        try:
            return float(text)
        except ValueError:
            return float(text.replace(".", "", 1)) if text.lower() in (".nan", ".inf", "-.inf", "+.inf") else None
    return None


def _parse_structure(text: str, takes_text: bool, item: Any, key: str) -> Any:
    """Return a list, a mapping, or the text itself where the key takes text too.

    `{answer}` is a template and not a mapping, for a list whose items begin with a template.
    """
    if text.lstrip()[:1] not in CLOSING:
        return text if takes_text else _parse_yaml(text)
    try:
        value = yaml.safe_load(text)
    except YAML_ERRORS as error:
        unclosed, is_whole = _read_brackets(text)
        if unclosed:
            comment = "; ' #' begins a comment, so put quotes around a text with it" if " #" in text else ""
            raise ConfigError(f"{key} is {text!r}, where the bracket {unclosed} is not closed{comment}") from None
        if takes_text and not is_whole:  # a regular expression, or a template
            return text
        reason = " ".join(str(getattr(error, "problem", None) or first_line(error)).split())
        raise ConfigError(f"{key} is {text!r}, which is not YAML: {reason}") from None
    is_template = (
        isinstance(value, dict)
        and is_dataclass(item)
        and takes_text
        and bool(value)
        and all(inner is None for inner in value.values())
    )
    return text if is_template and not value.keys() & {f.name for f in fields(item)} else value


def _read_brackets(text: str) -> tuple[str | None, bool]:
    """Return the last bracket that nothing closes, if any, and whether the first bracket is closed at the text's end.

    Brackets in quotes and in comments do not count.
    """
    stack: list[str] = []
    end = 0
    for match in TOKEN.finditer(text):
        if match[0] in CLOSING:
            stack.append(match[0])
        elif stack and match[0] == CLOSING[stack[-1]]:
            stack.pop()
            end = end or (0 if stack else match.end())
    return (stack[-1] if stack else None), end == len(text.rstrip())


def _parse_yaml(text: str) -> Any:
    """Return a text parsed as YAML, or the text itself where that fails."""
    try:
        return yaml.safe_load(text)
    except YAML_ERRORS:
        return text
