"""Run every experiment of docs/results, from the weights and the data to run folders.

    python benchmarks/experiments.py [NAME ...] [--gpus N] [--limit SECONDS] [--list]

Needs, in the root folder of the repository, smollm2/ with SmolLM2-135M-Instruct and gsm8k/ with train.jsonl and
test.jsonl. The comparison with TRL also needs TRL.

An experiment is a chain of commands; docs/results lists them. Each GPU takes the next chain when it has finished one.
Chains that need two GPUs run at the end. The output of the commands is written to runs/experiments/logs. After --limit
seconds no command starts, and the running ones are asked to stop, which writes a checkpoint. When this script is started
again, it skips the commands that ended with exit code 0, and resumes or repeats the others.
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
GSM8K = "gsm8k"  # chosen among three runs by the held-out training questions
HELD_OUT_BY_RUN = "data.path=gsm8k/train.jsonl data.eval_path=null"  # the run itself holds out 500 training questions
SMALL_MICRO_BATCHES = "trainer.tokens_per_micro_batch=16000"


def make_earlier_sft(epochs, overrides):
    """Return the commands of a supervised start for the runs by which GSM8K's settings were chosen: train and export."""
    name = f"gsm8k_earlier_sft_{epochs}"
    return f"{SFT}/gsm8k_sft.yaml name={name} trainer.epochs={epochs} {overrides}", f"python3 -m grpo_core export {RUNS}/{name}"


def make_earlier_grpo(epochs, rate, steps, overrides):
    """Return the command of a GRPO run that begins with the supervised start of `epochs` epochs."""
    start = f"name=gsm8k_earlier_{epochs}_{rate} model.path={RUNS}/gsm8k_earlier_sft_{epochs}/export"
    return f"{TRAIN}/gsm8k.yaml {start} engine.learning_rate={rate} trainer.num_steps={steps} {overrides}"


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
        *make_earlier_sft(2, "seed=11"),
        *make_earlier_sft(4, "seed=11"),
        *make_earlier_sft(8, "seed=11"),
        *make_earlier_sft(6, HELD_OUT_BY_RUN),
        make_earlier_grpo(2, "1e-4", 30, f"seed=11 {SMALL_MICRO_BATCHES}"),
        make_earlier_grpo(2, "2e-4", 30, f"seed=11 {SMALL_MICRO_BATCHES}"),
        make_earlier_grpo(4, "2e-4", 100, f"seed=11 {SMALL_MICRO_BATCHES}"),
        make_earlier_grpo(6, "3e-4", 120, f"engine.schedule=cosine {HELD_OUT_BY_RUN}"),
        make_earlier_grpo(6, "7e-5", 90, HELD_OUT_BY_RUN),
    ],
    "reversed_words": [f"{SFT}/reversed_words_sft.yaml", f"{TRAIN}/reversed_words.yaml"],  # needs reasoning-gym, and no GPU
    "variants": ["python3 -m grpo_core study configs/experiments/variants.yaml --jobs 3"],
    **{
        f"against_trl_{seed}": [
            f"{TRAIN}/against_trl.yaml name=against_trl_{seed} seed={seed}",
            f"{TRL} {RUNS}/against_trl_{seed}/trl.jsonl --config configs/experiments/against_trl.yaml --micro-batch 256 seed={seed}",
        ]
        for seed in (0, 1, 2)
    },
}  # fmt: skip
RESTART_WORDS = {  # the beginning of a command -> the words that are added if the command has been started before
    TRAIN: "resume=auto", "bash launch.sh": "resume=auto", SFT: "overwrite=true",
}  # fmt: skip
TWO_GPU_CHAINS = {  # run one after the other while nothing else runs
    "two_gpus": [f"{TRAIN}/one_gpu.yaml", "bash launch.sh 2 --config configs/experiments/one_gpu.yaml name=two_gpus"]
}


def run(chain, commands, gpus, deadline, logs):
    """Run the commands one after the other until one fails or `deadline` is reached. Prints a line of JSON for each."""
    for number, command in enumerate(commands):
        log_file, done_file = logs / f"{chain}-{number}.log", logs / f"{chain}-{number}.done"
        if done_file.exists():
            continue
        if log_file.exists():
            command = " ".join([command, *(words for prefix, words in RESTART_WORDS.items() if command.startswith(prefix))])
        seconds_left, start = deadline - time.time(), time.time()
        if seconds_left < 5:
            return print_row(chain=chain, command=command, skipped="no time is left")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        with log_file.open("a") as log:
            process = subprocess.Popen(
                ["bash", "-c", command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(seconds_left)
            except subprocess.TimeoutExpired:
                code = stop(process)
        print_row(chain=chain, command=command, exit_code=code, seconds=round(time.time() - start, 1))
        if code:
            return None
        done_file.touch()


def stop(process):
    """Send SIGTERM, at which a run writes a checkpoint and ends; after 20 s send SIGKILL. Return the exit code."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def print_row(**row):
    print(json.dumps(row), flush=True)


def run_chains(gpu, waiting, deadline, logs):
    """Run chains from the queue `waiting` on one GPU until the queue is empty."""
    while True:
        try:
            chain, commands = waiting.get_nowait()
        except queue.Empty:
            return
        run(chain, commands, str(gpu), deadline, logs)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[*CHAINS, *TWO_GPU_CHAINS, []])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1e9)
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args()
    chosen = options.names or [*CHAINS, *TWO_GPU_CHAINS]
    if options.list:
        print("\n".join(command for name in chosen for command in (CHAINS | TWO_GPU_CHAINS)[name]))
        return
    logs, deadline, waiting = ROOT / RUNS / "logs", time.time() + options.limit, queue.Queue()
    logs.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        if name in CHAINS:
            waiting.put((name, CHAINS[name]))
    threads = [threading.Thread(target=run_chains, args=(gpu, waiting, deadline, logs)) for gpu in range(options.gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in chosen:
        if name in TWO_GPU_CHAINS and options.gpus > 1:
            run(name, TWO_GPU_CHAINS[name], "0,1", deadline, logs)


if __name__ == "__main__":
    sys.exit(main())
