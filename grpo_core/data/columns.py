"""Rename the columns of the data; an old name may be a path into a nested value, as in reward_model.truth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_core.data.rows_on_disk import Row
from grpo_core.schema import ConfigError, list_known

MISSING = object()  # a place that a row does not have; None is a value
SHAREGPT = ("from", "value")  # the keys of its messages
INDEX = re.compile(r"-?\d+")


def is_conversation(value: Any) -> bool:
    """Return whether a column's value is a list of messages with roles."""
    is_list = isinstance(value, (list, tuple)) and bool(value)
    return is_list and all(isinstance(message, Mapping) and "role" in message for message in value)


def has_messages(value: Any) -> bool:
    """Return whether a column's value is meant as a conversation: a list in which at least one item has a role."""
    is_list = isinstance(value, (list, tuple))
    return is_list and any(isinstance(message, Mapping) and "role" in message for message in value)


def describe_other_keys(value: Any) -> str | None:
    """Return what a list has whose items are messages with other keys, and what to do; None for other values."""
    if not (isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping)):
        return None
    names = ", ".join(map(str, value[0]))
    if set(SHAREGPT) <= set(value[0]):
        remedy = "write from as role (human is user, gpt is assistant) and value as content"
    else:
        remedy = "rename the keys in the data"
    return f"is a list with the keys {names}; messages have role and content, so {remedy}"


def check_names(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Check that the data has the columns and places that `columns`, data.columns, names.

    Raises:
        ConfigError: a column or place is in no row, or a new name is that of another column of the data.
    """
    for new_name, path in columns.items():
        if path not in rows[0] and all(read_path(row, path) is MISSING for row in rows):
            raise ConfigError(f"data.columns.{new_name} is {path!r}; {_describe_places(rows[0], path)}")
        if new_name in rows[0] and new_name not in columns.values():
            raise ConfigError(f"data.columns.{new_name} is {path!r}, but the data already has a column {new_name!r}")


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """Return a row with the names of `columns`, {new name: column or path}.

    A column loses its own name and gets its new names, one or several. A path adds a column, which is None if the row
    has nothing at the path.
    """
    new_names: dict[str, list[str]] = {}
    for new_name, path in columns.items():
        new_names.setdefault(path, []).append(new_name)
    renamed = {new_name: value for name, value in row.items() for new_name in new_names.get(name, [name])}
    for new_name, path in columns.items():
        if path not in row:
            value = read_path(row, path)
            renamed[new_name] = None if value is MISSING else value
    return renamed


def read_path(row: Row, path: str) -> Any:
    """Return the value at a path of keys and indices, such as prompt.0.content, or MISSING.

    A column whose name equals the path takes precedence.
    """
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        value = _step_into(value, part)
    return value


def _step_into(value: Any, part: str) -> Any:
    """Return what a mapping has at a key, or a list at an index; MISSING where there is none."""
    if isinstance(value, Mapping):
        return value.get(part, MISSING)
    is_index = isinstance(value, (list, tuple)) and INDEX.fullmatch(part) and -len(value) <= int(part) < len(value)
    return value[int(part)] if is_index else MISSING


def _describe_places(row: Row, path: str) -> str:
    """Return what a row has where a path leaves it."""
    parts, value, depth = path.split("."), row, 0
    while depth < len(parts) and (inner := _step_into(value, parts[depth])) is not MISSING:
        value, depth = inner, depth + 1
    place = f"in row 1, {'.'.join(parts[:depth])} " if depth else ""
    if isinstance(value, Mapping):
        return f"{place}has the keys {', '.join(value)}" if place else list_known(parts[depth], value)
    if isinstance(value, (list, tuple)):
        return f"{place}is a list of {len(value)}, whose indices begin with 0"
    return f"{place}is {str(value)[:40]!r}, which has nothing inside"
