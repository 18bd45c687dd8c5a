"""Large data stays on disk: the same tasks, order and numbers as in memory, and less memory than the file takes."""

import json
import os
import pickle
import random
import subprocess
from dataclasses import replace

import pytest
from conftest import child_environment
from fakes import Alphabet
from forkserver import interpreter
from test_run import SHORT, read, without_times

from grpo_core.config.sections import DataConfig, EvaluationConfig, RunConfig
from grpo_core.data import rows as rows_module
from grpo_core.data import rows_on_disk, tasks_on_disk
from grpo_core.data.rows import load_splits, load_training_rows
from grpo_core.data.rows_on_disk import RowsOnDisk
from grpo_core.data.stream import TaskStream
from grpo_core.data.tasks import read_tasks
from grpo_core.data.tasks_on_disk import TasksOnDisk, list_rows, prompt_lengths, select_tasks, split_into_parts
from grpo_core.model.loading import load_tokenizer
from grpo_core.schema import ConfigError
from grpo_core.training.gold_answers import check_gold_answers, drop_unjudged
from grpo_core.training.prepare import check_columns

TINY = load_tokenizer("builtin:tiny")


@pytest.fixture
def on_disk(monkeypatch):
    """A function that calls another with every file taken for a large one, in parts of 7 rows."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(rows_module, "LARGE_BYTES", 0)
            patch.setattr(rows_on_disk, "CHUNK", 7)
            patch.setattr(tasks_on_disk, "CHUNK", 7)
            return function(*arguments)

    return call


def chat(i):
    return [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"#### {i + 1}" if i % 5 else "many"}]


ROWS = [{"question": f"What is {i} + 1?" + " Think." * (i % 4), "answer": f"#### {i + 1}", "messages": chat(i), "n": i} for i in range(40)]


def write(folder, place, rows=ROWS):
    path = folder / place
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("\ufeff" + "".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return str(path.parent if "/" in place else path)


def config_of(path, **data):
    return RunConfig(data=DataConfig(path=path, **data), evaluation=EvaluationConfig(num_tasks=6))


SETTINGS = {
    "text": {}, "limit": {"limit": 23}, "columns": {"columns": {"gold": "messages.1.content"}},
    "dropped": {"max_prompt_tokens": 26}, "cut": {"max_prompt_tokens": 26, "long_prompts": "truncate_left"},
    "chat": {"template": "{messages}", "prompt": "chat", "columns": {"own": "answer"}},
}  # fmt: skip


@pytest.mark.parametrize("place", ["rows.jsonl", "rows.parquet", "folder/train.jsonl"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_tasks_are_those_in_memory(tmp_path, on_disk, place, name):
    config = config_of(write(tmp_path, place), **SETTINGS[name])
    (tasks, evaluated, numbers, notes), large = read_tasks(config, TINY), on_disk(read_tasks, config, TINY)
    assert isinstance(tasks, list) and isinstance(large[0], TasksOnDisk) and isinstance(large[1], list)
    assert ([*large[0]], *large[1:]) == (tasks, evaluated, numbers, notes) and len(large[0]) == len(tasks)
    assert prompt_lengths(large[0]) == prompt_lengths(tasks)
    assert [*list_rows(large[0])] == [*list_rows(tasks)]
    assert large[0][3] == tasks[3] and large[0][-1] == tasks[-1] and [*large[0][2:4]] == tasks[2:4]
    assert [*select_tasks(large[0], [5, 1])] == select_tasks(tasks, [5, 1])
    streams = [TaskStream(part, 4, seed=3, rank=1, world_size=2) for part in (tasks, large[0])]
    assert [streams[0].batch(step) for step in range(9)] == [streams[1].batch(step) for step in range(9)]
    assert streams[0].replacements(2, 1) == streams[1].replacements(2, 1)
    assert [*pickle.loads(pickle.dumps(large[0]))] == tasks  # as the launcher sends them to its ranks


def test_the_rows_are_read_in_parts(tmp_path, on_disk, monkeypatch):
    tasks = on_disk(read_tasks, config_of(write(tmp_path, "rows.jsonl")), TINY)[0]
    monkeypatch.setattr("grpo_core.data.tasks_on_disk.CHUNK", 10)
    assert [len(part) for part in split_into_parts(tasks)] == [10, 10, 10, 4]
    assert [len(part) for part in split_into_parts([*tasks])] == [34]


def test_a_small_file_and_formats_that_cannot_be_mapped_are_in_memory(tmp_path, on_disk):
    path = write(tmp_path, "rows.jsonl")
    assert not isinstance(load_training_rows(path, None, "train", None), RowsOnDisk)
    (tmp_path / "list.json").write_text("\ufeff\n " + json.dumps(ROWS))
    (tmp_path / "rows.csv").write_text("question,answer\na,b\n")
    for path in (tmp_path / "list.json", tmp_path / "rows.csv"):
        assert not isinstance(on_disk(load_training_rows, str(path), None, "train", None), RowsOnDisk)
    assert isinstance(on_disk(load_splits, DataConfig(), 5)[0], list)


def test_a_column_that_some_rows_lack_is_null_there(tmp_path, on_disk):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": [2, "x"]}\n')
    assert [*on_disk(load_training_rows, str(path), None, "train", None)] == [{"a": 1, "b": None}, {"a": None, "b": [2, "x"]}]


@pytest.mark.parametrize("lines, message", [
    (['{"question": "a"}', "", "[1"], "line 3, is not JSON"),
    (['{"question": "a"}', "5"], "line 2, is 5; it must be an object"),
    (['{"question": "a"}', '{"question": null}'], "row 2 of the data: column 'question', which data.template uses, is null"),
    (['{"question": "a"}', '{"question": ""}', '{"question": "' + "a" * 9 + '"}'], "row 2 of the data: the prompt is empty"),
    (['{"question": "a"}', '{"question": "aaaaa"}', '{"question": "aaaaaaa"}'], "row 2 of the data: the prompt has 5 tokens, more than data.max_prompt_tokens .4., as have 2 of 3 prompts"),
])  # fmt: skip
def test_what_is_wrong_is_named_as_in_memory(tmp_path, on_disk, lines, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    config = config_of(str(path), template="{question}", max_prompt_tokens=4, long_prompts="error")
    config = replace(config, evaluation=EvaluationConfig(num_tasks=0))
    with pytest.raises(ConfigError, match=message) as large:
        on_disk(read_tasks, config, Alphabet())
    with pytest.raises(ConfigError) as small:
        read_tasks(config, Alphabet())
    assert str(large.value).replace(str(path), "").strip(" ,") == str(small.value).replace(str(path), "").strip(" ,")


def test_bad_rows_and_gold_answers_are_left_out_as_in_memory(tmp_path, on_disk):
    rows = [*ROWS, {"messages": []}, {"messages": [{"role": "system", "content": "x"}]}]
    path = write(tmp_path, "rows.jsonl", rows)
    config = config_of(path, template="{messages}", prompt="chat", columns={"own": "answer"}, bad_rows="drop")
    small, large = read_tasks(config, TINY), on_disk(read_tasks, config, TINY)
    assert small[3] == large[3] and "is left out of 36 rows" in small[3][0]
    small, large = (drop_unjudged(config, *read[:2]) for read in (small, large))
    assert [*large[0]] == small[0] and large[1:] == small[1:] and "of the training data" in small[2][0]
    assert isinstance(large[0], TasksOnDisk)


def test_gold_answers_and_columns_are_checked_as_in_memory(tmp_path, on_disk):
    config = config_of(write(tmp_path, "rows.jsonl"), columns={"gold": "answer", "answer": "messages.1.content"}, max_unjudged=0.5)
    small, large = read_tasks(config, TINY)[0], on_disk(read_tasks, config, TINY)[0]
    sentences = check_gold_answers(config, small, [])
    assert check_gold_answers(config, large, []) == sentences and len(sentences) == 1
    check_columns(config, large, [])
    with_nulls = on_disk(read_tasks, config_of(write(tmp_path, "b.jsonl", [*ROWS, *[{"question": "x"}] * 9])), TINY)[0]
    with pytest.raises(ConfigError, match=r"needs a value in the column 'answer', which is null in row 4\d"):
        check_columns(config, with_nulls, [])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_run_is_bitwise_that_in_memory(tmp_path, here, on_disk, command):
    path = write(tmp_path, "rows.jsonl")
    words = [*SHORT, f"output_dir={tmp_path}", f"data.path={path}", "trainer.num_steps=2", "evaluation.num_tasks=2", "data.limit=30", "sft.targets='{answer}'"]
    words += ["rewards=correct_answer", "data.template='Question: {question}'"]
    small = here(command, "--config", "tiny", *words, "name=small")
    large = on_disk(here, command, "--config", "tiny", *words, "name=large")
    assert small.returncode == large.returncode == 0, small.stderr + large.stderr
    rows = [read(tmp_path / name / "metrics.jsonl") for name in ("small", "large")]
    assert len(rows[0]) == 2 and without_times(rows[0]) == without_times(rows[1])


LIMITED = """
import resource, sys
from grpo_core.config.sections import DataConfig, EvaluationConfig, RunConfig
from grpo_core.data import rows
from grpo_core.data.rows import load_rows
from grpo_core.data.stream import TaskStream
from grpo_core.data.tasks import read_tasks
from grpo_core.model.loading import load_tokenizer
import datasets

