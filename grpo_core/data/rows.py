"""Rows of a data set, from a file, a folder, a hub or the built-in generator: a list of plain mappings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from grpo_core.config.sections import DataConfig
from grpo_core.data.word_problems import word_problems
from grpo_core.schema import ConfigError, first_line

Row = dict[str, Any]

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
BUILTIN_ROWS = {"train": 20_000, "test": 1_000}


def load_splits(config: DataConfig, num_eval: int) -> tuple[list[Row], list[Row]]:
    """Training rows and at most `num_eval` rows for evaluation, disjoint where they come from one split.

    Every row has every column of its split, None where it was not given.

    Raises:
        ConfigError: data that cannot be loaded, or too few rows to hold `num_eval` of them out.
    """
    train = load_rows(config.path, config.subset, config.split, config.limit)
    if config.eval_path is not None or config.eval_split is not None:
        held_out = load_rows(config.eval_path or config.path, config.subset, config.eval_split or "train", num_eval)
    elif config.path.startswith("builtin:"):
        held_out = load_rows(config.path, None, "test", num_eval)
    else:
        if num_eval >= len(train):
            raise ConfigError(
                f"evaluation.num_tasks is {num_eval}, but {config.path} has only {len(train)} rows to hold them out "
                f"from; name data.eval_path or data.eval_split, or ask for fewer"
            )
        order = permutation(len(train), 0, 0)  # whatever the seed: a run must not train on what another is judged by
        train, held_out = ([train[i] for i in sorted(part)] for part in (order[num_eval:], order[:num_eval]))
    return train, held_out


def permutation(count: int, *key: int) -> np.ndarray:
    """0 .. count - 1 in an order that is a function of `key`."""
    return np.random.default_rng((*key, 1)).permutation(count)


def load_rows(path: str, subset: str | None, split: str, most: int | None) -> list[Row]:
    """At most `most` rows of a split, each with every column, None where it was not given.

    Raises:
        ConfigError: data that cannot be loaded, or has no rows.
    """
    rows = _read(path, subset, split, most)
    if not rows:
        raise ConfigError(f"data.path is {path!r} (split {split!r}), and it has no rows")
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows[:most]]


def _read(path: str, subset: str | None, split: str, most: int | None) -> list[Row]:
    local = Path(path)
    if subset is not None and (path.startswith("builtin:") or local.is_file()):
        raise ConfigError(f"data.subset is {subset!r}, but {path} has no subsets; leave it null")
    if path.startswith("builtin:"):
        if path != "builtin:word_problems" or split not in BUILTIN_ROWS:
            raise ConfigError(
                f"data.path {path!r} (split {split!r}) is not built in; known: builtin:word_problems with train or test"
            )
        there_are = BUILTIN_ROWS[split]
        return word_problems(split, there_are if most is None else max(1, min(most, there_are)))
    if local.suffix in FORMATS and not local.exists():
        raise ConfigError(f"data: there is no file {path}")
    if local.is_file() and split != "train":
        raise ConfigError(f"{path} is one file and has no split {split!r}; name another file as data.eval_path")
    if local.is_file() and local.suffix not in FORMATS:
        raise ConfigError(f"data.path is {path}; a file must end in {', '.join(FORMATS)}")
    if local.is_file() and FORMATS[local.suffix] == "json":
        return _json_rows(local)
    return _with_datasets(path, subset, split)


def _json_rows(path: Path) -> list[Row]:
    """One object a line, or one list of objects.

    Raises:
        ConfigError: it is neither; the line is named.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if text.lstrip().startswith("["):
        rows = [(f"item {i}", row) for i, row in enumerate(_parse(text, str(path)), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"line {i}", _parse(line, f"{path}, line {i},")) for i, line in lines if line.strip()]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, {where}, is {json.dumps(row)[:40]}; it must be an object with a column a key")
    return [row for _, row in rows]


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} " if "\n" in text.strip() else ""
        raise ConfigError(f"{what} is not JSON: {error.msg} ({place}column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise ConfigError(f"{what} is not JSON that can be read: {first_line(error)}") from None


def _with_datasets(path: str, subset: str | None, split: str) -> list[Row]:
    from datasets import disable_progress_bars, load_dataset  # a third of a second, only where it is needed

    disable_progress_bars()
    local = Path(path)
    try:
        if local.is_file():
            return list(load_dataset(FORMATS[local.suffix], data_files=str(local), split="train"))
        return list(load_dataset(path, subset, split=split))
    except Exception as error:  # datasets raises many kinds; all of them mean the same to the user
        where = f"data.path is {path!r} (split {split!r}), and it cannot be loaded: {_cause(error)}"
        hint = "" if local.exists() else "; a file or folder on this machine needs no network"
        raise ConfigError(where + hint) from error


def _cause(error: BaseException) -> str:
    """Return the first line of the exception that began the chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return "the data is empty" if isinstance(error, StopIteration) else first_line(error)
