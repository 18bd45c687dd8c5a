"""Choose the completions and the dumped tokens of a run that go into its report, within a budget of bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_core.report.run_reader import (
    Row,
    RunFolder,
    find_batches,
    finite_number,
    locate_completions,
    read_batch,
    read_rows,
)
from grpo_core.report.turns import cut_turns, place_turns

MAX_CHARACTERS = 100_000  # of one prompt or completion; the rest is cut off
ROW_OVERHEAD = 20  # bytes of a row's commas, brackets and places in other tables
MIN_DENSITY = 0.05  # bytes in the report per byte of completions.jsonl
COLUMNS = (
    "step", "task", "sample", "prompt", "text", "rewards", "reward", "shaped_reward",
    "advantage", "length", "truncated", "turns", "given_tokens", "failure", "tokens",
)  # fmt: skip
TOKEN_COLUMNS = ("tokens", "logprobs", "ratio", "turns", "advantages")
Key = tuple[Any, Any, Any]  # step, task, sample


def to_json(value: Any) -> str:
    r"""Return JSON for a script element: every `<` is \u003c, and an unpaired surrogate is a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return text.encode(errors="replace").decode()


def sample_completions(run: RunFolder, budget: int) -> dict[str, Any]:
    """Return completions of the run in about `budget` bytes of JSON, and the number of all completions.

    Whole steps are chosen: the last, the first, those of dumped batches, then evenly spaced ones. Of a step that is too
    large alone, the first completions are taken. A third of the budget is reserved for the tokens of dumped batches, if
    there are any.

    Returns total and total_steps; columns and rows (lists in that order; `prompt` and `tokens` are indices into prompts
    and tokens, `rewards` is in the order of names, `turns` are those of `place_turns`, or None); correct_by, the reward
    whose 1 means correct, or None.
    """
    dumps = find_batches(run.path)
    tokens, keys = _read_tokens(dumps, budget // 3)
    source = run.path / "completions.jsonl"
    places = locate_completions(source)
    dumped_steps = {key[0] for key in keys}
    rows = list(_select_rows(source, places, dumped_steps, budget - _json_size(tokens) if tokens else budget))
    if not places:
        rows = [{**tokens[i], "step": key[0], "task": key[1], "sample": key[2]} for key, i in keys.items()]
    rows.sort(key=lambda row: row["step"])
    names = list({name: None for row in rows for name in _rewards(row)})
    prompts: dict[str, int] = {}
    table = [_table_row(row, names, prompts, keys) for row in rows]
    correct_by = [name for name in (run.settings.get("evaluation.reward"), "correct_answer") if name in names]
    return {
        "total": sum(map(len, places.values())) or len(rows),
        "total_steps": len(places) or len({row["step"] for row in rows}),
        "columns": COLUMNS,
        "names": names,
        "correct_by": correct_by[0] if correct_by else None,
        "prompts": list(prompts),
        "rows": table,
        "tokens": [{name: row[name] for name in TOKEN_COLUMNS if name in row} for row in tokens],
    }


def space_evenly(items: Sequence[int], count: int) -> list[int]:
    """Return `count` of the items, evenly spaced from the first to the last.

    >>> space_evenly(range(10), 4)
    [0, 3, 6, 9]
    """
    if count >= len(items):
        return list(items)
    if count <= 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def order_by_coverage(items: Sequence[int]) -> list[int]:
    """Return the items reordered so that every beginning of the list is spread over their whole range.

    The last comes first, then the first, then those that halve the gaps.
    """
    bits = max(1, len(items).bit_length())
    middle = sorted(range(1, len(items) - 1), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))  # van der Corput sequence
    ends = [items[-1], items[0]] if len(items) > 1 else list(items)
    return [*ends, *(items[i] for i in middle)]


def _select_rows(
    source: Path, places: dict[int, list[tuple[int, int]]], preferred: set[int], budget: int
) -> Iterator[Row]:
    """Yield the rows of the steps that fit into `budget` bytes; those of `preferred` come before others."""
    steps = sorted(places)
    if not steps:
        return
    raw_sizes = {step: sum(size for _, size in rows) for step, rows in places.items()}
    last = [_prepare(row) for row in read_rows(source, places[steps[-1]])]
    density = max(MIN_DENSITY, _table_size(last) / raw_sizes[steps[-1]])
    count = max(2, int(len(steps) * budget / (sum(raw_sizes.values()) * density)))
    order = order_by_coverage(space_evenly(steps, count))
    order = list(dict.fromkeys([*order[:2], *sorted(preferred & set(steps)), *order[2:]]))
    left = budget
    for place, step in enumerate(order):
        rows = last if step == steps[-1] else [_prepare(row) for row in read_rows(source, places[step])]
        if place > 1 and _table_size(rows) > left:
            return
        share = left // 2 if place == 0 and len(order) > 1 else left  # the first step needs its part too
        prompts = set()
        for row in rows:
            size = _json_size(_table_row(row, list(_rewards(row)), {}, {})) + ROW_OVERHEAD
            size += 0 if row.get("prompt") in prompts else _json_size(row.get("prompt"))
            if size > share:
                break
            prompts.add(row.get("prompt"))
            share, left = share - size, left - size
            yield row


