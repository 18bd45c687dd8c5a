"""What a report of a long run leaves out, and what it keeps."""

import json
import random
from itertools import pairwise

import pytest
from test_report import Page, lines, made_run, page_of

from grpo_core.report.completions import order_by_coverage, sample_completions, space_evenly, to_json
from grpo_core.report.panels import thin_curve
from grpo_core.report.report import write_report
from grpo_core.report.run_reader import read_run


def test_thin_keeps_extremes_and_gaps():
    rng = random.Random(0)
    values = [rng.random() for _ in range(10_000)]
    values[4321], values[1234], values[7777] = 50.0, -50.0, None
    kept = thin_curve(values, 2000)
    assert len(kept) <= 2000 and kept == sorted(set(kept))
    assert {0, 1234, 4321, 7777, 9999} <= set(kept)
    assert max(b - a for a, b in pairwise(kept)) < 50
    assert thin_curve([None] * 5000, 2000)[0] == 0 and thin_curve([1.0] * 2000, 2000) == list(range(2000))


def test_a_band_and_its_curve_keep_the_same_points(tmp_path):
    run = made_run(tmp_path / "a")
    rng = random.Random(0)
    rows = [
        {
            "step": i,
            "reward": rng.random(),
            "reward_std": rng.random(),
            "seconds": 9.0,
            "seconds/sample": rng.random(),
            "seconds/update": rng.random(),
        }
        for i in range(5000)
    ]
    (run / "metrics.jsonl").write_text(lines(rows))
    (run,) = page_of(run).json("report-data")["runs"]
    assert (
        run["curves"]["reward"]["x"] == run["curves"]["reward_std"]["x"] and len(run["curves"]["reward"]["x"]) <= 2000
    )
    assert (
        run["curves"]["seconds/sample"]["x"]
        == run["curves"]["seconds/update"]["x"]
        == run["curves"]["seconds/other"]["x"]
    )
    assert max(run["curves"]["reward"]["y"]) == pytest.approx(max(row["reward"] for row in rows), rel=1e-4)


def test_completions_are_chosen_evenly_within_the_budget(tmp_path):
    run = made_run(tmp_path / "a", steps=200, text="x" * 900 + "< {}")
    found = sample_completions(read_run(run), 200_000)
    assert len(to_json(found).encode()) <= 200_000
    steps = sorted({row[0] for row in found["rows"]})
    assert {0, 2, 199} <= set(steps) and 15 <= len(steps) < 60  # 2 has dumped tokens
    assert all(sum(row[0] == step for row in found["rows"]) == 8 for step in steps)
    gaps = [b - a for a, b in pairwise(steps[2:])]
    assert max(gaps) <= 2.5 * min(gaps)
    assert (found["total"], found["total_steps"]) == (1600, 200)


@pytest.mark.parametrize("step_size", [900, 20_000])
def test_a_step_that_is_too_large_is_cut(tmp_path, step_size):
    found = sample_completions(read_run(made_run(tmp_path / "a", steps=3, text="x" * step_size + "{}")), 60_000)
    assert 0 < len(to_json(found).encode()) <= 60_000
    assert {row[0] for row in found["rows"]} >= {0, 2}


def test_spaced_and_inwards():
    assert space_evenly(range(10), 4) == [0, 3, 6, 9] and space_evenly([3, 5], 7) == [3, 5] and space_evenly(range(9), 1) == [8]
    for n in range(1, 40):
        assert sorted(order_by_coverage(range(n))) == list(range(n))
    assert order_by_coverage(range(9))[:3] == [8, 0, 4] and order_by_coverage([]) == []


def test_a_long_run_stays_below_20_mb(tmp_path):
    """2,000 steps of 30 completions of 1,000 characters, 70 MB, and dumped batches of 20 MB."""
    run = made_run(tmp_path / "a")
    text = "<think>a b c d e f</think>" * 40
    with open(run / "completions.jsonl", "w") as file:
        for i in range(60_000):
            row = {
                "step": i // 30,
                "task": i,
                "sample": i % 10,
                "prompt": f"Question {i // 10}",
                "text": text,
                "rewards": {"r": 1.0},
                "reward": 1.0,
                "advantage": 0.3,
                "length": 300,
                "truncated": False,
            }
            file.write(json.dumps(row) + "\n")
    one = {
        "sample": 0,
        "advantage": 1.0,
        "tokens": ["<abc>"] * 1000,
        "logprobs": [-0.123456] * 1000,
        "ratio": [1.000123] * 1000,
    }
    for step in range(0, 2000, 50):
        rows = [{"task": 30 * step + k, **one} for k in range(15)]
        (run / "batches" / f"step-{step:06d}-rank-0.json").write_text(
            json.dumps({"step": step, "rank": 0, "row": {}, "completions": rows})
        )
    written = write_report([run])
    assert 12e6 < written[0].stat().st_size < 20e6
    found = Page(written[0].read_text(encoding="utf-8")).json("completion-data")[0]
    assert found["total"] == 60_000 and {0, 1999} <= {row[0] for row in found["rows"]}


def test_tokens_take_a_third_of_the_room(tmp_path):
    run = made_run(tmp_path / "a", steps=40)
    one = {"sample": 0, "advantage": 1.0, "tokens": ["abc"] * 100, "logprobs": [-0.5] * 100, "ratio": [1.0] * 100}
    for step in range(40):
        rows = [{"task": 10 * step, **one}]
        (run / "batches" / f"step-{step:06d}-rank-0.json").write_text(json.dumps({"completions": rows}))
    found = sample_completions(read_run(run), 30_000)
    assert 8_000 < len(to_json(found["tokens"])) <= 10_000
    assert len(to_json(found).encode()) <= 30_000
