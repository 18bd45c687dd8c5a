"""A file that is no text, or not YAML or JSON, is one sentence with the place of the mistake."""

import json

import pytest

from grpo_core.cli import main
from grpo_core.config.files import load
from grpo_core.data.rows import load_rows
from grpo_core.schema import ConfigError

YAML = {  # content -> what the sentence says after "is not YAML: "
    "name: a\nlora: {r: 16\n": "did not find expected ',' or '}' (line 3, column 1)",
    "name: a\nseed: 1: 2\n": "mapping values are not allowed in this context (line 2, column 8)",
    "name: a\n\tseed: 1\n": "found a tab character that violates indentation (line 2, column 1)",
    "name: a\nlora: *r\n": "found undefined alias (line 2, column 7)",
    "name: a\nname: b\n": "the key 'name' is given twice (line 1, column 1)",
    "name: a\ntürm: \x07\n": r"it has the control character \x07 (line 2, column 7)",
    "name: !!python/name:os.system\n": "could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system' (line 1, column 7)",
    "name: a\n---\nname: b\n": "expected a single document in the stream but found another document (line 2, column 1)",
    "name: 'a\n": "found unexpected end of stream (line 2, column 1)",
    "name: " + "[" * 100_000: "its lists and mappings are nested more than 50 deep",
    "- " * 100_000: "its lists and mappings are nested more than 50 deep",
}


@pytest.mark.parametrize("text", YAML, ids=lambda text: ascii(text[:30]))
def test_yaml_errors_name_the_file_the_line_and_the_column(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(error.value).replace(r"\\x", r"\x") == f"{path} is not YAML: {YAML[text]}"


BINARY = b"name: a\n\xff\x00\x01\n"


@pytest.mark.parametrize("name", ["mine.yaml", "base.yaml", "engine.json", "rows.jsonl", "rows.json", "rows.csv"])
def test_a_binary_file_is_named_with_the_place_of_the_byte(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BINARY)
    (tmp_path / "over.yaml").write_text("base: base.yaml\n")
    (tmp_path / "own.yaml").write_text("engine: {deepspeed: engine.json}\n")
    read = {
        "mine.yaml": lambda: load(path),
        "base.yaml": lambda: load(tmp_path / "over.yaml"),
        "engine.json": lambda: load(tmp_path / "own.yaml"),
    }.get(name, lambda: load_rows(str(path), None, "train", None))
    with pytest.raises(ConfigError) as error:
        read()
    assert str(error.value) == f"{path} is not UTF-8 text: byte 8 is 0xff"


def test_json_errors_name_the_file_the_line_and_the_column(tmp_path):
    (tmp_path / "engine.json").write_text('{\n  "a": 1,\n  b: 2\n}\n')
    (tmp_path / "own.yaml").write_text("engine: {deepspeed: engine.json}\n")
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "own.yaml")
    reason = "Expecting property name enclosed in double quotes (line 3, column 3)"
    assert str(error.value) == f"{tmp_path / 'engine.json'} is not JSON: {reason}"


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfname: marked\n")
    assert load(tmp_path / "mine.yaml").name == "marked"
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"question": "q"}).encode())
    assert load_rows(str(tmp_path / "rows.jsonl"), None, "train", None) == [{"question": "q"}]


def test_the_commands_print_the_sentence(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_bytes(b"\x89PNG\r\n")
    assert main(["train", "--config", str(tmp_path / "mine.yaml")]) == 2
    assert capsys.readouterr().err == f"grpo_core: {tmp_path / 'mine.yaml'} is not UTF-8 text: byte 0 is 0x89\n"


@pytest.mark.parametrize("text", ["2024-13-45", "[" * 5000 + "]" * 5000])
def test_a_word_that_yaml_cannot_read_is_one_sentence(text):
    with pytest.raises(ConfigError):
        load("tiny", [f"rewards={text}"])
    with pytest.raises(ConfigError):
        load("tiny", [f"loss.args.x={text}"])
