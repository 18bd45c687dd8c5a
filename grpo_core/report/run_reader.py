"""What a run folder says, read without the run's libraries: its rows, its configuration, where its completions are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_core.schema import ConfigError

Row = dict[str, Any]
FILES = ("metrics.jsonl", "evaluation.jsonl", "completions.jsonl", "config.yaml")
KEY = re.compile(r"""^( *)(- )?([^\s:'"#-][^:]*|'[^']*'|"[^"]*"):(?: (.*))?$""")
ITEM = re.compile(r"^( *)(- )(.*)$")
QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*"|[^'"].*|""")


@dataclass(frozen=True)
class RunFolder:
    path: Path
    name: str
    metrics: list[Row]  # one a step, in their order; every value a finite number or None
    evaluation: list[Row]
    config: str  # config.yaml as it stands; "" where there is none
    settings: dict[str, str]  # section.key -> its value as it is written
    objective: str  # the formula above the configuration
    notes: tuple[str, ...]  # what is missing or could not be read

    @property
    def is_supervised(self) -> bool:
        """Metrics without a reward: an sft run."""
        return bool(self.metrics) and not any("reward" in row for row in self.metrics)


def read_run(path: Path, name: str | None = None) -> RunFolder:
    """Everything but the completions, which may be many: see `completion_places`.

    A line that is not JSON (the torn last one of a run that is going on) is left out and noted. Of two rows of a step
    the later one counts.

    Raises:
        ConfigError: not a folder, none of a run's files in it, or a file that cannot be read.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; report takes the folders of runs")
    if not any((path / file).exists() for file in FILES):
        raise ConfigError(f"{path} is not a run folder; it holds none of {', '.join(FILES)}")
    notes, rows = [], {}
    for kind in ("metrics", "evaluation"):
        rows[kind], torn = _numbers(path / f"{kind}.jsonl")
        if not rows[kind]:
            notes.append(f"{kind}.jsonl has no rows" if (path / f"{kind}.jsonl").exists() else f"no {kind}.jsonl")
        if torn:
            notes.append(f"{torn} unreadable {'line' if torn == 1 else 'lines'} of {kind}.jsonl left out")
    config = _read(path / "config.yaml").decode(errors="replace")
    if not config:
        notes.append("no config.yaml")
    name = name or path.resolve().name
    return RunFolder(
        path, name, **rows, config=config, settings=flat(config), objective=_head(config), notes=tuple(notes)
    )


def flat(config: str) -> dict[str, str]:
    """The keys of a configuration as config_file.dump writes it, as section.key, with the text of their values.

    Not a YAML reader: block style, no anchors. Lines of a value that goes on are joined, an empty one as \\n.

    >>> flat("# why\\nloss:\\n  name: grpo\\n  args: {}\\nrewards:\\n- name: short\\n  weight: 1.0\\n")
    {'loss.name': 'grpo', 'loss.args': '{}', 'rewards[0].name': 'short', 'rewards[0].weight': '1.0'}
    """
    found, open_keys, key = {}, [(-1, "")], ""  # the sections that the line stands in: how far in, what they are called
    counts: dict[str, int] = {}
    for line in config.splitlines():
        if not key and (line.startswith("#") or not line.strip()):
            continue
        whole = QUOTED.fullmatch(found.get(key, ""))
        match = KEY.match(line) if whole else None
        item = ITEM.match(line) if whole and not match else None
        if not match and not item:
            if key:
                found[key] += "\\n" if not line.strip() else ("" if found[key].endswith("\\n") else " ") + line.strip()
            continue
        indent, dash = len((match or item)[1]), (match or item)[2]
        while open_keys[-1][0] >= indent + (1 if dash else 0):
            open_keys.pop()
        if dash:  # an item stands as far in as the key of its list
            parent = open_keys[-1][1]
            counts[parent] = counts.get(parent, -1) + 1
            found.pop(parent, None)
            open_keys.append((indent + 1, f"{parent}[{counts[parent]}]"))
            indent += len(dash)
        if item:
            key = open_keys[-1][1]
            found[key] = item[3]
            continue
        section = open_keys[-1][1]
        found.pop(section, None)  # it has keys of its own, so no value
        key = f"{section}.{match[3]}" if section else match[3]
        found[key] = match[4] or ""
        open_keys.append((indent, key))
    return found


def completion_places(path: Path) -> dict[int, list[tuple[int, int]]]:
    """Of completions.jsonl, by step: where each row begins and how long it is, in bytes.

    A row of a step that comes again (a resumed run's) is kept; the rows are not looked into.
    """
    places, start = {}, 0
    if not path.exists():
        return places
    with _open(path) as file:
        for line in file:
            match = re.match(rb'\{"step": (\d+),', line)
            if match and line.endswith(b"\n"):
                places.setdefault(int(match[1]), []).append((start, len(line)))
            start += len(line)
    return places


def rows_at(path: Path, places: list[tuple[int, int]]) -> Iterator[Row]:
    """The rows that begin at these places; one that is not JSON is left out."""
    with _open(path) as file:
        for start, size in places:
            file.seek(start)
            row = _parsed(file.read(size))
            if row is not None:
                yield row


def dumped_steps(path: Path) -> dict[int, list[Path]]:
    """The files of batches/ by step."""
    found: dict[int, list[Path]] = {}
    for file in sorted((path / "batches").glob("step-*-rank-*.json")):
        if match := re.fullmatch(r"step-(\d+)-rank-(\d+)\.json", file.name):
            found.setdefault(int(match[1]), []).append(file)
    return found


def read_batch(path: Path) -> list[Row]:
    """The completions of one dumped batch; none where the file is torn."""
    row = _parsed(_read(path)) or {}
    completions = row.get("completions")
    return [one for one in completions if isinstance(one, dict)] if isinstance(completions, list) else []


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if plain and abs(value) < 1e300 else None  # nan compares as false


def _numbers(path: Path) -> tuple[list[Row], int]:
    rows, unreadable = {}, 0
    for line in _read(path).splitlines():
        row = _parsed(line)
        if row is None or not isinstance(row.get("step"), int):
            unreadable += 1
        else:
            rows[row["step"]] = {name: number(value) for name, value in row.items()}
    return [rows[step] for step in sorted(rows)], unreadable


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _head(config: str) -> str:
    """The comment above the configuration, without its hashes."""
    lines = []
    for line in config.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix("   "))
    return "\n".join(lines[2:] if lines[:1] == [" What is minimised:"] else lines).strip("\n")


def _open(path: Path) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _read(path: Path) -> bytes:
    if not path.exists():
        return b""
    with _open(path) as file:
        return file.read()
