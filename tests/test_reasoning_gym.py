"""Tasks of Reasoning Gym as data, with their own scorers: by a stand-in for the package, and by the package where it is."""

import json
import sys

import pytest

from grpo_core.config.files import load_overrides
from grpo_core.config.sections import DataConfig
from grpo_core.data import gym_rows
from grpo_core.data.rows import load_rows, load_splits
from grpo_core.objective.rewards import REWARDS
from grpo_core.schema import ConfigError
from grpo_core.scoring import gym_reward
from grpo_core.scoring.gym_reward import find_answer
from grpo_core.scoring.reward_worker import RewardWorker
from grpo_core.scoring.scoring import build_reward

STAND_IN = '''
from dataclasses import dataclass

from . import factory


@dataclass
class AddConfig:
    below: int = 60
    seed: int = 1
    size: int = 500

    def validate(self):
        assert self.below > 0, "below must be positive"


class Add:
    made = 0

    def __init__(self, config):
        self.config = config

    def __len__(self):
        return self.config.size

    def __getitem__(self, index):
        Add.made += 1
        a, b = index * 7 % self.config.below, index % 3 + self.config.seed
        return {"question": f"{a} + {b} =", "answer": str(a + b), "metadata": {"terms": (a, b)}}

    def score_answer(self, answer, entry):
        if answer == "scorer?":
            return self.config.size / 10 + self.config.below / 1000
        return {0: 1.0, 1: 0.5}.get(abs(int(answer) - sum(entry["metadata"]["terms"])), 0.0)


factory.DATASETS["add"] = (Add, AddConfig)


def create_dataset(name, **arguments):
    config = AddConfig(**arguments)
    config.validate()
    return Add(config)
'''


