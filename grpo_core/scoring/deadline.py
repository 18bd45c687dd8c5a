"""The time that a built-in reward with many small calls takes for a batch: within trainer.reward_timeout."""

from __future__ import annotations

import time
from typing import Any

SHARE = 0.8  # of reward_timeout that the calls of a batch may take


def compute_deadline(reward_timeout: float) -> float:
    """Return the time (of time.monotonic) by which the calls of a batch that begins now must have ended."""
    return time.monotonic() + SHARE * reward_timeout


def check_seconds(arguments: dict[str, Any]) -> str | None:
    """Return why the argument `seconds`, of one call, does not fit into `reward_timeout`, of a batch, or None."""
    seconds, most = arguments["seconds"], SHARE * arguments["reward_timeout"]
    return None if seconds < most else f"seconds is {seconds:g}; it must be below {most:g}, {SHARE:g} of reward_timeout"
