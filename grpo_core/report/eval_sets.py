"""The rows of evaluation.jsonl: with named evaluation sets a row has eval/NAME/accuracy and so on for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]
NAMED = re.compile(r"eval/([^/]+)/(.+)")


def merge_sets(results: Mapping[str, Row]) -> Row:
    """Return the results of the sets as one row; the set "" keeps its keys as they are.

    >>> merge_sets({"dev": {"accuracy": 0.5}, "test": {"accuracy": 0.25}})
    {'eval/dev/accuracy': 0.5, 'eval/test/accuracy': 0.25}
    """
    return {
        (f"eval/{name}/{key}" if name else key): value
        for name, result in results.items()
        for key, value in result.items()
    }


def split_sets(row: Row) -> dict[str, Row]:
    """Return a row as one row for each set, each with the step.

    >>> split_sets({"step": 3, "eval/dev/accuracy": 0.5, "eval/test/accuracy": 0.25})
    {'dev': {'step': 3, 'accuracy': 0.5}, 'test': {'step': 3, 'accuracy': 0.25}}
    """
    sets: dict[str, Row] = {}
    for key, value in row.items():
        match = NAMED.fullmatch(key)
        if match or key != "step":
            name, own_key = match.groups() if match else ("", key)
            sets.setdefault(name, {"step": row["step"]} if "step" in row else {})[own_key] = value
    return sets


def collect_accuracies(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of evaluation.jsonl with an accuracy, by set; the name is "" where the sets have none."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        for name, part in split_sets(row).items():
            if part.get("accuracy") is not None:
                sets.setdefault(name, []).append(part)
    return sets


def label_set(name: str, selecting: str) -> str:
    """Return the name of a set with its role: the set that selects is not to be reported."""
    return f"{name} (selects)" if name == selecting else f"{name} (reported)"
