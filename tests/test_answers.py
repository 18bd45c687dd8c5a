"""Numbers, texts and letters that completions and gold answers state (FAULTS T1 to T10)."""

import random
import time
from fractions import Fraction

import pytest

from grpo_core.config.files import load
from grpo_core.objective.answers import accepted_choices, final_choice, final_text, normalise_text
from grpo_core.objective.numbers import final_number, read_gold, states_equation
from grpo_core.objective.rewards import REWARDS, correct_answer

THREE_QUARTERS, HALF = Fraction(3, 4), Fraction(1, 2)


@pytest.mark.parametrize("text, number", [
    (r"\frac{3}{4}", THREE_QUARTERS),
    (r"x = -\frac{3}{4}", -THREE_QUARTERS),
    (r"\frac{-3}{4}", -THREE_QUARTERS),
    (r"\frac{3}{-4}", -THREE_QUARTERS),
    (r"\frac{1,000}{3}", Fraction(1000, 3)),
])  # fmt: skip
def test_t1_a_fraction_without_a_box_is_one_number(text, number):
    assert final_number(text) == number and read_gold(text) == {number}


@pytest.mark.parametrize("text, number", [
    (r"\boxed{1\frac{1}{2}}", Fraction(3, 2)),
    (r"\boxed{1 \frac12}", Fraction(3, 2)),
    ("1 1/2", Fraction(3, 2)),
    ("33 1/3%", Fraction(100, 3)),
    ("1½ cups", Fraction(3, 2)),
    ("¾", THREE_QUARTERS),
    ("-1 1/2", Fraction(-3, 2)),
])  # fmt: skip
def test_t2_a_mixed_number_is_one_number(text, number):
    assert final_number(text) == number and read_gold(text) == {number}


@pytest.mark.parametrize("text, number", [
    (r"\tfrac{3}{4}", THREE_QUARTERS),
    (r"\cfrac{3}{4}", THREE_QUARTERS),
    (r"\frac12", HALF),
    (r"\frac 1 2", HALF),
    (r"\frac{1}2", HALF),
    (r"#### \frac{3}{4}", THREE_QUARTERS),
    (r"#### $\dfrac{3}{4}$", THREE_QUARTERS),
    (r"\boxed{\text{\frac{3}{4}}}", THREE_QUARTERS),
])  # fmt: skip
def test_t3_every_command_for_a_fraction_is_read(text, number):
    assert final_number(text) == number and read_gold(text) == {number}


@pytest.mark.parametrize("text, number", [
    (r"\boxed{- 5}", -5),
    (r"\boxed{-\,5}", -5),
    (r"\boxed{-\ 5}", -5),
    (r"\boxed{x = - 5}", -5),
    (r"\boxed{\left(-5\right)}", -5),
    ("–5", -5),
    ("‑5", -5),
    ("－5", -5),
    ("#### - 5", -5),
    ("$ - 5 $", -5),
    (r"-\$5", -5),
])  # fmt: skip
def test_t4_every_minus_sign_is_read(text, number):
    assert final_number(text) == number and read_gold(text) == {number}


@pytest.mark.parametrize("text", ["2x = 4", "x + 1 = 4", "x^2 = 4", r"\sqrt{x} = 4", "|x| = 4", "2(x - 1) = 4"])
def test_the_right_side_of_an_equation_is_no_number(text):
    assert final_number(rf"\boxed{{{text}}}") is None and final_number(f"#### {text}") is None
    assert final_number(rf"\boxed{{{text}, x = 3}}") == 3 and final_number(r"\boxed{x = 4}") == 4 == final_number(r"\boxed{a + b = 4}")


@pytest.mark.parametrize("text", ["5 x 3 = 15", "So 5x3 = 15", "5 x $3 = $15", "#### 5 x 3 = 15", "3 t-shirts = 15"])
def test_an_x_for_times_is_no_variable(text):
    assert final_number(text) == 15


