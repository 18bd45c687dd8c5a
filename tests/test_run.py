"""The real thing: processes, DeepSpeed, files. Short runs of the embedded default."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import child_environment, start_two_ranks, wait_for
from forkserver import interpreter
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

CARRIED = {  # what a run carries from step to step: random states, a moving reference, coefficients, a place in the data
    "lora__dropout": 0.1, "reference__mixing": 0.5, "loss__kl_target": 0.001, "loss__kl_horizon": 100,
    "loss__entropy_target": 0.4, "sampling__dynamic_attempts": 1,
}  # fmt: skip
SHORT = [
    "evaluation.num_tasks=8",
    "data.limit=500",
    "trainer.completions_per_step=32",
    "sampling.max_new_tokens=24",
    "log.every=1",
]


def overrides(out, **more):
    return [f"output_dir={out}", *SHORT, *(f"{key.replace('__', '.')}={value}" for key, value in more.items())]


def python(*arguments, environment, **kwargs):
    return subprocess.run(
        [interpreter(), *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


TINY = ["train", "--config", "configs/tiny.yaml"]


def launch(*arguments, environment, timeout=300):
    command = ["bash", "launch.sh", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per", "peak"))} for row in rows]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_launch_trains_and_the_adapter_loads_in_plain_peft(tmp_path, environment):
    shown = {"log__evaluation_completions": 5}
    done = launch(2, *overrides(tmp_path, trainer__num_steps=2, **shown), environment=environment)
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    if not torch.cuda.is_available():
        assert out[0].startswith("No GPU here: running the default, configs/tiny.yaml")
    assert out[-3].startswith("before: accuracy") and out[-2].startswith("after:  accuracy")
    assert out[-1] == f"adapter: {tmp_path / 'tiny' / 'adapter'}"
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr

    folder = tmp_path / "tiny"
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [0, 1]
    assert [row["step"] for row in read(folder / "evaluation.jsonl")] == [0, 2]
    completions = read(folder / "completions.jsonl")
    assert len(completions) == 2 * 32 and len({row["prompt"] for row in completions}) == 8
    rows = read(folder / "evaluation_completions.jsonl")  # gathered from both processes, in the order of the tasks
    assert [(row["step"], row["task"]) for row in rows] == [(step, task) for step in (0, 2) for task in range(5)]

    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from peft import PeftModel\n"
        "base, adapter = sys.argv[1:]\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)\n"
        "tokenizer = AutoTokenizer.from_pretrained(adapter)\n"
        "inputs = tokenizer('Question: Ben has 5 pens. How many?\\n<think>', return_tensors='pt')\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0]))\n"
    )
    loaded = python("-c", code, ROOT / "grpo_core" / "builtin" / "tiny", folder / "adapter", environment=environment)
    assert loaded.returncode == 0 and loaded.stdout.startswith("Question: Ben has 5 pens."), loaded.stderr
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert not (folder / "adapter" / "README.md").exists()  # PEFT leaves a form there
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)


def test_the_written_config_alone_re_runs_the_run(tmp_path, here):
    first = tmp_path / "first"
    assert here(*TINY, *overrides(first, trainer__num_steps=1)).returncode == 0
    config = yaml.safe_load((first / "tiny" / "config.yaml").read_text())
    config["output_dir"] = str(tmp_path / "again")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert here("train", "--config", tmp_path / "config.yaml").returncode == 0
    for name in ("metrics", "completions"):
        rows = [without_times(read(folder / "tiny" / f"{name}.jsonl")) for folder in (first, tmp_path / "again")]
        assert rows[0] == rows[1]


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_is_bitwise_never_stopped(tmp_path, environment, here, processes):
    """10 steps equal 5 steps, kill -9, resume, 5 steps: weights, metrics and completions; short of it: test_faults.py."""
    settings = {"trainer__num_steps": 10, "checkpoint__every": 5, "evaluation__every": 5, "reference__every": 3, **CARRIED}
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def run(out, *more):
        words = [*overrides(out, **settings), *more]
        return here(*TINY, *words) if processes == 1 else launch(processes, *words, environment=environment)

    assert run(whole).returncode == 0
    command = ["bash", "launch.sh", str(processes), *overrides(cut, **settings)]
    victim = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.time() + 200
    while not (cut / "tiny" / "checkpoints" / "step-000005").exists():
        assert time.time() < deadline and victim.poll() is None
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not (cut / "tiny" / "checkpoints" / "step-000010").exists()

    resumed = run(cut, "resume=auto")
    assert resumed.returncode == 0 and "after 5 steps" in resumed.stdout, resumed.stderr
    for name in ("metrics", "completions", "evaluation"):
        assert without_times(read(cut / "tiny" / f"{name}.jsonl")) == without_times(
            read(whole / "tiny" / f"{name}.jsonl")
        )
    one, other = (load_file(folder / "tiny" / "adapter" / "adapter_model.safetensors") for folder in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [p.name for p in sorted((cut / "tiny" / "checkpoints").glob("*"))] == ["step-000005", "step-000010"]


ACROSS_RANKS = {
    "advantage__name": "reinforce_pp_baseline", "loss__top_entropy": 0.4, "loss__average": "token", "loss__entropy_coef": 0.01,
    "sampling__dynamic_attempts": 2, "loss__rollout_correction": "{name: token_truncate}", "truncation__name": "mask_loss",
    "loss__kl": "exact", "log__exact_kl_every": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "switches", "curriculum", "turns"])
def test_rollouts_do_not_depend_on_the_number_of_processes(tmp_path, here, on_two, name):
    """Nor does the update: what is relative to the batch, or a share of it, is of all ranks' batch."""
    done = here(*TINY, *overrides(tmp_path, trainer__num_steps=2, **RUNS[name]))
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / "tiny", on_two / name / "tiny"]
    texts = [
        [
            [(row["step"], row["prompt"], row.get("sample"), row["text"]) for row in read(folder / f"{kind}.jsonl")]
            for kind in ("completions", "evaluation_completions")
        ]
        for folder in folders
    ]
    assert texts[0] == texts[1]  # the second step's also show that the first update was the same
    for one, two in zip(*(without_times(read(folder / "metrics.jsonl")) for folder in folders), strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {
            "kl_exact",
            "logprob_gap",
            "logprob_gap_max",
            "micro_batches",
        }:  # the first is of a sample
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


OWN = """
from grpo_core import PolicyLoss, token_ratio

def soft(logprobs, old_logprobs, advantages, completion_mask, *, power: float = 0.5):
    '''-(r ** power) A / power'''
    ratio = token_ratio(logprobs, old_logprobs)
    return PolicyLoss(-advantages * ratio**power / power, {"ratio": ratio.detach(), "clip_frac": 0 * ratio.detach()})

def best(rewards, *, bonus: float = 1.0):
    return bonus * (rewards - rewards.mean(dim=1, keepdim=True))

def short(completions, *, limit: int = 20, **columns):
    return [float(len(text) < limit) for text in completions]
"""


DEEPSPEED = sorted(path.name for path in (ROOT / "configs").glob("*.json"))
RUNS = {  # of two steps, on two processes
    "plain": {"trainer__num_minibatches": 2},
    "switches": {"trainer__num_minibatches": 2, **ACROSS_RANKS},
    "curriculum": {"data__limit": 6, "data__curriculum": "{rest_after: 1, rest_epochs: 2, prefer: [0.2, 0.8]}"},
    "own": {
        "loss__name": "FILE:soft", "loss__args": "{power: 0.25}", "advantage__name": "FILE:best", "advantage__args": "{bonus: 2.0}",
        "rewards": "[{name: 'FILE:short', args: {limit: 30}}]",
    },
    "turns": {
        "environment__name": "tests/workers/game.py:Game", "environment__max_turn_tokens": 6, "environment__max_turns": 4,
        "advantage__name": "turn_level", "loss__echo_coef": 0.1, "trainer__num_minibatches": 2, "sampling__dynamic_attempts": 1,
    },
    **{name: {"engine__deepspeed": name} for name in DEEPSPEED},
}  # fmt: skip


WIDE = {  # an adapter with more than LoRA's two factors
    "lora__use_dora": "true", "lora__use_rslora": "true", "lora__modules_to_save": "[norm]", "lora__trainable_token_indices": "[5, 6]",
    "lora__rank_pattern": "{q_proj: 4}", "lora__target_modules": "[q_proj, up_proj]", "loss__kl_coef": 0.1, "engine__schedule": "constant",
    "engine__learning_rate": 0.003, "checkpoint__every": 1, "rewards": "[{name: num_unique_chars}]",
}  # fmt: skip
RUNS["wide"] = RUNS["wide, cut"] = WIDE


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """The folder of RUNS, trained one after another by the same two processes."""
    folder = tmp_path_factory.mktemp("on_two")
    (folder / "mine.py").write_text(OWN)
    jobs = []
    for name, settings in RUNS.items():
        own = {key: str(value).replace("FILE", str(folder / "mine.py")) for key, value in settings.items()}
        words = [*TINY, *overrides(folder / name, trainer__num_steps=1 if "cut" in name else 2, **own)]
        jobs.append({"cwd": str(ROOT), "kind": "main", "arguments": words})
        if "cut" in name:
            again = ["train", f"resume={folder / name / 'tiny'}", "trainer.num_steps=2"]
            jobs.append({"cwd": str(ROOT), "kind": "main", "arguments": again})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    worker, answer = ROOT / "tests" / "workers" / "commands.py", folder / "problems.json"
    codes, written = wait_for(start_two_ranks(worker, folder / "jobs.json", answer, environment=child_environment()))
    assert codes == [0, 0] and json.loads(answer.read_text()) == [None] * len(jobs), (written, answer)
    return folder


def test_a_loss_an_advantage_and_a_reward_from_a_users_own_file_train(on_two):
    folder = on_two / "own" / "tiny"
    assert "-(r ** 0.25) A / 0.25" in (folder / "config.yaml").read_text()
    completions = read(folder / "completions.jsonl")
    assert all(row["reward"] == float(len(row["text"]) < 30) for row in completions)
    group = completions[:8]
    mean = sum(row["reward"] for row in group) / 8
    assert [row["advantage"] for row in group] == pytest.approx([2 * (row["reward"] - mean) for row in group])
    assert read(folder / "metrics.jsonl")[-1]["grad_norm"] > 0


def test_every_deepspeed_json_trains_the_same(on_two):
    rows = [without_times(read(on_two / name / "tiny" / "metrics.jsonl")) for name in DEEPSPEED]
    norms = [[row.pop("grad_norm") for row in one] for one in rows]  # summed in another order with offload
    assert len(rows) == 3 and rows[0] == rows[1] == rows[2]
    assert norms[1] == pytest.approx(norms[0], rel=2**-22) and norms[2] == pytest.approx(norms[0], rel=2**-22)


def test_an_adapter_with_all_options_trains_on_two_ranks_as_on_one_and_resumes(on_two, tmp_path, here):
    """DoRA, rsLoRA, a module trained whole, single tokens and ranks by name: metrics up to rounding; resumed, bitwise."""
    assert here(*TINY, *overrides(tmp_path, trainer__num_steps=2, **WIDE)).returncode == 0
    one, two, cut = (without_times(read(folder / "tiny" / "metrics.jsonl")) for folder in (tmp_path, on_two / "wide", on_two / "wide, cut"))
    assert two == cut and two[1]["grad_norm"] > 0 and two[1]["kl"] > 0
    for key in ("loss", "kl", "grad_norm", "adapter_norm", "reward", "entropy", "length", "learning_rate"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-4, abs=1e-6), key
    weights = [load_file(folder / "tiny" / "adapter" / "adapter_model.safetensors") for folder in (tmp_path, on_two / "wide", on_two / "wide, cut")]
    assert {name.rpartition(".")[2] for name in weights[0]} >= {"trainable_tokens_delta", "lora_magnitude_vector", "weight"}
    for name, value in weights[1].items():
        torch.testing.assert_close(value, weights[0][name], atol=1e-4, rtol=0, msg=name)
        assert torch.equal(value, weights[2][name]), name


def test_a_reward_that_goes_wrong_on_one_rank_is_counted_and_told_and_too_often_ends_the_run(tmp_path, environment):
    file = tmp_path / "mine.py"
    file.write_text(
        "import os, time\n\ncalls = 0\n\ndef bad(completions, **columns):\n"
        "    global calls\n    calls += 1\n"
        "    if os.environ['RANK'] == '1' and calls == 2:\n        time.sleep(1000)\n"
        "    return [float('nan') if os.environ['RANK'] == '1' and i == 3 else float(len(text)) for i, text in enumerate(completions)]\n"
    )
    rewards = f"[{{name: '{file}:bad'}}, correct_answer]"
    most = {"trainer__reward_timeout": 2, "trainer__max_failed_rewards": 0.01}  # looked at after three steps
    run = overrides(tmp_path, trainer__num_steps=9, **most, rewards=rewards)
    done = launch(2, *run, environment=environment)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert "mine.py:bad returned nan for completion 3; it must be None or a number from -1e6 to 1e6" in done.stdout
    assert "mine.py:bad took more than 2 s" in done.stdout
    rows = read(tmp_path / "tiny" / "metrics.jsonl")
    assert [row["failed/mine.py:bad"] for row in rows] == [1 / 32, 0.5, 1 / 32]
    assert [row["failed/correct_answer"] for row in rows] == [0, 0, 0] and rows[1]["seconds/reward"] < 4
    unscored = [row for row in read(tmp_path / "tiny" / "completions.jsonl") if row["rewards"]["mine.py:bad"] is None]
    assert [row["step"] for row in unscored] == [0, *16 * [1], 2] and all(row["reward"] in (0, 1) for row in unscored)
    assert (
        "mine.py:bad failed on 19% of the completions of the last 3 steps, more than trainer.max_failed_rewards (0.01)"
        in done.stderr
    )


def test_another_run_is_never_overwritten_unasked_and_another_config_is_not_resumed(tmp_path, here):
    run = [*TINY, *overrides(tmp_path, trainer__num_steps=1)]
    assert here(*run).returncode == 0
    refused = here(*run)
    assert (
        refused.returncode == 2
        and "tiny already holds a run; use resume=auto to continue it, overwrite=true" in refused.stderr
    )
    again = here(*run, "resume=auto", "trainer.num_steps=2")
    assert again.returncode == 0 and "resumed from" in again.stdout
    assert yaml.safe_load((tmp_path / "tiny" / "config.yaml").read_text())["resume"] is None
    refused = here(*run, "resume=auto", "loss.kl_coef=0.5", "lora.r=4")
    assert refused.returncode == 2
    assert "loss.kl_coef (0.01 in the checkpoint, 0.5 now)" in refused.stderr
    assert "lora.r (16 in the checkpoint, 4 now)" in refused.stderr
    forced = here(*run, "resume=force", "loss.kl_coef=0.5", "trainer.num_steps=3")
    assert forced.returncode == 0, forced.stderr
    warning = "warning: resume=force ignored these differences from the checkpoint: loss.kl_coef (0.01 in the checkpoint"
    assert f"{warning}, 0.5 now)" in forced.stdout
    assert [row["step"] for row in read(tmp_path / "tiny" / "metrics.jsonl")] == [0, 1, 2]
    anew = here(*run, "overwrite=true")
    assert anew.returncode == 0 and [row["step"] for row in read(tmp_path / "tiny" / "metrics.jsonl")] == [0]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "What is {i} + 1?", "answer": "{i + 1}"}}\n' for i in range(40)))
    data = [f"data.path={rows}", "evaluation.num_tasks=0", "name=own"]
    assert here(*run, *data).returncode == 0
    rows.write_text(rows.read_text().replace("+ 1", "plus 1"))
    other = here(*run, *data, "resume=auto")
    assert other.returncode == 2 and "because the rows of data.path have changed since it was written" in other.stderr


