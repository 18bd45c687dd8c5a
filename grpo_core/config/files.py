"""Configurations on disk: YAML with overrides and presets in, everything resolved out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from grpo_core import trl_names
from grpo_core.config.checks import check
from grpo_core.config.formula import LETTERS, render
from grpo_core.config.presets import get_preset, merge
from grpo_core.config.sections import RunConfig
from grpo_core.config.shipped import find_file, shipped_names
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.rewards import REWARDS
from grpo_core.schema import ConfigError, coerce, list_known


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply a preset and `section.key=value` overrides (values are YAML), and check the outcome.

    `path` may be the name of a shipped configuration, such as `tiny` or `tiny.yaml`. `base: FILE` in a file puts it on
    top of another one, which lies beside it or is a shipped one.

    Raises:
        ConfigError: a missing file, an unknown key, a value of the wrong type, or numbers that do not fit together.
    """
    path = find_file(path, Path())
    if not os.path.exists(path):
        raise ConfigError(
            f"cannot read {path}: No such file or directory; a shipped configuration is named without a folder, "
            f"{list_known(path.stem, shipped_names())}"
        )
    return _resolve(_layers(path, ()), overrides, path.parent)


def load_run_config(
    folder: Path, overrides: Sequence[str] = (), tell: Callable[[str], None] | None = None
) -> RunConfig:
    """The configuration of a run folder; files of the user's that are gone are taken from the run's own copies.

    With `tell` what only the training session knew, a reward, a loss or an advantage registered there, is left out and
    `tell` is told so: for commands that want the weights and not the objective.

    Raises:
        ConfigError: as `load`.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [kept(inner) for inner in value]
        file, colon, function = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        copy = folder / "code" / Path(file).name
        gone = colon and file.endswith(".py") and not Path(file).exists() and copy.exists()
        return f"{copy}:{function}" if gone else value

    data = kept(_layers(folder / "config.yaml", ()))
    if tell is not None:
        _leave_out_strangers(data, lambda what: tell(f"{folder}: {what} is not known here and is left out"))
    return _resolve(data, overrides, folder)


def _leave_out_strangers(data: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Drop the rewards, the loss and the advantage that no registry knows."""
    for key, registry in (("loss", LOSSES), ("advantage", ADVANTAGES)):
        if not registry.knows(name := data[key]["name"]):
            tell(f"{key} {name}")
            del data[key]
    for reward in [*data["rewards"]]:
        if not REWARDS.knows(reward["name"]):
            tell(f"reward {reward['name']}")
            data["rewards"].remove(reward)
    if not data["rewards"]:
        del data["rewards"]


def load_overrides(overrides: Sequence[str]) -> RunConfig:
    """The defaults with `section.key=value` overrides.

    Raises:
        ConfigError: as `load`.
    """
    return _resolve({}, overrides, Path())


def _layers(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file's keys over its preset's, over those of the file that it names as its base."""
    data = _read(path, lambda text: yaml.load(text, _Loader), "YAML") or {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a mapping of sections and keys")
    under, base = {}, data.pop("base", None)
    if base is not None:
        if path.resolve() in above:
            raise ConfigError(f"base: {path} is its own base")
        under = _layers(find_file(str(base), path.parent), (*above, path.resolve()))
    if data.get("preset") is not None:
        under = merge(under, get_preset(str(data["preset"])))
    return _with_deepspeed(merge(under, data), path.parent)


def _resolve(data: dict[str, Any], overrides: Sequence[str], beside: Path) -> RunConfig:
    for override in overrides:
        if override.startswith("preset=") and (name := _parse(override.removeprefix("preset="))) is not None:
            data = merge(data, get_preset(str(name)))
    for override in overrides:
        _forget_arguments(data, override)
    for override in overrides:
        _apply(data, override)
    build(RunConfig, data, "")  # types first: a wrong one is said before a file is looked for
    config = build(RunConfig, _with_deepspeed(data, beside), "")
    check(config)
    return config


def _with_deepspeed(data: dict[str, Any], beside: Path) -> dict[str, Any]:
    """With the content of engine.deepspeed's file, so that the written config.yaml alone re-runs the run."""
    engine = data.get("engine")
    if not isinstance(engine, dict) or not isinstance(named := engine.get("deepspeed"), str):
        return data
    file = find_file(named, beside, Path())
    return {**data, "engine": {**engine, "deepspeed": _read(file, json.loads, "JSON")}}


def parse_arguments(overrides: Sequence[str]) -> dict[str, Any]:
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


def to_inline_yaml(value: Any) -> str:
    """A value in one line of YAML, as an override takes it."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


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
            why = trl_names.key_hint(_join(key, name), value) or list_known(name, names)
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
        file = override.endswith((".yaml", ".yml", ".json"))
        how = f"a config file is named by --config {override}" if file else "write section.key=value"
        raise ConfigError(f"{override!r} is not an override; {how}")
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
