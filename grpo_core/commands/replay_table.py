"""The result of `replay` as text for a terminal."""

from __future__ import annotations

from typing import Any

from grpo_core.counts import quantify

TOP_TOKENS = 8  # printed of each objective
MAX_NAME_WIDTH = 40  # characters of an objective's name
SAME_GRADIENT = 1e-5  # distance of cosine and norm ratio from 1, up to which two gradients count as equal


def format_table(summary: dict[str, Any]) -> str:
    """Return the summary of `replay` as text.

    The first table compares the objectives. Then each objective has a table of its classes of tokens and one of the
    tokens with the greatest |dL/dl|.
    """
    blocks = [_format_head(summary), _format_objectives(summary)]
    for objective in summary["objectives"]:
        blocks.append(_format_classes(objective))
        blocks.append(_format_heaviest_tokens(objective, summary["completions"]))
    return "\n\n".join(blocks)


def _format_head(summary: dict[str, Any]) -> str:
    """Return the batch, its weights, and the reasons why numbers may differ from metrics.jsonl."""
    tokens = sum(len(completion["tokens"]) for completion in summary["completions"])
    steps, gap = summary["optimizer_steps"], summary["logprob_gap_max"]
    lines = [
        f"batch: {summary['run']}, step {summary['step'] + 1}, {quantify(len(summary['completions']), 'completion')}, "
        f"{quantify(tokens, 'token')}, sampled by {quantify(summary['ranks'], 'process', 'processes')}",
        f"weights: {summary['weights']}",
    ]
    if summary["ratio_is_1"]:
        lines.append(
            f"The batch is replayed as one minibatch. Every ratio is 1; log-probs differ from the saved ones by "
            f"{gap:.2g} at most."
        )
    else:
        lines.append(
            f"The batch is replayed as one minibatch. Ratios are relative to the saved log-probs "
            f"(|l - l_old| is {gap:.2g} at most). "
            f"metrics.jsonl has the numbers for the weights before the step."
        )
    if steps > 1:
        lines.append(
            f"The run took {quantify(steps, 'optimizer step')} on this batch, each on one minibatch; metrics.jsonl "
            "has their means."
        )
    if summary["dropout"]:
        lines.append(
            f"The run trained with lora.dropout {summary['dropout']:g}; the replay has no dropout, so its numbers "
            f"differ from metrics.jsonl."
        )
    return "\n".join(lines)


def _format_objectives(summary: dict[str, Any]) -> str:
    row, objectives = summary["row"], summary["objectives"]
    row_name = "in metrics.jsonl"
    width = max(len(row_name), *(len(_shorten_name(objective)) for objective in objectives))
    lines = [f"{'objective':<{width}}  {'loss':>12}  {'grad_norm':>12}  {'cosine':>9}  {'norm ratio':>10}"]
    for objective in objectives:
        numbers = f"{objective['loss']:>12.5g}  {objective['grad_norm']:>12.5g}  {_cell(objective['cosine']):>9}"
        lines.append(f"{_shorten_name(objective):<{width}}  {numbers}  {_cell(objective['norm_ratio']):>10}")
    lines.append(f"{row_name:<{width}}  {_cell(row.get('loss'), 5):>12}  {_cell(row.get('grad_norm'), 5):>12}")
    lines.append("cosine and norm ratio: of the gradient, relative to the run's own objective")
    return "\n".join([*lines, *_describe_equal_gradients(summary)])


def _describe_equal_gradients(summary: dict[str, Any]) -> list[str]:
    """Return a sentence that names the other objectives whose gradient equals the run's own, and why."""
    others = summary["objectives"][1:]
    equal = [_shorten_name(objective) for objective in others if _has_same_gradient(objective)]
    if not equal:
        return []
    sentence = f"The gradient of {', '.join(equal)} is the run's own on this batch"
    if not summary["ratio_is_1"]:
        return [f"{sentence}."]
    return [
        f"{sentence}: every ratio is 1 before the first optimizer step, where losses that differ in the ratio or in "
        f"its clipping agree. --model with later weights of the run shows the difference."
    ]


def _has_same_gradient(objective: dict[str, Any]) -> bool:
    """Return whether cosine and norm ratio are 1 up to rounding in float32."""
    numbers = (objective["cosine"], objective["norm_ratio"])
    return all(value is not None and abs(value - 1) < SAME_GRADIENT for value in numbers)


def _format_classes(objective: dict[str, Any]) -> str:
    lines = [f"{_shorten_name(objective)}\n  {'class':<24}  {'tokens':>8}  {'of |dL/dl|':>10}  {'of gradient':>11}"]
    for classes in objective["classes"].values():
        for label, numbers in classes.items():
            cells = f"{numbers['tokens']:>8,}  {_cell(numbers['share']):>10}  {_cell(numbers['gradient_share']):>11}"
            lines.append(f"  {label:<24}  {cells}")
        lines.append("")
    lines[-1] = "  of |dL/dl|: share of sum |dL/dl|; of gradient: share of the gradient, <g_class, g> / |g|^2"
    return "\n".join(lines)


def _format_heaviest_tokens(objective: dict[str, Any], completions: list[dict[str, Any]]) -> str:
    """Return the tokens with the greatest |dL/dl|, with their text."""
    tokens = [  # sorted by size, then by place
        (-abs(weight), i, t, weight)
        for i, row in enumerate(objective["tokens"]["weight"])
        for t, weight in enumerate(row)
        if weight
    ]
    lines = [f"  {'dL/dl':>11}  {'A':>8}  {'task':>6}  {'sample':>6}  {'place':>5}  token"]
    for _, i, t, weight in sorted(tokens)[:TOP_TOKENS]:
        completion, advantage = completions[i], objective["advantages"][i]
        place = f"{completion['task']:>6}  {completion['sample']:>6}  {t:>5}"
        lines.append(f"  {weight:>11.4g}  {advantage:>8.3g}  {place}  {completion['tokens'][t]!r}")
    return "\n".join(lines)


def _shorten_name(objective: dict[str, Any]) -> str:
    name = objective["name"]
    return name if len(name) <= MAX_NAME_WIDTH else f"{name[: MAX_NAME_WIDTH - 1]}…"


def _cell(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"
