"""Trace a long run: resident memory, open files, threads and child processes over 5,000 steps, and GPU memory.

    python benchmarks/soak.py [--steps 5000] [section.key=value ...]            the embedded job, on a CPU
    python benchmarks/soak.py --gpu --model FOLDER [--steps 1000] [--seconds 540]   a model on a GPU
    python benchmarks/soak.py --check                                           a few steps; records nothing

The folder for `--model` is SmolLM2-135M-Instruct as benchmarks/smollm2.py writes it. With `--seconds` the run is ended by
SIGTERM, with its checkpoint, after this time; the figures are those of the steps until then.

The job is small in each step (4 completions of up to 12 tokens) and complete otherwise: completions are logged, a reward
of a user's file runs in its own process, evaluations are every 100 and checkpoints every 50 steps. Every tenth step is
sampled when it has ended, its evaluation and checkpoint included. The law, for the samples after step 200:

- resident memory grows by less than 1 MiB per 1,000 steps (the slope of a least-squares line), here and in the children
- the largest number of open files, threads and children is the smallest
- on a GPU: allocated and reserved memory grow by less than 1 MiB per 1,000 steps

Prints one JSON line per result and adds it to results/soak.json with the keys of the other files there: bench, workload,
ours, reach, met, hardware, versions, date, and the trace, [step, value] of up to 250 samples.
"""

import argparse
import ctypes
import datetime
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUT = ROOT / "benchmarks" / "results" / "soak.json"
WARM_UP_STEPS = 200
MAX_GROWTH = 1.0  # MiB per 1,000 steps
SAMPLE_EVERY = 10
REWARDS = f"[{{name: correct_answer, args: {{strict: true}}}}, {{name: {ROOT}/examples/my_reward.py:close_answer, weight: 0.0}}]"
JOB = (
    "name=soak", "trainer.completions_per_step=4", "sampling.group_size=4", "sampling.max_new_tokens=12",
    f"rewards={REWARDS}", "evaluation.every=100", "evaluation.num_tasks=8", "checkpoint.every=50", "log.completions=true",
    "log.every=100", "engine.learning_rate=1e-5", "engine.schedule=constant",
)  # fmt: skip
GPU_JOB = (
    "lora.r=32", "data.prompt=chat", "data.max_prompt_tokens=256", "sampling.max_new_tokens=64", "trainer.completions_per_step=64", "sampling.group_size=8",
)  # fmt: skip
CHECK = ("evaluation.every=3", "evaluation.num_tasks=2", "checkpoint.every=2", "sampling.max_new_tokens=8")
MEBIBYTE = 2**20
MAX_TRACE = 250  # samples of a trace that are recorded
CONSTANT = ("open files", "threads", "children")
GROWING = {  # quantity -> what is measured, in MiB
    "memory": "resident memory", "children_memory": "resident memory of the children",
    "gpu_allocated": "GPU memory allocated", "gpu_reserved": "GPU memory reserved",
}  # fmt: skip


LIBC = ctypes.CDLL(None)


