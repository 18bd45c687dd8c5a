"""The `launch` command: start `train` in several processes of this machine and wait for them.

If a rank fails, the launcher ends the others, which would otherwise wait for it in a collective. It passes SIGTERM and
SIGINT on, after which the ranks write a checkpoint and stop; a second signal kills them.

On Linux without a GPU the launcher imports the training code and forks the ranks, which saves every rank the imports.
Elsewhere a rank is a new process.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from grpo_core.commands.errors import print_error
from grpo_core.commands.forked_rank import STOP_SIGNALS, ForkedRank, can_fork, prepare_ranks
from grpo_core.commands.read_ahead import ReadAhead
from grpo_core.commands.train import announce
from grpo_core.config.checks import prompts_per_rank
from grpo_core.config.files import load_job
from grpo_core.counts import quantify
from grpo_core.data.forms import recognise
from grpo_core.distributed.notices import count_signals, write_notice
from grpo_core.distributed.ranks import LOST_RANK_CODE, NO_PORT, RUN_FOLDER_VARIABLE, STORE_VARIABLE, read_count
from grpo_core.schema import ConfigError, describe_exit

PROGRAM = ("-m", "grpo_core")
GRACE_SECONDS = 5.0  # from the first failure until the other ranks are killed: time to print their errors
NO_RESTART_CODES = (0, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # success, a user's mistake, a signal
EXPLAINED_CODES = (*NO_RESTART_CODES, 3)  # the rank has printed why it ended, or after a signal where it stopped
MAX_PROCESSES_PER_CORE = 8  # without GPUs; each takes about half a gigabyte of memory


def run_launch(processes: int, config: Path | None, overrides: Sequence[str]) -> int:
    """Check the configuration, train in `processes` processes, and return 0 or the code of the first rank that failed.

    With trainer.max_restarts a failed run is restarted from its last checkpoint. NNODES, NODE_RANK, MASTER_ADDR and
    MASTER_PORT in the environment make this machine one node of several.

    Raises:
        ConfigError: the configuration is wrong, or cannot be run by this number of processes.
    """
    ahead = ReadAhead(config, overrides) if can_fork() else None
    loaded = ahead.config() if ahead else load_job(config, overrides, recognise=recognise)
    nodes, _ = read_nodes()
    prompts_per_rank(loaded, processes * nodes)
    check_processes(processes)
    announce(loaded)
    if ahead:
        prepare_ranks(loaded, ahead)
    scratch = Path(tempfile.mkdtemp())  # no TemporaryDirectory: a forked rank would remove it when it ends
    try:
        note = scratch / "folder"  # rank 0 writes the path of the run folder here
        for restarts_left in range(loaded.trainer.max_restarts, -1, -1):
            code = _Ranks(processes, config, overrides, note).wait()
            if code in NO_RESTART_CODES or restarts_left == 0:
                if code not in EXPLAINED_CODES:
                    _advise_resume(note)
                return code
            if note.exists():
                others = [word for word in overrides if not word.startswith(("resume=", "overwrite="))]
                overrides = [*others, "overwrite=false", f"resume={note.read_text()}"]
            print_error(f"restarting from the last checkpoint; restarts left: {restarts_left}")
    finally:
        shutil.rmtree(scratch)
    raise AssertionError


def _advise_resume(note: Path) -> None:
    """Print from where a run that was ended from outside continues, if it has written a checkpoint."""
    from grpo_core.training.checkpoint import describe_resume, list_checkpoints  # imports the training code: slow

    folder = Path(note.read_text(encoding="utf-8")) if note.exists() else None
    if folder and list_checkpoints(folder / "checkpoints"):
        print_error(describe_resume(folder))


def check_processes(processes: int) -> None:
    """Refuse more processes than this machine can run.

    Raises:
        ConfigError: there are more processes than GPUs, or without GPUs more than MAX_PROCESSES_PER_CORE on each core.
    """
    if gpus := torch.cuda.device_count():
        limit, reason = gpus, "one for each GPU"
    else:
        cores = os.cpu_count() or 1
        limit, reason = (
            MAX_PROCESSES_PER_CORE * cores,
            f"{MAX_PROCESSES_PER_CORE} for each of {quantify(cores, 'core')}",
        )
    if processes > limit:
        raise ConfigError(
            f"{quantify(processes, 'process', 'processes')} were asked for on this machine; at most {limit:,} are "
            f"possible, {reason}"
        )


def read_nodes() -> tuple[int, int]:
    """Return NNODES and NODE_RANK of the environment: the number of machines, and the number of this one.

    Raises:
        ConfigError: one of them is not a whole number in its range.
    """
    nodes, node = read_count("NNODES", default=1, minimum=1), read_count("NODE_RANK", default=0, minimum=0)
    if node >= nodes:
        raise ConfigError(f"NODE_RANK is {node} in the environment; it must be below NNODES, which is {nodes}")
    return nodes, node


def find_cause(failures: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the first (rank, exit code) that is not a consequence of another rank's end, if there is one."""
    return next((failure for failure in failures if failure[1] != LOST_RANK_CODE), failures[0])


