"""The best checkpoint and early stopping: which checkpoint is kept, when a run ends, and what a resumed run does."""

import json
from dataclasses import replace

import pytest
from test_eval_sets import two_sets_run
from test_loop import make_run, rows

from grpo_core.batch import Task
from grpo_core.commands.model_card import _describe_accuracy, _describe_training
from grpo_core.commands.open_policy import open_source
from grpo_core.config.files import load_overrides
from grpo_core.config.sections import CheckpointConfig, EvaluationConfig, EvaluationSetConfig, RunConfig
from grpo_core.counts import quantify
from grpo_core.distributed import signals
from grpo_core.report.run_reader import read_run
from grpo_core.schema import ConfigError
from grpo_core.training import checkpoint
from grpo_core.training.job import describe_best
from grpo_core.training.resume import RunStart, check_num_steps, restore_run
from grpo_core.training.selection import Selection
from grpo_core.training.trainer import train

NUM_TASKS = 10


def judge(correct):
    """A reward that finds correct[s] of the tasks right in the evaluation after s steps, whichever call it is."""

    def reward(completions, step):
        return [float(i < correct[s]) for i, s in enumerate(step)]

    return reward


def judged_run(folder, correct, num_steps, start_step=0, every=0, keep=1, best=True, early=0, delta=0.0):
    """A run on fakes that evaluates after every step, with the given numbers of correct tasks."""

    def change(config):
        trainer = replace(config.trainer, early_stopping=early, early_stopping_delta=delta)
        evaluation = EvaluationConfig(every=1, num_tasks=NUM_TASKS)
        return replace(config, trainer=trainer, evaluation=evaluation, checkpoint=CheckpointConfig(every, keep, best))

    run = make_run(folder, num_steps, change=change)
    run.selection.restore(None, run.config)
    tasks = [Task(i, "p", [5, 6], {"step": 0}) for i in range(NUM_TASKS)]
    steps = [*range(start_step, num_steps + 1)]

    def reward(completions, step):
        return judge(correct)(completions, [steps.pop(0)] * len(completions))

    return replace(run, start_step=start_step, eval_tasks=tasks, eval_reward=reward)


def names(folder):
    return [path.name for path in checkpoint.list_checkpoints(folder / "checkpoints")]


def best(folder):
    return checkpoint.find_best_step(folder / "checkpoints")


@pytest.mark.parametrize(
    "correct, step",
    [([1, 3, 5, 2, 4], 2), ([1, 5, 5, 5, 2], 1), ([4, 1, 2, 3, 4], 0), ([0, 0, 0, 0, 1], 4)],
)
def test_long_runs_the_best_checkpoint_is_kept_beside_the_newest_and_ties_keep_the_earlier(tmp_path, correct, step):
    run = judged_run(tmp_path, correct, 4, keep=1)
    train(run)
    assert best(tmp_path) == step and names(tmp_path) == [f"step-{s:06d}" for s in sorted({step, 4})]
    assert (tmp_path / "checkpoints" / "best" / "meta.json").exists()
    assert checkpoint.read_steps(tmp_path / "checkpoints" / "best") == step
    assert describe_best(run) == (
        f"best:   accuracy {correct[step] / 10:.1%} after {quantify(step, 'step')}: {tmp_path}/checkpoints/best\n"
    )


def test_long_runs_the_best_is_outside_of_the_rotation(tmp_path):
    train(judged_run(tmp_path, [1, 5, 2, 2, 2, 2], 5, every=1, keep=2))
    assert names(tmp_path) == ["step-000001", "step-000004", "step-000005"]


def test_long_runs_without_keep_best_no_checkpoint_is_added(tmp_path):
    run = judged_run(tmp_path, [1, 5, 2, 2], 3, best=False)
    train(run)
    assert names(tmp_path) == ["step-000003"] and not (tmp_path / "checkpoints" / "best").is_symlink()
    assert describe_best(run) == ""


def test_long_runs_the_set_that_selects_chooses_the_best(tmp_path):
    for select, step in (("dev", 1), ("test", 2)):
        evaluation = EvaluationConfig(every=1, num_tasks=3, sets=[EvaluationSetConfig("dev"), EvaluationSetConfig("test")], select=select)  # fmt: skip
        folder, calls = tmp_path / select, []
        run = two_sets_run(
            folder, evaluation, 2, lambda config: replace(config, checkpoint=CheckpointConfig(0, 1, True))
        )
        correct = {"dev": [0, 3, 0], "test": [0, 0, 2]}

        def reward(completions, calls=calls, correct=correct):
            calls.append(len(completions))
            name = "dev" if len(completions) == 3 else "test"
            return [float(i < correct[name][calls.count(len(completions)) - 1]) for i in range(len(completions))]

        train(replace(run, eval_reward=reward))
        assert best(folder) == step


