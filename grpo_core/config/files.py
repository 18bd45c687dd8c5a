"""Read and write configurations: YAML files with a base, a preset and overrides, resolved to a `RunConfig`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from grpo_core.config.checks import check
from grpo_core.config.formula import LETTERS, render
from grpo_core.config.lora_checks import find_written, use_settings_of_adapter
from grpo_core.config.nearest import describe_unknown_key
from grpo_core.config.paths import resolve_path, resolve_paths, split_resume
from grpo_core.config.presets import get_preset, merge
from grpo_core.config.sections import DataConfig, EvaluationConfig, RunConfig, SftConfig, use_supervised_objective
from grpo_core.config.shipped import describe_place, find_default, find_file, list_shipped
from grpo_core.config.text_files import parse_json, read_text
from grpo_core.config.words import ITEM, check_overrides, find_type, get_in, parse_value, split_word, type_hints
from grpo_core.config.yaml_text import parse_yaml
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.rewards import REWARDS
from grpo_core.schema import ConfigError, check_path, coerce, list_known

RESOLVED = "# The whole configuration of a run; paths are relative to the folder in which the run was started."
WORDS_OF_A_START = {"name", "output_dir", "resume", "overwrite"}  # keys that say which run is started, and how
IN_TEMPLATE = re.compile(r"\n|\{[{%#]")  # in every Jinja template, and in no path
MAX_NAMED_KEYS = 8  # in a sentence about keys that differ


# of a configuration, the keys of its words, and whether it is for `sft`: the keys of the data's form, and lines on them
Recognise = Callable[[RunConfig, Collection[str], bool], tuple[dict[str, Any], str | None]]


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    supervised: bool = False,
    recognise: Recognise | None = None,
    notify: Callable[[str], object] = lambda sentence: None,
) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides (config/words.py), and check the result.

    `path` may be the name of a shipped configuration, such as `tiny` or `tiny.yaml`. `base: FILE` in a file names
    another file, beside it or shipped, whose keys the file overrides. `supervised` is for the command `sft`: it
    replaces the objective by the supervised one before the check. If an override sets data.path or data.sources,
    `recognise` names the keys of the data's form (data/forms.py), which replace those of the file, and `notify` gets
    its lines about them.

    Raises:
        ConfigError: a missing file, an unknown key, a value of the wrong type, or values that exclude each other.
    """
    path = find_file(check_path(path, "the configuration file"), Path())
    overrides = check_overrides(overrides)
    if os.path.isfile(path / "config.yaml"):
        raise ConfigError(f"--config {path} is the folder of a run; did you mean {path / 'config.yaml'}?")
    if not os.path.exists(path):
        raise ConfigError(
            f"cannot read {path}: No such file or directory; a shipped configuration is named without a folder, "
            f"{list_known(path.stem, list_shipped())}"
        )
    data = _layers(path, ())
    return _resolve(*_use_form(data, overrides, supervised, recognise, notify), supervised)


