"""What may go wrong in a run, caused for real: the run ends or goes on as it should, and nothing is lost or doubled."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import child_environment
from forkserver import interpreter
from safetensors.torch import load_file
from test_run import CARRIED, overrides, read, without_times

from grpo_core.training import checkpoint

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tests" / "workers" / "faulty.py"
pytestmark = pytest.mark.slow

STEPS = {"trainer__num_steps": 4, "checkpoint__every": 2, "evaluation__num_tasks": 4, "sampling__max_new_tokens": 8}
STEPS |= {"reference__every": 1, **CARRIED, "data__limit": 8, "data__curriculum": "{rest_after: 1, prefer: [0.1, 0.9]}"}  # 2 steps an epoch


def command(processes, out, *more, **settings):
    chosen = overrides(out, **{**STEPS, **settings})
    return [
        interpreter(),
        str(WORKER),
        "launch",
        "--processes",
        str(processes),
        "--config",
        "configs/tiny.yaml",
        *chosen,
        *more,
    ]


def run(processes, out, *more, environment, fault=None, **settings):
    environment = dict(environment)
    if fault:
        environment["FAULT"] = json.dumps({"mark": str(out) + ".mark", **fault})
    return subprocess.run(
        command(processes, out, *more, **settings),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def results(folder):
    """Everything that a run leaves behind, but for times."""
    name = sorted((folder / "checkpoints").iterdir())[-1]
    files = {
        name.name: load_file(name / "tensors.safetensors"),
        "adapter": load_file(folder / "adapter" / "adapter_model.safetensors"),
    }
    kinds = ("metrics", "completions", "evaluation", "evaluation_completions")
    return files, [without_times(read(folder / f"{kind}.jsonl")) for kind in kinds]


def same(one, other):
    (tensors, rows), (tensors_, rows_) = one, other
    assert tensors.keys() == tensors_.keys() and rows == rows_
    for name in tensors:
        assert tensors[name].keys() == tensors_[name].keys()
        assert all(torch.equal(value, tensors_[name][key]) for key, value in tensors[name].items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    done = run(2, out, environment=child_environment())
    assert done.returncode == 0, done.stderr
    return results(out / "tiny")


def test_ranks_that_are_new_processes_train_the_same(tmp_path, environment, whole):
    """As where the launcher cannot fork them."""
    done = run(2, tmp_path, environment={**environment, "NO_FORK": "1"})
    assert done.returncode == 0, done.stderr
    same(results(tmp_path / "tiny"), whole)


@pytest.mark.parametrize("fault", [
    {"where": "reward", "rank": 1, "calls": [7]},
    pytest.param({"where": "name", "rank": 0, "calls": [2], "late": True}, marks=pytest.mark.soak),
    pytest.param({"where": "sample", "rank": 0, "calls": [5]}, marks=pytest.mark.soak),
    pytest.param({"where": "backward", "rank": 1, "calls": [1]}, marks=pytest.mark.soak),
    pytest.param({"where": "write", "rank": 0, "calls": [2]}, marks=pytest.mark.soak),
    pytest.param({"where": "write", "rank": 0, "calls": [1], "late": True}, marks=pytest.mark.soak),
], ids=lambda fault: f"{fault['where']} on {fault['rank']}")  # fmt: skip
def test_a_killed_rank_is_named_and_the_run_started_again_is_bitwise_the_same(tmp_path, environment, whole, fault):
    done = run(2, tmp_path, "trainer.max_restarts=1", environment=environment, fault={"what": "kill", **fault})
    assert (Path(str(tmp_path) + ".mark")).exists()
    restart = "grpo_core: restarting from the last checkpoint; restarts left: 1"
    assert done.stderr.splitlines() == [f"grpo_core: rank {fault['rank']} was ended by SIGKILL", restart]
    assert done.returncode == 0
    same(results(tmp_path / "tiny"), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.soak
def test_the_others_end_with_a_killed_rank_at_once(tmp_path, environment):
    start = time.time()
    done = run(
        2, tmp_path, environment=environment, fault={"what": "kill", "where": "backward", "rank": 1, "calls": [2]}
    )
    died = (Path(str(tmp_path) + ".mark")).stat().st_mtime
    assert done.returncode == 128 + signal.SIGKILL and time.time() - died < 20 and died > start
    assert "grpo_core: rank 1 was ended by SIGKILL" in done.stderr


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.soak)]
)
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, environment, whole, number, code):
    ranks = subprocess.Popen(
        command(2, tmp_path), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = tmp_path / "tiny" / "metrics.jsonl", time.time() + 100
    while not metrics.exists() or not metrics.read_text().strip():
        assert time.time() < deadline and ranks.poll() is None
        time.sleep(0.01)
    ranks.send_signal(number)
    out, err = ranks.communicate(timeout=100)
    assert ranks.returncode == code and "Traceback" not in err, err
    assert f"stopped by {number.name} after writing a checkpoint" in out
    done = run(2, tmp_path, "resume=auto", environment=environment)
    assert done.returncode == 0, done.stderr
    same(results(tmp_path / "tiny"), whole)


def test_a_second_signal_ends_at_once(tmp_path, environment):
    fault = json.dumps({"mark": str(tmp_path / "mark"), "what": "hang", "where": "reward", "rank": 1, "calls": [2]})
    ranks = subprocess.Popen(
        command(2, tmp_path),
        cwd=ROOT,
        env={**environment, "FAULT": fault},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 100
    while not (tmp_path / "mark").exists():
        assert time.time() < deadline and ranks.poll() is None
        time.sleep(0.05)
    ranks.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert ranks.poll() is None  # it waits for the end of the step
    ranks.send_signal(signal.SIGTERM)
    assert ranks.wait(timeout=5) != 0


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, environment, whole):
    fault = {"what": "full", "where": "write", "rank": 0, "calls": [1]}
    done = run(2, tmp_path, environment=environment, fault=fault)
    assert done.returncode == 0, done.stderr
    assert (
        "warning: the checkpoint after 2 steps could not be written (No space left on device); earlier checkpoints stay" in done.stdout
    )
    same(results(tmp_path / "tiny"), whole)
    assert [path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir()] == ["step-000004"]


def test_a_run_whose_last_checkpoint_cannot_be_written_fails(tmp_path, here, monkeypatch):
    write = checkpoint._write

    def full(folder, name, *rest):
        if name == "step-000004":
            raise OSError(28, "No space left on device")
        write(folder, name, *rest)

    monkeypatch.setattr(checkpoint, "_write", full)
    done = here("train", "--config", "configs/tiny.yaml", *overrides(tmp_path, **STEPS))
    assert done.returncode == 3 and "grpo_core: the last checkpoint could not be written to" in done.stderr, done.stderr
    assert [path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.soak
def test_two_processes_whose_last_checkpoint_cannot_be_written_fail(tmp_path, environment):
    fault = {"what": "full", "where": "write", "rank": 0, "calls": [2], "always": True}
    done = run(2, tmp_path, environment=environment, fault=fault)
    assert done.returncode == 3 and "grpo_core: the last checkpoint could not be written to" in done.stderr, done.stderr
    assert [path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.soak
@pytest.mark.parametrize("harm", ["truncated", "missing", "flipped"])
def test_a_damaged_checkpoint_is_left_for_the_one_before(tmp_path, environment, whole, harm):
    assert run(2, tmp_path, environment=environment).returncode == 0
    newest = tmp_path / "tiny" / "checkpoints" / "step-000004"
    file = newest / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    else:
        content[-5] ^= 1
        file.write_bytes(content[:-100] if harm == "truncated" else content)
    done = run(2, tmp_path, "resume=auto", environment=environment)
    assert done.returncode == 0, done.stderr
    assert (
        f"warning: {newest} is damaged (" in done.stdout
        and "resumed from" in done.stdout
        and "after 2 steps" in done.stdout
    )
    same(results(tmp_path / "tiny"), whole)


@pytest.mark.parametrize("first, then", [(2, 1), pytest.param(1, 2, marks=pytest.mark.soak)])
def test_another_number_of_processes_goes_on(tmp_path, environment, here, whole, first, then):
    """The same tasks, and numbers that differ by rounding alone."""
    # test_engine.py compares weights and moments

    def trained(processes, *more, **given):
        given["engine__schedule"] = "constant"
        if processes == 1:
            return here("train", "--config", "configs/tiny.yaml", *overrides(tmp_path, **STEPS | given), *more)
        return run(processes, tmp_path, *more, environment=environment, **given)

    assert trained(first, trainer__num_steps=2).returncode == 0
    done = trained(then, "resume=auto")
    assert done.returncode == 0 and "after 2 steps" in done.stdout, done.stderr
    completions = read(tmp_path / "tiny" / "completions.jsonl")
    assert [(row["step"], row["task"], row["sample"]) for row in completions] == [
        (row["step"], row["task"], row["sample"]) for row in whole[1][1]
    ]


POISON = """
import os
from grpo_core import PolicyLoss

