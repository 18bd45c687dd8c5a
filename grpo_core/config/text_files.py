"""Read the text of a user's file, and say in one sentence where it is wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from grpo_core.schema import ConfigError, first_line


def read_text(path: Path) -> str:
    """Return the text of a file, without a byte order mark.

    Raises:
        ConfigError: the file cannot be read, or is not UTF-8 text.
    """
    return io.StringIO(decode_text(read_bytes(path), str(path)), newline=None).read()  # every line end is \n


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def decode_text(data: bytes, source: str) -> str:
    """Return UTF-8 text without a byte order mark; `source` begins the message of an error.

    Raises:
        ConfigError: the bytes are not UTF-8 text.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None


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
