"""A thread that ends this process when it has not moved for too long, and says which rank it is and where it stands.

When one rank hangs, the others wait for it in a collective. They are given half as long again, so the one that speaks
is the one that hangs. Python's own timer stands behind the thread, for code that never lets another thread run.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 4
_seconds = 0.0  # 0: off
_moved = 0.0
_phase = "start"
_waiting = False
_off = threading.Event()


def start(seconds: float, rank: int) -> None:
    """From here on this process may stand still for `seconds`; 0 turns the watchdog off."""
    global _seconds, _off
    _off.set()  # an earlier one's
    _seconds, _off = seconds, threading.Event()
    beat()
    if seconds:
        threading.Thread(target=_watch, args=(rank, seconds, _off), daemon=True).start()
    else:
        faulthandler.cancel_dump_traceback_later()


def stop() -> None:
    """From here on this process may stand still."""
    start(0, 0)


def beat(phase: str | None = None) -> None:
    """Something has been done, or `phase` begins."""
    global _moved, _phase
    _moved, _phase = time.monotonic(), phase or _phase
    if _seconds:
        faulthandler.dump_traceback_later(2 * _seconds, exit=True, file=sys.__stderr__)


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, this rank needs the others to move."""
    global _waiting
    _waiting = True
    try:
        yield
    finally:
        _waiting = False


def _watch(rank: int, seconds: float, off: threading.Event) -> None:
    while not off.wait(min(1.0, seconds / 10)):
        still = time.monotonic() - _moved
        if still > seconds * (1.5 if _waiting else 1.0):
            what = "has waited for the other ranks" if _waiting else "has not moved"
            print(f"grpo_core: rank {rank} {what} for {still:.0f} s in phase {_phase}; it stands at", file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__)
            sys.stderr.flush()
            os._exit(EXIT_CODE)
