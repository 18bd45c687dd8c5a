"""The `evaluate` command: its figures from hand-made rows, and the whole of it on a run."""

import json
import math
from types import SimpleNamespace

import pytest
from conftest import start_two_ranks, wait_for

from grpo_core.cli import main
from grpo_core.commands.evaluate import (
    compute_figures,
    load_problems,
    make_correctness_and_rewards,
    summarise,
)
from grpo_core.commands.evaluate_table import format_figure, format_table
from grpo_core.config.sections import DataConfig, EvaluationConfig, RunConfig
from grpo_core.model.loading import load_tokenizer
from grpo_core.objective.rewards import final_number
from grpo_core.schema import ConfigError

EVALUATE = """
import sys
from grpo_core.cli import main
code = main(sys.argv[1:])
from torch import distributed
sys.exit(9 if distributed.is_initialized() else code)
"""


def row(task, sample, correct, text="#### 1", *, strict=None, reward=0.0, length=4, truncated=False, policy="policy"):
    return {
        "policy": policy, "task": task, "sample": sample, "correct": correct, "strict": correct if strict is None else strict,
        "text": text, "rewards": {"r": reward}, "length": length, "truncated": truncated,
    }  # fmt: skip


ROWS = [
    row(7, 0, True, reward=9.0), row(7, 1, True, "#### 5", reward=1.0), row(7, 2, False, "#### 6"), row(7, 3, True, "so 5", strict=False), row(7, 4, False, "?"),
    row(3, 0, True, strict=False), row(3, 4, True, "#### 2"), row(3, 1, False, "#### 8", reward=None), row(3, 2, False, "#### 8", reward=None, truncated=True), row(3, 3, False, "#### 9", reward=None),
]  # fmt: skip


def test_figures_of_hand_made_rows():
    found = compute_figures(ROWS, 4, final_number)
    assert found["greedy"] == [1, 1] and found["greedy, strict"] == [1, 0]
    assert found["mean@4"] == [0.5, 0.25]
    assert found["pass@2"] == pytest.approx([1 - 1 / 6, 1 - 3 / 6]) and found["pass@4"] == [1, 1]
    assert found["maj@4"] == [1, 0]  # 5, 6, 5 and none; 8, 8, 9, 2
    assert found["reward r"] == [0.25, 0.0] and found["cut off"] == [0, 0.25]  # of the samples; None is left out
    assert list(found) == [
        "greedy",
        "greedy, strict",
        "mean@4",
        "pass@2",
        "pass@4",
        "maj@4",
        "reward r",
        "length",
        "cut off",
    ]


def test_turns_are_a_figure_where_there_are_some():
    rows = [{**r, "turns": [{}] * (1 + r["sample"])} for r in ROWS]
    found = compute_figures(rows, 4, final_number)
    assert found["turns"] == [3.5, 3.5] and [*found][-3:] == ["turns", "length", "cut off"]
    assert format_figure("turns", {"value": 3.5, "ci_low": 3, "ci_high": 4}) == "3.5 (3 to 4)"


def test_figures_without_samples_are_of_the_greedy_answers():
    found = compute_figures([r for r in ROWS if r["sample"] == 0], 0, final_number)
    assert list(found) == ["greedy", "greedy, strict", "reward r", "length", "cut off"] and found["reward r"] == [
        9.0,
        0.0,
    ]


def test_figures_count_to_a_number_that_is_no_power_of_two():
    rows = [row(0, i, i in (1, 6), "#### 3") for i in range(7)]
    found = compute_figures(rows, 6, None)
    assert [name for name in found if "@" in name] == ["mean@6", "pass@2", "pass@4", "pass@6"]
    assert found["pass@4"] == pytest.approx([1 - math.comb(4, 4) / math.comb(6, 4)])


def test_base_and_policy_are_compared_problem_by_problem():
    rows = [row(i, 0, i < 12, policy="policy", reward=i) for i in range(20)]
    rows += [row(i, 0, i in (2, 15), policy="base", reward=i - 1) for i in range(20)]
    result = summarise(SimpleNamespace(config=RunConfig()), rows, 0)
    assert result["paired"] == {"lost": 1, "won": 11, "p": pytest.approx(2 * 13 / 2**12)}
    assert result["policy"]["greedy"]["value"] == 0.6 and result["base"]["greedy"]["n"] == 20
    assert result["policy"]["greedy"]["ci_low"] == pytest.approx(0.3866, abs=1e-3)  # Wilson
    assert (
        result["difference"]["greedy"]["value"] == pytest.approx(0.5)
        and result["difference"]["reward r"]["ci_low"] == 1.0
    )
    assert result["difference"]["greedy"]["ci_low"] > 0.2
    text = format_table(
        {
            **result,
            "weights": "w",
            "data": {"problems": 20, "path": "p", "split": "test", "left_out": 3},
            "sampling": {"samples": 0},
        }
    )
    assert "greedy          10.0 % (2.8 to 30.1)        60.0 % (38.7 to 78.1)       +50.0 (" in text
    assert "11 problems won and 1 lost against the base model, McNemar's p = 0.0063" in text and "3 more are left out" in text


