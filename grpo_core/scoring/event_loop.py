"""Run coroutines on an event loop in a thread of its own, for async rewards.

The loop lives as long as its process, so that what a reward keeps between two calls, such as an HTTP client, stays
usable. It also works where the calling thread runs a loop already, as in a notebook.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any

# asyncio hands a plain TimeoutError to another thread without its traceback, which names the line
_TracedTimeoutError = type("TimeoutError", (TimeoutError,), {})


class EventLoop:
    """An asyncio event loop that runs in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="async rewards", daemon=True).start()

    def start(self, awaitable: Awaitable[Any]) -> Future[Any]:
        """Start `awaitable` and return the future of its result; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(_wait_for(awaitable), self._loop)

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Return the result of `awaitable`, which is cancelled where this thread is interrupted."""
        future = self.start(awaitable)
        try:
            return future.result()
        finally:
            future.cancel()

    def responds(self, seconds: float) -> bool:
        """Return whether the loop takes new work within `seconds`, which a coroutine that blocks it prevents."""
        try:
            self.start(asyncio.sleep(0)).result(seconds)
        except TimeoutError:
            return False
        return True

    def _run(self) -> None:
        while True:
            with contextlib.suppress(SystemExit, KeyboardInterrupt):  # either, raised in a coroutine, ends run_forever
                self._loop.run_forever()


class _SharedLoop:
    """The loop of a process, which is made when it is first asked for, by whichever thread."""

    def __init__(self) -> None:
        self._loop: EventLoop | None = None
        self._lock = threading.Lock()

    def get(self) -> EventLoop:
        with self._lock:  # two threads that ask at the same time get the same loop
            if self._loop is None:
                self._loop = EventLoop()
            return self._loop


_shared = _SharedLoop()


def shared_loop() -> EventLoop:
    """Return the loop of this process. After `forget_shared_loop` it is a new one."""
    return _shared.get()


def forget_shared_loop() -> None:
    """Make `shared_loop` return a new loop from now on; the old one keeps running."""
    global _shared
    _shared = _SharedLoop()


os.register_at_fork(after_in_child=forget_shared_loop)  # the thread stays in the parent


async def _wait_for(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except TimeoutError as error:
        raise _TracedTimeoutError(*error.args).with_traceback(error.__traceback__) from None
