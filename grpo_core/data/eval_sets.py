"""Load the evaluation sets of a run: the rows of each, by name.

Without evaluation.sets there is one set, whose name is "". With data.sources there is one for each source, by its name.
A set without a path and a split is a part of the rows that the run holds out; several of them divide these rows at
random, without an overlap. Any other set has a source of its own, which may be neither the training data nor that of
another set: the set that selects is then not the one that is reported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig, EvaluationSetConfig, RunConfig
from grpo_core.data.rows import (
    Rows,
    describe_eval_source,
    load_rows,
    load_splits,
    name_eval_split,
    name_split,
)
from grpo_core.data.rows_on_disk import RowsOnDisk
from grpo_core.random_keys import make_generator, make_key
from grpo_core.schema import GENERATED, ConfigError, describe_split


def load_eval_sets(config: RunConfig) -> tuple[Rows | RowsOnDisk, dict[str, Rows]]:
    """Return the training rows, and the rows of each evaluation set by name.

    Raises:
        ConfigError: as `load_splits`; a set has no rows, or its source is the training data or that of another set.
    """
    evaluation = config.evaluation
    if not evaluation.sets or not evaluation.num_tasks:
        train, held_out = load_splits(config.data, evaluation.num_tasks)
        return train, {"": held_out}
    _check_sources(config.data, evaluation.sets)
    sizes = {x.name: evaluation.num_tasks if x.num_tasks is None else x.num_tasks for x in evaluation.sets}
    shares = {x.name: sizes[x.name] for x in evaluation.sets if is_share(x)}
    train, pool = load_splits(config.data, sum(shares.values()), "the sum of evaluation.sets' num_tasks")
    sets = _divide(pool, shares)
    for i, part in enumerate(evaluation.sets):
        if not is_share(part):
            try:
                args = config.data.args if part.path in (None, config.data.path) else {}
                sets[part.name] = load_rows(*_source(config.data, part), sizes[part.name], args)
            except ConfigError as error:
                raise ConfigError(f"evaluation.sets[{i}] ({part.name}): {error}") from None
        if not sets[part.name]:
            raise ConfigError(
                f"evaluation.sets[{i}] ({part.name}) gets no rows, because the sets before it take all {len(pool)}; "
                f"lower their num_tasks"
            )
    return train, {part.name: sets[part.name] for part in evaluation.sets}


def is_share(part: EvaluationSetConfig) -> bool:
    """Return whether a set is a part of the rows that the run holds out."""
    return part.path is None and part.split is None


def group_by_set(tasks: Iterable[Task]) -> dict[str, list[Task]]:
    """Return the evaluation tasks of each set, in the order of the sets."""
    sets: dict[str, list[Task]] = {}
    for task in tasks:
        sets.setdefault(task.eval_set, []).append(task)
    return sets


def describe_set(config: RunConfig, name: str) -> tuple[str, str]:
    """Return the path of the set `name`, and which of its rows the set has."""
    config = config.of_source(name)
    part = next((x for x in config.evaluation.sets if x.name == name), None)
    if part is None or is_share(part):
        path, split = describe_eval_source(config.data)
        return path, f"{split}, in part" if sum(map(is_share, config.evaluation.sets)) > 1 else split
    path, _, split = _source(config.data, part)
    return path, describe_split(path, split)


def name_set(config: RunConfig, name: str) -> str:
    """Return the name of the split that holds the rows of the set `name`, with its path."""
    config = config.of_source(name)
    part = next((x for x in config.evaluation.sets if x.name == name), None)
    if part is None or is_share(part):
        return name_eval_split(config.data)
    path, _, split = _source(config.data, part)
    return name_split(path, split)


def _divide(pool: Rows, shares: dict[str, int]) -> dict[str, Rows]:
    """Divide held-out rows at random into parts of the given sizes; the last parts are smaller where rows lack."""
    order = make_generator(make_key("evaluation_sets")).permutation(len(pool)).tolist()
    parts, start = {}, 0
    for name, size in shares.items():
        chosen = sorted(order[start : start + size])
        parts[name] = pool.select(chosen)
        start += size
    return parts


def _source(data: DataConfig, part: EvaluationSetConfig) -> tuple[str, str | None, str]:
    subset = data.subset if part.path is None and part.subset is None else part.subset
    return part.path or data.path, subset, part.split or "train"


def _check_sources(data: DataConfig, parts: list[EvaluationSetConfig]) -> None:
    """Refuse a set that is trained on, or that has the rows of another set.

    Raises:
        ConfigError: names the set, and what else reads its source.
    """
    readers = {_identify(data.path, data.subset, data.split): "the training data"}
    if any(map(is_share, parts)):
        path, split = data.eval_path or data.path, data.eval_split
        split = split or ("test" if path.startswith(GENERATED) and data.eval_path is None else "train")
        readers.setdefault(_identify(path, data.subset, split), "that of the run's own held-out rows")
    for i, part in enumerate(parts):
        if is_share(part):
            continue
        path, subset, split = _source(data, part)
        if other := readers.get(_identify(path, subset, split)):
            raise ConfigError(
                f"evaluation.sets[{i}] ({part.name}) is {path} (split {split}), which is also {other}; give it another "
                f"path or split, or neither, for a part of the rows that are held out"
            )
        readers[_identify(path, subset, split)] = f"the set {part.name}"


def check_source_overlap(config: RunConfig) -> None:
    """Refuse a source whose evaluation rows another source, or itself, trains on.

    Raises:
        ConfigError: names both.
    """
    parts = {name: config.of_source(name).data for name in config.source_names}
    trained = {_identify(data.path, data.subset, data.split): name for name, data in parts.items()}
    for i, (name, data) in enumerate(parts.items()):
        if data.eval_path is None and data.eval_split is None:
            continue
        path, split = data.eval_path or data.path, data.eval_split or "train"
        if config.evaluation.num_tasks and (other := trained.get(_identify(path, data.subset, split))) is not None:
            raise ConfigError(
                f"data.sources[{i}] ({name}) is evaluated on {path} (split {split}), which the source {other} is "
                f"trained on; give it another eval_path or eval_split, or neither, for rows that are held out"
            )


def _identify(path: str, subset: str | None, split: str) -> tuple[str, str | None, str]:
    return (os.path.realpath(path) if Path(path).exists() else path), subset, split