def _table_size(rows: list[Row]) -> int:
    """Return the bytes that the rows take in the report, with each prompt once."""
    prompts: dict[str, int] = {}
    sizes = [_json_size(_table_row(row, list(_rewards(row)), prompts, {})) + ROW_OVERHEAD for row in rows]
    return sum(sizes) + _json_size(list(prompts))


def _json_size(value: Any) -> int:
    return len(to_json(value).encode())


def _table_row(row: Row, names: list[str], prompts: dict[str, int], keys: dict[Key, int]) -> list[Any]:
    """Return a completion in the order of COLUMNS; a new prompt is added to `prompts`."""
    rewards, prompt = _rewards(row), row.get("prompt")
    numbers = {name: _rounded(row.get(name)) for name in ("reward", "shaped_reward", "advantage", "length")}
    return [
        row.get("step"),
        *(row.get(name) if isinstance(row.get(name), (int, str)) else None for name in ("task", "sample")),
        prompts.setdefault(prompt, len(prompts)) if isinstance(prompt, str) else None,
        row.get("text") if isinstance(row.get("text"), str) else "".join(map(str, _list(row, "tokens"))),
        [_rounded(rewards.get(name)) for name in names],
        *numbers.values(),
        row.get("truncated") if isinstance(row.get("truncated"), bool) else None,
        row.get("stretches"),
        finite_number(row.get("given_tokens")),
        row.get("environment_failure") if isinstance(row.get("environment_failure"), str) else None,
        keys.get((row.get("step"), row.get("task"), row.get("sample"))) if keys else None,
    ]


def _prepare(row: Row) -> Row:
    """Return the row with its turns as `stretches`, and its prompt and text cut to MAX_CHARACTERS."""
    text, stretches = place_turns(row)
    row = row | {"text": text, "stretches": cut_turns(stretches, (text or "")[:MAX_CHARACTERS])}
    cut = {
        name: f"{row[name][:MAX_CHARACTERS]}\n… {len(row[name]) - MAX_CHARACTERS:,} more characters"
        for name in ("prompt", "text")
        if isinstance(row.get(name), str) and len(row[name]) > MAX_CHARACTERS
    }
    return row | cut


def _rewards(row: Row) -> dict[str, Any]:
    return row["rewards"] if isinstance(row.get("rewards"), dict) else {}


def _rounded(value: Any) -> float | None:
    value = finite_number(value)
    return round(value, 5) if isinstance(value, float) else value


def _read_tokens(dumps: dict[int, list[Path]], budget: int) -> tuple[list[Row], dict[Key, int]]:
    """Return dumped completions with their tokens, within `budget` bytes, and the index of each by its key."""
    tokens: list[Row] = []
    keys: dict[Key, int] = {}
    left = budget
    for step in order_by_coverage(sorted(dumps)):
        for completion in (completion for file in dumps[step] for completion in read_batch(file)):
            key = (step, completion.get("task"), completion.get("sample"))
            row = _token_row(completion)
            size = _json_size(row)
            if size > left:
                return tokens, keys
            if row["tokens"] and all(isinstance(part, (int, str)) for part in key) and key not in keys:
                keys[key] = len(tokens)
                tokens.append(row)
                left -= size
    return tokens, keys


def _token_row(completion: Row) -> Row:
    """Return the tokens of a dumped completion; log-probs are rounded to 0.001 and ratios to 0.0001, as displayed.

    Completions of several turns also have the number of each token's turn, -1 for a given token.
    """
    texts = [text if isinstance(text, str) else "\ufffd" for text in _list(completion, "tokens")]
    row: Row = {"tokens": texts}
    for name, digits in (("logprobs", 3), ("ratio", 4), ("turns", 0), ("advantages", 4)):
        if name not in completion and name in ("turns", "advantages"):
            continue
        numbers = [finite_number(value) for value in _list(completion, name)]
        row[name] = [None if value is None else round(value, digits) for value in numbers][: len(texts)]
    length = len(texts) - row.get("turns", []).count(-1)
    return {**row, "advantage": _rounded(completion.get("advantage")), "length": length}


def _list(row: Row, name: str) -> list[Any]:
    return row[name] if isinstance(row.get(name), list) else []
