"""The numbers at the top of a report: what a run came to, and in which keys configurations differ."""

from __future__ import annotations

import os
from typing import Any

from grpo_core.report.run_reader import Row, RunFolder

FINAL = 10  # steps whose mean is a run's final number
NUMBERS = (  # metric, what it is called, how it is written
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


def summary(run: RunFolder, completions: int) -> dict[str, str]:
    """What it is called -> what it was, in words; "" where there was nothing to measure."""
    before, after = accuracies(run)
    steps, planned = len(run.metrics), run.settings.get("trainer.num_steps", "")
    seconds = sum(row.get("seconds") or 0.0 for row in run.metrics)
    tokens = sum(row.get("tokens") or 0.0 for row in run.metrics)
    skipped = sum(row.get("skipped") or 0.0 for row in run.metrics)
    names = [run.settings.get(key, "") for key in ("model.path", "loss.name", "advantage.name")]
    model, *objective = ("" if name == "null" else name for name in names)
    return {
        "Accuracy before": in_words(before),
        "Accuracy after": in_words(after),
        "Steps": f"{steps:,} of {int(planned):,}" if planned.isdecimal() else f"{steps:,}",
        "Completions": f"{completions:,}" if completions else "",
        "Tokens": f"{tokens:,.0f}" if tokens else "",
        "Time": duration(seconds) if seconds else "",
        "Skipped updates": f"{skipped:,.0f}" if skipped else "",
        "Model": model,
        "Loss, advantage": "supervised" if run.is_supervised else ", ".join(filter(None, objective)),
        "Folder": os.path.abspath(run.path),
        "Notes": "; ".join(run.notes),
    }


def final(run: RunFolder) -> dict[str, str]:
    """Means of the last FINAL steps, or of all where there are fewer."""
    found = {}
    for metric, title, form in NUMBERS:
        values = [row[metric] for row in run.metrics[-FINAL:] if row.get(metric) is not None]
        if values and not (run.is_supervised and metric in ("clip_frac", "logprob_gap")):
            found[title] = form.format(sum(values) / len(values)).replace("%", " %")
    return found


def final_title(runs: list[RunFolder]) -> str:
    """What `final` is the mean of: a run of fewer than FINAL steps has all of them in it."""
    counts = {run.name: len(run.metrics) for run in runs if run.metrics}
    few = {name: count for name, count in counts.items() if count < FINAL}
    if not few:
        return f"Mean of the last {FINAL} steps"
    if len(set(counts.values())) == 1:
        count = next(iter(few.values()))
        return f"Mean of all {count} steps" if count > 1 else "The only step"
    told = ", ".join(f"{name} has {count}" for name, count in few.items())
    return f"Mean of the last {FINAL} steps, or of all where there are fewer: {told}"


def accuracies(run: RunFolder) -> tuple[Row | None, Row | None]:
    """The first and the last evaluation; the first is None where it was the only one or did not come first."""
    rows = [row for row in run.evaluation if row.get("accuracy") is not None]
    before = rows[0] if rows and rows[0]["step"] == 0 else None
    after = rows[-1] if rows and rows[-1] is not before else None
    return before, after


def in_words(row: Row | None) -> str:
    """75.8 % (71.9 to 79.3) after 30 steps; 379 of 500"""
    if row is None:
        return ""
    low, high = row.get("ci_low"), row.get("ci_high")
    interval = "" if low is None or high is None else f" ({100 * low:.1f} to {100 * high:.1f})"
    count = "" if row.get("n") is None or row.get("correct") is None else f"; {row['correct']:,.0f} of {row['n']:,.0f}"
    return f"{100 * row['accuracy']:.1f} %{interval} after {row['step']:,} steps{count}"


def duration(seconds: float) -> str:
    """
    >>> duration(3.2), duration(754), duration(40000)
    ('3.2 s', '12 min 34 s', '11 h 6 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def difference(runs: list[RunFolder]) -> list[tuple[str, list[str | None]]]:
    """The keys whose values are not the same in all runs, with each run's value; None where a run has no such key."""
    keys = {key: None for run in runs for key in run.settings}
    rows: list[tuple[str, list[Any]]] = [(key, [run.settings.get(key) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