def test_long_runs_a_run_resumed_keeps_the_same_best_and_stops_at_the_same_step(tmp_path, monkeypatch):
    correct = [1, 3, 3, 2, 3, 1, 9, 9, 9]
    whole = judged_run(tmp_path / "whole", correct, 8, early=4)
    train(whole)
    assert len(rows(tmp_path / "whole")) == 5 and best(tmp_path / "whole") == 1
    for stop in (1, 2, 3, 4, 5):
        folder, steps = tmp_path / str(stop), []
        interrupted = judged_run(folder, correct, 8, early=4)
        if stop < 5:
            monkeypatch.setattr(
                signals, "received_signal", lambda steps=steps, stop=stop: steps.append(0) or 15 * (len(steps) == 2 + stop)
            )  # 2 before the loop
            with pytest.raises(signals.Interrupted):
                train(interrupted)
            monkeypatch.undo()
        else:
            train(interrupted)
        newest = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
        assert checkpoint.read_steps(newest) == stop
        state = json.loads((newest / "meta.json").read_text())["selection"]
        seen = [row["step"] for row in rows(folder, "evaluation")]
        assert seen == [*range(stop if stop < 5 else 6)]  # the interrupt prevents the last one
        file = folder / "evaluation.jsonl"
        text = file.read_text()
        resumed = judged_run(folder, correct, 8, start_step=stop, early=4)
        file.write_text(text)  # the log of a run on fakes begins anew
        resumed.selection.restore(state, resumed.config)
        train(resumed)
        assert [row["step"] for row in rows(folder, "evaluation")] == [0, 1, 2, 3, 4, 5]
        assert best(folder) == 1 and names(folder) == names(tmp_path / "whole") == ["step-000001", "step-000005"]
        assert resumed.selection == whole.selection


@pytest.mark.parametrize(
    "correct, delta, steps",
    [([1, 2, 3, 3, 3], 0.0, 4), ([3, 2, 1, 9, 9], 0.0, 2), ([1, 2, 3, 4, 5], 0.1, 4), ([1, 2, 3, 4, 5], 0.15, 4), ([1, 2, 2, 3, 9], 0.25, 2), ([5, 5, 5, 5, 5], 0.0, 2)],
)  # fmt: skip
def test_long_runs_early_stopping_counts_evaluations_without_an_improvement(tmp_path, capsys, correct, delta, steps):
    train(judged_run(tmp_path, correct, 4, best=False, early=2, delta=delta))
    assert len(rows(tmp_path)) == steps and names(tmp_path) == [f"step-{steps:06d}"]
    out = capsys.readouterr().out
    assert ("early stopping: the accuracy has not risen" in out) == (steps < 4)
    if steps < 4:
        assert f"in 2 evaluations (trainer.early_stopping); the run ends after {steps} of 4 steps" in out


def test_long_runs_an_accuracy_is_counted_once_and_rounding_does_not_hide_an_improvement():
    selection = Selection()
    for step, accuracy in enumerate((0.15, 0.25, 0.35)):  # 0.35 - 0.25 is below 0.1 in floating point
        for _ in range(2):
            selection.record(step, accuracy, 0.1)
    assert (selection.stale, selection.best_step, selection.last_step) == (0, 2, 2)
    config = RunConfig()
    other = Selection()
    other.restore({**selection.state(), "measure": "text_match"}, config)
    assert other.best_step is None and other.measure == "correct_answer"
    other.restore({**selection.state(), "measure": "correct_answer"}, config)
    assert other.best_step == 2
    other.restore(None, config)  # a checkpoint that is older than the key


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["checkpoint.keep_best=true", "evaluation.num_tasks=0"], "checkpoint.keep_best is true, but evaluation.num_tasks is 0"),
        (["trainer.early_stopping=2"], "trainer.early_stopping is 2, but evaluation.every is 0"),
        (["trainer.early_stopping=2", "evaluation.every=1", "evaluation.num_tasks=0"], "but evaluation.num_tasks is 0"),
        (["trainer.early_stopping=-1"], "trainer.early_stopping is -1; it must be at least 0"),
        (["trainer.early_stopping_delta=-0.1"], "trainer.early_stopping_delta is -0.1; it must be at least 0"),
        (["trainer.early_stopping_delta=5"], "trainer.early_stopping_delta is 5; it is a rise of the accuracy"),
    ],
)  # fmt: skip
def test_long_runs_what_cannot_select_is_refused(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_overrides(words)


def test_long_runs_a_best_checkpoint_of_a_course_that_was_left_is_removed_with_its_link(tmp_path):
    run = judged_run(tmp_path, [0] * 9, 8)
    run.selection.best_step = 6
    assert checkpoint.save(run, 6, run.control) and best(tmp_path) == 6
    run.selection.best_step = None  # resumed from an older checkpoint
    assert checkpoint.save(run, 4, run.control)
    assert names(tmp_path) == ["step-000004"] and not (tmp_path / "checkpoints" / "best").is_symlink()


def test_long_runs_a_best_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    run = judged_run(tmp_path, [1, 2, 0], 2)
    run.selection.best_step = 1
    assert checkpoint.save(run, 1, run.control)

    def full(*args):
        raise OSError(28, "No space left on device")

    run.selection.best_step = 2
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        assert not checkpoint.save(run, 2, run.control)
    assert best(tmp_path) == 1 and "whose checkpoint could not be kept" in describe_best(run)
    assert checkpoint.save(run, 3, run.control) and names(tmp_path) == ["step-000001", "step-000003"]


def test_long_runs_a_checkpoint_before_the_first_step_has_not_finished_its_schedule(tmp_path):
    meta = {"next_step": 0, "engine": {"schedule": {"_last_lr": [0.0]}}}  # of the warm-up
    check_num_steps(RunStart(tmp_path, tmp_path / "step-000000", meta, [], []), 4)
    with pytest.raises(ConfigError, match="has finished its 3 steps"):
        check_num_steps(RunStart(tmp_path, tmp_path / "step-000003", {**meta, "next_step": 3}, [], []), 4)


def test_long_runs_the_card_of_a_checkpoint_has_the_accuracy_of_its_step(tmp_path):
    train(judged_run(tmp_path, [1, 5, 2, 2], 3))
    run, config = read_run(tmp_path), RunConfig()
    assert "- after (1 step): accuracy 50.0%" in _describe_accuracy(config, tmp_path, run, 1)
    assert "- after (3 steps): accuracy 20.0%" in _describe_accuracy(config, tmp_path, run)
    assert "- steps: 1 (a checkpoint of a run of 3) of" in _describe_training(config, run, 1)


def test_long_runs_a_missing_best_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path / "config.yaml").write_text("name: a\n")
    with pytest.raises(ConfigError, match="has kept no best checkpoint; set checkpoint.keep_best to true"):
        open_source(str(tmp_path / "checkpoints" / "best"))


