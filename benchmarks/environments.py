"""Run the examples with an environment and compare their figures with their aims.

    python benchmarks/environments.py [section.key=value ...]    the calculator, configs/tools_tiny.yaml
    python benchmarks/environments.py --check                    one short step; its figures mean nothing

Each example is a supervised start and a run, typed as examples/README.md has them, in a temporary folder; the words are
for the run. `evaluate` then measures the policy before and after. One JSON line per figure is printed, with the keys of
the files in benchmarks/results. Each process has one thread, so that its CPU seconds bound its seconds on a free machine.
"""

import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = ["trainer.num_steps=1", "trainer.completions_per_step=8", "evaluation.num_tasks=4", "log.evaluation_completions=0"]


def run_command(folder: Path, *words: str) -> tuple[float, float]:
    """Run `python -m grpo_core WORDS` in `folder`; return its seconds and its CPU seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    start, cpu_start = time.perf_counter(), get_cpu_seconds()
    subprocess.run([sys.executable, "-m", "grpo_core", *words], cwd=folder, env=environment, check=True, stdout=sys.stderr)
    return time.perf_counter() - start, get_cpu_seconds() - cpu_start


def get_cpu_seconds() -> float:
    """Return the CPU seconds of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def evaluate(folder: Path, run: str, *words: str) -> dict:
    """Return what evaluate.json holds on the greedy answers of a run and of the model that it began with."""
    run_command(folder, "evaluate", run, "--samples", "0", "--output", "evaluated", *words)
    return json.loads((folder / "evaluated" / "evaluate.json").read_text())


def report(workload: str, ours: float, reach: str, met: bool | None, detail: dict) -> None:
    """Print one figure as a JSON line."""
    row = {
        "bench": "environments", "workload": workload, "ours": ours, "peer": None, "ratio": None, "reach": reach, "met": met,
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")},
        "date": datetime.date.today().isoformat(), "detail": detail,
    }  # fmt: skip
    print(json.dumps(row), flush=True)


def measure_calculator(words: list[str], is_check: bool) -> None:
    """Train configs/tools_tiny.yaml, and measure the policy with and without the calculator, before and after."""
    short, limit = (SHORT, ["--limit", "4"]) if is_check else ([], [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sft = run_command(folder, "sft", "--config", "tools_tiny_sft", *short)
        train = run_command(folder, "train", "--config", "tools_tiny", *short, *words)
        with_tool = evaluate(folder, "runs/tools_tiny", *limit)
        without = evaluate(folder, "runs/tools_tiny", *limit, "environment.name=null", "sampling.stop=[]")
    rows = {"with the calculator": with_tool, "without it": without}
    detail = {
        f"{when}, {name}": row[side]["greedy"] for name, row in rows.items() for when, side in (("before", "base"), ("after", "policy"))
    }
    gain = with_tool["policy"]["greedy"]["value"] - with_tool["base"]["greedy"]["value"]
    report("calculator: accuracy gained, with the calculator", gain, ">= 0.40", gain >= 0.40, detail)
    detail = {"sft": sft[1], "train": train[1], "sft, clock": sft[0], "train, clock": train[0], "load": os.getloadavg()}
    report("calculator: CPU seconds of sft and train", sft[1] + train[1], "<= 300", sft[1] + train[1] <= 300, detail)


if __name__ == "__main__":
    check = "--check" in sys.argv[1:]
    measure_calculator([] if check else sys.argv[1:], check)
