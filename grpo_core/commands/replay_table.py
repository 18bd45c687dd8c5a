"""What `replay` found, for a terminal."""

from __future__ import annotations

from typing import Any

TOP = 8  # tokens shown of each objective
WIDEST = 40  # characters of an objective's name


def table(summary: dict[str, Any]) -> str:
    """`replay.summarise` in words: the objectives side by side, then for each its classes and its heaviest tokens."""
    blocks = [_head(summary), _objectives(summary)]
    blocks += [f"{_classes(one)}\n\n{_heaviest(one, summary['completions'])}" for one in summary["objectives"]]
    return "\n\n".join(blocks)


def _head(summary: dict[str, Any]) -> str:
    tokens = sum(len(one["tokens"]) for one in summary["completions"])
    steps, gap = summary["optimizer_steps"], summary["logprob_gap_max"]
    lines = [
        f"{summary['run']}, step {summary['step']}: {len(summary['completions'])} completions, {tokens:,} tokens, "
        f"ranks: {summary['ranks']}",
        f"weights: {summary['weights']}",
    ]
    if summary["ratio_is_1"]:
        lines.append(f"the whole batch is one minibatch, and every ratio is 1; log-probs as dumped within {gap:.2g}")
    else:
        lines.append(
            f"the whole batch is one minibatch, with ratios against the dumped log-probs (|l - l_old| up to {gap:.2g});"
            f" the row is of the weights before the step"
        )
    if steps > 1:
        lines.append(f"the run took {steps} optimizer steps on this batch, each on a part: the row's numbers are means")
    if summary["dropout"]:
        lines.append(f"the run's update had lora.dropout {summary['dropout']:g}, this has none: the row differs")
    return "\n".join(lines)


def _objectives(summary: dict[str, Any]) -> str:
    row, wide = summary["row"], max(len("objective"), *(len(_name(one)) for one in summary["objectives"]))
    lines = [f"{'objective':<{wide}}  {'loss':>12}  {'grad_norm':>12}  {'cosine':>9}  {'norm ratio':>10}"]
    for one in summary["objectives"]:
        numbers = f"{one['loss']:>12.5g}  {one['grad_norm']:>12.5g}  {_cell(one['cosine']):>9}"
        lines.append(f"{_name(one):<{wide}}  {numbers}  {_cell(one['norm_ratio']):>10}")
    lines.append(f"{'in the row':<{wide}}  {_cell(row.get('loss'), 5):>12}  {_cell(row.get('grad_norm'), 5):>12}")
    return "\n".join(lines)


def _classes(one: dict[str, Any]) -> str:
    lines = [f"{_name(one)}\n  {'class':<24}  {'tokens':>8}  {'share':>9}  {'pull':>9}"]
    for labels in one["classes"].values():
        for label, found in labels.items():
            numbers = f"{found['tokens']:>8,}  {_cell(found['share']):>9}  {_cell(found['pull']):>9}"
            lines.append(f"  {label:<24}  {numbers}")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n  share: of sum |dL/dl|; pull: <g_class, g> / |g|^2"


def _heaviest(one: dict[str, Any], completions: list[dict[str, Any]]) -> str:
    """The tokens of the greatest |dL/dl|, with their text."""
    places = [(abs(x), x, i, t) for i, row in enumerate(one["tokens"]["weight"]) for t, x in enumerate(row) if x]
    lines = [f"  {'dL/dl':>11}  {'A':>8}  {'task':>6}  {'sample':>6}  {'place':>5}  token"]
    for _, weight, i, t in sorted(places, key=lambda place: (-place[0], place[2:]))[:TOP]:
        said = completions[i]
        where = f"{said['task']:>6}  {said['sample']:>6}  {t:>5}"
        lines.append(f"  {weight:>11.4g}  {one['advantages'][i]:>8.3g}  {where}  {said['tokens'][t]!r}")
    return "\n".join(lines)


def _name(one: dict[str, Any]) -> str:
    return one["name"] if len(one["name"]) <= WIDEST else f"{one['name'][: WIDEST - 1]}…"


def _cell(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"
