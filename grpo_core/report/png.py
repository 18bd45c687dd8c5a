"""Draw the panels of a report as pictures for a paper."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from grpo_core.report.panels import Panel, choose_panels, collect_curves
from grpo_core.report.run_reader import RunFolder
from grpo_core.schema import ConfigError, printable

FIGURE_SIZE = (3.3, 2.3)  # inches, without the legend
COLOURS = ("#0072b2", "#d55e00", "#00805e", "#a8447f", "#8c6a00", "#4b4fa8", "#666a70", "#7a3e1d")
DASHES = ("-", "--", ":", "-.")
STYLE = {"text.parse_math": False, "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}


def has_matplotlib() -> bool:
    """Return whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Check that pictures can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if not has_matplotlib():
        raise ConfigError("--png needs matplotlib, which is not installed: pip install -e '.[report]'")


def draw_pictures(runs: list[RunFolder], stem: Path) -> list[tuple[str, Path]]:
    """Write STEM-PANEL.png for every panel, 3.3 inches wide at 300 dpi; return titles and files.

    Stacked areas of several runs cannot share axes: such a panel has one picture per run, STEM-PANEL-0.png and so on.
    """
    import matplotlib

    pictures = []
    with matplotlib.rc_context(STYLE):
        for panel, metrics in choose_panels(runs):
            is_split = panel.kind == "stack" and len(runs) > 1
            for i, drawn_runs in enumerate([[run] for run in runs] if is_split else [runs]):
                path = stem.with_name(f"{stem.name}-{panel.id}{f'-{i}' if is_split else ''}.png")
                title = printable(f"{panel.title}, {drawn_runs[0].name}" if is_split else panel.title)
                _draw_figure(panel, metrics, drawn_runs, title).savefig(path)
                pictures.append((title, path))
    return pictures


def draw_bands(bands: Mapping[str, Sequence[Mapping[str, float]]], control: str, path: Path) -> None:
    """Write a picture with a panel for each variant of a study: the mean of its seeds, and a band from low to high.

    `bands` has the rows of `study.make_band` by variant. The mean of the control is grey in the other panels.
    """
    import matplotlib

    columns = min(4, len(bands))
    lines = -(-len(bands) // columns)
    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1.9 * columns + 0.4, 1.6 * lines + 0.4), dpi=300, layout="constrained")
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
        for i, (axes, (name, rows)) in enumerate(zip(panels, bands.items(), strict=False)):
            steps, colour = [row["step"] for row in rows], COLOURS[i % len(COLOURS)]
            low, mean, high = ([100 * row[key] for row in rows] for key in ("low", "mean", "high"))
            if name != control:
                grey = [(row["step"], 100 * row["mean"]) for row in bands[control]]
                axes.plot(*zip(*grey, strict=True) if grey else ([], []), color="#b0b4ba", lw=1)
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
            axes.plot(steps, mean, color=colour, lw=1.5, marker="o", ms=2)
            axes.set_title(name, loc="left", color=colour)
        for axes in panels[len(bands) :]:
            axes.set_visible(False)
        figure.supxlabel("step")
        figure.supylabel("held-out accuracy, per cent")
        figure.savefig(path)


