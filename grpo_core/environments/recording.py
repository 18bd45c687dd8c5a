"""Keep the answers of environments in the run folder, so that a step that is taken again reads them.

Every rank has a file of its own for each step, turns/step-000012-rank-N.jsonl. A call of the sampler is written when it
is complete: a line for each time that answers came, with the number of the poll in which they came, and a last line
with the number of polls and the digest of the environment's code and settings. The rows that share a decoding step
depend on when answers come, so a step that is taken again with the same number of ranks is the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo_core.batch import Task
from grpo_core.environments.interface import Answered
from grpo_core.sampling.turns import EndedTurn

FOLDER = "turns"  # in the run folder
STEP = re.compile(r"step-(\d+)-rank-\d+\.jsonl")
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
    """The recorded calls of the sampler on one rank; without a folder none are kept.

    `source` is the digest of what answers; what was recorded with another one is not read.
    """

    def __init__(self, folder: Path | None, rank: int = 0, source: str = "") -> None:
        self.folder, self.rank, self.source = folder, rank, source
        self.problem: str | None = None  # why a file could not be written, as a verb phrase
        self._step: int | None = None  # whose calls were read
        self._calls: dict[str, tuple[str, tuple[Poll, ...]]] = {}

    def get(self, step: int, call: str) -> tuple[Poll, ...] | None:
        """Return the polls of a call that is complete and that the same source answered, or None."""
        source, polls = self._read_step(step).get(call, ("", None))
        return polls if source == self.source else None

    def is_outdated(self, step: int, call: str) -> bool:
        """Return whether another source answered a call that is complete."""
        calls = self._read_step(step)
        return call in calls and calls[call][0] != self.source

    def add(self, step: int, call: str, polls: Sequence[Poll], count: int) -> None:
        """Write a call that is complete, with `count` polls. A full disk does not end the run."""
        if self.folder is None or self.problem:
            return
        lines = [{"call": call, "complete": count, "source": self.source}]
        lines = [{"call": call, **asdict(poll)} for poll in polls] + lines
        path = self._path(self.folder, step)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                # the first line is empty, which ends one that a crash has cut off
                file.write("\n" + "".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            self.problem = f"could not write its answers to {path}: {error.strerror or error}"

    def _read_step(self, step: int) -> dict[str, tuple[str, tuple[Poll, ...]]]:
        if self.folder is not None and step != self._step:
            self._step, self._calls = step, _read(self._path(self.folder, step))
        return self._calls

    def _path(self, folder: Path, step: int) -> Path:
        return folder / f"step-{step:06d}-rank-{self.rank}.jsonl"


def drop_recordings(folder: Path, is_needed: Callable[[int], bool]) -> int:
    """Remove the recordings of steps that are not needed from `folder`, and return the number of these steps."""
    dropped = set()
    for path in folder.glob("step-*"):
        match = STEP.fullmatch(path.name)
        if match and not is_needed(int(match[1])):
            path.unlink(missing_ok=True)
            dropped.add(match[1])
    return len(dropped)


def make_call_key(tasks: Sequence[Task], group_size: int, max_new_tokens: int) -> str:
    """Return what identifies a call of the sampler: the keys, prompts and columns of its tasks, and its size."""
    parts = [[list(map(str, task.seed)), task.index, task.prompt_ids, task.columns] for task in tasks]
    content = json.dumps([parts, group_size, max_new_tokens], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


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


def _read(path: Path) -> dict[str, tuple[str, tuple[Poll, ...]]]:
    """Return the source and the polls of complete calls."""
    complete: dict[str, tuple[str, tuple[Poll, ...]]] = {}
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
                    complete[row["call"]] = str(row["source"]), tuple(open_calls.pop(row["call"], ()))
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
