"""The watchdog: a thread that ends this process when it makes no progress for too long.

It prints the rank, the phase and the stacks of all threads. When one rank hangs, the others wait for it in a
collective. A waiting rank is given half as much time again, so that the rank that hangs is the one that reports.
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
WAITING_FACTOR = 1.5  # the limit of a rank that waits for the others, in units of its own
_last_progress = 0.0  # time.monotonic()
_phase = "start"
_waiting = False
_stop = threading.Event()


def start(seconds: float, rank: int) -> None:
    """End this process if it makes no progress for `seconds`; 0 turns the watchdog off."""
    global _stop
    _stop.set()  # ends the thread of an earlier call
    _stop = threading.Event()
    beat()
    if seconds:
        threading.Thread(target=_watch, args=(rank, seconds, _stop), daemon=True).start()


def stop() -> None:
    """Turn the watchdog off."""
    start(0, 0)


def beat(phase: str | None = None) -> None:
    """Record progress, and the name of the phase that begins, if any."""
    global _last_progress, _phase
    _last_progress, _phase = time.monotonic(), phase or _phase


@contextmanager
def waiting() -> Iterator[None]:
    """Mark that this rank waits for the other ranks inside the block."""
    global _waiting
    _waiting = True
    try:
        yield
    finally:
        _waiting = False


def _watch(rank: int, seconds: float, stop: threading.Event) -> None:
    while not stop.wait(min(1.0, seconds / 10)):
        idle = time.monotonic() - _last_progress
        if idle > seconds * (WAITING_FACTOR if _waiting else 1.0):
            state = "has waited for the other ranks" if _waiting else "has made no progress"
            print(f"grpo_core: rank {rank} {state} for {idle:.0f} s in phase {_phase}; its threads:", file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__)
            sys.stderr.flush()
            os._exit(EXIT_CODE)
