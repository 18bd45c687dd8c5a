"""The panels of a report as pictures for a paper."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from grpo_core.report_panels import Panel, chosen, curves
from grpo_core.run_folder import RunFolder
from grpo_core.schema import ConfigError, printable

COLOURS = ("#0072b2", "#d55e00", "#00805e", "#a8447f", "#8c6a00", "#4b4fa8", "#666a70", "#7a3e1d")
DASHES = ("-", "--", ":", "-.")
PLAIN = {"text.parse_math": False, "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}


def check_installed() -> None:
    """Raises:
    ConfigError: matplotlib is not there.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib: pip install -e '.[report]'")


def draw(runs: list[RunFolder], stem: Path) -> list[tuple[str, Path]]:
    """STEM-PANEL.png of every panel, 3.3 inches wide at 300 dpi; returns titles and files.

    Phases are stacked, so they have a picture a run, STEM-PANEL-0.png and so on where there are several.
    """
    import matplotlib

    pictures = []
    with matplotlib.rc_context(PLAIN):
        for panel, metrics in chosen(runs):
            apart = panel.kind == "stack" and len(runs) > 1
            for i, shown in enumerate([[run] for run in runs] if apart else [runs]):
                path = stem.with_name(f"{stem.name}-{panel.id}{f'-{i}' if apart else ''}.png")
                title = printable(f"{panel.title}, {shown[0].name}" if apart else panel.title)
                _picture(panel, metrics, shown, title, path)
                pictures.append((title, path))
    return pictures


def _picture(panel: Panel, metrics: list[str], runs: list[RunFolder], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3, 2.3), dpi=300, layout="constrained")
    axes = figure.add_subplot()
    for i, run in enumerate(runs):
        if panel.kind == "accuracy":
            _accuracy(axes, run, COLOURS[i % len(COLOURS)])
        elif panel.kind == "stack":
            _stack(axes, run, metrics)
        else:
            _lines(axes, run, metrics, i, len(runs))
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    if panel.log and any(value > 0 for line in axes.lines for value in line.get_ydata()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # its own labels are mathematics, which is not parsed
        axes.yaxis.set_minor_formatter("")
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=6)
    figure.savefig(path)


def _accuracy(axes: Any, run: RunFolder, colour: str) -> None:
    rows = [r for r in run.evaluation if None not in (r.get("accuracy"), r.get("ci_low"), r.get("ci_high"))]
    if rows:
        spread = [[r["accuracy"] - r["ci_low"] for r in rows], [r["ci_high"] - r["accuracy"] for r in rows]]
        steps, shares = [r["step"] for r in rows], [r["accuracy"] for r in rows]
        axes.errorbar(
            steps, shares, yerr=spread, color=colour, marker="o", ms=3, lw=1, capsize=2, label=printable(run.name)
        )


def _stack(axes: Any, run: RunFolder, metrics: list[str]) -> None:
    found = {name: values for name, values in curves(run).items() if name in metrics}
    if found:
        values = [[value or 0.0 for value in column] for column in found.values()]
        labels = [name.removeprefix("seconds/") for name in found]
        axes.stackplot([row["step"] for row in run.metrics], values, labels=labels, colors=COLOURS, lw=0)


def _lines(axes: Any, run: RunFolder, metrics: list[str], place: int, count: int) -> None:
    """Of one run each metric has its colour; of several each run has, and metrics differ by their dashes."""
    found, steps = curves(run), [row["step"] for row in run.metrics]
    for j, name in enumerate(name for name in metrics if name in found):
        colour, dash = (COLOURS[j % len(COLOURS)], "-") if count == 1 else (
            COLOURS[place % len(COLOURS)], DASHES[j % len(DASHES)])  # fmt: skip
        values = [float("nan") if value is None else value for value in found[name]]
        label = ", ".join(([printable(run.name)] if count > 1 else []) + ([name] if len(metrics) > 1 else []))
        axes.plot(steps, values, dash, color=colour, lw=1, label=label or name)
        if name == "reward" and "reward_std" in found:
            pairs = [(v, s or 0.0) for v, s in zip(values, found["reward_std"], strict=True)]
            low, high = [v - s for v, s in pairs], [v + s for v, s in pairs]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