def _draw_figure(panel: Panel, metrics: list[str], runs: list[RunFolder], title: str) -> Any:
    """Return the matplotlib Figure of a panel. A legend is added below the axes and makes the figure higher."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=FIGURE_SIZE, dpi=300, layout="constrained")
    axes = figure.add_subplot()
    for i, run in enumerate(runs):
        if panel.kind == "accuracy":
            _draw_accuracy(axes, run, COLOURS[i % len(COLOURS)], metrics[0])
        elif panel.kind == "stack":
            _draw_stack(axes, run, metrics)
        else:
            _draw_lines(axes, run, metrics, i, len(runs))
    axes.set_title(fill(title, 36), loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    low, high = axes.dataLim.intervalx
    if high - low < 1:  # a run of one step
        axes.set_xlim(low - 0.5, high + 0.5)
    if panel.log and any(value > 0 for line in axes.lines for value in line.get_ydata()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the default labels are mathtext, which STYLE switches off
        axes.yaxis.set_minor_formatter("")
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        _add_legend(figure, handles, labels)
    return figure


def _add_legend(figure: Any, handles: list[Any], labels: list[str]) -> None:
    """Add a legend below the axes in up to four columns, as many as fit the width of the figure."""
    labels = [fill(label, 64) for label in labels]
    for columns in range(min(4, len(labels)), 0, -1):
        legend = figure.legend(
            handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=6, columnspacing=1.2
        )
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(FIGURE_SIZE[1] + legend.get_window_extent().height / figure.dpi)


def _draw_accuracy(axes: Any, run: RunFolder, colour: str, metric: str) -> None:
    """Draw the accuracies of an evaluation set with their intervals; `metric` is accuracy or eval/NAME/accuracy."""
    name = metric.removesuffix("accuracy").removeprefix("eval/").rstrip("/")
    rows = [
        r for r in run.evaluations.get(name, []) if None not in (r.get("accuracy"), r.get("ci_low"), r.get("ci_high"))
    ]
    if rows:
        spread = [[r["accuracy"] - r["ci_low"] for r in rows], [r["ci_high"] - r["accuracy"] for r in rows]]
        steps, shares = [r["step"] for r in rows], [r["accuracy"] for r in rows]
        axes.errorbar(
            steps, shares, yerr=spread, color=colour, marker="o", ms=3, lw=1, capsize=2, label=printable(run.name)
        )


def _draw_stack(axes: Any, run: RunFolder, metrics: list[str]) -> None:
    """Draw stacked areas; of a run of one step, where an area would have no width, stacked bars."""
    curves = {name: values for name, values in collect_curves(run).items() if name in metrics}
    steps, floor = [row["step"] for row in run.metrics], 0.0
    values = {name.removeprefix("seconds/"): [value or 0.0 for value in curves[name]] for name in curves}
    if len(steps) > 1 and values:
        axes.stackplot(steps, *values.values(), labels=list(values), colors=COLOURS, lw=0)
        return
    for i, (name, (value,)) in enumerate(values.items()):
        axes.bar(steps, value, width=0.1, bottom=floor, label=name, color=COLOURS[i % len(COLOURS)], lw=0)
        floor += value


def _draw_lines(axes: Any, run: RunFolder, metrics: list[str], run_index: int, run_count: int) -> None:
    """Draw the curves of a run. Alone, each metric has a colour; with other runs, each run has one and metrics dashes.

    From the ninth run on colours come again, with the next dashes.
    A point between two gaps, which a line would not show, has a marker.
    """
    curves, steps = collect_curves(run), [row["step"] for row in run.metrics]
    for j, name in enumerate(metrics):
        if name not in curves:
            continue
        if run_count == 1:
            colour, dash = COLOURS[j % len(COLOURS)], "-"
        else:
            turn = run_index // len(COLOURS)
            colour, dash = COLOURS[run_index % len(COLOURS)], DASHES[(j + turn) % len(DASHES)]
        isolated = _isolated_points(curves[name])
        values = [float("nan") if value is None else value for value in curves[name]]
        label = ", ".join(([printable(run.name)] if run_count > 1 else []) + ([name] if len(metrics) > 1 else []))
        marker = {"marker": "o", "ms": 2.5, "markevery": isolated} if isolated else {}
        axes.plot(steps, values, dash, color=colour, lw=1, label=label or name, **marker)
        if name == "reward" and "reward_std" in curves:
            pairs = [(v, s or 0.0) for v, s in zip(values, curves["reward_std"], strict=True)]
            low, high = [v - s for v, s in pairs], [v + s for v, s in pairs]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
            ends = [[edge[i] for i in isolated] for edge in (low, high)]
            axes.vlines([steps[i] for i in isolated], *ends, color=colour, alpha=0.15, lw=4)


def _isolated_points(values: list[float | None]) -> list[int]:
    """Return the indices of values without a neighbour.

    >>> _isolated_points([1, None, 2, 3, None, 4])
    [0, 5]
    """
    present = [False, *(value is not None for value in values), False]
    return [i for i in range(len(values)) if present[i : i + 3] == [False, True, False]]
