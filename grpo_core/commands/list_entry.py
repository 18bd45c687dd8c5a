"""The entry of one registered function in the lists that `losses` and `rewards` print."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

from grpo_core.config.files import to_inline_yaml
from grpo_core.config.formula import get_formula
from grpo_core.registry import get_fact
from grpo_core.schema import keyword_arguments

INDENT = " " * 24  # of every line below an entry's first one


def format_entry(name: str, function: Callable) -> str:
    """Return the name and formula of a function; below them its arguments with defaults, and its sources."""
    lines = [f"  {name:<22} {get_formula(function)}"]
    if parameters := keyword_arguments(function):
        required = get_fact(function, "required", ())
        values = {
            key: "(must be set)" if key in required else to_inline_yaml(p.default) for key, p in parameters.items()
        }
        lines.append(f"{INDENT} args: {', '.join(f'{key} = {value}' for key, value in values.items())}")
    if sources := find_sources(function):
        lines.append(f"{INDENT} {', '.join(sources)}")
    return "\n".join(lines)


def find_sources(function: Callable) -> list[str]:
    """Return the arXiv numbers and the web addresses in a function's docstring."""
    return re.findall(r"arXiv:\d{4}\.\d{5}|https?://\S+[^\s.,;)]", inspect.getdoc(function) or "")