path, limit = sys.argv[1], int(sys.argv[2])
rows.LARGE_BYTES = limit
tokenizer = load_tokenizer("builtin:tiny")
tokenizer("warm")
status = open("/proc/self/status").read()
used = int(status.split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
config = RunConfig(data=DataConfig(path=path), evaluation=EvaluationConfig(num_tasks=5))
tasks, evaluated, _, _ = read_tasks(config, tokenizer)
stream = TaskStream(tasks, 16, seed=0)
print(len(tasks), len(evaluated), [task.index for step in (0, 50, 3) for task in stream.batch(step)], flush=True)
try:
    load_rows(path, None, "train", None)
except Exception as error:
    print("in memory:", type(error).__name__)
"""


@pytest.mark.soak
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_larger_than_the_memory_limit_is_read(tmp_path, suffix):
    """The limit is on what a process allocates; mapped files do not count, and all rows in memory do not fit."""
    count, limit = 15_000, 250 * 2**20
    generator, path = random.Random(0), tmp_path / f"rows{suffix}"

    def make(i):
        return {"question": f"What is {i} + 1?", "answer": f"#### {i + 1}", "document": generator.randbytes(12_500).hex()}

    if suffix == ".jsonl":
        with path.open("w") as file:
            for i in range(count):
                file.write(json.dumps(make(i)) + "\n")
    else:
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema([(name, pyarrow.string()) for name in ("question", "answer", "document")])
        with pyarrow.parquet.ParquetWriter(path, schema, compression="none") as writer:
            for start in range(0, count, 100):
                writer.write_table(pyarrow.Table.from_pylist([make(i) for i in range(start, start + 100)], schema))
    assert os.path.getsize(path) > 1.4 * limit
    environment = child_environment() | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run([interpreter(), "-c", LIMITED, path, str(limit)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    counts, *rest = done.stdout.splitlines()
    assert done.returncode == 0 or rest, done.stderr
    small = write(tmp_path, "small.jsonl", [{"question": f"What is {i} + 1?"} for i in range(count)])
    tasks, evaluated, *_ = read_tasks(replace(config_of(small), evaluation=EvaluationConfig(num_tasks=5)), TINY)
    stream = TaskStream(tasks, 16, seed=0)
    assert counts == f"{len(tasks)} {len(evaluated)} {[task.index for step in (0, 50, 3) for task in stream.batch(step)]}"
    assert rest == ["in memory: MemoryError"] or "in memory" not in done.stdout
