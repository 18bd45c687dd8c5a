"""The reward judge: what it asks and reads, what it does with servers that do not answer, what a step waits, what is kept, and that the key stays a secret."""

import asyncio
import json
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import conftest
import pytest
from conftest import ROOT, start_two_ranks
from test_loop import make_run, rows

from grpo_core.batch import Task
from grpo_core.config.files import load
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.rewards import REWARDS
from grpo_core.schema import ConfigError
from grpo_core.scoring import chat_client, event_loop
from grpo_core.scoring.chat_client import ChatClient
from grpo_core.scoring.judge import Judge, JudgeSettings, wait_for
from grpo_core.scoring.kept_answers import KeptAnswers, drop_answers_from
from grpo_core.scoring.reward_call import attempt
from grpo_core.scoring.scoring import Reward, build_reward, close_rewards, score
from grpo_core.training.prepare import check_columns, make_judge
from grpo_core.training.rollouts import collect

httpx = pytest.importorskip("httpx")
TINY = ROOT / "configs" / "tiny.yaml"
KEY = "secret-key-of-the-judge-0123456789"
TEMPLATE = "{prompt}|{completion}|{answer}"


def chat(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


class Server:
    """A chat server on the loopback address. `reply(question, number of the request)` returns status and body."""

    def __init__(self, reply):
        self.reply, self.requests, self.open, self.most_open, self.lock = reply, [], 0, 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][0]["content"]
                with server.lock:
                    number = sum(other["messages"][0]["content"] == question for _, other, _ in server.requests)
                    server.requests.append((self.path, body, dict(self.headers)))
                    server.open += 1
                    server.most_open = max(server.most_open, server.open)
                try:
                    status, answer, *headers = server.reply(question, number)
                    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                    with server.lock:
                        server.open -= 1  # before the client can ask again
                    self.send_response(status)
                    for name, value in [("Content-Length", str(len(content))), *headers]:
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except ConnectionError:
                    self.close_connection = True

            def log_message(self, *words):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def questions(self):
        return [body["messages"][0]["content"] for _, body, _ in self.requests]

    def close(self):
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def serving(reply):
    server = Server(reply)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def judging(url, kept=None, **settings):
    judge = Judge(JudgeSettings(url, "m", **{"template": TEMPLATE, **settings}), kept or KeptAnswers(None))
    try:
        yield judge
    finally:
        judge.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat_client, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)


def outcome_of(judge, texts, answer="x"):
    judge.submit(texts, {"prompts": ["p"] * len(texts), "answer": [answer] * len(texts)})
    return judge.result()


def by_text(question, number):
    """Score 3 for the completion aaa."""
    return chat(f"It is fine.\nScore: {len(question.split('|')[1])}")


# --- what is asked and read


def test_every_completion_gets_the_score_of_its_own_question():
    with serving(by_text) as server, judging(server.url, options={"temperature": 0.5, "top_k": 3}) as judge:
        outcome = outcome_of(judge, ["a", "aaa", "", "aa", "aaa"])
    assert outcome.values == [1.0, 3.0, 0.0, 2.0, 3.0] and not any(outcome.failed) and outcome.why is None
    assert sorted(server.questions(), key=len) == ["p||x", "p|a|x", "p|aa|x", "p|aaa|x"]  # the same question is asked once
    path, body, headers = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert {**body, "messages": None} == {"model": "m", "messages": None, "temperature": 0.5, "top_k": 3}


def test_it_is_an_async_function_too():
    with serving(by_text) as server:
        outcome = attempt(REWARDS.build("judge", {"url": server.url, "model": "m", "template": TEMPLATE}), ["a", "aa"], {"prompts": ["p", "p"], "answer": [1, 2]})
        built = build_reward("judge", {"url": server.url, "model": "m"}, timeout=30)
        scores = score([Reward("judge", 1.0, built)], [Task(0, "What?", [1], {})], ["abc", "d"], 2)
        close_rewards([built])
    assert outcome.values == [1.0, 2.0] and scores.failures
    assert any("<request>\nWhat?\n</request>\n\n<answer>\nabc\n</answer>" in question for question in server.questions())


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY")
    with serving(by_text) as server, judging(server.url) as judge:
        assert outcome_of(judge, ["a"]).values == [1.0]
    assert "Authorization" not in server.requests[0][2]


