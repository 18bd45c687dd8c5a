"""Read the file of a study: variants of one configuration, each trained with the same seeds.

A study file is YAML with the keys of `StudyConfig`. Every run of it is an ordinary run in <output_dir>/<name>/
<variant>/seed-<seed>, with the configuration that the command line `--config CONFIG key=value ...` would give.
"""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from grpo_core.config.checks import prompts_per_rank
from grpo_core.config.files import build, flatten, load, set_key, to_inline_yaml
from grpo_core.config.paths import resolve_paths
from grpo_core.config.sections import RunConfig
from grpo_core.config.shipped import find_configs, find_file
from grpo_core.config.text_files import read_text
from grpo_core.config.words import REGISTRIES, get_in
from grpo_core.config.yaml_text import parse_yaml
from grpo_core.schema import ConfigError, keyword_arguments, list_known

FOLDER_NAME = re.compile(r"[A-Za-z0-9_-]+")
MAX_SEEDS = 16  # the exact test goes through 2**seeds exchanges
KEYS_OF_A_RUN = ("name", "output_dir", "seed", "resume", "overwrite")  # the study sets them
NO_EFFECT = ("preset", "log", "checkpoint", "debug")  # sections and keys that do not change what a run measures
PROBLEM_KEYS = (
    "eval_path",
    "eval_split",
    "path",
    "args",
    "subset",
    "split",
    "limit",
)  # of data: which problems are held out


@dataclass(frozen=True)
class StudyConfig:
    """The keys of a study file; docs/loss.md explains them."""

    name: str  # the folder of the study is <output_dir>/<name>
    control: str  # the variant that the others are compared with
    variants: dict[str, dict[str, Any] | None]  # name -> dotted key -> value
    seeds: list[int]
    config: str = "tiny"  # the configuration that the variants change: a file, or the name of a shipped one
    common: dict[str, Any] = field(default_factory=dict)  # keys of every variant, which a variant's own override
    metric: Literal["final", "area"] = "final"  # held-out accuracy at the end, or its mean over the steps
    processes: int = 1  # of one run
    output_dir: str = "runs"


@dataclass(frozen=True)
class Study:
    """A study that has been checked: its keys, and the configuration of every run."""

    keys: StudyConfig
    folder: Path
    runs: dict[tuple[str, int], RunConfig]  # (variant, seed) -> configuration

    def run_folder(self, variant: str, seed: int) -> Path:
        """Return the folder of a run."""
        config = self.runs[variant, seed]
        return Path(config.output_dir) / config.name


def load_study(path: Path) -> Study:
    """Read a study file and check the whole configuration of every run.

    `path` may be the name of a shipped study, such as `objectives`. `config` and the files that a variant names are
    looked for beside the study file, then in the shell's folder.

    Raises:
        ConfigError: a key of the study or of a variant is wrong, two variants are the same configuration, or the
            variants do not share their held-out problems.
    """
    path = find_study(path)
    keys = _read_keys(path)
    folder = Path(os.path.expanduser(keys.output_dir)) / keys.name
    runs = {}
    for variant in keys.variants:
        for seed in keys.seeds:
            try:
                runs[variant, seed] = _load_run(keys, path.parent, folder, variant, seed)
            except ConfigError as error:
                raise ConfigError(f"{path}: variant {variant}: {error}") from None
    study = Study(keys, folder, runs)
    try:
        _check_variants(study)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return study


def find_study(path: Path) -> Path:
    """Return a study file, or the shipped study of that name."""
    shipped = find_configs() / "studies"
    if len(path.parts) == 1 and not path.is_file() and (file := shipped / f"{path.stem}.yaml").is_file():
        return file
    if not path.is_file():
        known = list_known(path.stem, (file.stem for file in shipped.glob("*.yaml")))
        raise ConfigError(f"cannot read {path}: it is no file; a shipped study is named without a folder, {known}")
    return path


