import math
import random
import re
import time
from fractions import Fraction

import pytest
import torch

from grpo_core.batch import Task
from grpo_core.objective.rewards import REWARDS, final_number
from grpo_core.schema import ConfigError
from grpo_core.scoring.reward_call import attempt, find_missing_columns
from grpo_core.scoring.scoring import Reward, score


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


PIECES = [
    "1", "-", ",", ".", "/", "$", " ", "\n", "1,111", ",111", "####", "#", "\\boxed{", "\\boxed", "{", "}", "{}", "\\frac{1}{2}",
    "\\frac", "<think>", "</think>", "<think", "a", "−", "{,}", "\\,", "9.9", "1/", "/2", "(", ")",
]  # fmt: skip


def seconds(text, answer="#### 7"):
    start = time.process_time()
    call("correct_answer", [text], answer=[answer])
    call("correct_answer", [text], answer=[answer], strict=True)
    for name in ("has_think_tags", "think_format", "combined"):
        call(name, [text], prompts=["p"])
    return time.process_time() - start


@pytest.mark.parametrize("head", ["", "#### "])
def test_no_text_takes_long_to_read(head):
    """100 kB of any two pieces in turn, and of many at random: each is read in a moment, and none is an error.

    Above half a second it must at least not grow faster than the text does: twice the text takes twice as long.
    """
    draw = random.Random(head)
    texts = [
        head + (one + other) * (100_000 // len(one + other))
        for one in PIECES
        for other in ["", *draw.sample(PIECES, 2)]
    ]
    texts += [head + "".join(draw.choices(draw.sample(PIECES, 4), k=40_000)) for _ in range(20)]
    texts += [head + "1" * 50_000 + ",3", head + "1/" + "2" * 50_000 + ",3", head + "1" * 50_000 + "." + "2" * 50_000]
    slow = {
        text[:30]: took
        for text in texts
        if (took := seconds(text)) > 0.5 and took > 3 * seconds(text[: len(text) // 2])  # a slow machine is no fault
    }
    assert not slow


def test_a_number_of_thousands_of_digits_is_no_answer():
    assert final_number("#### " + "7" * 5000) is None and final_number("#### 1/" + "7" * 5000) is None
    assert final_number("7" * 200) == int("7" * 200)


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
    assert find_missing_columns(REWARDS.get("correct_answer"), ["question"]) == ["answer"]
    assert find_missing_columns(trl_style, []) == find_missing_columns(configured, []) == []


@pytest.mark.parametrize("values, failed, message", [
    ([math.inf, 0.0], [True, False], "reward bad returned inf for completion 0; it must be None or a number from -1e6 to 1e6"),
    ([0.0, math.nan], [False, True], "reward bad returned nan for completion 1"),
    ([0.0, 1e30], [False, True], "reward bad returned 1e+30 for completion 1"),
    ([0.0, 10**400], [False, True], "reward bad returned 1000000000"),
    ([0.0, -1000001], [False, True], "reward bad returned -1000001 for completion 1"),
    ([0.0, "1.0"], [False, True], "reward bad returned '1.0' for completion 1"),
    ([0.0, [1.0, 2.0]], [False, True], "reward bad returned [1.0, 2.0] for completion 1"),
    ([1.0], [True, True], "reward bad returned 1 value for 2"),
    (1.0, [True, True], "reward bad returned 1.0; it must return a list"),
    ("ab", [True, True], "reward bad returned 'ab'; it must return a list"),
    (None, [True, True], "reward bad returned None; it must return a list"),
    ({"a": 1.0}, [True, True], "reward bad returned a dict, "),
])  # fmt: skip
def test_what_is_no_reward_is_none_counted_and_told_in_one_sentence(values, failed, message):
    rewards = [Reward("bad", 1.0, lambda completions: values), Reward("good", 1.0, lambda completions: [2.0, 3.0])]
    scores = score(rewards, TASKS[:1], ["a", "b"], 2)
    assert scores.failed["bad"].tolist() == [failed] and not scores.failed["good"].any()
    assert scores.by_name["bad"].isnan().tolist() == [failed] and scores.by_name["good"].tolist() == [[2, 3]]
    assert scores.rewards.isfinite().all() and len(scores.failures) == 1
    assert scores.failures[0].startswith(message) and "\n" not in scores.failures[0]


def test_the_outcome_of_a_failure_holds_nothing_else():
    outcome = attempt(lambda completions: [1.0, math.nan, None], ["a", "b", "c"], {})
    assert outcome.values == [1.0, None, None] and outcome.failed == [False, True, False]


def test_none_is_no_failure():
    scores = score([Reward("r", 1.0, lambda completions: [None, 1e6])], TASKS[:1], ["a", "b"], 2)
    assert not scores.failed["r"].any() and scores.failures == () and scores.by_name["r"][0, 1] == 1e6


def test_a_reward_that_raises_is_named_with_its_place():
    def raising(completions):
        return [1.0 / 0 for _ in completions]

    (why,) = score([Reward("bad", 1.0, raising)], TASKS[:1], ["a", "b"], 2).failures
    assert re.fullmatch(
        r"reward bad raised ZeroDivisionError: (float )?division by zero \(test_rewards.py, line \d+\)", why
    )


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


SILENT = """
class Silent(Exception):
    def __str__(self):
        raise ZeroDivisionError
    __repr__ = __str__

class Odd:
    def __repr__(self):
        raise ZeroDivisionError
    __float__ = __repr__

def failing(completions):
    raise Silent

def odd(completions):
    return [Odd() for _ in completions]

def odd_list(completions):
    return Odd()

def odd_groups(groups):
    return [Odd() for _ in groups]
"""


@pytest.mark.parametrize("name, why", [
    ("failing", "raised Silent: its message cannot be read, because __str__ raises ZeroDivisionError (silent.py, line 13)"),
    ("odd", "returned a Odd without a repr for completion 0; it must be None or a number from -1e6 to 1e6"),
    ("odd_list", "returned a Odd without a repr; it must return a list with a number for each"),
    ("odd_groups", "returned a Odd without a repr for group 0; it must return 1 list of 2 values"),
])  # fmt: skip
def test_values_and_exceptions_that_cannot_be_shown_are_a_sentence(tmp_path, name, why):
    (tmp_path / "silent.py").write_text(SILENT)
    outcome = attempt(REWARDS.build(f"{tmp_path}/silent.py:{name}"), ["a", "b"], {}, 2)
    assert (outcome.why, outcome.failed) == (why, [True, True])


def test_an_exception_at_the_import_that_cannot_be_shown_is_a_sentence(tmp_path):
    (tmp_path / "silent.py").write_text(SILENT + "\nraise Silent\n")
    with pytest.raises(ConfigError, match="silent.py cannot be loaded: Silent: its message cannot be read, because __str__ raises ZeroDivisionError$"):
        REWARDS.get(f"{tmp_path}/silent.py:failing")


READS_MESSAGES = """
def first(completions, **columns):
    return [float(len(completion[0]["content"])) for completion in completions]

def last(completions, **columns):
    texts = [completion[-1].get("content") for completion in completions]
    return [float(len(text)) for text in texts]

def every(completions, **columns):
    return [float(sum(len(message["content"]) for message in completion)) for completion in completions]

def column(completions, info):
    return [row["score"] for row in info]
"""


def test_a_reward_that_takes_completions_for_messages_is_told_that_they_are_texts(tmp_path):
    (tmp_path / "messages.py").write_text(READS_MESSAGES)
    for name in ("first", "last", "every", "column"):
        why = attempt(REWARDS.build(f"{tmp_path}/messages.py:{name}"), ["yes"], {"info": ["a"], "prompts": ["?"]}).why
        assert why.startswith("raised ") and "(messages.py, line " in why
        clause = "; completions and prompts are texts here, not lists of messages: write completion, not completion[0]['content']"
        assert why.endswith(clause) == (name != "column"), why
