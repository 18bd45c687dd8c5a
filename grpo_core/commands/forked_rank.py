"""A rank that is forked from the launcher, which has imported what the rank needs."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from grpo_core.commands.errors import print_error
from grpo_core.commands.gc_pause import pause_gc
from grpo_core.commands.read_ahead import ReadAhead
from grpo_core.commands.train import run_train
from grpo_core.config.sections import RunConfig
from grpo_core.schema import ConfigError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def can_fork() -> bool:
    """Return whether ranks can be forks of the launcher, which CUDA does not allow, nor the libraries of macOS."""
    return sys.platform == "linux" and not torch.cuda.is_available()


def prepare_ranks(config: RunConfig, ahead: ReadAhead) -> None:
    """Import what the ranks need before they are forked, and keep the tasks for them."""
    with pause_gc():
        import grpo_core.training.job  # noqa: F401
        from grpo_core.data.tasks import offer_tasks
    if (tasks := ahead.tasks()) is not None:
        offer_tasks(config, tasks)
    gc.freeze()  # the ranks' garbage collector then leaves the memory pages alone that they share with the launcher


class ForkedRank:
    """A rank forked from this process, with the methods of subprocess.Popen that the launcher uses."""

    def __init__(self, config: Path | None, overrides: Sequence[str], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()  # or the rank would print what is buffered once more
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the rank has dropped the launcher's handlers
        self.pid = os.fork()
        if self.pid == 0:
            _become_rank(config, overrides, environment)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def wait(self) -> int:
        """Wait for the process to end and return its exit code; -n for signal n."""
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)


def _become_rank(config: Path | None, overrides: Sequence[str], environment: dict[str, str]) -> NoReturn:
    """Train in a process just forked, and end it as `python -m grpo_core train` ends."""
    code = 1
    try:
        os.setsid()  # so that Ctrl-C reaches the launcher only
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        # torch read OMP_NUM_THREADS when it was imported. The call also gives the fork a thread pool of its own, which
        # torch would otherwise make when a model loads, in several threads at once, and that fails.
        was_read = "OMP_NUM_THREADS" in os.environ
        torch.set_num_threads(torch.get_num_threads() if was_read else int(environment["OMP_NUM_THREADS"]))
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
