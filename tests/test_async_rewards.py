"""Async rewards wait side by side, within the time limit, whatever they do."""

import asyncio
import functools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from grpo_core.batch import Task
from grpo_core.commands.rewards import list_rewards
from grpo_core.config.files import load
from grpo_core.objective.rewards import REWARDS
from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError
from grpo_core.scoring.async_reward import AsyncReward
from grpo_core.scoring.event_loop import EventLoop, forget_shared_loop, shared_loop
from grpo_core.scoring.reward_call import attempt
from grpo_core.scoring.reward_worker import RewardWorker
from grpo_core.scoring.scoring import Reward, build_reward, close_rewards, score
from grpo_core.training.prepare import make_rewards

TASKS = [Task(0, "p", [1], {"answer": "a"}), Task(1, "q", [1], {"answer": "b"})]
TEXTS = ["a", "bb", "ccc", "dddd"]


async def lengths(completions, answer, *, seconds: float = 0.0):
    await asyncio.sleep(seconds)
    assert answer == ["a", "a", "b", "b"]
    return [float(len(text)) for text in completions]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(REWARDS.functions, "lengths", lengths)


def call(function, timeout=5.0, texts=TEXTS):
    reward = AsyncReward(function, timeout)
    reward.submit(texts, {"answer": ["a", "a", "b", "b"], "prompts": ["p"] * len(texts)})
    return reward.result()


def test_registered_ones_run_side_by_side_and_beside_ordinary_ones(registered):
    def ordinary(completions):
        time.sleep(0.3)
        return [1.0] * len(completions)

    functions = [build_reward("lengths", {"seconds": 0.4}, timeout=5) for _ in range(3)]
    assert all(isinstance(function, AsyncReward) for function in functions)
    rewards = [Reward(f"r{i}", 1.0, function) for i, function in enumerate([*functions, ordinary])]
    start = time.monotonic()
    scores = score(rewards, TASKS, TEXTS, 2)
    assert 0.4 < time.monotonic() - start < 0.65  # one after the other they take 1.5 s
    assert scores.rewards.tolist() == [[4, 7], [10, 13]] and scores.failures == ()


def test_the_time_limit_ends_the_call_and_no_other():
    events = []

    async def stalls(completions):
        try:
            await asyncio.sleep(100)
        finally:
            events.append("cancelled")

    rewards = [Reward("slow", 1.0, AsyncReward(stalls, 0.2)), Reward("fast", 1.0, AsyncReward(lengths, 0.2))]
    start = time.monotonic()
    scores = score(rewards, TASKS, TEXTS, 2)
    assert time.monotonic() - start < 0.5 and events == ["cancelled"]
    assert scores.failures == ("reward slow took more than 0.2 s",) and scores.failed["slow"].all()
    assert scores.rewards.tolist() == [[1, 2], [3, 4]]
    loop = shared_loop()
    assert call(lengths).values == [1, 2, 3, 4] and shared_loop() is loop  # what a reward keeps stays usable


def test_one_that_blocks_its_loop_costs_its_limit_and_the_next_has_a_new_loop(monkeypatch):
    monkeypatch.setattr("grpo_core.scoring.async_reward.CANCEL_TIMEOUT", 0.1)

    async def blocks(completions):
        time.sleep(1.0)

    start = time.monotonic()
    assert call(blocks, timeout=0.2).why == "took more than 0.2 s"
    assert call(lengths).values == [1, 2, 3, 4] and time.monotonic() - start < 0.8


async def _raises(completions):
    raise TimeoutError("no answer")


async def _exits(completions):
    raise SystemExit(2)


async def _exits_below(completions):
    await asyncio.gather(_exits(completions))


async def _returns_text(completions):
    return "1.0"


@pytest.mark.parametrize("function, why", [
    (_raises, "raised TimeoutError: no answer (test_async_rewards.py, line "),
    (_exits, "raised SystemExit: 2 (test_async_rewards.py, line "),
    (_exits_below, "raised SystemExit: 2 (test_async_rewards.py, line "),
    (_returns_text, "returned '1.0'; it must return a list"),
])  # fmt: skip
def test_its_failures_are_those_of_an_ordinary_one(function, why):
    for outcome in (call(function), attempt(function, TEXTS, {})):
        assert outcome.values == [None] * 4 and all(outcome.failed) and outcome.why.startswith(why)
    assert call(lengths).failed == [False] * 4


