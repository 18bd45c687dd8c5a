"""Compute the numbers at the top of a report, and the keys in which configurations differ."""

from __future__ import annotations

import os
from typing import Any

from grpo_core.counts import ROUNDING, quantify
from grpo_core.report.eval_sets import label_set
from grpo_core.report.held_out import describe_evaluations, describe_source
from grpo_core.report.run_reader import Row, RunFolder

AVERAGED_STEPS = 10  # last steps whose mean is reported as a final number
FINAL_METRICS = (  # metric, title, format
    ("reward", "Reward", "{:.4g}"),
    ("loss", "Loss", "{:.4g}"),
    ("kl", "KL, nats per token", "{:.4g}"),
    ("entropy", "Entropy, nats per token", "{:.4g}"),
    ("length", "Length, tokens", "{:.1f}"),
    ("truncated", "Truncated", "{:.1%}"),
    ("tied_groups", "Tied groups", "{:.1%}"),
    ("clip_frac", "Clip fraction", "{:.2%}"),
    ("logprob_gap", "Sampler to trainer, nats", "{:.2g}"),
    ("grad_norm", "Gradient norm", "{:.3g}"),
    ("tokens_per_second", "Tokens per second", "{:,.0f}"),
)


def summarize_run(run: RunFolder, completions: int) -> dict[str, str]:
    """Return the rows of the summary, title -> text; "" for what was not measured.

    `completions` is the number of completions that the run has logged.
    """
    accuracies = {}
    for name in run.evaluations or [""]:
        label = f", {label_set(name, run.selecting_set)}" if name else ""
        before, after = find_accuracies(run, name)
        accuracies |= {f"Accuracy before{label}": describe_accuracy(before)}
        accuracies |= {f"Accuracy after{label}": describe_accuracy(after)}
    steps, planned = len(run.metrics), run.settings.get("trainer.num_steps", "")
    seconds = sum(row.get("seconds") or 0.0 for row in run.metrics)
    tokens = sum(row.get("tokens") or 0.0 for row in run.metrics)
    skipped = sum(row.get("skipped") or 0.0 for row in run.metrics)
    names = [run.settings.get(key, "") for key in ("model.path", "loss.name", "advantage.name")]
    model, *objective = ("" if name == "null" else name for name in names)
    return {
        **accuracies,
        "Evaluated on": describe_source(run) if any(accuracies.values()) else "",
        **describe_evaluations(run),
        "Steps": f"{steps:,} of {int(planned):,}" if planned.isdecimal() else f"{steps:,}",
        "Completions": f"{completions:,}" if completions else "",
        "Tokens": f"{tokens:,.0f}" if tokens else "",
        "Time": format_duration(seconds) if seconds else "",
        "Skipped updates": f"{skipped:,.0f}" if skipped else "",
        "Model": model,
        "Loss, advantage": "supervised" if run.is_supervised else ", ".join(filter(None, objective)),
        "Folder": os.path.abspath(run.path),
        "Notes": "; ".join(run.notes),
    }


def average_last_steps(run: RunFolder) -> dict[str, str]:
    """Return the means over the last AVERAGED_STEPS steps, or over all of a shorter run, title -> text."""
    means = {}
    for metric, title, form in FINAL_METRICS:
        values = [row[metric] for row in run.metrics[-AVERAGED_STEPS:] if row.get(metric) is not None]
        if values and not (run.is_supervised and metric in ("clip_frac", "logprob_gap")):
            mean = sum(values) / len(values)
            rounded = 0.0 if abs(mean) < ROUNDING and metric != "logprob_gap" else mean
            means[title] = form.format(rounded).replace("%", " %")
    return means


def title_means(runs: list[RunFolder]) -> str:
    """Return the title of the table of `average_last_steps`, which says over how many steps the means are taken."""
    counts = {run.name: len(run.metrics) for run in runs if run.metrics}
    short_runs = {name: count for name, count in counts.items() if count < AVERAGED_STEPS}
    if not short_runs:
        return f"Mean of the last {AVERAGED_STEPS} steps"
    if len(set(counts.values())) == 1:
        count = next(iter(short_runs.values()))
        return f"Mean of all {quantify(count, 'step')}" if count > 1 else "The only step"
    exceptions = ", ".join(f"{name} has {count}" for name, count in short_runs.items())
    return f"Mean of the last {AVERAGED_STEPS} steps, or of all where there are fewer: {exceptions}"


def find_accuracies(run: RunFolder, name: str = "") -> tuple[Row | None, Row | None]:
    """Return the evaluation of a set before the first step and the last one after it, each None where there is none."""
    rows = run.evaluations.get(name, [])
    before = rows[0] if rows and rows[0]["step"] == 0 else None
    after = rows[-1] if rows and rows[-1] is not before else None
    return before, after


def describe_accuracy(row: Row | None) -> str:
    """Return a row of evaluation.jsonl as text: 75.8 % (71.9 to 79.3) after 30 steps; 379 of 500."""
    if row is None:
        return ""
    low, high = row.get("ci_low"), row.get("ci_high")
    interval = "" if low is None or high is None else f" ({100 * low:.1f} to {100 * high:.1f})"
    count = "" if row.get("n") is None or row.get("correct") is None else f"; {row['correct']:,.0f} of {row['n']:,.0f}"
    return f"{100 * row['accuracy']:.1f} %{interval} after {quantify(row['step'], 'step')}{count}"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> format_duration(3.2), format_duration(754), format_duration(40000)
    ('3.2 s', '12 min 34 s', '11 h 6 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def compare_settings(runs: list[RunFolder]) -> list[tuple[str, list[str | None]]]:
    """Return the keys whose values differ between the runs, with each run's value, None where it has no such key."""
    keys = {key: None for run in runs for key in run.settings}
    rows: list[tuple[str, list[Any]]] = [(key, [run.settings.get(key) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
