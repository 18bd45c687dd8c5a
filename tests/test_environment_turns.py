"""The driver between a decoder and environments: what it asks, what it answers, and what it records."""

import json

import pytest
from test_boundary import tokenizer_of

from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig
from grpo_core.environments.boundary import Boundary
from grpo_core.environments.driver import EnvironmentTurns, TurnLimits
from grpo_core.environments.interface import Answered
from grpo_core.environments.recording import Recording
from grpo_core.environments.worker import Outcome
from grpo_core.sampling.texts import decode_completions
from grpo_core.sampling.turns import EndedTurn


class FakeWorker:
    """Environments that are a function of a completion's turns; their answers come `delay` polls later."""

    def __init__(self, answer, delay=0):
        self.answer, self.delay = answer, delay
        self.asked, self.ended, self.waiting, self.polls = [], [], [], 0

    def ask(self, key, row, seed, turns):
        self.asked.append((key, row, seed, [turn.text for turn in turns], turns[-1]))
        self.waiting.append((self.polls + self.delay, key, list(turns)))

    def take(self, seconds):
        self.polls += 1
        if seconds:
            self.polls = max([self.polls, *(at + 1 for at, _, _ in self.waiting[:1])])
        due = [entry for entry in self.waiting if entry[0] < self.polls]
        self.waiting = [entry for entry in self.waiting if entry[0] >= self.polls]
        return [self.make(key, turns) for _, key, turns in due]

    def make(self, key, turns):
        value = self.answer(key, turns)
        if isinstance(value, Outcome):
            return value
        return Outcome(key, value if isinstance(value, Answered) else Answered(None if value is None else (value,)))

    def end(self, key):
        self.ended.append(key)


@pytest.fixture(scope="module")
def chat():
    tokenizer, eos_ids = tokenizer_of("qwen")
    return tokenizer, eos_ids, Boundary(tokenizer, DataConfig(prompt="chat"), eos_ids)


TASKS = [Task(i, f"p{i}", [i + 1], {"answer": i}, seed=("train", 0, 0, i)) for i in range(2)]


def make_turns(chat, worker, *, recording=None, warnings=None, group_size=1, plain=False, **limits):
    tokenizer, eos_ids, boundary = chat
    limits = TurnLimits(**{"max_turns": 4, "max_new_tokens": 100, **limits})
    boundary = Boundary(tokenizer, DataConfig(), eos_ids) if plain else boundary
    return EnvironmentTurns(
        worker, boundary, lambda rows: decode_completions(tokenizer, rows, eos_ids), TASKS, group_size, limits, first_key=10,
        recording=recording, warn=(warnings if warnings is not None else []).append,
    )  # fmt: skip


def draw(chat, text, end=True):
    tokenizer, eos_ids, _ = chat
    return tokenizer([text], add_special_tokens=False)["input_ids"][0] + ([eos_ids[0]] if end else [])


def decode(chat, turns, script, most=100):
    """A decoder whose rows draw the texts of a script until their completions end: the ids of each row."""
    rows, numbers, live = [[] for _ in script], [0] * len(script), set(range(len(script)))
    waiting, answered = set(), set(live)
    while live:
        ended = []
        for row in sorted(answered):
            ids = draw(chat, script[row][numbers[row]])
            rows[row] += ids
            numbers[row] += 1
            ended.append(EndedTurn(row, ids, "eos" if len(rows[row]) < most else "limit"))
        turns.report(ended)
        waiting, answered = waiting | answered, set()
        for answer in turns.take_answers(wait=True):
            waiting.discard(answer.row)
            if answer.ids is None:
                live.discard(answer.row)
            else:
                assert len(rows[answer.row]) + len(answer.ids) < most
                rows[answer.row] += answer.ids
                answered.add(answer.row)
    turns.finish()
    return rows


def count_up(key, turns):
    return f"answer {len(turns)}" if len(turns) < 3 else None


SCRIPT = [["one", "two", "three"], ["eins", "zwei", "drei"]]


