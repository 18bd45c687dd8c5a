"""A line at once on Ctrl-C, whatever a command is doing, and progress that goes on within an evaluation."""

import io
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_loop import make_run

from grpo_core.batch import Task
from grpo_core.commands import launch, study
from grpo_core.config.sections import EvaluationConfig
from grpo_core.distributed import notices, ranks, signals
from grpo_core.monitor import progress
from grpo_core.training import evaluation, trainer


class Ended(BaseException):
    """The process would have ended here."""


@pytest.fixture
def ends(monkeypatch):
    def end(code):
        raise Ended(code)

    monkeypatch.setattr(notices.os, "_exit", end)


def test_n18_ctrl_c_before_a_run_prints_a_line_and_ends_at_once(ends, capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Ended, match="130"), notices.answer_early_interrupt():
        signal.raise_signal(signal.SIGINT)
    assert (
        capfd.readouterr().err
        == "grpo_core: SIGINT received before the run has started; it ends at once, and nothing was written\n"
    )
    assert signal.getsignal(signal.SIGINT) is before


def test_n18_only_one_process_of_a_run_prints_it(ends, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Ended), notices.answer_early_interrupt():
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_n18_a_run_has_its_own_line_inside(ends, capfd, monkeypatch):
    monkeypatch.setattr(ranks, "is_main", lambda: True)
    with notices.answer_early_interrupt(), signals.handle_signals():
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == (
            "grpo_core: SIGINT received; the run stops before its next step, with a checkpoint; again: at once\n"
        )


def test_n18_an_ignored_ctrl_c_stays_ignored(ends):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with notices.answer_early_interrupt():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("command", ["train", "launch", "sft"])
def test_n18_the_commands_that_train_answer_from_their_first_import_on(command, monkeypatch):
    from grpo_core import cli

    def see(*args, **options):
        assert signal.getsignal(signal.SIGINT) is notices._end
        return 7

    monkeypatch.setattr(f"grpo_core.commands.{command}.run_{command}", see)
    assert cli.main([command, "--config", "tiny"]) == 7
    assert signal.getsignal(signal.SIGINT) is not notices._end


def test_n18_the_launcher_prints_a_line_for_each_signal(capfd):
    sent = []
    ranks_of_a_run = object.__new__(launch._Ranks)
    process = SimpleNamespace(poll=lambda: None, send_signal=sent.append)
    ranks_of_a_run.ranks, ranks_of_a_run.signal_times, ranks_of_a_run.is_passed_on = {0: process, 1: process}, [], False
    for _ in range(2):
        ranks_of_a_run._pass_on(signal.SIGINT, None)
        time.sleep(1.5 * notices.REPEAT_SECONDS)
    assert sent == [signal.SIGINT] * 2 + [signal.SIGKILL] * 2
    assert capfd.readouterr().err.splitlines() == [
        "grpo_core: SIGINT received; it is passed on to the processes of the run (2)",
        "grpo_core: SIGINT received again; the processes are ended at once",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["train"], ["launch", "--processes", "2"]])
