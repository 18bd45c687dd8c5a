"""Configurations on disk: YAML with overrides and presets in, everything resolved out."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from grpo_core.config import REFUSED, RunConfig
from grpo_core.config_check import check
from grpo_core.objective import LETTERS, render
from grpo_core.presets import merge, preset
from grpo_core.schema import ConfigError, coerce, known


def load(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read a YAML file, apply a preset and `section.key=value` overrides (values are YAML), and check the outcome.

    Raises:
        ConfigError: a missing file, an unknown key, a value of the wrong type, or numbers that do not fit together.
    """
    path = Path(path)
    data = _read(path, lambda text: yaml.load(text, _Loader), "YAML") or {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a mapping of sections and keys")
    if data.get("preset") is not None:
        data = merge(preset(str(data["preset"])), data)
    for override in overrides:
        if override.startswith("preset=") and (name := _parse(override.removeprefix("preset="))) is not None:
            data = merge(data, preset(str(name)))
    for override in overrides:
        _forget_arguments(data, override)
    for override in overrides:
        _apply(data, override)
    config = build(RunConfig, data, "")
    deepspeed = config.engine.deepspeed
    if isinstance(deepspeed, str):  # the content, so that the written config.yaml alone re-runs the run
        beside = path.parent / deepspeed
        data.setdefault("engine", {})["deepspeed"] = _read(
            beside if beside.is_file() else Path(deepspeed), json.loads, "JSON"
        )
        config = build(RunConfig, data, "")
    check(config)
    return config


def arguments_of(overrides: list[str]) -> dict[str, Any]:
    """`name=value` words, the values YAML, as a function's arguments.

    Raises:
        ConfigError: a word without an equals sign.
    """
    given = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not an argument; write name=value")
        given[name] = _parse(text)
    return given


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML that `load` reads back to an equal one, with the objective as a comment."""
    lines = [*render(config).splitlines(), "", *LETTERS.splitlines()]
    objective = "".join(f"#   {line}".rstrip() + "\n" for line in lines)
    return f"# What is minimised:\n#\n{objective}\n" + yaml.dump(
        asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
    )


def build(cls: type, data: Any, key: str) -> Any:
    """A dataclass from nested mappings; list items may be written as plain text, which is their first field.

    Raises:
        ConfigError: an unknown key, a missing value, or one of the wrong type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{key or 'the config'} is {data!r}; it must be a mapping")
    hints, values = get_type_hints(cls), {}
    names = {f.name for f in fields(cls)}
    for name, value in data.items():
        if name not in names:
            why = REFUSED.get(_join(key, name)) or known(name, names)
            raise ConfigError(f"unknown key {_join(key, name)}; {why}")
        values[name] = _value(hints[name], value, _join(key, name))
    for f in fields(cls):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{_join(key, f.name)} is missing")
    return cls(**values)


def _value(kind: Any, value: Any, key: str) -> Any:
    if is_dataclass(kind):
        return build(kind, value, key)
    item = get_args(kind)[0] if get_origin(kind) is list else None
    if is_dataclass(item):
        items = value if isinstance(value, list) else [value]
        first = fields(item)[0].name
        named = [{first: x} if isinstance(x, str) else x for x in items]
        return [build(item, x, f"{key}[{i}]") for i, x in enumerate(named)]
    return coerce(value, kind, key)


def _parse(text: str) -> Any:
    """A value from the command line: YAML, or the text itself where it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _apply(data: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not an override; write section.key=value")
    *sections, last = key.split(".")
    kind: Any = RunConfig
    for name in (*sections, last):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"unknown key {key}; {section} has no keys of its own")
    value = _parse(text)
    if kind in (str, str | None) and not isinstance(value, (str, type(None))):
        value = text  # a key that holds text: {question} is a template there, not a mapping
    data[last] = value


def _forget_arguments(data: dict, override: str) -> None:
    """`section.name=another` takes the arguments of the function before with it."""
    key, _, text = override.partition("=")
    *sections, last = key.split(".")
    for section in sections:
        data = data.get(section) if isinstance(data, dict) else None
    if last == "name" and sections and isinstance(data, dict) and data.get("name") != text:
        data.pop("args", None)


_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Safe, and a key that is there twice is an error: the second would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"found the key {key!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path, parse: Any, kind: str) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise ConfigError(f"{path} is not {kind}: {' '.join(str(error).split())}") from None


def _join(section: str, name: Any) -> str:
    return f"{section}.{name}" if section else str(name)
