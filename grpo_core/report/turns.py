"""Find the turns of a completion in its text: which stretches the policy drew, and which an environment gave."""

from __future__ import annotations

from typing import Any

from grpo_core.report.run_reader import Row, finite_number

MAX_FOLDED = 80  # characters of an answer of tools that are read while it is folded
Stretch = list[Any]


def place_turns(row: Row) -> tuple[str | None, list[Stretch] | None]:
    """Return the text of a row of completions and its turns, [end drawn, end given, reward, ended_by].

    A turn with calls of tools also has their number, that of errors, and the beginning of the answer.
    The ends count UTF-16 units of the text, as JavaScript does. What is given has the markers of the chat template. If
    the turns do not stand in the text, which ends of decoded stretches may cause, the text is that of the turns with
    their answers. Without turns the second value is None.
    """
    text = row.get("text") if isinstance(row.get("text"), str) else None
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
        return text, None
    starts = [turn.get("start") for turn in turns]
    if text is None or not all(
        _stands_at(text, turn["text"], start) for turn, start in zip(turns, starts, strict=True)
    ):
        text, starts = "", []
        for turn in turns:
            starts.append(len(text))
            text += turn["text"] + _answer(turn)
    ends = [*starts[1:], len(text)]
    stretches = []
    for turn, start, end in zip(turns, starts, ends, strict=True):
        places = [_units(text[:place]) for place in (start + len(turn["text"]), end)]
        reward, calls, errors = (finite_number(turn.get(name)) for name in ("reward", "calls", "errors"))
        ended_by = turn.get("ended_by") if isinstance(turn.get("ended_by"), str) else None
        tools = [calls, errors, _answer(turn)[:MAX_FOLDED]] if calls else []
        stretches.append([*places, reward, ended_by, *tools])
    return text, stretches


def cut_turns(stretches: list[Stretch] | None, text: str) -> list[Stretch] | None:
    """Return the turns of a text that was cut to `text`."""
    if stretches is None:
        return None
    last, cut = _units(text), []
    for drawn, given, *rest in stretches:
        cut.append([min(drawn, last), min(given, last), *rest])
        if given >= last:
            break
    return cut


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("text"), str)


def _stands_at(text: str, part: str, start: Any) -> bool:
    return isinstance(start, int) and start >= 0 and text.startswith(part, start)


def _answer(turn: dict[str, Any]) -> str:
    return turn["answer"] if isinstance(turn.get("answer"), str) else ""


def _units(text: str) -> int:
    """Return the length of a text in UTF-16 units."""
    return len(text) + sum(character > "\uffff" for character in text)
