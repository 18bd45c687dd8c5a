"""Read the text of a user's file, and say in one sentence where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo_core.schema import ConfigError, first_line


def read_text(path: Path) -> str:
    """Return the text of a file, without a byte order mark.

    Raises:
        ConfigError: the file cannot be read, or is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def parse_json(text: str, source: str) -> Any:
    """Parse JSON; `source` begins the message of an error.

    Raises:
        ConfigError: the text is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ConfigError(f"{source} is not JSON: {error.msg} ({place}column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, brackets nested too deep
        raise ConfigError(f"{source} is not JSON that can be read: {first_line(error)}") from None


def describe_place(text: str, index: int) -> str:
    """Return the line and the column of a character, which count from 1."""
    line_start = text.rfind("\n", 0, index) + 1
    return f"line {text.count(chr(10), 0, index) + 1}, column {index - line_start + 1}"
