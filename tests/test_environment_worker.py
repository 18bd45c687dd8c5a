"""Environments in a process of their own: many at the same time, and whatever one does, the others go on."""

import time
from pathlib import Path

import pytest

from grpo_core.environments.interface import Turn
from grpo_core.environments.worker import EnvironmentWorker
from grpo_core.schema import ConfigError

MINE = '''
import asyncio, os, sys, threading, time
from grpo_core import Reply, Turn

class Echo:
    """Says how many turns it has seen, and does what the turn says."""
    def __init__(self, row, seed, *, mark: str = "!"):
        if row.get("broken"):
            raise ValueError("no such row")
        self.row, self.seed, self.mark, self.seen = row, seed, mark, []
    def step(self, turn: Turn):
        self.seen.append(turn.text)
        text = turn.text
        if text == "raise":
            raise ValueError("no such thing")
        if text == "hang":
            time.sleep(1000)
        if text == "exit":
            sys.exit(0)
        if text == "leave":
            os._exit(7)
        if text == "crash":
            os.kill(os.getpid(), 11)
            time.sleep(1)
        if text == "print":
            print("{" * 100_000)
        if text == "fork":
            os.fork()
        if text == "slow":
            time.sleep(0.4)
        if text == "long":
            time.sleep(0.4)
            return "x" * 900_000
        if text == "later":
            threading.Timer(0.05, os._exit, [9]).start()
        if text == "end":
            return None
        if text == "number":
            return 7
        if text == "object":
            return object()
        if text == "later answer":
            return self.answer_later()
        if text == "later failure":
            return self.fail_later()
        if text == "reward":
            return Reply("yes", reward=True)
        if text == "nan":
            return Reply("yes", reward=float("nan"))
        if text == "half":
            return chr(0xd800)
        if text == "pid":
            return str(os.getpid())
        return f"{','.join(self.seen)} {self.row['prompt']} {self.seed}{self.mark}"
    async def answer_later(self):
        await asyncio.sleep(0.01)
        return "waited for"
    async def fail_later(self):
        raise KeyError("later")

class Async:
    def __init__(self, row, seed):
        self.count = 0
    async def step(self, turn):
        self.count += 1
        if turn.text == "hang":
            await asyncio.sleep(1000)
        if turn.text == "block":
            time.sleep(1000)
        if turn.text == "raise":
            raise TimeoutError("its own")
        await asyncio.sleep(0.3)
        return Reply(f"{self.count} {turn.completion}", reward=self.count)

class Closes:
    def __init__(self, row, seed):
        self.row = row
    def step(self, turn):
        return None
    def close(self):
        open(self.row["note"], "a").write("closed")
        if self.row.get("fails"):
            raise OSError("too late")

class ClosesLater(Closes):
    async def close(self):
        await asyncio.sleep(1000)

class NoStep:
    def __init__(self, row, seed):
        pass

class Shows:
    def __init__(self, row, seed, *, value=None):
        self.value = value
    def step(self, turn):
        return repr(self.value)

class NoSeed:
    def __init__(self, row):
        pass
    def step(self, turn):
        return None
'''
ROW = {"prompt": "p"}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(MINE)
    return str(file)


@pytest.fixture(scope="module")
def worker(mine):
    worker = EnvironmentWorker(f"{mine}:Echo", {}, timeout=1.0)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def waiting(mine):
    worker = EnvironmentWorker(f"{mine}:Async", {}, timeout=0.8)
    yield worker
    worker.close()


KEYS = iter(range(10**6))


def turns_of(*texts):
    return [Turn(text, "".join(texts[: i + 1]), i, "eos") for i, text in enumerate(texts)]


def take_all(worker, keys, seconds=15.0):
    """The outcomes of some completions by key."""
    outcomes, deadline = {}, time.monotonic() + seconds
    while missing := set(keys) - outcomes.keys():
        assert time.monotonic() < deadline, missing
        outcomes |= {x.key: x for x in worker.take(0.5)}
    return outcomes


def ask(worker, *texts, row=ROW, seed=3):
    """The key of a new completion that is asked for the answer to the last of its turns."""
    key = next(KEYS)
    worker.ask(key, row, seed, turns_of(*texts))
    return key


