import json
import math

import pytest
import torch

from grpo_core.config.sections import AdvantageConfig, FunctionConfig, LossConfig, RewardConfig, RunConfig
from grpo_core.monitor.aggregates import Stats
from grpo_core.monitor.run_log import RunLog, _format_step, describe_evaluation, find_user_files
from grpo_core.schema import finite_or_none
from grpo_core.training.eval_statistics import wilson_interval


def test_stats_are_masked_means_totals_and_maxima():
    stats = Stats()
    stats.add_mean("a", torch.tensor([[1.0, 9.0], [2.0, 3.0]]), torch.tensor([[True, False], [True, True]]))
    stats.add_mean("a", torch.tensor([[10.0]]))
    stats.add_mean("none", torch.tensor([1.0]), torch.tensor([False]))
    stats.add_total("t", torch.tensor(3))
    stats.add_total("t", torch.tensor(4))
    stats.add_max("m", torch.tensor([1.0, 5.0]))
    stats.add_max("m", torch.tensor(3.0))
    row = stats.reduce()
    assert math.isnan(row.pop("none")) and row == {"a": 4.0, "t": 7.0, "m": 5.0}


def test_json_holds_no_nan_and_no_infinity():
    row = {"nan": math.nan, "deep": {"list": [math.inf, -math.inf, 1.5]}, "text": "inf", "count": 3, "none": None}
    written = json.dumps(finite_or_none(row), allow_nan=False)
    assert json.loads(written) == {"nan": None, "deep": {"list": [None, None, 1.5]}, "text": "inf", "count": 3, "none": None}


def test_nothing_that_is_said_moves_the_cursor(tmp_path, capsys):
    log = RunLog(tmp_path, RunConfig(), 0, 1)
    log.info("a\x1b[31mred\x07\r\u202e and\ntwo lines, ×")
    log.warn(["once \x1b]0;title\x07"])
    log.warn(["once \x1b]0;title\x07", "more"])
    assert capsys.readouterr().out == (
        "a\\x1b[31mred\\x07\\r\\u202e and\ntwo lines, ×\nwarning: once \\x1b]0;title\\x07\nwarning: more\n"
    )


def test_an_exception_is_reported_once_by_type_and_line_whatever_its_message(tmp_path, capsys):
    log = RunLog(tmp_path, RunConfig(), 0, 1)
    log.warn(["environment e raised KeyError: 'a (b)' (e.py, line 3)"])
    log.warn(["environment e raised KeyError: 'x, line 7' (e.py, line 3)", "environment e raised KeyError: 'a (b)' (e.py, line 4)"])
    log.warn(["environment e raised ValueError: 'a (b)' (e.py, line 3)", "environment f raised KeyError: 'a (b)' (e.py, line 3)"])
    log.warn(["reward r returned 'x' for completion 0; it must be None", "reward r returned 'y' for completion 5; it must be None"])
    assert capsys.readouterr().out.splitlines() == [
        "warning: environment e raised KeyError: 'a (b)' (e.py, line 3)",
        "warning: environment e raised KeyError: 'a (b)' (e.py, line 4)",
        "warning: environment e raised ValueError: 'a (b)' (e.py, line 3)",
        "warning: environment f raised KeyError: 'a (b)' (e.py, line 3)",
        "warning: reward r returned 'x' for completion 0; it must be None",
    ]


def test_lines_on_the_terminal_show_failures():
    row = {"length": 8.0, "grad_norm": 1.0, "seconds": 1.0, "skipped": 0.0, "failed/environment": 0.344, "failed/f": 0.001, "failed/g": 0.0}
    assert _format_step(row, []) == "length 8  failed: environment 34%, f under 1%  grad 1.000  1.0 s"
    assert "failed" not in _format_step(row | {"failed/environment": 0.0, "failed/f": 0.0}, [])
    result = {"accuracy": 0.5, "correct": 1, "n": 2, "ci_low": 0.1, "ci_high": 0.9, "failed": 0, "environment_failed": 3}
    assert "the environment failed on 3" in describe_evaluation(result)
    assert "failed" not in describe_evaluation(result | {"environment_failed": 0})


