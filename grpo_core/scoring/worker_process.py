"""A user's code in a process of its own, so that it may hang, exit or print without harm to the run.

The process is `python -m MODULE`, which receives pickled messages over a socket and replies in JSON; every message
begins with its size in bytes. Every start has START_TIMEOUT, apart from the time of a call. All processes that it has
started end with its own, by a parent of its own (supervise.py). This module does not import torch, so that the process
starts fast.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_core.schema import ConfigError, describe_exit, summarize_error
from grpo_core.scoring.supervise import interruptible

START_TIMEOUT = 120.0  # seconds for a start, in which the user's file is imported, unless the time limit is longer
END_TIMEOUT = 3.0  # seconds for a process to end those that it started
POLL_SECONDS = 0.2  # between checks whether the process is alive
STDERR = 2
SIZE = struct.Struct("<Q")  # of a message, in front of it


class WorkerProcess:
    """A process that runs what `name` names with the arguments `args`; a call may take `timeout` seconds."""

    module: str  # that the process runs; it gets what `read_arguments` returns

    def __init__(self, name: str, args: dict[str, Any], timeout: float) -> None:
        """Start the process, without waiting until it is ready."""
        self.name, self.args, self.timeout = name, args, timeout
        self._problem: str | None = None  # why there was no reply, as a verb phrase
        self._start()

    def wait_until_ready(self) -> bool:
        """Wait until the process can take a call, and start it again if it ended after it was ready.

        Returns whether it can. A start that has failed is not repeated here.
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
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, str(descriptor), self.name, pickle.dumps(self.args).hex()],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=STDERR,  # what the user's code prints
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        child_socket.close()
        self._is_ready, self._started = False, time.monotonic()
        self._start_problem: str | None = None  # why this start has failed

    def _has_ended(self) -> bool:
        """Return whether the process has ended or closed its connection. It must owe no reply.

        The connection tells it first: the supervisor ends later, after all that the user's code started.
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

    def _send(self, *requests: bytes) -> None:
        content = b"".join(SIZE.pack(len(request)) + request for request in requests)
        try:
            self._socket.settimeout(max(0.01, self._deadline - time.monotonic()))
            self._socket.sendall(content)
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


def send_message(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a message to the process that started this one."""
    content = json.dumps(message).encode()
    connection.sendall(SIZE.pack(len(content)) + content)


def read_arguments() -> tuple[socket.socket, str, dict[str, Any]]:
    """Return the connection, the name and the arguments that the process was started with."""
    return socket.socket(fileno=int(sys.argv[1])), sys.argv[2], pickle.loads(bytes.fromhex(sys.argv[3]))


def build_in_worker(connection: socket.socket, build: Callable[[], Any]) -> Any:
    """Return what `build` returns, and reply that the process is ready; reply why not and return None if it fails."""
    try:
        with interruptible():
            value = build()
    except ConfigError as error:
        send_message(connection, {"error": str(error)})
        return None
    except KeyboardInterrupt as error:
        send_message(connection, {"error": f"was interrupted: {summarize_error(error)}"})
        return None
    send_message(connection, {"ready": True})
    return value
