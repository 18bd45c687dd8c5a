"""Rewards that see whole groups, and those that read the values of the others."""

import asyncio

import pytest

from grpo_core.batch import Task
from grpo_core.config.files import load
from grpo_core.config.sections import RewardConfig, RunConfig
from grpo_core.objective.rewards import REWARDS, length_by_pass_rate
from grpo_core.schema import ConfigError
from grpo_core.scoring.async_reward import AsyncReward
from grpo_core.scoring.reward_call import attempt, find_missing_columns
from grpo_core.scoring.scoring import Reward, close_rewards, score
from grpo_core.training.prepare import make_rewards

TASKS = [Task(0, "p", [1], {"answer": "7", "notes": ["x"]}), Task(1, "q", [1], {"answer": "8", "notes": []})]
TEXTS = ["7", "7.", "no", "8", "8 8", "888"]  # G = 3


def shortest(groups, prompts, notes, *, bonus: float = 1.0):
    """The shortest of each group gets the bonus."""
    assert groups == [TEXTS[:3], TEXTS[3:]] and prompts == ["p", "q"] and notes == [["x"], []]
    notes[0].clear()
    groups[0].append("changed")
    return [[bonus * (len(text) == min(map(len, group))) for text in group[:3]] for group in groups]


async def shortest_later(groups, prompts, notes):
    await asyncio.sleep(0)
    return shortest(groups, prompts, notes)


def test_a_group_function_gets_and_returns_lists_of_groups():
    for function in (shortest, shortest_later, AsyncReward(shortest_later, 5)):
        scores = score([Reward("shortest", 1.0, function)], TASKS, TEXTS, 3)
        assert scores.failures == () and scores.rewards.tolist() == [[1, 0, 0], [1, 0, 0]]
    assert TASKS[0].columns["notes"] == ["x"] and len(TEXTS) == 6


def test_a_group_of_one_is_a_group():
    assert attempt(lambda groups: [[1.0 * len(group)] for group in groups], ["a", "b"], {}).values == [1.0, 1.0]
    reads = attempt(lambda groups, other_rewards: other_rewards["x"], ["a", "b"], {"other_rewards": {"x": [1.0, 2.0]}})
    assert reads.values == [1.0, 2.0]


@pytest.mark.parametrize("values, why", [
    ([[1.0] * 3], "returned 1 list; it must return 2 lists of 3 values"),
    ([1.0] * 6, "returned 6 lists; it must return 2 lists of 3 values"),
    ([1.0] * 2, "returned 1.0 for group 0; it must return 2 lists of 3 values"),
    ([[1.0] * 3, [1.0] * 2], "returned 2 values for group 1; it must return 2 lists of 3 values"),
    (None, "returned None; it must return 2 lists of 3 values"),
    ([[1.0] * 3, [1.0, "x", 0.0]], "returned 'x' for completion 4; it must be None or a number from -1e6 to 1e6"),
])  # fmt: skip
def test_what_is_no_list_of_groups(values, why):
    assert attempt(lambda groups: values, TEXTS, {}, 3).why == why


def test_generators_and_none_are_values():
    outcome = attempt(lambda groups: ((None for _ in group) for group in groups), TEXTS, {}, 3)
    assert outcome.values == [None] * 6 and outcome.why is None


def test_one_that_reads_the_others_is_called_last_and_gets_their_values_in_its_own_form():
    seen = {}

    def flat(completions, other_rewards):
        seen["flat"] = other_rewards
        other_rewards["right"].clear()
        return [0.0] * len(completions)

    def grouped(groups, other_rewards):
        seen["grouped"] = other_rewards
        return [[0.0] * 3 for _ in groups]

    def everything(completions, **columns):
        assert "other_rewards" not in columns
        return [None] * len(completions)

    right = REWARDS.build("correct_answer")
    rewards = [Reward("flat", 1.0, flat, reads_others=True), Reward("grouped", 1.0, grouped, reads_others=True)]
    rewards += [Reward("right", 0.0, right), Reward("none", 1.0, everything)]
    scores = score(rewards, TASKS, TEXTS, 3)
    assert scores.failures == () and list(scores.by_name) == ["flat", "grouped", "right", "none"]
    assert seen["grouped"] == {"right": [[1, 1, 0], [1, 1, 0]], "none": [[None] * 3] * 2}  # not those that read others
    assert set(seen["flat"]) == {"right", "none"} and seen["flat"]["none"] == [None] * 6