NEGATIVE = [
    r"\boxed{-{5}}", r"\boxed{-(5)}", "#### -(5)", "#### -**5**", r"-\text{5}", r"The answer is -\boxed{5}", r"\boxed{-|5|}", r"\boxed{-|-5|}",
    r"\boxed{-((5))}", r"\boxed{-\left(5\right)}", r"\boxed{-\mathbf{5}}", "#### -(5 degrees)", "It is -(5).", r"$x = -\boxed{5}$", r"-$\boxed{5}$",
    r"\boxed{-\lvert 5\rvert}", "#### minus **5**", r"\boxed{-\{5\}}", r"\boxed{-\mathsf{5}}", r"so it is \(-\boxed{5.0}\)", r"x = - \boxed{5}",
]  # fmt: skip


@pytest.mark.parametrize("text", NEGATIVE)
def test_a_sign_before_a_bracket_is_not_lost(text):
    """It is -5; a bracket that is not read makes the number none."""
    numbers = (None, -5) if "mathsf" in text or r"\{" in text else (-5,)
    assert final_number(text) in numbers and read_gold(text) in [number and {number} for number in numbers]


@pytest.mark.parametrize("text, number", [
    (r"\boxed{|-5|}", 5), (r"\boxed{\left|-5\right|}", 5), (r"\boxed{-(-5)}", 5), (r"\boxed{-{-5}}", 5), (r"-\boxed{-5}", 5), (r"\boxed{-\frac{-3}{4}}", THREE_QUARTERS),
    (r"\boxed{-(\frac{3}{4})}", -THREE_QUARTERS), (r"-\boxed{\frac{3}{4}}", -THREE_QUARTERS), ("#### -(1,234.5)", Fraction(-2469, 2)), (r"\boxed{(-5)}", -5), (r"-\boxed{5\%}", -5),
])  # fmt: skip
def test_two_signs_and_absolute_values(text, number):
    assert final_number(text) == number and read_gold(text) == {number}


def test_a_dash_before_a_bracket_or_a_box_is_no_sign():
    assert final_number("It is:\n- **5**") == final_number("- (5)\n") == final_number(r"- \boxed{5}") == 5
    assert final_number("10 - (5)") == 5 and read_gold("10-(5)") is None and read_gold("3-(-5)") is None


def test_t4_a_range_and_a_list_have_no_sign():
    assert final_number("pages 5–7") == 7 and final_number("It is either:\n- 4\n- 5") == 5


@pytest.mark.parametrize("text", [
    "25 m2", "25 m^2", "25 m²", "25 cm^{3}", r"\boxed{25\text{ m}^2}", "#### 25 m/s^2", "25 m/s2", "25 kg m^-2", "25 g of H2O",
    r"25^\circ", "25 ft2.",
])  # fmt: skip
def test_t5_the_digit_of_a_unit_is_no_number(text):
    assert final_number(text) == 25 and read_gold(text) == {25}


@pytest.mark.parametrize("value, number", [
    ("1e3", 1000),
    ("1E+3", 1000),
    ("2.5e-3", Fraction(1, 400)),
    (1e-05, Fraction(1, 100_000)),
    (1e22, 10**22),
    (0.1, Fraction(1, 10)),
    (18, 18),
    (r"1.5 \times 10^{3}", 1500),
    ("1.5×10^3", 1500),
    ("2 x 10^-3", Fraction(1, 500)),
    ("10⁵", 100_000),
])  # fmt: skip
def test_t6_exponents_are_read(value, number):
    assert final_number(str(value)) == number and read_gold(value) == {number}


def test_t6_a_huge_exponent_is_no_number():
    assert final_number("1e999999999") is None and read_gold("10^{999999}") is None
    assert read_gold(float("nan")) is None and read_gold(float("inf")) is None and read_gold(True) is None


