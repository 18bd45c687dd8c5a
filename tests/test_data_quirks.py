"""Data as people have it: other columns beside the form's, gaps, capitals, and few rows."""

import json

import pytest
from conftest import ROOT

from grpo_core.config import files
from grpo_core.data.columns import check_names, rename
from grpo_core.data.forms import recognise
from grpo_core.data.rows import count_rows
from grpo_core.schema import ConfigError

TINY = ROOT / "configs" / "tiny.yaml"
USER = {"role": "user", "content": "2 + 3?"}


def write(folder, rows, name="rows.jsonl", begin=""):
    path = folder / name
    path.write_text(begin + "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path, *words):
    """The configuration with a word for the data, and the lines about its form."""
    notes = []
    return files.load(TINY, [f"data.path={path}", *words], recognise=recognise, notify=notes.append), notes


@pytest.fixture(autouse=True)
def has_math(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name)


TRUTH = {"style": "rule", "ground_truth": "5"}
GAPS = {  # the rows' form and reward -> a row, and what one of them may have in place of a column
    ("verl", "correct_answer"): (
        {"data_source": "x", "prompt": [USER], "reward_model": TRUTH},
        [{"reward_model": None}, {"reward_model": {"ground_truth": None}}, {"reward_model": {"ground_truth": ""}}, {"data_source": None}],
    ),
    ("TRL", "correct_answer"): ({"prompt": [USER], "solution": "5"}, [{"solution": None}, {"solution": ""}]),
    ("open-r1", "math_equal"): ({"problem": "2 + 3?", "solution": "so \\boxed{5}", "answer": "5"}, [{"answer": None}]),
}  # fmt: skip


@pytest.mark.parametrize("form, reward", GAPS)
def test_a_row_without_a_gold_answer_changes_neither_the_form_nor_the_reward(form, reward, tmp_path):
    row, gaps = GAPS[form, reward]
    for gap in gaps:
        config, (note,) = load(write(tmp_path, [row, {**row, **gap}, row]), "evaluation.num_tasks=1")
        assert f"has the form of {form} (" in note and [x.name for x in config.rewards] == [reward], (gap, note)


def test_the_answer_comes_before_the_solution_and_no_column_is_lost(tmp_path):
    path = write(tmp_path, [{"prompt": "2 + 3?", "solution": "long", "answer": "5"}] * 2)
    config, (note,) = load(path)
    assert config.data.columns == {} and "(prompt, solution, answer)" in note
    assert files.load(TINY, [f"data.path={path}"], supervised=True, recognise=recognise).sft.targets[0].template == "{solution}"
    row = {"problem": "2 + 3?", "solution": "so \\boxed{5}", "answer": None}  # in MATH's form the solution is the answer
    config, _ = load(write(tmp_path, [row] * 2))
    check_names([row], config.data.columns)
    changed = rename(row, config.data.columns)
    assert changed["answer"] == changed["solution"] == row["solution"] and changed["question"] == "2 + 3?"


@pytest.mark.parametrize("row, form", [
    ({"Question": "2 + 3?", "Answer": "#### 5"}, "GSM8K"),
    ({"Problem": "2 + 3?", "SOLUTION": "\\boxed{5}"}, "MATH"),
    ({"Prompt": [USER], "Reward_Model": {"ground_truth": "5"}}, "verl"),
    ({"Nums": [1, 2], "Target": 3}, "Countdown"),
])  # fmt: skip
def test_columns_may_have_capitals(row, form, tmp_path):
    config, (note,) = load(write(tmp_path, [row] * 2))
    assert f"has the form of {form} (" in note
    check_names([row], config.data.columns)
    changed = rename(row, config.data.columns)
    assert changed.items() >= {**row, **{name.lower(): value for name, value in row.items()}}.items()
    if form == "verl":
        assert changed["answer"] == "5" and config.data.prompt == "chat"


def test_tests_of_code_may_be_in_a_column_with_capitals(tmp_path):
    row = {"Prompt": [USER], "Solution": "assert f() == 1"}
    config, _ = load(write(tmp_path, [row] * 2))
    assert rename(row, config.data.columns)["tests"] == "assert f() == 1" and config.rewards[0].name == "python_tests"


def test_a_prompt_alone_beside_other_columns_names_them(tmp_path):
    path = write(tmp_path, [{"prompt": "2 + 3?", "result": "5", "level": 1}] * 2)
    with pytest.raises(ConfigError, match=r"such as rewards=my_rewards.py:my_reward, or the gold answer, such as data.columns='{answer: COLUMN}', of the columns result, level$"):
        load(path)
    assert load(path, "data.columns={answer: result}")[0].rewards[0].name == "correct_answer"


@pytest.mark.parametrize("count, words, size", [
    (320, [], 32), (1, [], 500), (2, [], 1), (19, [], 1), (4999, [], 499), (5000, [], 500), (320, ["data.limit=50"], 5),
    (320, ["evaluation.num_tasks=300"], 300), (320, ["evaluation.num_tasks=0"], 0), (320, ["data.eval_path=builtin:word_problems"], 500),
    (320, ["evaluation.sets=[a, b]"], 500),
])  # fmt: skip
def test_a_tenth_of_a_small_file_is_held_out(count, words, size, tmp_path):
    for row in ({"question": "2 + 3?", "answer": "#### 5"}, {"question": "2 + 3?", "answer": "5"}):
        config, notes = load(write(tmp_path, [row] * count), *words)
        assert config.evaluation.num_tasks == size, (row, notes)
        assert (f"evaluation.num_tasks {size} (not 500)" in "".join(notes)) == (size != 500 and "num_tasks" not in str(words))


def test_rows_are_counted_up_to_a_limit(tmp_path):
    rows = [{"a": 1}] * 7
    assert [count_rows(write(tmp_path, rows, begin="\n\n"), None, "train", most) for most in (3, 7, 100)] == [3, 7, 7]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert count_rows(str(tmp_path / "list.json"), None, "train", 100) == 7