def answer(worker, *texts, **options):
    key = ask(worker, *texts, **options)
    return take_all(worker, [key])[key]


def text_of(outcome):
    (text,) = outcome.answered.texts
    return text


def test_it_answers_from_row_seed_turns_and_arguments(mine):
    worker = EnvironmentWorker(f"{mine}:Echo", {"mark": "?"}, timeout=5.0)
    try:
        key = ask(worker, "a")
        assert text_of(take_all(worker, [key])[key]) == "a p 3?"
        worker.ask(key, ROW, 3, turns_of("a", "b"))  # the same object
        assert text_of(take_all(worker, [key])[key]) == "a,b p 3?"
    finally:
        worker.close()


def test_arguments_arrive_as_they_were(mine):
    value = {1: "é", "x": [None, float("inf"), True]}
    worker = EnvironmentWorker(f"{mine}:Shows", {"value": value}, timeout=5.0)
    try:
        assert text_of(answer(worker, "a")) == repr(value)
    finally:
        worker.close()


@pytest.mark.parametrize("text, failure", [
    ("raise", "raised ValueError: no such thing (mine.py, line 15)"),
    ("hang", "took more than 1 s"),
    ("exit", "raised SystemExit: 0 (mine.py, line 19)"),
    ("leave", "ended with exit code 7"),
    pytest.param("crash", "was ended by SIGSEGV", marks=pytest.mark.soak),
    ("number", "returned 7; it must be text, a Reply, or None for the end"),
    ("object", "returned an object of the type object; it must be text, a Reply, or None for the end"),
    ("later failure", "raised KeyError: 'later' (mine.py, line 59)"),
    ("nan", "returned the reward nan; it must be None or a number from -1e6 to 1e6"),
    ("half", "returned text with a lone surrogate, half of a character"),
    ("print", None),
    ("fork", None),
])  # fmt: skip
def test_whatever_a_step_does_the_others_go_on(worker, text, failure):
    first = ask(worker, "a")
    take_all(worker, [first])
    other = ask(worker, "slow")
    key = ask(worker, text)
    outcomes = take_all(worker, [other, key])
    assert outcomes[other].failure is None and text_of(outcomes[other]) == "slow p 3!"
    assert outcomes[key].failure == failure
    worker.ask(first, ROW, 3, turns_of("a", "b"))  # made again with its earlier turns where the process is new
    assert text_of(take_all(worker, [first])[first]) == "a,b p 3!"


def test_a_plain_step_that_returns_an_awaitable_is_waited_for(worker):
    """As of an async function inside a decorator that is not."""
    assert text_of(answer(worker, "later answer")) == "waited for"


def test_a_fork_that_a_step_has_left_running_ends(worker):
    server = int(text_of(answer(worker, "pid")))
    assert text_of(answer(worker, "fork")) == "fork p 3!"
    deadline = time.monotonic() + 3
    while [path for path in Path(f"/proc/{server}/task").glob("*/children") if path.read_text().strip()]:
        states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{server}/task").glob("*/children") for pid in path.read_text().split()]
        if set(states) <= {"Z"}:
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_row_that_cannot_be_made_or_sent_fails_alone(worker):
    assert answer(worker, "a", row={"broken": 1}).failure == "raised ValueError: no such row (mine.py, line 9)"
    assert answer(worker, "a", row={"f": lambda: 0}).failure.startswith("cannot be sent its row")
    assert text_of(answer(worker, "a")) == "a p 3!"


def test_none_ends_and_a_reward_is_a_number(worker):
    outcome = answer(worker, "end")
    assert (outcome.answered.texts, outcome.failure) == (None, None)
    outcome = answer(worker, "reward")
    assert (outcome.answered.texts, outcome.answered.reward) == (("yes",), 1.0)


def test_a_process_that_ends_between_turns_is_replaced(worker):
    key = ask(worker, "later")
    assert text_of(take_all(worker, [key])[key]) == "later p 3!"
    time.sleep(0.3)
    worker.ask(key, ROW, 3, turns_of("x", "b"))
    assert text_of(take_all(worker, [key])[key]) == "x,b p 3!"


