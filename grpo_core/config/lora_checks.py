"""Checks of the section `lora` that need no model, and the settings of the adapter that lora.path names."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from grpo_core.config.damaged_files import describe_damage
from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.schema import ConfigError, coerce, describe_impossible_path, list_known

ADAPTER_FILE = "adapter_config.json"  # the file that PEFT writes beside an adapter
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # one of them, the first before the second
PEFT_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}  # where PEFT has another name than the section
PEFT_DEFAULTS = {"r": 8, "alpha": 8.0}  # of a setting that an adapter's file lacks, where they are not the section's
PLAIN_KEYS = ("r", "alpha", "dropout", "target_modules")  # with lora.r 0 they are there and have no effect
NOT_READ = {"path", "init_lora_weights"}  # keys of the section that are not read from an adapter's file
# settings of an adapter that change nothing of what it computes
WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_type"),
    *("peft_version", "qalora_group_size", "revision", "task_type"),
}
# initialisations with which the base model is no longer the one that was loaded, or that freeze a factor
OTHER_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def check_lora(lora: LoraConfig) -> None:
    """Check the section `lora` as far as that needs no model.

    Raises:
        ConfigError: a value that PEFT would refuse, or ignore without a word.
    """
    defaults = LoraConfig()
    if not lora.r:
        for field in fields(LoraConfig):
            if field.name not in PLAIN_KEYS and getattr(lora, field.name) != getattr(defaults, field.name):
                raise ConfigError(
                    f"lora.{field.name} is {getattr(lora, field.name)!r}, but lora.r is 0, so there is no adapter; "
                    f"leave it out, or set lora.r above 0"
                )
        return
    _check_modules(lora)
    _check_patterns(lora)
    _check_initialisation(lora)
    _check_tokens(lora.trainable_token_indices)
    if lora.target_parameters:
        for name, value, default in (("dropout", lora.dropout, 0.0), ("use_dora", lora.use_dora, False)):
            if value != default:
                raise ConfigError(
                    f"lora.{name} is {value!r} with lora.target_parameters, where PEFT has no {name}; set it to "
                    f"{str(default).lower()}"
                )


def check_quantization(model: ModelConfig, lora: LoraConfig) -> None:
    """Check the keys of the quantisation, and the section `lora` beside them.

    Raises:
        ConfigError: a key is without effect, or the adapter cannot be trained on weights in 4 bits.
    """
    if model.quantize is not None:
        check_lora_of_quantized(lora, f"model.quantize is {model.quantize}")
    elif not model.double_quant:
        raise ConfigError(
            "model.double_quant is false, but model.quantize is null, so nothing is quantised; leave it out, or set "
            "model.quantize to nf4"
        )


def check_lora_of_quantized(lora: LoraConfig, reason: str) -> None:
    """Refuse an adapter that cannot be trained on weights in 4 bits; `reason` is a clause that says why they are.

    Raises:
        ConfigError: names the key.
    """
    if not lora.r:
        raise ConfigError(f"{reason}, but lora.r is 0; weights in 4 bits are frozen, so set lora.r above 0")
    for name in ("use_dora", "target_parameters"):
        if value := getattr(lora, name):
            default = "false" if value is True else "null"
            raise ConfigError(
                f"{reason}, but lora.{name} is {str(value).lower() if value is True else value}, which needs whole "
                f"weights; set it to {default}"
            )


def _check_modules(lora: LoraConfig) -> None:
    if not (lora.target_modules or lora.target_parameters):
        raise ConfigError(
            f"lora.target_modules is {lora.target_modules!r}; it must name at least one module, such as q_proj, or be "
            f"all-linear (with lora.r=0 there is no adapter)"
        )
    for name in ("exclude_modules", "modules_to_save", "target_parameters", "layers_to_transform"):
        if getattr(lora, name) in ([], ""):
            raise ConfigError(f"lora.{name} is {getattr(lora, name)!r}; it must name at least one, or be null")
    if isinstance(lora.target_modules, str):
        _check_expression("target_modules", lora.target_modules, "all-linear, a list, or a regular expression")
    if isinstance(lora.exclude_modules, str):
        _check_expression("exclude_modules", lora.exclude_modules, "a list, or a regular expression")
    for name in lora.modules_to_save or ():
        _check_expression("modules_to_save", name, "a list of module names, or of regular expressions")
        if isinstance(lora.target_modules, list) and name in lora.target_modules:
            raise ConfigError(
                f"lora.modules_to_save names {name!r}, and so does lora.target_modules; a module is trained whole or "
                f"gets an adapter, so take it out of one of the two"
            )
    layers = lora.layers_to_transform
    if layers is None:
        return
    if isinstance(lora.target_modules, str):
        raise ConfigError(
            f"lora.layers_to_transform is {layers}, but lora.target_modules is {lora.target_modules!r}; PEFT takes "
            f"layers only with a list of module names"
        )
    if negative := [layer for layer in as_list(layers) if layer < 0]:
        raise ConfigError(f"lora.layers_to_transform names {negative[0]}; layers are numbered from 0")


def _check_patterns(lora: LoraConfig) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(lora, name).items():
            _check_expression(name, pattern, "a mapping of module names or regular expressions")
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except re.error:
                raise ConfigError(
                    f"lora.{name} names {pattern!r}, which cannot be the end of a longer regular expression, as PEFT "
                    f"uses it; write options such as (?i) with what they are for, as in (?i:q_proj)"
                ) from None
            if name == "rank_pattern" and value < 1:
                raise ConfigError(f"lora.rank_pattern.{pattern} is {value}; it must be at least 1")
            if not value > 0:
                raise ConfigError(f"lora.alpha_pattern.{pattern} is {value}; it must be above 0")


def _check_initialisation(lora: LoraConfig) -> None:
    if lora.init_lora_weights != "orthogonal":
        return
    if lora.target_parameters:
        raise ConfigError(
            "lora.init_lora_weights is 'orthogonal' with lora.target_parameters, which PEFT cannot start so; set it "
            "to true"
        )
    for key, rank in (("lora.r", lora.r), *((f"lora.rank_pattern.{k}", r) for k, r in lora.rank_pattern.items())):
        if rank % 2:
            raise ConfigError(f"{key} is {rank}; with lora.init_lora_weights orthogonal it must be even")


def _check_tokens(tokens: list[int] | dict[str, list[int]] | None) -> None:
    """Check lora.trainable_token_indices without a vocabulary."""
    if tokens is None:
        return
    lists = tokens if isinstance(tokens, dict) else {"": tokens}
    for name, ids in lists.items() or {"": []}.items():
        key = f"lora.trainable_token_indices{f'.{name}' if name else ''}"
        if not ids:
            raise ConfigError(f"{key} is {ids!r}; it must name at least one token, or be null")
        if len({*ids}) < len(ids) or min(ids) < 0:
            raise ConfigError(f"{key} is {ids}; it must be token ids, each at least 0 and none of them twice")


def _check_expression(name: str, pattern: str, allowed: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"lora.{name} is {pattern!r}; it must be {allowed}, and as the latter it has the fault: {error}"
        ) from None


def as_list(value: Any) -> list:
    """Return a list as it is, and any other value as a list of it."""
    return value if isinstance(value, list) else [value]


def read_adapter(key: str, path: str) -> dict[str, Any]:
    """Return the settings of the adapter in the folder `path`, as PEFT has written them.

    Raises:
        ConfigError: there is no such folder, or it holds no adapter; the message names `key`.
    """
    if problem := describe_impossible_path(path):
        raise ConfigError(f"{key} {problem}")
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"{key} is {path!r}: there is no folder {path}; a run writes its adapter at its end, to adapter/ in its "
            f"run folder"
        )
    file = folder / ADAPTER_FILE
    if not file.exists():
        inner = [child.name for child in folder.iterdir() if (child / ADAPTER_FILE).exists()]
        hint = f"; {list_known('adapter', inner)}" if inner else ""
        raise ConfigError(f"{key} is {path!r}, which holds no adapter: it has no {ADAPTER_FILE}{hint}")
    settings = read_adapter_settings(folder)
    if settings is None:
        raise ConfigError(f"{key} is {path!r}, and its {ADAPTER_FILE} is damaged: it holds no mapping")
    check_setting_types(settings, path)
    return settings


def check_adapter_weights(key: str, path: str) -> None:
    """Raise ConfigError if the file of an adapter's weights is missing or damaged; the message names `key`."""
    if problem := describe_adapter_weights(Path(path)):
        raise ConfigError(f"{key} is {path!r}, whose adapter cannot be loaded: {problem}")


