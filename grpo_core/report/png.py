"""The panels of a report as pictures for a paper."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from textwrap import fill
from typing import Any

from grpo_core.report.panels import Panel, chosen, curves
from grpo_core.report.run_reader import RunFolder
from grpo_core.schema import ConfigError, printable

SIZE = (3.3, 2.3)  # inches, without the legend
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
                _picture(panel, metrics, shown, title).savefig(path)
                pictures.append((title, path))
    return pictures


def _picture(panel: Panel, metrics: list[str], runs: list[RunFolder], title: str) -> Any:
    """A Figure. Its legend stands below the axes, where no curve is, and makes it higher."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=300, layout="constrained")
    axes = figure.add_subplot()
    for i, run in enumerate(runs):
        if panel.kind == "accuracy":
            _accuracy(axes, run, COLOURS[i % len(COLOURS)])
        elif panel.kind == "stack":
            _stack(axes, run, metrics)
        else:
            _lines(axes, run, metrics, i, len(runs))
    axes.set_title(fill(title, 36), loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    low, high = axes.dataLim.intervalx
    if high - low < 1:  # one step
        axes.set_xlim(low - 0.5, high + 0.5)
    if panel.log and any(value > 0 for line in axes.lines for value in line.get_ydata()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # its own labels are mathematics, which is not parsed
        axes.yaxis.set_minor_formatter("")
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        _legend(figure, handles, labels)
    return figure


def _legend(figure: Any, handles: list[Any], labels: list[str]) -> None:
    """In as many columns as its labels leave room for."""
    labels = [fill(label, 64) for label in labels]
    for columns in range(min(4, len(labels)), 0, -1):
        legend = figure.legend(
            handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=6, columnspacing=1.2
        )
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(SIZE[1] + legend.get_window_extent().height / figure.dpi)


def _accuracy(axes: Any, run: RunFolder, colour: str) -> None:
    rows = [r for r in run.evaluation if None not in (r.get("accuracy"), r.get("ci_low"), r.get("ci_high"))]
    if rows:
        spread = [[r["accuracy"] - r["ci_low"] for r in rows], [r["ci_high"] - r["accuracy"] for r in rows]]
        steps, shares = [r["step"] for r in rows], [r["accuracy"] for r in rows]
        axes.errorbar(
            steps, shares, yerr=spread, color=colour, marker="o", ms=3, lw=1, capsize=2, label=printable(run.name)
        )


def _stack(axes: Any, run: RunFolder, metrics: list[str]) -> None:
    """Areas on top of each other; of one step, which no area would show, a bar."""
    found = {name: values for name, values in curves(run).items() if name in metrics}
    steps, floor = [row["step"] for row in run.metrics], 0.0
    values = {name.removeprefix("seconds/"): [value or 0.0 for value in found[name]] for name in found}
    if len(steps) > 1 and values:
        axes.stackplot(steps, *values.values(), labels=list(values), colors=COLOURS, lw=0)
        return
    for i, (name, (value,)) in enumerate(values.items()):
        axes.bar(steps, value, width=0.1, bottom=floor, label=name, color=COLOURS[i % len(COLOURS)], lw=0)
        floor += value


def _lines(axes: Any, run: RunFolder, metrics: list[str], place: int, count: int) -> None:
    """Of one run each metric has its colour; of several each run has, and metrics differ by their dashes.

    A point without a neighbour, which no line would show, has a marker.
    """
    found, steps = curves(run), [row["step"] for row in run.metrics]
    for j, name in enumerate(metrics):
        if name not in found:
            continue
        colour, dash = (COLOURS[j % len(COLOURS)], "-") if count == 1 else (
            COLOURS[place % len(COLOURS)], DASHES[j % len(DASHES)])  # fmt: skip
        alone = _alone(found[name])
        values = [float("nan") if value is None else value for value in found[name]]
        label = ", ".join(([printable(run.name)] if count > 1 else []) + ([name] if len(metrics) > 1 else []))
        marker = {"marker": "o", "ms": 2.5, "markevery": alone} if alone else {}
        axes.plot(steps, values, dash, color=colour, lw=1, label=label or name, **marker)
        if name == "reward" and "reward_std" in found:
            pairs = [(v, s or 0.0) for v, s in zip(values, found["reward_std"], strict=True)]
            low, high = [v - s for v, s in pairs], [v + s for v, s in pairs]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
            ends = [[edge[i] for i in alone] for edge in (low, high)]
            axes.vlines([steps[i] for i in alone], *ends, color=colour, alpha=0.15, lw=4)


def _alone(values: list[float | None]) -> list[int]:
    """
    >>> _alone([1, None, 2, 3, None, 4])
    [0, 5]
    """
    there = [False, *(value is not None for value in values), False]
    return [i for i in range(len(values)) if there[i : i + 3] == [False, True, False]]
