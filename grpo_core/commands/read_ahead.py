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
from grpo_core.data.forms import recognise
from grpo_core.distributed.ranks import die_with_parent
from grpo_core.registry import observe_imports
from grpo_core.schema import ConfigError, describe_exit


class ReadAhead:
    """A process that reads a configuration and then the tasks that it names."""

    def __init__(self, config: Path | None, overrides: Sequence[str]) -> None:
        self._arguments = (config, overrides)
        self._file: str | None = None  # the user's file that was imported last
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
            outcome = self._receive()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            if code in (0, 1) or self._file is None:  # an exception other than a ConfigError, which is raised here
                return load_job(*self._arguments, recognise=recognise)
            raise ConfigError(f"the process that imported {self._file} {describe_exit(code)}") from None
        if isinstance(outcome, ConfigError):
            raise outcome
        return outcome

    def tasks(self) -> Any:
        """Return what `read_tasks` returns, or None if it failed; the ranks then read the tasks and report why."""
        try:
            with pause_gc():
                return self._receive()
        except EOFError:
            return None
        finally:
            self._process.join()

    def _receive(self) -> Any:
        """Return the next result; the names of the files that are imported are sent before it."""
        while isinstance(message := self._receiver.recv(), str):
            self._file = message
        return message


def _read(receiver: Connection, sender: Connection, config: Path | None, overrides: Sequence[str]) -> None:
    die_with_parent()
    receiver.close()  # or sending to a launcher that has ended would wait instead of failing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher
    observe_imports(sender.send)
    try:
        loaded = load_job(config, overrides, recognise=recognise)
    except ConfigError as error:
        sender.send(error)
        return
    sender.send(loaded)
    with pause_gc(), contextlib.suppress(Exception):
        from grpo_core.data.tasks import read_tasks
        from grpo_core.model.loading import load_tokenizer_of
        from grpo_core.model.quieten import quieten

        if not loaded.log.verbose:
            quieten()
        sender.send(read_tasks(loaded, load_tokenizer_of(loaded)))
