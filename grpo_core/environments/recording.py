"""Keep the answers of environments in the run folder, so that a step that is taken again reads them.

Every rank has a file of its own, turns/rank-N.jsonl. A call of the sampler is written when it is complete: a line for
each time that answers came, with the number of the poll in which they came, and a last line with the number of polls.
The rows that share a decoding step depend on when answers come, so a step that is taken again with the same number of
ranks is the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo_core.batch import Task
from grpo_core.environments.interface import Answered
from grpo_core.sampling.turns import EndedTurn

Line = dict[str, Any]


@dataclass(frozen=True)
class RowAnswer:
    """The answer of the environment to the newest turn of a row, or why there is none."""

    row: int
    answered: Answered | None
    failure: str | None = None


@dataclass(frozen=True)
class Poll:
    """Answers that came in one poll."""

    number: int  # of the poll in its call of the sampler, from 0
    turns: str  # digest of all turns that were reported in the call until then
    answers: tuple[RowAnswer, ...]


class Recording:
    """The recorded calls of the sampler on one rank; without a folder none are kept."""

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self.path = None if folder is None else folder / f"rank-{rank}.jsonl"
        self.problem: str | None = None  # why the file could not be written, as a verb phrase
        self._calls: dict[str, tuple[Poll, ...]] | None = None

    def get(self, call: str) -> tuple[Poll, ...] | None:
        """Return the polls of a call that is complete, or None."""
        if self._calls is None:
            self._calls = {} if self.path is None else _read(self.path)
        return self._calls.get(call)

    def add(self, call: str, polls: Sequence[Poll], count: int) -> None:
        """Write a call that is complete, with `count` polls. A full disk does not end the run."""
        if self.path is None or self.problem:
            return
        lines = [{"call": call, "complete": count}]
        lines = [{"call": call, **asdict(poll)} for poll in polls] + lines
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # the first line is empty, which ends one that a crash has cut off
                file.write("\n" + "".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            self.problem = f"could not write its answers to {self.path}: {error.strerror or error}"


def make_call_key(tasks: Sequence[Task], group_size: int, max_new_tokens: int) -> str:
    """Return what identifies a call of the sampler: the keys and prompts of its tasks, and its size."""
    parts = [[list(map(str, task.seed)), task.index, task.prompt_ids] for task in tasks]
    return hashlib.sha256(json.dumps([parts, group_size, max_new_tokens]).encode()).hexdigest()[:32]


class TurnsDigest:
    """A digest of the turns that were reported, in whatever order the rows of one report stand."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, turn: EndedTurn) -> None:
        """Add a turn."""
        content = json.dumps([turn.row, list(turn.ids), turn.ended_by]).encode()
        self._sum += int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")

    def text(self) -> str:
        """Return the digest of all turns so far."""
        return f"{self._sum % 2**128:032x}"


def _read(path: Path) -> dict[str, tuple[Poll, ...]]:
    """Return the polls of complete calls."""
    complete: dict[str, tuple[Poll, ...]] = {}
    open_calls: dict[str, list[Poll]] = {}
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    with file:
        for line in file:
            try:
                row = json.loads(line)
                if "complete" in row:
                    complete[row["call"]] = tuple(open_calls.pop(row["call"], ()))
                    continue
                poll, polls = _read_poll(row), open_calls.setdefault(row["call"], [])
                if polls and polls[-1].number >= poll.number:  # a crash has cut off an earlier write
                    polls.clear()
                polls.append(poll)
            except (ValueError, LookupError, TypeError, AttributeError):
                continue
    return complete


def _read_poll(row: Line) -> Poll:
    answers = []
    for answer in row["answers"]:
        given = answer["answered"]
        if given is not None:
            texts = given["texts"]
            given = Answered(**{**given, "texts": None if texts is None else tuple(texts)})
        answers.append(RowAnswer(answer["row"], given, answer["failure"]))
    return Poll(row["number"], row["turns"], tuple(answers))
