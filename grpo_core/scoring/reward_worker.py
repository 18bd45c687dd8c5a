"""Run a user's reward in a process of its own (worker_process.py), which receives batches and replies with outcomes.

A process that takes too long is killed, and a new one is started. This module does not import torch, so that the
process starts fast.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from grpo_core.objective.rewards import REWARDS
from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError, first_line, summarize_error
from grpo_core.scoring.reward_call import RewardOutcome, attempt, failed_outcome
from grpo_core.scoring.supervise import interruptible, run_supervised
from grpo_core.scoring.worker_process import SIZE, WorkerProcess, build_in_worker, read_arguments, send_message


class RewardWorker(WorkerProcess):
    """A reward in a process of its own: `submit` a batch, then wait for its `result`."""

    module = "grpo_core.scoring.reward_worker"

    def __init__(self, name: str, args: dict[str, Any], timeout: float) -> None:
        """Start the process of the reward `name` with arguments `args`; a batch may take `timeout` seconds.

        Raises:
            ConfigError: the process cannot build the reward, or is not ready in time.
        """
        super().__init__(name, args, timeout)
        self._count = 0
        if not self.wait_until_ready():
            self.close()
            raise ConfigError(f"reward {name} {self._problem}")

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


def serve(connection: socket.socket, name: str, args: dict[str, Any]) -> None:
    """Reply to batches until the other end of the connection is closed, at whatever moment that is."""
    with contextlib.suppress(ConnectionError, KeyboardInterrupt):  # `attempt` catches those of the reward
        _serve(connection, name, args)


def _serve(connection: socket.socket, name: str, args: dict[str, Any]) -> None:
    def build() -> Callable:
        function = REWARDS.build(name, args)
        if prepare := get_fact(function, "prepare"):
            prepare()
        return function

    own_pid, stream = os.getpid(), connection.makefile("rb")
    function = build_in_worker(connection, build)
    if function is None:
        return
    while head := stream.read(SIZE.size):
        completions, columns, group_size = pickle.loads(stream.read(SIZE.unpack(head)[0]))
        try:
            with interruptible():
                outcome = attempt(function, completions, columns, group_size)
        except KeyboardInterrupt as error:
            outcome = failed_outcome(len(completions), f"was interrupted: {summarize_error(error)}")
        if os.getpid() != own_pid:  # a fork that the reward has left running
            os._exit(0)
        send_message(connection, asdict(outcome))


if __name__ == "__main__":
    to_rank, own_name, own_args = read_arguments()
    run_supervised(lambda: serve(to_rank, own_name, own_args), release=to_rank.close)
