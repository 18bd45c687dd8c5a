"""The adapter for verifiers, on a stand-in for the library; VERIFIERS_PATH names a folder with verifiers 0.1.14 to take it instead.

The stand-in has of verifiers what the adapter uses: the loop of an environment of several turns, its client and its rubric.
"""

import asyncio
import importlib
import json
import os
import signal
import sys
import threading

import pytest
from conftest import ROOT

from grpo_core import Reply, Turn

STAND_IN = '''
import importlib
import signal
from types import SimpleNamespace

class Error(Exception): pass
class OverlongPromptError(Error): pass

def load_environment(name):
    return importlib.import_module(name).load_environment()

class Rubric:
    def __init__(self, funcs, weights):
        self.funcs, self.weights = funcs, weights
    async def score_rollout(self, state):
        arguments = {"completion": state["completion"], "answer": state["answer"], "state": state}
        state["reward"] = sum([weight * await func(**arguments) for func, weight in zip(self.funcs, self.weights)])

class MultiTurnEnv:
    def __init__(self, dataset, rubric, max_turns):
        self.dataset, self.rubric, self.max_turns = dataset, rubric, max_turns
        signal.signal(signal.SIGINT, print)  # which only a main thread can
    def get_dataset(self):
        return [{"prompt": [{"role": "user", "content": row["question"]}], "example_id": i, **row} for i, row in enumerate(self.dataset)]
    async def rollout(self, input, client, model):
        state = {**input, "trajectory": [], "error": None, "final_env_response": None}
        messages = [SimpleNamespace(**message) for message in input["prompt"]]
        try:
            while len(state["trajectory"]) < self.max_turns:
                response = await client.get_response(list(messages), model, None)
                reply = SimpleNamespace(role="assistant", content=response.message.content)
                messages.append(reply)
                state["trajectory"].append({"completion": [reply]})
                if len(state["trajectory"]) < self.max_turns:
                    messages += [SimpleNamespace(**message) for message in await self.env_response(messages, state)]
                if state["final_env_response"] is not None:
                    break
        except OverlongPromptError:
            pass
        except Error as error:
            state["error"] = error
        state["completion"] = messages[len(input["prompt"]):]
        return state
'''
CLIENTS = "from abc import ABC, abstractmethod\nclass Client(ABC):\n    @abstractmethod\n    async def close(self): ...\n"
TYPES = "from types import SimpleNamespace\nResponse = ResponseMessage = SimpleNamespace\n"
GAME = '''
import verifiers
try:
    from datasets import Dataset
    make = Dataset.from_list if hasattr(verifiers, "__version__") else list
except ImportError:
    make = list

class Guess(verifiers.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        number, guess = int(state["answer"]), messages[-1].content
        if guess == "stop":
            raise verifiers.Error("the game is over")
        if int(guess) == number:
            state["final_env_response"] = [{"role": "user", "content": "right"}]
            return []
        return [{"role": "user", "content": "no"}, {"role": "user", "content": "higher" if int(guess) < number else "lower"}]

async def solved(completion, answer, state, **kwargs):
    return float(state["trajectory"][-1]["completion"][-1].content == answer)

async def speed(state, **kwargs):
    return 1 / len(state["trajectory"])

def load_environment():
    rows = [{"question": f"Guess {i}", "answer": str(i)} for i in range(3, 6)]
    return Guess(dataset=make(rows), rubric=verifiers.Rubric(funcs=[solved, speed], weights=[1.0, 0.5]), max_turns=3)
'''


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """The module of the example, with an environment my_game."""
    (tmp_path / "my_game.py").write_text(GAME)
    library = os.environ.get("VERIFIERS_PATH")
    if library is None:
        (tmp_path / "verifiers").mkdir()
        for name, text in (("__init__", STAND_IN), ("clients", CLIENTS), ("types", TYPES)):
            (tmp_path / "verifiers" / f"{name}.py").write_text(text)
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(ROOT / "examples"), *sys.path, *([library] if library else [])])
    monkeypatch.setattr(sys, "argv", ["verifiers_environment.py", "my_game"])
    yield importlib.import_module("verifiers_environment")
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("verifiers", "verifiers_environment", "my_game"):
            del sys.modules[name]


async def play(adapter, *texts, last="eos"):
    """The replies to turns with these texts, in a game whose number is 4."""
    row = dict(list(adapter.load("my_game").get_dataset())[1])
    environment = adapter.Verifiers({"row": json.dumps(row), "prompt": "Guess 4"}, 0, name="my_game")
    replies = []
    for number, text in enumerate(texts):
        replies.append(await environment.step(Turn(text, text, number, last if number == len(texts) - 1 else "eos")))
    await environment.close()
    return replies


NO_LOWER, NO_HIGHER = Reply("no\nlower"), Reply("no\nhigher")


def test_the_environments_own_loop_answers_and_its_rubric_rewards(adapter):
    async def games():
        return await asyncio.gather(play(adapter, "1", "9", "4"), play(adapter, "4"), play(adapter, "1", "2", "3"), play(adapter, "9", "2", last="limit"))

    won, at_once, lost, cut = asyncio.run(games())
    assert won == [NO_HIGHER, NO_LOWER, Reply(None, pytest.approx(1 + 0.5 / 3))]
    assert at_once == [Reply(None, 1.5)]
    assert lost == [NO_HIGHER, NO_HIGHER, Reply(None, pytest.approx(0.5 / 3))]
    assert cut == [NO_LOWER, Reply(None, 0.25)]  # the turn that used up the completion is seen and rewarded


def test_an_environment_is_loaded_once_in_a_thread_and_sets_no_handler(adapter):
    before = signal.getsignal(signal.SIGINT)
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(adapter.load("my_game")))
    thread.start()
    thread.join()
    assert adapter.load("my_game") is loaded[0] and signal.getsignal(signal.SIGINT) is before


def test_an_error_of_the_environment_fails_the_completion(adapter):
    with pytest.raises(adapter.verifiers.Error, match="the game is over"):
        asyncio.run(play(adapter, "1", "stop"))


def test_the_program_writes_the_rows(adapter, capsys):
    exec(compile((ROOT / "examples" / "verifiers_environment.py").read_text(), "example", "exec"), {"__name__": "__main__"})
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["messages"] for row in rows] == [[{"role": "user", "content": f"Guess {i}"}] for i in (3, 4, 5)]
    assert json.loads(rows[2]["row"])["answer"] == "5"


def test_the_adapter_is_short():
    assert len((ROOT / "examples" / "verifiers_environment.py").read_text().splitlines()) <= 60