def test_many_steps_run_at_the_same_time(worker, waiting):
    for asked, longest in ((worker, 1.5), (waiting, 1.0)):
        start = time.monotonic()
        keys = [ask(asked, "slow") for _ in range(40)]
        outcomes = take_all(asked, keys)
        assert time.monotonic() - start < longest and not any(x.failure for x in outcomes.values())


def test_an_async_step_that_takes_too_long_is_cancelled_and_the_process_stays(waiting):
    before = waiting._process.pid
    keys = [ask(waiting, text) for text in ("hang", "a", "raise")]
    outcomes = take_all(waiting, keys)
    assert [outcomes[key].failure for key in keys] == [
        "took more than 0.8 s", None, "raised TimeoutError: its own (mine.py, line 71)"
    ]  # fmt: skip
    assert (text_of(outcomes[keys[1]]), outcomes[keys[1]].answered.reward) == ("1 a", 1.0) and waiting._process.pid == before
    assert waiting._is_open and waiting._process.poll() is None


@pytest.mark.soak
def test_an_async_step_that_blocks_the_others_is_the_one_that_fails(waiting):
    keys = [ask(waiting, text) for text in ("a", "block", "b")]
    outcomes = take_all(waiting, keys)
    assert [outcomes[key].failure for key in keys] == [None, "took more than 0.8 s", None]


@pytest.mark.parametrize("text", ["slow", "long"])
def test_an_answer_that_came_in_time_counts_however_late_it_is_taken(worker, text):
    """As where the trainer decodes meanwhile. Long answers come in many parts."""
    keys = [ask(worker, text) for _ in range(3)]
    worker.take(0.1)  # which hears that they have started
    time.sleep(1.3)
    assert [x.failure for x in take_all(worker, keys).values()] == [None] * 3


def test_of_several_that_ran_the_one_that_ends_the_process_again_is_the_one_that_fails(worker):
    keys = [ask(worker, text) for text in ("slow", "slow", "leave", "slow", "crash")]
    outcomes = take_all(worker, keys)
    assert [outcomes[key].failure for key in keys] == [
        None, None, "ended with exit code 7", None, "was ended by SIGSEGV"
    ]  # fmt: skip


def test_close_is_called_and_its_failure_is_kept(mine, tmp_path):
    note = tmp_path / "note"
    worker = EnvironmentWorker(f"{mine}:Closes", {}, timeout=5.0)
    try:
        for row in ({"note": str(note)}, {"note": str(note), "fails": True}):
            key = ask(worker, "a", row=row)
            take_all(worker, [key])
            worker.end(key)
            worker.end(key)  # which has no object any more
        deadline = time.monotonic() + 5
        while not worker.close_failures:
            worker.take(0.1)
            assert time.monotonic() < deadline
        assert note.read_text() == "closedclosed" and worker.close_failures == ["raised OSError: too late (mine.py, line 83)"]
    finally:
        worker.close()


def test_an_async_close_that_takes_too_long_is_cancelled(mine):
    worker = EnvironmentWorker(f"{mine}:ClosesLater", {}, timeout=0.3)
    try:
        key = ask(worker, "a")
        take_all(worker, [key])
        worker.end(key)
        worker.finish(5.0)
        assert worker.close_failures == ["took more than 0.3 s"] and worker._process.poll() is None
    finally:
        worker.close()


def test_what_was_given_up_is_forgotten(worker):
    ask(worker, "hang")
    worker.take(0.2)
    worker.forget()
    assert text_of(answer(worker, "a")) == "a p 3!"


@pytest.mark.parametrize("name, sentence", [
    ("NoStep", "a class without the method step(self, turn)"),
    ("NoSeed", "which cannot be made from a row and a seed"),
    ("Nothing", "has no class Nothing"),
])  # fmt: skip
def test_a_class_that_is_no_environment_is_refused(mine, name, sentence):
    with pytest.raises(ConfigError) as error:
        EnvironmentWorker(f"{mine}:{name}", {}, timeout=5.0)
    assert sentence in str(error.value)
