import hashlib
import json
import re
from collections import Counter

import pytest

from grpo_core.data.word_problems import Numbers, compute, make_word_problems
from grpo_core.objective.rewards import correct_answer, final_number


def test_splits_are_disjoint_seeded_and_distinct():
    train, test = make_word_problems("train", 2000), make_word_problems("test", 500)
    questions = [row["question"] for row in train + test]
    assert len(set(questions)) == 2500
    assert make_word_problems("train", 2000) == train
    other = make_word_problems("train", 2000, seed=1)
    assert other != train and not {row["question"] for row in other} & {row["question"] for row in test}


@pytest.mark.parametrize("scale", [1, 10])
def test_every_step_is_right_and_leads_to_the_answer(scale):
    for row in make_word_problems("train", 2000, scale=scale):
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", row["cot"])
        assert len(steps) in (2, 3)
        for left, sign, right, result in steps:
            assert compute(int(left), sign, int(right)) == int(result)
            assert sign != "/" or int(left) % int(right) == 0
        assert int(steps[-1][3]) == final_number(row["answer"])
        assert correct_answer([row["answer"]], answer=[row["answer"]]) == [1.0]


def test_the_first_numbers_of_a_step_come_from_the_question_or_the_step_before():
    for row in make_word_problems("train", 500):
        known = set(re.findall(r"\d+", row["question"]))
        for left, _, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["cot"]):
            assert left in known and right in known, row
            known.add(result)


def test_there_are_several_kinds():
    shapes = Counter(re.sub(r"\d+|[A-Z]\w+|\b[a-z]+s\b", "_", row["question"]) for row in make_word_problems("train", 2000))
    assert len(shapes) >= 8 and min(count for _, count in shapes.most_common(8)) > 50


def test_the_small_problems_are_those_of_the_published_figures():
    """Every figure on builtin:word_problems, and the built-in model, are of these rows."""
    digest = hashlib.md5(json.dumps([make_word_problems("train", 2000), make_word_problems("test", 500)]).encode()).hexdigest()
    assert digest == "c929aaf986662f7df03b711e6c20b206"


def test_large_numbers_have_more_digits():
    small, large = (
        [int(number) for row in make_word_problems("train", 2000, scale=scale) for number in re.findall(r"\d+", row["cot"])] for scale in (1, 10)
    )
    assert max(small) < 1000 < max(large) < 100_000
    assert sum(number >= 100 for number in small) / len(small) < 0.2 < 0.5 < sum(number >= 100 for number in large) / len(large)


def test_numbers_of_a_scale_have_the_whole_range():
    draws = Numbers("draws", 10)
    numbers = {draws.number(3, 9) for _ in range(3000)}
    assert numbers == set(range(30, 100))
    assert {Numbers(str(i), 1).number(3, 9) for i in range(200)} == set(range(3, 10))