def test_the_real_config_runs_on_small_parts(tmp_path, environment):
    """The recipe as shipped (offload, dropout, gradient checkpointing) with the built-in model and data in place of the hub's."""
    small = [
        "model.path=builtin:tiny",
        "data.path=builtin:word_problems",
        "trainer.num_steps=1",
        "sampling.max_new_tokens=16",
        "model.trust_remote_code=true",
    ]
    environment |= {"HF_TOKEN": "hf_" + 30 * "q", "WANDB_API_KEY": 40 * "q"}
    config = ["--config", "configs/gsm8k_qwen2.5_1.5b.yaml", f"output_dir={tmp_path}", "evaluation.num_tasks=4", *small]
    done = launch(2, *config, environment=environment)
    assert done.returncode == 0, done.stderr
    (row,) = read(tmp_path / "gsm8k_qwen2.5_1.5b" / "metrics.jsonl")
    assert row["grad_norm"] > 0 and row["rewards/combined"] == row["reward"] > 0
    assert "model.trust_remote_code is on: this process runs Python code that belongs to builtin:tiny" in done.stdout
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(20 * b"q" in content for content in (*written, done.stdout.encode(), done.stderr.encode()))


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.soak)])
def test_other_launchers_start_the_same_job(tmp_path, environment, here, launcher):
    command = {
        "torchrun": [interpreter(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "grpo_core"],
        "deepspeed": [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--module", "grpo_core"],
    }[launcher]  # fmt: skip
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    run = [*TINY, "trainer.num_steps=1"]
    words = [*command, *run, *overrides(tmp_path / "two")]
    done = subprocess.run([*map(str, words)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert here(*run, *overrides(tmp_path / "one")).returncode == 0
    one, two = (read(tmp_path / name / "tiny" / "completions.jsonl") for name in ("one", "two"))
    assert [row["text"] for row in one] == [row["text"] for row in two]


def test_two_nodes_of_one_process(tmp_path, environment):
    port = free_port()
    nodes = [
        subprocess.Popen(
            ["bash", "launch.sh", "1", *overrides(tmp_path, trainer__num_steps=1)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**environment, "NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank in range(2)
    ]  # fmt: skip
    outs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert "2 processes × 2 prompts × 8" in outs[0] and "adapter:" in outs[0] and "adapter:" not in outs[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["2", "trainer.num_step=3"], "unknown key trainer.num_step"),
        (["0"], "PROCESSES is '0'"),
        (["2x"], "PROCESSES is '2x'"),
        (["2", "model.path=nowhere/at-all"], "model.path is 'nowhere/at-all'"),
        (["3"], "must be a multiple of sampling.group_size × processes"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, message, environment, tmp_path):
    done = launch(*arguments, f"output_dir={tmp_path}", environment={**environment, "CUDA_VISIBLE_DEVICES": ""})
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr


def fake_command(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}"


def test_an_old_python_and_too_many_processes_are_one_sentence(tmp_path, environment):
    old = fake_command(tmp_path / "old", "python3", 'case "$*" in *"%d.%d"*) echo 3.9;; *) exit 1;; esac')
    done = launch(1, environment={**environment, "PATH": old + environment["PATH"]})
    assert done.returncode == 2 and "needs Python 3.11 or newer" in done.stderr and "is 3.9." in done.stderr
    assert len(done.stderr.splitlines()) == 1
    smi = fake_command(tmp_path / "smi", "nvidia-smi", "echo 'GPU 0: A'; echo 'GPU 1: B'")
    env = {k: v for k, v in environment.items() if k != "CUDA_VISIBLE_DEVICES"}
    done = launch(3, environment={**env, "PATH": smi + env["PATH"]})
    assert done.returncode == 2 and done.stderr.strip() == "3 processes were asked for, but only 2 GPU(s) are visible."
    done = launch(2, environment={**env, "PATH": smi + env["PATH"], "CUDA_VISIBLE_DEVICES": "1"})
    assert done.returncode == 2 and "only 1 GPU(s)" in done.stderr


def test_a_tokenizer_that_ends_otherwise_than_the_model_is_told_before_the_first_step(tmp_path, here):
    model = shutil.copytree(ROOT / "grpo_core" / "builtin" / "tiny", tmp_path / "converted")
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {"eos_token": "<think>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    short = {"trainer__num_steps": 1, "evaluation__num_tasks": 0, "trainer__completions_per_step": 32}
    done = here("train", "--config", "configs/tiny.yaml", *overrides(tmp_path, model__path=model, **short))
    assert done.returncode == 0, done.stderr
    assert "end-of-sequence token is '<think>', the model's '<|end|>'" in done.stdout