SMALL = [
    "trainer.completions_per_step=16", "sampling.max_new_tokens=12", "evaluation.num_tasks=12", "evaluation.every=1",
    "checkpoint.keep_best=true", "checkpoint.keep=1", "checkpoint.every=2", "engine.schedule=constant", "engine.warmup_steps=0",
    "evaluation.sets=[dev, test]", "trainer.early_stopping=9",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.soak
def test_long_runs_a_real_run_that_was_resumed_is_bitwise_that_of_one_piece(here, tmp_path):
    def files(name):
        folder = tmp_path / name
        metrics = [{k: row[k] for k in ("step", "reward", "loss", "grad_norm")} for row in rows(folder)]
        step = best(folder)
        return (
            metrics,
            rows(folder, "evaluation"),
            (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
            step,
            names(folder),
        )

    for name, ends in (("whole", [4]), ("parts", [1, 4])):
        for end in ends:
            words = [f"output_dir={tmp_path}", f"name={name}", f"trainer.num_steps={end}"]
            resume = ["resume=auto"] if end != ends[0] else []
            done = here("train", "--config", "configs/tiny.yaml", *SMALL, *words, *resume)
            assert done.returncode == 0, done.stderr
    assert files("whole") == files("parts")
    assert "dev (selects)" in done.stdout and "best:   accuracy" in done.stdout
    opened = open_source(str(tmp_path / "whole" / "checkpoints" / "best"))
    assert opened.steps == best(tmp_path / "whole") and opened.weights.endswith(f"step-{opened.steps:06d}")


def test_long_runs_the_state_of_the_selection_comes_from_the_checkpoint(tmp_path, monkeypatch):
    run = judged_run(tmp_path, [1, 5, 2], 2, every=1, keep=3)
    train(run)
    newest = tmp_path / "checkpoints" / "step-000002"
    meta = json.loads((newest / "meta.json").read_text())
    resumed = replace(run, selection=Selection(), start_step=2)
    monkeypatch.setattr(checkpoint, "load", lambda *args: [])
    restore_run(resumed, RunStart(tmp_path, newest, meta, [], []))
    assert resumed.selection == run.selection and resumed.selection.best_step == 1
    new = replace(run, selection=Selection())
    restore_run(new, RunStart(tmp_path, None, {}, [], []))
    assert new.selection == Selection(measure="correct_answer")


def test_long_runs_a_run_killed_between_the_best_checkpoint_and_its_link_has_the_link_after_resume(
    tmp_path, monkeypatch
):
    run = judged_run(tmp_path, [1, 3, 5], 2, every=1, keep=3)

    def die(folder, name):
        raise KeyboardInterrupt

    link = checkpoint._link_best
    monkeypatch.setattr(
        checkpoint, "_link_best", lambda folder, name: die(folder, name) if name.endswith("2") else link(folder, name)
    )
    with pytest.raises(KeyboardInterrupt):
        train(run)
    monkeypatch.undo()
    newest = tmp_path / "checkpoints" / "step-000002"
    assert best(tmp_path) == 1 and newest.exists()
    monkeypatch.setattr(checkpoint, "load", lambda *args: [])
    meta = json.loads((newest / "meta.json").read_text())
    restore_run(replace(run, selection=Selection(), start_step=2), RunStart(tmp_path, newest, meta, [], []))
    assert best(tmp_path) == 2
