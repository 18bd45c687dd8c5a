"""Run a user's reward in a process of its own, which may hang, end or print without harm to the run.

`python -m grpo_core.scoring.reward_worker` is that process: it receives a batch over a socket and answers in JSON. A
process that takes too long is killed with all that it started, and another takes its place. This module imports no
torch, so that the process starts fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_core.objective.rewards import REWARDS
from grpo_core.schema import ConfigError
from grpo_core.scoring.reward_call import Outcome, attempt, failure

START = 120.0  # seconds for the first start; a user's file may import much
STDERR = 2
SIZE = struct.Struct("<Q")


class Worker:
    """The reward `name` with `args`; a batch may take `timeout` seconds. First `ask`, then `answer`."""

    def __init__(self, name: str, args: dict[str, Any], timeout: float) -> None:
        self.name, self.args, self.timeout = name, args, timeout
        self._count, self._deadline, self._problem = 0, 0.0, None
        self._start()
        self._deadline = time.monotonic() + max(START, timeout)
        if not self._wait_until_ready():
            self.close()
            raise ConfigError(f"reward {name} {self._problem}")

    def ask(self, completions: list[str], columns: dict[str, Any]) -> None:
        """Hand over a batch. The time runs from here."""
        self._count, self._deadline, self._problem = len(completions), time.monotonic() + self.timeout, None
        try:
            request = pickle.dumps((completions, columns))
        except Exception as error:
            self._problem = f"cannot be given its columns: {error}"
            return
        if self._process.poll() is not None:
            self._start()
        if self._is_ready or self._wait_until_ready():
            self._send(request)

    def answer(self) -> Outcome:
        """What came of it: the reward's values, or a failure on all completions."""
        reply = self._receive() if self._problem is None else None
        if reply is not None:
            return Outcome(**reply)
        self.close()
        self._start()  # it has until the next batch to be ready
        return failure(self._count, self._problem)

    def close(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "grpo_core.scoring.reward_worker",
                str(theirs.fileno()),
                self.name,
                json.dumps(self.args),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=STDERR,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        theirs.close()
        self._is_ready = False

    def _wait_until_ready(self) -> bool:
        message = self._receive()
        if message is not None and "error" in message:
            self._problem = message["error"]
        self._is_ready = self._problem is None
        return self._is_ready

    def _send(self, request: bytes) -> None:
        try:
            self._socket.settimeout(max(0.01, self._deadline - time.monotonic()))
            self._socket.sendall(SIZE.pack(len(request)) + request)
        except OSError as error:
            self._problem = self._how(error)

    def _receive(self) -> dict[str, Any] | None:
        """The next message before the deadline; None, and the problem noted, where there is none."""
        try:
            size = SIZE.unpack(self._read(SIZE.size))[0]
            return json.loads(self._read(size))
        except OSError as error:
            self._problem = self._how(error)
            return None

    def _read(self, count: int) -> bytes:
        """Exactly `count` bytes. It looks up now and then: what the process has forked may hold the socket open."""
        got = bytearray()
        while len(got) < count:
            left = self._deadline - time.monotonic()
            self._socket.settimeout(min(max(left, 0.001), 0.2))  # what has arrived in time may be read late
            try:
                part = self._socket.recv(count - len(got))
            except TimeoutError:
                if self._process.poll() is not None:
                    raise ConnectionError from None
                if left <= 0:
                    raise
                continue
            if not part:
                raise ConnectionError
            got += part
        return bytes(got)

    def _how(self, error: OSError) -> str:
        if isinstance(error, TimeoutError):
            return f"took more than {self.timeout:g} s" if self._is_ready else "was not ready in time"
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def serve(connection: socket.socket, name: str, args: dict[str, Any]) -> None:
    """Answer batches until the other side is gone."""

    def send(message: dict[str, Any]) -> None:
        content = json.dumps(message).encode()
        connection.sendall(SIZE.pack(len(content)) + content)

    me, stream = os.getpid(), connection.makefile("rb")
    try:
        function = REWARDS.build(name, args)
    except ConfigError as error:
        send({"error": str(error)})
        return
    send({"ready": True})
    while head := stream.read(SIZE.size):
        completions, columns = pickle.loads(stream.read(SIZE.unpack(head)[0]))
        outcome = attempt(function, completions, columns)
        if os.getpid() != me:  # a copy that the reward has forked and left running
            os._exit(0)
        send(asdict(outcome))


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its rank
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], json.loads(sys.argv[3]))
