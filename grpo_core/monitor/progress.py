"""Show the progress of long work, on the main rank only: bars and clocks in a terminal, a few lines in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from grpo_core.counts import quantify
from grpo_core.distributed import ranks

DELAY = 2.0  # seconds of work before anything is displayed
LOG_DELAY = 8.0  # seconds of work before the first line in a log file; until the next it takes twice as long each time
MAX_LOG_INTERVAL = 600.0  # seconds between two such lines
ELAPSED_FORMAT = "{desc}  {elapsed}"


class ProgressLine(tqdm):
    """A tqdm bar that always erases itself when it is closed.

    tqdm with leave=False erases only what update() has displayed, not what refresh() or write() have.
    """

    is_displayed = False
    count = 0  # unlike n, also in a log file
    stop_refreshing: Callable[[], None] | None = None

    def update(self, n: float | None = 1) -> bool | None:
        self.count += int(n or 0)
        return super().update(n)

    def display(self, *args: Any, **options: Any) -> bool | None:
        self.is_displayed = True
        return super().display(*args, **options)

    def close(self) -> None:
        if self.is_displayed and not self.disable:
            self.last_print_t = max(self.last_print_t, self.start_t + self.delay)  # tqdm's condition for erasing
        if self.stop_refreshing:
            self.stop_refreshing()  # first, or the thread could display the bar again
        super().close()


def progress_bar(total: int, title: str, unit: str) -> ProgressLine:
    """Return a progress bar of `total` units, which its update() counts; its clock also goes on between two updates."""
    line = ProgressLine(total=total, desc=title, unit=unit, **_options())
    line.stop_refreshing = keep_refreshing(line, lambda: f"{title}: {line.count:,} of {quantify(total, unit)}")
    return line


@contextmanager
def show_elapsed(title: str) -> Iterator[None]:
    """Display `title` and the elapsed seconds during the block, for work that cannot be counted."""
    line = ProgressLine(desc=title, bar_format=ELAPSED_FORMAT, **_options())
    stop = keep_refreshing(line, lambda: title)
    try:
        yield
    finally:
        stop()
        line.close()


def keep_refreshing(line: tqdm, describe: Callable[[], str | None]) -> Callable[[], None]:
    """Refresh the clock of a bar every second from a thread; return the function that stops it.

    Without a terminal the thread prints `describe()` as `log_sparsely` does.
    """
    if line.disable:
        return log_sparsely(describe)
    is_done = threading.Event()

    def refresh() -> None:
        if is_done.wait(DELAY):  # unlike update(), refresh() does not wait for the delay
            return
        while True:
            line.refresh()
            if is_done.wait(1.0):
                return

    return _start(refresh, is_done)


def log_sparsely(describe: Callable[[], str | None]) -> Callable[[], None]:
    """Print `describe()` and the elapsed seconds to stderr, if it is not None; return the function that stops it.

    A thread does so after 8, 16, 32, ... seconds, at most ten minutes apart.
    """
    if not ranks.is_main():
        return lambda: None
    is_done, start = threading.Event(), time.monotonic()

    def write() -> None:
        interval = LOG_DELAY
        while not is_done.wait(interval):
            elapsed = time.monotonic() - start
            if (text := describe()) is not None:
                print(f"{text}, {elapsed:.0f} s", file=sys.stderr, flush=True)
            interval = min(elapsed, MAX_LOG_INTERVAL)

    return _start(write, is_done)


def print_on_main(text: str) -> None:
    """Print a line, on the main rank only, before the run has its log."""
    if ranks.is_main():
        print(text, flush=True)


def print_note(sentence: str) -> None:
    """Print a note, as `print_on_main`."""
    print_on_main(f"note: {sentence}")


def _start(target: Callable[[], None], is_done: threading.Event) -> Callable[[], None]:
    """Run `target` in a thread; return the function that sets `is_done` and waits for its end."""
    thread = threading.Thread(target=target, daemon=True)
    thread.start()

    def stop() -> None:
        is_done.set()
        thread.join()

    return stop


def _options() -> dict[str, Any]:
    # disable=None displays the bar only where the output is a terminal
    return {"disable": None if ranks.is_main() else True, "delay": DELAY, "leave": False, "dynamic_ncols": True}
