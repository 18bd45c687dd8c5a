"""Keep the answers of a judge in the run folder, so that a step that is taken again reads them.

Every rank appends to a file of its own and reads those of all ranks, because a resumed run may have other ranks. A line
is {"question": digest of the request, "answer": text, "step": step of the run}. A line that a crash has cut off is
ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class KeptAnswers:
    """The answers in the folder `folder`, by question; with None they are kept in memory alone."""

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self.problem: str | None = None  # why the file could not be written, as a verb phrase
        self.step: int | None = None  # of the run, in which answers are added
        self._answers: dict[str, str] | None = None
        self._file: TextIO | None = None

    def get(self, question: str) -> str | None:
        """Return the answer to a question, or None."""
        if self._answers is None:
            self._answers = self._read()
        return self._answers.get(question)

    def add(self, question: str, answer: str) -> None:
        """Keep an answer. A full disk ends neither the run nor the keeping in memory."""
        if self._answers is None:
            self._answers = self._read()
        self._answers[question] = answer
        if self.folder is None or self.problem:
            return
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"rank-{self.rank}.jsonl"
                content = path.read_bytes() if path.exists() else b""
                self._file = path.open("a", encoding="utf-8")
                if content and not content.endswith(b"\n"):  # a crash has cut off the last line
                    self._file.write("\n")
            self._file.write(json.dumps({"question": question, "answer": answer, "step": self.step}) + "\n")
            self._file.flush()
        except OSError as error:
            self.problem = f"could not write its answers to {self.folder}: {error.strerror or error}"

    def close(self) -> None:
        """Close the file; a later answer opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> dict[str, str]:
        answers: dict[str, str] = {}
        paths = sorted(self.folder.glob("rank-*.jsonl")) if self.folder else []
        own = f"rank-{self.rank}.jsonl"
        for path in sorted(paths, key=lambda path: path.name == own):  # where two ranks asked the same, the own counts
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    answers[str(row["question"])] = str(row["answer"])
                except (ValueError, LookupError, TypeError):
                    continue
        return answers


def drop_answers_from(folder: Path, step: int) -> int:
    """Remove the answers that were added in `step` and later from the files in `folder`; return their number."""
    dropped = 0
    for path in sorted(folder.glob("rank-*.jsonl")):
        lines = path.read_bytes().splitlines(keepends=True)
        staying = [line for line in lines if _read_step(line) < step]
        if len(staying) < len(lines):
            dropped += len(lines) - len(staying)
            part = path.with_name(f".{path.name}.part")
            part.write_bytes(b"".join(staying))
            os.replace(part, path)
    return dropped


def _read_step(line: bytes) -> int:
    """Return the step of an answer; -1 for one without a step, and for a line that is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return -1
    return step if isinstance(step, int) else -1


def digest(body: Mapping[str, Any]) -> str:
    """Return what identifies a request: its model, messages and options, at whatever address."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