@pytest.mark.parametrize(
    "answer, value",
    [
        ("Score: 7", 7.0), ("score: 2 ... Score: **8.5**/10.", 8.5), ("# Score = 0", 0.0), ("Score: -1", None), ("Score: 11", None),
        ("Score: 1e9", None), ("Score: 1,000", None), ("Score: N", None), ("7", None), ("", None), ("Score: 10", 10.0),
    ],
)  # fmt: skip
def test_the_score_is_the_last_one_within_the_limits(answer, value):
    with serving(lambda *_: chat(answer)) as server, judging(server.url) as judge:
        outcome = outcome_of(judge, ["a"])
    assert outcome.values == [value] and outcome.failed == [value is None] and len(server.requests) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_at_most_so_many_requests_at_a_time(count):
    def slow(question, number):
        time.sleep(0.03)
        return chat("Score: 1")

    with serving(slow) as server, judging(server.url, at_once=count) as judge:
        outcome_of(judge, [f"{i}" for i in range(9)])
    assert server.most_open == count and len(server.requests) == 9


# --- servers that do not answer


def test_a_rate_limit_is_waited_for_and_asked_again():
    def limited(question, number):
        return (429, {"error": "slow down"}, ("Retry-After", "0.8")) if number == 0 else chat("Score: 4")

    with serving(limited) as server, judging(server.url) as judge:
        started = time.monotonic()
        outcome = outcome_of(judge, ["a", "b"])
        assert time.monotonic() - started > 0.8
    assert outcome.values == [4.0, 4.0] and len(server.requests) == 4


NONSENSE = [b"", b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"[" * 100_000, b"\xff\xfe"]