@pytest.mark.parametrize("text", [
    r"2\sqrt{3}", r"\boxed{2\sqrt{3}}", r"#### 2\sqrt{3}", "2√3", r"\frac{\sqrt{3}}{2}", r"\boxed{\frac{\sqrt{3}}{2}}", r"3\pi", "2^{10}",
    "3x", r"\boxed{3i}", "1011_2", "6xy", "#### 6ab", r"\boxed{4ac}", "6mn", "6 xy", "6xy^2",
])  # fmt: skip
def test_t7_an_expression_is_no_number(text):
    assert read_gold(text) is None and final_number(text) is None


@pytest.mark.parametrize("text", [
    "10:30", "(3, 4)", "3,5", "0,75", "3, 4", "x > 5", "5!", "0.333...", r"0.\overline{3}", "5 ft 3 in", "2020-01-05", r"\pm 3", "x - 3",
    "x + 3", "3 - x", '["12", "18"]', "1 000", "12 or 18", "a dozen",
])  # fmt: skip
def test_t7_a_gold_answer_that_is_not_one_number_is_not_read(text):
    assert read_gold(text) is None


@pytest.mark.parametrize("text", ["She has 3 * 6 = 18.", "He had 3. He got 15. Now he has 18.", "x = 18", "The answer is 18.", "$18.00"])
def test_t7_a_sentence_with_one_result_is_read(text):
    assert read_gold(text) == {18}


def test_t8_a_list_accepts_any_of_its_items():
    gold = [["12", "18"], ["12", "18"], ["12", "18"], [12, 18.0], ["a", "b"], []]
    completions = ["#### 12", "18", "1218", "12", "12", "12"]
    assert correct_answer(completions, answer=gold) == [1.0, 1.0, 0.0, 1.0, None, None]
    assert read_gold({"value": 18}) is None


@pytest.mark.parametrize("heading", [
    "#### Step 3: the end", "#### 2. Compute", "#### 2) Compute", "#### 2nd step", "##### 7", "#### Part 1", "#### Case n = 2 holds:",
])  # fmt: skip
def test_t9_a_heading_is_no_answer_mark(heading):
    assert final_number(f"{heading}\nso \\boxed{{42}}") == 42
    assert final_number(f"{heading}\nso it is 42") == 42
    assert final_number(f"{heading}\nso it is 42", strict=True) is None


@pytest.mark.parametrize("mark", ["#### 42", "####42", "####\n42", "#### **42**", "#### Answer: 42", "#### $42$", r"#### \boxed{42}", "#### x = 42"])
def test_t9_an_answer_mark_has_priority(mark):
    assert final_number(f"\\boxed{{1}} {mark}", strict=True) == 42


THOUGHT = "<think>so #### 3</think> The answer is 4."


def test_t10_the_answer_may_stand_in_the_reasoning_unless_a_key_forbids_it():
    assert correct_answer([THOUGHT], answer=["3"]) == [1.0]
    outside = REWARDS.build("correct_answer", {"outside_thinking": True})
    assert outside([THOUGHT, THOUGHT], answer=["3", "4"]) == [0.0, 1.0]
    assert outside(["<think>it is 3", "it is 3"], answer=["3", "3"]) == [0.0, 1.0]
    assert outside(["it is 3", "4</think>3"], ["Q <think>\n", "Q <think>\n"], answer=["3", "3"]) == [0.0, 1.0]


@pytest.mark.parametrize("text, number", [
    (r"\boxed{10,\!000}", 10_000),
    (r"1\,000", 1000),
    ("1 000 000".replace(" ", "\u202f"), 1_000_000),
    ("12,34,567", 1_234_567),
    ("1.234,50 €", Fraction(2469, 2)),
    (r"\boxed{50\%}", 50),
    ("50 ％", 50),
    (r"\$12.50", Fraction(25, 2)),
])  # fmt: skip
def test_t1_commas_and_percent_signs_of_all_kinds(text, number):
    assert final_number(text) == number and read_gold(text) == {number}