def test_it_runs_where_a_loop_runs_already():
    async def notebook():
        return attempt(lengths, TEXTS, {"answer": ["a", "a", "b", "b"]}), call(lengths)

    one, other = asyncio.run(notebook())
    assert one.values == other.values == [1, 2, 3, 4]


def test_a_fork_has_a_loop_of_its_own():
    call(lengths)
    child = os.fork()
    if child == 0:
        os._exit(0 if call(lengths).values == [1, 2, 3, 4] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


FILE = """
import asyncio, functools

class Judge:
    lock = asyncio.Lock()  # of one loop

    async def __call__(self, completions, *, seconds: float = 0.0):
        async with self.lock:
            await asyncio.sleep(0.01 if seconds < 1 else seconds)
        return [1.0] * len(completions)

judge = Judge()
slow = functools.partial(judge, seconds=100.0)
"""


@pytest.mark.slow
def test_a_users_async_reward_runs_in_its_process_with_one_loop_for_all_calls(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    names = [f"{tmp_path / 'mine.py'}:{name}" for name in ("judge", "slow")]
    rewards = [Reward(name, 1.0, build_reward(name, timeout=0.6)) for name in names]
    assert all(isinstance(reward.function, RewardWorker) for reward in rewards)
    for _ in range(2):
        scores = score(rewards, TASKS, TEXTS, 2)
        assert scores.failures == (f"reward {names[1]} took more than 0.6 s",)
        assert scores.rewards.tolist() == [[1, 1], [1, 1]]
    close_rewards(reward.function for reward in rewards)


class Judge:
    def __init__(self, value):
        self.value = value

    def __call__(self, completions, *, bonus: float = 0.0):
        return [self.value + bonus for _ in completions]

    async def later(self, completions, answer):
        return [self.value + len(text) for text in answer]


class LaterJudge(Judge):
    async def __call__(self, completions, *, bonus: float = 0.0):
        return [self.value + bonus for _ in completions]


@pytest.mark.parametrize("function, value, is_late", [
    (Judge(2.0), 5.0, False),
    (LaterJudge(2.0), 5.0, True),
    (functools.partial(Judge(2.0), bonus=1.0), 5.0, False),
    (functools.partial(LaterJudge(2.0), bonus=1.0), 5.0, True),
    (functools.partial(functools.partial(LaterJudge(2.0)), bonus=1.0), 5.0, True),
    (Judge(2.0).later, 3.0, True),
    (functools.partial(Judge(2.0).later), 3.0, True),
], ids=range(7))  # fmt: skip
def test_objects_and_partials_are_functions_where_they_are_registered(monkeypatch, function, value, is_late):
    monkeypatch.setitem(REWARDS.functions, "mine", function)
    args = {"bonus": 3.0} if value == 5.0 else {}
    config = load("tiny", [f"rewards=[{{name: mine, args: {json.dumps(args)}}}]"])
    (reward,) = make_rewards(config)
    assert isinstance(reward.function, AsyncReward) == is_late
    assert score([reward], TASKS, TEXTS, 2).rewards.tolist() == [[value] * 2] * 2
    assert "mine" in list_rewards()
    with pytest.raises(ConfigError, match=r"unknown key rewards\[0\].args.other"):
        load("tiny", ["rewards=[{name: mine, args: {other: 1}}]"])


def test_an_object_is_registered_by_the_decorator_with_its_facts(monkeypatch):
    monkeypatch.setattr(REWARDS, "_functions", dict(REWARDS.functions))
    judge = REWARDS.register("mine", gold={"answer": str})(functools.partial(Judge(1.0)))
    assert get_fact(REWARDS.build("mine", {"bonus": 1.0}), "gold") == {"answer": str} and judge(["a"]) == [1.0]
    strict = REWARDS.register("strict")(functools.partial(REWARDS.get("correct_answer"), strict=True))
    strict.own = True  # facts of a partial and of what it binds
    assert get_fact(REWARDS.build("strict"), "never_null") == ("answer",) and get_fact(REWARDS.build("strict"), "own")


def test_threads_that_ask_for_the_loop_at_the_same_time_get_the_same(monkeypatch):
    """What an async reward, tool or environment keeps belongs to one loop."""
    real, count = EventLoop.__init__, 8

    def slow(self):
        time.sleep(0.05)
        real(self)

    monkeypatch.setattr(EventLoop, "__init__", slow)
    forget_shared_loop()
    with ThreadPoolExecutor(count) as pool:
        loops = list(pool.map(lambda _: shared_loop(), range(count)))
    assert len({id(loop) for loop in loops}) == 1
