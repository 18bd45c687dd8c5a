"""Data as people have it: other columns beside the form's, gaps, capitals, and few rows."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
from conftest import ROOT

from grpo_core.batch import Task
from grpo_core.config import files
from grpo_core.data import rows as rows_module
from grpo_core.data.columns import check_names, rename
from grpo_core.data.forms import recognise
from grpo_core.data.prompts import make_tasks
from grpo_core.data.rows import count_rows, load_rows, load_splits
from grpo_core.data.rows_on_disk import RowsOnDisk
from grpo_core.model.loading import load_tokenizer
from grpo_core.schema import ConfigError
from grpo_core.training.gold_answers import check_gold_answers
from grpo_core.training.prepare import check_columns
from grpo_core.training.task_notes import list_leaks

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
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name if name == "math_verify" else find(name, *rest))


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
    config, (note,) = load(path, "data.columns.answer=result", "rewards=correct_answer")
    assert config.data.columns == {"answer": "result"} and "data.columns" not in note


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


EMPTY = {  # a row that is no task -> what is wrong with it
    "has only empty turns of the user": {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " \n"}], "solution": "5"},
    "is the text of a list of messages, '[{\"role\": ": {"prompt": json.dumps([USER]), "solution": "5"},
    "is the text of a list of messages, \"[ {'content': ": {"prompt": "[ {'content': 'a', 'role': 'user'}]", "solution": "5"},
    "the prompt is empty, because data.template has no text from question": {"question": " ", "answer": "#### 5"},
    "has no turn of the user; its roles are human, assistant": {"messages": [{"role": "human", "content": "a"}, {"role": "assistant", "content": "5"}]},
}  # fmt: skip


@pytest.mark.parametrize("sentence", EMPTY)
def test_a_prompt_without_text_or_messages_as_text_is_refused(sentence, tmp_path):
    config, _ = load(write(tmp_path, [EMPTY[sentence]] * 2))
    with pytest.raises(ConfigError) as error:
        make_tasks([EMPTY[sentence]], config.data, load_tokenizer("builtin:tiny"))
    assert sentence in str(error.value) and "row 1 of the data" in str(error.value)


def test_a_list_in_a_text_prompt_is_no_message():
    config = files.load(TINY, ["data.template={prompt}"])
    tasks, _ = make_tasks([{"prompt": "[{'a': 1}, 2] has"}, {"prompt": "role: 'user'"}], config.data, load_tokenizer("builtin:tiny"))
    assert len(tasks) == 2


def test_other_columns_are_answered_with_the_key_that_names_them(tmp_path):
    config, _ = load(write(tmp_path, [{"instruction": "2 + 3?", "output": "5"}]))
    with pytest.raises(ConfigError, match=r"columns instruction, output; name the one with the prompt, such as data.columns='{question: COLUMN}' or data.template='{COLUMN}'$"):
        make_tasks([{"instruction": "2 + 3?", "output": "5"}], config.data, load_tokenizer("builtin:tiny"))


@pytest.mark.parametrize("value, path", [({"target": ["5", "five"]}, "truth.target"), ([{"role": "assistant", "content": "5"}], "truth.-1.content")])
def test_a_place_inside_of_gold_answers_is_proposed(value, path):
    config = files.load(TINY, ["data.columns={answer: truth}"])
    with pytest.raises(ConfigError, match=rf"name a place in these values, such as data.columns.answer={path}, or raise"):
        check_gold_answers(config, [Task(0, "q", [1], {"answer": value})], [])
    with pytest.raises(ConfigError, match=r"name another column with data.columns, leave such rows out with data.bad_rows: drop, or raise"):
        check_gold_answers(config, [Task(i, "q", [1], {"answer": "5" if i else ""}) for i in range(3)], [])


def test_prompts_that_are_trained_and_evaluated_are_counted():
    tasks, eval_tasks = ([Task(i, prompt, [1], {}) for i, prompt in enumerate(prompts)] for prompts in ("abca", "xa"))
    (sentence,) = list_leaks(SimpleNamespace(tasks=tasks, eval_tasks=eval_tasks))
    assert "of the 2 tasks of the evaluation 1 has a prompt that the run also trains on" in sentence
    assert list_leaks(SimpleNamespace(tasks=tasks, eval_tasks=eval_tasks[:1])) == []


@pytest.mark.parametrize("columns, name", [
    ([{"extra_info": {"split": split}} for split in ("train", "test")], "extra_info.split"), ([{"split": split} for split in ("dev", "train")], "split"),
    ([{"split": split} for split in ("test", "test")], None), ([{"split": split} for split in ("train", "hard")], None), ([{}, {"split": None}], None),
])  # fmt: skip
def test_trained_rows_of_a_test_split_are_named_with_the_words_that_divide_them(columns, name):
    tasks = [Task(i, str(i), [1], row) for i, row in enumerate(columns)]
    sentences = list_leaks(SimpleNamespace(tasks=tasks, eval_tasks=[]))
    assert len(sentences) == (name is not None)
    if name:
        other = "test" if name.startswith("extra") else "dev"
        assert sentences[0].startswith(f"the run trains on rows whose {name} is {other}; ")
        assert sentences[0].endswith(f"write data.split={name}=train data.eval_split={name}={other}")


# --- splits that a column names

VERL = [{"prompt": [{"role": "user", "content": f"{i} + 1?"}], "reward_model": {"ground_truth": str(i + 1)}, "extra_info": {"split": "test" if i % 3 == 2 else "train"}} for i in range(9)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "folder"])
@pytest.mark.parametrize("large", [False, True])
def test_a_column_says_which_rows_are_a_split(name, large, tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr(rows_module, "LARGE_BYTES", 0 if large else 2**30)
    path = write(tmp_path, VERL)
    if name != "rows.jsonl":
        path = str(tmp_path / "folder" / "rows.parquet")
        Dataset.from_list(VERL).to_parquet(path)
        path = path if name == "rows.parquet" else str(tmp_path / "folder")
    config, (note,) = load(path, "data.split=extra_info.split=train", "data.eval_split=extra_info.split=test")
    assert "the form of verl" in note and config.evaluation.num_tasks == 500
    train, held_out = load_splits(config.data, 500)
    assert isinstance(train, RowsOnDisk) == large
    assert [row["extra_info"]["split"] for row in train] == ["train"] * 6 and len(held_out) == 3
    assert [*train.numbers] == [0, 1, 3, 4, 6, 7] and [*held_out.numbers] == [2, 5, 8]  # as in the file
    assert train.source == f"{path} (extra_info.split=train)"
    assert [*load_rows(path, None, "extra_info.split=test", 2).numbers] == [2, 5] and count_rows(path, None, "extra_info.split=test", 500) == 3
    config, _ = load(path, "data.split=extra_info.split=test")  # of which a tenth is held out
    train, held_out = load_splits(config.data, config.evaluation.num_tasks)
    assert (len(train), len(held_out)) == (2, 1)
    with pytest.raises(ConfigError, match=r"of which no row has extra_info.split=dev; extra_info.split is train, test$"):
        load_rows(path, None, "extra_info.split=dev", None)
    with pytest.raises(ConfigError, match=r"of which no row has level=3; it has no column level$"):
        load_rows(path, None, "level=3", None)


@pytest.mark.parametrize("words", [
    ["data.eval_split=extra_info.split=test"], ["data.split=extra_info.split=train", "data.eval_split=test"],
    ["data.split=extra_info.split=train", "data.eval_split=level=3"], ["data.split=extra_info.split=train", "evaluation.sets=[{name: b, split: level=1}]"],
])  # fmt: skip
def test_a_column_that_names_only_one_of_two_splits_is_refused(words, tmp_path):
    with pytest.raises(ConfigError, match=r"name one column in all of them or in none, so that no row is trained on and evaluated$"):
        load(write(tmp_path, VERL), *words)
    load(write(tmp_path, VERL), "data.eval_path=builtin:word_problems", *(word for word in words if "eval" not in word))


VERLS_REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(ground_truth in solution_str)
"""


