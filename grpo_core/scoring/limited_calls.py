"""Call a function in a forked child, so that a call that takes too long or too much memory costs only itself.

The limits also hold inside a library's C code, such as a power of large integers, which no signal interrupts.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

MEMORY_BYTES = 2**30  # that the child may take beyond what this process has


class LimitedCalls:
    """Calls of one function, in a child that stays for the next call and is replaced when it breaks a limit."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self._child: Any = None

    def call(self, *arguments: Any, seconds: float) -> Any:
        """Return what the function returns for `arguments`; None if it raises, exits, or takes more than `seconds`."""
        if self._child is None:
            self._start()
        try:
            self._connection.send(arguments)
            if self._connection.poll(seconds):
                return self._connection.recv()
        except (EOFError, OSError):  # the child has ended
            pass
        self.close()
        return None

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._connection.close()
            self._child = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # it has what this process has imported
        self._connection, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(self.function, theirs, self._connection), daemon=True)
        self._child.start()
        theirs.close()


def _serve(function: Callable, connection: Connection, parents: Connection) -> None:
    """Answer calls until the parent closes its end of the connection."""
    parents.close()  # the fork's copy, which would keep the connection open
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory()
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            result = function(*arguments)
        except Exception:  # also RecursionError and MemoryError
            result = None
        connection.send(result)


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
    except OSError:  # not Linux
        return
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