def test_turns_are_asked_and_answered(chat):
    worker = FakeWorker(count_up)
    turns = make_turns(chat, worker)
    rows = decode(chat, turns, SCRIPT)
    tokenizer, _, _ = chat
    text = "one<|im_end|>\n<|im_start|>user\nanswer 1<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>"
    assert tokenizer.decode(rows[0], skip_special_tokens=False).startswith(text)
    key, row, seed, texts, turn = worker.asked[2]
    assert (key, row, texts) == (10, {"answer": 0, "prompt": "p0"}, ["one", "two"]) and isinstance(seed, int)
    assert (turn.text, turn.number, turn.ended_by) == ("two", 1, "eos")
    assert turn.completion == "one\n<|im_start|>user\nanswer 1\n<|im_start|>assistant\ntwo"
    assert len({seed for _, _, seed, _, _ in worker.asked}) == 2 and sorted(worker.ended) == [10, 11]
    played = turns.played[0]
    assert [(x.text, x.answer, x.ended_by) for x in played.turns] == [
        ("one", "answer 1", "eos"), ("two", "answer 2", "eos"), ("three", None, "eos")
    ]  # fmt: skip
    assert played.given_tokens == len(rows[0]) - sum(len(draw(chat, text)) for text in SCRIPT[0])


def test_the_seed_depends_on_the_sample(chat):
    worker = FakeWorker(lambda key, turns: None)
    decode(chat, make_turns(chat, worker, group_size=2), [["a"]] * 4)
    seeds = {seed for _, _, seed, _, _ in worker.asked}
    assert len(seeds) == 4 and min(seeds) >= 0 and 2**31 < max(seeds) < 2**32  # which NumPy's older generators take


def test_the_last_turn_of_max_turns_is_seen_and_not_answered(chat):
    worker = FakeWorker(lambda key, turns: Answered(("go on",), reward=float(len(turns))))
    turns = make_turns(chat, worker, max_turns=2)
    decode(chat, turns, SCRIPT)
    assert [[x.reward for x in played.turns] for played in turns.played] == [[1.0, 2.0]] * 2
    assert [x.answer for x in turns.played[0].turns] == ["go on", None]


def test_a_turn_that_used_up_the_completion_is_seen_and_not_answered(chat):
    worker = FakeWorker(lambda key, turns: Answered(("go on",), reward=1.0))
    turns = make_turns(chat, worker)
    turns.report([EndedTurn(1, draw(chat, "one", end=False), "limit")])
    assert [(x.row, x.ids) for x in turns.take_answers(wait=False)] == [(1, None)]
    assert turns.played[1].turns[0].reward == 1.0 and not turns.played[1].lacks_room


@pytest.mark.parametrize("room, fits", [(0, False), (1, True)])
def test_an_answer_must_leave_room_for_one_token(chat, room, fits):
    """plain: a turn of n tokens and an answer of m need n + m + 1."""
    worker = FakeWorker(lambda key, turns: "12345")
    drawn = draw(chat, "one", end=False)
    turns = make_turns(chat, worker, plain=True, max_new_tokens=len(drawn) + 5 + room, max_turn_tokens=7)
    assert turns.first_limit == 7
    turns.report([EndedTurn(0, drawn, "stop")])
    (answer,) = turns.take_answers(wait=True)
    assert (answer.ids is not None) == fits and turns.played[0].lacks_room != fits
    assert answer.turn_limit == (7 if fits else None)


def test_long_answers_are_cut_and_counted(chat):
    worker = FakeWorker(lambda key, turns: Answered(("123", "4567"), calls=2, errors=1))
    turns = make_turns(chat, worker, plain=True, max_answer_tokens=5)
    turns.report([EndedTurn(0, draw(chat, "one", end=False), "stop")])
    (answer,) = turns.take_answers(wait=True)
    assert answer.ids == draw(chat, "12345", end=False)
    played = turns.played[0]
    assert (played.cut_answers, played.calls, played.errors, played.turns[0].answer) == (1, 2, 1, "123\n45")


@pytest.mark.parametrize("limits", [{}, {"max_answer_tokens": 5}])
def test_of_a_gigantic_answer_the_beginning_alone_is_kept_and_tokenised(chat, tmp_path, limits):
    worker, count = FakeWorker(lambda key, turns: "1234 " * 200_000), chat[2].count
    turns = make_turns(chat, worker, plain=True, recording=Recording(tmp_path), **limits)
    counted = turns.boundary.count = Counter(count)
    turns.report([EndedTurn(0, draw(chat, "one", end=False), "stop")])
    (answer,) = turns.take_answers(wait=True)
    turns.finish()
    played = turns.played[0]
    if limits:
        assert answer.ids == draw(chat, "1234 ", end=False) and played.cut_answers == 1
    else:
        assert answer.ids is None and played.lacks_room
    assert (tmp_path / "step-000000-rank-0.jsonl").stat().st_size < 5000
    assert max(counted.sizes) < 2000