@pytest.mark.parametrize("delay", [1.0, 3.0])
def test_n18_a_real_start_is_interrupted_with_a_line_at_once(tmp_path, environment, command, delay):
    words = [
        *command,
        "--config",
        "configs/tiny.yaml",
        f"output_dir={tmp_path}",
        "evaluation.num_tasks=0",
        "trainer.num_steps=50",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_core", *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    start, line = time.monotonic(), process.stderr.readline().decode()
    assert time.monotonic() - start < 2 and line.startswith("grpo_core: SIGINT received"), line
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode in (130, 137) and b"Traceback" not in rest, rest


def test_n18_a_bar_appears_before_its_first_update(monkeypatch):
    screen = io.StringIO()
    options = {"disable": False, "delay": 0.05, "leave": False, "file": screen}
    monkeypatch.setattr(progress, "_options", lambda: options)
    monkeypatch.setattr(progress, "DELAY", 0.05)
    with progress.progress_bar(500, "evaluating dev", "task"):
        time.sleep(0.3)
    assert "evaluating dev:   0%" in screen.getvalue() and "0/500" in screen.getvalue()
    written = len(screen.getvalue())
    time.sleep(0.1)
    assert len(screen.getvalue()) == written  # its thread has ended


@pytest.mark.parametrize("world_size, totals", [(1, [4, 8, 10]), (3, [10])])
def test_n18_an_evaluation_counts_the_tasks_of_all_processes(tmp_path, monkeypatch, world_size, totals):
    lines, seen = [], []

    class Line(progress.ProgressLine):
        def update(self, n=1):
            super().update(n)
            seen.append(self.count)

    def bar(total, title, unit):
        lines.append((total, title, unit))
        return Line(total=total, disable=True)

    run = make_run(tmp_path, change=lambda config: replace(config, evaluation=EvaluationConfig(batch_size=4)))
    tasks = [Task(i, "p", [5, 6], {}, eval_set="dev") for i in range(10)]
    monkeypatch.setattr(evaluation, "progress_bar", bar)
    monkeypatch.setattr(evaluation.ranks, "world_size", lambda: world_size)
    monkeypatch.setattr(evaluation.ranks, "all_sum", lambda values: values)
    monkeypatch.setattr(evaluation.ranks, "gather", lambda value: [value])
    evaluation.evaluate(run.sampler, tasks, run.eval_reward, batch_size=4)
    assert lines == [(10, "evaluating dev", "task")] and seen == totals


def test_n18_a_signal_that_ended_one_run_ends_no_other_of_the_process():
    with signals.handle_signals():
        signal.raise_signal(signal.SIGINT)
        assert signals._received == signal.SIGINT
    assert signals._received == 0


@pytest.mark.parametrize("moment", ["while the model loads", "in the evaluation"])
def test_n18_a_signal_before_the_first_step_ends_the_run_before_it(tmp_path, monkeypatch, moment):
    """FAULTS #N18: the run evaluated and took a whole step first, which may take minutes."""
    run, evaluated = make_run(tmp_path, num_steps=2), []
    end = lambda: monkeypatch.setattr(signals, "_received", int(signal.SIGINT))  # noqa: E731
    monkeypatch.setattr(trainer, "evaluate_now", lambda run, step: evaluated.append(step) or end())
    if moment == "while the model loads":
        end()
    with pytest.raises(signals.Interrupted):
        trainer.train(run)
    assert evaluated == ([] if moment == "while the model loads" else [0])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000"]
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()


def test_a_signal_that_is_sent_twice_is_one(ends, capfd, monkeypatch):
    """`timeout` and schedulers send a signal to the process and to its group: the run had ended without a checkpoint."""
    monkeypatch.setattr(ranks, "is_main", lambda: True)
    with signals.handle_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert capfd.readouterr().err.count("received") == 1
        time.sleep(1.5 * notices.REPEAT_SECONDS)
        with pytest.raises(Ended, match="143"):
            signal.raise_signal(signal.SIGTERM)


def test_signals_are_counted_by_their_times(monkeypatch):
    clock = iter([0.0, 0.01, 5.0, 5.1, 9.0])
    monkeypatch.setattr(notices.time, "monotonic", lambda: next(clock))
    times = []
    assert [notices.count_signals(times) for _ in range(5)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("pause, killed", [(0.0, False), (1.5, True)])
def test_the_launcher_passes_on_a_signal_that_is_sent_twice_once(pause, killed):
    launched, sent = launch._Ranks.__new__(launch._Ranks), []
    launched.signal_times, launched.is_passed_on, launched.ranks = [], False, {}
    launched._send = sent.append
    launched._pass_on(signal.SIGTERM, None)
    time.sleep(pause * notices.REPEAT_SECONDS)
    launched._pass_on(signal.SIGTERM, None)
    assert sent == [signal.SIGTERM, signal.SIGKILL][: 1 + killed]


@pytest.mark.parametrize("pause, passed", [(0.0, 1), (1.5, 2)])
def test_a_study_passes_on_a_signal_that_is_sent_twice_once(pause, passed, capfd):
    runs = study._Training.__new__(study._Training)
    runs._signal_times, runs._signals_sent, runs._running = [], 0, {}
    runs._pass_on(signal.SIGTERM, None)
    time.sleep(pause * notices.REPEAT_SECONDS)
    runs._pass_on(signal.SIGTERM, None)
    assert capfd.readouterr().err.count("SIGTERM received") == passed
