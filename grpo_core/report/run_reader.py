"""Read a run folder without the run's libraries: metrics, evaluations, configuration, places of the completions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo_core.report.eval_sets import collect_accuracies
from grpo_core.schema import ConfigError

Row = dict[str, Any]
RUN_FILES = ("metrics.jsonl", "evaluation.jsonl", "completions.jsonl", "config.yaml")  # a run folder has one or more
MAX_HEADING_LINES = 4  # of the comment above the configuration, one of which is the heading
MAX_NUMBER = 1e300  # absolute value; JSON may hold integers that no float can


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder, without its completions."""

    path: Path
    name: str
    metrics: list[Row]  # one row per step, ascending; every value a finite number or None
    evaluation: list[Row]  # the same for evaluation.jsonl
    config: str  # text of config.yaml; "" without the file
    settings: dict[str, str]  # section.key -> value as it is written in config.yaml
    objective: str  # the formula in the comment above the configuration
    notes: tuple[str, ...]  # files that are missing or could not be read whole

    @property
    def evaluations(self) -> dict[str, list[Row]]:
        """The rows with an accuracy of each evaluation set; the set's name is "" where the sets have none."""
        return collect_accuracies(self.evaluation)

    @property
    def selecting_set(self) -> str:
        """The name of the evaluation set whose accuracy selects; "" where the sets have no names."""
        chosen = self.settings.get("evaluation.select", "null")
        firsts = [self.settings.get(f"{key}[0].name", "") for key in ("evaluation.sets", "data.sources")]
        return ((firsts[0] or firsts[1]) if chosen == "null" else chosen).strip("'\"")

    @property
    def is_supervised(self) -> bool:
        """True for a run of the sft command, whose metrics have no reward."""
        return bool(self.metrics) and not any("reward" in row for row in self.metrics)


def read_run(path: Path, name: str | None = None) -> RunFolder:
    """Read everything but the completions, which may be many: see `locate_completions`.

    Lines that are not JSON, such as the incomplete last line of a running job, are left out and counted in the notes.
    Where a step has several rows, the last one counts.

    Raises:
        ConfigError: `path` is not a folder, has none of the files of a run, or has a file that cannot be read.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; report takes the folders of runs")
    if not any((path / file).exists() for file in RUN_FILES):
        raise ConfigError(f"{path} is not a run folder; it holds none of {', '.join(RUN_FILES)}")
    notes, rows = [], {}
    for kind in ("metrics", "evaluation"):
        file = path / f"{kind}.jsonl"
        rows[kind], unreadable = _read_numbers(file)
        if not rows[kind]:
            notes.append(f"{file.name} has no rows" if file.exists() else f"no {file.name}")
        if unreadable:
            notes.append(f"{unreadable} unreadable {'line' if unreadable == 1 else 'lines'} of {file.name} left out")
    config = _read_bytes(path / "config.yaml").decode(errors="replace")
    settings = read_settings(config)
    if not config:
        notes.append("no config.yaml")
    elif settings is None:
        notes.append("config.yaml is not valid YAML")
    name = name or path.resolve().name
    objective = _extract_objective(config)
    return RunFolder(
        path, name, **rows, config=config, settings=settings or {}, objective=objective, notes=tuple(notes)
    )


def read_settings(config: str) -> dict[str, str] | None:
    r"""Return the keys of a YAML configuration as section.key, with the text of their values; None for invalid YAML.

    A value keeps its quotes, and its line breaks are written as \n.

    >>> read_settings("loss:\n  name: grpo\n  args: {}\nrewards:\n- name: short\n  weight: 1.0\n")
    {'loss.name': 'grpo', 'loss.args': '{}', 'rewards[0].name': 'short', 'rewards[0].weight': '1.0'}
    """
    import yaml  # here, so that importing the report loads no dependency

    try:
        root = yaml.compose(config, yaml.BaseLoader)
        return dict(_flatten(root, "")) if isinstance(root, yaml.MappingNode) else {}
    except (yaml.YAMLError, RecursionError):
        return None


def _flatten(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the key and the text of every leaf below a node of YAML."""
    if node.id == "mapping" and node.value:
        for name, value in node.value:
            yield from _flatten(value, f"{key}.{name.value}" if key else str(name.value))
    elif node.id == "sequence" and node.value:
        for i, value in enumerate(node.value):
            yield from _flatten(value, f"{key}[{i}]")
    elif node.id == "scalar":
        quote = node.style if node.style in ("'", '"') else ""
        yield key, f"{quote}{node.value}{quote}".replace("\n", "\\n")
    else:
        yield key, "{}" if node.id == "mapping" else "[]"


