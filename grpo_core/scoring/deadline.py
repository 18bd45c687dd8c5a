"""The time that a built-in reward with many small calls takes for a batch: within trainer.reward_timeout."""

from __future__ import annotations

import time
from typing import Any

from grpo_core.schema import ConfigError

SHARE = 0.8  # of reward_timeout that the calls of a batch may take


def compute_deadline(reward_timeout: float) -> float:
    """Return the time (of time.monotonic) by which the calls of a batch that begins now must have ended."""
    return time.monotonic() + SHARE * reward_timeout


def check_seconds(arguments: dict[str, Any]) -> None:
    """Check that the argument `seconds`, of one call, fits into `reward_timeout`, of a batch.

    Raises:
        ConfigError: it does not; the sentence is a verb phrase about the reward.
    """
    seconds, most = arguments["seconds"], SHARE * arguments["reward_timeout"]
    if seconds >= most:
        raise ConfigError(
            f"has the argument seconds {seconds:g}; it must be below {most:g}, {SHARE:g} of trainer.reward_timeout"
        )
