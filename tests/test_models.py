"""Model types that are built tiny, against plain transformers and PEFT; benchmarks/models.py has the checks."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import models
import tiny_models

REPRESENTATIVES = [  # a decoder of each kind: packed, window, experts, state, convolution, composite, without a cache
    "gpt2", "gemma2", "qwen3_moe", "mamba2", "lfm2", "qwen3_5", "mistral3", "rwkv",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_type_of_each_kind_is_right(name, tmp_path):
    row = models.check_type(name, tmp_path, trains=False)
    assert row["verdict"] == "right", row


@pytest.mark.soak
@pytest.mark.parametrize("name", tiny_models.TYPES)
def test_every_type_is_right_or_refused(name, tmp_path):
    row = models.check_type(name, tmp_path)
    assert row["verdict"] in ("right", "refused", "not built"), row


def test_the_table_is_that_of_the_kept_rows():
    assert models.PAGE.read_text() == models.draw()


def test_at_least_92_percent_of_the_types_that_can_be_built_are_right():
    rows = json.loads(models.OUT.read_text())["rows"]
    built = [row for row in rows if row["verdict"] != "not built"]
    assert sum(row["verdict"] == "right" for row in built) >= 0.92 * len(built)
    assert len(rows) - len(built) <= 10


def test_the_page_names_the_types_that_are_no_text_decoders():
    text = models.PAGE.read_text().partition(models.BEGIN)[0].replace("\n", " ")
    assert all(f"{name}," in text or f"{name})" in text for name in tiny_models.OTHERS)