def _use_form(
    data: dict[str, Any],
    overrides: Sequence[str],
    supervised: bool,
    recognise: Recognise | None,
    notify: Callable[[str], object],
) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of a file with those of the data's form in place of its own, if a word sets the data's place.

    Return also the words that are applied to them: all but data.sources, where the form has added keys to its items.
    """
    words = [*overrides]
    written = {split_word(word)[0] for word in words}
    if recognise is None or not written & {"data.path", "data.sources"}:
        return data, words
    keys, lines = recognise(_build(_apply(deepcopy(data), words)), written, supervised)
    for line in (lines or "").splitlines():
        notify(line)
    data = deepcopy(data)
    for key, value in keys.items():
        set_key(data, key, value)
    return data, [word for word in words if split_word(word)[0] not in keys.keys() & {"data.sources"}]


def load_job(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    default: Path | None = None,
    notify: Callable[[str], object] = lambda sentence: None,
    supervised: bool = False,
    recognise: Recognise | None = None,
) -> RunConfig:
    """Return the configuration of a training job: that of `load`, or with `resume` that of the run to continue.

    A resumed run uses its own config.yaml with the overrides, and keeps its name and output_dir. With resume auto or
    force, the file `path` only identifies the run, by name and output_dir; `notify` gets a sentence about the other
    keys of the file that differ. Without `path` the file is `default`, or the shipped one for this machine. With auto
    or force, a run without a checkpoint starts from the beginning, with the file `path` if it is given and else with
    its own config.yaml; `notify` gets a sentence that names the file, and one about a default file that is used.
    `supervised` and `recognise` are as for `load`.

    Raises:
        ConfigError: as `load`, or `resume` names a folder and the overrides another name or output_dir.
    """
    file = path or default or find_default()
    folder, by_name = _find_resumed(file, overrides)
    if folder is None or _starts_anew(folder, by_name, path, file, notify):
        if folder is None and path is None:
            notify(f"no --config is given, so the configuration is {describe_place(file)}")
        return load(file, overrides, supervised=supervised, recognise=recognise, notify=notify)
    file_data, words = _layers(find_file(file, Path()), ()), [*overrides]
    _apply_start(file_data, words)
    data = _layers(folder / "config.yaml", ()) | {"resume": file_data["resume"]}
    if not by_name:
        _check_keeps_name(folder, overrides)
    place = Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder  # resume=.
    # the folder may have been moved or renamed since its config.yaml was written
    data |= {"name": place.name, "output_dir": str(place.parent)}
    words = [word for word in words if split_word(word)[0] not in ("name", "output_dir")]
    if not _has_checkpoint(folder) and _build(_apply(deepcopy(data), words)).data.path != _build(data).data.path:
        data, words = _use_form(data, words, supervised, recognise, notify)
    config = _resolve(data, words, supervised, reads_adapter=False)
    if path and (keys := _list_differing(file_data, words, config)):
        more = f" and {len(keys) - MAX_NAMED_KEYS} more keys" if len(keys) > MAX_NAMED_KEYS else ""
        notify(
            f"{folder} continues with its own config.yaml; {path} has other values of "
            f"{', '.join(keys[:MAX_NAMED_KEYS])}{more}, which do not count"
        )
    return config


def _find_resumed(file: Path, overrides: Sequence[str]) -> tuple[Path | None, bool]:
    """Return the folder whose config.yaml a job continues from, if any, and whether name and output_dir say which."""
    path = find_file(file, Path())
    if not os.path.isfile(path):
        return None, False  # `load` names the mistake, as for all others here
    data = _layers(path, ())
    _apply_start(data, overrides)
    resume, name, output_dir = (data.get(key, getattr(RunConfig, key)) for key in ("resume", "name", "output_dir"))
    if not all(isinstance(value, str) for value in (resume, name, output_dir)) or data.get("overwrite"):
        return None, False
    if resume in ("auto", "force"):
        return Path(os.path.expanduser(output_dir)) / name, True
    named = split_resume(resume)
    return (named[0] if named else None), False


def _starts_anew(folder: Path, by_name: bool, path: Path | None, file: Path, notify: Callable[[str], object]) -> bool:
    """Return whether auto or force start a run with `file`, because the run in `folder` does not continue.

    `notify` gets a sentence about what is started.
    """
    own = folder / "config.yaml"
    if not os.path.isfile(own):
        notify(f"{folder} holds no run to resume; it is started with {describe_place(file)}")
        return True
    if not by_name or _has_checkpoint(folder):
        return False
    if path is None:
        notify(f"{folder} has no checkpoint to resume from; it is started anew with its own config.yaml")
    elif not os.path.samefile(own, find_file(path, Path())):
        notify(f"{folder} has no checkpoint to resume from; it is started anew with {path}, not its own config.yaml")
    return path is not None


def _has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("checkpoints/step-*"))


def _check_keeps_name(folder: Path, overrides: Sequence[str]) -> None:
    """Refuse a name or an output_dir that is not that of the run folder which `resume` names."""
    data: dict[str, Any] = {}
    _apply_start(data, overrides)
    own = {"name": os.path.basename(os.path.abspath(folder)), "output_dir": os.path.dirname(os.path.abspath(folder))}
    for key, value in own.items():
        given = data.get(key, value)
        if (os.path.abspath(os.path.expanduser(str(given))) if key == "output_dir" else given) != value:
            raise ConfigError(
                f"{key} is {given!r}, but resume is {str(folder)!r}, whose {key} is {value!r}; a resumed run keeps "
                f"both, so leave {key} out, or move the folder"
            )


def _apply_start(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set the keys of `WORDS_OF_A_START` that the overrides name."""
    for key, text in map(split_word, overrides):
        if key in WORDS_OF_A_START:
            set_key(data, key, parse_value(text, find_type(key, data, overrides), key))


def _list_differing(data: dict[str, Any], words: list[str], config: RunConfig) -> list[str]:
    """Return the keys of a file whose values the run does not have, without those of `words` and of the start."""
    values, own = flatten(asdict(build(RunConfig, data, ""))), flatten(asdict(config))
    ignored = WORDS_OF_A_START | {"preset"} | {split_word(word)[0] for word in words}
    return [
        key
        for key in sorted(values.keys() & flatten(data).keys())
        if values[key] != own.get(key) and not any(f"{key}.".startswith(f"{other}.") for other in ignored)
    ]


