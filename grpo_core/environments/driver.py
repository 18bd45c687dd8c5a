"""Answer the turns of one call of the sampler: the decoder's interface on one side, the environments on the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from grpo_core.batch import Task
from grpo_core.environments.boundary import Boundary
from grpo_core.environments.interface import Answered, Turn
from grpo_core.environments.recording import Poll, Recording, RowAnswer, TurnsDigest, make_call_key
from grpo_core.environments.worker import Outcome
from grpo_core.random_keys import make_key, torch_seed
from grpo_core.sampling.turns import Answer, EndedTurn, TurnEnd
from grpo_core.schema import ConfigError

MAX_SEED = 2**32  # NumPy's older generators take smaller ones alone
WAIT_SECONDS = 60.0  # for one call of the worker where every row waits; it is repeated
Decode = Callable[[Sequence[Sequence[int]]], list[str]]  # texts of rows of token ids


class Worker(Protocol):
    """The environments of all completions (worker.py)."""

    def ask(self, key: int, row: dict[str, Any], seed: int, turns: Sequence[Turn]) -> None:
        """Ask for the answer to the last of a completion's turns."""

    def take(self, seconds: float) -> list[Outcome]:
        """Return the outcomes that have come; with none, wait for the first at most `seconds`."""

    def end(self, key: int) -> None:
        """Close the environment of a completion."""


@dataclass(frozen=True)
class TurnLimits:
    """The limits of a completion of several turns."""

    max_turns: int
    max_new_tokens: int  # of a completion, drawn and given
    max_turn_tokens: int | None = None  # drawn in one turn; None: as many as are left
    max_answer_tokens: int | None = None  # of an answer's text; a longer one is cut


@dataclass
class PlayedTurn:
    """A turn with its answer."""

    text: str
    ended_by: TurnEnd
    answer: str | None = None  # None: the completion ended
    reward: float | None = None
    start: int = 0  # place in the completion's text at which the turn begins
    calls: int = 0  # of tools
    errors: int = 0  # calls whose answer was an error


@dataclass
class PlayedCompletion:
    """The turns of a completion, and what is counted in it."""

    turns: list[PlayedTurn] = field(default_factory=list)
    given_tokens: int = 0
    cut_answers: int = 0
    lacks_room: bool = False  # an answer did not fit into the completion and ended it
    calls: int = 0  # of tools
    errors: int = 0  # calls whose answer was an error
    failure: str | None = None  # why the environment failed, as a verb phrase