class MallInfo(ctypes.Structure):
    """The record that glibc's mallinfo2 returns, in bytes; `uordblks` and `hblkhd` are in use."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def find_descendants(process: int) -> list[int]:
    """Return the processes that `process` and its descendants have started and that still run."""
    children = []
    for task in Path(f"/proc/{process}/task").iterdir():
        children += [int(child) for child in (task / "children").read_text().split()]
    return [*children, *(each for child in children for each in find_descendants(child))]


def read_memory(process: int) -> float:
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE


def read_heap() -> float:
    """Return what malloc has handed out and not got back, in MiB; NaN without glibc 2.33.

    Resident memory that grows while this stays the same is fragmentation, and no leak.
    """
    try:
        read = LIBC.mallinfo2
    except AttributeError:
        return math.nan
    read.restype = MallInfo
    figures = read()
    return (figures.uordblks + figures.hblkhd) / MEBIBYTE


def take_sample(step: int) -> dict[str, float]:
    """Return the state of this process after `step` steps."""
    descendants = find_descendants(os.getpid())
    sample = {
        "step": step, "memory": read_memory(os.getpid()), "heap": read_heap(), "children_memory": sum(map(read_memory, descendants)),
        "open files": len(os.listdir("/proc/self/fd")) - 1,  # without the listing's own
        "threads": len(os.listdir("/proc/self/task")), "children": len(descendants),
    }  # fmt: skip
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        sample["gpu_allocated"] = torch.cuda.memory_allocated() / MEBIBYTE
        sample["gpu_reserved"] = torch.cuda.memory_reserved() / MEBIBYTE
    return sample


def judge(samples: list[dict[str, float]], warm_up: int = WARM_UP_STEPS) -> list[dict]:
    """Return one result for every quantity of the samples after `warm_up` steps: workload, ours, reach and met."""
    late = [sample for sample in samples if sample["step"] >= warm_up]
    results = []
    for key, workload in GROWING.items():
        if key in late[0]:
            growth = 1000 * statistics.linear_regression([s["step"] for s in late], [s[key] for s in late]).slope
            results.append({
                "workload": f"{workload}, MiB per 1,000 steps after step {warm_up}", "ours": growth,
                "reach": f"< {MAX_GROWTH:g}", "met": growth < MAX_GROWTH, "trace": thin(samples, key),
            })  # fmt: skip
    for key in CONSTANT:
        values = [sample[key] for sample in late]
        results.append({
            "workload": f"{key}, smallest and largest after step {warm_up}", "ours": [min(values), max(values)],
            "reach": "equal", "met": min(values) == max(values), "trace": thin(samples, key),
        })  # fmt: skip
    return results


def thin(samples: list[dict[str, float]], key: str) -> list[list[float]]:
    """Return [step, value] of up to MAX_TRACE samples, evenly spaced and with the last."""
    stride = -(-len(samples) // MAX_TRACE)
    return [[sample["step"], round(sample[key], 2)] for sample in samples[::-stride][::-1]]


def run_job(words: list[str], every: int, seconds: float | None, trace: Path | None = None) -> list[dict[str, float]]:
    """Train in this process and return a sample for every `every`-th step. Exits if the run fails.

    Every sample is also written to the file `trace` at once.
    """
    from grpo_core.commands.train import run_train
    from grpo_core.training import trainer

    samples, evaluate_save_or_stop = [], trainer.evaluate_save_or_stop

    def finish_and_sample(run, steps_taken, *arguments):
        evaluate_save_or_stop(run, steps_taken, *arguments)
        if steps_taken % every == 0:
            samples.append(take_sample(steps_taken))
            if trace is not None:
                with open(trace, "a") as file:
                    file.write(json.dumps(samples[-1]) + "\n")

    timer = threading.Timer(seconds or 0, os.kill, (os.getpid(), signal.SIGTERM))
    if seconds is not None:
        timer.daemon = True
        timer.start()
    trainer.evaluate_save_or_stop = finish_and_sample
    try:
        code = run_train(ROOT / "configs" / "tiny.yaml", words)
    finally:
        timer.cancel()
        trainer.evaluate_save_or_stop = evaluate_save_or_stop
    if code not in (0, 128 + signal.SIGTERM if seconds is not None else 0):
        sys.exit(code)
    if len(samples) < 4:
        sys.exit(f"{len(samples)} samples are too few to judge; raise --seconds or --steps")
    return samples


def report(options: argparse.Namespace, samples: list[dict[str, float]]) -> None:
    """Print one row per quantity and add it to the results."""
    import torch

    hardware = torch.cuda.get_device_name() if options.gpu else f"{os.cpu_count()} cores, {platform.machine()}"
    job = f"{options.model.name} on a GPU" if options.gpu else "the embedded job"
    for result in judge(samples, min(WARM_UP_STEPS, samples[-1]["step"] // 2)):
        row = {
            "bench": "soak", "workload": f"{job}, {samples[-1]['step']} steps: {result.pop('workload')}",
            "ours": result.pop("ours"), "peer": None, "ratio": None, "reach": result.pop("reach"), "met": result.pop("met"),
            "hardware": hardware, "versions": {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")},
            "date": datetime.date.today().isoformat(), **result,
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        if not options.check:
            with open(options.out, "a") as file:
                file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float, help="end the run after this time")
    parser.add_argument("--gpu", action="store_true", help="train the model of --model on a GPU, and sample every step")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--trace", type=Path, help="also write every sample to this file when it is taken")
    parser.add_argument("--check", action="store_true", help="take a few steps and record nothing")
    options, words = parser.parse_known_args()
    if options.gpu and options.model is None:
        parser.error("--gpu needs --model FOLDER")
    steps = options.steps or (6 if options.check else 1000 if options.gpu else 5000)
    job = [*JOB, *((*GPU_JOB, f"model.path={options.model}") if options.gpu else ()), *(CHECK if options.check else ())]
    with tempfile.TemporaryDirectory() as out:
        every = 1 if options.gpu or options.check else SAMPLE_EVERY
        samples = run_job([*job, f"output_dir={out}", f"trainer.num_steps={steps}", *words], every, options.seconds, options.trace)
    report(options, samples)


if __name__ == "__main__":
    main()
