"""Compare the variants of a study: a pure function of the files in the folders of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo_core.counts import quantify
from grpo_core.report.markdown import aligned_table
from grpo_core.report.run_reader import Row, RunFolder, read_run
from grpo_core.report.seed_statistics import count_needed_seeds, exchange_p, holm, smallest_p, t_interval
from grpo_core.report.summary import format_duration
from grpo_core.schema import ConfigError

LEVEL = 0.05  # of the tests, after the correction
METRICS = {"final": "held-out accuracy at the end", "area": "mean held-out accuracy over the steps"}
Curve = dict[int, float]  # steps taken -> accuracy


def compare_variants(runs: Mapping[str, Mapping[int, Path]], control: str, metric: str) -> dict[str, Any]:
    """Return the figures of a study for JSON; `runs` has the folders of the finished runs, variant -> seed -> folder.

    The order of the variants and of the seeds has no effect on the numbers.

    Raises:
        ConfigError: two runs were evaluated on different numbers of held-out problems, or a run has no evaluation.
    """
    folders = {name: {seed: read_run(path) for seed, path in sorted(seeds.items())} for name, seeds in runs.items()}
    _check_problems([run for seeds in folders.values() for run in seeds.values()])
    curves = {
        name: {seed: {row["step"]: row["accuracy"] for row in _read_evaluations(run)} for seed, run in seeds.items()}
        for name, seeds in folders.items()
    }
    values = {
        name: {seed: {m: measure(curve, m) for m in METRICS} for seed, curve in seeds.items()}
        for name, seeds in curves.items()
    }
    others = [name for name in runs if name != control]
    differences = {
        name: {s: values[name][s][metric] - values[control][s][metric] for s in values[name] if s in values[control]}
        for name in others
    }
    return {
        "control": control,
        "metric": metric,
        "level": LEVEL,
        "variants": {
            name: {
                **_summarize([by_metric[metric] for by_metric in values[name].values()]),
                "seconds": statistics.mean(map(_sum_seconds, folders[name].values())) if folders[name] else None,
                "runs": {str(seed): by_metric for seed, by_metric in values[name].items()},
                "curve": make_band([*curves[name].values()]),
            }
            for name in runs
        },
        "comparisons": _compare(differences, control),
    }


def measure(curve: Curve, metric: str) -> float:
    """Return the accuracy after the last step, or the area under the curve divided by the number of steps.

    >>> measure({0: 0.0, 10: 0.5, 30: 1.0}, "final"), measure({0: 0.0, 10: 0.5, 30: 1.0}, "area")
    (1.0, 0.5833333333333334)
    """
    steps = sorted(curve)
    if metric == "final" or len(steps) == 1:
        return curve[steps[-1]]
    area = sum((b - a) * (curve[a] + curve[b]) / 2 for a, b in pairwise(steps))
    return area / (steps[-1] - steps[0])


def make_band(curves: Sequence[Curve]) -> list[dict[str, float]]:
    """Return mean, lowest and highest accuracy of several runs, at the steps at which all of them were evaluated."""
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return [
        {"step": step, "mean": statistics.mean(column), "low": min(column), "high": max(column)}
        for step in steps
        for column in [[curve[step] for curve in curves]]
    ]


def _read_evaluations(run: RunFolder) -> list[Row]:
    """Return the rows of the first evaluation set that does not select."""
    sets = sorted(run.evaluations, key=lambda name: name == run.selecting_set)
    if not sets:
        raise ConfigError(f"{run.path} has no evaluation in evaluation.jsonl; remove the folder to run it again")
    return run.evaluations[sets[0]]


def _check_problems(runs: Sequence[RunFolder]) -> None:
    """Refuse runs that were evaluated on different numbers of problems: they are no pairs."""
    counts: dict[Any, RunFolder] = {}
    for run in runs:
        counts.setdefault(_read_evaluations(run)[-1].get("n"), run)
    if len(counts) > 1:
        (first, run), (second, other), *_ = counts.items()
        raise ConfigError(
            f"{run.path} was evaluated on {quantify(first, 'held-out problem')} and {other.path} on {second:,}; the "
            f"pairs of a study share their problems"
        )


def _sum_seconds(run: RunFolder) -> float:
    return sum(row.get("seconds") or 0.0 for row in run.metrics)


def _summarize(values: Sequence[float]) -> dict[str, Any]:
    """Return the number of values, their mean, its 95 % interval, and their standard deviation."""
    return {
        "seeds": len(values),
        "mean": statistics.mean(values) if values else None,
        "interval": t_interval(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def _compare(differences: Mapping[str, Mapping[int, float]], control: str) -> list[dict[str, Any]]:
    """Return the comparison of each variant with the control, by the differences of the pairs with the same seed."""
    pairs = {name: [by_seed[seed] for seed in sorted(by_seed)] for name, by_seed in differences.items() if by_seed}
    ps = {name: exchange_p([[x] for x in values], [[0.0]] * len(values)) for name, values in pairs.items()}
    corrected = dict(zip(ps, holm([*ps.values()]), strict=True))
    rows = []
    for name, by_seed in differences.items():
        row: dict[str, Any] = {"variant": name, "differences": {str(s): by_seed[s] for s in sorted(by_seed)}}
        row |= _summarize(pairs.get(name, []))
        row |= {"p": ps.get(name), "p_holm": corrected.get(name), "smallest_p": smallest_p(len(by_seed))}
        row["smallest_p_holm"] = min(1.0, row["smallest_p"] * len(ps)) if by_seed else 1.0
        rows.append(row | {"conclusion": _conclude(row, control, len(ps))})
    return rows


def _conclude(row: Mapping[str, Any], control: str, comparisons: int) -> str:
    """Return in one sentence what the difference of a variant from the control shows."""
    name, seeds = row["variant"], row["seeds"]
    if not seeds:
        return f"{name} and {control} share no seed that has finished, so nothing can be concluded."
    interval = "" if row["interval"] is None else f" (95 % interval {' to '.join(map(_points, row['interval']))})"
    facts = f"{name} differs from {control} by {_points(row['mean'])} points{interval}, p = {row['p']:.3g}, "
    facts += f"{row['p_holm']:.3g} after Holm: "
    if row["p_holm"] <= LEVEL:
        return f"{facts}it is {'higher' if row['mean'] > 0 else 'lower'}, at the level of {100 * LEVEL:.0f} %."
    if row["smallest_p_holm"] > LEVEL:
        needed = count_needed_seeds(comparisons, LEVEL)
        return (
            f"{facts}no difference could be shown, because p cannot be below {row['smallest_p']:.3g} with "
            f"{quantify(seeds, 'seed')}; at least {needed} are needed for {quantify(comparisons, 'comparison')}."
        )
    return f"{facts}no difference is shown; those in the interval remain possible."


def render_study(name: str, data: Mapping[str, Any], changes: Mapping[str, str], picture: str | None = None) -> str:
    """Return the figures of `compare_variants` as Markdown; `changes` are the keys that each variant sets."""
    control, rows, comparisons = data["control"], [], []
    for variant, figures in data["variants"].items():
        values = ", ".join(f"{100 * run[data['metric']]:.1f}" for run in figures["runs"].values())
        seconds = "" if figures["seconds"] is None else format_duration(figures["seconds"])
        cells = [_percent(figures["mean"]), _interval(figures["interval"], _percent), _percent(figures["std"])]
        rows.append([variant, str(figures["seeds"]), *cells, values, seconds])
    for row in data["comparisons"]:
        ps = ["" if row[key] is None else f"{row[key]:.3g}" for key in ("p", "p_holm", "smallest_p")]
        cells = [_points(row["mean"]), _interval(row["interval"], _points)]
        comparisons.append([row["variant"], str(row["seeds"]), *cells, *ps])
    parts = [
        f"# Study {name}",
        f"Measured: {METRICS[data['metric']]}, in per cent. Intervals are Student's, of the mean over the seeds, at "
        "95 %.",
        aligned_table([["variant", "seeds", "mean", "interval", "std", "each seed", "time of a run"], *rows]),
        f"Against {control}, in points: the differences of the runs with the same seed, on the same held-out problems. "
        f"p is that of the exact two-sided sign-flip test over the seeds, and can be no smaller than the last column; "
        f"Holm's correction is for {quantify(len(comparisons), 'comparison')}.",
        aligned_table([["variant", "seeds", "difference", "interval", "p", "p (Holm)", "smallest p"], *comparisons]),
        "\n".join(f"- {row['conclusion']}" for row in data["comparisons"]),
        "What the variants set:",
        "\n".join(f"- {variant}: {f'`{text}`' if text else 'nothing'}" for variant, text in changes.items()),
    ]
    if picture:
        parts.append(f"![Mean of the seeds, and the band from the lowest to the highest]({picture})")
    return "\n\n".join(parts) + "\n"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _points(value: float | None) -> str:
    return "" if value is None else f"{round(100 * value, 1) + 0.0:+.1f}"


def _interval(interval: Sequence[float] | None, form: Any) -> str:
    return "" if interval is None else f"{form(interval[0])} to {form(interval[1])}"
