"""Read what a run folder holds on held-out problems beside the accuracies: answers, and the results of `evaluate`."""

from __future__ import annotations

from typing import Any

from grpo_core.report.run_reader import Row, RunFolder, finite_number, read_json, read_json_lines
from grpo_core.report.turns import cut_turns, place_turns
from grpo_core.schema import describe_eval_rows

MAX_ANSWERS = 10  # problems of a run whose answers are in the report
MAX_CHARACTERS = 2_000  # of a text in the report


def collect_answers(run: RunFolder) -> list[dict[str, Any]]:
    """Return one row for each of the first held-out problems: its prompt, and the answers before and after training.

    They are those of the first and of the last evaluation in evaluation_completions.jsonl. `steps` are the steps taken
    before the two evaluations; a run with one evaluation has no answer after it. `turns` are those of `place_turns`.
    """
    by_step: dict[int, dict[Any, Row]] = {}
    for row in read_json_lines(run.path / "evaluation_completions.jsonl"):
        if isinstance(row.get("step"), int):
            by_step.setdefault(row["step"], {})[_name_task(row)] = row
    if not by_step:
        return []
    steps = list(dict.fromkeys((min(by_step), max(by_step))))
    before, *after = (by_step[step] for step in steps)
    answers = []
    for task, row in list(before.items())[:MAX_ANSWERS]:
        pair = [row, *(rows[task] for rows in after if task in rows)]
        placed = [place_turns(answer) for answer in pair]
        answers.append(
            {
                "task": task,
                "prompt": _shorten(row.get("prompt")),
                "steps": steps[: len(pair)],
                "texts": [_shorten(text) for text, _ in placed],
                "turns": [cut_turns(turns, (text or "")[:MAX_CHARACTERS]) for text, turns in placed],
                "correct": [answer.get("correct") is True for answer in pair],
            }
        )
    return answers


def _name_task(row: Row) -> Any:
    """Return the row of a task in its data, after the name of its evaluation set if that has one."""
    return f"{row['set']}, {row.get('task')}" if row.get("set") else row.get("task")


def describe_source(run: RunFolder) -> str:
    """Return the data of the run's only evaluation set, and which of its rows it has; "" if there are several."""
    if any(run.evaluations):
        return ""
    values = [run.settings.get(f"data.{key}", "null") for key in ("path", "split", "eval_path", "eval_split")]
    path, split, *evaluation = (None if value == "null" else value.strip("'\"") for value in values)
    if path is None:
        return ""
    return "{} ({})".format(*describe_eval_rows(path, split or "train", *evaluation))


def describe_evaluations(run: RunFolder) -> dict[str, str]:
    """Return the figures of the `evaluate` command in the run folder, such as pass@8, title -> text."""
    rows = {}
    for file in sorted(run.path.glob("evaluate*/evaluate*.json")):
        result = read_json(file)
        policies = {name: result[name] for name in ("base", "policy") if isinstance(result.get(name), dict)}
        for name in policies.get("policy", {}):
            if "@" in name or name == "greedy":
                figures = {policy: _describe_figure(values.get(name)) for policy, values in policies.items()}
                text = ", ".join(f"{policy} {figure}" for policy, figure in figures.items() if figure)
                rows[f"{name} ({file.parent.name})"] = text
    return rows


def _describe_figure(figure: Any) -> str:
    """Return a share with its interval in per cent; "" where it is not a number."""
    if not isinstance(figure, dict):
        return ""
    value, low, high = (finite_number(figure.get(key)) for key in ("value", "ci_low", "ci_high"))
    if value is None:
        return ""
    interval = "" if low is None or high is None else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{100 * value:.1f} %{interval}"


def _shorten(text: Any) -> str:
    text = text if isinstance(text, str) else ""
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"
