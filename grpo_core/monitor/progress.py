"""What the terminal shows of work that takes longer than two seconds: nothing in a log file, nothing on other ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from grpo_core.distributed import ranks

DELAY = 2.0  # seconds of work before anything is shown
LOOK = "{desc}  {elapsed}"


class Line(tqdm):
    """Wipes at its end whatever it has shown; tqdm wipes only what update() has, not what refresh() or write() have."""

    shown = False

    def display(self, *args: Any, **options: Any) -> bool | None:
        self.shown = True
        return super().display(*args, **options)

    def close(self) -> None:
        if self.shown and not self.disable:
            self.last_print_t = max(self.last_print_t, self.start_t + self.delay)
        super().close()


def bar(total: int, what: str, unit: str) -> tqdm:
    """A progress bar of `total` units that are counted by its update()."""
    return Line(total=total, desc=what, unit=unit, **_how())


@contextmanager
def working(what: str) -> Iterator[None]:
    """Inside, `what` and the seconds it has taken, for work that cannot be counted."""
    shown = Line(desc=what, bar_format=LOOK, **_how())
    stop = ticking(shown)
    try:
        yield
    finally:
        stop()
        shown.close()


def ticking(shown: tqdm) -> Callable[[], None]:
    """Let the bar's clock go on while nothing is counted; returns what ends that."""
    if shown.disable:
        return lambda: None
    done = threading.Event()

    def tick() -> None:
        if done.wait(DELAY):  # refresh() does not wait for it
            return
        while True:
            shown.refresh()
            if done.wait(1.0):
                return

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()

    def stop() -> None:
        done.set()
        thread.join()

    return stop


def _how() -> dict[str, Any]:
    # None: only where the output is a terminal
    return {"disable": None if ranks.is_main() else True, "delay": DELAY, "leave": False, "dynamic_ncols": True}
