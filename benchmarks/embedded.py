"""Compare the embedded job with its aims: accuracy before and after training, seconds, seconds to the first step.

    python benchmarks/embedded.py [PROCESSES] [section.key=value ...]
    python benchmarks/embedded.py --check         one short step in one process; its figures mean nothing

Runs `bash launch.sh` in an environment that already has the dependencies, and prints one JSON line per figure with the
keys of the files in benchmarks/results: bench, workload, ours, peer, ratio, reach (the aim), met, hardware, versions, date.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = ["trainer.num_steps=1", "trainer.completions_per_step=8", "evaluation.num_tasks=4", "sampling.max_new_tokens=8"]


def main(processes: str, overrides: list[str]) -> None:
    """Run the job in a temporary folder and report its figures."""
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        command = ["bash", str(ROOT / "launch.sh"), processes, f"output_dir={out}", *overrides]
        job = subprocess.Popen(command, cwd=ROOT)
        first_step_end = None
        while job.poll() is None:
            if first_step_end is None and Path(out, "tiny", "metrics.jsonl").exists():
                first_step_end = time.perf_counter() - start
            time.sleep(0.02)
        total = time.perf_counter() - start
        if job.returncode:
            sys.exit(job.returncode)
        folder = Path(out, "tiny")
        rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, after = rows[0], rows[-1]
    gain = after["accuracy"] - before["accuracy"]
    think_key = "rewards/has_think_tags"
    report("accuracy before", before["accuracy"], "0.08 to 0.40", 0.08 <= before["accuracy"] <= 0.40, before)
    report("accuracy gained", gain, ">= 0.40", gain >= 0.40, after)
    report("share that thinks, first and last step", [steps[0][think_key], steps[-1][think_key]], "", True)
    report("seconds in all", total, "<= 240", total <= 240)
    first_step_begin = first_step_end - (steps[0]["seconds"] - steps[0]["seconds/evaluate"])
    report("seconds until the first step begins, the evaluation before it included", first_step_begin, "<= 15", first_step_begin <= 15)


def report(workload: str, ours, reach: str, met: bool, detail: dict | None = None) -> None:
    """Print one figure as a JSON line."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")}
    row = {
        "bench": "embedded", "workload": workload, "ours": ours, "peer": None, "ratio": None,
        "reach": reach, "met": met,
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}", "versions": versions,
        "date": datetime.date.today().isoformat(), **({"detail": detail} if detail else {}),
    }  # fmt: skip
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    arguments = ["1", *SHORT] if "--check" in sys.argv[1:] else sys.argv[1:]
    processes = arguments.pop(0) if arguments and arguments[0].isdigit() else "2"
    main(processes, arguments)
