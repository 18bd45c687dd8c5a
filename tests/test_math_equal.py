"""The reward `math_equal`: an equal answer in another form counts, and no answer costs more than its time."""

import importlib.util
import random
import time

import pytest

from grpo_core.config.files import load
from grpo_core.objective.rewards import REWARDS
from grpo_core.registry import Registry
from grpo_core.schema import ConfigError
from grpo_core.scoring import math_equal as module
from grpo_core.scoring.limited_calls import LimitedCalls
from grpo_core.scoring.math_equal import read_golds, read_unit
from grpo_core.scoring.reward_worker import RewardWorker
from grpo_core.scoring.scoring import build_reward

needs_library = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


@pytest.fixture(scope="module", autouse=True)
def warm():
    if importlib.util.find_spec("math_verify"):
        module.load_library()
    yield
    module._COMPARISONS.close()


def judge(text, gold, **args):
    return module.math_equal([text], answer=[gold], **{"seconds": 20.0, **args})[0]


FAULTS = [  # of docs and of bug reports: (gold, completion)
    (r"\frac{3}{4}", r"\boxed{0.75}"), (r"\frac{3}{4}", "#### 3/4"), (r"$\frac34$", r"so \boxed{\tfrac{3}{4}}"), ("#### \\frac{3}{4}", "3/4"),
    ("3/2", r"\boxed{1\frac{1}{2}}"), ("3/2", "it is 1 1/2"), (r"1\frac12", "#### 1.5"), ("1/2", r"\frac12"),
    ("-5", r"\boxed{- 5}"), ("–5", "-5"), ("-5", "the answer is –5"), ("-5", r"The answer is -\boxed{5}"), (r"\boxed{-(5)}", "-5"), ("5", r"\boxed{|-5|}"), (r"-\sqrt{2}", r"-\boxed{\sqrt{2}}"),
    ("25", "so it has 25 m2"), ("25", "so it has 25 m^2"), ("25 m^2", r"\boxed{25\text{ m}^2}"),
    ("1000", "1e3"), (1e-05, r"\boxed{10^{-5}}"), ("0.00001", "1e-5"),
    (r"2\sqrt{3}", r"\boxed{2\sqrt{3}}"), (r"2\sqrt{3}", r"#### \sqrt{12}"), (r"2\sqrt{3}", r"The answer is $\sqrt{12}$."),
    (["12", "18"], "#### 18"), (["12", "18"], "#### 12"), ("42", "#### Step 3: the end\nso \\boxed{42}"),
    ("3", "<think>so #### 3</think> I forgot"), ("1,234", r"\boxed{1{,}234}"), ("$5", "#### $5.00"),
]  # fmt: skip
EQUAL = [
    ("(x+1)^2", r"\boxed{x^2+2x+1}"), (r"\frac{x}{2}", r"\boxed{\frac12 x}"), ("x^2", r"#### $x^2$"),
    (r"\{1, 2\}", r"\boxed{2, 1}"), ("1, 2", r"\boxed{\{1,2\}}"), ("(1, 2)", r"\boxed{(1,2)}"), ("[0, 1)", r"\boxed{[0,1)}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"), ("x=3", r"\boxed{3}"), ("3", r"\boxed{x = 3}"),
    (r"3\pi", r"\boxed{3 \pi}"), (r"\pm 3", r"\boxed{3, -3}"), ("2+3i", r"\boxed{3i+2}"), (r"\infty", r"\boxed{\infty}"),
    (r"\text{Evelyn}", r"\boxed{Evelyn}"), ("Evelyn", "#### evelyn."), (r"\text{(B)}", r"\boxed{B}"), (r"90^\circ", r"\boxed{90}"),
    ("1/3", "#### 0.333333"), (r"\frac{\pi}{4}", r"\boxed{\dfrac{1}{4}\pi}"), (r"2\sqrt{3} \text{ cm}", r"#### 2\sqrt{3} cm"),
    (r"2\sqrt{3}", "Therefore the length is $2\\sqrt{3}$."), (r"2\sqrt{3}", "so x = 2\\sqrt{3}"), (r"2\sqrt{3}", r"\boxed{x = 2\sqrt{3}}"),
    ("8", "#### 3 + 5"), ("$x < 3$", r"\boxed{3 > x}"), (r"\sqrt{2}\%", r"\boxed{\sqrt{2}\%}"), ("no solution", r"\boxed{\text{No solution.}}"),
    ("x+1", "so\n\\[\nx + 1\n\\]"), ("x+1", "The answer is\n$$\nx+1\n$$"), ("4:00 PM", r"\boxed{4:00\text{ PM}}"), ("12_8", r"\boxed{12_{8}}"),
    ("n!", r"\boxed{n!}"), ("y = 2x + 3", r"\boxed{y = 2x+3}"), ("y = 2x + 3", r"\boxed{2x + 3}"), ("x = 1, y = 2", r"\boxed{x = 1, y = 2}"), ("2x + 3y = 5", r"\boxed{3y + 2x = 5}"), ("\\text{even}", "The answer is **even**."),
]  # fmt: skip
UNEQUAL = [
    ("12_8", r"\boxed{12_9}"), ("x+1", "so\n\\[\nx + 2\n\\]"), ("x+1", "x + 1\n\\]"), ("4:00 PM", r"\boxed{4:00\text{ AM}}"), ("(-1, 2]", r"\boxed{(-1, 2)}"),
    ("3x", r"\boxed{3y}"), ("(1, 2)", r"\boxed{(2, 1)}"), (r"2\sqrt{3}", r"\boxed{2\sqrt{5}}"), ("3", "#### 3 + 5"), ("7", ""),
    ("1/3", "#### 0.33"), ("3", r"\boxed{4}"), ("1000000", "#### 1000001"), ("x^2", r"\boxed{x^3}"), (r"\{1, 2\}", r"\boxed{1}"),
    ("Evelyn", r"\boxed{Sam}"), (r"2\sqrt{3}", "I do not know."), ("[0, 1)", r"\boxed{[0, 1]}"), ("3", r"\boxed{}"), ("0", r"\boxed{\text{no}}"),
    ("2", "I add 1 and 2 and get \\boxed{5}"), ("1e-7", "#### 2e-7"), ("5", r"\boxed{-5}"), ("(a, b)", r"\boxed{[a, b]}"), ("n!", r"\boxed{n}"), ("5", r"\boxed{-{5}}"), ("-5", r"\boxed{|-5|}"), (r"\sqrt{2}", r"so -\boxed{\sqrt{2}}"), ("2x + 3y = 5", r"\boxed{x + y = 5}"),
    ("y = 2x + 3", r"\boxed{x = 2x + 3}"), ("2x + 3y = 5", r"\boxed{5}"), ("x = 1, y = 2", r"\boxed{x = 2, y = 1}"), ("no solution", r"\boxed{no}"),
]  # fmt: skip