def describe_failure(code: int) -> str:
    """Return as a verb phrase how a rank failed; `code` is its exit code, or -n for signal n."""
    if code == LOST_RANK_CODE:
        return "lost its connection to another rank"
    return f"failed with exit code {code}" if code > 0 else describe_exit(code)


class _Ranks:
    """The processes of one start, one per rank of this machine."""

    def __init__(self, processes: int, config: Path | None, overrides: Sequence[str], note: Path) -> None:
        nodes, node = read_nodes()
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
        if nodes == 1:
            address, port = "127.0.0.1", NO_PORT
        shared = {"WORLD_SIZE": processes * nodes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": address}
        store = Path(tempfile.mkdtemp(dir=note.parent)) / "store"  # of this start
        shared |= {"MASTER_PORT": port, RUN_FOLDER_VARIABLE: note, STORE_VARIABLE: store}
        threads = max(1, (os.cpu_count() or 1) // (2 * processes))
        self.ended: queue.Queue[tuple[int, int]] = queue.Queue()  # (rank, exit code)
        self.ranks: dict[int, subprocess.Popen | ForkedRank] = {}
        self.signal_times: list[float] = []
        self.is_passed_on = False  # the first signal
        fork = can_fork()
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)
        for local_rank in range(processes):
            rank = node * processes + local_rank
            own = {**shared, "RANK": rank, "LOCAL_RANK": local_rank}
            environment = {
                "OMP_NUM_THREADS": str(threads),
                **os.environ,
                **{key: str(value) for key, value in own.items()},
            }
            if fork:
                self.ranks[rank] = ForkedRank(config, overrides, environment)
            else:
                file = ["--config", str(config)] if config else []
                command = [sys.executable, *PROGRAM, "train", *file, *overrides]
                # in a session of its own, so that Ctrl-C reaches the launcher only
                self.ranks[rank] = subprocess.Popen(command, env=environment, start_new_session=True)
        self.threads = [threading.Thread(target=self._wait_for, args=(rank,), daemon=True) for rank in self.ranks]
        for thread in self.threads:  # after the last fork, which must not happen beside another thread
            thread.start()

    def wait(self) -> int:
        """Wait until all ranks have ended. Return 0 or the exit code of the first that failed; 128 + n for signal n."""
        failures: list[tuple[int, int]] = []  # (rank, exit code), in the order in which they ended
        deadline, running = None, set(self.ranks)
        while running:
            try:
                rank, code = self.ended.get(timeout=0.2)
            except queue.Empty:
                if deadline is not None and time.monotonic() > deadline:
                    self._send(signal.SIGKILL)
                continue
            running.remove(rank)
            if code != 0 and (deadline is None or time.monotonic() < deadline):
                failures.append((rank, code))
                deadline = deadline or time.monotonic() + GRACE_SECONDS
        for thread in self.threads:
            thread.join()
        if not failures:
            return 0
        rank, code = find_cause(failures)
        if code not in EXPLAINED_CODES:
            print_error(f"rank {rank} {describe_failure(code)}")
        return code if code > 0 else 128 - code

    def _wait_for(self, rank: int) -> None:
        self.ended.put((rank, self.ranks[rank].wait()))

    def _pass_on(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if count_signals(self.signal_times) > 1:
            write_notice(f"{name} received again; the processes are ended at once")
            self._send(signal.SIGKILL)
        elif not self.is_passed_on:
            self.is_passed_on = True
            write_notice(f"{name} received; it is passed on to the processes of the run ({len(self.ranks)})")
            self._send(number)

    def _send(self, number: int) -> None:
        for process in self.ranks.values():
            if process.poll() is None:
                process.send_signal(number)
