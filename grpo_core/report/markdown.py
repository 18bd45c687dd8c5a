"""A report in Markdown: for a pull request, a wiki, a notebook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from grpo_core.report.run_reader import RunFolder
from grpo_core.report.summary import in_words
from grpo_core.schema import printable


def markdown(data: dict[str, Any], runs: list[RunFolder], pictures: list[tuple[str, Path]]) -> str:
    """What `report.assemble` found, without the completions; `pictures` are titles and files beside this one."""
    names = [_code(run.name) for run in runs]
    columns = [
        {"Run": name, **{key: _text(value) for key, value in run["summary"].items()}}
        for name, run in zip(names, data["runs"], strict=True)
    ]
    parts = [f"# Report: {', '.join(names)}", f"Made {data['made']}.", "## Summary", _table(columns)]
    for name, run in zip(names, runs, strict=True):
        if run.objective:
            parts += [f"## Objective of {name}", _fenced(printable(run.objective))]
    for name, run in zip(names, runs, strict=True):
        rows = [row for row in run.evaluation if row.get("accuracy") is not None]
        if rows:
            parts += [f"## Accuracy of {name}", "\n".join(f"- {in_words(row)}" for row in rows)]
            parts.append("Intervals are of 95 %.")
    finals = [{"Mean": name, **run["final"]} for name, run in zip(names, data["runs"], strict=True) if run["final"]]
    if finals:
        parts += [f"## {_text(data['final'])}", _table(finals)]
    if data["difference"]:
        rows = [["Key", *names]] + [
            [_code(key), *("" if value is None else _code(value) for value in values)]
            for key, values in data["difference"]
        ]
        parts += ["## Configurations: the keys that differ", _lines(rows)]
    if pictures:
        parts += ["## Curves", *(f"![{_text(title)}]({path.name})" for title, path in pictures)]
    return "\n\n".join(parts) + "\n"


def _table(columns: list[dict[str, str]]) -> str:
    """A column a run; a row is left out where no run has anything."""
    keys = list({key: None for column in columns for key in column if any(c.get(key) for c in columns)})
    return _lines([[key, *(column.get(key, "") for column in columns)] for key in keys])


def _lines(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _text(value: str) -> str:
    """Plain text: nothing in it is Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(value).replace("\n", "\\n"))


def _code(value: str) -> str:
    """Code, in as many backticks as it takes. A bar would end a table's cell."""
    value = printable(value).replace("\n", "\\n").replace("|", "\\|")
    ticks = "`" * (max(map(len, re.findall("`+", value)), default=0) + 1)
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{value}{space}{ticks}"


def _fenced(value: str) -> str:
    fence = "`" * max(3, max(map(len, re.findall("`+", value)), default=0) + 1)
    return f"{fence}\n{value}\n{fence}"
