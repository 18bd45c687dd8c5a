"""A long run uses no more memory, open files, threads or processes than a short one, by the law of benchmarks/soak.py."""

import importlib.util
import json
import os
import subprocess
import sys
import threading

import pytest
from conftest import ROOT
from test_loop import make_run

from grpo_core.training import trainer

spec = importlib.util.spec_from_file_location("soak", ROOT / "benchmarks" / "soak.py")
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


def trace(**leaks):
    """Samples of 1,000 steps, of which each quantity in `leaks` grows by so much per step after step 300."""
    flat = {"memory": 500.0, "children_memory": 30.0, "gpu_allocated": 90.0, "gpu_reserved": 99.0, "open files": 20, "threads": 9, "children": 2}
    early = {"memory": -300.0, "open files": -8, "threads": -3}  # before the end of the warm-up nothing is judged
    samples = []
    for step in range(10, 1001, 10):
        growing = {key: rate * max(0, step - 300) for key, rate in leaks.items()}
        samples.append({"step": step} | {key: v + growing.get(key, 0) + (early.get(key, 0) if step < 200 else 0) for key, v in flat.items()})
    return samples


@pytest.mark.parametrize("leaks, broken", [
    ({}, []), ({"memory": 0.0005}, []), ({"memory": -0.01}, []), ({"memory": 0.01}, ["resident memory"]),
    ({"children_memory": 0.01}, ["resident memory of the children"]), ({"gpu_reserved": 0.01}, ["GPU memory reserved"]),
    ({"gpu_allocated": 0.01, "threads": 1}, ["GPU memory allocated", "threads"]), ({"open files": 1}, ["open files"]),
    ({"children": 0.01}, ["children"]),
])  # fmt: skip
def test_the_law_of_a_long_trace_finds_a_leak(leaks, broken):
    results = soak.judge(trace(**leaks))
    assert [result["workload"].partition(",")[0] for result in results if not result["met"]] == broken
    assert {result["trace"][-1][0] for result in results} == {1000} and len(results) == 7


def test_steps_leave_no_open_file_thread_or_process(tmp_path, monkeypatch):
    """Steps on fakes with completions logged and checkpoints: the quick form of the soak."""
    run, samples, evaluate_save_or_stop = make_run(tmp_path / "run", num_steps=12), [], trainer.evaluate_save_or_stop

    def finish_and_sample(run, steps_taken, *arguments):
        evaluate_save_or_stop(run, steps_taken, *arguments)
        trainer.checkpoint.save(run, steps_taken, run.control)
        samples.append(soak.take_sample(steps_taken))

    monkeypatch.setattr(trainer, "evaluate_save_or_stop", finish_and_sample)
    trainer.train(run)
    run.log.close()
    results = soak.judge(samples, warm_up=4)
    assert all(result["met"] for result in results if result["reach"] == "equal"), [r["ours"] for r in results]


def test_a_sample_sees_files_threads_and_processes_below_processes():
    before, ended = soak.take_sample(0), threading.Event()
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()']); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    thread = threading.Thread(target=ended.wait)
    thread.start()
    process.stdout.readline()
    with open(os.devnull):
        after = soak.take_sample(1)
    ended.set()
    process.communicate(b"\n\n")
    thread.join()
    growth = {key: after[key] - before[key] for key in ("open files", "threads", "children")}
    assert growth == {"open files": 3, "threads": 1, "children": 2} and after["children_memory"] > before["children_memory"]


@pytest.mark.soak
def test_a_long_run_is_flat(tmp_path, environment):
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--steps=600", f"--out={tmp_path / 'rows.json'}"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert len(rows) == 5 and all(row["met"] for row in rows), [(row["workload"], row["ours"]) for row in rows if not row["met"]]