def test_a_folder_that_is_no_runs_is_never_removed(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.touch()
    RunLog(tmp_path, RunConfig(overwrite=True), 0, 1)
    assert mine.exists() and "overwrite: false" in (tmp_path / "config.yaml").read_text()
    RunLog(tmp_path, RunConfig(overwrite=True), 0, 1)  # now it is one
    assert not mine.exists()


def test_stats_add_up():
    """What two hold is what one would hold: totals are not averaged, weights are told by name."""
    one, parts = Stats(), [Stats(), Stats()]
    for i, part in enumerate(parts):
        for stats in (one, part):
            stats.add_mean("a", torch.arange(3.0) + i)
            stats.add_total("t", torch.tensor(float(i + 3)))
            stats.add_max("m", torch.tensor(5.0 - i))
            stats.add_weights("w", torch.tensor([1.0, 2.0 + i]), torch.tensor([True, True]))
    added = Stats()
    for part in parts:
        added.merge(part)
    assert added.reduce() == one.reduce() and added.reduce()["t"] == 7.0


def test_resuming_drops_later_and_torn_rows(tmp_path):
    for name in ("metrics", "completions", "evaluation", "evaluation_completions"):
        row = {"text": "lines that only str.splitlines sees: \u2028 \u2029 \x85"}
        lines = [json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for step in (0, 1, 1, 2, 3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines) + '{"step": 4, "lo')
    log = RunLog(tmp_path, RunConfig(), start_step=2, num_steps=5)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) > 3  # the start may still be refused
    assert log.drop_later_rows() == 3
    log.close()

    def steps(name):
        return [json.loads(line)["step"] for line in (tmp_path / f"{name}.jsonl").read_bytes().splitlines()]

    assert steps("metrics") == steps("completions") == [0, 1, 1]
    assert steps("evaluation") == steps("evaluation_completions") == [0, 1, 1, 2]  # the one after two steps stands


@pytest.mark.parametrize(
    "correct, n, low, high",
    [
        (0, 500, 0.0, 0.0076),
        (500, 500, 0.9924, 1.0),
        (50, 100, 0.4038, 0.5962),
        (1, 10, 0.0179, 0.4042),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_against_tables(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_starting_over_keeps_no_row_of_a_run_that_died_before_its_first_checkpoint(tmp_path):
    names = ("metrics", "completions", "evaluation", "evaluation_completions")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text('{"step": 0}\n')
    log = RunLog(tmp_path, RunConfig(), start_step=0, num_steps=5)
    log.drop_later_rows()
    log.close()
    assert all((tmp_path / f"{name}.jsonl").read_text() == "" for name in names)


def test_a_users_files_are_kept_with_the_run(tmp_path):
    names = ("loss", "advantage", "reward", "correction")
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"# {name}")
    files = {name: f"{tmp_path / name}.py:f" for name in names}
    config = RunConfig(
        loss=LossConfig(name=files["loss"], rollout_correction=FunctionConfig(files["correction"])),
        advantage=AdvantageConfig(files["advantage"]), rewards=[RewardConfig(files["reward"]), RewardConfig("combined")],
    )  # fmt: skip
    assert find_user_files(config) == {f"{tmp_path / name}.py" for name in names} and find_user_files(RunConfig()) == set()
    with pytest.raises(ValueError):  # the functions are not there, so the run's formula cannot be written
        RunLog(tmp_path / "run", config, 0, 1)
    for name in names:
        (tmp_path / f"{name}.py").write_text("def f(*given):\n    return given\n")
    RunLog(tmp_path / "run", config, 0, 1).close()
    assert {path.name for path in (tmp_path / "run" / "code").iterdir()} == {f"{name}.py" for name in names}
