"""The `report` command: write one HTML page about one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo_core.report.report import write_report


def run_report(runs: Sequence[Path], output: Path | None = None, *, png: bool = False) -> int:
    """Write the page, and the curves as PNG files with `png`. Print the path of every file written.

    Raises:
        ConfigError: a folder is not a run, or the page cannot be written.
    """
    for path in write_report(runs, output, png=png):
        print(path)
    return 0