def read_adapter_settings(folder: Path) -> dict[str, Any] | None:
    """Return what an adapter's file of settings holds; None if there is none or it holds no mapping."""
    try:
        settings = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def describe_adapter_weights(folder: Path) -> str | None:
    """Return a sentence about the file of an adapter's weights, if it is missing or damaged; otherwise None."""
    first, second = (folder / name for name in ADAPTER_WEIGHTS)
    return describe_damage(second if second.exists() and not first.exists() else first)


def describe_other_base(key: str, path: str, model_path: str) -> str | None:
    """Return a sentence if the adapter at `path` was trained on another model than `model_path`; otherwise None.

    The last parts of the two names are compared, since a model may have been moved.
    """
    base = (read_adapter_settings(Path(path)) or {}).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return None
    if len({Path(name.replace("builtin:", "")).name for name in (base, model_path)}) == 1:
        return None
    return f"{key} is {path!r}, an adapter of the model {base}, and it is used with {model_path}"


def use_settings_of_adapter(lora: LoraConfig, written: Collection[str] | None = None) -> LoraConfig:
    """Return `lora` with the settings of the adapter at lora.path, which count; unchanged without a path.

    `written` are the keys that a user wrote; by default those whose values are no defaults.

    Raises:
        ConfigError: there is no such adapter; it does something that is not supported; or a key that was written
            contradicts it.
    """
    if lora.path is None:
        return lora
    settings, defaults = read_adapter("lora.path", lora.path), asdict(LoraConfig())
    problem = _describe_unsupported(settings)
    if problem:
        raise ConfigError(f"lora.path is {lora.path!r}, whose adapter cannot be trained here: {problem}")
    values = {}
    for name in defaults.keys() - NOT_READ:
        values[name] = _read_setting(settings, name, defaults[name], lora.path)
        own = getattr(lora, name)
        asks = own != defaults[name] or own not in (None, False, {})  # null, false and {} ask for nothing
        is_written = asks and name in written if written is not None else own != defaults[name]
        if is_written and not _is_equal(name, own, values[name]):
            raise ConfigError(
                f"lora.{name} is {own!r}, but the adapter of lora.path ({lora.path}) has {values[name]!r}; its own "
                f"settings count, so leave lora.{name} out or set it to the same"
            )
    check_adapter_weights("lora.path", lora.path)
    return replace(lora, **values)


