"""Read a run's configuration and tasks in a fork of the launcher, while the launcher imports what the ranks need.

What a user's own file imports or starts is then not in the launcher, and so not in the ranks that it forks.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from grpo_core.commands.gc_pause import pause_gc
from grpo_core.config.files import load_job
from grpo_core.config.sections import RunConfig
from grpo_core.distributed.ranks import die_with_parent
from grpo_core.schema import ConfigError


class ReadAhead:
    """A process that reads a configuration and then the tasks that it names."""

    def __init__(self, config: Path | None, overrides: Sequence[str]) -> None:
        self._arguments = (config, overrides)
        context = get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_read, args=(self._receiver, sender, *self._arguments))
        self._process.start()
        sender.close()

    def config(self) -> RunConfig:
        """Return the configuration.

        Raises:
            ConfigError: as `load_job`.
        """
        try:
            outcome = self._receiver.recv()
        except EOFError:  # something other than a ConfigError ended the process, and is raised here
            return load_job(*self._arguments)
        if isinstance(outcome, ConfigError):
            raise outcome
        return outcome

    def tasks(self) -> Any:
        """Return what `read_tasks` returns, or None if it failed; the ranks then read the tasks and report why."""
        try:
            with pause_gc():
                return self._receiver.recv()
        except EOFError:
            return None
        finally:
            self._process.join()


def _read(receiver: Connection, sender: Connection, config: Path | None, overrides: Sequence[str]) -> None:
    die_with_parent()
    receiver.close()  # or sending to a launcher that has ended would wait instead of failing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher
    try:
        loaded = load_job(config, overrides)
    except ConfigError as error:
        sender.send(error)
        return
    sender.send(loaded)
    with pause_gc(), contextlib.suppress(Exception):
        from grpo_core.data.tasks import read_tasks
        from grpo_core.model.loading import load_tokenizer
        from grpo_core.model.quieten import quieten

        if not loaded.log.verbose:
            quieten()
        sender.send(read_tasks(loaded, load_tokenizer(loaded.model.path, loaded.model.trust_remote_code)))
