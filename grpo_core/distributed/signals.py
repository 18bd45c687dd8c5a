"""A run that is asked to stop: SIGTERM and SIGINT end it with a checkpoint after the current step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grpo_core.distributed import ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received = 0


class Interrupted(Exception):
    """The run stopped because a signal asked for it. Exit code 128 + its number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class RunFailed(Exception):
    """The run cannot go on, and no setting of the user's was wrong. One sentence, exit code 3."""


@contextmanager
def handle_signals() -> Iterator[None]:
    """Inside, the first signal is noted, and a second one ends the process at once."""
    global _received
    _received = 0
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def received_signal() -> int:
    """The signal that any rank has received, 0 for none; the same on all ranks. A collective."""
    return int(ranks.all_max(torch.tensor(float(_received))))


def _note(number: int, frame: object) -> None:
    global _received
    if _received:
        os._exit(128 + number)
    _received = number
