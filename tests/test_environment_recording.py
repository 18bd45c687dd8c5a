"""Recorded answers of environments: whose they are, and how long they stay."""

from dataclasses import replace

import pytest

from grpo_core.batch import Task
from grpo_core.config.sections import EnvironmentConfig, RunConfig
from grpo_core.environments.recording import Recording, drop_recordings, make_call_key
from grpo_core.environments.user_code import digest_environment
from grpo_core.training.checkpoint import prune_recordings
from grpo_core.training.run_dir import discard_later

FILES = {
    "my_env.py": "import json\nimport helper\nfrom words import long\n\nclass A: ...\nclass B: ...\n",
    "helper.py": "from words.long import many\n",
    "words/__init__.py": "from . import short\n",
    "words/long.py": "many = 3\n",
    "words/short.py": "few = 1\n",
    "other.py": "",
    "tools.py": "def f(): ...\n",
    "parser.py": "def parse(text): ...\n",
}


def write(folder, **changes):
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def config_of(folder, name="A", args=None, **options):
    environment = EnvironmentConfig(name=f"{folder}/my_env.py:{name}", args=args or {"most": 3}, **options)
    return replace(RunConfig(), environment=environment)


@pytest.mark.parametrize("file, counts", [
    ("my_env.py", True), ("helper.py", True), ("words/__init__.py", True), ("words/long.py", True),
    ("words/short.py", True), ("other.py", False), ("tools.py", False),
])  # fmt: skip
def test_the_digest_is_that_of_the_file_and_of_what_it_imports_from_its_folder(tmp_path, file, counts):
    before = digest_environment(config_of(write(tmp_path)))
    (tmp_path / file).write_text((tmp_path / file).read_text() + "x = 1\n")
    assert (digest_environment(config_of(tmp_path)) != before) == counts


def test_the_digest_knows_settings_and_no_folder(tmp_path):
    folder = write(tmp_path / "a")
    before = digest_environment(config_of(folder))
    assert digest_environment(config_of(write(tmp_path / "b"))) == before
    changes = [{"name": "B"}, {"args": {"most": 4}}, {"timeout": 3.0}]
    assert len({before, *(digest_environment(config_of(folder, **change)) for change in changes)}) == 4
    assert digest_environment(config_of(folder, max_answer_tokens=3)) == before  # answers are recorded before they are cut


@pytest.mark.parametrize("file", ["tools.py", "parser.py"])
def test_the_digest_of_tools_is_that_of_their_files_and_of_the_parser(tmp_path, file):
    write(tmp_path)
    config = replace(RunConfig(), tools=[f"{tmp_path}/tools.py:f"], tool_parser=f"{tmp_path}/parser.py:parse")
    before = digest_environment(config)
    assert digest_environment(replace(config, tool_parser="tagged_json")) != before
    (tmp_path / file).write_text("x = 1\n")
    assert digest_environment(config) != before


def test_another_source_reads_nothing_and_the_newest_counts(tmp_path):
    for source in "ab":
        recording = Recording(tmp_path, 0, source)
        assert recording.get(3, "call") is None and recording.is_outdated(3, "call") == (source == "b")
        recording.add(3, "call", [], 5)
        assert Recording(tmp_path, 0, source).get(3, "call") == () and Recording(tmp_path, 0, source).get(4, "call") is None
    assert Recording(tmp_path, 0, "a").get(3, "call") is None
    assert not Recording(None).is_outdated(3, "call")


def test_the_key_of_a_call_has_the_columns():
    task = Task(0, "p", [1], {"answer": 3}, seed=("train", 0, 0, 0))
    assert make_call_key([task], 2, 9) != make_call_key([replace(task, columns={"answer": 4})], 2, 9)


def steps_left(folder):
    return sorted({int(path.name.split("-")[1]) for path in (folder / "turns").glob("*")})


@pytest.mark.parametrize("keep, good, saved, left", [
    (2, 20, (), [*range(16, 24)]),
    (1, 20, (), [*range(20, 24)]),
    (1, 17, (), [*range(16, 24)]),  # the newest sound one is that before skipped steps
    (9, 20, (), [*range(4, 24)]),
    (2, 20, (2, 7), [2, 7, *range(16, 24)]),
])  # fmt: skip
def test_recordings_stay_from_the_oldest_checkpoint_on_and_for_saved_batches(tmp_path, keep, good, saved, left):
    """The checkpoint after 4 steps is the best, which does not count."""
    for step in range(24):
        for rank in range(2):
            Recording(tmp_path / "turns", rank).add(step, "call", [], 1)
    for step in (4, 16, 20):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    for step in saved:
        (tmp_path / "batches").mkdir(exist_ok=True)
        (tmp_path / "batches" / f"step-{step:06d}-rank-1.json").touch()
    assert prune_recordings(tmp_path, keep, good) is None and steps_left(tmp_path) == left
    assert len([*(tmp_path / "turns").glob("*")]) == 2 * len(left)


def test_a_run_that_goes_back_to_a_checkpoint_drops_later_recordings(tmp_path):
    for step in range(5):
        Recording(tmp_path / "turns").add(step, "call", [], 1)
    (tmp_path / "turns" / "mine.txt").touch()
    assert discard_later(tmp_path, 3) == ["the answers of environments of 2 steps"]
    assert drop_recordings(tmp_path / "turns", lambda step: step > 0) == 1
    assert sorted(path.name for path in (tmp_path / "turns").glob("*")) == ["mine.txt", "step-000001-rank-0.jsonl", "step-000002-rank-0.jsonl"]