class Counter:
    """Counts tokens, and notes how long the texts were."""

    def __init__(self, count):
        self.count, self.sizes = count, []

    def __call__(self, text):
        self.sizes.append(len(text))
        return self.count(text)


def test_a_failure_ends_its_completion_alone(chat):
    worker = FakeWorker(lambda key, turns: Outcome(key, failure="raised X") if key == 10 else count_up(key, turns))
    turns = make_turns(chat, worker)
    decode(chat, turns, SCRIPT)
    assert [x.failure for x in turns.played] == ["raised X", None] and len(turns.played[1].turns) == 3
    assert 10 in worker.ended


def test_without_waiting_nothing_may_come(chat):
    worker = FakeWorker(count_up, delay=2)
    turns = make_turns(chat, worker)
    turns.report([EndedTurn(0, draw(chat, "one"), "eos")])
    assert [len(turns.take_answers(wait=False)) for _ in range(4)] == [0, 0, 1, 0]


def record(chat, folder, delay=0, script=SCRIPT, **options):
    worker, warnings = FakeWorker(count_up, delay), []
    turns = make_turns(chat, worker, recording=Recording(folder, 0), warnings=warnings, **options)
    return decode(chat, turns, script), worker, warnings, turns


def test_a_step_that_is_taken_again_reads_its_answers(chat, tmp_path):
    rows, worker, _, turns = record(chat, tmp_path, delay=1)
    assert len(worker.asked) == 6
    again, other, warnings, read = record(chat, tmp_path)
    assert again == rows and other.asked == [] and warnings == [] and read.played == turns.played
    assert read._count == turns._count
    lines = (tmp_path / "step-000000-rank-0.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["complete"] == turns._count and len([x for x in lines if "complete" in x]) == 1


def test_recorded_polls_come_at_their_numbers(chat, tmp_path):
    for _ in range(2):
        turns = make_turns(chat, FakeWorker(lambda key, turns: None, delay=2), recording=Recording(tmp_path))
        turns.report([EndedTurn(0, draw(chat, "one"), "eos")])
        assert [len(turns.take_answers(wait=False)) for _ in range(4)] == [0, 0, 1, 0]
        turns.finish()
    assert (tmp_path / "step-000000-rank-0.jsonl").read_text().count("complete") == 1


@pytest.mark.parametrize("script", [
    [["other", "two", "three"], ["eins", "zwei", "drei"]],
    [["one", "two", "other"], ["eins", "zwei", "drei"]],
])  # fmt: skip
def test_turns_that_differ_from_the_recorded_ones_are_asked_again(chat, tmp_path, script):
    record(chat, tmp_path)
    rows, worker, warnings, _ = record(chat, tmp_path, script=script)
    assert rows == record(chat, None, script=script)[0] and len(warnings) == 1
    assert "the environments are asked again" in warnings[0]
    assert worker.asked[0][3] == script[0][: len(worker.asked[0][3])]  # with the turns that were read
    again, other, warnings, _ = record(chat, tmp_path, script=script)  # the newer recording counts
    assert again == rows and other.asked == [] and warnings == []


def test_an_incomplete_recording_is_ignored(chat, tmp_path):
    rows, *_ = record(chat, tmp_path)
    file = tmp_path / "step-000000-rank-0.jsonl"
    text = file.read_text()
    file.write_text(text[: text.index('{"call"', text.rindex("answers"))][:-20])  # as a crash cuts it off
    again, worker, warnings, _ = record(chat, tmp_path)
    assert again == rows and len(worker.asked) == 6 and warnings == []
    assert record(chat, tmp_path)[1].asked == []


def test_another_call_or_rank_has_its_own_recording(chat, tmp_path):
    record(chat, tmp_path)
    assert record(chat, tmp_path, max_new_tokens=90)[1].asked
    assert Recording(tmp_path, 1).get(0, record(chat, tmp_path)[3]._call) is None


def test_a_folder_that_cannot_be_written_ends_nothing(chat, tmp_path):
    (tmp_path / "turns").write_text("a file")
    turns = record(chat, tmp_path / "turns")[3]
    assert turns.recording.problem.startswith("could not write its answers to")
