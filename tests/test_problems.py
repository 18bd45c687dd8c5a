import re
from collections import Counter

from grpo_core.data.word_problems import compute, make_word_problems
from grpo_core.objective.rewards import correct_answer, final_number


def test_splits_are_disjoint_seeded_and_distinct():
    train, test = make_word_problems("train", 2000), make_word_problems("test", 500)
    questions = [row["question"] for row in train + test]
    assert len(set(questions)) == 2500
    assert make_word_problems("train", 2000) == train
    other = make_word_problems("train", 2000, seed=1)
    assert other != train and not {row["question"] for row in other} & {row["question"] for row in test}


def test_every_step_is_right_and_leads_to_the_answer():
    for row in make_word_problems("train", 2000):
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
