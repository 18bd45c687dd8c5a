"""Start `train` in several processes of this machine, watch over them, and say in one sentence how one of them ended.

A rank that ends otherwise than well takes the others with it: without it they would wait for ever. SIGTERM and SIGINT
are passed on, and the ranks stop with a checkpoint; a second one ends them at once.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from grpo_core.config.checks import prompts_per_rank
from grpo_core.config.files import load
from grpo_core.distributed.ranks import RUN_FOLDER_VARIABLE

PROGRAM = ("-m", "grpo_core")
GRACE = 5.0  # seconds that the others have to say what they have to say
FINAL = (0, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # ends that a restart would not mend


def launch(processes: int, config: Path, overrides: list[str]) -> int:
    """Check the configuration, run it, and return the exit code: 0, or that of the first rank that failed.

    With trainer.max_restarts a run that failed goes on from its last checkpoint. NNODES, NODE_RANK, MASTER_ADDR and
    MASTER_PORT in the environment make this machine one node of several.

    Raises:
        ConfigError: a configuration that cannot be run by so many processes.
    """
    loaded = load(config, overrides)
    prompts_per_rank(loaded, processes * int(os.environ.get("NNODES", 1)))
    with tempfile.TemporaryDirectory() as scratch:
        note = Path(scratch) / "folder"
        for restarts_left in range(loaded.trainer.max_restarts, -1, -1):
            code = _Ranks(processes, ["train", "--config", str(config), *overrides], note).wait()
            if code in FINAL or restarts_left == 0:
                return code
            if note.exists():
                kept = [one for one in overrides if not one.startswith(("resume=", "overwrite="))]
                overrides = [*kept, "overwrite=false", f"resume={note.read_text()}"]
            print(f"grpo_core: starting again from the last checkpoint, {restarts_left} left", file=sys.stderr)
    raise AssertionError


class _Ranks:
    """The processes of one start."""

    def __init__(self, processes: int, command: list[str], note: Path) -> None:
        nodes, node = int(os.environ.get("NNODES", 1)), int(os.environ.get("NODE_RANK", 0))
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
        if nodes == 1:
            address, port = "127.0.0.1", str(_free_port())
        shared = {"WORLD_SIZE": processes * nodes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": address}
        shared |= {"MASTER_PORT": port, RUN_FOLDER_VARIABLE: note}
        threads = max(1, (os.cpu_count() or 1) // (2 * processes))
        self.ended: queue.Queue[tuple[int, int]] = queue.Queue()
        self.ranks: dict[int, subprocess.Popen] = {}
        self.signals = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        for local in range(processes):
            rank = node * processes + local
            own = {**shared, "RANK": rank, "LOCAL_RANK": local}
            environment = {
                "OMP_NUM_THREADS": str(threads),
                **os.environ,
                **{key: str(value) for key, value in own.items()},
            }
            self.ranks[rank] = subprocess.Popen(  # a session of its own: Ctrl-C reaches it through us alone
                [sys.executable, *PROGRAM, *command], env=environment, start_new_session=True
            )
            threading.Thread(target=self._wait_for, args=(rank,), daemon=True).start()

    def wait(self) -> int:
        """The exit code when all have ended."""
        failed, deadline, left = None, None, set(self.ranks)
        while left:
            try:
                rank, code = self.ended.get(timeout=0.2)
            except queue.Empty:
                if deadline is not None and time.monotonic() > deadline:
                    self._send(signal.SIGKILL)
                continue
            left.remove(rank)
            if code == 0 or failed is not None:
                continue
            failed, deadline = (rank, code), time.monotonic() + GRACE
        if failed is None:
            return 0
        rank, code = failed
        stopped = self.signals and code in FINAL
        if code not in (2, 3) and not stopped:  # 2 and 3: the rank has said what was wrong
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            print(f"grpo_core: rank {rank} {how}", file=sys.stderr)
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


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