@pytest.fixture(autouse=True)
def no_rows_of_other_tests(monkeypatch):
    monkeypatch.setattr(gym_rows, "_made", {})
    monkeypatch.setattr(gym_reward, "_scorers", {})


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The interface of the package that is used here, with one task."""
    package = tmp_path / "site" / "reasoning_gym"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "factory.py").write_text("DATASETS = {}\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))  # of the reward's process
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        del sys.modules[name]


def load_add(split="train", limit=None, **args):
    return load_rows("reasoning_gym:add", None, split, limit, args)


def test_rows_have_the_item_and_what_made_it_and_the_splits_share_no_question(stand_in):
    train, test = load_add(limit=40), load_add("test", 12)
    assert train[0].keys() == {"question", "answer", "metadata", "generator"} and (len(train), len(test)) == (40, 12)
    assert train[0]["generator"] == {"task": "add", "args": {}} and train.source == "reasoning_gym:add (train)"
    questions = [row["question"] for row in (*train, *test)]
    assert len(set(questions)) == 52
    rows = gym_rows.make_gym_rows("reasoning_gym:add", {}, "train", 7)
    assert len(rows) == 7 and load_add(limit=7) == train[:7] == rows and load_add(limit=80)[:40] == train
    assert len(load_add()) + len(load_add("test")) == len({(i * 7 % 60, i % 3) for i in range(20_000)})  # all that there are
    assert load_add(limit=5, seed=9) != train[:5]
    import reasoning_gym

    made = reasoning_gym.Add.made
    assert load_add(limit=40) == train and reasoning_gym.Add.made == made  # they are kept


def test_the_split_of_a_question_does_not_depend_on_the_arguments(stand_in):
    """So a run that is evaluated with other arguments is not evaluated on what it was trained on."""
    train, test = ({row["question"] for row in load_rows("reasoning_gym:add", None, split, None, args)}
                   for split, args in (("train", {}), ("test", {"below": 30})))  # fmt: skip
    assert test and not train & test


def test_rows_do_not_depend_on_what_was_read_before(stand_in, monkeypatch):
    test = load_add("test", 9)
    monkeypatch.setattr(gym_rows, "_made", {})
    load_add(limit=30)
    assert load_add("test", 9) == test


def test_it_is_evaluated_on_its_test_split(stand_in):
    train, held_out = load_splits(DataConfig(path="reasoning_gym:add", args={"below": 30}, limit=10), 4)
    assert held_out == load_add("test", 4, below=30) and train == load_rows("reasoning_gym:add", None, "train", 10, {"below": 30})


@pytest.mark.parametrize(
    "path, split, args, message",
    [
        ("reasoning_gym:ad", "train", {}, r"data.path is 'reasoning_gym:ad', which is no task of reasoning-gym; known: add \(did you mean add\?\)"),
        ("reasoning_gym:add", "dev", {}, "whose splits are train and test, and not 'dev'"),
        ("reasoning_gym:add", "train", {"belo": 3}, r"unknown key data.args.belo of reasoning_gym:add; known: below, seed, size"),
        ("reasoning_gym:add", "train", {"below": 0}, r"data.args is \{'below': 0\}, which reasoning_gym:add refuses: below must be positive"),
    ],
)  # fmt: skip
def test_mistakes_in_the_source(stand_in, path, split, args, message):
    with pytest.raises(ConfigError, match=message):
        load_rows(path, None, split, 3, args)


def test_mistakes_in_the_configuration():
    with pytest.raises(ConfigError, match="data.args is {'a': 1}, but data.path is 'builtin:word_problems', which takes no arguments"):
        load_overrides(["data.args={a: 1}"])
    with pytest.raises(ConfigError, match=r"data.sources\[0\].args is {'a': 1}, but data.sources\[0\].path is 'x.jsonl'"):
        load_overrides(["data.sources=[{path: x.jsonl, args: {a: 1}}]"])
    with pytest.raises(ConfigError, match="data.subset is 'x', but reasoning_gym:add has no subsets"):
        load_rows("reasoning_gym:add", "x", "train", 3)


def test_without_the_package_one_sentence_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"which needs the package reasoning-gym, which is not installed: pip install -e '.\[reasoning_gym\]'"):
        load_add()
    assert load_overrides(["rewards=reasoning_gym"]).rewards[0].name == "reasoning_gym"  # the data is read before the model


@pytest.mark.parametrize(
    "text, prompt, answer",
    [
        ("7", None, "7"),
        (" 7 \n", None, "7"),
        ("It is <answer>6</answer>, no, <answer> 7\n</answer>.", None, "7"),
        ("3 + 4\n#### 7", None, "7"),
        ("<think><answer>5</answer></think>7", None, "7"),
        ("5</think>7", "2 + 5\n<think>", "7"),
        ("still thinking", "2 + 5\n<think>", None),
        ("", None, None),
        ("<answer></answer>", None, None),
    ],
)
def test_the_answer_in_a_completion(text, prompt, answer):
    assert find_answer(text, prompt) == answer


def score(texts, args=None, prompts=None):
    row = load_add(limit=1, **(args or {}))[0]
    columns = {name: [value] * len(texts) for name, value in row.items()}
    return REWARDS.build("reasoning_gym")(texts, prompts, **columns), int(row["answer"])


def test_the_reward_is_the_score_of_the_tasks_own_scorer(stand_in):
    gold = score(["0"])[1]
    assert score([str(gold), f"#### {gold + 1}", str(gold + 2), "", "no number"])[0] == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert score([f"1</think>{gold}"], prompts=["p<think>"])[0] == [1.0]
    assert score(["scorer?"], {"below": 50})[0] == pytest.approx([0.15])  # it has the row's arguments, and makes no items
    reward = build_reward("reasoning_gym", timeout=5)
    assert isinstance(reward, RewardWorker)  # a scorer may take long on what a policy writes
    reward.close()


@pytest.mark.slow
def test_a_run_on_a_task(stand_in, tmp_path, here):
    words = [
        f"output_dir={tmp_path}/runs", "data.path=reasoning_gym:add", "data.args.below=30", "data.args.seed=2", "rewards=reasoning_gym",
        "evaluation.reward=reasoning_gym", "trainer.num_steps=1", "trainer.completions_per_step=16", "evaluation.num_tasks=4", "sampling.max_new_tokens=6",
    ]  # fmt: skip
    done = here("train", "--config", "configs/tiny.yaml", *words)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny/completions.jsonl").read_text().splitlines()]
    assert all(0 <= row["reward"] <= 1 for row in rows) and rows[0]["prompt"].endswith(" =\n")
    assert here("evaluate", tmp_path / "runs/tiny", "--limit", 3, "--samples", 0).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["chain_sum", "spell_backward", "letter_counting", "calendar_arithmetic", "simple_equations"])
def test_the_package_scores_its_own_answers_with_1(task):
    pytest.importorskip("reasoning_gym")
    train, test = (load_rows(f"reasoning_gym:{task}", None, split, 8, {}) for split in ("train", "test"))
    rows = [*train, *test]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    reward = REWARDS.build("reasoning_gym")
    assert reward([str(row["answer"]) for row in rows], **columns) == [1.0] * len(rows)
    assert max(reward(["?"] * len(rows), **columns)) < 1
