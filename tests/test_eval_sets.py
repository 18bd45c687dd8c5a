"""Several evaluation sets by name: their rows, their names in files, and which of them selects."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_loop import make_run, rows

from grpo_core.batch import Task
from grpo_core.commands import evaluate as evaluate_command
from grpo_core.commands import evaluate_table
from grpo_core.commands.model_card import _describe_accuracy
from grpo_core.config.files import load_overrides
from grpo_core.config.sections import EvaluationConfig, EvaluationSetConfig
from grpo_core.data.eval_sets import describe_set, load_eval_sets
from grpo_core.data.tasks import read_tasks
from grpo_core.model.loading import load_tokenizer
from grpo_core.monitor.run_log import RunLog
from grpo_core.report.eval_sets import merge_sets, split_sets
from grpo_core.report.panels import choose_panels
from grpo_core.report.report import collect_data
from grpo_core.report.run_reader import read_run
from grpo_core.schema import ConfigError
from grpo_core.training.gold_answers import check_gold_answers
from grpo_core.training.job import format_summary
from grpo_core.training.trainer import train

DEV_AND_TEST = EvaluationConfig(
    every=2, num_tasks=3, sets=[EvaluationSetConfig("dev"), EvaluationSetConfig("test")], select="dev"
)


@pytest.fixture
def file(tmp_path):
    """A file of forty rows, and another of five."""
    for name, count in (("rows", 40), ("others", 5)):
        lines = [json.dumps({"question": f"{name} {i}", "answer": str(i)}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def of(*words):
    return load_overrides(words)


def test_long_runs_sets_without_a_source_divide_the_held_out_rows(file):
    sets = "evaluation.sets=[{name: dev, num_tasks: 6}, test]"
    train_rows, parts = load_eval_sets(of(f"data.path={file}", "evaluation.num_tasks=9", sets))
    assert {name: len(part) for name, part in parts.items()} == {"dev": 6, "test": 9}
    numbers = [train_rows.numbers, *(part.numbers for part in parts.values())]
    assert sorted(x for part in numbers for x in part) == list(range(40)) and len(train_rows) == 25
    assert all(part == sorted(part) for part in numbers)
    assert not max(numbers[1]) < min(numbers[2])  # at random, not the first rows and the next ones
    alone, (unnamed,) = (lambda pair: (pair[0], pair[1].values()))(
        load_eval_sets(of(f"data.path={file}", "evaluation.num_tasks=15"))
    )
    assert alone.numbers == train_rows.numbers and sorted(numbers[1] + numbers[2]) == unnamed.numbers


def test_long_runs_a_set_has_a_source_of_its_own(file):
    other = file.with_name("others.jsonl")
    config = of(f"data.path={file}", "evaluation.num_tasks=4", f"evaluation.sets=[dev, {{name: test, path: {other}}}]")
    train_rows, parts = load_eval_sets(config)
    assert len(train_rows) == 36 and [row["question"] for row in parts["test"]] == [f"others {i}" for i in range(4)]
    assert describe_set(config, "dev") == (str(file), "held out of train")
    assert describe_set(config, "test") == (str(other), "the whole file")
    built_in = of("evaluation.sets=[{name: test, split: test, num_tasks: 7}]")
    assert [len(part) for part in load_eval_sets(built_in)[1].values()] == [7]
    assert list(load_eval_sets(of("evaluation.sets=[dev]", "evaluation.num_tasks=0"))[1]) == [""]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["evaluation.sets=[{name: a, split: train}]"], r"evaluation.sets\[0\] \(a\) is builtin:word_problems \(split train\), which is also the training data"),
        (["evaluation.sets=[a, {name: b, split: test}]"], "which is also that of the run's own held-out rows"),
        (["evaluation.sets=[{name: a, split: test}, {name: b, split: test}]"], "which is also the set a"),
        (["evaluation.sets=[{name: a, path: nowhere.jsonl}]"], r"evaluation.sets\[0\] \(a\): data: there is no file nowhere.jsonl"),
        (["evaluation.sets=[{name: a, num_tasks: 1000}, b]"], r"evaluation.sets\[1\] \(b\) gets no rows"),
        (["evaluation.sets=[a, a]"], r"evaluation.sets\[1\].name is 'a', as that of an earlier set"),
        (["evaluation.sets=[a/b]"], r"evaluation.sets\[0\].name is 'a/b'; it must be letters"),
        (["evaluation.sets=[{name: a, num_tasks: 0}]"], r"evaluation.sets\[0\].num_tasks is 0; it must be at least 1"),
        (["evaluation.sets=[{name: a, path: ''}]"], r"evaluation.sets\[0\].path is ''; it must not be empty"),
        (["evaluation.sets=[{name: a, subset: x}]"], r"evaluation.sets\[0\].subset is 'x', but the set has no path"),
        (["evaluation.select=dev"], "evaluation.select is 'dev'; it must be null without evaluation.sets"),
        (["evaluation.sets=[a, b]", "evaluation.select=c"], "evaluation.select is 'c'; it must be one of evaluation.sets: a, b"),
        (["evaluation.sets=[a]", "evaluation.sets[1].num_tasks=3"], r"sets\[1\] does not exist; sets has the items 0 to 0"),
    ],
)  # fmt: skip
def test_long_runs_a_set_that_measures_nothing_new_is_refused(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_eval_sets(of(*words))


def test_long_runs_one_key_of_one_set_can_be_overridden_and_paths_are_beside_the_file(tmp_path, file):
    from grpo_core.config.files import load

    text = "evaluation:\n  sets: [{name: dev}, {name: test, path: others.jsonl}]\n"
    (tmp_path / "c.yaml").write_text(text)
    config = load(tmp_path / "c.yaml", ["evaluation.sets[1].num_tasks=2"])
    assert config.evaluation.sets[1] == EvaluationSetConfig("test", str(tmp_path / "others.jsonl"), num_tasks=2)
    assert config.selecting_set == "dev"


def test_long_runs_an_answer_that_cannot_be_judged_is_counted_in_its_set(file):
    other = file.with_name("others.jsonl")
    other.write_text(json.dumps({"question": "a", "answer": "blue"}))
    config = of(f"data.path={file}", "evaluation.num_tasks=4", f"evaluation.sets=[dev, {{name: test, path: {other}}}]")
    tasks, eval_tasks, *_ = read_tasks(config, load_tokenizer("builtin:tiny"))
    with pytest.raises(ConfigError, match=r"evaluation.reward correct_answer \(set test\) cannot judge 1 of 1 value"):
        check_gold_answers(config, tasks, eval_tasks)


def two_sets_run(folder, evaluation=DEV_AND_TEST, num_steps=3, change=lambda config: config):
    """A run on fakes with the sets dev and test, of three and two tasks."""
    run = make_run(folder, num_steps, change=lambda config: change(replace(config, evaluation=evaluation)))
    sizes = {"dev": 3, "test": 2}
    tasks = [Task(i, "p", [5, 6], {}, eval_set=name) for name, size in sizes.items() for i in range(size)]
    return replace(run, eval_tasks=tasks, held_out=lambda tasks: {"loss": float(len(tasks))})


def test_long_runs_every_set_is_in_every_evaluation_under_its_name(tmp_path, capsys):
    train(two_sets_run(tmp_path))
    evaluations = rows(tmp_path, "evaluation")
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    assert [(row["eval/dev/n"], row["eval/test/n"], row["eval/dev/loss"]) for row in evaluations] == [(3, 2, 3.0)] * 3
    assert "accuracy" not in evaluations[0]
    completions = rows(tmp_path, "evaluation_completions")
    assert [(row["set"], row["task"]) for row in completions[:5]] == [
        *(("dev", i) for i in range(3)),
        ("test", 0),
        ("test", 1),
    ]
    out = capsys.readouterr().out
    assert "evaluation after 2 steps, dev (selects): accuracy" in out
    assert "evaluation after 2 steps, test (reported): accuracy" in out
    summary = format_summary(tmp_path, tmp_path / "adapter", "dev")
    assert "before: dev (selects): accuracy" in summary and "after:  test (reported): accuracy" in summary


def test_long_runs_two_sets_of_one_row_draw_different_noise(tmp_path, monkeypatch):
    seeds = []
    run = two_sets_run(tmp_path, replace(DEV_AND_TEST, temperature=1.0), num_steps=1)
    generate = run.sampler.generate
    monkeypatch.setattr(
        run.sampler,
        "generate",
        lambda tasks, *a, **k: (seeds.extend(t.seed for t in tasks), generate(tasks, *a, **k))[1],
    )
    from grpo_core.training.evaluation import evaluate_now

    evaluate_now(run, 0)
    assert len(set(seeds)) == 5


def test_long_runs_report_and_card_say_which_set_selects(tmp_path):
    train(two_sets_run(tmp_path))
    run = read_run(tmp_path)
    assert run.selecting_set == "dev" and [*run.evaluations] == ["dev", "test"]
    data, _ = collect_data([run])
    summary = data["runs"][0]["summary"]
    assert [name for name in summary if name.startswith("Accuracy")] == [
        "Accuracy before, dev (selects)", "Accuracy after, dev (selects)",
        "Accuracy before, test (reported)", "Accuracy after, test (reported)",
    ]  # fmt: skip
    panels = [(panel.id, names) for panel, names in choose_panels([run]) if panel.kind == "accuracy"]
    assert panels == [("accuracy-dev", ["eval/dev/accuracy"]), ("accuracy-test", ["eval/test/accuracy"])]
    assert {answer["task"] for answer in data["runs"][0]["answers"]} == {
        "dev, 0",
        "dev, 1",
        "dev, 2",
        "test, 0",
        "test, 1",
    }
    card = _describe_accuracy(replace(of(), evaluation=DEV_AND_TEST), tmp_path, run)
    assert "dev (selects): " in card and "test (reported): " in card and "its accuracy is too high" in card


def test_long_runs_without_names_nothing_changes(tmp_path):
    unnamed = {"step": 3, "accuracy": 0.5, "n": 4}
    assert merge_sets({"": {"accuracy": 0.5, "n": 4}}) == {"accuracy": 0.5, "n": 4}
    assert split_sets(unnamed) == {"": unnamed}
    run = replace(
        make_run(tmp_path, num_steps=1, change=lambda c: replace(c, evaluation=EvaluationConfig(num_tasks=2)))
    )
    train(replace(run, eval_tasks=[Task(i, "p", [5, 6], {}) for i in range(2)]))
    assert {"accuracy", "n", "ci_low"} <= rows(tmp_path, "evaluation")[0].keys()
    assert "set" not in rows(tmp_path, "evaluation_completions")[0]
    assert [panel.id for panel, _ in choose_panels([read_run(tmp_path)]) if panel.kind == "accuracy"] == ["accuracy"]
    assert "Accuracy before" in collect_data([read_run(tmp_path)])[0]["runs"][0]["summary"]


def test_long_runs_evaluate_takes_the_set_that_does_not_select(file):
    words = [f"data.path={file}", "evaluation.num_tasks=4", "evaluation.sets=[dev, {name: test, num_tasks: 6}]"]
    opened = SimpleNamespace(config=of(*words), tokenizer=load_tokenizer("builtin:tiny"))
    tasks, what = evaluate_command.load_problems(opened, None, None, None)
    assert len(tasks) == 6 and what["split"] == "held out of train, in part, evaluation set test (reported)"
    tasks, what = evaluate_command.load_problems(opened, None, None, 2, "dev")
    assert len(tasks) == 2 and what["split"].endswith("evaluation set dev (selects)")
    with pytest.raises(ConfigError, match="--set is 'tests'; .*did you mean test"):
        evaluate_command.load_problems(opened, None, None, None, "tests")
    with pytest.raises(ConfigError, match="give one of them"):
        evaluate_command.load_problems(opened, str(file), None, None, "dev")


def test_long_runs_a_tracker_gets_the_names_of_the_sets(tmp_path, monkeypatch):
    sent = []
    log = RunLog(tmp_path, of("evaluation.sets=[dev, test]"), 0, 1)
    tracker = SimpleNamespace(log_numbers=lambda numbers, step: sent.append(numbers))
    with monkeypatch.context() as patch:
        patch.setattr(log.trackers, "_each", lambda work: work(tracker))
        log.trackers.log_evaluation({"eval/dev/accuracy": 0.5}, 0)
        log.trackers.log_evaluation({"accuracy": 0.5}, 0)
    log.close()
    assert sent == [{"eval/dev/accuracy": 0.5}, {"evaluation/accuracy": 0.5}]


def test_attack_2_long_prompts_of_the_evaluation_are_not_counted_as_those_of_the_training(tmp_path):
    from conftest import ROOT

    from grpo_core.commands.dry_run import describe_sizes
    from grpo_core.config.files import load
    from grpo_core.training.prepare import prepare
    from grpo_core.training.setup import describe_tasks

    for name, number in (("train", 2), ("test", 3)):
        rows = [{"question": "7 " * (200 if i < number else 1), "answer": "#### 7"} for i in range(20)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    words = [f"data.path={tmp_path}/train.json", f"data.eval_path={tmp_path}/test.json", "evaluation.num_tasks=20"]
    for treatment, left, sentence, size in (
        ("drop", 18, "3 evaluation prompts are left out, having more than 128 tokens (data.max_prompt_tokens)", "2 more prompts are too long and left out"),
        ("truncate_left", 20, "3 evaluation prompts are cut on the left, having more", "2 of them are too long and cut on the left"),
    ):  # fmt: skip
        config = load(ROOT / "configs" / "tiny.yaml", [*words, f"data.long_prompts={treatment}"])
        prepared = prepare(config)
        assert describe_tasks(config, prepared).startswith(f"{left} tasks (2 ")
        assert [warning for warning in prepared.warnings if warning.startswith(sentence)], prepared.warnings
        assert size in describe_sizes(config, prepared, 1, 16)


@pytest.mark.parametrize("treatment, counts, sentence", [
    ("drop", {"problems": 18, "left_out": 2}, "18 problems of {} (train); 2 more are left out, because the prompt has too many tokens"),
    ("truncate_left", {"problems": 20, "left_out": 0, "cut": 2}, "20 problems of {} (train); 2 of them are cut on the left"),
])  # fmt: skip
def test_attack_2_evaluate_says_what_is_done_with_long_prompts(tmp_path, treatment, counts, sentence):
    file = tmp_path / "test.json"
    file.write_text(json.dumps([{"question": "7 " * (200 if i < 2 else 1), "answer": "#### 7"} for i in range(20)]))
    config = load_overrides([f"data.long_prompts={treatment}", "data.max_prompt_tokens=128"])
    opened = SimpleNamespace(config=config, tokenizer=load_tokenizer("builtin:tiny"), folder=None)
    _, data = evaluate_command.load_problems(opened, str(file), None, None)
    assert {name: data.get(name) for name in counts} == counts
    head = evaluate_table.format_head({"weights": "a", "data": data, "sampling": {"samples": 0}})
    assert any(line.startswith(sentence.format(file)) for line in head), head
