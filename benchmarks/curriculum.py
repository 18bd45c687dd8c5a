"""Count the completions that the embedded job needs to reach 70 % held-out accuracy, with and without a curriculum.

    python benchmarks/curriculum.py [section.key=value ...]   5 seeds, one process each (results/curriculum.json)
    python benchmarks/curriculum.py --check                   one step with one seed; its figures mean nothing

The policy is evaluated after every step, and a run is ended when it has reached the accuracy. The workloads are the job as
shipped, and the job on its first 32 problems, so that a prompt comes up again before the accuracy is reached.
"""

import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET, PER_STEP, SEEDS = 0.70, 128, range(5)
WORKLOADS = {"the embedded job": [], "the embedded job on its first 32 problems": ["data.limit=32"]}
CURRICULUM = ["data.curriculum.rest_after=1", "data.curriculum.rest_epochs=2", "data.curriculum.prefer=[0.05, 0.95]"]
OPTIONS = ["evaluation.every=1", "checkpoint.every=0", "log.completions=false"]
SHORT = ["trainer.num_steps=1", "trainer.completions_per_step=8", "evaluation.num_tasks=4", "sampling.max_new_tokens=8"]


def count_completions(seed: int, overrides: list[str]) -> int | None:
    """Return the completions sampled until the held-out accuracy is TARGET, or None if the run ends below it."""
    with tempfile.TemporaryDirectory() as out:
        words = ["--config", str(ROOT / "configs" / "tiny.yaml"), f"output_dir={out}", f"seed={seed}", *OPTIONS, *overrides]
        job = subprocess.Popen([sys.executable, "-m", "grpo_core", "train", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
        file, reached = Path(out, "tiny", "evaluation.jsonl"), None
        while reached is None:
            is_over = job.poll() is not None
            rows = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []
            reached = next((row["step"] * PER_STEP for row in rows if row["accuracy"] >= TARGET), None)
            if is_over:
                break
            time.sleep(0.1)
        if job.poll() is None:
            job.send_signal(signal.SIGINT)
        job.wait()
        return reached


def main(seeds: range, overrides: list[str]) -> None:
    """Run all workloads and print one JSON line for each."""
    for workload, words in WORKLOADS.items():
        counts = {
            name: [count_completions(seed, [*words, *arm, *overrides]) for seed in seeds] for name, arm in (("without", []), ("with", CURRICULUM))
        }
        reached = all(None not in values for values in counts.values())
        means = {name: statistics.mean(values) for name, values in counts.items()} if reached else {"without": None, "with": None}
        ratio = means["with"] / means["without"] if reached else None
        print(json.dumps({
            "bench": "curriculum", "workload": f"completions to {TARGET:.0%}: {workload}", "ours": means["with"], "peer": means["without"],
            "ratio": ratio, "reach": "<= 0.8", "met": ratio is not None and ratio <= 0.8,
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")},
            "date": datetime.date.today().isoformat(),
            "detail": {"peer": "the same job without data.curriculum", "curriculum": CURRICULUM, "seeds": [*seeds], **counts},
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    is_check = "--check" in sys.argv[1:]
    main(range(1) if is_check else SEEDS, SHORT if is_check else sys.argv[1:])
