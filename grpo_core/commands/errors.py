"""Error messages of the commands."""

from __future__ import annotations

import os
import sys

from grpo_core.schema import printable


def print_error(message: str) -> None:
    """Print a message to stderr, from one process per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(printable(f"grpo_core: {message}"), file=sys.stderr)