def list_differing(left: RunConfig, right: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys that change what a run measures and differ between two runs, with both values.

    The name and the folder of a run do not count.
    """
    pair = [flatten(asdict(replace(config, name="", output_dir=""))) for config in (left, right)]
    names = sorted(pair[0].keys() | pair[1].keys())
    return {
        key: (pair[0].get(key), pair[1].get(key))
        for key in names
        if pair[0].get(key) != pair[1].get(key) and key.partition(".")[0] not in NO_EFFECT
    }


def _read_keys(path: Path) -> StudyConfig:
    """Return the keys of a study file, after a check of what does not depend on the configuration."""
    data = parse_yaml(read_text(path), str(path), StudyConfig)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a mapping of keys; a study has {', '.join(_list_keys())}")
    for key in data:
        if key not in _list_keys():
            raise ConfigError(f"{path}: unknown key {key}; {list_known(key, _list_keys())}")
    try:
        keys = build(StudyConfig, data, "")
        _check_keys(keys)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return keys


def _list_keys() -> list[str]:
    return [f.name for f in fields(StudyConfig)]


def _check_keys(keys: StudyConfig) -> None:
    for key, name in [("name", keys.name), *(("the name of a variant", variant) for variant in keys.variants)]:
        if not isinstance(name, str) or not FOLDER_NAME.fullmatch(name):
            raise ConfigError(f"{key} is {name!r}; it must have only letters, digits, _ and -")
    if len(keys.variants) < 2:
        raise ConfigError(f"variants has {len(keys.variants)}; a study needs the control and at least one other")
    if keys.control not in keys.variants:
        raise ConfigError(
            f"control is {keys.control!r}, which is no variant; {list_known(keys.control, keys.variants)}"
        )
    if not 2 <= len(keys.seeds) <= MAX_SEEDS or len({*keys.seeds}) < len(keys.seeds):
        raise ConfigError(f"seeds is {keys.seeds}; it must have from 2 to {MAX_SEEDS} different integers")
    if keys.processes < 1:
        raise ConfigError(f"processes is {keys.processes}; it must be at least 1")
    _check_mapping("common", keys.common)
    for name, values in keys.variants.items():
        _check_mapping(f"variants.{name}", values or {})


def _check_mapping(where: str, values: Any) -> None:
    """Refuse what is no mapping of keys of a configuration, and the keys that the study itself sets."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {values!r}; it must be a mapping of keys such as loss.name to values")
    for key in values:
        if not isinstance(key, str) or key in KEYS_OF_A_RUN:
            raise ConfigError(f"{where} sets {key}; it may set every key but {', '.join(KEYS_OF_A_RUN)}")


def _load_run(keys: StudyConfig, beside: Path, folder: Path, variant: str, seed: int) -> RunConfig:
    """Return the configuration of a run, whose words are those of a command line: a preset first, then the others."""
    values = {**keys.common, **(keys.variants[variant] or {})}
    words = [f"{key}={_to_word(key, value, beside)}" for key, value in values.items()]
    words += [f"name=seed-{seed}", f"output_dir={folder / variant}", f"seed={seed}", "resume=null", "overwrite=false"]
    config = load(find_file(keys.config, beside, Path()), words)
    prompts_per_rank(config, keys.processes)
    if not config.evaluation.num_tasks:
        raise ConfigError("evaluation.num_tasks is 0; a study compares accuracies on held-out problems")
    if keys.metric == "area" and not config.evaluation.every:
        raise ConfigError("evaluation.every is 0; the metric area needs evaluations during the training")
    return config


def _to_word(key: str, value: Any, beside: Path) -> str:
    """Return the text of a value in a word `key=value`, with its paths as seen from the shell's folder."""
    data: dict[str, Any] = {}
    set_key(data, key, value)
    value = get_in(resolve_paths(data, beside), key)
    return value if isinstance(value, str) else to_inline_yaml(value)


def _check_variants(study: Study) -> None:
    """Refuse two variants that are the same configuration, and variants without shared held-out problems."""
    seed, control = study.keys.seeds[0], study.keys.control
    seen: list[tuple[Any, str]] = []
    for variant in study.keys.variants:
        config = study.runs[variant, seed]
        behaviour = describe_behaviour(config)
        if same := next((name for other, name in seen if other == behaviour), None):
            raise ConfigError(f"the variants {same} and {variant} are the same configuration; leave one of them out")
        seen.append((behaviour, variant))
        for key, (own, others) in list_differing(config, study.runs[control, seed]).items():
            if key.startswith("evaluation.") or _chooses_problems(key, config):
                raise ConfigError(
                    f"{key} is {own!r} in {variant} and {others!r} in {control}; all variants of a study are evaluated "
                    f"alike, on the same held-out problems"
                )


def _chooses_problems(key: str, config: RunConfig) -> bool:
    """Return whether a key of `data` decides which problems are held out."""
    has_own_data = config.data.eval_path is not None
    return key in [f"data.{name}" for name in (PROBLEM_KEYS[:2] if has_own_data else PROBLEM_KEYS)]


def describe_behaviour(config: RunConfig) -> Any:
    """Return a value that is equal for two configurations whose runs are equal: names of functions do not count."""
    data = asdict(replace(config, name="", output_dir="", seed=0))
    for key in NO_EFFECT:
        del data[key]
    for section, registry in REGISTRIES.items():
        named = get_in(data, section)
        for entry in named if isinstance(named, list) else [named]:
            if entry["name"] is None:  # no environment
                continue
            function = registry.get(entry["name"])
            defaults = {name: parameter.default for name, parameter in keyword_arguments(function).items()}
            entry |= {"name": inspect.unwrap(function), "args": defaults | entry["args"]}
    return data