MARKED_GROUPS = {
    "1 000 000": 1_000_000, "12 345 km": 12_345, "5 600": 5600, "-1 000": -1000, "$1 234.50": Fraction(2469, 2), "1'234": 1234,
    "1\u2009234 km": 1234, "1\u00a0234\u00a0567": 1_234_567, r"12\;345": 12_345, "12~345": 12_345, "x = 1 000": 1000,
}  # fmt: skip


@pytest.mark.parametrize("text", MARKED_GROUPS)
@pytest.mark.parametrize("mark", ["#### {}", r"\boxed{{{}}}", "He got 3 and 4.\n#### {}", "####\n{}"])
def test_attack_2_groups_of_three_digits_are_one_number(mark, text):
    """A completion and a gold answer read an ordinary space alike: as a part of the number, behind a mark and in a box."""
    marked = mark.format(text)
    assert read_gold(marked) == {MARKED_GROUPS[text]} and final_number(marked) == MARKED_GROUPS[text]


@pytest.mark.parametrize("text", ["1 000", "rows 5 600", "1 000 000", "12 345 km"])
def test_attack_2_an_ordinary_space_without_a_mark_may_separate_two_numbers(text):
    assert read_gold(text) is None and final_number(text) is None


@pytest.mark.parametrize("text", ["12 345 6789", "12 34", "0 123", "1234 567", "1 000 1/2", "1.5 000", "1 234,50", "1 000 000 000 5"])
def test_attack_2_other_groups_are_not_one_number(text):
    assert read_gold(f"#### {text}") is None and read_gold(f"\\boxed{{{text}}}") is None


NOT_ONE_NUMBER = [
    "(3, 4)", "5 hours 30 minutes", "5'6\"", "5 ft 6 in", "5 or 6", "3 : 4", "3:4", "5!", "5 million", "5 Million dollars", "6 mn", "6 bn dollars", "6 mio.", "$6 M", "€ 5 k", "2x = 4", "x^2 = 4", "so 3y = 12", r"\sqrt{x} = 3", "2 thousand",
    "12 dozen", "5k", "$5M", "5bn", "5e", "5 and a half", "5±1", "10 (or 11)", "3 a 4", "5 to 7", "1010 base 2", "x = 5, y = 6",
    "x = 5 and y = 6", "5 squared", "12 hundredths", "twice 5", "half of 5", "5, 6 and 7", "5 | 6", r"5\text{ million}", "$5-$6",
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_ONE_NUMBER)
def test_attack_2_a_gold_answer_with_more_than_one_number_is_not_read(text):
    assert read_gold(f"#### {text}") is None and read_gold(f"so 1 + 1 = 2.\n#### {text}") is None
    assert read_gold(f"\\boxed{{{text}}}") is None and read_gold(text) is None and read_gold([f"#### {text}"]) is None
    assert correct_answer(["5", "3", "6"], answer=[f"#### {text}"] * 3) == [None] * 3


GSM8K_FORMS = {
    "72": 72, "1,234": 1234, "$12.50": Fraction(25, 2), "25 apples": 25, "50%": 50, "-5": -5, "42.": 42, "**42**": 42, "3/4 cup": THREE_QUARTERS,
    "2 1/4 cups": Fraction(9, 4), "5 m": 5, "5m": 5, "5 M": 5, "10 (ten)": 10, "5 = 5.0": 5, "25 m2": 25, "3 quarters": 3, "5 pairs": 5,
    "5km": 5, "5kg": 5, "12hrs": 12, "30mins": 30, "20lbs": 20, "5pm": 5, "5USD": 5, "6th": 6, "5cm^2": 5, "16GB": 16, "5 in": 5, "8oz": 8,
}  # fmt: skip


@pytest.mark.parametrize("text", GSM8K_FORMS)
def test_attack_2_a_gold_answer_with_one_number_and_its_unit_is_read(text):
    assert read_gold(f"He has 3 + 4 = 7.\n#### {text}") == {GSM8K_FORMS[text]} == {final_number(f"#### {text}")}