@needs_library
@pytest.mark.parametrize("gold, text", [*FAULTS, *EQUAL])
def test_equal_answers(gold, text):
    assert judge(text, gold) == 1.0


@needs_library
@pytest.mark.parametrize("gold, text", UNEQUAL)
def test_other_answers(gold, text):
    assert judge(text, gold) == 0.0


VARIABLES = [  # behind a number, a bracket or a brace they are no unit: (gold, other answer)
    ("6xy", "6"), ("6xy", "6ab"), ("b^2-4ac", "b^2-4"), ("b^2-4ac", "b^2-4mn"), ("x^2+2xy", "x^2+2"), ("6xy^3", "6xy^2"),
    ("(x+1)ab", "(x+1)"), (r"\frac{1}{2}ab", r"\frac{1}{2}cd"), (r"\frac{1}{2}ab", r"\frac{1}{2}"), ("6xyz", r"6\text{ xy}"),
    (r"\sqrt{2}ab", r"\sqrt{2}"), ("6xy", "6 cm"), (r"2\pi hr", r"2\pi"), (r"\pi ab", r"\pi"), ("6mn", "6"), ("6pq", "6"), ("6rh", "6"),
]  # fmt: skip


@needs_library
@pytest.mark.parametrize("gold, other", VARIABLES)
def test_variables_are_no_unit(gold, other):
    assert judge(rf"\boxed{{{other}}}", gold) == judge(f"#### {gold}", other) == judge(rf"\boxed{{{gold}}}", other) == 0.0
    assert judge(rf"\boxed{{{gold}}}", gold) == 1.0


@needs_library
@pytest.mark.parametrize("gold, text", [
    ("3yx^2", r"\boxed{3x^2y}"), (r"2\pi hr", r"\boxed{2\pi rh}"), ("6hr", r"\boxed{6rh}"), ("6 hr", r"\boxed{6}"), ("4ac", r"\boxed{4ca}"),
    (r"2\sqrt{3}", r"\boxed{2\sqrt{3} apples}"), (r"2\sqrt{3}", r"\boxed{2\sqrt{3} square feet}"), (r"2\sqrt{3} \text{ cm}", r"\boxed{2\sqrt{3}\,\mathrm{m}}"),
    (r"2\sqrt{3}", r"\boxed{2\sqrt{3}\text{ square feet}}"), (r"6\sqrt{2}", r"#### 6\sqrt{2} cm^2"), (r"4\pi", r"#### 4\pi cm"),
])  # fmt: skip
def test_products_of_variables_and_units(gold, text):
    assert judge(text, gold) == 1.0


