"""The lock of a run folder: a file that names the process that writes the run.

The main rank holds it from the choice of the checkpoint to the end of the run. A lock is taken over if its process no
longer runs, which can be seen only on the same host.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from grpo_core.distributed import ranks
from grpo_core.monitor.progress import print_note
from grpo_core.schema import ConfigError

LOCK = "lock.json"


@dataclass(frozen=True)
class Writer:
    """The process that writes a run."""

    process: int
    host: str
    since: str
    started: str  # tells the process from a later one with the same number; empty where the system does not say

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}"


@dataclass(frozen=True)
class _Held:
    """The lock that this process holds."""

    file: Path
    writer: Writer
    is_new: bool  # the run folder did not exist before


_held: _Held | None = None


def find_writer(folder: Path) -> Writer | None:
    """Return the other process that writes the run in `folder`: it runs on this host, or it is on another host."""
    try:
        writer = Writer(**json.loads((folder / LOCK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # no lock, or a file that is none
    if writer.host != socket.gethostname():
        return writer
    is_other = writer.process != os.getpid()
    return writer if is_other and _identify(writer.process) == writer.started else None


def check_not_written(path: Path, key: str = "") -> None:
    """Refuse to write to `path`, the value of `key`, if it is, or lies in, a run that another process writes.

    Raises:
        ConfigError: names the process.
    """
    path = path.absolute()
    for folder in (path, *path.parents):
        if writer := find_writer(folder):
            subject = f"{key} is {path}, but {folder}" if key else str(folder)
            elsewhere = "" if writer.host == socket.gethostname() else f", or delete {folder / LOCK} if it has ended"
            raise ConfigError(
                f"{subject} is being written by {writer}; wait until that process ends or stop it{elsewhere}, or "
                f"{'name another folder' if key else 'start a run with another name'}"
            )


def acquire(folder: Path) -> None:
    """Take the lock of the run in `folder`, which is created if it does not exist. A collective.

    Raises:
        ConfigError: another process has the lock, or it cannot be written.
    """
    problem = ""
    if ranks.is_main():
        try:
            _acquire_on_main(folder)
        except ConfigError as error:
            problem = str(error)
        except OSError as error:
            problem = f"the run folder {folder} (output_dir and name) cannot be written: {error.strerror}"
    if problem := ranks.broadcast_from_main(problem):
        raise ConfigError(problem)


def _acquire_on_main(folder: Path) -> None:
    global _held
    release()
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file, process = folder.absolute() / LOCK, os.getpid()
    with _exclusive(folder):  # of two processes that find a stale lock, one takes it over
        check_not_written(folder)
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        writer = Writer(process, socket.gethostname(), since, _identify(process) or "")
        part = file.with_name(f".{LOCK}.part")
        part.write_text(json.dumps(asdict(writer)), encoding="utf-8")
        os.replace(part, file)  # atomic, so that nobody reads half a lock
    _held = _Held(file, writer, is_new)
    atexit.register(release)


def release() -> None:
    """Give up the lock that this process holds, and remove its folder if it is new and nothing was written to it."""
    global _held
    held, _held = _held, None
    if held is None or held.writer.process != os.getpid():  # a fork does not own the lock of its parent
        return
    with contextlib.suppress(OSError, ValueError):
        if json.loads(held.file.read_text(encoding="utf-8")) == asdict(held.writer):
            held.file.unlink()
        if held.is_new:
            held.file.parent.rmdir()


@contextlib.contextmanager
def released_at_end() -> Iterator[None]:
    """Release the lock that the block acquires when the block ends."""
    try:
        yield
    finally:
        release()


def empty_folder(folder: Path) -> None:
    """Delete everything in a run folder but its lock. A symbolic link is deleted, and not what it points to.

    Raises:
        ConfigError: something cannot be deleted.
    """
    try:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    except OSError as error:
        raise ConfigError(
            f"overwrite is true, but {error.filename or folder} cannot be deleted: {error.strerror}"
        ) from None


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block; on a file system that cannot lock, say so and go on."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            print_note(
                f"the file system of {folder} cannot lock files ({error.strerror}); do not start two runs of "
                f"this name at the same moment"
            )
        yield
    finally:
        os.close(handle)


def _identify(process: int) -> str | None:
    """Return a text that no other process of this host has, before or after; None if the process does not run."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it runs, and belongs to another user
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return "" if not Path("/proc/self/stat").exists() else None
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"  # Z: it has ended; 19: when it started