@pytest.mark.parametrize("text", ["minus 5", "negative 5", "Minus 5 degrees", "It is minus 5", "x = minus 5", "#### minus 5", "#### negative 5"])
def test_attack_2_a_sign_in_words_is_read(text):
    assert read_gold(text) == {-5} and final_number(text) == -5


def test_attack_2_a_subtraction_in_words_has_no_sign():
    assert final_number("ten minus 5") == 5 and final_number("x minus 5") == 5 and read_gold("#### 10 minus 5") is None


@pytest.mark.parametrize("piece", ["1 ", "123 ", "1 234 ", "12 345 6", "1'234'", "5 or ", "x = 5, ", "= 5 and ", "minus ", "5 million "])
@pytest.mark.parametrize("frame", ["#### {}", "\\boxed{{{}}}", "{}"])
def test_attack_2_reading_stays_linear(frame, piece):
    def seconds(length):
        text, start = frame.format(piece * (length // len(piece))), time.process_time()
        read_gold(text), final_number(text)
        return time.process_time() - start

    took = seconds(50_000)
    if took > 0.25:  # the least of three, because other tests run on the same cores
        whole, half = (min(seconds(length) for _ in range(3)) for length in (50_000, 25_000))
        assert whole < 3 * half


def test_t1_a_comma_that_may_be_decimal_is_no_number():
    assert final_number("it is 0,75") is None and final_number("1,2,3") == 3


@pytest.mark.parametrize("text, answer", [
    ("It is in Paris.\n#### The Louvre", "the louvre"),
    (r"so \boxed{\text{The Louvre}}", "the louvre"),
    ("The answer is: **The  Louvre**.", "the louvre"),
    ("First.\nThe Louvre!", "the louvre"),
    ("#### Step 1: look\nThe answer is The Louvre", "the louvre"),
    ("", None),
    ("?!", None),
])  # fmt: skip
def test_final_text(text, answer):
    assert final_text(text) == answer


def test_text_match_accepts_several_answers():
    match = REWARDS.build("text_match")
    gold = ["The Louvre", ["Louvre", "the louvre"], None, "", "#### the Louvre", 18]
    assert match(["#### the louvre"] * 5 + ["18"], answer=gold) == [1.0, 1.0, None, None, 1.0, 1.0]
    assert match(["<think>Louvre</think>Orsay", "<think>Louvre"], answer=["Louvre"] * 2) == [0.0, 0.0]
    assert REWARDS.build("text_match", {"strict": True})(["the Louvre"], answer=["the louvre"]) == [0.0]
    assert REWARDS.build("text_match", {"outside_thinking": False})(["<think>\nLouvre"], answer=["Louvre"]) == [1.0]


@pytest.mark.parametrize("text, normal", [
    (".5", ".5"), ("**.5**", ".5"), ("$.50", ".50"), ("(.5)", ".5"), ("is .5.", "is .5"), ("-5", "-5"), ("-.5", "-.5"), ("(-5)", "-5"),
    ("...5", "5"), ("... .5", ".5"), (". 5", "5"), ("5.", "5"), ("«5»", "5"), (".net", "net"), ("..", ""),
])  # fmt: skip
def test_attack_3_a_point_or_minus_before_a_digit_is_no_punctuation(text, normal):
    assert normalise_text(text) == normal


def test_attack_3_half_is_not_five():
    match = REWARDS.build("text_match")
    assert match([".5", "The answer is .5", "#### -5", "5", "5."], answer=["5", "5", "5", ".5", "5"]) == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert match([".5", r"\boxed{.5}"], answer=[".5", "#### .5"]) == [1.0, 1.0]


@pytest.mark.parametrize("letters", ["1234", "", "ABCA", "abA", "A B", "A,B", "ABß", "AБ"])
def test_attack_4_letters_that_can_never_match_are_refused(letters):
    with pytest.raises(ValueError) as error:
        load("tiny", ["rewards=[choice_match]", f"rewards[0].args.letters={letters}"])
    must_be = "it must be letters from A to Z, none of them twice, such as ABCDEFGHIJ"
    assert str(error.value) == f"rewards[0].args.letters is {letters!r}; {must_be}"


def test_attack_4_lower_case_letters_match():
    match = REWARDS.build("choice_match", {"letters": "abcd"})
    completions = ["b", "B", "The answer is (b)", "#### B", "so (B)", "**B**", "E", "A"]
    assert match(completions, answer=["b", "B", "(b)", "b) Paris", ["A", "b"], "#### b", "e", "b"]) == [1.0] * 6 + [None, 0.0]


@pytest.mark.parametrize("text, letter", [
    ("The answer is (B).", "B"),
    ("Answer: B", "B"),
    ("the correct answer is **b**", "B"),
    ("I choose option C.", "C"),
    ("#### D", "D"),
    (r"\boxed{\text{(D)}}", "D"),
    (r"\boxed{D}", "D"),
    ("(A) is wrong, so (C)", "C"),
    ("B", "B"),
    ("B.", "B"),
    ("reasons\n**B**\n", "B"),
    ("the answer is a number", None),
    ("A dog barked. I left.", None),
    ("The answer is Z", None),
    ("", None),
])  # fmt: skip
def test_final_choice(text, letter):
    assert final_choice(text) == letter


def test_choice_match():
    match = REWARDS.build("choice_match")
    gold = ["B", "(B)", "B) Paris", "#### B", ["A", "B"], "Paris", 1]
    assert match(["answer: B"] * 7, answer=gold) == [1.0, 1.0, 1.0, 1.0, 1.0, None, None]
    assert match(["A", "<think>B</think>A"], answer=["B", "B"]) == [0.0, 0.0]
    assert accepted_choices("Z", "XYZ") == {"Z"} and accepted_choices("A dog") is None


PIECES = ["answer is ", "answer: ", "A", "(B)", "**", "\n", " ", "####", "\\boxed{", "{", "}", ":", "\\text{", "<think>", "</think>", "."]


@pytest.mark.parametrize("name", ["text_match", "choice_match", "correct_answer"])
def test_no_text_takes_long_to_match(name):
    """100 kB of any two pieces in turn: twice the text takes about twice as long."""
    draw, reward = random.Random(name), REWARDS.build(name)

    def seconds(text):
        start = time.process_time()
        reward([text], answer=[text])
        return time.process_time() - start

    for piece in PIECES:
        text = (piece + draw.choice(PIECES)) * 10
        text *= 100_000 // len(text)
        took = seconds(text)
        assert took < 0.5 or took < 3 * seconds(text[: len(text) // 2]), text[:30]


@pytest.mark.parametrize("text, number", [
    ("So it will cost 4*4 = $16", 16), ("They cost 9 + 5 = $14.", 14), ("The tank still holds 50-30 = 20", 20), ("10 were men because 25 x .4 = 10", 10),
    ("He drinks 10 because 40 x (1/4) = 10", 10), ("In fives: 5s are 1200/5 = 240", 240), ("His wins are 2x = 20", 20), ("He bakes 400g / 200g = 2", 2), ("4*x = 4*10 = 40", 40),
])  # fmt: skip
def test_the_steps_of_a_solution_without_a_mark_end_with_its_number(text, number):
    assert final_number(text) == number
    assert final_number(text.replace("$", "").rpartition("=")[0].replace("x = 4*10", "* 10") + f"= \\boxed{{{number}}}") == number


@pytest.mark.parametrize("line", ["cost 4*4 = 16", "the tank holds 5 - 3 = 2", "25 x .4 = 10", "40 x (1/4) = 10", "logs: 3 + 1 = 4", "a single 2 + 2 = 4"])
def test_a_word_that_begins_as_a_function_is_no_unknown(line):
    assert not states_equation(line)
    assert states_equation("sin x = 0.5") and states_equation("log(x) = 3") and states_equation("\\cos t = 1")