FILE = """
def spread(groups, other_rewards, answer, *, power: int = 1):
    right = other_rewards["correct_answer"]
    return [[(value - sum(values) / len(values)) ** power for value in values] for values in right]
"""


@pytest.mark.slow
def test_a_users_group_reward_that_reads_the_others_runs_in_its_process(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    name = f"{tmp_path / 'mine.py'}:spread"
    config = load("tiny", [f"rewards=[{{name: '{name}', args: {{power: 2}}}}, correct_answer]"])
    rewards = make_rewards(config)
    scores = score(rewards, TASKS, TEXTS, 3)
    close_rewards(reward.function for reward in rewards)
    assert scores.failures == () and scores.by_name["mine.py:spread"][0].tolist() == pytest.approx([1 / 9, 1 / 9, 4 / 9])


@pytest.mark.parametrize("values, rates", [
    ([[1.0, 1.0, 1.0]], [1.0]), ([[1.0, 0.0, 1.0]], [2 / 3]), ([[0.0, 0.0, 0.0]], [1 / 3]), ([[1.0, None, 0.0]], [1 / 2]),
    ([[0.5, 0.0, 1.0]], [1 / 3]),
])  # fmt: skip
def test_length_by_pass_rate(values, rates):
    groups = [["a" * 10, "", "a" * 100]]
    expected = [[pytest.approx(-length / 1000 * rate) for length in (10, 0, 100)] for rate in rates]
    assert length_by_pass_rate(groups, other_rewards={"correct_answer": values}) == expected
    scaled = length_by_pass_rate(groups, other_rewards={"mine": values}, of="mine", scale=10.0)
    assert scaled == [[pytest.approx(100 * value.expected) for value in expected[0]]]
    assert length_by_pass_rate(groups, other_rewards={"correct_answer": [[None] * 3]}) == [[None] * 3]


def test_length_by_pass_rate_in_a_run():
    config = load("tiny", ["rewards=[{name: length_by_pass_rate, weight: 0.5}, correct_answer]"])
    scores = score(make_rewards(config), TASKS, TEXTS, 3)
    assert scores.rewards[0].tolist() == pytest.approx([1 - 1 / 3000, 1 - 2 / 3000, -2 / 3000])
    assert find_missing_columns(REWARDS.get("length_by_pass_rate"), ["answer"]) == []


@pytest.mark.parametrize("words, sentence", [
    (["rewards=[length_by_pass_rate]"], r"rewards\[0\] is length_by_pass_rate, which reads the values of other rewards, but there is none"),
    (["rewards=[think_format, length_by_pass_rate]"],
     r"rewards\[1\].args.of is 'correct_answer'; it must be another reward of the run: think_format$"),
    (["rewards=[think_format, {name: length_by_pass_rate, args: {of: x}}]"], r"rewards\[1\].args.of is 'x'"),
    (["evaluation.reward=length_by_pass_rate"], "evaluation.reward is 'length_by_pass_rate', which reads the other rewards; an evaluation has none"),
])  # fmt: skip
def test_what_has_nothing_to_read_is_refused(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load("tiny", words)


def test_the_reward_that_is_read_may_have_any_name_of_the_run():
    load("tiny", ["rewards=[think_format, {name: length_by_pass_rate, args: {of: think_format}}]"])
    assert not make_rewards(RunConfig(rewards=[RewardConfig("correct_answer")]))[0].reads_others
