import gzip
import json

import numpy as np
import pytest
from fakes import Alphabet

from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig
from grpo_core.data.prompts import make_tasks, render_prompt
from grpo_core.data.rows import load_rows, load_splits
from grpo_core.data.stream import TaskStream
from grpo_core.distributed import ranks
from grpo_core.model.loading import load_tokenizer, resolve_model_path
from grpo_core.objective.rewards import REWARDS
from grpo_core.schema import ConfigError

ROWS = [{"question": f"q{i}", "cot": f"c{i}", "answer": str(i)} for i in range(10)]


def write(folder, suffix):
    path = folder / f"rows{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == ".csv":
        path.write_text("question,cot,answer\n" + "".join(",".join(row.values()) + "\n" for row in ROWS))
    else:
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_local_files(tmp_path, suffix):
    rows, held_out = load_splits(DataConfig(path=str(write(tmp_path, suffix))), 3)
    questions, held = [row["question"] for row in rows], [row["question"] for row in held_out]
    assert len(questions) == 7 and len(held) == 3 and sorted(questions + held) == [row["question"] for row in ROWS]


def test_a_local_folder_and_splits(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({**row, "split": split}) + "\n" for row in ROWS))
    rows, held_out = load_splits(DataConfig(path=str(tmp_path), eval_split="test", limit=4), 6)
    assert [row["split"] for row in rows] == ["train"] * 4 and [row["split"] for row in held_out] == ["test"] * 6


@pytest.mark.parametrize(
    "config, message",
    [
        (DataConfig(path="nowhere.jsonl"), "there is no file nowhere.jsonl"),
        (DataConfig(path="nowhere/at-all"), "data.path is 'nowhere/at-all'"),
        (DataConfig(path="builtin:poems"), "not built in; known: builtin:word_problems"),
        (DataConfig(path=__file__), "a file must end in .json"),
        (DataConfig(path=__file__, split="test"), "is one file and has no split 'test'"),
    ],
)
def test_data_that_cannot_be_loaded_is_one_sentence(config, message):
    with pytest.raises(ValueError, match=message) as error:
        load_splits(config, 1)
    assert "\n" not in str(error.value)


def test_too_few_rows_to_hold_out(tmp_path):
    with pytest.raises(ValueError, match="num_tasks is 10, but .* has only 10 rows"):
        load_splits(DataConfig(path=str(write(tmp_path, ".json"))), 10)


def test_columns_are_renamed_to_ours(tmp_path):
    rows, _ = load_splits(DataConfig(path=str(write(tmp_path, ".json"))), 1)
    config = DataConfig(template="ab{question}{fact}", columns={"fact": "cot"})
    made, _ = make_tasks(rows, config, Alphabet())
    first = made[0].columns
    assert first.keys() == {"question", "fact", "answer"} and made[0].prompt == f"ab{first['question']}{first['fact']}"


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "x"}), encoding="utf-8-sig")
    assert load_splits(DataConfig(path=str(path)), 0)[0] == [{"question": "x"}]


def test_long_prompts_are_cut_on_the_left_where_asked():
    rows = [{"question": "abc"}, {"question": "abcdefg"}]
    config = DataConfig(template="{question}", max_prompt_tokens=3, long_prompts="truncate_left")
    tasks, cut = make_tasks(rows, config, Alphabet())
    assert cut == 1 and [task.prompt_ids for task in tasks] == [[0, 1, 2], [4, 5, 6]]
    assert [task.prompt for task in tasks] == ["abc", "efg"] and tasks[1].columns == rows[1]


def test_long_prompts_are_left_out_and_counted():
    rows = [{"question": "abc"}, {"question": "abcdefg"}, {"question": "b"}]
    tasks, left_out = make_tasks(rows, DataConfig(template="{question}", max_prompt_tokens=3), Alphabet())
    assert [task.index for task in tasks] == [0, 2] and left_out == 1
    assert tasks[0].prompt_ids == [0, 1, 2] and tasks[1].columns == {"question": "b"}
    with pytest.raises(ValueError, match="every prompt is longer"):
        make_tasks(rows[1:2], DataConfig(template="{question}", max_prompt_tokens=3), Alphabet())


@pytest.mark.parametrize(
    "config, message",
    [
        (DataConfig(template="{problem}"), "data.template uses {problem}, but the data has the columns question"),
        (DataConfig(columns={"answer": "anser"}), "data.columns.answer is 'anser'; known: question"),
        (DataConfig(template="{question"), "is malformed"),
        (DataConfig(prompt="chat"), "has no chat template"),
    ],
)
def test_prompt_mistakes(config, message):
    with pytest.raises(ValueError, match=message):
        make_tasks([{"question": "abc"}], config, Alphabet())


def test_chat_prompts_hold_the_system_turn_and_end_where_the_model_starts():
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    config = DataConfig(prompt="chat", template="Q {question}", system="be kind")
    assert render_prompt({"question": "x"}, config, tokenizer) == "<system>be kind<user>Q x<assistant>"


