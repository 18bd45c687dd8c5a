"""The keys of environments and tools: what is refused before a model loads, and what follows from them."""

from dataclasses import replace
from pathlib import Path

import pytest

from grpo_core.config.files import dump, load
from grpo_core.monitor.run_log import find_user_files
from grpo_core.schema import ConfigError

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
MINE = '''
class Game:
    def __init__(self, row, seed, *, size: int = 3):
        pass
    def step(self, turn):
        return None

class Open(Game):
    def __init__(self, row, seed, *, start=None):
        pass

class NoRow:
    def __init__(self):
        pass
    def step(self, turn):
        return None

class NoStep:
    def __init__(self, row, seed):
        pass

class NoTurn(Game):
    def step(self):
        return None

class Yields(Game):
    def step(self, turn):
        yield "more"

class YieldsLater(Game):
    async def step(self, turn):
        yield "more"

class NotCalled(Game):
    step = "more"

class Static(Game):
    @staticmethod
    def step(turn):
        return None

class OfTheClass(Game):
    @classmethod
    def step(cls, turn):
        return None

class Callable:
    def __call__(self, turn, more=()):
        return None

class Held(Game):
    step = Callable()

class Decorated(Game):
    step = lambda self, *turns: None

class Environment(Game):
    pass

def search(query: str) -> str:
    """Search.

    Args:
        query: The words.
    """
    return query

def parse(text):
    return []

def takes_nothing():
    return []

def environment(completions):
    return [0.0 for _ in completions]
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)


CHAT = ["data.prompt=chat"]


@pytest.mark.parametrize("words, sentence", [
    (["environment.name=mine.py:Other"], "has no class Other"),
    (["environment.name=mine.py"], "is a file; name a class in it: mine.py:class"),
    (["environment.name=mine.py:NoRow"], "environment.name is mine.py:NoRow, which cannot be made from a row and a seed"),
    (["environment.name=mine.py:NoStep"], "a class without the method step(self, turn)"),
    (["environment.name=mine.py:NotCalled"], "a class without the method step(self, turn)"),
    (["environment.name=mine.py:NoTurn"], "whose method step cannot be called with a turn (too many positional arguments)"),
    (["environment.name=mine.py:Yields"], "whose method step yields; it must return the answer"),
    (["environment.name=mine.py:YieldsLater"], "whose method step yields; it must return the answer"),
    (["environment.name=mine.py:Game", "environment.args={side: 3}"], "unknown key environment.args.side; known: size"),
    (["environment.name=mine.py:Game", "environment.args.size=large"], "environment.args.size is 'large'; it must be an integer"),
    (["environment.name=mine.py:Open", "environment.args.start=2026-01-02"], "environment.args.start is 2026-01-02; it must be text, so put quotes around it"),
    (["data.chat_template_kwargs={a: {b: [1, 2026-01-02]}}"], "data.chat_template_kwargs.a.b[1] is 2026-01-02; it must be text"),
    (["loss.args={a: !!set {x}}"], "loss.args.a is {'x'}, of the type set; it must be text, a number, true, false, null, a list or a mapping"),
    (["environment.args={size: 3}"], "environment.args is {'size': 3}, but environment.name is null"),
    (["environment.name=game"], "environment.name is 'game'; it must be calculator, or a class in a file, my_env.py:MyEnvironment"),
    (["environment.name=calculator"], "answers turns that end in an equals sign, but sampling.stop is []; set it to a text that ends in one"),
    (["environment.name=tools"], "set tools to a list of functions instead"),
    (["environment={name: ''}"], "environment.name is ''; it must not be empty"),
    (["environment.name=mine.py:Game", "tools=['mine.py:search']"], "a completion has one of the two"),
    (["environment.max_turns=0"], "environment.max_turns is 0; it must be at least 1"),
    (["environment.timeout=0"], "environment.timeout is 0.0; it must be above 0"),
    (["environment.max_turn_tokens=5"], "environment.max_turn_tokens is 5, but there is neither an environment nor a tool"),
    (["environment.max_answer_tokens=5"], "environment.max_answer_tokens is 5, but there is neither"),
    (["loss.echo_coef=0.1"], "loss.echo_coef is 0.1, but there is neither an environment nor a tool"),
    (["environment.max_answer_tokens=0"], "environment.max_answer_tokens is 0; it must be at least 1"),
    (["tools=['mine.py:search']"], "data.prompt is template; tools are described by the model's chat template"),
    (["tools=['mine.py:other']", *CHAT], "mine.py has no function other"),
    (["tools=['mine.py:search', 'mine.py:search']", *CHAT], "an earlier tool has the name search, too"),
    (["tools=mine.py:search"], "tools is 'mine.py:search'; it must be a list of text"),
    (["tool_parser=mine.py:parse"], "tool_parser is 'mine.py:parse', but there are no tools"),
    (["tools=['mine.py:search']", "tool_parser=mine.py:takes_nothing", *CHAT], "cannot be called with a turn's text"),
    (["rewards=[]"], "with a teacher or an environment that gives rewards there may be none"),
    (["rewards=[]", "environment.name=mine.py:Game", "environment.reward_weight=0"], "must name at least one reward"),
    (["loss.kl_in=reward", "advantage.name=gdpo", "environment.name=mine.py:Game", "rewards=[]", "loss.kl_coef=0.1"], "gdpo reads each reward"),
])  # fmt: skip
def test_what_cannot_be_is_refused(mine, words, sentence):
    with pytest.raises(ConfigError) as error:
        load(TINY, words)
    assert sentence in str(error.value)


def test_an_environment_may_be_the_only_reward(mine):
    config = load(TINY, ["environment.name=mine.py:Game", "rewards=[]", "environment.args.size=5", "sampling.dynamic_attempts=2"])
    assert [(reward.name, reward.weight) for reward in config.all_rewards] == [("environment", 1.0)]
    assert config.has_turns and config.environment.args == {"size": 5}
    text = dump(config)
    Path("again.yaml").write_text(text)
    assert load("again.yaml") == config


@pytest.mark.parametrize("name", ["Static", "OfTheClass", "Held", "Decorated"])
def test_step_may_be_whatever_takes_a_turn(mine, name):
    assert load(TINY, [f"environment.name=mine.py:{name}"]).has_turns


def test_paths_are_those_beside_the_file(mine, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text('data: {prompt: chat}\ntools: ["mine.py:search"]\ntool_parser: mine.py:parse\n')
    (tmp_path / "game.yaml").write_text("environment: {name: mine.py:Game}\n")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    config, game = load("../mine.yaml"), load("../game.yaml")
    assert (config.tools, config.tool_parser) == (["../mine.py:search"], "../mine.py:parse")
    assert game.environment.name == "../mine.py:Game"
    for both in (config, game):
        assert find_user_files(both) == {"../mine.py"}


def test_a_reward_of_the_environments_name_is_refused(mine):
    from grpo_core.objective.rewards import REWARDS

    REWARDS.register("environment")(lambda completions: [0.0 for _ in completions])
    try:
        with pytest.raises(ConfigError, match="the reward environment has the name of the environment's own reward"):
            load(TINY, ["environment.name=mine.py:Game", "rewards=[environment]"])
    finally:
        del REWARDS._functions["environment"]


def test_sft_describes_tools_and_needs_no_environment(mine):
    config = load(TINY, ["tools=['mine.py:search']", *CHAT], supervised=True)
    assert config.tools and not replace(config, tools=[]).has_turns
