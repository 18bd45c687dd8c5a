"""Write a report as Markdown, for a pull request, a wiki or a notebook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from grpo_core.counts import quantify
from grpo_core.report.eval_sets import label_set
from grpo_core.report.run_reader import RunFolder
from grpo_core.report.summary import describe_accuracy
from grpo_core.schema import printable


def render_markdown(data: dict[str, Any], runs: list[RunFolder], pictures: list[tuple[str, Path]]) -> str:
    """Return the report of `report.collect_data` without the completions.

    `pictures` are titles and files; a file is linked by its name, so it lies in the folder of the report.
    """
    names = [_code(run.name) for run in runs]
    columns = [
        {"Run": name, **{key: _escape(value) for key, value in run["summary"].items()}}
        for name, run in zip(names, data["runs"], strict=True)
    ]
    parts = [f"# Report: {', '.join(names)}", f"Made {data['made']}.", "## Summary", _table(columns)]
    for name, run in zip(names, runs, strict=True):
        if run.objective:
            parts += [f"## Objective of {name}", _code_block(printable(run.objective))]
    for name, run in zip(names, runs, strict=True):
        for eval_set, rows in run.evaluations.items():
            label = f" on {_escape(label_set(eval_set, run.selecting_set))}" if eval_set else ""
            parts += [f"## Accuracy of {name}{label}", "\n".join(f"- {describe_accuracy(row)}" for row in rows)]
            parts.append("Intervals are of 95 %.")
    for name, run in zip(names, data["runs"], strict=True):
        if run["answers"]:
            parts += [f"## Held-out answers of {name}", *_render_answers(run["answers"])]
    means = [{"Mean": name, **run["final"]} for name, run in zip(names, data["runs"], strict=True) if run["final"]]
    if means:
        parts += [f"## {_escape(data['final'])}", _table(means)]
    if data["difference"]:
        rows = [["Key", *names]] + [
            [_code(key), *("" if value is None else _code(value) for value in values)]
            for key, values in data["difference"]
        ]
        parts += ["## Configurations: the keys that differ", _table_lines(rows)]
    if pictures:
        parts += ["## Curves", *(f"![{_escape(title)}]({path.name})" for title, path in pictures)]
    return "\n\n".join(parts) + "\n"


def _render_answers(answers: list[dict[str, Any]]) -> list[str]:
    """Return the prompt of every problem, and its answers before and after training."""
    parts = []
    for answer in answers:
        parts += [f"Problem {answer['task']}", _code_block(printable(answer["prompt"]))]
        for steps, text, correct in zip(answer["steps"], answer["texts"], answer["correct"], strict=True):
            parts += [
                f"After {quantify(steps, 'step')}, {'correct' if correct else 'wrong'}:",
                _code_block(printable(text)),
            ]
    return parts


def _table(columns: list[dict[str, str]]) -> str:
    """Return a table with one column per run; rows that are empty for every run are left out."""
    keys = list({key: None for column in columns for key in column if any(c.get(key) for c in columns)})
    return _table_lines([[key, *(column.get(key, "") for column in columns)] for key in keys])


def aligned_table(rows: list[list[str]]) -> str:
    """Return a table that can also be read as text: the first row is the heading, and columns have equal widths."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([head, "| " + " | ".join("-" * width for width in widths) + " |", *body])


def _table_lines(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _escape(value: str) -> str:
    """Return plain text with everything escaped that Markdown or HTML would interpret."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(value).replace("\n", "\\n"))


def _code(value: str) -> str:
    """Return inline code, with more backticks around it than in it."""
    value = printable(value).replace("\n", "\\n").replace("|", "\\|")  # a bar would end the cell of a table
    ticks = "`" * (_longest_backticks(value) + 1)
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{value}{space}{ticks}"


def _code_block(value: str) -> str:
    fence = "`" * max(3, _longest_backticks(value) + 1)
    return f"{fence}\n{value}\n{fence}"


def _longest_backticks(value: str) -> int:
    return max(map(len, re.findall("`+", value)), default=0)
