"""Every run of docs/results, from the weights and the data to run folders.

    python benchmarks/experiments.py [NAME ...] [--gpus N] [--limit SECONDS] [--list]

Needs smollm2/, a folder with SmolLM2-135M-Instruct, and gsm8k/train.jsonl and test.jsonl here; TRL for its own part. An
experiment is a chain of commands, as they stand on the page; each GPU takes the next chain when it has ended one, and
chains that need two run at the end. What a command prints is in runs/experiments/logs. After --limit seconds none begins
and the running ones are asked to stop, which leaves a checkpoint. The same command again leaves out what has ended well
and goes on with the rest.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = "runs/experiments"
TRAIN = "python3 -m grpo_core train --config configs/experiments"
SFT = "python3 -m grpo_core sft --config configs/experiments"
EVALUATE = "python3 -m grpo_core evaluate"
TRL = "python3 benchmarks/learning.py"
GSM8K = "gsm8k"  # of three, by the held-out training questions
OTHERS_HELD_OUT = "data.path=gsm8k/train.jsonl data.eval_path=null"  # 500 that evaluation itself takes away
SMALLER = "trainer.tokens_per_micro_batch=16000"


def earlier_start(epochs, words):
    """The supervised start of what GSM8K's settings were chosen from, and its model."""
    name = f"gsm8k_earlier_sft_{epochs}"
    return f"{SFT}/gsm8k_sft.yaml name={name} trainer.epochs={epochs} {words}", f"python3 -m grpo_core export {RUNS}/{name}"


def earlier(epochs, rate, steps, words):
    begun = f"name=gsm8k_earlier_{epochs}_{rate} model.path={RUNS}/gsm8k_earlier_sft_{epochs}/export"
    return f"{TRAIN}/gsm8k.yaml {begun} engine.learning_rate={rate} trainer.num_steps={steps} {words}"


CHAINS = {
    "word_problems": [
        f"{TRAIN}/word_problems.yaml",
        f"{EVALUATE} {RUNS}/word_problems --limit 1000",
        f"python3 -m grpo_core export {RUNS}/word_problems",
        f"{TRAIN}/reward_hacking.yaml",
        f"{EVALUATE} {RUNS}/reward_hacking --limit 500 --samples 0",
    ],
    **{
        f"tried_{temperature}_{rate}": [
            f"{TRAIN}/word_problems.yaml name=tried_{temperature}_{rate} seed=11 sampling.temperature={temperature} "
            f"engine.learning_rate={rate} trainer.num_steps={steps} evaluation.every=25 trainer.tokens_per_micro_batch=24000"
        ]
        for temperature, rate, steps in (("0.7", "6e-4", 300), ("1.0", "3e-4", 250), ("1.0", "6e-4", 300), ("1.0", "1e-3", 300))
    },
    "gsm8k": [
        "python3 configs/experiments/gsm8k_files.py",
        f"{SFT}/gsm8k_sft.yaml",
        f"python3 -m grpo_core export {RUNS}/gsm8k_sft",
        f"{TRAIN}/gsm8k.yaml",
        f"{SFT}/gsm8k_drills_sft.yaml",
        f"python3 -m grpo_core export {RUNS}/gsm8k_drills_sft",
        f"{TRAIN}/gsm8k_drills.yaml",
        f"{TRAIN}/gsm8k_calculations.yaml",
        f"{EVALUATE} {RUNS}/{GSM8K} --data gsm8k/test.jsonl",
        f"{EVALUATE} smollm2 --config configs/experiments/gsm8k.yaml --data gsm8k/test.jsonl --output {RUNS}/gsm8k_base/evaluate-test",
    ],
    "gsm8k_earlier": [
        *earlier_start(2, "seed=11"),
        *earlier_start(4, "seed=11"),
        *earlier_start(8, "seed=11"),
        *earlier_start(6, OTHERS_HELD_OUT),
        earlier(2, "1e-4", 30, f"seed=11 {SMALLER}"),
        earlier(2, "2e-4", 30, f"seed=11 {SMALLER}"),
        earlier(4, "2e-4", 100, f"seed=11 {SMALLER}"),
        earlier(6, "3e-4", 120, f"engine.schedule=cosine {OTHERS_HELD_OUT}"),
        earlier(6, "7e-5", 90, OTHERS_HELD_OUT),
    ],
    **{f"variants_{name}": [f"python3 benchmarks/variants.py {name}"] for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "one_step")},
    **{
        f"against_trl_{seed}": [
            f"{TRAIN}/against_trl.yaml name=against_trl_{seed} seed={seed}",
            f"{TRL} {RUNS}/against_trl_{seed}/trl.jsonl --config configs/experiments/against_trl.yaml --micro-batch 256 seed={seed}",
        ]
        for seed in (0, 1, 2)
    },
}  # fmt: skip
AGAIN = {  # what stands behind a command that was begun before
    TRAIN: "resume=auto", "python3 benchmarks/variants.py": "resume=auto", "bash launch.sh": "resume=auto",
    SFT: "overwrite=true",
}  # fmt: skip
ON_TWO = {  # one after the other, beside nothing else
    "two_gpus": [f"{TRAIN}/one_gpu.yaml", "bash launch.sh 2 --config configs/experiments/one_gpu.yaml name=two_gpus"]
}


def run(chain, commands, gpus, end, logs):
    """One command after the other, until one fails or time is up; a line of JSON for each."""
    for number, command in enumerate(commands):
        output, done = logs / f"{chain}-{number}.log", logs / f"{chain}-{number}.done"
        if done.exists():
            continue
        if output.exists():
            command = " ".join([command, *(words for begin, words in AGAIN.items() if command.startswith(begin))])
        left, start = end - time.time(), time.time()
        if left < 5:
            return say(chain=chain, command=command, skipped="no time is left")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        with output.open("a") as log:
            started = subprocess.Popen(
                ["bash", "-c", command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = started.wait(left)
            except subprocess.TimeoutExpired:
                code = stop(started)
        say(chain=chain, command=command, exit_code=code, seconds=round(time.time() - start, 1))
        if code:
            return None
        done.touch()


def stop(started):
    """SIGTERM, which ends a run with a checkpoint; after 20 s SIGKILL."""
    os.killpg(started.pid, signal.SIGTERM)
    try:
        return started.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        return started.wait()


def say(**row):
    print(json.dumps(row), flush=True)


def lane(gpu, waiting, end, logs):
    while True:
        try:
            chain, commands = waiting.get_nowait()
        except queue.Empty:
            return
        run(chain, commands, str(gpu), end, logs)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[*CHAINS, *ON_TWO, []])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1e9)
    parser.add_argument("--list", action="store_true", help="The commands, and nothing is run.")
    given = parser.parse_args()
    chosen = given.names or [*CHAINS, *ON_TWO]
    if given.list:
        print("\n".join(command for name in chosen for command in (CHAINS | ON_TWO)[name]))
        return
    logs, end, waiting = ROOT / RUNS / "logs", time.time() + given.limit, queue.Queue()
    logs.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        if name in CHAINS:
            waiting.put((name, CHAINS[name]))
    lanes = [threading.Thread(target=lane, args=(gpu, waiting, end, logs)) for gpu in range(given.gpus)]
    for one in lanes:
        one.start()
    for one in lanes:
        one.join()
    for name in chosen:
        if name in ON_TWO and given.gpus > 1:
            run(name, ON_TWO[name], "0,1", end, logs)


if __name__ == "__main__":
    sys.exit(main())