ANAGRAMS = [("ABC", "ACB"), ("seat", "east"), ("silent", "listen"), ("May", "Amy"), ("on", "no"), ("on solution", "no solution"), ("on, x", "no, x"), (r"\text{on}", r"\text{no}")]


@needs_library
@pytest.mark.parametrize("gold, other", ANAGRAMS)
def test_words_are_no_products_of_letters(gold, other):
    for text in (rf"\boxed{{{other}}}", f"The answer is {other}", f"#### {other}", f"It is {other}", rf"\boxed{{x = {other}}}"):
        assert judge(text, gold) == 0.0 and judge(text.replace(other, gold), other) == 0.0
        assert judge(text, other) == 1.0


@needs_library
@pytest.mark.parametrize("gold, text", [
    ("xy", r"\boxed{yx}"), ("abc", r"\boxed{cab}"), ("pi", r"\boxed{pi}"), ("x=3 or x=5", r"\boxed{x=3, x=5}"), ("x = 3 and y = 5", r"\boxed{y = 5 and x = 3}"),
])  # fmt: skip
def test_products_and_words_between_answers(gold, text):
    assert judge(text, gold) == 1.0


@needs_library
@pytest.mark.parametrize("gold, text, value", [
    (r"\text{blue, red}", r"\boxed{\text{red, blue}}", 1.0), (r"\text{blue, red}", "red, blue", 1.0), (r"\text{blue}, \text{red}", r"\boxed{\text{Red and blue}}", 1.0),
    (r"\text{blue, red}", r"\boxed{\text{red, blue, green}}", 0.0), (r"\text{blue, red}", r"\boxed{\text{blue}}", 0.0), (r"\text{blue, red}", r"\boxed{\text{red, green}}", 0.0),
    (r"(\text{blue, red})", r"\boxed{(\text{red, blue})}", 0.0), (r"(\text{blue, red})", r"\boxed{(\text{blue, red})}", 1.0), ("1, 2", r"\boxed{2, 1}", 1.0),
    ("Monday, Tuesday, and Friday", r"\boxed{\text{Friday, Monday and Tuesday}}", 1.0), ("no solution", r"\boxed{\text{solution, no}}", 0.0),
])  # fmt: skip
def test_the_order_of_a_list_makes_no_difference_but_in_parentheses(gold, text, value):
    assert judge(text, gold) == value


@pytest.mark.parametrize("gold, text", [
    (r"\sqrt{2}", "√2"), (r"-2\sqrt{3}", "−2√3"), ("x^2", "x²"), (r"2\pi", "2*pi"), (r"\emptyset", r"\varnothing"), (r"\sqrt{x+1}", "√(x+1)"), (r"2\sqrt{3}", "2·√3"),
    (r"2\pi", "2π"), (r"\emptyset", "∅"), ("x^{12}+1", "x¹²+1"), (r"\infty", "∞"), ("pi", r"\pi"), (r"\sin x", "sin x"), (r"\frac{\pi}{2}", "pi/2"),
])  # fmt: skip
def test_signs_of_unicode_and_names(gold, text):
    assert judge(rf"\boxed{{{text}}}", gold) == judge(rf"\boxed{{{gold}}}", text) == 1.0
    assert judge(rf"\boxed{{{text}+1}}", gold) == (1.0 if gold == r"\infty" else 0.0)


EQUATIONS = [  # their right side is no answer: (right side, left side)
    ("2", "x^2"), ("4", "2x"), ("5", "x+1"), ("3", r"\sqrt{x}"), ("3", "|x|"), ("6", "2(x+1)"), ("3", r"\frac{x}{2}"), ("3", r"\log x"), (r"\sqrt{2}", "x+1"), ("0.5", "3 - x"), ("6", "x + 2y"), ("1", "e^x"),
]  # fmt: skip


@needs_library
@pytest.mark.parametrize("gold, left", EQUATIONS)
def test_the_right_side_of_an_equation_is_no_answer(gold, left):
    for text in (rf"\boxed{{{left}={gold}}}", f"#### {left} = {gold}", f"The answer is {left} = {gold}"):
        assert judge(text, gold) == 0.0
    assert judge(rf"\boxed{{{left}={gold}}}", f"{left} = {gold}") == 1.0


