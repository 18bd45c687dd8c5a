"""LoRA's patterns of ranks and scales: PEFT takes the first that matches a module, and its files sort them by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

PATTERNS = ("rank_pattern", "alpha_pattern")  # keys of the section `lora`, and of PEFT's configuration


def find_pattern(patterns: Iterable[str], name: str) -> str | None:
    """Return the pattern that PEFT takes for the module or weight `name`: the first that matches; None without one."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)


def read_values(patterns: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the value that the patterns give to each of `names`; None where none matches."""
    first = {name: find_pattern(patterns, name) for name in names}
    return {name: None if pattern is None else patterns[pattern] for name, pattern in first.items()}


def settle_order(patterns: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return patterns that give `names` the same values after a file of PEFT has sorted them.

    They are `patterns`, or a whole name for each module where several patterns match it and another one would be first.
    """
    values, ordered = read_values(patterns, names), dict(sorted(patterns.items()))
    if read_values(ordered, values) == values:
        return ordered
    return {f"^{re.escape(name)}": value for name, value in sorted(values.items()) if value is not None}
