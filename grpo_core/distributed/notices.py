"""Write a line from a signal handler, and answer a Ctrl-C that comes before a run has its own handler."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def write_notice(text: str) -> None:
    """Write a line to stderr; unlike print, it is safe in a signal handler."""
    start = "\n" if os.isatty(2) else ""  # a terminal has written ^C
    with suppress(OSError):
        os.write(2, f"{start}grpo_core: {text}\n".encode())


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
