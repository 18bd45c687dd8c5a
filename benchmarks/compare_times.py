"""Time the start of the embedded job, or the tests, in two clones of this repository, one after the other.

    python benchmarks/compare_times.py start OLD_CLONE NEW_CLONE [PAIRS]
    python benchmarks/compare_times.py tests OLD_CLONE NEW_CLONE

`start` is the time from `bash launch.sh 2` to the end of the first step, its evaluation of 500 problems included, as the
median of PAIRS (default 3) alternating runs. `tests` is one run of `bash tests/run.sh` in each clone. Both need an active
environment that has the dependencies. The output is one JSON line with the keys of the files in benchmarks/results.
"""

import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REACHES = {"start": 0.6, "tests": 0.4}  # the new clone's time / the old clone's


def measure_start(clone: Path) -> float:
    """Return the seconds from the command to the end of the first step."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        command = ["bash", "launch.sh", "2", "trainer.num_steps=1", f"output_dir={folder}"]
        subprocess.run(command, cwd=clone, check=True, capture_output=True)
        return (Path(folder) / "tiny" / "metrics.jsonl").stat().st_mtime - begin


def measure_tests(clone: Path) -> float:
    """Return the seconds that the tests take; a failing test is reported and does not end the measurement."""
    begin = time.time()
    done = subprocess.run(["bash", "tests/run.sh"], cwd=clone, capture_output=True, text=True)
    print(done.stdout.strip().splitlines()[-1], file=sys.stderr)
    return time.time() - begin


def main(what: str, old: str, new: str, pairs: str = "3") -> None:
    """Measure and print one row."""
    measure = {"start": measure_start, "tests": measure_tests}[what]
    seconds, cpu = {old: [], new: []}, {old: [], new: []}
    for _ in range(int(pairs) if what == "start" else 1):
        for clone in (old, new):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds[clone].append(measure(Path(clone)))
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu[clone].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    ours, peer = (statistics.median(seconds[clone]) for clone in (new, old))
    row = {
        "bench": "compare_times", "workload": what, "ours": ours, "peer": peer, "ratio": ours / peer,
        "reach": REACHES[what], "met": ours / peer <= REACHES[what],
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}", "date": datetime.date.today().isoformat(),
        "detail": {"seconds": [seconds[old], seconds[new]], "cpu_seconds": [cpu[old], cpu[new]]},
    }  # fmt: skip
    print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
