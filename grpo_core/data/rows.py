"""Load the rows of a data set, as plain mappings, from a file, a folder, a hub or the built-in generator."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from grpo_core.config.gym_tasks import is_gym_path
from grpo_core.config.sections import DataConfig
from grpo_core.config.text_files import decode_text, parse_json, read_text
from grpo_core.counts import quantify
from grpo_core.data.columns import MISSING, read_path
from grpo_core.data.csv_rows import read_csv_rows
from grpo_core.data.gym_rows import make_gym_rows
from grpo_core.data.parquet_rows import load_in_parts
from grpo_core.data.rows_on_disk import CHUNK, JsonLines, MappedTable, Row, RowsOnDisk
from grpo_core.data.word_problems import make_word_problems
from grpo_core.random_keys import make_generator, make_key
from grpo_core.schema import GENERATED, ConfigError, describe_eval_rows, first_line

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
COMPRESSED = {".gz": "gunzip -k", ".zst": "unzstd", ".bz2": "bunzip2 -k", ".xz": "unxz -k", ".zip": "unzip"}
SPLIT_WORD = re.compile("train|test|valid|dev|eval")  # a file name with one of them belongs to a split
NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")  # how datasets names files without a row
DIFFERENT_COLUMNS = (
    "its files differ in their columns or in the types of the values; give all the same, or name one file"
)
SAVED = ("state.json", "dataset_dict.json")  # which save_to_disk writes, for one split and for several
OWN_FILES = ("dataset_info.json", "dataset_infos.json", "state.json")  # of datasets: no data
MAX_VALUES = 10  # of a column, in a sentence
LARGE_BYTES = 512 * 2**20  # of data, above which the rows stay on disk
BUILTIN_ROWS = {"train": 20_000, "test": 1_000}  # rows of the built-in data by split
BUILTIN_SCALES = {"builtin:word_problems": 1, "builtin:large_word_problems": 10}  # of the numbers in the problems


class Rows(list[Row]):
    """Some rows of a split, with `numbers`, their places in the split, from 0, and `source`, the name of the split."""

    def __init__(self, rows: Iterable[Row], numbers: Iterable[int] | None = None, source: str = "") -> None:
        super().__init__(rows)
        self.numbers = list(range(len(self)) if numbers is None else numbers)
        self.source = source

    def select(self, places: Iterable[int]) -> Rows:
        """Return the rows at some places of this list."""
        places = list(places)
        return Rows((self[i] for i in places), (self.numbers[i] for i in places), self.source)


def load_splits(config: DataConfig, num_eval: int, key: str = "evaluation.num_tasks") -> tuple[Rows | RowsOnDisk, Rows]:
    """Return the training rows and at most `num_eval` evaluation rows; if both come from one split, they are disjoint.

    The training rows of a large data set stay on disk, which changes nothing but the memory that they take.

    Every row has every column of its split, with None where the data has no value. `key` names `num_eval` in a message.

    Raises:
        ConfigError: the data cannot be loaded, or has too few rows to hold out `num_eval` of them.
    """
    train = load_training_rows(config.path, config.subset, config.split, config.limit, config.args)
    if config.eval_path is not None or config.eval_split is not None:
        path, split = config.eval_path or config.path, config.eval_split or "train"
        held_out = load_rows(path, config.subset, split, num_eval, config.args)
    elif config.path.startswith(GENERATED):
        held_out = load_rows(config.path, None, "test", num_eval, config.args)
    else:
        if num_eval >= len(train):
            raise ConfigError(
                f"{key} is {num_eval}, but {config.path} has only {quantify(len(train), 'row')} to hold them out "
                f"from; lower it, such as to {max(1, len(train) // 10)}, or set data.eval_path or "
                f"data.eval_split"
            )
        # independent of the run's seed: no run may train on rows that another is evaluated on
        order = make_generator(make_key("held_out")).permutation(len(train))
        parts = (sorted(part.tolist()) for part in (order[num_eval:], order[:num_eval]))
        train, held_out = (train.select(part) for part in parts)
    return train, held_out if isinstance(held_out, Rows) else Rows(held_out, held_out.numbers.tolist(), held_out.source)


def describe_eval_source(config: DataConfig) -> tuple[str, str]:
    """Return the path of the evaluation rows, and which of its rows they are, as `load_splits` reads them."""
    return describe_eval_rows(config.path, config.split, config.eval_path, config.eval_split)


def name_split(path: str, split: str) -> str:
    """Return the name of a split with its path; a file has no splits but those that a column names."""
    return path if Path(path).is_file() and "=" not in split else f"{path} ({split})"


def name_eval_split(config: DataConfig) -> str:
    """Return the name of the split that holds the evaluation rows."""
    if config.eval_path is not None or config.eval_split is not None:
        return name_split(config.eval_path or config.path, config.eval_split or "train")
    return name_split(config.path, "test" if config.path.startswith(GENERATED) else config.split)


def load_rows(path: str, subset: str | None, split: str, limit: int | None, args: dict[str, Any] | None = None) -> Rows:
    """Return at most `limit` first rows of a split, each with every column, with None where the data has no value.

    `args` are the arguments of a task of Reasoning Gym.

    Raises:
        ConfigError: the data cannot be loaded, or has no rows.
    """
    return _load(path, split, limit, _read_rows(path, subset, *_find_base(split, limit), args or {}))


def load_training_rows(
    path: str, subset: str | None, split: str, limit: int | None, args: dict[str, Any] | None = None
) -> Rows | RowsOnDisk:
    """Return what `load_rows` returns; the rows of a large data set stay on disk.

    Raises:
        ConfigError: as `load_rows`.
    """
    rows = _read_rows(path, subset, *_find_base(split, limit), args or {})
    if isinstance(rows, list) or not rows or rows.num_bytes <= LARGE_BYTES:
        return _load(path, split, limit, rows)
    return RowsOnDisk(rows.read, np.asarray(_choose_places(path, split, rows)[:limit]), name_split(path, split))


def _load(path: str, split: str, limit: int | None, rows: list[Row] | JsonLines | MappedTable) -> Rows:
    """Return the first rows that a reader has, in memory, as `load_rows`."""
    if not rows:
        raise ConfigError(f"data.path is {path!r} (split {split!r}), and it has no rows")
    places = _choose_places(path, split, rows)[:limit]
    if isinstance(rows, list):
        columns = dict.fromkeys(name for row in rows for name in row)
        chosen = [{name: rows[i].get(name) for name in columns} for i in places]
    else:
        chosen = rows.read(places)
    return Rows(chosen, places, name_split(path, split))


def _find_base(split: str, limit: int | None) -> tuple[str, int | None]:
    """Return the split, and the number of its rows, from which those of `split` are chosen."""
    return ("train", None) if "=" in split else (split, limit)


def _choose_places(path: str, split: str, rows: list[Row] | JsonLines | MappedTable) -> Sequence[int]:
    """Return the places of the rows of a split: all, or those that a column with its value names, as in level=3.

    Raises:
        ConfigError: no row has this value, or the data has no such column.
    """
    if "=" not in split:
        return range(len(rows))
    column, _, wanted = split.partition("=")
    values: list[str] = []
    for start in range(0, len(rows), CHUNK):
        part = range(start, min(start + CHUNK, len(rows)))
        chunk = [rows[i] for i in part] if isinstance(rows, list) else rows.read(part)
        values += [str(value) for value in (read_path(row, column) for row in chunk)]
    places = [i for i, value in enumerate(values) if value == wanted]
    if not places:
        known = [value for value in dict.fromkeys(values) if value != str(MISSING)]
        raise ConfigError(
            f"data.path is {path!r}, of which no row has {split}; "
            + (f"{column} is {', '.join(known[:MAX_VALUES])}" if known else f"it has no column {column}")
        )
    return places


def peek_rows(path: str, subset: str | None, split: str, count: int, args: dict[str, Any] | None = None) -> list[Row]:
    """Return at most `count` first rows of a split, without reading more of a large file than they take.

    Raises:
        ConfigError: as `load_rows`.
    """
    local = Path(path)
    if local.is_file() and local.suffix in FORMATS and FORMATS[local.suffix] == "json" and split == "train":
        return _read_json_rows(local, count)[:count]
    if "=" in split:
        return load_rows(path, subset, split, count, args)
    rows = _read_rows(path, subset, split, count, args or {})
    return rows[:count] if isinstance(rows, list) else rows.read(range(len(rows))[:count])


def count_rows(path: str, subset: str | None, split: str, most: int) -> int:
    """Return the number of rows of a split, or `most` if it has more, of which a JSON Lines file reads no more lines.

    Raises:
        ConfigError: as `load_rows`.
    """
    local = Path(path)
    if local.is_file() and FORMATS.get(local.suffix) == "json" and split == "train" and not _is_json_list(local):
        with local.open("rb") as file:
            return sum(1 for _ in islice((line for line in file if line.strip()), most))
    if "=" in split:
        return len(load_rows(path, subset, split, most))
    return min(most, len(_read_rows(path, subset, split, most, {})))


def _read_rows(
    path: str, subset: str | None, split: str, limit: int | None, args: dict[str, Any]
) -> list[Row] | JsonLines | MappedTable:
    local = Path(path)
    if subset is not None and (path.startswith(GENERATED) or local.is_file()):
        raise ConfigError(f"data.subset is {subset!r}, but {path} has no subsets; leave it null")
    if is_gym_path(path):
        return make_gym_rows(path, args, split, limit)
    if path.startswith("builtin:"):
        if path not in BUILTIN_SCALES or split not in BUILTIN_ROWS:
            raise ConfigError(
                f"data.path {path!r} (split {split!r}) is not built in; known: {' and '.join(BUILTIN_SCALES)}, with "
                f"split train or test"
            )
        count = BUILTIN_ROWS[split]
        limit = count if limit is None else max(1, min(limit, count))
        return make_word_problems(split, limit, scale=BUILTIN_SCALES[path])
    if os.path.isfile(local / "config.yaml") and os.path.isfile(local / "metrics.jsonl"):
        raise ConfigError(f"data: {path} is the folder of a run; did you mean {local / 'completions.jsonl'}?")
    if not local.exists() and (set("*[,") & set(path)):
        raise ConfigError(
            f"data.path is {path!r}, which is no file; it takes one path, so name a folder for files of the same form, "
            f"or list them as data.sources"
        )
    if local.suffix in FORMATS and not local.exists():
        raise ConfigError(f"data: there is no file {path}")
    if local.is_file() and split != "train":
        raise ConfigError(
            f"{path} is one file and has no split {split!r}; set data.split to train, and data.eval_path to another "
            f"file for evaluation, or choose rows by a column, such as data.split=level=3"
        )
    if local.is_file() and local.suffix not in FORMATS:
        hint = "" if local.suffix not in COMPRESSED else f"; unpack it, as with {COMPRESSED[local.suffix]} {path}"
        raise ConfigError(f"data.path is {path}; a file must end in {', '.join(FORMATS)}{hint}")
    if local.is_file() and FORMATS[local.suffix] == "json":
        is_large = local.stat().st_size > LARGE_BYTES and not _is_json_list(local)
        return JsonLines(local) if is_large else _read_json_rows(local)
    if local.is_file() and FORMATS[local.suffix] == "csv":
        return read_csv_rows(local, "\t" if local.suffix == ".tsv" else ",")
    return _read_with_datasets(path, subset, split)


def _read_json_rows(path: Path, count: int | None = None) -> list[Row]:
    """Read a file with one JSON object per line, of which the first `count` if given, or with one JSON list of objects.

    Raises:
        ConfigError: the file is neither; the message names the line.
    """
    text = read_text(path) if count is None else _read_lines(path, count)
    if text.lstrip().startswith("["):
        rows = [(f"item {i}", row) for i, row in enumerate(parse_json(text, str(path)), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"line {i}", parse_json(line, f"{path}, line {i},")) for i, line in lines if line.strip()]
    if len(rows) == 1 and isinstance(rows[0][1], dict) and _holds_rows(rows[0][1]):
        raise ConfigError(
            f"{path} is one object, whose {', '.join(rows[0][1])} hold the rows; write one object per line, or one "
            f"list of objects, as pandas does with to_json(..., orient='records')"
        )
    for place, row in rows:
        if not isinstance(row, dict):
            raise ConfigError(
                f"{path}, {place}, is {json.dumps(row)[:40]}; it must be an object whose keys are the columns"
            )
    return [row for _, row in rows]


def _holds_rows(row: Row) -> bool:
    """Return whether one object holds rows: a list of objects under a key, or mappings of row numbers to values."""
    values = list(row.values())
    if all(isinstance(value, dict) and list(value)[:2] == ["0", "1"] for value in values):
        return bool(values)
    (value, *others) = values or [None]
    is_list = not others and isinstance(value, list) and len(value) > 1
    return is_list and all(isinstance(item, dict) and "role" not in item and "from" not in item for item in value)


def _is_json_list(path: Path) -> bool:
    """Return whether a file holds one JSON list."""
    with path.open("rb") as file:
        first = next((line for line in file if line.removeprefix(codecs.BOM_UTF8).strip()), b"")
    return first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _read_lines(path: Path, count: int) -> str:
    """Return the lines of a file up to the `count`-th that is not empty; the whole file if it is one JSON list."""
    lines: list[bytes] = []
    left = count
    try:
        with path.open("rb") as file:
            for line in file:
                if left == count and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                    return read_text(path)
                lines.append(line)
                left -= bool(line.strip())
                if not left:
                    break
    except OSError:
        return read_text(path)  # which says why the file cannot be read
    return decode_text(b"".join(lines), str(path))


def _read_with_datasets(path: str, subset: str | None, split: str) -> list[Row] | MappedTable:
    """Return the rows of a split, which `datasets` maps from disk; CSV files are read into memory."""
    from datasets import disable_progress_bars, load_dataset, load_dataset_builder  # here: it takes a third of a second
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.parquet.parquet import Parquet

    disable_progress_bars()
    local = Path(path)
    try:
        if any((local / name).is_file() for name in SAVED):
            return MappedTable(_read_saved(local, path, subset, split), path)
        if local.is_file():
            builder, split = load_dataset_builder(FORMATS[local.suffix], data_files=str(local)), "train"
            if isinstance(builder, Parquet):
                return MappedTable(load_in_parts(builder, split), path)
            return MappedTable(load_dataset(FORMATS[local.suffix], data_files=str(local), split=split), path)
        builder = load_dataset_builder(path, subset)
        if local.is_dir():
            _refuse_mixed_formats(local, builder.config.data_files or {})
        if isinstance(builder, Csv):
            return _read_csv_split(builder.config, path, split)
        if local.is_dir() and isinstance(builder, Parquet):
            return MappedTable(load_in_parts(builder, split), path)
        return MappedTable(load_dataset(path, subset, split=split), path)
    except ConfigError:
        raise
    except Exception as error:  # datasets raises many types, all for data that cannot be loaded
        is_unreachable = not local.exists() and isinstance(error, (ConnectionError, FileNotFoundError))
        if is_unreachable and (folder := _find_downloaded(path)):
            return _read_with_datasets(folder, subset, split)
        cause = _describe_cause(error)
        cause += "; unpack the files" if cause.startswith("Compression type") else ""
        if any(sentence in cause for sentence in NO_ROWS):
            return []
        hint = "" if local.exists() else "; without a network, set data.path to a file or folder of this machine"
        raise ConfigError(f"data.path is {path!r} (split {split!r}), and it cannot be loaded: {cause}{hint}") from error


def _read_saved(folder: Path, path: str, subset: str | None, split: str) -> Any:
    """Return the rows of a split of a data set that was saved with save_to_disk of `datasets`.

    One without splits is train. `split` may be a slice or a sum, such as train[:10%] or train+test.
    """
    from datasets import DatasetDict, ReadInstruction, concatenate_datasets, load_from_disk

    saved = load_from_disk(str(folder))
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if subset is not None:
        raise ConfigError(f"data.subset is {subset!r}, but {path} has no subsets; leave it null")
    if unknown := [name for name in re.split(r"\+", split) if name.partition("[")[0] not in splits]:
        raise ConfigError(f"data.path is {path!r}, which has no split {unknown[0]!r}; it has {', '.join(splits)}")
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    tables = [
        splits[part.splitname].select(
            range(part.from_ or 0, len(splits[part.splitname]) if part.to is None else part.to)
        )
        for part in parts
    ]
    return concatenate_datasets(tables) if len(tables) > 1 else tables[0]


def _find_downloaded(path: str) -> str | None:
    """Return the folder of a hub data set's files that were downloaded before, or None.

    Without a network `datasets` finds only what its own reader has prepared, and CSV files are not read by that.
    """
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, repo_type="dataset", local_files_only=True)
    except Exception:  # no such download, or no id of a repository
        return None


def _read_csv_split(config: Any, path: str, split: str) -> list[Row]:
    """Return the rows of a split of CSV files that `datasets` has found; its own reader turns 007 into the number 7.

    `split` may be a slice or a sum, such as train[:10%] or train+test.
    """
    from datasets import DownloadManager, ReadInstruction

    given, default = config.pd_read_csv_kwargs, type(config)(sep=config.sep, names=config.names).pd_read_csv_kwargs
    if options := sorted(key for key in given if given[key] != default.get(key)):
        raise ConfigError(
            f"data.path is {path!r}, whose card sets the CSV options {', '.join(options)}; only sep and names are "
            f"read, so save the data as JSON Lines or Parquet"
        )
    rows: dict[str, list[Row]] = {}
    split = "+".join(map(str, config.data_files)) if split == "all" else split
    for name, files in config.data_files.items():
        if str(name) in re.split(r"[^\w.-]+", split):
            read = [
                read_csv_rows(Path(file), config.sep, config.names)
                for file in DownloadManager().download_and_extract(list(files))
            ]
            columns = {tuple(part[0]) for part in read if part}
            if len(columns) > 1:
                raise ConfigError(f"data.path is {path!r} (split {split!r}), and {DIFFERENT_COLUMNS}")
            rows[str(name)] = [row for part in read for row in part]
    lengths = {str(name): len(rows.get(str(name), ())) for name in config.data_files}
    parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    return [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]


def _refuse_mixed_formats(folder: Path, used: Mapping[Any, Sequence[str]]) -> None:
    """Raise ConfigError if a folder has data files of several formats, of which `datasets` reads only one.

    A data set's card (README.md) may choose among them, and so may file names (train.csv beside notes.json).
    """
    names = [Path(file.removesuffix(".gz")) for files in used.values() for file in files]
    read = {FORMATS.get(name.suffix) for name in names}
    if (folder / "README.md").exists() or not read or None in read:
        return
    has_words = all(SPLIT_WORD.search(name.stem.lower()) for name in names)
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(".gz")
        is_other = Path(name).suffix in FORMATS and FORMATS[Path(name).suffix] not in read and name not in OWN_FILES
        if is_other and path.is_file() and (not has_words or SPLIT_WORD.search(name.lower())):
            raise ConfigError(
                f"data.path is {str(folder)!r}, a folder of data files in several formats ({names[0].name}, {name}); "
                f"name one of the files, or a folder whose files have one format"
            )


def _describe_cause(error: BaseException) -> str:
    """Return the first line of the exception at the start of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    sentence = first_line(error)
    if sentence.startswith(("Couldn't cast", "Schema at index")):
        return DIFFERENT_COLUMNS
    return "the data is empty" if isinstance(error, StopIteration) else sentence