@needs_library
@pytest.mark.parametrize("gold, text", [
    ("5", r"\boxed{x = 5}"), ("5", "#### 2 + 3 = 5"), ("125", r"\boxed{m+n=125}"), ("2", "so 2x = 4 and x = 2"), ("25", r"\boxed{A = \pi r^2 = 25}"), ("7", r"\boxed{f(2) = 7}"),
    ("2", r"\boxed{2x = 4, x = 2}"), ("15", "#### 3 * 5 m = 15 m"), ("18", "#### $9 * 2 = $18"), (r"\sqrt{2}", r"\boxed{y = \sqrt{2}}"), ("5", r"\boxed{x_1 = 5}"), ("2", r"2x = 4 \implies x = 2"),
    ("3", r"\boxed{\sqrt{9} = 3}"), ("3", r"\boxed{\log_2 8 = 3}"), ("30", r"\boxed{m\angle A = 30^\circ}"), ("4", r"\boxed{\frac{a}{b} = 4}"), ("2", r"\boxed{\frac{6}{3} = 2}"), ("4", r"\boxed{x_1 + x_2 = 4}"), ("1, 2", r"\boxed{x = 1 \text{ or } x = 2}"),
])  # fmt: skip
def test_the_value_of_what_is_asked_is_an_answer(gold, text):
    assert judge(text, gold) == 1.0


@needs_library
@pytest.mark.parametrize("gold, text, right", [
    ("50%", r"\boxed{50\%}", "either number fraction"),
    ("50%", "#### 50", "either number"),
    ("50%", "#### 0.5", "either fraction"),
    (r"50\%", r"\boxed{\frac{1}{2}}", "either fraction"),
    ("50", "it is 50 percent", "either number"),
    ("1/2", r"#### 50\%", "either fraction"),
    ("50", "#### 0.5", ""),
    ("5000%", "#### 50%", ""),
    (r"\frac{\sqrt{2}}{100}", r"\boxed{\sqrt{2}\%}", "either fraction"),
    (r"\sqrt{2}", r"\boxed{\sqrt{2}\%}", "either number"),
])  # fmt: skip
def test_percent(gold, text, right):
    for percent in module.PERCENTS:
        assert judge(text, gold, percent=percent) == float(percent in right.split()), percent


@needs_library
@pytest.mark.parametrize("gold, text, same", [
    ("25 m^2", "#### 25 m2", True), ("25 m^2", r"\boxed{25\text{ m}^2}", True), ("25 m^2", r"\boxed{25\,\mathrm{m}^{2}}", True),
    ("25 m^2", r"\boxed{25\text{ cm}^2}", False), ("25 m^2", "#### 25", False), ("25", "#### 25 cm", True), ("25 m²", "it is 25 m²", True),
    ("5 apples", "#### 5 apple", True), ("5 hours", "#### 5 minutes", False), (r"90^\circ", r"\boxed{90°}", True), ("$5", "#### $5", True),
    ("25 m^2", "The area is 25 m^2 in total.", True), ("25 m^2", "The area is 25 cm^2 in total.", False), ("$5", "It costs $5 in total.", True),
    ("60 km", "#### 60 km/h", False), ("5 hours", "It takes 5 hours, not minutes.", True),
    ("$5", "#### €5", False), ("60 km/h", "#### 60 km / h", True), ("2 mW", "#### 2 MW", False), (r"2\sqrt{3} \text{ cm}", r"#### 2\sqrt{3} m", False),
])  # fmt: skip
def test_units(gold, text, same):
    assert judge(text, gold) == 1.0
    assert judge(text, gold, units="compare") == float(same)


def test_the_unit_of_an_answer():
    assert read_unit(r"25\text{ m}^2.") == read_unit("25 m2") == read_unit("$25 m^{2}$") == "m^2"
    assert read_unit("25") == read_unit(r"\frac{1}{2}") == read_unit("") == ""
    assert read_unit("60 km/hours") == "km/hour" and read_unit(r"\$5") == "$"


@pytest.mark.parametrize("value, golds", [
    ("so #### 7", ["7"]), (r"long $\boxed{\frac12}$", [r"\frac12"]), (["12", "18"], ["12", "18"]), (12, ["12"]), (1e-05, ["1e-05"]),
    ([None, "3"], ["3"]), (None, None), ("", None), (" ", None), ([], None), (True, None), ({"a": 1}, None), ("x" * 501, None),
])  # fmt: skip
def test_the_gold_answers(value, golds):
    assert read_golds(value) == golds
    if golds is None and importlib.util.find_spec("math_verify"):
        assert judge("#### 3", value) is None