def check_setting_types(settings: dict[str, Any], path: str) -> None:
    """Check the types of the settings of a LoRA adapter at `path`, with which PEFT fails while it loads the adapter.

    Raises:
        ConfigError: names the setting.
    """
    if settings.get("peft_type") != "LORA":
        return
    defaults = asdict(LoraConfig())
    absent = {"target_modules"} if settings.get("target_modules") is None else set()  # the model's type has them then
    for name in defaults.keys() - NOT_READ - absent:
        _read_setting(settings, name, defaults[name], path)


def _read_setting(settings: dict[str, Any], name: str, default: Any, path: str) -> Any:
    """Return the value of an adapter's setting for the key `name` of the section lora.

    Raises:
        ConfigError: it has a type that PEFT does not take.
    """
    kind, key = get_type_hints(LoraConfig)[name], PEFT_NAMES.get(name, name)
    value = settings.get(key, PEFT_DEFAULTS.get(name, default))
    if value is None and isinstance(default, bool):
        value = default
    numbers = value.values() if isinstance(value, dict) else [value]
    if kind in (float, dict[str, float]) and any(isinstance(number, str) for number in numbers):
        raise ConfigError(f"{key} in the adapter {path} is {value!r}; it must be a number, and not text")
    return coerce(value, kind, f"{key} in the adapter {path}")


def _describe_unsupported(settings: dict[str, Any]) -> str | None:
    """Return a clause about a setting of an adapter that this package does not serve; None if there is none."""
    if settings.get("peft_type") != "LORA":
        return f"its peft_type is {settings.get('peft_type')!r}, not LORA"
    if settings.get("target_modules") is None:
        return "its target_modules is null, so they depend on the type of the model; write their names there"
    start = str(settings.get("init_lora_weights"))
    if start.startswith(OTHER_STARTS):
        return f"its init_lora_weights is {start!r}, which needs other weights than those of the base model"
    own = {PEFT_NAMES.get(field.name, field.name) for field in fields(LoraConfig)}
    for name in sorted(settings.keys() - own - WITHOUT_EFFECT):
        if settings[name] not in (None, False, "none", {}, []):
            return f"its {name} is {settings[name]!r}, which has no key in the section lora"
    return None


def _is_equal(name: str, own: Any, theirs: Any) -> bool:
    """Return whether two settings are equal; the order of names does not count.

    The adapter of a composite model has an expression that lists its modules (model/composite.py): there the last part
    of every name counts.
    """
    if name == "target_modules" and isinstance(own, list) and isinstance(theirs, str):
        return {target.rpartition(".")[2] for target in own} == _list_last_names(theirs)
    if isinstance(own, list) and isinstance(theirs, list):
        return _as_set(own) == _as_set(theirs)
    return bool(own == theirs)


def _list_last_names(expression: str) -> set[str]:
    r"""Return the last part of every module's name that an expression lists.

    >>> sorted(_list_last_names(r"(?:a|a\.b)\.layers\.(?:0|1)\.(?:mlp\.up|mlp\.down)|head"))
    ['down', 'head', 'up']
    """
    without_prefixes = re.sub(r"\(\?:[^()]*\)(?=\\\.)", "", expression)
    return {*re.findall(r"(\w+)(?=[|)]|$)", without_prefixes)}


def _as_set(values: Sequence[Any]) -> set[str]:
    return {str(value) for value in values}


def find_written(data: dict[str, Any], words: Sequence[str] = ()) -> set[str]:
    """Return the keys of the section `lora` that were written for the adapter at lora.path.

    `data` is a configuration's mapping with the overrides `words` applied. If an override sets lora.path, the keys of
    the file were written for another adapter, and only those of the overrides are returned.
    """
    keys = [key for key, _, _ in (word.partition("=") for word in words)]
    if "lora.path" in keys and "lora" not in keys:
        return {key.split(".")[1] for key in keys if key.startswith("lora.")}
    section = data.get("lora")
    return set(section) if isinstance(section, dict) else set()
