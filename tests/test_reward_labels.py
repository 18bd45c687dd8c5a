"""The names of rewards in files: the same in metrics, completions and `other_rewards`, from whatever folder."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from grpo_core.batch import Task
from grpo_core.commands.sample import describe_rewards
from grpo_core.config.files import load
from grpo_core.objective.reward_labels import OtherRewards, find_label, label_rewards
from grpo_core.schema import ConfigError
from grpo_core.training.prepare import make_rewards

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
MINE = """
def right(completions, answer):
    return [float(len(text)) for text in completions]

def twice(completions, other_rewards):
    return [2 * value for value in other_rewards["mine.py:right"]]
"""


@pytest.mark.parametrize("names, labels", [
    (["combined", "mine.py:f"], ["combined", "mine.py:f"]),
    (["/home/me/mine.py:f", "x/mine.py:g"], ["mine.py:f", "mine.py:g"]),
    (["/x/a/mine.py:f", "/y/b/mine.py:f"], ["a/mine.py:f", "b/mine.py:f"]),
    (["/x/a/mine.py:f", "/y/a/mine.py:f", "/y/a/mine.py:g"], ["x/a/mine.py:f", "y/a/mine.py:f", "mine.py:g"]),
    (["mine.py:f", "/x/mine.py:f"], ["mine.py:f", "x/mine.py:f"]),
    (["/x/mine.py:f", "x/mine.py:f"], ["/x/mine.py:f", "x/mine.py:f"]),
])  # fmt: skip
def test_a_label_is_as_short_as_the_others_let_it_be(names, labels):
    assert [*label_rewards(names).values()] == labels and len({*labels}) == len(names)


def test_a_reward_is_found_by_a_name_with_other_folders():
    labels = ["combined", "a/mine.py:f", "b/mine.py:f", "mine.py:g"]
    names = ["combined", "/x/a/mine.py:f", "mine.py:f", "runs/r/code/mine.py:g", "mine.py:h", "other"]
    assert [find_label(name, labels) for name in names] == ["combined", "a/mine.py:f", None, "mine.py:g", None, None]
    values = pickle.loads(pickle.dumps(OtherRewards({"mine.py:g": [1.0]})))
    assert values["x/mine.py:g"] == values.get("mine.py:g") == [1.0] and "x/mine.py:g" in values and [*values] == ["mine.py:g"]
    assert values.get("f") is None and "f" not in values and 3 not in values
    with pytest.raises(KeyError, match="mine.py:h"):
        values["mine.py:h"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "code" / "mine.py"
    path.parent.mkdir()
    path.write_text(MINE)
    return path


def test_an_argument_that_names_another_reward_may_have_other_folders(file):
    of = json.dumps([{"name": f"{file}:right"}, {"name": "length_by_pass_rate", "args": {"of": "mine.py:right"}}])
    assert [reward.name for reward in make_rewards(load(TINY, [f"rewards={of}"]))] == ["mine.py:right", "length_by_pass_rate"]
    with pytest.raises(ConfigError, match="must be another reward of the run"):
        load(TINY, [f"rewards={of.replace('mine.py:right', 'mine.py:wrong', 2).replace('mine.py:wrong', 'mine.py:right', 1)}"])


def test_the_metric_of_a_spread_is_no_name_of_another_reward(file):
    file.write_text(MINE + "\ndef right_std(completions):\n    return [0.0] * len(completions)\n")
    other = file.with_name("copy") / "mine.py"
    other.parent.mkdir()
    shutil.copy(file, other)
    with pytest.raises(ConfigError, match="but rewards/mine.py:right_std is a metric of the reward mine.py:right"):
        load(TINY, [f'rewards=["{file}:right", "{other}:right_std"]'])


def test_a_sample_says_why_a_reward_failed(file):
    rewards = make_rewards(load(TINY, [f'rewards=["{file}:right", "{file}:twice"]']))
    (notes,) = describe_rewards(rewards, Task(0, "p", [1], {"question": "q"}), ["text"], 1)
    assert notes[1] == "mine.py:right not computed: it needs the column answer"
    assert notes[0].startswith("reward mine.py:twice raised KeyError: 'mine.py:right'")


@pytest.mark.slow
def test_a_run_has_the_same_names_wherever_it_is_evaluated(file, tmp_path, here, monkeypatch):
    """The file is gone, so the copy in the run folder takes its place."""
    rewards = f'rewards=["{file}:right", "{file}:twice", correct_answer]'
    small = ["trainer.num_steps=1", "trainer.completions_per_step=16", "evaluation.num_tasks=2", "sampling.max_new_tokens=8", "data.limit=200"]
    done = here("train", "--config", TINY, *small, rewards, f"output_dir={tmp_path}", "name=r")
    assert done.returncode == 0, done.stderr
    names = ["mine.py:right", "mine.py:twice", "correct_answer"]
    (row,) = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [key for key in row if key.startswith("failed/")] == [f"failed/{name}" for name in names] and row["rewards/mine.py:twice"] == 2 * row["rewards/mine.py:right"]
    completion = json.loads((tmp_path / "r" / "completions.jsonl").read_text().splitlines()[0])
    assert [*completion["rewards"]] == names
    file.unlink()
    monkeypatch.chdir(tmp_path)
    done = here("evaluate", tmp_path / "r", "--samples", "0", "--no-base")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "evaluate" / "evaluate.json").read_text())["policy"]
    assert result["reward mine.py:twice"]["value"] == 2 * result["reward mine.py:right"]["value"] > 0
    assert "warning" not in done.stdout
    done = here("evaluate", tmp_path / "r", "--samples", "0", "--no-base", "rewards=" + json.dumps([str(tmp_path / "r" / "code" / "mine.py:twice"), "correct_answer"]))
    assert done.stdout.count("warning: reward mine.py:twice raised KeyError: 'mine.py:right'") == 1
