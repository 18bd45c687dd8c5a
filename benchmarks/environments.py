"""Run the examples with an environment and compare their figures with their aims.

    python benchmarks/environments.py                      both examples
    python benchmarks/environments.py calculator [word ...]    configs/tools_tiny.yaml
    python benchmarks/environments.py game [word ...]          configs/experiments/guessing_game.yaml and _16
    python benchmarks/environments.py [...] --check        one short step; its figures mean nothing

Each example is a supervised start and a run, typed as examples/README.md has them, in a temporary folder; the words,
section.key=value, are for the run. `evaluate` then measures the policy before and after. One JSON line per figure is printed, with the keys of
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


def run_command(folder: Path, *words: str, program: tuple[str, ...] = ("-m", "grpo_core")) -> tuple[float, float]:
    """Run `python -m grpo_core WORDS`, or another program, in `folder`; return its seconds and its CPU seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    start, cpu_start = time.perf_counter(), get_cpu_seconds()
    subprocess.run([sys.executable, *program, *words], cwd=folder, env=environment, check=True, stdout=sys.stderr)
    return time.perf_counter() - start, get_cpu_seconds() - cpu_start


def get_cpu_seconds() -> float:
    """Return the CPU seconds of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def evaluate(folder: Path, run: str, *words: str) -> dict:
    """Return what evaluate.json holds on a run, or a model, and the model that it began with."""
    run_command(folder, "evaluate", run, "--output", "evaluated", *words)
    return json.loads((folder / "evaluated" / "evaluate.json").read_text())


def report(workload: str, ours: float, reach: str | None, met: bool | None, detail: dict) -> None:
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
        with_tool = evaluate(folder, "runs/tools_tiny", "--samples", "0", *limit)
        without = evaluate(folder, "runs/tools_tiny", "--samples", "0", *limit, "environment.name=null", "sampling.stop=[]")
    rows = {"with the calculator": with_tool, "without it": without}
    detail = {
        f"{when}, {name}": row[side]["greedy"] for name, row in rows.items() for when, side in (("before", "base"), ("after", "policy"))
    }
    gain = with_tool["policy"]["greedy"]["value"] - with_tool["base"]["greedy"]["value"]
    report("calculator: accuracy gained, with the calculator", gain, ">= 0.40", gain >= 0.40, detail)
    detail = {"sft": sft[1], "train": train[1], "sft, clock": sft[0], "train, clock": train[0], "load": os.getloadavg()}
    report("calculator: CPU seconds of sft and train", sft[1] + train[1], "<= 300", sft[1] + train[1] <= 300, detail)


def measure_game(words: list[str], is_check: bool) -> None:
    """Train configs/experiments/guessing_game.yaml and _16, and count the guesses of all 100 numbers, before and after."""
    short, limit = (SHORT, ["--limit", "4"]) if is_check else ([], [])
    start, first, second = (str(ROOT / "configs" / "experiments" / f"guessing_game{end}.yaml") for end in ("_sft", "", "_16"))
    game = ["--samples", "1" if is_check else "8", *limit, "environment.max_turns=30"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_command(folder, "runs/guessing_game", program=(str(ROOT / "examples" / "guessing_game.py"),))
        sft = run_command(folder, "sft", "--config", start, *short)
        stages = [run_command(folder, "train", "--config", config, *short, *words) for config in (first, second)]
        before = evaluate(folder, "runs/experiments/guessing_game_sft/model", "--config", second, *game)["policy"]
        after = evaluate(folder, "runs/experiments/guessing_game_16", *game)["policy"]
    train = [sum(seconds) for seconds in zip(*stages, strict=True)]
    guesses = after["turns"]["value"]
    detail = {"before": before["turns"], "after": after["turns"]}
    report("guessing game: guesses, mean of 100 numbers", guesses, "<= 9", guesses <= 9 and before["turns"]["value"] >= 15, detail)
    detail = {"sft": sft[1], "train": train[1], "sft, clock": sft[0], "train, clock": train[0], "load": os.getloadavg()}
    report("guessing game: CPU seconds of sft and train", sft[1] + train[1], None, None, detail)


EXAMPLES = {"calculator": measure_calculator, "game": measure_game}

if __name__ == "__main__":
    check, typed = "--check" in sys.argv[1:], [word for word in sys.argv[1:] if word != "--check"]
    if typed and typed[0] not in EXAMPLES:
        sys.exit(f"the first word is {typed[0]!r}; it must be one of {', '.join(EXAMPLES)}")
    for name in typed[:1] or EXAMPLES:
        EXAMPLES[name](typed[1:], check)