@pytest.mark.parametrize(("template", "message"), [
    ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", r"TemplateSyntaxError: unexpected '}' \(the template, line 2\)"),
    ("{{ messages }}\n{{ 1 // 0 }}", r"ZeroDivisionError: .* \(the template, line 2\)"),
])  # fmt: skip
def test_a_fault_of_a_chat_template_is_named_with_its_line(template, message):
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.chat_template = template
    config = DataConfig(prompt="chat", template="{question}", chat_template=template)
    with pytest.raises(ConfigError, match="^data.chat_template cannot be filled in: " + message):
        render_prompt({"question": "1 + 1"}, config, tokenizer)


def test_unknown_builtin_model():
    with pytest.raises(ValueError, match="model.path is 'builtin:huge'; known: builtin:tiny"):
        resolve_model_path("builtin:huge")


def tasks(count=10):
    return [Task(i, "p", [1], {}) for i in range(count)]


def test_a_batch_is_a_function_of_seed_and_step():
    stream = TaskStream(tasks(), 4, seed=3)
    want = [[t.index for t in stream.batch(step)] for step in range(6)]
    assert [[t.index for t in TaskStream(tasks(), 4, seed=3).batch(step)] for step in reversed(range(6))] == want[::-1]
    assert [[t.index for t in TaskStream(tasks(), 4, seed=4).batch(step)] for step in range(6)] != want


def test_every_epoch_is_a_permutation_and_they_differ():
    stream = TaskStream(tasks(), 4, seed=0)
    places = [t.index for step in range(5) for t in stream.batch(step)]
    assert sorted(places[:10]) == sorted(places[10:]) == list(range(10)) and places[:10] != places[10:]


def test_ranks_share_a_step_and_no_completion_has_the_same_seed():
    whole = TaskStream(tasks(), 4, seed=0)
    for step in range(4):
        parts = [t for rank in range(2) for t in TaskStream(tasks(), 4, 0, rank, 2).batch(step)]
        assert parts == whole.batch(step)
    seeds = [t.seed for step in range(9) for t in whole.batch(step)]
    assert len(set(seeds)) == len(seeds)


def test_replacements_are_of_the_step_and_the_attempt_and_of_no_rank():
    """Fresh prompts with noise of their own: a function of (seed, step, attempt, position)."""
    whole = TaskStream(tasks(), 4, seed=0)
    made = {(step, attempt): whole.replacements(step, attempt) for step in range(3) for attempt in (1, 2, 3)}
    for (step, attempt), drawn in made.items():
        parts = [t for rank in range(2) for t in TaskStream(tasks(), 4, 0, rank, 2).replacements(step, attempt)]
        assert parts == drawn and len({task.index for task in drawn}) == 4
    assert len({tuple(task.index for task in drawn) for drawn in made.values()}) == 9
    assert [t.index for t in TaskStream(tasks(), 4, seed=1).replacements(0, 1)] != [t.index for t in made[0, 1]]
    seeds = [task.seed for drawn in made.values() for task in drawn]
    seeds += [task.seed for step in range(3) for task in whole.batch(step)]
    assert len(set(seeds)) == len(seeds)
    assert len(TaskStream(tasks()[:2], 4, seed=0).replacements(0, 1)) == 4  # fewer rows than places


def test_s3_the_order_of_the_data_shares_no_stream_with_the_completions(monkeypatch):
    """FAULTS S3: the order of epoch e was drawn from the noise of (step e, position 1, sample 0)."""
    make, streams = np.random.default_rng, {"order": [], "noise": []}

    def recording(*arguments):
        streams[kind].append(tuple(make(*arguments).random(4)))
        return make(*arguments)

    monkeypatch.setattr(np.random, "default_rng", recording)
    kind, stream = "order", TaskStream([Task(i, "p", [1], {}) for i in range(6)], 3, seed=0)
    tasks = [task for step in range(8) for task in stream.batch(step)]
    tasks += [task for step in range(8) for attempt in (1, 2) for task in stream.replacements(step, attempt)]
    kind = "noise"
    ranks.draw_uniforms([(*task.seed, sample) for task in tasks for sample in range(3)], 4)
    assert len(streams["order"]) == 4 + 16 and len(streams["noise"]) == 3 * len(tasks)
    every = streams["order"] + streams["noise"]
    assert len(set(every)) == len(every)


CSV_CELLS = {"007": "007", "5": "5", "5.0": "5.0", "NA": "NA", "null": "null", "nan": "nan", "true": "true", "1e3": "1e3", '"0123"': "0123", "": None}