calls = 0

def poison(logprobs, old_logprobs, advantages, completion_mask):
    "nan on rank 1 in its third step"
    global calls
    calls += os.environ.get("RANK") == "1" and len(logprobs) > 12
    bad = float("nan") if calls == 3 else 0.0
    return PolicyLoss(-advantages * (logprobs - old_logprobs).exp() + bad * logprobs, {})
"""


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path, environment):
    file = tmp_path / "mine.py"
    file.write_text(POISON)
    more = {"model__precision": "bf16", "loss__name": f"{file}:poison", "trainer__tokens_per_micro_batch": 100_000}
    done = run(2, tmp_path, environment=environment, **more)
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "tiny" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0] and rows[2]["loss"] is None
    assert rows[2]["adapter_norm"] == rows[1]["adapter_norm"] != rows[3]["adapter_norm"]
    names = sorted(path.name for path in (tmp_path / "tiny" / "incidents").iterdir())
    assert names == [f"step-000002-rank-{rank}.{kind}" for rank in (0, 1) for kind in ("json", "safetensors")]
    assert "update skipped: gradient not finite" in done.stdout


@pytest.mark.parametrize("where", ["reward", pytest.param("backward", marks=pytest.mark.soak)])
def test_a_rank_that_hangs_is_named_with_its_phase_and_stack(tmp_path, environment, where):
    fault = {"what": "hang", "where": where, "rank": 1, "calls": [2]}
    done = run(2, tmp_path, environment=environment, fault=fault, trainer__hang_timeout=15)
    mark = Path(str(tmp_path) + ".mark")
    assert mark.exists(), done.stderr
    took = time.time() - mark.stat().st_mtime
    assert done.returncode == 4 and 15 <= took < 30, done.stderr
    phase = {"reward": "reward", "backward": "update"}[where]
    assert re.search(rf"grpo_core: rank 1 has made no progress for 1[5-8] s in phase {phase}; its threads:", done.stderr)
    assert "in cause" in done.stderr and "grpo_core: rank 1 failed with exit code 4" in done.stderr
    assert "rank 0 has" not in done.stderr


def ranks(launcher):
    """The processes that the launcher has started and that run."""
    try:
        return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


@pytest.mark.soak
def test_300_steps_killed_at_20_moments_are_bitwise_those_of_a_run_left_alone(tmp_path, environment):
    """Any rank, at any moment: while it starts, samples, scores, updates, writes, evaluates. checkpoint.every is 5."""
    long = [
        "trainer.num_steps=300",
        "checkpoint.every=5",
        "evaluation.every=60",
        "evaluation.num_tasks=100",
        "log.every=100",
    ]

    def start(out, *more):
        words = ["launch", "--processes", "2", "--config", "configs/tiny.yaml", *long, f"output_dir={out}", *more]
        return subprocess.Popen(
            [sys.executable, "-m", "grpo_core", *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )

    alone = start(tmp_path / "alone")
    assert alone.wait(timeout=1500) == 0
    launcher, draw, kills = start(tmp_path / "killed", "trainer.max_restarts=20"), random.Random(6), 0
    while kills < 20:
        time.sleep(draw.uniform(1, 20))
        assert launcher.poll() is None, "it ended before it was killed often enough"
        if running := ranks(launcher):
            os.kill(draw.choice(running), signal.SIGKILL)
            kills += 1
    assert launcher.wait(timeout=1500) == 0
    told = launcher.stderr.read()
    assert told.count("was ended by SIGKILL") == 20 and "restarting from the last checkpoint; restarts left: 1" in told
    same(results(tmp_path / "killed" / "tiny"), results(tmp_path / "alone" / "tiny"))