def load_run_config(
    folder: Path, overrides: Sequence[str] = (), notify: Callable[[str], None] | None = None
) -> RunConfig:
    """Load the configuration of a run folder.

    A user's file that no longer exists is replaced by the copy in the run folder. With `notify`, a reward, loss or
    advantage that was registered only in the training process is left out, and `notify` gets a sentence about it. This
    is for commands that need the weights and not the objective.

    Raises:
        ConfigError: as `load`.
    """
    data = _replace_missing_files(_layers(folder / "config.yaml", ()), folder / "code")
    if notify is not None:
        for name in _remove_unknown_functions(data):
            notify(f"{folder}: {name} is not registered here and is left out")
    return _resolve(data, overrides, reads_adapter=False)


def _replace_missing_files(value: Any, copies: Path) -> Any:
    """Replace every `file.py:function` whose file does not exist by the copy of the file, if there is one."""
    if isinstance(value, dict):
        return {name: _replace_missing_files(inner, copies) for name, inner in value.items()}
    if isinstance(value, list):
        return [_replace_missing_files(inner, copies) for inner in value]
    file, colon, function = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    copy = copies / Path(file).name
    missing = colon and file.endswith(".py") and not Path(file).exists()
    return f"{copy}:{function}" if missing and copy.exists() else value


def _remove_unknown_functions(data: dict[str, Any]) -> list[str]:
    """Remove the rewards, the loss and the advantage that are in no registry, and return their names."""
    removed = []
    for key, registry in (("loss", LOSSES), ("advantage", ADVANTAGES)):
        if not registry.knows(name := data[key]["name"]):
            removed.append(f"{key} {name}")
            del data[key]
    rewards = data.pop("rewards")
    known_rewards = [reward for reward in rewards if REWARDS.knows(reward["name"])]
    if known_rewards or not rewards:  # a run with a teacher may have none
        data["rewards"] = known_rewards
    return removed + [f"reward {reward['name']}" for reward in rewards if reward not in known_rewards]


def load_overrides(
    overrides: Sequence[str],
    *,
    recognise: Recognise | None = None,
    notify: Callable[[str], object] = lambda sentence: None,
) -> RunConfig:
    """Return the default configuration with `section.key=value` overrides; `recognise` and `notify` are as for `load`.

    Raises:
        ConfigError: as `load`.
    """
    return _resolve(*_use_form({}, overrides, False, recognise, notify))