@pytest.mark.parametrize("cell", CSV_CELLS)
@pytest.mark.parametrize("place", ["rows.csv", "rows.tsv", "folder/train.csv", "folder/rows.csv", "folder/rows.tsv", "folder/train.csv.gz"])
def test_attack_1_a_cell_of_a_csv_file_stays_as_written(tmp_path, place, cell):
    """The other cells of the column are numbers and one is missing: pandas would read 7.0, 5.0 and null."""
    path, separator = tmp_path / place, "\t" if ".tsv" in place else ","
    path.parent.mkdir(exist_ok=True)
    lines = [f"{cell}{separator}q", f"12{separator}q", f"{separator}q", f"12{separator}2024-01-05"]
    data = "".join(line + "\n" for line in [f"answer{separator}question", *lines]).encode()
    path.write_bytes(gzip.compress(data) if place.endswith("gz") else data)
    rows = load_rows(str(path.parent if "/" in place else path), None, "train", None)
    assert [row["answer"] for row in rows] == [CSV_CELLS[cell], "12", None, "12"]
    assert rows[3]["question"] == "2024-01-05"


def test_attack_1_answers_from_a_csv_file_are_judged(tmp_path):
    (tmp_path / "rows.csv").write_text('question,answer\nq,5\nq,"1,234"\nq,#### 18\nq,"two\nlines"\n')
    gold = [row["answer"] for row in load_rows(str(tmp_path / "rows.csv"), None, "train", None)]
    assert REWARDS.build("correct_answer")(["5", "1234", "18", "1"], answer=gold) == [1.0, 1.0, 1.0, None]
    assert REWARDS.build("text_match")(["5", "1,234", "18", "two lines"], answer=gold) == [1.0, 1.0, 1.0, 1.0]
    assert render_prompt({"question": "007"}, DataConfig(template="{question}"), Alphabet()) == "007"


def test_attack_1_a_split_of_a_folder_may_be_a_slice_or_a_sum(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("a\n" + "".join(f"0{i}{split}\n" for i in range(4)))
    read = {split: [row["a"] for row in load_rows(str(tmp_path), None, split, None)] for split in ("train[:50%]", "test+train", "all")}
    assert read["train[:50%]"] == ["00train", "01train"]
    assert len(read["test+train"]) == len(read["all"]) == 8 and read["test+train"][0] == "00test"
    with pytest.raises(ValueError, match="Unknown split"):
        load_rows(str(tmp_path), None, "dev", None)


@pytest.mark.parametrize("place", ["rows.csv", "rows.jsonl", "folder/rows.csv", "rows.parquet"])
def test_attack_1_data_without_a_row_is_the_same_sentence(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    if place.endswith("parquet"):
        pytest.importorskip("pandas").DataFrame({"answer": []}).to_parquet(path)
    else:
        path.write_text("" if place.endswith("jsonl") else "question,answer\n")
    path = path.parent if "/" in place else path
    with pytest.raises(ValueError) as error:
        load_rows(str(path), None, "train", None)
    assert str(error.value) == f"data.path is {str(path)!r} (split 'train'), and it has no rows"


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n1,2,3\n", "line 3, has 3 cells, but there are only 2 columns"),
        ('a,b\n1,"2\n3,4\n', "is not CSV: a double quote is not closed"),
        ('a,b\n1,"2"x\n', "line 2, is not CSV"),
    ],
)
def test_attack_1_a_malformed_csv_file_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / "rows.csv"), None, "train", None)


def test_attack_1_a_long_cell_and_odd_headers_are_read(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbf,a,a\r\n0," + b"x" * 200_000 + b',"1\r\n2"\r\n\r\n1\r\n')
    first, second = load_rows(str(tmp_path / "rows.csv"), None, "train", None)
    assert first == {"Unnamed: 0": "0", "a": "x" * 200_000, "a.1": "1\r\n2"}
    assert second == {"Unnamed: 0": "1", "a": None, "a.1": None}


MIXED = {
    "formats": ({"a.jsonl": '{"a": "1"}', "b.jsonl": '{"a": "1"}', "c.csv": "a\n1\n"}, r"several formats \(a.jsonl, c.csv\); name one"),
    "columns": ({"a.jsonl": '{"a": "1"}', "b.jsonl": '{"a": 1, "b": [2]}'}, "cannot be loaded: its files differ in their columns"),
    "csv": ({"a.csv": "a\n1\n", "b.csv": "a,b\n1,2\n"}, "and its files differ in their columns"),
}


@pytest.mark.parametrize("name", MIXED)
def test_attack_1_a_folder_of_mixed_files_is_one_sentence(tmp_path, name):
    files, message = MIXED[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path), None, "train", None)


def test_attack_1_files_beside_those_of_a_split_do_not_count(tmp_path):
    (tmp_path / "train.csv").write_text("a\n01\n")
    (tmp_path / "notes.json").write_text("{}")
    assert load_rows(str(tmp_path), None, "train", None) == [{"a": "01"}]


def test_attack_1_csv_files_of_the_hub_are_found_again_without_a_network(tmp_path, monkeypatch):
    """The environment of the tests sets HF_HUB_OFFLINE; the files lie where a download has put them."""
    repository = tmp_path / "datasets--me--set"
    for name, text in (("refs/main", "abc"), ("snapshots/abc/train.csv", "a\n007\n")):
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_rows("me/set", None, "train", None) == [{"a": "007"}]
    with pytest.raises(ValueError, match="data.path is 'me/other' .*it cannot be loaded"):
        load_rows("me/other", None, "train", None)
