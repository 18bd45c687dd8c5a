"""Run a user's reward in a process of its own, so that it may hang, exit or print without harm to the run.

The process is `python -m grpo_core.scoring.reward_worker`. It receives pickled batches over a socket and replies in
JSON; every message begins with its size in bytes. A process that takes too long is killed, and a new one is started.
Every start has START_TIMEOUT, apart from the time of a batch. All processes that a reward has started end with its own,
by a parent of its own (supervise.py). This module does not import torch, so that the process starts fast.
"""

from __future__ import annotations

import contextlib
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
from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError, describe_exit, first_line, summarize_error
from grpo_core.scoring.reward_call import RewardOutcome, attempt, failed_outcome
from grpo_core.scoring.supervise import interruptible, run_supervised

START_TIMEOUT = 120.0  # seconds for a start, in which the user's file is imported, unless reward_timeout is longer
END_TIMEOUT = 3.0  # seconds for a process to end those that it started
POLL_SECONDS = 0.2  # between checks whether the process is alive
STDERR = 2
SIZE = struct.Struct("<Q")  # of a message, in front of it


class RewardWorker:
    """A reward in a process of its own: `submit` a batch, then wait for its `result`."""

    def __init__(self, name: str, args: dict[str, Any], timeout: float) -> None:
        """Start the process of the reward `name` with arguments `args`; a batch may take `timeout` seconds.

        Raises:
            ConfigError: the process cannot build the reward, or is not ready in time.
        """
        self.name, self.args, self.timeout = name, args, timeout
        self._count, self._problem = 0, None
        self._start()
        if not self.wait_until_ready():
            self.close()
            raise ConfigError(f"reward {name} {self._problem}")

    def wait_until_ready(self) -> bool:
        """Wait until the process can take a batch, and start it again if it ended after it was ready.

        Returns whether it can. A start that has failed is not repeated here, but by `result`.
        """
        if self._start_problem is None and self._is_ready and self._has_ended():
            self.close()
            self._start()
        if self._start_problem is None and not self._is_ready:
            self._problem, self._deadline = None, self._started + max(START_TIMEOUT, self.timeout)
            message = self._receive()
            if message is not None and "error" in message:
                self._problem = message["error"]
            self._is_ready, self._start_problem = self._problem is None, self._problem
        self._problem = self._start_problem
        return self._is_ready

    def submit(self, completions: list[str], columns: dict[str, Any], group_size: int = 1) -> None:
        """Send a batch to the process; its time limit starts when the process is ready."""
        self._count, self._problem = len(completions), None
        try:
            request = pickle.dumps((completions, columns, group_size))
        except Exception as error:
            self._problem = f"cannot be sent its columns, which cannot be pickled: {first_line(error)}"
            return
        if self.wait_until_ready():
            self._deadline = time.monotonic() + self.timeout
            self._send(request)

    def result(self) -> RewardOutcome:
        """Return the outcome of the submitted batch; a failure on all completions if the process does not reply."""
        reply = self._receive() if self._problem is None else None
        if reply is not None:
            return RewardOutcome(**reply)
        self.close()
        self._start()  # without waiting: it has until the next batch to be ready
        return failed_outcome(self._count, self._problem)

    def close(self) -> None:
        """End the process and all processes that it started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.terminate()  # its supervisor kills the others
            self._process.wait(timeout=END_TIMEOUT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()

    def _start(self) -> None:
        self._socket, child_socket = socket.socketpair()
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        descriptor = child_socket.fileno()
        module = ["-m", "grpo_core.scoring.reward_worker"]
        self._process = subprocess.Popen(
            [sys.executable, *module, str(descriptor), self.name, json.dumps(self.args)],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=STDERR,  # what the reward prints
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        child_socket.close()
        self._is_ready, self._started = False, time.monotonic()
        self._start_problem: str | None = None  # why this start has failed

    def _has_ended(self) -> bool:
        """Return whether the process has ended or closed its connection. It must owe no reply.

        The connection tells it first: the supervisor ends later, after all that the reward started.
        """
        if self._process.poll() is not None:
            return True
        self._socket.settimeout(0)
        try:
            return self._socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _send(self, request: bytes) -> None:
        try:
            self._socket.settimeout(max(0.01, self._deadline - time.monotonic()))
            self._socket.sendall(SIZE.pack(len(request)) + request)
        except OSError as error:
            self._problem = self._describe(error)

    def _receive(self) -> dict[str, Any] | None:
        """Return the next message; None if there is none before the deadline, with the reason in `_problem`."""
        try:
            size = SIZE.unpack(self._read(SIZE.size))[0]
            return json.loads(self._read(size))
        except OSError as error:
            self._problem = self._describe(error)
            return None

    def _read(self, count: int) -> bytes:
        """Read exactly `count` bytes.

        The end of the process is polled for, because a process that it has forked may hold the socket open.
        """
        content = bytearray()
        while len(content) < count:
            left = self._deadline - time.monotonic()
            # at least 1 ms, so that a reply that arrived in time is read even after the deadline
            self._socket.settimeout(min(max(left, 0.001), POLL_SECONDS))
            try:
                part = self._socket.recv(count - len(content))
            except TimeoutError:
                if self._process.poll() is not None:
                    raise ConnectionError from None
                if left <= 0:
                    raise
                continue
            if not part:
                raise ConnectionError
            content += part
        return bytes(content)

    def _describe(self, error: OSError) -> str:
        """Return why the process did not reply, as a verb phrase."""
        if isinstance(error, TimeoutError):
            return f"took more than {self.timeout:g} s" if self._is_ready else "was not ready in time"
        try:
            return describe_exit(self._process.wait(timeout=END_TIMEOUT))
        except subprocess.TimeoutExpired:
            return "closed its connection"


def serve(connection: socket.socket, name: str, args: dict[str, Any]) -> None:
    """Reply to batches until the other end of the connection is closed, at whatever moment that is."""
    with contextlib.suppress(ConnectionError, KeyboardInterrupt):  # `attempt` catches those of the reward
        _serve(connection, name, args)


def _serve(connection: socket.socket, name: str, args: dict[str, Any]) -> None:

    def send(message: dict[str, Any]) -> None:
        content = json.dumps(message).encode()
        connection.sendall(SIZE.pack(len(content)) + content)

    own_pid, stream = os.getpid(), connection.makefile("rb")
    try:
        with interruptible():
            function = REWARDS.build(name, args)
            if prepare := get_fact(function, "prepare"):
                prepare()
    except ConfigError as error:
        send({"error": str(error)})
        return
    except KeyboardInterrupt as error:
        send({"error": f"was interrupted: {summarize_error(error)}"})
        return
    send({"ready": True})
    while head := stream.read(SIZE.size):
        completions, columns, group_size = pickle.loads(stream.read(SIZE.unpack(head)[0]))
        try:
            with interruptible():
                outcome = attempt(function, completions, columns, group_size)
        except KeyboardInterrupt as error:
            outcome = failed_outcome(len(completions), f"was interrupted: {summarize_error(error)}")
        if os.getpid() != own_pid:  # a fork that the reward has left running
            os._exit(0)
        send(asdict(outcome))


if __name__ == "__main__":
    to_rank = socket.socket(fileno=int(sys.argv[1]))
    run_supervised(lambda: serve(to_rank, sys.argv[2], json.loads(sys.argv[3])), release=to_rank.close)
