"""What a loss costs on the CPU: [64, 1024] float32, one thread; milliseconds, the fastest of 20.

python benchmarks/losses.py
"""

import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from grpo_core.objective.losses import LOSSES

SHAPE = (64, 1024)
RESULTS = Path(__file__).parent / "results" / "losses.json"
REACH_MS, REACH_IMPORT_S = 5.0, 1.5


def fastest(function, times=20) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


def import_seconds(module: str) -> float:
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    run = [sys.executable, "-c", code]
    return min(float(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for _ in range(5))


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(SHAPE, generator=generator) * 3
    logprobs = old + 0.1 * torch.randn(SHAPE, generator=generator)
    mask = torch.arange(SHAPE[1]) < torch.randint(1, SHAPE[1], (SHAPE[0], 1), generator=generator)
    advantages = torch.randn(SHAPE[0], 1, generator=generator)
    rows = []
    for name in LOSSES.functions:
        loss_fn = LOSSES.get(name)

        def both(loss_fn=loss_fn):
            x = logprobs.detach().requires_grad_()
            (loss_fn(x, old, advantages, mask).per_token_loss * mask).sum().backward()

        forward = fastest(lambda loss_fn=loss_fn: loss_fn(logprobs, old, advantages, mask))
        row = {"workload": name, "ours": round(forward, 2), "with_backward": round(fastest(both), 2), "unit": "ms"}
        rows.append(row | {"reach": REACH_MS, "met": forward < REACH_MS})
    for module in ("torch", "grpo_core.objective.losses"):
        seconds = import_seconds(module)
        rows.append({"workload": f"import {module}", "ours": round(seconds, 2), "unit": "s"})
        if module != "torch":
            rows[-1] |= {"reach": REACH_IMPORT_S, "met": seconds < REACH_IMPORT_S}
    common = {
        "bench": "losses", "hardware": f"{platform.machine()} CPU, 1 thread", "date": str(date.today()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w") as file:
        for row in rows:
            print(json.dumps(row))
            file.write(json.dumps({**common, **row}) + "\n")


if __name__ == "__main__":
    main()