def _layers(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Return the keys of a file: its own override its preset's, and these override its base's.

    `above` are the files that led to this one through `base`.
    """
    data = parse_yaml(read_text(path), str(path), RunConfig) or {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a mapping of sections and keys")
    under: dict[str, Any] = {}
    base = data.pop("base", None)
    if base is not None:
        if path.resolve() in above:
            raise ConfigError(f"base: {path} is its own base, directly or through other files")
        under = _layers(find_file(str(base), path.parent), (*above, path.resolve()))
    if data.get("preset") is not None:
        under = merge(under, get_preset(str(data["preset"])))
    folder = Path() if _is_resolved(path) else path.parent
    return _read_files(merge(under, resolve_paths(data, folder)), folder)


def _is_resolved(path: Path) -> bool:
    """Return True if a file was written by `dump`, so that its paths do not depend on where it is."""
    with path.open(encoding="utf-8") as file:
        return file.readline().rstrip() == RESOLVED


def _resolve(
    data: dict[str, Any], overrides: Sequence[str], supervised: bool = False, *, reads_adapter: bool = True
) -> RunConfig:
    """Apply the overrides to the keys of a file, and return the checked configuration.

    With `reads_adapter` the settings of the adapter at lora.path fill in the section lora. The configuration of a run
    has them already, and the folder may be gone.
    """
    data = _apply(data, overrides)
    config = _build(data)
    config = use_supervised_objective(config) if supervised else config
    if config.lora.path and reads_adapter:
        config = replace(config, lora=use_settings_of_adapter(config.lora, find_written(data, overrides)))
    check(config)
    return config


def _apply(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a file with the overrides on top."""
    words = [split_word(override) for override in overrides]
    for key, text in words:
        if key == "preset" and (name := parse_value(text, str | None, key)) is not None:
            data = merge(data, get_preset(name))
    for key, text in words:
        _drop_arguments(data, key, text)
    for key, text in words:
        set_key(data, key, parse_value(text, find_type(key, data, overrides), key))
    return resolve_paths(data, Path())


def _build(data: dict[str, Any]) -> RunConfig:
    build(RunConfig, data, "")  # so that a value of the wrong type is reported before a missing file
    return build(RunConfig, _read_files(data, Path()), "")


def _read_files(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Replace the file names of engine.deepspeed and data.chat_template by the files' content.

    So config.yaml alone can repeat the run.
    """
    engine, section = data.get("engine"), data.get("data")
    if isinstance(engine, dict) and isinstance(engine.get("deepspeed"), str):
        file = find_file(engine["deepspeed"], folder, Path())
        data = {**data, "engine": {**engine, "deepspeed": parse_json(read_text(file), str(file))}}
    template = section.get("chat_template") if isinstance(section, dict) else None
    if isinstance(template, str) and template and not IN_TEMPLATE.search(template):
        path = resolve_path(template, folder)
        if not os.path.isfile(path):
            raise ConfigError(f"data.chat_template is {template!r}: there is no such file, and a template has braces")
        text = read_text(Path(path))
        if not IN_TEMPLATE.search(text):
            raise ConfigError(f"data.chat_template is {template!r}, which holds no Jinja template: it has no braces")
        data = {**data, "data": {**section, "chat_template": text}}
    return data


def dump(config: RunConfig) -> str:
    """Return the whole configuration as YAML that `load` reads to an equal one, with the objective as a comment."""
    lines = [*render(config).splitlines(), "", *LETTERS.splitlines()]
    objective = "".join(f"#   {line}".rstrip() + "\n" for line in lines)
    return f"{RESOLVED}\n#\n# What is minimised:\n#\n{objective}\n" + yaml.dump(
        asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
    )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for name, value in tree.items() for k, v in flatten(value, f"{prefix}.{name}".lstrip(".")).items()}


def to_inline_yaml(value: Any) -> str:
    """Return a value as one line of YAML, as used in an override."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def build(cls: type, data: Any, key: str) -> Any:
    """Build a dataclass from nested mappings; an item of a list may be plain text, which sets its first field.

    Raises:
        ConfigError: an unknown key, a missing value, or a value of the wrong type; the message names it below `key`.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{key or 'the configuration'} is {data!r}; it must be a mapping")
    hints, values = type_hints(cls), {}
    names = {f.name for f in fields(cls)}
    for name, value in data.items():
        if name not in names:
            hint = describe_unknown_key(key, str(name), names, value)
            raise ConfigError(f"unknown key {_join(key, name)}; {hint}")
        values[name] = _build_value(hints[name], value, _join(key, name))
    for f in fields(cls):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{_join(key, f.name)} is missing, and it has no default")
    return cls(**values)


def _build_value(kind: Any, value: Any, key: str) -> Any:
    if is_dataclass(kind):
        return build(kind, value, key)
    item = get_args(kind)[0] if get_origin(kind) is list else None
    if is_dataclass(item):
        if value is None:
            raise ConfigError(f"{key} is null; it must be a list, or be left out")
        items = value if isinstance(value, list) else [value]
        first = fields(item)[0].name
        mappings = [{first: x} if isinstance(x, str) else x for x in items]
        return [build(item, x, f"{key}[{i}]") for i, x in enumerate(mappings)]
    return coerce(value, kind, key)


def set_key(data: dict, key: str, value: Any) -> None:
    """Set a dotted key in the nested mapping `data`."""
    *sections, last = key.split(".")
    for section in sections:
        if item := ITEM.fullmatch(section):
            data = _find_item(data, item[1], int(item[2]))
            continue
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            advice = f"; write {section}[0] for its first item" if isinstance(data, list) else ""
            raise ConfigError(f"unknown key {key}; {section} is a value and has no keys{advice}")
    data[last] = value


def _find_item(data: dict, name: str, index: int) -> dict:
    """Return the item of a list of sections, such as rewards[0], as a mapping that can be changed."""
    sections = {None: RunConfig, "data": DataConfig, "evaluation": EvaluationConfig, "sft": SftConfig}
    section = next((section for section, x in sections.items() if name in type_hints(x)), None)
    kind = type_hints(sections[section]).get(name)
    item = get_args(kind)[0] if get_origin(kind) is list else None
    if not is_dataclass(item):
        raise ConfigError(f"unknown key {name}[{index}]; {name} is no list of sections")
    values = data.get(name)
    if values is None:
        defaults = asdict(RunConfig())
        values = (defaults[section] if section else defaults)[name]
    first = fields(item)[0].name
    items = [{first: x} if isinstance(x, str) else x for x in (values if isinstance(values, list) else [values])]
    if index >= len(items) or not isinstance(items[index], dict):
        known = f"the items 0 to {len(items) - 1}" if items else "no items"
        raise ConfigError(f"{name}[{index}] does not exist; {name} has {known}")
    items[index] = dict(items[index])
    data[name] = items
    return items[index]


def _drop_arguments(data: dict, key: str, text: str) -> None:
    """Drop the `args` of the old function where an override `section.name=...` names another one."""
    section, _, last = key.rpartition(".")
    named = get_in(data, section, None) if section else None
    if last == "name" and isinstance(named, dict) and named.get("name") != text:
        named.pop("args", None)


_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def _join(section: str, name: Any) -> str:
    return f"{section}.{name}" if section else str(name)
