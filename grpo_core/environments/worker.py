"""Ask the environments of many completions, which live in a process of their own (scoring/worker_process.py).

A step that raises, takes too long, ends the process or returns something else than a reply fails, and costs its own
completion alone. A process that ended, or that had to be ended because of a step that took too long, is replaced; the
other completions' objects are made again when they are needed, from their rows and earlier turns. Where several steps
ran as the process ended, they are repeated one at a time, so that the one that ends it again is known.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_core.config.environment_functions import build_environment
from grpo_core.environments.instances import Instances, Step
from grpo_core.environments.interface import Answered, Turn
from grpo_core.schema import ConfigError
from grpo_core.scoring.supervise import run_supervised
from grpo_core.scoring.worker_process import (
    POLL_SECONDS,
    SIZE,
    START_TIMEOUT,
    WorkerProcess,
    build_in_worker,
    read_arguments,
    send_message,
)

CANCEL_SECONDS = 1.0  # beyond its time limit in which an async step must have been cancelled
LISTEN_SECONDS = 0.05  # in which no message must come before a step is judged late
MAX_ENDS = 3  # times in a row that the process may end while no step runs


@dataclass(frozen=True)
class Outcome:
    """The answer to a turn, or why there is none."""

    key: int  # of the completion
    answered: Answered | None = None
    failure: str | None = None  # a verb phrase


@dataclass
class _Request:
    """A step that was asked for and has no answer."""

    key: int
    turns: list[Turn]  # all of the completion so far; none: its object is closed
    row: dict[str, Any]
    seed: int
    seconds: float = 0.0  # that it may take
    is_sent: bool = False
    deadline: float | None = None  # of a step that has started
    is_async: bool = False
    is_suspect: bool = False  # it ran when the process ended, and is repeated alone


class EnvironmentWorker(WorkerProcess):
    """The environments of completions: `ask` any number of times, and `take` the outcomes that have come."""

    module = "grpo_core.environments.worker"

    def __init__(self, name: str, args: dict[str, Any], timeout: float) -> None:
        """Start the process; one step of a completion may take `timeout` seconds.

        Raises:
            ConfigError: the process cannot load the environment, or is not ready in time.
        """
        self._requests: dict[int, _Request] = {}  # by number
        self._seen: dict[int, int] = {}  # completion -> turns that its object in the process has received
        self._outcomes: list[Outcome] = []  # that have not been taken
        self._number, self._ends, self._received = 0, 0, bytearray()
        super().__init__(name, args, timeout)
        self.close_failures: list[str] = []  # of the method close, each a verb phrase
        if not self.wait_until_ready():
            self.close()
            problem = str(self._problem)  # of a ConfigError it names the environment
            raise ConfigError(problem if problem.startswith("environment") else f"environment {name} {problem}")

    def ask(self, key: int, row: dict[str, Any], seed: int, turns: Sequence[Turn]) -> None:
        """Ask the environment of a completion for the answer to the last of its turns; `take` sends it."""
        self._add(_Request(key, list(turns), row, seed))

    def end(self, key: int) -> None:
        """Close the environment of a completion that has ended."""
        if key in self._seen:
            self._add(_Request(key, [], {}, 0))

    def take(self, seconds: float) -> list[Outcome]:
        """Return the outcomes that have come; with none, wait for the first at most `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            self._end_late_steps()
            self._send_requests()
            left = 0.0 if self._outcomes else max(0.0, deadline - time.monotonic())
            self._receive_messages(min([left, POLL_SECONDS, *self._list_times_left()]))
            if self._outcomes or time.monotonic() >= deadline:
                outcomes, self._outcomes = self._outcomes, []
                return outcomes

    def finish(self, seconds: float) -> None:
        """Wait at most `seconds` until the objects of completions that have ended are closed."""
        deadline = time.monotonic() + seconds
        while self._requests:
            left = deadline - time.monotonic()
            self.take(min(max(left, 0.0), POLL_SECONDS))
            if left <= 0:
                return

    def forget(self) -> None:
        """Give up all completions that have not ended, as after an interrupt."""
        if self._requests or self._seen:
            self._requests.clear()
            self._outcomes.clear()
            self.close()

    def close(self) -> None:
        """End the process and all processes that it started; the next request starts a new one."""
        if self._is_open:
            super().close()
        self._is_open = False
        self._received.clear()
        self._seen.clear()
        self._requests = {number: x for number, x in self._requests.items() if x.turns}
        for request in self._requests.values():
            request.is_sent, request.deadline, request.is_async = False, None, False

    def _start(self) -> None:
        super()._start()
        self._is_open = True

    def _add(self, request: _Request) -> None:
        self._number += 1
        self._requests[self._number] = request

    def _list_times_left(self) -> list[float]:
        now = time.monotonic()
        return [max(0.0, x.deadline - now) for x in self._requests.values() if x.deadline is not None]

    def _send_requests(self) -> None:
        """Send what may be sent, all of it at once: a write for each request would cost more than its step."""
        suspects = [number for number, x in self._requests.items() if x.is_suspect]
        numbers = [number for number in suspects[:1] or [*self._requests] if not self._requests[number].is_sent]
        contents = {number: content for number in numbers if (content := self._pickle(number)) is not None}
        if not contents:
            return
        if not self._is_open:
            self._start()
        self._problem, self._deadline = None, time.monotonic() + START_TIMEOUT
        self._send(*contents.values())
        if self._problem is not None:
            self._handle_end(self._problem)
            return
        for number in contents:
            request = self._requests[number]
            request.is_sent, self._seen[request.key] = True, len(request.turns)

    def _pickle(self, number: int) -> bytes | None:
        """Return the message of a request; None if its row cannot be pickled, with which it fails."""
        request = self._requests[number]
        seen = self._seen.get(request.key)
        turns = request.turns[seen or 0 :]
        request.seconds = self.timeout * max(1, len(turns))
        row = request.row if seen is None else None
        try:
            return pickle.dumps(Step(number, request.key, turns, row, request.seed, request.seconds))
        except Exception as error:
            self._fail([number], f"cannot be sent its row, which cannot be pickled: {error}")
            return None

    def _receive_messages(self, seconds: float) -> bool:
        """Read what has come, wait at most `seconds` for the first of it, and return whether there was any."""
        if not self._is_open:
            time.sleep(seconds)
            return False
        try:
            self._socket.settimeout(seconds)
            part = self._socket.recv(1 << 20)
        except (TimeoutError, BlockingIOError):
            if self._process.poll() is not None:  # a process that it has forked holds the socket open
                self._handle_end(self._describe(ConnectionError()))
            return False
        except OSError as error:
            self._handle_end(self._describe(error))
            return False
        if not part:
            self._handle_end(self._describe(ConnectionError()))
            return False
        self._received += part
        while len(self._received) >= SIZE.size:
            size = SIZE.size + SIZE.unpack(self._received[: SIZE.size])[0]
            if len(self._received) < size:
                break
            message = json.loads(self._received[SIZE.size : size])
            del self._received[:size]
            self._handle_message(message)
        return True

    def _handle_message(self, message: dict[str, Any]) -> None:
        if "number" not in message:  # of a start
            self._is_ready = "error" not in message
            if not self._is_ready:
                self._fail([*self._requests], message["error"])
            return
        if (request := self._requests.get(message["number"])) is None:
            return
        if "started" in message:
            request.is_async = message["started"] == "async"
            request.deadline = time.monotonic() + request.seconds + CANCEL_SECONDS * request.is_async
            return
        self._ends = 0
        if "error" in message:
            self._fail([message["number"]], message["error"])
            return
        del self._requests[message["number"]]
        if request.turns:
            texts = message["texts"]
            numbers = message["reward"], message["calls"], message["errors"]
            self._outcomes.append(Outcome(request.key, Answered(None if texts is None else tuple(texts), *numbers)))
        else:
            self._seen.pop(request.key, None)

    def _fail(self, numbers: Sequence[int], reason: str) -> None:
        """Give requests up, for a reason that is a verb phrase."""
        for number in numbers:
            request = self._requests.pop(number)
            if request.turns:
                self._outcomes.append(Outcome(request.key, failure=reason))
            else:
                self.close_failures.append(reason)

    def _end_late_steps(self) -> None:
        """Fail the steps that take too long, and end the process that runs them.

        Where the caller was busy, their answers may have come in time, and are read first.
        """
        if not self._list_late():
            return
        while self._receive_messages(LISTEN_SECONDS):
            pass
        late = self._list_late()
        if late and not self._is_ready:
            self._fail(late, "was not ready in time")
            self.close()
            return
        # of async steps one blocks the loop, but perhaps one that is not late yet
        if any(self._requests[number].is_async for number in late) and self._suspect_running():
            late = []
        elif not late:
            return
        for number in late:
            self._fail([number], f"took more than {self._requests[number].seconds:g} s")
        self.close()

    def _list_late(self) -> list[int]:
        """Return the requests whose time is over, all of them where the process has not become ready in time."""
        now = time.monotonic()
        if self._is_open and not self._is_ready:
            is_over = now >= self._started + max(START_TIMEOUT, self.timeout)
            return [*self._requests] if is_over else []
        return [number for number, x in self._requests.items() if x.deadline is not None and x.deadline <= now]

    def _handle_end(self, reason: str) -> None:
        """Deal with a process that has ended: `reason` is a verb phrase."""
        running = [number for number, x in self._requests.items() if x.deadline is not None]
        if len(running) == 1:
            self._fail(running, reason)
        elif not self._suspect_running():
            self._ends += 1
            if self._ends >= MAX_ENDS:
                self._fail([*self._requests], reason)
        self.close()

    def _suspect_running(self) -> bool:
        """Mark the steps that run, if there are several, to be repeated one at a time; return whether there are."""
        running = [x for x in self._requests.values() if x.deadline is not None]
        for request in running:
            request.is_suspect = len(running) > 1
        return len(running) > 1


def serve(connection: socket.socket, name: str, args: dict[str, Any]) -> None:
    """Answer requests until the other end of the connection is closed, at whatever moment that is."""
    with contextlib.suppress(ConnectionError, KeyboardInterrupt):
        make = build_in_worker(connection, lambda: build_environment(name, args))
        if make is None:
            return
        lock, stream = threading.Lock(), connection.makefile("rb")

        def send(message: dict[str, Any]) -> None:
            with lock, contextlib.suppress(ConnectionError):
                send_message(connection, message)

        instances = Instances(make, send)
        while head := stream.read(SIZE.size):
            instances.start(pickle.loads(stream.read(SIZE.unpack(head)[0])))


if __name__ == "__main__":
    to_rank, own_name, own_args = read_arguments()
    run_supervised(lambda: serve(to_rank, own_name, own_args), release=to_rank.close)
