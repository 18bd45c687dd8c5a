"""The environments of many completions in the process of the worker, which answer at the same time.

A step that is a plain function runs in a thread of its own, an async one on the event loop. A thread cannot be ended,
so the time of a plain step is limited from outside, by the end of the process; an async step is cancelled here.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from grpo_core.environments.interface import Environment, Turn, WrongReply, read_reply
from grpo_core.schema import summarize_error
from grpo_core.scoring.event_loop import shared_loop

MAX_THREADS = 256  # steps that are plain functions and run at the same time
Send = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Step:
    """A request to the environment of one completion: its next turns, of which the last is answered."""

    number: int  # of the request
    key: int  # of the completion
    turns: Sequence[Turn]  # those that the object in the process has not seen; none: close the object
    row: dict[str, Any] | None = None  # None: the process has the object
    seed: int = 0
    seconds: float = 0.0  # for all of it


class Instances:
    """The environments by the keys of their completions. `send` receives messages and may be called by any thread."""

    def __init__(self, make: Callable[..., Environment], send: Send) -> None:
        self.make, self.send = make, send
        self._objects: dict[int, Environment] = {}
        self._pool = _Threads(MAX_THREADS)
        self._pid = os.getpid()

    def start(self, step: Step) -> None:
        """Start a step; the messages that it has started, and its answer, are sent later."""
        self._pool.start(lambda: self._run(step))

    def _run(self, step: Step) -> None:
        """Run a step in a thread, or begin it on the event loop."""
        self.send({"number": step.number, "started": "thread"})
        try:
            if not step.turns:
                self._close(step)
                return
            if step.row is not None:
                self._objects[step.key] = self.make(step.row, step.seed)
            environment = self._objects[step.key]
            if inspect.iscoroutinefunction(environment.step):
                self.send({"number": step.number, "started": "async"})
                shared_loop().start(self._run_async(step, environment))
            else:
                for turn in step.turns:
                    value = environment.step(turn)
                    if inspect.isawaitable(value):  # of an async function inside a decorator
                        value = shared_loop().run(value)
                self._answer(step, value)
        except BaseException as error:  # also SystemExit and KeyboardInterrupt, which would end the thread alone
            self._fail(step, _describe(error))

    async def _run_async(self, step: Step, environment: Environment) -> None:
        try:
            async with asyncio.timeout(step.seconds) as limit:
                for turn in step.turns:
                    value = await environment.step(turn)
            self._answer(step, value)
        except BaseException as error:
            self._fail(step, f"took more than {step.seconds:g} s" if limit.expired() else _describe(error))

    def _answer(self, step: Step, value: Any) -> None:
        self._end_forks()
        self.send({"number": step.number, **asdict(read_reply(value))})

    def _fail(self, step: Step, reason: str) -> None:
        self._end_forks()
        self.send({"number": step.number, "error": reason})

    def _close(self, step: Step) -> None:
        environment = self._objects.pop(step.key, None)
        if environment is not None and hasattr(environment, "close"):
            value = environment.close()
            if inspect.isawaitable(value):
                future = shared_loop().start(value)
                try:
                    future.result(step.seconds)
                except TimeoutError:
                    if future.done():  # its own
                        raise
                    future.cancel()
                    self._fail(step, f"took more than {step.seconds:g} s")
                    return
        self._end_forks()
        self.send({"number": step.number})

    def _end_forks(self) -> None:
        if os.getpid() != self._pid:  # a fork that the step has left running
            os._exit(0)


class _Threads:
    """Daemon threads that run functions, as many as there are functions at the same time, `most` at most."""

    def __init__(self, most: int) -> None:
        self.most, self._count, self._idle = most, 0, 0
        self._functions: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def start(self, function: Callable[[], object]) -> None:
        """Run a function as soon as a thread is free."""
        with self._lock:
            is_new = self._idle == 0 and self._count < self.most
            self._count += is_new
            self._idle -= not is_new
        self._functions.put(function)
        if is_new:
            threading.Thread(target=self._work, name="environment", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._functions.get()()
            with self._lock:
                self._idle += 1


def _describe(error: BaseException) -> str:
    """Return why a step failed, as a verb phrase."""
    return str(error) if isinstance(error, WrongReply) else f"raised {summarize_error(error)}"