def test_a_reward_without_a_strict_form_has_one_kind_of_right(tmp_path):
    lenient, strict = make_correctness_and_rewards(RunConfig())[:2]
    told = [scorer.function(completions=["it is 5"], answer=["5"]) for scorer in (lenient, strict)]
    assert told == [[1.0], [0.0]]
    assert [s.name for s in make_correctness_and_rewards(RunConfig(evaluation=EvaluationConfig(reward="think_format")))] == [
        " correct",
        "correct_answer",
    ]


def test_which_problems(tmp_path):
    tokenizer = load_tokenizer("builtin:tiny")

    def of(own, evaluation=None, **given):
        config = RunConfig(data=own, evaluation=evaluation or EvaluationConfig(num_tasks=5))
        return load_problems(
            SimpleNamespace(config=config, tokenizer=tokenizer, folder=None),
            given.get("data"),
            given.get("split"),
            given.get("limit"),
        )

    tasks, what = of(DataConfig())
    assert (
        what
        == {"path": "builtin:word_problems", "split": "test", "problems": 1000, "left_out": 0}
        == {**what, "problems": len(tasks)}
    )
    assert len(of(DataConfig(), limit=3)[0]) == 3
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}?", "answer": str(i)}) + "\n" for i in range(30)))
    held_out, what = of(DataConfig(path=str(file)))
    assert (
        len(held_out) == 5 and what["split"] == "held out of train"
    )  # as many as training held out, whatever is asked
    assert [t.prompt for t in of(DataConfig(path=str(file)), limit=2)[0]] == [t.prompt for t in held_out[:2]]
    assert len(of(DataConfig(), data=str(file))[0]) == 30 and of(DataConfig(), data=str(file))[1]["split"] == "train"
    with pytest.raises(ConfigError, match="name a data set with --data"):
        of(DataConfig(path=str(file)), EvaluationConfig(num_tasks=0))


@pytest.mark.slow
def test_the_command_on_a_run(tiny_run, tmp_path, capsys):
    assert main(["evaluate", str(tiny_run), "--limit", "24", "--samples", "4", "--output", str(tmp_path / "e")]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "e" / "evaluate.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "e" / "completions.jsonl").read_text().splitlines()]
    assert (tmp_path / "e" / "evaluate.txt").read_text() in out
    assert len(rows) == 2 * 24 * 5 and {r["policy"] for r in rows} == {"base", "policy"}
    for policy in ("base", "policy"):
        own = [r for r in rows if r["policy"] == policy]
        assert result[policy]["greedy"]["value"] == sum(r["correct"] for r in own if r["sample"] == 0) / 24
        assert result[policy]["mean@4"]["value"] == pytest.approx(sum(r["correct"] for r in own if r["sample"]) / 96)
    gained = [
        {r["task"] for r in rows if r["policy"] == p and r["sample"] == 0 and r["correct"]} for p in ("base", "policy")
    ]
    assert result["paired"]["won"] == len(gained[1] - gained[0]) and result["paired"]["lost"] == len(
        gained[0] - gained[1]
    )
    assert len({r["text"] for r in rows if r["policy"] == "policy" and r["task"] == 0 and r["sample"]}) > 1


@pytest.mark.slow
def test_two_processes_answer_what_one_does(tiny_run, tmp_path, environment):
    words = ["evaluate", str(tiny_run), "--limit", "9", "--samples", "2", "--output"]
    codes, written = wait_for(start_two_ranks("-c", EVALUATE, *words, tmp_path / "two", environment=environment))
    assert codes == [0, 0], written  # the code 9: they have not left their group, of which NCCL warns
    assert main([*words, str(tmp_path / "one")]) == 0
    one, two = ((tmp_path / name / "completions.jsonl").read_text() for name in ("one", "two"))
    assert one == two and len(one.splitlines()) == 2 * 9 * 3


@pytest.mark.parametrize("arguments, sentence", [
    (["--top-p", "2"], "--top-p is 2.0; it must be above 0 and at most 1"),
    (["--temperature", "0"], "--temperature is 0.0; it must be above 0"),
    (["--samples", "-1"], "'--samples': -1 is not in the range x>=0"),
    (["--data", "nowhere.jsonl"], "data: there is no file nowhere.jsonl"),
    (["--reward", "nope"], "unknown reward 'nope'"),
    (["--output", "/proc/x"], "--output /proc/x cannot be written"),
    (["smapling.x=1"], "unknown key smapling"),
])  # fmt: skip
def test_mistakes(arguments, sentence, capsys):
    assert main(["evaluate", "builtin:tiny", "--limit", "1", "--samples", "0", *arguments]) == 2
    assert sentence in capsys.readouterr().err
