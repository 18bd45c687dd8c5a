"""Show the progress of long work in the terminal, on the main rank only and never in a log file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from grpo_core.distributed import ranks

DELAY = 2.0  # seconds of work before anything is displayed
ELAPSED_FORMAT = "{desc}  {elapsed}"


class ProgressLine(tqdm):
    """A tqdm bar that always erases itself when it is closed.

    tqdm with leave=False erases only what update() has displayed, not what refresh() or write() have.
    """

    is_displayed = False

    def display(self, *args: Any, **options: Any) -> bool | None:
        self.is_displayed = True
        return super().display(*args, **options)

    def close(self) -> None:
        if self.is_displayed and not self.disable:
            self.last_print_t = max(self.last_print_t, self.start_t + self.delay)  # tqdm's condition for erasing
        super().close()


def progress_bar(total: int, title: str, unit: str) -> tqdm:
    """Return a progress bar of `total` units, which its update() counts."""
    return ProgressLine(total=total, desc=title, unit=unit, **_options())


@contextmanager
def show_elapsed(title: str) -> Iterator[None]:
    """Display `title` and the elapsed seconds during the block, for work that cannot be counted."""
    line = ProgressLine(desc=title, bar_format=ELAPSED_FORMAT, **_options())
    stop = keep_refreshing(line)
    try:
        yield
    finally:
        stop()
        line.close()


def keep_refreshing(line: tqdm) -> Callable[[], None]:
    """Refresh the clock of a bar every second from a thread; return the function that stops it."""
    if line.disable:
        return lambda: None
    is_done = threading.Event()

    def refresh() -> None:
        if is_done.wait(DELAY):  # unlike update(), refresh() does not wait for the delay
            return
        while True:
            line.refresh()
            if is_done.wait(1.0):
                return

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()

    def stop() -> None:
        is_done.set()
        thread.join()

    return stop


def _options() -> dict[str, Any]:
    # disable=None displays the bar only where the output is a terminal
    return {"disable": None if ranks.is_main() else True, "delay": DELAY, "leave": False, "dynamic_ncols": True}
