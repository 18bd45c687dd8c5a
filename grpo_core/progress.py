"""What the terminal shows of work that takes longer than two seconds: nothing in a log file, nothing on other ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from grpo_core import distributed

DELAY = 2.0  # seconds of work before anything is shown
LOOK = "{desc}  {elapsed}"


def bar(total: int, what: str, unit: str) -> tqdm:
    """A progress bar of `total` units that are counted by its update()."""
    return tqdm(total=total, desc=what, unit=unit, **_how())


@contextmanager
def working(what: str) -> Iterator[None]:
    """Inside, `what` and the seconds it has taken, for work that cannot be counted."""
    shown = tqdm(desc=what, bar_format=LOOK, **_how())
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1.0):
            shown.update(0)
            shown.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    if not shown.disable:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.is_alive():
            thread.join()
        shown.close()


def _how() -> dict[str, object]:
    # None: only where the output is a terminal
    return {"disable": None if distributed.is_main() else True, "delay": DELAY, "leave": False, "dynamic_ncols": True}
