import math
from fractions import Fraction

import pytest
import torch

from grpo_core.batch import Task
from grpo_core.rewards import REWARDS, Reward, final_number, missing_columns, score


def call(name, completions, **columns):
    args = {k: columns.pop(k) for k in list(columns) if k in ("strict", "think_weight", "diversity_weight")}
    return REWARDS.build(name, args)(completions, **columns)


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 18", 18),
        ("7 - 3 = 4 \n#### 1,234.50 dollars", Fraction("1234.5")),
        ("#### 5 apples and 3 pears", 5),  # the first after the marker
        ("#### 3\n#### 4", 4),
        ("#### -3", -3),
        ("####", None),
        (r"so \boxed{42}", 42),
        (r"first \boxed{1}, then \boxed{\$1{,}200}.", 1200),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{3} units", 3),
        ("It is $1,000,000.", 1_000_000),
        ("3 + 4 = 7.", 7),
        ("5 - 3", 3),
        ("x = 3-4", 4),
        ("the answer is -5", -5),
        ("−7 degrees", -7),
        ("-$5", -5),
        ("$-5", -5),
        ("(-3)", -3),
        ("50%", 50),
        (".5", Fraction(1, 2)),
        ("18.00", 18),
        ("3/4", Fraction(3, 4)),
        ("1,2,3", 3),
        ("12 € each, 3 days", 3),
        ("none", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_strict_needs_a_marker():
    assert final_number("it is 7", strict=True) is None
    assert final_number("#### 7", strict=True) == final_number(r"\boxed{7}", strict=True) == 7


def test_correct_answer():
    gold = ["She has 3 * 6 = 18.\n#### 18", "18.0", "#### 18", "no number here"]
    assert call("correct_answer", ["$18", "#### 18", "17", "18"], answer=gold) == [1.0, 1.0, 0.0, None]
    assert call("correct_answer", ["18", "#### 18"], answer=["18", "18"], strict=True) == [0.0, 1.0]


@pytest.mark.parametrize(
    "text, has_tags, well_formed",
    [
        ("<think>a</think>b", 1, 1),
        ("<think>a</think>", 1, 0),  # no answer
        ("<think> </think>b", 1, 0),  # no thought
        ("x<think>a</think>b", 1, 0),
        ("<think>a</think><think>b</think>c", 1, 0),
        ("<think>a\nb</think>\n\nc", 1, 1),
        ("</think><think>", 0, 0),
        ("<think>a", 0, 0),
        ("a", 0, 0),
    ],
)
def test_think_rewards(text, has_tags, well_formed):
    assert call("has_think_tags", [text], prompts=["Q"]) == [has_tags]
    assert call("think_format", [text], prompts=["Q"]) == [well_formed]


def test_a_block_that_the_prompt_opened_counts():
    assert call("has_think_tags", ["a</think>b"], prompts=["Q\n<think>\n"]) == [1.0]
    assert call("think_format", ["a</think>b"], prompts=["Q\n<think>"]) == [1.0]


def test_combined_is_the_recipe():
    text = "<think>ab</think>"
    distinct = len(set(text))
    assert call("combined", [text], prompts=["Q"]) == [pytest.approx(0.7 + 0.3 * distinct)]
    assert call("combined", [text], prompts=["Q"], think_weight=1, diversity_weight=0) == [1.0]
    assert call("num_unique_chars", ["aab", ""]) == [2.0, 0.0]


TASKS = [Task(0, "p", [1], {"answer": "a", "level": 1}), Task(1, "q", [1], {"answer": "b", "level": 2})]


def test_scores_are_weighted_named_and_prompt_major():
    def level_only(completions, level):
        return [float(x) for x in level]

    def everything(completions, prompts, **columns):
        assert columns["answer"] == ["a", "a", "b", "b"] and prompts == ["p", "p", "q", "q"]
        return [None if c == "?" else float(len(c)) for c in completions]

    rewards = [Reward("level", 10.0, level_only), Reward("len", 1.0, everything), Reward("seen", 0.0, level_only)]
    scores = score(rewards, TASKS, ["x", "xx", "?", "xxxx"], 2)
    assert scores.rewards.tolist() == [[11, 12], [20, 24]]  # an unscored part is left out of the sum
    assert scores.by_name["level"].tolist() == scores.by_name["seen"].tolist() == [[1, 1], [2, 2]]
    assert math.isnan(scores.by_name["len"][1, 0])
    alone = score(rewards[1:], TASKS, ["x", "xx", "?", "xxxx"], 2)
    assert math.isnan(alone.rewards[1, 0]) and torch.isfinite(alone.rewards).sum() == 3


def test_what_a_function_may_take():
    tasks = [Task(0, "p", [1], {"answer": "a", "limit": 9})]

    def trl_style(prompts, completions, answer=None, **kwargs):
        return [float(p == "p" and a == "a") for p, a in zip(prompts, answer, strict=True)]

    def configured(texts, *, limit: int = 3, **columns):
        return [float(limit)] * len(texts)  # not the column of that name

    assert score([Reward("r", 1.0, trl_style)], tasks, ["x", "y"], 2).rewards.tolist() == [[1, 1]]
    assert score([Reward("r", 1.0, configured)], tasks, ["x", "y"], 2).rewards.tolist() == [[3, 3]]
    assert missing_columns(REWARDS.get("correct_answer"), ["question"]) == ["answer"]
    assert missing_columns(trl_style, []) == missing_columns(configured, []) == []


@pytest.mark.parametrize("values, message", [
    ([math.inf, 0.0], "reward bad returned inf for completion 0; it must be a finite number, or None"),
    ([0.0, math.nan], "reward bad returned nan for completion 1"),
    ([0.0, "1.0"], "reward bad returned '1.0' for completion 1"),
    ([0.0, [1.0, 2.0]], r"reward bad returned \[1.0, 2.0\] for completion 1"),
    ([1.0], "reward bad returned 1 values for 2"),
    (1.0, "reward bad returned 1.0; it must return a list"),
    ("ab", "reward bad returned 'ab'; it must return a list"),
    (None, "reward bad returned None; it must return a list"),
])  # fmt: skip
def test_what_a_reward_returns_is_checked_in_one_sentence(values, message):
    with pytest.raises(ValueError, match=message) as error:
        score([Reward("bad", 1.0, lambda completions: values)], TASKS[:1], ["a", "b"], 2)
    assert "\n" not in str(error.value)


def test_a_reward_that_raises_is_named_with_its_place():
    def raising(completions):
        return [1.0 / 0 for _ in completions]

    with pytest.raises(ValueError, match=r"reward bad raised ZeroDivisionError: float division by zero \(test_rewards.py, line \d+\)"):
        score([Reward("bad", 1.0, raising)], TASKS[:1], ["a", "b"], 2)


def test_arrays_and_truth_values_are_numbers():
    for values in (torch.tensor([1.0, 0.0]), [True, False], (1, 0)):
        rewards = score([Reward("fine", 1.0, lambda completions, v=values: v)], TASKS[:1], ["a", "b"], 2).rewards
        assert rewards.tolist() == [[1.0, 0.0]]


def test_a_file_that_cannot_be_loaded_is_one_sentence(tmp_path):
    (tmp_path / "bad.py").write_text("def f(:")
    with pytest.raises(ValueError, match="bad.py cannot be loaded: SyntaxError"):
        REWARDS.get(f"{tmp_path / 'bad.py'}:f")
    (tmp_path / "good.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
        "def f(completions):\n    return [A().x] * len(completions)\n"
    )
    assert REWARDS.get(f"{tmp_path / 'good.py'}:f")(["a"]) == [1]


def test_a_reward_from_a_users_own_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def shout(completions, *, mark='!', **columns):\n    return [float(mark in c) for c in completions]\n"
    )
    assert REWARDS.build(f"{file}:shout", {"mark": "?"})(["a?", "a!"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="unknown key reward.args.sign; known: mark"):
        REWARDS.build(f"{file}:shout", {"sign": "?"})
    with pytest.raises(ValueError, match="has no function whisper"):
        REWARDS.get(f"{file}:whisper")
    with pytest.raises(ValueError, match="there is no file"):
        REWARDS.get("nowhere.py:f")
