"""Several sources: they are mixed by a function of (seed, step), and each has its own template, rewards and evaluation."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from fakes import Alphabet

from grpo_core.batch import Task
from grpo_core.config.files import dump, load, load_overrides
from grpo_core.config.sections import (
    CurriculumConfig,
    DataConfig,
    EvaluationConfig,
    RewardConfig,
    RunConfig,
    SourceConfig,
)
from grpo_core.data import mixture
from grpo_core.data.mixture import Mixture
from grpo_core.data.pass_rates import PassRates
from grpo_core.data.stream import TaskStream
from grpo_core.data.tasks import read_tasks
from grpo_core.random_keys import make_generator
from grpo_core.schema import ConfigError
from grpo_core.scoring.scoring import Reward, score
from grpo_core.scoring.sources import score_by_source
from grpo_core.training.difficulty import note_outcomes
from grpo_core.training.prepare import make_eval_rewards, make_rewards

RESTS = CurriculumConfig(rest_after=1, prefer=[0.2, 0.8])
WEIGHTS = {"a": 3.0, "b": 1.0, "c": 0.5}


def make_tasks(sizes=(10, 4, 3)):
    return [Task(i, "p", [1], {}, source=name) for name, size in zip(WEIGHTS, sizes, strict=True) for i in range(size)]


def make_stream(per_step=8, seed=0, rank=0, world_size=1, **options):
    return TaskStream(make_tasks(), per_step, seed, rank, world_size, weights=WEIGHTS, **options)


def name_all(tasks):
    return [(task.source, task.index) for task in tasks]


# --- the mixture ---------------------------------------------------------------------------------------------------


def test_a_source_has_its_share_of_every_step_and_the_sources_are_a_function_of_seed_and_step():
    mixture, shares = Mixture([3, 1, 0.5], 8, seed=2), np.array([3, 1, 0.5]) / 4.5
    drawn = [mixture.draw(step) for step in range(400)]
    counts = np.stack([np.bincount(sources, minlength=3) for sources in drawn])
    assert (counts >= np.floor(8 * shares)).all() and (counts <= np.ceil(8 * shares)).all()
    assert np.abs(counts.mean(axis=0) - 8 * shares).max() < 0.05
    assert all(np.array_equal(Mixture([3, 1, 0.5], 8, seed=2).draw(step), drawn[step]) for step in (399, 7, 0))
    assert any(not np.array_equal(Mixture([3, 1, 0.5], 8, seed=3).draw(step), drawn[step]) for step in range(3))
    before = np.concatenate([np.zeros((1, 3), dtype=int), np.cumsum(counts, axis=0)])
    for step in (0, 7, 399):
        assert Mixture([3, 1, 0.5], 8, seed=2).count(step) == (before[step].tolist(), counts[step].tolist())
    first = np.stack(drawn)[:, :4]  # positions, and so ranks, are random
    assert abs((first == 0).mean() - shares[0]) < 0.03


def test_the_prompts_before_a_late_step_are_counted_at_once_and_as_one_by_one(monkeypatch):
    late = Mixture([3, 1, 0.5], 8, seed=2)
    drawn = []
    monkeypatch.setattr(mixture, "make_generator", lambda key: drawn.append(key) or make_generator(key))
    before, here = late.count(100_000)
    assert len(drawn) == 1 and sum(before) == 800_000 and sum(here) == 8
    assert np.allclose(np.array(before) / 800_000, np.array([3, 1, 0.5]) / 4.5, rtol=0, atol=1e-3)
    early = Mixture([3, 1, 0.5], 8, seed=2)  # which draws the offsets again, more of them each time
    assert [early.count(step) for step in (0, 1500, 1, 9000)] == [late.count(step) for step in (0, 1500, 1, 9000)]


def test_a_source_whose_share_is_no_whole_prompt_has_some_in_some_steps():
    thin = Mixture([1000, 1, 1], 8, seed=0)
    before, _ = thin.count(50_000)
    assert before[1] == pytest.approx(50_000 * 8 / 1002, rel=0.15) and before[2] == pytest.approx(50_000 * 8 / 1002, rel=0.15)
    assert all(min(thin.count(step)[1]) >= 0 for step in range(2000))



def test_the_counts_before_a_step_are_the_sums_of_those_in_the_steps():
    mixture = Mixture([3, 1, 0.5], 8, seed=2)
    inside = [mixture.count(step)[1] for step in range(9)]
    for step in (8, 0, 5):  # in any order
        assert mixture.count(step)[0] == np.sum(inside[:step], axis=0, dtype=int).reshape(-1).tolist() or step == 0
    assert mixture.count(0)[0] == [0, 0, 0]


def test_every_source_has_epochs_of_its_own_and_ranks_share_a_step():
    stream = make_stream()
    steps = [stream.batch(step) for step in range(40)]
    for name, size in zip(WEIGHTS, (10, 4, 3), strict=True):
        order = [task.index for tasks in steps for task in tasks if task.source == name]
        epochs = [order[place : place + size] for place in range(0, len(order) - size, size)]
        assert all(sorted(epoch) == [*range(size)] for epoch in epochs) and len(epochs) > 5
        assert len({tuple(epoch) for epoch in epochs}) > 1
    alike = [Task(i, "p", [1], {}, source=name) for name in "ab" for i in range(12)]
    two = TaskStream(alike, 8, 0, weights={"a": 1.0, "b": 1.0})
    orders = [[task.index for step in range(3) for task in two.batch(step) if task.source == name] for name in "ab"]
    assert orders[0] != orders[1]  # of two sources of one size
    again = make_stream()
    assert [again.batch(step) for step in (39, 0, 17)] == [steps[step] for step in (39, 0, 17)]
    parts = [make_stream(rank=rank, world_size=2) for rank in range(2)]
    assert all(parts[0].batch(step) + parts[1].batch(step) == steps[step] for step in (0, 1, 17))
    assert len({task.seed for tasks in steps for task in tasks}) == 40 * 8


def test_a_prompt_is_replaced_by_one_of_its_source():
    stream = make_stream()
    for step in range(6):
        drawn = [stream.batch(step), stream.replacements(step, 1), stream.replacements(step, 2)]
        assert [task.source for task in drawn[0]] == [task.source for task in drawn[1]] == [task.source for task in drawn[2]]
        assert name_all(drawn[1]) != name_all(drawn[2])
    seeds = [task.seed for step in range(6) for part in (stream.batch(step), stream.replacements(step, 1)) for task in part]
    assert len(set(seeds)) == len(seeds)


def test_a_curriculum_goes_on_from_its_pass_rates_in_every_source():
    def take_steps(stream, rates, steps):
        drawn = []
        for step in steps:
            tasks = stream.batch(step)
            drawn.append(name_all(tasks))
            rates.note(tasks, [(task.index + step) % 5 for task in tasks], [4] * len(tasks))
            stream.end_step(step, rates.end_step())
        return drawn

    def make(curriculum=RESTS):
        rates = PassRates(make_tasks())
        return make_stream(rates=rates, curriculum=curriculum), rates

    whole = take_steps(*make(), range(20))
    cut, rates = make()
    first = take_steps(cut, rates, range(9))
    resumed, loaded = make()
    loaded.load(rates.tensors())
    assert first + take_steps(resumed, loaded, range(9, 20)) == whole != take_steps(*make(CurriculumConfig()), range(20))
    assert [[source for source, _ in step] for step in whole] == [[task.source for task in make_stream().batch(step)] for step in range(20)]
    assert 0 < resumed.count_awake() < 17


def test_a_source_rests_by_its_own_outcomes_and_once():
    rates = PassRates(make_tasks())
    stream = make_stream(rates=rates, curriculum=CurriculumConfig(rest_after=1, rest_epochs=4))
    tasks = stream.batch(0)
    rates.note(tasks, [4 * (task.source == "b") for task in tasks], [4] * len(tasks))
    stream.end_step(0, rates.end_step())
    places = {(task.source, task.index): place for place, task in enumerate(make_tasks())}
    due = {name_all([task])[0]: int(rates.due[places[task.source, task.index]]) for task in tasks}
    assert set(due.values()) == {1, 5} and all((epoch == 5) == (source == "b") for (source, _), epoch in due.items())


# --- rewards -------------------------------------------------------------------------------------------------------


def count_letters(completions):
    return [float(len(text)) for text in completions]


def read_row(completions, row):
    return [float(number) for number in row]


SCORED = [Task(0, "p", [1], {"row": 5}, source="a"), Task(1, "p", [1], {}, source="b"), Task(2, "p", [1], {"row": 7}, source="a")]
TEXTS = ["x", "xx", "xxx", "xxxx", "x", "x"]


def test_a_reward_sees_the_completions_of_its_sources_only():
    rewards = [Reward("length", 1.0, count_letters), Reward("row", 10.0, read_row, sources=("a",)), Reward("none", 1.0, count_letters, sources=("c",))]
    scores = score_by_source(rewards, SCORED, TEXTS, 2)
    nan = math.nan
    want = {"length": [[1, 2], [3, 4], [1, 1]], "row": [[5, 5], [nan, nan], [7, 7]], "none": [[nan, nan]] * 3}
    for name, values in want.items():
        torch.testing.assert_close(scores.by_name[name], torch.tensor(values, dtype=torch.float32), equal_nan=True)
    torch.testing.assert_close(scores.rewards, torch.tensor([[51.0, 52], [3, 4], [71, 71]]))
    assert [*scores.by_name] == ["length", "row", "none"] and scores.weights == (1.0, 10.0, 1.0)
    assert scores.failures == () and not any(failed.any() for failed in scores.failed.values())


def test_two_sources_may_give_one_reward_other_arguments_and_weights():
    rewards = [Reward("same", 0.0, count_letters, sources=("a",)), Reward("same", 2.0, lambda completions: [1.0] * len(completions), sources=("b",))]
    scores = score_by_source(rewards, SCORED, TEXTS, 2)
    torch.testing.assert_close(scores.by_name["same"], torch.tensor([[1.0, 2], [1, 1], [1, 1]]))
    torch.testing.assert_close(scores.rewards, torch.tensor([[math.nan, math.nan], [2, 2], [math.nan, math.nan]]), equal_nan=True)
    assert scores.weights == (2.0,)


def test_a_reward_that_fails_in_one_source_has_failed_there():
    def fails(completions):
        raise ValueError("no")

    scores = score_by_source([Reward("length", 1.0, count_letters), Reward("bad", 1.0, fails, sources=("b",))], SCORED, TEXTS, 2)
    assert scores.failed["bad"].tolist() == [[False, False], [True, True], [False, False]]
    assert len(scores.failures) == 1 and "reward bad raised ValueError: no" in scores.failures[0]


def test_without_a_binding_it_is_the_plain_score():
    tasks = [replace(task, columns={"row": 1}) for task in SCORED]
    one, other = (function([Reward("length", 1.0, count_letters)], tasks, TEXTS, 2) for function in (score, score_by_source))
    assert torch.equal(one.rewards, other.rewards) and one.weights == other.weights


# --- configuration -------------------------------------------------------------------------------------------------

TWO = DataConfig(
    template="Q {question}",
    sources=[
        SourceConfig("builtin:word_problems", weight=2.0),
        SourceConfig("d/sums.jsonl", template="S {question}", rewards=[RewardConfig("text_match")], eval_reward="text_match"),
    ],
)


def test_of_a_source_is_the_run_with_that_data_alone():
    config = RunConfig(data=TWO)
    assert config.source_names == ["word_problems", "sums"] and config.selecting_set == "word_problems"
    first, second = (config.of_source(name) for name in config.source_names)
    assert (first.data.template, first.rewards, first.evaluation.reward) == ("Q {question}", config.rewards, "correct_answer")
    assert (second.data.template, second.evaluation.reward) == ("S {question}", "text_match") and second.data.sources == []
    assert [reward.name for reward in second.rewards] == ["text_match"]
    assert [reward.name for reward in config.all_rewards] == ["correct_answer", "text_match"]
    assert RunConfig().of_source("") == RunConfig() and RunConfig().source_names == [""]
    bound = [(reward.name, reward.sources) for reward in make_rewards(config)]
    assert bound == [("correct_answer", ("word_problems",)), ("text_match", ("sums",))]
    assert [(reward.name, reward.sources) for reward in make_rewards(RunConfig())] == [("correct_answer", ())]
    own = replace(TWO, sources=[replace(TWO.sources[0], rewards=[RewardConfig("choice_match")]), TWO.sources[1]])
    bound = [(reward.name, reward.sources) for reward in make_rewards(RunConfig(data=own))]
    assert bound == [("choice_match", ("word_problems",)), ("text_match", ("sums",))]  # and the run's is not used
    assert [reward.name for reward in RunConfig(data=own).all_rewards] == ["choice_match", "text_match"]
    assert [function.func.__name__ for function in make_eval_rewards(config).values()] == ["correct_answer", "text_match"]


def test_outcomes_are_measured_by_the_evaluation_reward_of_the_source():
    tasks = [Task(0, "p", [1], {}, source="word_problems", seed=(0,)), Task(0, "p", [1], {}, source="sums", seed=(1,))]
    run = type("Run", (), {"config": RunConfig(data=TWO), "pass_rates": PassRates(tasks)})()
    values = {"correct_answer": [[1.0, 0.0], [math.nan] * 2], "text_match": [[math.nan] * 2, [1.0, 1.0]]}
    scores = score([Reward("length", 1.0, count_letters)], tasks, TEXTS[:4], 2)
    note_outcomes(run, tasks, replace(scores, by_name={name: torch.tensor(x) for name, x in values.items()}))
    run.pass_rates.end_step()
    assert run.pass_rates.passed.tolist() == [1, 2] and run.pass_rates.judged.tolist() == [2, 2]


def test_files_of_a_source_are_looked_for_beside_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d" / "sums.jsonl").write_text("{}")
    (tmp_path / "d" / "mine.py").write_text("def f(completions):\n    return [1.0] * len(completions)\n")
    source = {"path": "sums.jsonl", "eval_path": "sums.jsonl", "rewards": "mine.py:f", "eval_reward": "mine.py:f"}
    (tmp_path / "d" / "c.yaml").write_text(yaml.dump({"data": {"sources": [source, "builtin:word_problems"]}}))
    config = load("d/c.yaml", ["data.sources[0].weight=2"])
    first, second = config.data.sources
    assert (first.path, first.eval_path, first.weight) == ("d/sums.jsonl", "d/sums.jsonl", 2.0)
    assert (first.rewards[0].name, first.eval_reward) == ("d/mine.py:f", "d/mine.py:f") and second.name == "word_problems"
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load("again.yaml") == config


@pytest.mark.parametrize(
    "sources, more, message",
    [
        ("[{path: a.jsonl}, {path: b/a.jsonl}]", [], r"data.sources\[1\].name is 'a', as that of an earlier source"),
        ("[{path: a.jsonl, name: 'x y'}]", [], r"data.sources\[0\].name is 'x y'; it must be letters"),
        ("[{path: a.jsonl, weight: 0}]", [], r"data.sources\[0\].weight is 0.0; it must be above 0"),
        ("[{path: a.jsonl, limit: 0}]", [], r"data.sources\[0\].limit is 0; it must be at least 1"),
        ("[{path: a.jsonl, split: ''}]", [], r"data.sources\[0\].split is ''; it must not be empty"),
        ("[{weight: 1}]", [], r"data.sources\[0\].path is missing"),
        ("[{path: a.jsonl, temlate: x}]", [], r"unknown key data.sources\[0\].temlate"),
        ("[{path: a.jsonl, eval_reward: nothing}]", [], "reward 'nothing'|reward nothing"),
        ("[{path: a.jsonl, rewards: [{name: text_match, args: {x: 1}}]}]", [], r"unknown key data.sources\[0\].rewards\[0\].args.x"),
        ("[{path: a.jsonl, rewards: [{name: text_match, weight: 0}]}]", [], r"data.sources\[0\].rewards: every weight is 0"),
        ("[{path: a.jsonl, rewards: [text_match, text_match]}]", [], r"data.sources\[0\].rewards must name .* none of them twice"),
        ("[{path: a.jsonl}]", ["evaluation.sets=[{name: x}]"], "evaluation.sets and data.sources are both set"),
        ("[{path: a.jsonl}]", ["evaluation.select=b"], "evaluation.select is 'b'; it must be one of data.sources: a"),
        ("[{path: a.jsonl}, {path: b.jsonl, rewards: [{name: correct_answer, weight: 2}]}]", ["advantage.name=gdpo"], "advantage gdpo reads one weight"),
        ("[{path: a.jsonl, rewards: [text_match]}]", ["data.curriculum.rest_after=1"], "among the rewards of the source a"),
    ],
)  # fmt: skip
def test_mistakes(sources, more, message):
    with pytest.raises(ConfigError, match=message):
        load_overrides([f"data.sources={sources}", *more])


def write_rows(path, count):
    path.write_text("".join(json.dumps({"question": "abc"[: i % 3 + 1], "answer": f"#### {i}"}) + "\n" for i in range(count)))
    return str(path)


def test_tasks_of_sources_have_their_names_templates_and_held_out_rows(tmp_path):
    one, two = write_rows(tmp_path / "one.jsonl", 20), write_rows(tmp_path / "two.jsonl", 9)
    sources = [SourceConfig(one), SourceConfig(two, template="b{question}", limit=8)]
    config = RunConfig(data=DataConfig(template="a{question}", sources=sources), evaluation=EvaluationConfig(num_tasks=3))
    tasks, eval_tasks, too_long, _ = read_tasks(config, Alphabet())
    assert [task.source for task in tasks] == ["one"] * 17 + ["two"] * 5 and too_long == (0, 0)
    assert [task.eval_set for task in eval_tasks] == ["one"] * 3 + ["two"] * 3 == [task.source for task in eval_tasks]
    assert {(task.source, task.prompt[0]) for task in (*tasks, *eval_tasks)} == {("one", "a"), ("two", "b")}
    with pytest.raises(ConfigError, match=r"data.sources\[1\] \(two\): data.template uses \{no\}"):
        read_tasks(replace(config, data=replace(config.data, sources=[sources[0], replace(sources[1], template="{no}")])), Alphabet())
    leaks = replace(config, data=replace(config.data, sources=[sources[0], replace(sources[1], eval_path=one)]))
    with pytest.raises(ConfigError, match=r"data.sources\[1\] \(two\) is evaluated on .*one.jsonl \(split train\), which the source one is trained on"):
        read_tasks(leaks, Alphabet())


# --- a run ---------------------------------------------------------------------------------------------------------


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_with_two_sources_and_the_commands_after_it(tmp_path, here):
    rows = tmp_path / "sums.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"Add {i} and 2.", "answer": f"#### {i + 2}"}) + "\n" for i in range(30)))
    sources = (
        f"[{{path: builtin:word_problems, weight: 3}}, {{path: {rows}, columns: {{question: problem}}, template: 'Sum: {{question}}', "
        f"rewards: [has_think_tags, text_match], eval_reward: text_match}}]"
    )
    words = [
        f"output_dir={tmp_path}/runs", f"data.sources={sources}", "trainer.num_steps=2", "trainer.completions_per_step=64", "evaluation.num_tasks=4",
        "sampling.max_new_tokens=8", "data.limit=100", "data.curriculum.rest_after=1", "checkpoint.every=1", "checkpoint.keep_best=true",
    ]  # fmt: skip
    dry = here("launch", "--dry-run", "--config", "configs/tiny.yaml", *words)
    assert dry.returncode == 0 and "4 in word_problems (selects), 4 in sums (reported)" in dry.stdout, dry.stderr
    done = here("train", "--config", "configs/tiny.yaml", *words)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny"
    metrics, completions, (first, *_) = (read(folder / f"{kind}.jsonl") for kind in ("metrics", "completions", "evaluation"))
    assert {row["source"] for row in completions} == {"word_problems", "sums"}
    for row in metrics:
        own = {name: [x for x in completions if x["step"] == row["step"] and x["source"] == name] for name in ("word_problems", "sums")}
        for name, part in own.items():
            assert row[f"source/{name}/reward"] == pytest.approx(sum(x["reward"] for x in part) / len(part), abs=1e-6)
            assert row[f"source/{name}/prompts"] == len(part) / 64
            assert row[f"source/{name}/length"] == pytest.approx(sum(x["length"] for x in part) / len(part))
    assert all((row["rewards"]["text_match"] is None) == (row["source"] == "word_problems") for row in completions)
    assert all(row["prompt"].startswith("Sum: Add" if row["source"] == "sums" else "Question: ") for row in completions)
    assert first["eval/word_problems/n"] == first["eval/sums/n"] == 4
    again = here("train", f"resume={folder}", "trainer.num_steps=3")
    assert again.returncode == 0 and "after 2 steps" in again.stdout, again.stderr
    answered = here("evaluate", folder, "--set", "sums", "--samples", 0)
    assert answered.returncode == 0 and json.loads((folder / "evaluate" / "evaluate.json").read_text())["data"]["path"] == str(rows), answered.stderr
    assert here("evaluate", folder, "--set", "no").returncode == 2
    assert here("export", folder).returncode == 0
    card = (folder / "export" / "README.md").read_text()
    assert "source sums, weight 1" in card and "sums (reported)" in card
    assert here("report", folder).returncode == 0
    assert here("sample", folder, "What is 1 + 1?", "--samples", 2).returncode == 0
    tuned = here("sft", "--config", "configs/tiny.yaml", *words, "name=sft", "sft.targets=['{answer}']", "trainer.completions_per_step=8")
    assert tuned.returncode == 0 and set(read(tmp_path / "runs/sft/evaluation.jsonl")[0]) >= {"eval/sums/loss", "eval/word_problems/loss"}, tuned.stderr
