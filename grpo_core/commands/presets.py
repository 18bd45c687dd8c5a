"""The `presets` command: list the published objectives that `preset: NAME` sets."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from grpo_core.commands.list_entry import INDENT
from grpo_core.config.files import to_inline_yaml
from grpo_core.config.presets import PRESETS


def run_presets() -> int:
    """Print every preset."""
    print(list_presets())
    return 0


def list_presets() -> str:
    """Return every preset with its source and its keys, written as overrides that a shell accepts."""
    lines = ["preset (the keys that differ from grpo, on policy and without a reference)"]
    for name, (source, keys) in PRESETS.items():
        lines += [f"  {name:<22} {source}", f"{INDENT} {' '.join(_to_overrides(keys))}"]
    return "\n".join(lines)


def _to_overrides(keys: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield nested keys as `section.key=value`. Arguments of a function stay one mapping."""
    for key, value in keys.items():
        if isinstance(value, dict) and key != "args":
            yield from _to_overrides(value, f"{prefix}{key}.")
        elif value != {}:
            yield f"{prefix}{key}={shlex.quote(to_inline_yaml(value))}"