class EnvironmentTurns:
    """The answers of environments to the turns of N tasks with G completions each, prompt-major."""

    def __init__(
        self,
        worker: Worker,
        boundary: Boundary,
        decode: Decode,
        tasks: Sequence[Task],
        group_size: int,
        limits: TurnLimits,
        *,
        first_key: int = 0,  # of the first row, which no other completion of the worker has
        recording: Recording | None = None,
        step: int = 0,  # of the run, to which the recording belongs
        warn: Callable[[str], object] = lambda sentence: None,
    ) -> None:
        self.worker, self.boundary, self.decode, self.limits = worker, boundary, decode, limits
        self.first_limit = limits.max_turn_tokens
        self.warn, self.first_key, self.recording = warn, first_key, recording or Recording(None)
        self.played = [PlayedCompletion() for _ in range(len(tasks) * group_size)]
        self._tasks, self._group_size = tasks, group_size
        self._turns: list[list[Turn]] = [[] for _ in self.played]
        self._texts = ["" for _ in self.played]  # of the completions so far
        self._places = [0 for _ in self.played]  # tokens of the completions so far
        self._waiting: dict[int, EndedTurn] = {}  # row -> its newest turn, which has no answer
        self._call = make_call_key(tasks, group_size, limits.max_new_tokens)
        self._step = step
        self._recorded = self.recording.get(step, self._call)  # polls that are read; None: the environments are asked
        if self.recording.is_outdated(step, self._call):
            warn(
                f"the answers of environments that were recorded in step {step + 1} are not read, because the code or "
                f"the settings of the environment have changed since"
            )
        self._is_read = self._recorded is not None
        self._digest, self._polls, self._count = TurnsDigest(), list[Poll](), 0

    def report(self, turns: Sequence[EndedTurn]) -> None:
        """Receive turns that have ended."""
        texts = self.decode([turn.ids for turn in turns])
        for turn, text in zip(turns, texts, strict=True):
            row, start = turn.row, len(self._texts[turn.row])
            self._texts[row] += text
            self._places[row] += len(turn.ids)
            number = len(self._turns[row])
            self._turns[row].append(Turn(text, self._texts[row], number, turn.ended_by))
            self.played[row].turns.append(PlayedTurn(text, turn.ended_by, start=start))
            self._waiting[row] = turn
            self._digest.add(turn)
            if self._recorded is None:
                self._ask(row)

    def take_answers(self, wait: bool) -> list[Answer]:
        """Return the answers that have come since the last call; with `wait`, at least one."""
        came = self._read_poll(wait)
        if came is None:
            outcomes = self.worker.take(WAIT_SECONDS if wait else 0.0)
            while wait and not outcomes:
                outcomes = self.worker.take(WAIT_SECONDS)
            came = tuple(RowAnswer(x.key - self.first_key, self._shorten(x.answered), x.failure) for x in outcomes)
        if came:
            self._polls.append(Poll(self._count, self._digest.text(), came))
        self._count += 1
        return self._give(came)

    def finish(self) -> None:
        """Record the call, in which every turn has been answered."""
        if not self._is_read:
            self.recording.add(self._step, self._call, self._polls, self._count)

    def _ask(self, row: int) -> None:
        task = self._tasks[row // self._group_size]
        columns = {**task.columns, "prompt": task.prompt}
        seed = torch_seed(make_key("environment", *task.seed, row % self._group_size)) % MAX_SEED
        self.worker.ask(self.first_key + row, columns, seed, self._turns[row])

    def _read_poll(self, wait: bool) -> tuple[RowAnswer, ...] | None:
        """Return the recorded answers of this poll; None if the environments are asked."""
        if self._recorded is None:
            return None
        poll = self._recorded[len(self._polls)] if len(self._polls) < len(self._recorded) else None
        if not self._waiting or (poll is not None and poll.number > self._count and not wait):
            return ()
        if poll is not None and (poll.number, poll.turns) == (self._count, self._digest.text()):
            return poll.answers
        self._recorded, self._is_read = None, False
        self.warn("the turns of this step differ from the recorded ones, so the environments are asked again")
        for row in self._waiting:
            self._ask(row)
        return None

    def _give(self, came: Sequence[RowAnswer]) -> list[Answer]:
        """Return the answers as tokens."""
        answers = [self._make_answer(self._waiting.pop(answer.row), answer) for answer in came]
        given = [answer for answer in answers if answer.ids is not None]
        for answer, text in zip(
            given, self.decode([answer.ids or () for answer in given]) if given else (), strict=True
        ):
            self._texts[answer.row] += text
            self._places[answer.row] += len(answer.ids or ())
            self.played[answer.row].given_tokens += len(answer.ids or ())
        for answer in answers:
            if answer.ids is None:
                self.worker.end(self.first_key + answer.row)
        return answers

    def _make_answer(self, turn: EndedTurn, answer: RowAnswer) -> Answer:
        played = self.played[turn.row]
        answered = answer.answered or Answered(None)
        played.failure = answer.failure
        played.calls, played.errors = played.calls + answered.calls, played.errors + answered.errors
        newest = played.turns[-1]
        newest.reward, newest.calls, newest.errors = answered.reward, answered.calls, answered.errors
        texts, end = answered.texts, Answer(turn.row, None)
        if texts is None or turn.ended_by == "limit" or len(played.turns) >= self.limits.max_turns:
            return end
        cut_texts = self._cut(texts)
        try:
            ids = self.boundary.encode(cut_texts, newest.text, turn.ended_by, turn.ids[-1])
        except ConfigError as error:
            played.failure = f"gave an answer, but {error}"
            return end
        if self._places[turn.row] + len(ids) >= self.limits.max_new_tokens:
            played.lacks_room = True
            return end
        played.cut_answers += cut_texts != list(texts)
        newest.answer = "\n".join(cut_texts)
        return Answer(turn.row, ids, self.limits.max_turn_tokens)

    def _shorten(self, answered: Answered | None) -> Answered | None:
        """Return an answer without what no completion has room for, which would only be kept and tokenised."""
        if answered is None or answered.texts is None:
            return answered
        limit = min(self.limits.max_new_tokens, self.limits.max_answer_tokens or self.limits.max_new_tokens)
        return replace(answered, texts=tuple(self.boundary.shorten(text, limit) for text in answered.texts))

    def _cut(self, texts: Sequence[str]) -> list[str]:
        """Return the texts of an answer with at most max_answer_tokens together."""
        left = self.limits.max_answer_tokens
        if left is None:
            return list(texts)
        cut_texts = []
        for text in texts:
            cut_texts.append(self.boundary.cut(text, left))
            left -= min(left, self.boundary.count(cut_texts[-1]))
        return cut_texts
