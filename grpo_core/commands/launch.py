"""The `launch` command: start `train` in several processes of this machine and wait for them.

If a rank fails, the launcher ends the others, which would otherwise wait for it in a collective. It passes SIGTERM and
SIGINT on, after which the ranks write a checkpoint and stop; a second signal kills them.

On Linux without a GPU the launcher imports the training code and forks the ranks, which saves every rank the imports.
Elsewhere, and if a user's own file has run in the launcher, a rank is a new process.
"""

from __future__ import annotations

import atexit
import gc
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from grpo_core.commands.errors import print_error
from grpo_core.commands.train import run_train
from grpo_core.config.checks import prompts_per_rank
from grpo_core.config.files import load
from grpo_core.distributed.ranks import RUN_FOLDER_VARIABLE
from grpo_core.registry import USER_MODULE
from grpo_core.schema import ConfigError

PROGRAM = ("-m", "grpo_core")
GRACE_SECONDS = 5.0  # from the first failure until the other ranks are killed: time to print their errors
NO_RESTART_CODES = (0, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # success, a user's mistake, a signal
EXPLAINED_CODES = (2, 3)  # the rank has printed its error
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_launch(processes: int, config: Path, overrides: Sequence[str]) -> int:
    """Check the configuration, train in `processes` processes, and return 0 or the code of the first rank that failed.

    With trainer.max_restarts a failed run is restarted from its last checkpoint. NNODES, NODE_RANK, MASTER_ADDR and
    MASTER_PORT in the environment make this machine one node of several.

    Raises:
        ConfigError: the configuration is wrong, or cannot be run by this number of processes.
    """
    loaded = load(config, overrides)
    prompts_per_rank(loaded, processes * int(os.environ.get("NNODES", 1)))
    scratch = Path(tempfile.mkdtemp())  # no TemporaryDirectory: a forked rank would remove it when it ends
    try:
        note = scratch / "folder"  # rank 0 writes the path of the run folder here
        for restarts_left in range(loaded.trainer.max_restarts, -1, -1):
            code = _Ranks(processes, config, overrides, note).wait()
            if code in NO_RESTART_CODES or restarts_left == 0:
                return code
            if note.exists():
                others = [word for word in overrides if not word.startswith(("resume=", "overwrite="))]
                overrides = [*others, "overwrite=false", f"resume={note.read_text()}"]
            print_error(f"restarting from the last checkpoint; restarts left: {restarts_left}")
    finally:
        shutil.rmtree(scratch)
    raise AssertionError


class _Ranks:
    """The processes of one start, one per rank of this machine."""

    def __init__(self, processes: int, config: Path, overrides: Sequence[str], note: Path) -> None:
        nodes, node = int(os.environ.get("NNODES", 1)), int(os.environ.get("NODE_RANK", 0))
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
        if nodes == 1:
            address, port = "127.0.0.1", str(_free_port())
        shared = {"WORLD_SIZE": processes * nodes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": address}
        shared |= {"MASTER_PORT": port, RUN_FOLDER_VARIABLE: note}
        threads = max(1, (os.cpu_count() or 1) // (2 * processes))
        self.ended: queue.Queue[tuple[int, int]] = queue.Queue()  # (rank, exit code)
        self.ranks: dict[int, subprocess.Popen | _ForkedRank] = {}
        self.signals = 0  # received
        fork = _prepare_fork()
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
                self.ranks[rank] = _ForkedRank(config, overrides, environment)
            else:
                command = [sys.executable, *PROGRAM, "train", "--config", str(config), *overrides]
                # in a session of its own, so that Ctrl-C reaches the launcher only
                self.ranks[rank] = subprocess.Popen(command, env=environment, start_new_session=True)
        self.threads = [threading.Thread(target=self._wait_for, args=(rank,), daemon=True) for rank in self.ranks]
        for thread in self.threads:  # after the last fork, which must not happen beside another thread
            thread.start()

    def wait(self) -> int:
        """Wait until all ranks have ended. Return 0 or the exit code of the first that failed; 128 + n for signal n."""
        failure: tuple[int, int] | None = None
        deadline, running = None, set(self.ranks)
        while running:
            try:
                rank, code = self.ended.get(timeout=0.2)
            except queue.Empty:
                if deadline is not None and time.monotonic() > deadline:
                    self._send(signal.SIGKILL)
                continue
            running.remove(rank)
            if code != 0 and failure is None:
                failure, deadline = (rank, code), time.monotonic() + GRACE_SECONDS
        for thread in self.threads:
            thread.join()
        if failure is None:
            return 0
        rank, code = failure
        stopped = self.signals and code in NO_RESTART_CODES
        if code not in EXPLAINED_CODES and not stopped:
            reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            print_error(f"rank {rank} {reason}")
        return code if code > 0 else 128 - code

    def _wait_for(self, rank: int) -> None:
        self.ended.put((rank, self.ranks[rank].wait()))

    def _pass_on(self, number: int, frame: object) -> None:
        self.signals += 1
        self._send(number if self.signals == 1 else signal.SIGKILL)

    def _send(self, number: int) -> None:
        for process in self.ranks.values():
            if process.poll() is None:
                process.send_signal(number)


def _prepare_fork() -> bool:
    """Import what the ranks need and return True, or False if they must not be forks of this process.

    CUDA and macOS do not allow it, and a user's file may have started threads, which do not survive it.
    """
    user_code = any(name.startswith(USER_MODULE) for name in sys.modules)
    if sys.platform != "linux" or torch.cuda.is_available() or user_code:
        return False
    import grpo_core.training.job  # noqa: F401

    gc.freeze()  # the ranks' garbage collector then leaves the shared memory pages of the imports alone
    return True


class _ForkedRank:
    """A rank forked from the launcher, with the methods of subprocess.Popen that `_Ranks` uses."""

    def __init__(self, config: Path, overrides: Sequence[str], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()  # or the rank would print what is buffered once more
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the rank has left the launcher's handlers
        self.pid = os.fork()
        if self.pid == 0:
            _become_rank(config, overrides, environment)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def wait(self) -> int:
        """Return the exit code when the process has ended; -n for signal n."""
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)


def _become_rank(config: Path, overrides: Sequence[str], environment: dict[str, str]) -> NoReturn:
    """Train in a process just forked, and end it as `python -m grpo_core train` ends."""
    code = 1
    try:
        os.setsid()  # so that Ctrl-C reaches the launcher only
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        # torch read OMP_NUM_THREADS when it was imported. The call also gives the fork a thread pool of its own, which
        # torch would otherwise make when a model loads, in several threads at once, and that fails.
        own = "OMP_NUM_THREADS" in os.environ
        torch.set_num_threads(torch.get_num_threads() if own else int(environment["OMP_NUM_THREADS"]))
        os.environ.clear()
        os.environ.update(environment)
        code = run_train(config, overrides)
        if code == 0:
            threading._shutdown()  # waits for the threads that a reward has started
            atexit._run_exitfuncs()
    except ConfigError as error:
        print_error(str(error))
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
