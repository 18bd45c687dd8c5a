"""Whatever is written into a config, an override or a data file: it is read, or refused in one sentence."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_core.config.files import build, dump, load
from grpo_core.config.sections import DataConfig, RunConfig
from grpo_core.data.prompts import make_tasks
from grpo_core.data.rows import load_splits
from grpo_core.model.loading import load_tokenizer
from grpo_core.schema import ConfigError

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
many = settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

leaf = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(allow_nan=True), st.text(max_size=8),
    st.sampled_from(["auto", "null", "tiny", "grpo", "inf", "1e9", "epoch", "correct_answer", "a.py:f", "{question}"]),
)  # fmt: skip
values = st.recursive(
    leaf,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def flat(tree, prefix=""):
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")


SHIPPED = yaml.safe_load(TINY.read_text())
KEYS = sorted(set(flat(SHIPPED)))
keys = (
    st.sampled_from(KEYS) | st.text(max_size=10) | st.builds("{}.{}".format, st.sampled_from(KEYS), st.text(max_size=5))
)


def one_sentence(error):
    text = str(error.value if hasattr(error, "value") else error)
    assert text.strip() and "\n" not in text and "Traceback" not in text, text


def put(tree, key, value):
    *sections, last = key.split(".")
    for name in sections:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[last] = value


def replaced(tree, key):
    """Whether a later change of a section removed this key."""
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return True
        tree = tree[name]
    return False


@settings(many, max_examples=500)
@given(changes=st.dictionaries(keys, values, max_size=3))
def test_a_config_is_what_it_says_or_refused(tmp_path, changes):
    tree = copy.deepcopy(SHIPPED)
    for key, value in changes.items():
        put(tree, key, value)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.dump(tree, Dumper=DUMPER, allow_unicode=True), encoding="utf-8")
    (tmp_path / "ds_zero2.json").write_text("{}")
    try:
        config = load(path)
    except ConfigError as error:
        one_sentence(error)
        return
    got = asdict(config)
    for key, value in changes.items():
        if replaced(tree, key):
            continue
        part = got
        for name in key.split("."):
            part = part[name]
        if isinstance(value, int) and not isinstance(part, (list, dict, str)):
            assert part == value  # nothing is replaced by a default
    (tmp_path / "written.yaml").write_text(dump(config), encoding="utf-8")
    again = load(tmp_path / "written.yaml")
    assert asdict(again) == got or "nan" in str(got)


@many
@given(
    text=st.text(max_size=60)
    | st.binary(max_size=40)
    | values.map(lambda value: yaml.safe_dump(value, allow_unicode=True))
)
def test_any_file_is_a_config_or_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    try:
        load(path)
    except ConfigError as error:
        one_sentence(error)


@many
@given(
    override=st.builds("{}={}".format, keys, leaf)
    | st.builds("{}={}".format, keys, values.map(json.dumps))
    | st.text(max_size=20)
)
def test_any_override_is_taken_or_refused(override):
    try:
        assert isinstance(load(TINY, [override]), RunConfig)
    except ConfigError as error:
        one_sentence(error)


@many
@given(tree=values)
def test_anything_is_a_section_or_refused(tree):
    try:
        build(RunConfig, tree, "")
    except ConfigError as error:
        one_sentence(error)


row = st.dictionaries(st.sampled_from(["question", "answer", "cot", "x"]), leaf | st.just("How many?"), max_size=4)
lines = st.lists(row.map(json.dumps) | st.text(max_size=12) | values.map(json.dumps), max_size=4).map("\n".join)
TOKENIZER = load_tokenizer("builtin:tiny")


@many
@given(
    content=st.one_of(
        lines.map(str.encode), st.lists(row, max_size=3).map(json.dumps).map(str.encode), st.binary(max_size=30)
    ),
    suffix=st.sampled_from([".jsonl", ".json"]),
    template=st.sampled_from(["{question}", "Q {question} {answer}", "no columns", "{question!r:>9}", "{x}"])
    | st.text(max_size=9),
    columns=st.sampled_from([{}, {"question": "cot"}, {"answer": "x"}]),
    limit=st.none() | st.integers(1, 3),
)
def test_any_data_file_is_read_whole_or_refused(tmp_path, content, suffix, template, columns, limit):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    config = DataConfig(path=str(path), template=template, columns=columns, limit=limit)
    try:
        rows, _ = load_splits(config, 0)
        tasks, long = make_tasks(rows, config, TOKENIZER)
    except ConfigError as error:
        one_sentence(error)
        return
    wanted = (
        json.loads(content)
        if content.strip().startswith(b"[")
        else [json.loads(x) for x in content.decode("utf-8-sig").split("\n") if x.strip()]
    )
    assert len(tasks) + long == len(wanted if limit is None else wanted[:limit])
    for task in tasks:
        for name, value in task.columns.items():
            got = wanted[task.index].get(columns.get(name, name))
            assert value == got or got != got
        assert task.prompt == template.format(**task.columns)
