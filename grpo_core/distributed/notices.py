"""Handlers of signals: write a line, count signals, and answer a Ctrl-C that comes before a run has its own handler."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

REPEAT_SECONDS = 0.2  # in which a further signal is the same one


def write_notice(text: str) -> None:
    """Write a line to stderr; unlike print, it is safe in a signal handler."""
    start = "\n" if os.isatty(2) else ""  # a terminal has written ^C
    with suppress(OSError):
        os.write(2, f"{start}grpo_core: {text}\n".encode())


def count_signals(times: list[float]) -> int:
    """Add the time of a signal to those of earlier ones, and return how many different signals there were.

    A signal often comes twice, since `timeout` and schedulers send it to a process and to the process's group. So one
    that comes within REPEAT_SECONDS of another is the same. A handler may interrupt itself, which does not change the
    count: the time is added first.
    """
    times.append(time.monotonic())
    return 1 + sum(later - earlier > REPEAT_SECONDS for earlier, later in pairwise(sorted(times)))


@contextmanager
def answer_early_interrupt() -> Iterator[None]:
    """Inside the block, let Ctrl-C print a line and end the process at once, until a run installs its own handler.

    Before that a process imports modules and reads files, and has written nothing.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # ignored by a job in a shell's background
        yield
        return
    previous = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _end(number: int, frame: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        write_notice("SIGINT received before the run has started; it ends at once, and nothing was written")
    os._exit(128 + number)