def locate_completions(path: Path) -> dict[int, list[tuple[int, int]]]:
    """Return the first byte and the length in bytes of each row of a completions.jsonl, by step.

    All rows of a step that was logged twice, by a resumed run, are listed. Only the step of a row is parsed.
    """
    places: dict[int, list[tuple[int, int]]] = {}
    start = 0
    if not path.exists():
        return places
    with _open_file(path) as file:
        for line in file:
            match = re.match(rb'\{"step": (\d+),', line)
            if match and line.endswith(b"\n"):
                places.setdefault(int(match[1]), []).append((start, len(line)))
            start += len(line)
    return places


def read_rows(path: Path, places: list[tuple[int, int]]) -> Iterator[Row]:
    """Yield the rows at `places`, which are as in `locate_completions`; rows that are not JSON are left out."""
    with _open_file(path) as file:
        for start, size in places:
            file.seek(start)
            row = _parse_row(file.read(size))
            if row is not None:
                yield row


def find_batches(path: Path) -> dict[int, list[Path]]:
    """Return the JSON files of the dumped batches of the run folder `path`, by step."""
    files: dict[int, list[Path]] = {}
    for file in sorted((path / "batches").glob("step-*-rank-*.json")):
        if match := re.fullmatch(r"step-(\d+)-rank-(\d+)\.json", file.name):
            files.setdefault(int(match[1]), []).append(file)
    return files


def read_batch(path: Path) -> list[Row]:
    """Return the completions in a JSON file of a dumped batch; none where the file is incomplete."""
    row = _parse_row(_read_bytes(path)) or {}
    completions = row.get("completions")
    return [row for row in completions if isinstance(row, dict)] if isinstance(completions, list) else []


def read_json_lines(path: Path) -> list[Row]:
    """Return the rows of a JSON Lines file; none without the file, and lines that are not rows are left out."""
    return [row for line in _read_bytes(path).splitlines() if (row := _parse_row(line)) is not None]


def read_json(path: Path) -> Row:
    """Return the object in a JSON file; empty without the file, or where it is incomplete."""
    return _parse_row(_read_bytes(path)) or {}


def finite_number(value: Any) -> float | None:
    """Return `value` if it is a finite number, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < MAX_NUMBER else None  # false for NaN


def _read_numbers(path: Path) -> tuple[list[Row], int]:
    """Return the rows of a file with numbers by step, and the number of lines that are no such row."""
    rows, unreadable = {}, 0
    for line in _read_bytes(path).splitlines():
        row = _parse_row(line)
        if row is None or not isinstance(row.get("step"), int):
            unreadable += 1
        else:
            rows[row["step"]] = {name: finite_number(value) for name, value in row.items()}
    return [rows[step] for step in sorted(rows)], unreadable


def _parse_row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _extract_objective(config: str) -> str:
    """Return the comment above the configuration without its hash signs, from the line after its heading on."""
    lines = []
    for line in config.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix("   "))
    pairs = enumerate(pairwise(lines[:MAX_HEADING_LINES]))
    start = next((i + 2 for i, (line, after) in pairs if line.endswith(":") and not after), 0)
    return "\n".join(lines[start:]).strip("\n")


def _open_file(path: Path) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        return b""
    with _open_file(path) as file:
        return file.read()
