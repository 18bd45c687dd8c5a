"""The reward `countdown`: the equation is parsed, never run, and must use the numbers of its task."""

import ast
import random
import time
from collections import Counter
from fractions import Fraction

import pytest

from grpo_core.objective.countdown import compute, find_equation, read_number, read_numbers, solve
from grpo_core.objective.rewards import REWARDS


def judge(text, nums=(44, 19, 3), target=21, **args):
    return REWARDS.build("countdown", args)([text], nums=[list(nums)], target=[target])[0]


@pytest.mark.parametrize("text, value", [
    ("<think>44-19 is 25</think>\n<answer>(44 + 19) / 3</answer>", 1.0),
    ("<answer>1 + 2</answer> no: <answer> (44+19)/3 = 21 </answer>", 1.0),
    ("#### (44 + 19) ÷ 3 = 21.", 1.0),
    (r"\boxed{\frac{44+19}{3}}", 1.0),
    (r"so \boxed{\left(44 + 19\right) \div 3 = 21}", 1.0),
    ("The answer is (19 + 44)/3", 1.0),
    ("I add first.\nEquation: [44 + 19] / 3 = 21", 1.0),
    (r"#### $(44 + 19) / 3$", 1.0),
    ("**(44 + 19)/3**", 1.0),
    ("#### -(-44 - 19) / 3", 1.0),
    ("#### (44 + 19) / 3 = 22", 0.0),  # the sides differ
    ("#### (44 + 19) / 3 = 63 / 3", 1.0),
    ("#### 21", 0.0),
    ("#### 44 + 19 - 42", 0.0),  # another number
    ("#### (44 + 19) / 3 * 3 / 3", 0.0),  # a number twice
    ("#### 21 = (44 + 19) / 3", 0.0),
    ("#### 44 - 19 - 3 = 21", 0.0),
    ("#### 44 - 19 - 3 = 22", 0.0),
    ("#### (44 + 19) // 3", 0.0),
    ("#### (44 + 19)(1/3)", 0.0),
    ("#### 44 / (19 - 19)", 0.0),
    ("<think>(44 + 19) / 3</think> I do not know", 0.0),
    ("<think>#### (44 + 19) / 3", 0.0),
    ("", 0.0),
])  # fmt: skip
def test_what_counts(text, value):
    assert judge(text) == value


def test_arguments():
    assert judge("#### 44 - 19 - 3", other_value=0.1) == judge("#### 44 / 19 / 3 = 8", other_value=0.1) == 0.1
    assert judge("#### 44 - 19", other_value=0.1) == judge("#### 1 + 2", other_value=0.1) == judge("", other_value=0.1) == 0
    assert judge("#### 44 - 19", target=25) == 0 and judge("#### 44 - 19", target=25, use_all=False) == 1
    assert judge("#### 44 - 44", target=0, use_all=False) == 0
    assert judge("(44+19)/3") == 1 and judge("(44+19)/3", strict=True) == 0
    assert judge("<think>#### (44+19)/3", outside_thinking=False) == 1
    prompted = REWARDS.build("countdown")(["(44+19)/3"], prompts=["Q <think>"], nums=[[44, 19, 3]], target=[21])
    assert prompted == [0.0]  # a block that the prompt has opened and the completion has not closed


@pytest.mark.parametrize("value, numbers", [
    ([3, 7.0, "8"], [3, 7, 8]), ("[3, 7, 8]", [3, 7, 8]), ("3 7 8", [3, 7, 8]), ((3,), [3]), ([2.5], [Fraction(5, 2)]),
    ([], None), ("", None), (None, None), ([3, None], None), ([3, "x"], None), ([True], None), ([-3], None), (3, None), ([[3]], None),
    ([float("nan")], None), ([1e300], None),
])  # fmt: skip
def test_the_columns(value, numbers):
    assert read_numbers(value) == numbers
    if numbers is None:
        assert judge("#### 3", nums=["x"]) is None and judge("#### 3", nums=[3], target="x") is None


def test_the_facts_of_the_reward():
    function = REWARDS.get("countdown")
    assert function.gold == {"nums": read_numbers, "target": read_number} and function.never_null == ("nums", "target")


@pytest.mark.parametrize("text", [
    "", "1 2", "1..2", "1.", ".5", "1,000", "(1", "1)", "()", "1 +", "+1", "--1", "1 - -", "2**3", "2*/3", "a", "1e3", "__import__('os')", "1;2",
    r"\frac{1}", r"\frac12", r"\fraction{1}{2}", "1 \x00", "(" * 41 + "1" + ")" * 41, "1\\", "١٢", "9" * 31,
])  # fmt: skip
def test_what_is_no_expression(text):
    assert compute(text) is None


def test_values_equal_those_of_an_independent_reader():
    """Random expressions, computed by Python's own parser in fractions."""

    def walk(node):
        if isinstance(node, ast.BinOp):
            left, right = walk(node.left), walk(node.right)
            return {ast.Add: left.__add__, ast.Sub: left.__sub__, ast.Mult: left.__mul__, ast.Div: left.__truediv__}[type(node.op)](right)
        return -walk(node.operand) if isinstance(node, ast.UnaryOp) else Fraction(str(node.value))

    def make(draw, depth):
        if depth == 0 or draw.random() < 0.2:
            return draw.choice(["{}", "({})", "-{}", "{}.5"]).format(draw.randrange(1, 100))
        sides = [make(draw, depth - 1) for _ in range(2)]
        return draw.choice(["{} + {}", "{}-{}", "({} * {})", "{}/ {}", "-({} - {})"]).format(*sides)

    draw, seen = random.Random(0), 0
    for _ in range(600):
        text = make(draw, 4)
        computed = compute(text)
        if "--" in text.replace(" ", ""):  # two signs in a row are Python's, not ours
            continue
        try:
            value = walk(ast.parse(text.strip(), mode="eval").body)
        except ZeroDivisionError:
            value = None
        assert computed is not None and computed[0] == value, text
        constants = [Fraction(str(n.value)) for n in ast.walk(ast.parse(text, mode="eval")) if isinstance(n, ast.Constant)]
        assert Counter(computed[1]) == Counter(constants)
        seen += 1
    assert seen > 150


def test_no_text_takes_long_or_raises():
    draw = random.Random(1)
    pieces = ["<answer>", "</answer>", "(", ")", "{", "}", "\\frac", "1", "9" * 30, " ", "=", "*", "/", "-", "####", "\n", ":", "\\boxed{"]
    start = time.process_time()
    for _ in range(60):
        text = "".join(draw.choices(draw.sample(pieces, 4), k=20_000))
        assert judge(text) in (0.0, 1.0)
        solve(text[:400])
        assert find_equation(text) is None or isinstance(find_equation(text), str)
    assert time.process_time() - start < 10
    assert judge("#### " + "1+" * 300 + "1") == 0.0  # longer than an answer
