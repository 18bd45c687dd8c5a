"""Paths that no file system can have or that cannot be written are refused in a sentence, by a dry run too."""

import os
import re
from pathlib import Path

import pytest
from conftest import ROOT

from grpo_core.cli import main
from grpo_core.commands import evaluate, export
from grpo_core.commands.dry_run import preview
from grpo_core.commands.open_policy import open_source
from grpo_core.config.files import load, load_job
from grpo_core.schema import ConfigError
from grpo_core.training import run_dir
from grpo_core.training.resume import find_and_lock_start

TINY = ROOT / "configs" / "tiny.yaml"
LONG = "x" * 300
DEEP = "/".join(["y" * 200] * 30)
BAD = [(LONG, "the name of a file or folder may have 255 bytes, not 300"), (DEEP, "bytes here, not 6,029"), ("a\0b", "null character")]
KEYS = ["name", "output_dir", "sft.output", "resume", "data.path", "data.eval_path", "model.path"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("path, sentence", BAD)
@pytest.mark.parametrize("read", [load, load_job])
def test_attack_2_a_path_that_cannot_exist_is_named_by_its_key(key, path, sentence, read):
    with pytest.raises(ConfigError, match=f"{key} is ") as error:
        read(TINY, [f"{key}={path}"])
    assert sentence in str(error.value) or (key == "name" and "/" in path)
    assert len(str(error.value)) < 300 or (key == "name" and "/" in path)


@pytest.mark.parametrize("word", ["resume=auto", "resume=force", "overwrite=true"])
def test_attack_2_a_long_name_is_refused_however_the_run_starts(word):
    with pytest.raises(ConfigError, match="name is 'xxx"):
        load_job(TINY, [f"name={LONG}", word])


def test_attack_2_bytes_are_counted_and_not_characters():
    assert load(TINY, ["name=" + "x" * 255]).name == "x" * 255
    with pytest.raises(ConfigError, match="may have 255 bytes, not 256"):
        load(TINY, ["name=" + "ä" * 128])


def test_attack_2_a_byte_that_is_not_utf8_and_a_long_path_in_a_list_are_refused_too():
    for key in ("name", "output_dir", "data.path"):
        with pytest.raises(ConfigError, match="a path must not hold '.*udcff', which is not UTF-8"):
            load(TINY, [f"{key}=" + os.fsdecode(b"a\xff")])
    with pytest.raises(ConfigError, match=r"evaluation.sets\[0\].path is 'xxx"):
        load(TINY, [f"evaluation.sets=[{{name: a, path: {LONG}}}]"])
    with pytest.raises(ConfigError, match="there is no file"):
        load(TINY, [f"loss.name={LONG}.py:f"])


@pytest.fixture
def unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    return {"file": tmp_path / "file", "null": Path("/dev/null"), "proc": Path("/proc"), "below": tmp_path / "file" / "a", "link": tmp_path / "link"}


PLACES = ["file", "null", "proc", "below", "link"]


@pytest.mark.parametrize("place", PLACES)
def test_attack_2_a_dry_run_refuses_what_train_refuses(unwritable, place):
    config = load(TINY, [f"output_dir={unwritable[place]}", "name=a"])
    with pytest.raises(ConfigError, match=re.escape(f"the run folder {unwritable[place]}/a (output_dir and name) cannot be written")):
        find_and_lock_start(config)
    with pytest.raises(ConfigError, match=re.escape(f"the run folder {unwritable[place]}/a (output_dir and name) cannot be written")):
        next(preview(config, 1))


def test_attack_2_a_dry_run_leaves_no_folder(tmp_path):
    next(preview(load(TINY, [f"output_dir={tmp_path}/new/runs", "name=a"]), 1))
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(ConfigError, match="cannot be written: "):
        run_dir.check_writable(tmp_path / "new" / LONG, "sft.output")
    assert [*tmp_path.iterdir()] == []


@pytest.fixture
def unopened(monkeypatch):
    def refuse(*arguments, **options):
        pytest.fail("the model was opened before the output was checked")

    monkeypatch.setattr(export, "open_source", refuse)
    monkeypatch.setattr(evaluate, "open_source", refuse)


@pytest.mark.parametrize("place", [*PLACES, "long", "null byte"])
def test_attack_2_outputs_are_refused_before_the_model_loads(unwritable, unopened, place):
    output = {**unwritable, "long": Path(LONG), "null byte": Path("a\0b")}[place]
    for options in ({}, {"dry_run": True}, {"adapter": True}):
        with pytest.raises(ConfigError, match="--output "):
            export.run_export("builtin:tiny", output=output, **options)
    with pytest.raises(ConfigError, match="--output "):
        evaluate.run_evaluate("builtin:tiny", output=output)
    if place not in ("null byte", "long"):
        with pytest.raises(ConfigError, match="sft.output is .*, which cannot be written"):
            run_dir.check_writable(output, "sft.output")


@pytest.mark.parametrize("words", [
    ["report", LONG], ["report", "a", "--output", LONG], ["replay", LONG], ["replay", "a", "--output", f"{LONG}/a"],
    ["train", "--config", LONG], ["train", "--dry-run", "--config", LONG], ["sft", "--config", LONG], ["export", LONG],
    ["evaluate", LONG], ["sample", LONG, "a"], ["evaluate", "builtin:tiny", "--data", LONG], ["export", "a", "--output", DEEP],
])  # fmt: skip
def test_attack_2_paths_on_the_command_line(capsys, words):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "grpo_core: " in error and " may have " in error and len(error.splitlines()) == 1, error


def test_attack_2_an_unreadable_run_folder_is_a_sentence(monkeypatch, tmp_path):
    def refuse(config):
        raise PermissionError(13, "Permission denied", "runs/a/metrics.jsonl")

    monkeypatch.setattr(run_dir, "_find_on_main", refuse)
    with pytest.raises(ConfigError, match="the run folder runs/a/metrics.jsonl .* cannot be read: Permission denied"):
        run_dir.find_run_folder(load(TINY, [f"output_dir={tmp_path}"]))


@pytest.mark.parametrize("name", ["bad name", "a/b/c", "", "a--b", "x.git", "-a", "me/.b", "Größe", "a\nb", "x" * 97, "a b/c"])
def test_attack_7_a_repository_name_is_checked_first(unopened, tmp_path, name):
    for options in ({"dry_run": True}, {}):
        with pytest.raises(ConfigError, match=re.escape(f"--push is {name!r}; it must be ORG/NAME or NAME".replace("\n", "\\n"))):
            export.run_export(str(tmp_path), push=name, **options)


def test_attack_7_good_repository_names_are_accepted():
    for name in ("me/tiny", "tiny", "Me-2/tiny_model.v1"):
        export.check_repository(name)


def test_attack_2_a_source_that_cannot_exist_is_no_hub_id():
    with pytest.raises(ConfigError, match="the run or model is 'xxx"):
        open_source(LONG)
