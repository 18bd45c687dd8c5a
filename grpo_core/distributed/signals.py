"""Signals: SIGTERM and SIGINT end a run after the current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grpo_core.distributed import ranks
from grpo_core.distributed.notices import count_signals, write_notice

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received = 0
_times: list[float] = []  # of the signals


class Interrupted(Exception):
    """The run was stopped by a signal. The exit code is 128 + the signal's number, as in shells.

    `is_saved` is False if the checkpoint of its state could not be written.
    """

    def __init__(self, number: int, *, is_saved: bool) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code, self.is_saved = 128 + number, is_saved


class RunFailed(Exception):
    """The run cannot continue, though no setting was wrong. The message is one sentence, and the exit code is 3."""


@contextmanager
def handle_signals() -> Iterator[None]:
    """Inside the block, record the first signal; a second one (see `count_signals`) ends the process at once."""
    global _received
    _received = 0
    _times.clear()
    previous = {number: signal.signal(number, _record) for number in SIGNALS}
    try:
        yield
    finally:
        _received = 0  # it has ended this run, and ends no other of this process
        for number, handler in previous.items():
            signal.signal(number, handler)


def received_signal() -> int:
    """Return the number of a signal that any rank has received, or 0; the same on all ranks. A collective."""
    return int(ranks.all_max(torch.tensor(float(_received), device="cpu")))


def _record(number: int, frame: object) -> None:
    global _received
    if count_signals(_times) > 1:
        os._exit(128 + number)
    if _received:
        return
    _received = number
    if ranks.is_main():
        name = signal.Signals(number).name
        write_notice(f"{name} received; the run stops before its next step, with a checkpoint; again: at once")
