"""Run a function in a child process whose descendants end with it, also those that leave its process group.

It uses prctl(2) of Linux; elsewhere only the process group is ended, by whoever started this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MAX_SECONDS = 2.0  # for all descendants to end


def run_supervised(work: Callable[[], None], release: Callable[[], None]) -> None:
    """Fork; the child calls `work` and returns, this process ends as the child does, after all its descendants.

    This process also ends, with all descendants, on SIGTERM and when its own parent ends. It calls `release` first, to
    give up what only the child uses. Both ignore SIGINT, which is for the run and not for them (`interruptible`).
    """
    signal.signal(signal.SIGINT, _ignore)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # descendants whose parent ends become children of this process
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    child = os.fork()
    if child == 0:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        work()
        return
    release()

    def end(number: int, frame: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # -n: ended by signal n
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_children()
    if code >= 0:
        os._exit(code)
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the child has written its own core dump
    os.kill(os.getpid(), -code)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt inside, as Python does: a user's code may interrupt itself at a time limit.

    A handler of its own stays.
    """
    if signal.getsignal(signal.SIGINT) is not _ignore:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _ignore)


def _ignore(number: int, frame: Any) -> None:
    """Do nothing. Unlike SIG_IGN, a handler is not inherited by the programs that a user's code starts."""


def _end_children() -> None:
    """Kill and reap all children of this process, and those that become its children, until there are none."""
    deadline = time.monotonic() + MAX_SECONDS
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        for pid in _list_children():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def _list_children() -> list[int]:
    """Return the ids of the children of this process, those that ended but were not reaped included."""
    if sys.platform != "linux":
        return []
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = path.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        if int(parent) == os.getpid():
            children.append(int(path.parent.name))
    return children


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