def test_a_reward_function_of_verl_is_answered_with_how_to_call_it(tmp_path):
    (tmp_path / "scores.py").write_text(VERLS_REWARD)
    config = files.load(TINY, [f"rewards={tmp_path}/scores.py:compute_score"])
    with pytest.raises(ConfigError, match=r"scores one completion; a reward here gets a list of completions, so write one that calls it for each, as in docs/rewards.md$"):
        check_columns(config, [Task(0, "q", [1], {"data_source": "x", "reward_model": {"ground_truth": "5"}})], [])


# --- files


@pytest.mark.parametrize("name, content, sentence", [
    ("rows.jsonl.gz", "a", "unpack it, as with gunzip -k "), ("rows.jsonl.zst", "a", "unpack it, as with unzstd "),
    ("a.json", '{"q": {"0": "a", "1": "b"}, "a": {"0": 1, "1": 2}}', "is one object, whose q, a hold the rows; write one object per line"),
    ("a.json", '{"data": [{"q": 1}, {"q": 2}]}', "is one object, whose data hold the rows; write one object per line"),
])  # fmt: skip
def test_files_in_another_form_are_answered_with_what_to_do(name, content, sentence, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        load_rows(str(tmp_path / name), None, "train", None)


@pytest.mark.parametrize("path", ["data/*.parquet", "[a.parquet,b.parquet]", "a.jsonl,b.jsonl"])
def test_several_files_are_a_folder_or_sources(path):
    with pytest.raises(ConfigError, match=r"it takes one path, so name a folder for files of the same form, or list them as data.sources"):
        load_rows(path, None, "train", None)


def test_one_conversation_is_a_row_and_no_list_of_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"messages": [USER, {"role": "assistant", "content": "5"}]}))
    assert len(load_rows(str(tmp_path / "a.json"), None, "train", None)) == 1


def test_a_saved_data_set_is_read_with_its_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)])
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict(easy=rows, test=rows.select([1])).save_to_disk(str(tmp_path / "several"))
    read = lambda name, split: [row["question"][0] for row in load_rows(str(tmp_path / name), None, split, None)]  # noqa: E731
    assert read("one", "train") == list("012345") and read("several", "easy[:2]+test") == list("011") and read("several", "test") == ["1"]
    with pytest.raises(ConfigError, match=r"has no split 'train'; it has easy, test$"):
        read("several", "train")
    config, (note,) = load(tmp_path / "one", "evaluation.num_tasks=2")
    assert "the form of GSM8K" in note and len(config.rewards) == 1
