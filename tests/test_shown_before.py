"""What is said before and beside a run: rows that are held out or trained on, rates, lengths, and rewards that fail."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_core.batch import Task
from grpo_core.commands.dry_run import describe_learning_rate, list_failures
from grpo_core.config.files import load
from grpo_core.config.sections import EngineConfig
from grpo_core.data.rows import load_rows
from grpo_core.data.trained_rows import warn_of_trained_rows
from grpo_core.scoring.scoring import Scores
from grpo_core.training.lr_schedule import learning_rate_schedule
from grpo_core.training.prepare import Prepared
from grpo_core.training.task_notes import list_held_out

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
SMALL = ["trainer.completions_per_step=16", "sampling.max_new_tokens=8"]


def write(path, numbers, column="question"):
    path.write_text("".join(json.dumps({column: f"{i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in numbers))
    return path


def prepared(trained, held_out, source="", eval_set=""):
    tasks = [Task(i, "p", [1], {}, source=source) for i in range(trained)]
    return Prepared(None, None, tasks, [Task(i, "p", [1], {}, source=source, eval_set=eval_set) for i in range(held_out)], 0)


def test_how_many_rows_train_and_how_many_are_held_out(tmp_path):
    path = write(tmp_path / "rows.jsonl", range(600))
    config = load(TINY, [f"data.path={path}"])
    sentence = f"of the 600 tasks of {path} the run trains on 100, and 500 are held out for the evaluation (evaluation.num_tasks)"
    assert list_held_out(config, prepared(100, 500)) == [sentence]
    for word in ("data.path=builtin:word_problems", f"data.eval_path={path}", "data.eval_split=train"):
        assert list_held_out(load(TINY, [f"data.path={path}", word]), prepared(100, 500)) == []
    assert list_held_out(config, prepared(100, 0)) == []
    sets = load(TINY, [f"data.path={path}", f"evaluation.sets=[dev, {{name: test, path: {path}}}]"])
    assert list_held_out(sets, prepared(100, 7, eval_set="test")) == [] and "7 are held" in list_held_out(sets, prepared(100, 7, eval_set="dev"))[0]
    mixed = load(TINY, [f"data.sources=[builtin:word_problems, {path}]"])
    (sentence,) = list_held_out(mixed, prepared(100, 7, source="rows", eval_set="rows"))
    assert "of the 107 tasks" in sentence


def test_rows_that_the_run_trains_on_are_counted(tmp_path):
    mine = write(tmp_path / "mine.jsonl", range(40))
    config = load(TINY, [f"data.path={mine}", "evaluation.num_tasks=10"])
    for numbers, begin in ((range(40), "the run trains on the prompts of 30 problems of "), (range(100, 110), None)):
        other = write(tmp_path / "other.jsonl", numbers)
        warning = warn_of_trained_rows(config, load_rows(str(other), None, "train", None))
        assert warning is None if begin is None else warning.startswith(f"{begin}{other}, out of 40 (its data is {mine})")
    renamed = write(tmp_path / "renamed.jsonl", range(40), column="problem")
    columns = load(TINY, [f"data.path={renamed}", "data.columns.question=problem", "evaluation.num_tasks=10"])
    assert "of 30 problems of" in warn_of_trained_rows(columns, load_rows(str(renamed), None, "train", None))
    whole = load(TINY, [f"data.path={mine}", f"data.eval_path={other}"])
    assert warn_of_trained_rows(whole, load_rows(str(mine), None, "train", 5)).startswith(f"the run trains on the prompts of 5 problems of {mine}, out of 5 (")
    mine.unlink()
    assert warn_of_trained_rows(whole, load_rows(str(other), None, "train", None)) is None


@pytest.mark.parametrize("warmup, total, sentence", [
    (2, 2, "the learning rate rises from 0.0005 to 0.001, below engine.learning_rate (0.0015), as engine.warmup_steps is 2"),
    (2, 9, "the learning rate rises from 0.0005 to 0.0015 in optimizer step 3, then follows engine.schedule linear"),
    (0, 9, "the learning rate is 0.0015 and follows engine.schedule linear"),
])  # fmt: skip
def test_the_learning_rates_that_are_said_are_those_of_the_run(warmup, total, sentence):
    engine = EngineConfig(learning_rate=0.0015, warmup_steps=warmup, schedule="linear")
    assert describe_learning_rate(engine, total) == sentence
    rates = [0.0015 * learning_rate_schedule("linear", warmup, total)(step) for step in range(total)]
    assert f"{max(rates):g}" in sentence and f"{rates[0]:g}" in sentence


def test_a_reward_that_fails_on_some_completions_or_is_allowed_to_is_no_mistake():
    scores = Scores(torch.zeros(1, 2), {"a": torch.zeros(1, 2)}, (1.0,), {"a": torch.tensor([[True, True]])}, ("reward a raised X",))
    config = load(TINY, ["evaluation.num_tasks=0"])
    assert list_failures(config, Task(0, "p", [1], {}), ["x", "y"], scores) == ["reward a raised X, on all 2 completions of a group"]
    some = replace(scores, failed={"a": torch.tensor([[True, False]])})
    assert list_failures(config, Task(0, "p", [1], {}), ["x", "y"], some) == []
    allowed = replace(config, trainer=replace(config.trainer, max_failed_rewards=1.0))
    assert list_failures(allowed, Task(0, "p", [1], {}), ["x", "y"], scores) == []


@pytest.mark.slow
@pytest.mark.parametrize("words", [["rewards={}:bad"], ["evaluation.reward={}:bad"]])
def test_a_dry_run_of_a_reward_that_always_fails_ends_with_the_sentence(words, tmp_path, here):
    (tmp_path / "mine.py").write_text("def bad(completions):\n    raise ValueError('no')\n")
    done = here("train", "--config", TINY, "--dry-run", "data.limit=50", f"output_dir={tmp_path}", *SMALL, *(word.format(tmp_path / "mine.py") for word in words))
    assert done.returncode == 2 and "One group, sampled and scored" in done.stdout
    assert "raised ValueError: no (mine.py, line 2), on all 8 completions of a group" in done.stderr
    assert ("evaluation.reward raised" if "evaluation" in words[0] else "reward mine.py:bad raised") in done.stderr


@pytest.mark.slow
def test_an_evaluation_on_the_runs_own_rows_warns_and_sft_says_whole_lengths(tmp_path, here):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"{i} + 1 = ?"}, {"role": "assistant", "content": f"#### {i + 1}"}]}) + "\n" for i in range(24)))
    done = here("sft", "--config", "tiny_sft", f"data.path={path}", "evaluation.num_tasks=4", f"output_dir={tmp_path}", "name=s", "trainer.num_steps=1", "trainer.completions_per_step=4", "trainer.num_minibatches=1")
    assert done.returncode == 0, done.stderr
    assert f"note: of the 24 tasks of {path} the run trains on 20, and 4 are held out for the evaluation (evaluation.num_tasks)\n" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "4 conversations of up to " in line)
    whole, part = (int(word) for word in line.split("of up to ")[1].replace("tokens, up to ", "").split(" of them from the assistant's first turn on,")[0].split())
    assert 3 < part < whole
    done = here("evaluate", tmp_path / "s", "--data", path, "--samples", "0", "--no-base")
    assert done.returncode == 0, done.stderr
    assert f"warning: the run trains on the prompts of 20 problems of {path}, out of 24 (" in done.stdout