@needs_library
def test_strict_and_the_reasoning():
    assert judge("it is 7", "7") == 1 and judge("it is 7", "7", strict=True) == 0
    assert judge("the answer is 7", "7", strict=True) == 1 and judge("so $2x$", "2x", strict=True) == 0
    text = r"<think>so \boxed{2x}</think> It is $3x$."
    assert judge(text, "2x") == 1 and judge(text, "2x", outside_thinking=True) == 0 and judge(text, "3x", outside_thinking=True) == 1
    assert module.math_equal([r"\boxed{2x}"], ["Q <think>"], answer=["2x"], outside_thinking=True) == [0.0]


@needs_library
def test_a_comparison_without_end_costs_its_seconds_and_no_other():
    start = time.monotonic()
    tower = r"\boxed{9^{9^{9^{9^{9}}}} + x}"
    texts = [tower, r"\boxed{\sqrt{12}}", tower]
    assert module.math_equal(texts, answer=[r"2\sqrt{3}"] * 3, seconds=1.0) == [0.0, 1.0, 0.0]
    assert time.monotonic() - start < 3  # the second one is known


PIECES = ["\\[", "$$", " ", "\n", "%", "1", "x", "=", "\\text{", "answer is ", "^", "m/"]


@pytest.mark.parametrize("piece", PIECES)
def test_no_text_takes_long_to_read(monkeypatch, piece):
    """30 kB of two pieces in turn; the library, which has its own limit, is not asked here."""
    monkeypatch.setattr(module, "load_library", lambda: None)
    monkeypatch.setattr(module._COMPARISONS, "call", lambda *pair, seconds: False)
    for other in ("", *random.Random(piece).sample(PIECES, 2)):
        text, start = (piece + other) * (30_000 // len(piece + other)), time.process_time()
        for ending, gold in (("", "7x"), ("\n\\]", "7 m"), (" 5%", "7 %")):
            assert judge(text + ending, gold, units="compare") in (0.0, 1.0)
        read_golds(text)
        assert time.process_time() - start < 1.5, other


def fork_bombs(what):
    import os
    import sys

    if what == "exit":
        os._exit(3)
    if what == "raise":
        raise ValueError
    if what == "memory":
        return len(bytearray(4 * 2**30))
    if what == "recursion":
        sys.setrecursionlimit(500)
        return fork_bombs(what)
    if what == "spin":
        return 9 ** (9**9)  # in C, where no signal arrives
    return what


@pytest.mark.parametrize("what", ["exit", "raise", "memory", "recursion", "spin"])
def test_limited_calls(what):
    calls = LimitedCalls(fork_bombs)
    assert calls.call("a", seconds=20) == "a"
    start = time.monotonic()
    assert calls.call(what, seconds=0.3 if what == "spin" else 20) is None and time.monotonic() - start < 2
    assert calls.call("b", seconds=20) == "b"
    calls.close()
    calls.close()


@pytest.mark.slow
@needs_library
def test_it_runs_in_a_process_of_its_own():
    reward = build_reward("math_equal", {"percent": "number"}, timeout=20)
    assert isinstance(reward, RewardWorker)
    reward.submit([r"\boxed{\sqrt{12}}", "#### 1", "#### 50%"], {"answer": [r"2\sqrt{3}", None, "0.5"], "prompts": ["p"] * 3})
    assert reward.result().values == [1.0, None, 0.0]
    reward.close()


@needs_library
@pytest.mark.parametrize("args, sentence", [
    ("percent: half", r"rewards\[0\].args.percent is 'half'; it must be one of either, number, fraction"),
    ("units: drop", r"rewards\[0\].args.units is 'drop'; it must be one of ignore, compare"),
    ("seconds: 0", r"rewards\[0\].args.seconds is 0.0; it must be above 0"),
])  # fmt: skip
def test_wrong_arguments(args, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load("tiny", [f"rewards=[{{name: math_equal, args: {{{args}}}}}]"])


def test_without_the_library_there_is_one_sentence(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "math_verify" else found(name, *more))
    for word in ("rewards=[math_equal]", "evaluation.reward=math_equal"):
        with pytest.raises(ConfigError) as error:
            load("tiny", [word])
        assert str(error.value) == "reward 'math_equal' needs math_verify, which is not installed: pip install -e '.[math]'"
    assert "math_equal" in REWARDS.functions  # it is listed all the same


def test_its_name_is_taken_also_before_its_module_is_imported():
    registry = Registry("reward", modules={"math_equal": module.__name__})
    for taken in (REWARDS, registry):
        with pytest.raises(ConfigError, match="'math_equal' is registered twice"):
            taken.register("math_equal")(lambda completions: [])
