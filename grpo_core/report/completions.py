"""Which of a run's completions, and which of its dumped tokens, go into a report that stays small."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_core.report.run_reader import Row, RunFolder, completion_places, dumped_steps, number, read_batch, rows_at

LONGEST = 100_000  # characters of one text
COLUMNS = (
    "step", "task", "sample", "prompt", "text", "rewards", "reward", "shaped_reward",
    "advantage", "length", "truncated", "tokens",
)  # fmt: skip
Key = tuple[Any, Any, Any]  # step, task, sample


def as_json(value: Any) -> str:
    r"""JSON that can stand in a script element: every `<` is \u003c, and half a surrogate pair is a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return text.encode(errors="replace").decode()


def sample(run: RunFolder, budget: int) -> dict[str, Any]:
    """The run's completions in about `budget` bytes of JSON, and how many there are in all.

    Whole steps: the last, the first, those of dumped batches, then evenly spaced ones; where a step alone is too large,
    its first completions. A third of the budget is kept for the tokens of dumped batches, if there are any.

    Returns total and total_steps; columns and rows (lists in that order; `prompt` and `tokens` are places in prompts
    and tokens, `rewards` is in the order of names); correct_by, the reward whose 1 means correct, or None.
    """
    dumps = dumped_steps(run.path)
    tokens, keys = _dumped(dumps, budget // 3)
    places = completion_places(run.path / "completions.jsonl")
    source = run.path / "completions.jsonl"
    kept = list(_within(source, places, {key[0] for key in keys}, budget - _size(tokens) if tokens else budget))
    if not places:
        kept = [{**tokens[i], "step": key[0], "task": key[1], "sample": key[2]} for key, i in keys.items()]
    kept.sort(key=lambda row: row["step"])
    names = list({name: None for row in kept for name in _rewards(row)})
    prompts: dict[str, int] = {}
    rows = [_row(row, names, prompts, keys) for row in kept]
    return {
        "total": sum(map(len, places.values())) or len(kept),
        "total_steps": len(places) or len({row["step"] for row in kept}),
        "columns": COLUMNS,
        "names": names,
        "correct_by": next((n for n in (run.settings.get("evaluation.reward"), "correct_answer") if n in names), None),
        "prompts": list(prompts),
        "rows": rows,
        "tokens": [{name: one[name] for name in ("tokens", "logprobs", "ratio")} for one in tokens],
    }


def spaced(items: Sequence[int], count: int) -> list[int]:
    """`count` of the items, evenly spaced from the first to the last.

    >>> spaced(range(10), 4)
    [0, 3, 6, 9]
    """
    if count >= len(items):
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)] if count > 1 else [items[-1]]


def inwards(items: Sequence[int]) -> list[int]:
    """The last, the first, then what halves the gaps, so that the beginning of the list is spread over all of it."""
    bits = max(1, len(items).bit_length())
    middle = sorted(range(1, len(items) - 1), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    ends = [items[-1], items[0]] if len(items) > 1 else list(items)
    return [*ends, *(items[i] for i in middle)]


def _within(source: Path, places: dict[int, list[tuple[int, int]]], wanted: set[int], budget: int) -> Iterator[Row]:
    """The rows of the steps that fit, those of `wanted` before others."""
    steps = sorted(places)
    if not steps:
        return
    raw = {step: sum(size for _, size in rows) for step, rows in places.items()}
    last = [_short(row) for row in rows_at(source, places[steps[-1]])]
    density = max(0.05, _table_size(last) / raw[steps[-1]])  # bytes in the report a byte of the file
    count = max(2, int(len(steps) * budget / (sum(raw.values()) * density)))
    order = inwards(spaced(steps, count))
    order = list(dict.fromkeys([*order[:2], *sorted(wanted & set(steps)), *order[2:]]))
    left = budget
    for place, step in enumerate(order):
        rows = last if step == steps[-1] else [_short(row) for row in rows_at(source, places[step])]
        if place > 1 and _table_size(rows) > left:
            return
        share, seen = (left // 2 if place == 0 and len(order) > 1 else left), set()
        for row in rows:
            size = _size(_row(row, list(_rewards(row)), {}, {})) + 20
            size += 0 if row.get("prompt") in seen else _size(row.get("prompt"))
            if size > share:
                break
            seen.add(row.get("prompt"))
            share, left = share - size, left - size
            yield row


def _table_size(rows: list[Row]) -> int:
    prompts: dict[str, int] = {}
    return sum(_size(_row(row, list(_rewards(row)), prompts, {})) + 20 for row in rows) + _size(list(prompts))


def _size(value: Any) -> int:
    return len(as_json(value).encode())


def _row(row: Row, names: list[str], prompts: dict[str, int], keys: dict[Key, int]) -> list[Any]:
    rewards, prompt = _rewards(row), row.get("prompt")
    numbers = {name: _number(row.get(name)) for name in ("reward", "shaped_reward", "advantage", "length")}
    place = prompts.setdefault(prompt, len(prompts)) if isinstance(prompt, str) else None
    return [
        row.get("step"),
        *(row.get(name) if isinstance(row.get(name), (int, str)) else None for name in ("task", "sample")),
        place,
        row.get("text") if isinstance(row.get("text"), str) else "".join(map(str, _list(row, "tokens"))),
        [_number(rewards.get(name)) for name in names],
        *numbers.values(),
        row.get("truncated") if isinstance(row.get("truncated"), bool) else None,
        keys.get((row.get("step"), row.get("task"), row.get("sample"))) if keys else None,
    ]


def _short(row: Row) -> Row:
    cut = {
        name: f"{row[name][:LONGEST]}\n… {len(row[name]) - LONGEST:,} more characters"
        for name in ("prompt", "text")
        if isinstance(row.get(name), str) and len(row[name]) > LONGEST
    }
    return row | cut


def _rewards(row: Row) -> dict[str, Any]:
    return row["rewards"] if isinstance(row.get("rewards"), dict) else {}


def _number(value: Any) -> float | None:
    value = number(value)
    return round(value, 5) if isinstance(value, float) else value


def _dumped(dumps: dict[int, list[Path]], budget: int) -> tuple[list[Row], dict[Key, int]]:
    """Completions with their tokens, of the steps that fit, and where each completion's are."""
    tokens, keys, left = [], {}, budget
    for step in inwards(sorted(dumps)):
        for one in (one for file in dumps[step] for one in read_batch(file)):
            key = (step, one.get("task"), one.get("sample"))
            row = _tokens(one)
            size = _size(row)
            if size > left:
                return tokens, keys
            if row["tokens"] and all(isinstance(part, (int, str)) for part in key) and key not in keys:
                keys[key] = len(tokens)
                tokens.append(row)
                left -= size
    return tokens, keys


def _tokens(one: Row) -> Row:
    """Log-probs to 0.001 and ratios to 0.0001: what can be seen."""
    texts = [text if isinstance(text, str) else "\ufffd" for text in _list(one, "tokens")]
    numbers = {name: [number(v) for v in _list(one, name)] for name in ("logprobs", "ratio")}
    rounded = {
        name: [None if v is None else round(v, digits) for v in numbers[name]][: len(texts)]
        for name, digits in (("logprobs", 3), ("ratio", 4))
    }
    return {"tokens": texts, **rounded, "advantage": _number(one.get("advantage")), "length": len(texts)}


def _list(one: Row, name: str) -> list[Any]:
    return one[name] if isinstance(one.get(name), list) else []