@pytest.mark.parametrize("body", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_is_asked_again_and_then_fails(body):
    with serving(lambda *_: (200, body)) as server, judging(server.url, retries=1) as judge:
        outcome = outcome_of(judge, ["a"])
    assert outcome.values == [None] and outcome.failed == [True] and len(server.requests) == 2
    assert outcome.why.startswith("answered something else than a chat completion") and len(outcome.why) < 300


def test_an_endless_answer_is_cut(monkeypatch):
    monkeypatch.setattr(chat_client, "MAX_BYTES", 1000)
    with serving(lambda *_: (200, b"x" * 5000)) as server, judging(server.url) as judge:
        assert outcome_of(judge, ["a"]).why == "answered more than 1,000 bytes"


@pytest.mark.parametrize("status, requests", [(400, 1), (401, 1), (404, 1), (302, 1), (500, 3), (503, 3)])
def test_what_may_succeed_later_is_asked_again_and_a_refusal_is_not(status, requests):
    with serving(lambda *_: (status, {"error": "no"})) as server, judging(server.url, retries=2) as judge:
        first, second = outcome_of(judge, ["a", "b"]), outcome_of(judge, ["c"])
    assert len(server.requests) == 3 * requests and first.failed == [True, True]
    assert first.why.startswith(f'answered with the status {status}: {{"error": "no"}}')
    assert second.why == f"answered with the status {status}"  # what the server said is told once
    assert ("JUDGE_API_KEY" in first.why) == (status == 401)


def test_a_server_that_is_not_there_and_one_that_hangs_up():
    with judging("http://127.0.0.1:9/v1", retries=1) as judge:
        assert outcome_of(judge, ["a"]).why.startswith("cannot be reached: ConnectError")

    def hang_up(question, number):
        raise ConnectionError

    with serving(hang_up) as server, judging(server.url, retries=1) as judge:
        assert outcome_of(judge, ["a"]).why.startswith("cannot be reached: RemoteProtocolError")
        assert len(server.requests) == 2


def test_a_request_that_stalls_is_asked_again_and_the_others_keep_their_answers():
    stall = threading.Event()

    def reply(question, number):
        if question.startswith("p|slow") or (question.startswith("p|late") and number == 0):
            stall.wait(10)
        return chat("Score: 5")

    with serving(reply) as server, judging(server.url, request_timeout=0.3, retries=20, budget=1.5) as judge:
        started = time.monotonic()
        outcome = outcome_of(judge, ["slow", "a", "late"])
        assert 1.4 < time.monotonic() - started < 2.5
        stall.set()
    assert outcome.values == [None, 5.0, 5.0] and outcome.failed == [True, False, False]
    assert outcome.why == "did not answer within its budget of 1.5 s a step (args.budget)"


# --- what a step waits, by a clock that jumps to the next event


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only where it would sleep, and only while `jumps` is set."""

    def __init__(self):
        super().__init__()
        self.now, self.jumps, select = 1000.0, False, self._selector.select

        def jump(timeout):
            if timeout is None or timeout <= 0:
                return select(timeout)
            events = select(0 if self.jumps else 0.001)
            self.now += timeout if self.jumps and not events else 0.0
            return events

        self._selector.select = jump

    def time(self):
        return self.now


class Clock:
    """Makes event loops that jump while a judge waits, and measures how long that is."""

    def __init__(self):
        self.waits = []

    def __call__(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "new_event_loop", JumpingLoop)
            return event_loop.EventLoop()

    async def wait_for(self, rows, seconds):
        loop = asyncio.get_running_loop()
        loop.jumps, before = True, loop.now
        try:
            return await wait_for(rows, seconds)
        finally:
            loop.jumps = False
            self.waits.append(loop.now - before)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("grpo_core.scoring.judge.wait_for", clock.wait_for)
    return clock


class Stalling(httpx.AsyncBaseTransport):
    """It answers the questions in `quick`, after `seconds`, and no other; with None all questions."""

    def __init__(self, quick=(), seconds=1.0):
        self.quick, self.seconds = quick, seconds

    async def handle_async_request(self, request):
        question = json.loads(request.content)["messages"][0]["content"]
        await asyncio.sleep(self.seconds if self.quick is None or question in self.quick else 1e9)
        return httpx.Response(200, json=chat("Score: 6")[1])


def stalling_judge(clock, transport, **settings):
    settings = JudgeSettings("http://judge/v1", "m", **{"template": "{completion}", "request_timeout": 1e12, **settings})
    return Judge(settings, KeptAnswers(None), make_loop=clock, transport=transport)


@pytest.mark.parametrize("request_timeout, retries", [(1e12, 0), (7.0, 100), (15.0, 2)])
def test_a_stalling_judge_costs_a_step_no_more_than_its_budget(clock, request_timeout, retries):
    judge = stalling_judge(clock, Stalling(), budget=60.0, request_timeout=request_timeout, retries=retries)
    for _ in range(3):  # steps
        judge.start_step(0)
        clock.waits.clear()
        for texts in (["a", "b"], ["c"], ["d"]):  # a step with two attempts of dynamic sampling
            assert all(outcome_of(judge, texts).failed)
        assert len(clock.waits) == 3 and sum(clock.waits) == pytest.approx(60.0, abs=0.01)
    judge.close()


def test_the_budget_of_a_step_is_what_its_calls_have_left(clock):
    judge = stalling_judge(clock, Stalling({"a", "b", "c"}, seconds=20.0), budget=50.0)
    judge.start_step(0)
    values = [outcome_of(judge, [text]).values for text in ("a", "b", "c", "a")]
    assert values == [[6.0], [6.0], [None], [6.0]]  # the last is known
    assert clock.waits == pytest.approx([20.0, 20.0, 10.0, 0.0], abs=0.01)
    judge.start_step(0)
    assert outcome_of(judge, ["c"]).values == [6.0]
    judge.close()


def test_outside_of_steps_every_call_has_the_budget(clock):
    judge = stalling_judge(clock, Stalling(), budget=5.0)
    for _ in range(3):
        outcome_of(judge, ["a"])
    assert clock.waits == pytest.approx([5.0] * 3, abs=0.01)
    judge.close()


def test_a_step_of_the_trainer_waits_no_longer(clock, tmp_path):
    """Dynamic sampling calls a judge that finds all completions equal four times in a step."""
    judge = stalling_judge(clock, Stalling(None, seconds=20.0), budget=50.0, at_once=64)
    run = make_run(tmp_path, change=lambda c: replace(c, sampling=replace(c.sampling, dynamic_attempts=3)))
    run.rewards[:] = [Reward("judge", 1.0, judge)]
    for step in range(2):
        clock.waits.clear()
        _, _, scores = collect(run, step, Stats())
        assert clock.waits == pytest.approx([20.0, 20.0, 10.0], abs=0.01) and scores.failed["judge"].any()
    judge.close()


def test_pauses_between_requests_grow_and_end(clock, monkeypatch):
    monkeypatch.setattr(chat_client, "FIRST_PAUSE", 0.5)
    times = []

    class Busy(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            times.append(asyncio.get_running_loop().time())
            return httpx.Response(503)

    client = ChatClient("http://judge/v1", "JUDGE_API_KEY", 9, 30.0, Busy())

    async def ask():
        asyncio.get_running_loop().jumps = True
        async with client.open() as http:
            return await client.ask(http, {"model": "m"})

    with pytest.raises(chat_client.NoAnswer, match="status 503"):
        clock().run(ask())
    pauses = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert [b - a for a, b in pairwise(times)] == pytest.approx(pauses, abs=0.01)


# --- what is kept


def test_a_second_judge_of_the_folder_asks_nothing_that_is_answered(tmp_path):
    with serving(by_text) as server:
        with judging(server.url, KeptAnswers(tmp_path / "judge", rank=1)) as judge:
            first = outcome_of(judge, ["a", "aa"])
        with judging(server.url, KeptAnswers(tmp_path / "judge", rank=0)) as judge:
            assert outcome_of(judge, ["a", "aa"]) == first and len(server.requests) == 2
            assert outcome_of(judge, ["aa", "aaaa"]).values == [2.0, 4.0]
        with judging(server.url, KeptAnswers(tmp_path / "judge"), template="other {completion}{answer}|{completion}") as judge:
            outcome_of(judge, ["a"])
    assert server.questions()[2:] == ["p|aaaa|x", "other ax|a"]


def test_failures_are_not_kept_nor_are_answers_without_a_score(tmp_path):
    replies = {"p|a|x": (400, {}), "p|b|x": chat("no idea"), "p|c|x": chat("Score: 11")}
    with serving(lambda question, number: replies[question]) as server:
        for _ in range(2):
            with judging(server.url, KeptAnswers(tmp_path)) as judge:
                assert outcome_of(judge, ["a", "b", "c"]).failed == [True, True, True]
    assert sorted(server.questions()) == [question for question in replies for _ in range(2)] and not any(tmp_path.iterdir())


def test_an_answer_without_a_score_that_an_older_file_holds_is_asked_again(tmp_path):
    with serving(by_text) as server:
        with judging(server.url, KeptAnswers(tmp_path)) as judge:
            outcome_of(judge, ["a"])
        (tmp_path / "rank-0.jsonl").write_text((tmp_path / "rank-0.jsonl").read_text().replace("Score", "Grade"))
        with judging(server.url, KeptAnswers(tmp_path)) as judge:
            assert outcome_of(judge, ["a"]).values == [1.0] and len(server.requests) == 2


def test_every_line_of_a_file_of_answers_is_one(tmp_path):
    """Also where a crash has cut one off."""
    path = tmp_path / "rank-0.jsonl"
    for step, cut in ((0, 0), (1, 0), (2, 9)):
        kept = KeptAnswers(tmp_path)
        kept.step = step
        kept.add(f"q{step}", "a")
        kept.close()
        path.write_bytes(path.read_bytes()[: -cut or None])
    assert [json.loads(line) for line in path.read_text().splitlines()[:2]] == [{"question": f"q{i}", "answer": "a", "step": i} for i in (0, 1)]
    kept.add("q3", "b")
    kept.close()
    assert [bool(line) for line in path.read_text().splitlines()] == [True] * 4 and KeptAnswers(tmp_path).get("q3") == "b"


def test_the_answers_of_later_steps_can_be_dropped(tmp_path):
    for rank in (0, 1):
        kept = KeptAnswers(tmp_path, rank)
        for kept.step in (None, 0, 1, 2):
            kept.add(f"q{kept.step}", "a")
        kept.close()
    assert drop_answers_from(tmp_path, 1) == 4 and drop_answers_from(tmp_path, 1) == 0 and drop_answers_from(tmp_path / "none", 0) == 0
    assert [KeptAnswers(tmp_path).get(f"q{step}") for step in (None, 0, 1, 2)] == ["a", "a", None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0.jsonl", "rank-1.jsonl"]


def test_a_line_that_was_cut_off_loses_that_line_alone(tmp_path):
    kept = KeptAnswers(tmp_path)
    for name in "abc":
        kept.add(name, f"answer of {name}\ud800\n")
    kept.close()
    path = tmp_path / "rank-0.jsonl"
    path.write_bytes(path.read_bytes()[:-9] + b"\xff")
    again = KeptAnswers(tmp_path)
    assert [again.get(name) for name in "abc"] == ["answer of a\ud800\n", "answer of b\ud800\n", None]
    again.add("c", "x")
    again.close()
    assert KeptAnswers(tmp_path).get("c") == "x"


def test_a_rank_reads_its_own_answer_where_two_asked_the_same(tmp_path):
    for rank in range(3):
        kept = KeptAnswers(tmp_path, rank)
        kept._answers = {}
        kept.add("q", f"of rank {rank}")
        kept.close()
    assert [KeptAnswers(tmp_path, rank).get("q") for rank in range(3)] == ["of rank 0", "of rank 1", "of rank 2"]


def test_a_folder_that_cannot_be_written_is_told_and_ends_nothing(tmp_path):
    (tmp_path / "judge").write_text("a file")
    with serving(by_text) as server, judging(server.url, KeptAnswers(tmp_path / "judge")) as judge:
        outcome = outcome_of(judge, ["a"])
        assert outcome.values == [1.0] and not any(outcome.failed)
        assert outcome.why == f"could not write its answers to {tmp_path / 'judge'}: File exists"
        assert outcome_of(judge, ["a"]).values == [1.0] and len(server.requests) == 1


# --- the key


@pytest.mark.parametrize("reply", [
    lambda key: (401, {"error": f"wrong key {key}"}), lambda key: chat(f"your key is {key} Score: 2"), lambda key: (500, key.encode()), lambda key: (200, key.encode()),
    lambda key: (404, (190 * "x" + key).encode()), lambda key: (200, b'{"choices": [{"message": {"content": "\\u0073' + key[1:].encode() + b' Score: 2"}}]}'),
])  # fmt: skip
def test_a_server_that_says_the_key_does_not_get_it_into_a_message_or_file(reply, tmp_path):
    with serving(lambda *_: reply(KEY)) as server, judging(server.url, KeptAnswers(tmp_path), retries=0) as judge:
        outcome = outcome_of(judge, ["a"])
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert KEY[:8] not in f"{outcome}{written}" and "***" in f"{outcome}{written}"


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel", "null\x00"])
def test_a_key_that_is_no_header_is_not_shown(key, monkeypatch):
    monkeypatch.setattr(chat_client.os, "environ", {"JUDGE_API_KEY": key})
    with serving(by_text) as server, judging(server.url) as judge:
        outcome = outcome_of(judge, ["a"])
    assert outcome.why == "cannot be asked: the environment variable JUDGE_API_KEY holds no key" and server.requests == []


# --- the configuration


@pytest.mark.parametrize("args, sentence", [
    ({"model": "m"}, "rewards[0].args.url is not set, and the reward judge needs it"),
    ({"url": "http://a"}, "rewards[0].args.model is not set, and the reward judge needs it"),
    ({"url": "localhost:8000", "model": "m"}, "rewards[0].args.url is 'localhost:8000'; it must begin with http:// or https://"),
    ({"url": "http://a/v1?key-123", "model": "m"}, "url of the judge has a ? or a #; it must end before them, and a key is named by key_from"),
    ({"template": "{prompt}"}, "rewards[0].args.template is '{prompt}'; it must hold {completion}"),
    ({"template": "{completion} {"}, "it is malformed"),
    ({"template": "{completion} {}"}, "{} in it is no column; other braces are written twice"),
    ({"pattern": "Score"}, "it must have one group, (...), around the number"),
    ({"pattern": "(Score"}, "it is no regular expression"),
    ({"at_once": 0}, "rewards[0].args.at_once is 0; it must be at least 1"),
    ({"budget": 0}, "rewards[0].args.budget is 0.0; it must be above 0"),
    ({"lowest": 5, "highest": 5}, "rewards[0].args.lowest is 5; it must be below highest (5)"),
    ({"key_from": "my key-123"}, "key_from of the judge is no name of an environment variable; it names the one with the key"),
    ({"options": {"model": "x"}}, "it must not have model, which the judge sets"),
    ({"options": [1]}, "rewards[0].args.options is [1]"),
])  # fmt: skip
def test_arguments_that_cannot_be_are_refused_in_a_sentence(args, sentence):
    args = args if {"url", "model"} & {*args} else {"url": "http://a/v1", "model": "m", **args}
    with pytest.raises(ConfigError) as caught:
        load(TINY, [f"rewards={json.dumps([{'name': 'judge', 'args': args}])}"])
    assert sentence in str(caught.value) and "key-123" not in str(caught.value)


def judged(**args):
    return load(TINY, [f"rewards={json.dumps([{'name': 'judge', 'args': {'url': 'http://a/v1', 'model': 'm', **args}}])}"])


def test_columns_that_the_template_names_must_be_in_the_data():
    check_columns(judged(template="{completion} {answer}"), [Task(0, "p", [1], {"answer": "x"})], [])
    with pytest.raises(ConfigError, match="reward judge needs the column 'gold', but the data has only the columns answer"):
        check_columns(judged(template="{completion} {gold}"), [Task(0, "p", [1], {"answer": "x"})], [])


def test_the_requests_at_a_time_are_divided_among_the_ranks(monkeypatch):
    monkeypatch.setattr("grpo_core.training.prepare.ranks.world_size", lambda: 3)
    config = judged()
    assert [make_judge(config, {"url": "http://a", "model": "m", "at_once": n}, None).settings.at_once for n in (16, 3, 2)] == [5, 1, 1]


def test_a_chat_is_shown_as_its_turns():
    config = judged()
    data = replace(config.data, prompt="chat", system="Be brief.", template="{question}")
    with serving(by_text) as server:
        judge = make_judge(replace(config, data=data), {"url": server.url, "model": "m", "template": "{prompt}|{completion}"}, None)
        judge.submit(["a"], {"prompts": ["<|im_start|>"], "question": ["Why?"]})
        judge.result()
        judge.close()
    assert server.questions() == ["system: Be brief.\n\nuser: Why?|a"]


# --- a run

SHORT = ["evaluation.num_tasks=0", "data.limit=200", "trainer.completions_per_step=16", "sampling.max_new_tokens=16", "log.every=1", "engine.schedule=constant"]


@pytest.mark.slow
def test_a_run_that_is_resumed_or_replayed_asks_nothing_again(tmp_path, here):
    def reply(question, number):
        return chat(f"Score: {sum(map(ord, question)) % 11}")

    with serving(reply) as server:
        reward = json.dumps([{"name": "judge", "args": {"url": server.url, "model": "m"}}])
        words = ["--config", TINY, *SHORT, f"rewards={reward}", f"output_dir={tmp_path}", "name=judged", "checkpoint.every=2", "debug.dump_batches=1"]
        done = here("train", *words, "trainer.num_steps=3")
        assert done.returncode == 0, done.stderr
        before, asked = rows(tmp_path / "judged"), len(server.requests)
        assert all(row["rewards/judge_std"] > 0 and row["failed/judge"] == 0 for row in before) and 16 < asked <= 48
        shutil.rmtree(tmp_path / "judged" / "checkpoints" / "step-000003")
        done = here("train", *words, "trainer.num_steps=3", "resume=auto")
        assert done.returncode == 0 and len(server.requests) == asked, done.stderr
        after = rows(tmp_path / "judged")
        assert [row["reward"] for row in after] == [row["reward"] for row in before]
        assert here("replay", tmp_path / "judged" / "batches" / "step-000001").returncode == 0
        assert len(server.requests) == asked
    written = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert written == [] and KEY not in done.stdout + done.stderr


@pytest.mark.slow
def test_two_ranks_keep_a_file_each_and_one_rank_reads_both(tmp_path, here, environment):
    with serving(lambda question, number: chat(f"Score: {sum(map(ord, question)) % 11}")) as server:
        reward = json.dumps([{"name": "judge", "args": {"url": server.url, "model": "m", "at_once": 4}}])
        words = ["--config", TINY, *SHORT, f"rewards={reward}", f"output_dir={tmp_path}", "name=two", "checkpoint.every=1"]
        environment = {**environment, "JUDGE_API_KEY": KEY}
        codes, written = conftest.wait_for(start_two_ranks("-m", "grpo_core", "train", *words, "trainer.num_steps=2", environment=environment))
        assert codes == [0, 0] and KEY not in str(written), written
        before, asked = rows(tmp_path / "two"), len(server.requests)
        assert server.most_open <= 4 and {path.name for path in (tmp_path / "two" / "judge").iterdir()} == {"rank-0.jsonl", "rank-1.jsonl"}
        shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-000002")
        done = here("train", *words, "trainer.num_steps=2", "resume=auto")
        assert done.returncode == 0 and len(server.requests) == asked, done.stderr
    assert [row["reward"] for row in rows(tmp_path / "two")] == [row["reward"] for row in before]


@pytest.mark.parametrize("answer, score", [
    ("Score (0-10): 7", 7), ("Score [0-10]: 9", 9), ("Score (7)", 7), ("**Score:** 6.5", 6.5), ("Score: 2 is too low.\nScore: 4", 4), ("score = 3", 3),
])  # fmt: skip
def test_the_number_that_is_the_score(answer, score):
    assert JudgeSettings("http://x", "m").read_score(answer) == score


@pytest.mark.parametrize("key", ['sk/a"b\\c+d==', "sk/ab"])
def test_a_key_in_a_text_of_json_is_masked(key, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    client = chat_client.ChatClient("http://x", "JUDGE_API_KEY", 0, 1.0)
    for text in (key, json.dumps({"authorization": f"Bearer {key}"}), json.dumps(key).replace("/", "\\/")):
        for masked in (client.mask(text), client.mask(text.encode()).decode()):
            assert "sk" not in masked and chat_client.MASK in masked
