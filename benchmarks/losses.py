"""Measure the cost of every loss on the CPU: [64, 1024] float32, one thread, milliseconds, the fastest of 20 calls.

    python benchmarks/losses.py
    python benchmarks/losses.py --check           small tensors, one call of every loss; records nothing
"""

import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from grpo_core.objective.laws import call
from grpo_core.objective.losses import LOSSES

SHAPE = (64, 1024)
RESULTS = Path(__file__).parent / "results" / "losses.json"
REACH_MS, REACH_IMPORT_S = 5.0, 1.5


def measure_fastest(function, times=20) -> float:
    """Return the milliseconds of the fastest of `times` calls."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


def measure_import(module: str) -> float:
    """Return the seconds of the fastest of 5 imports of the module, each in a new process."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", code]
    return min(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(5))


def main(shape=SHAPE, times=20, modules=("torch", "grpo_core.objective.losses")) -> list[dict]:
    """Measure every loss and the imports of the modules, and return the rows."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(shape, generator=generator) * 3
    logprobs = old + 0.1 * torch.randn(shape, generator=generator)
    mask = torch.arange(shape[1]) < torch.randint(1, shape[1], (shape[0], 1), generator=generator)
    advantages = torch.randn(shape[0], 1, generator=generator)
    rows, selected = [], torch.zeros_like(mask)
    for name in LOSSES.functions:
        loss_fn = LOSSES.get(name)

        def forward_and_backward(loss_fn=loss_fn):
            x = logprobs.detach().requires_grad_()
            (call(loss_fn, x, old, advantages, mask, selected).per_token_loss * mask).sum().backward()

        forward = measure_fastest(lambda loss_fn=loss_fn: call(loss_fn, logprobs, old, advantages, mask, selected), times)
        row = {"workload": name, "ours": round(forward, 2), "with_backward": round(measure_fastest(forward_and_backward, times), 2), "unit": "ms"}
        rows.append(row | {"reach": REACH_MS, "met": forward < REACH_MS})
    for module in modules:
        seconds = measure_import(module)
        rows.append({"workload": f"import {module}", "ours": round(seconds, 2), "unit": "s"})
        if module != "torch":
            rows[-1] |= {"reach": REACH_IMPORT_S, "met": seconds < REACH_IMPORT_S}
    common = {
        "bench": "losses", "hardware": f"{platform.machine()} CPU, 1 thread", "date": str(date.today()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    for row in rows:
        print(json.dumps(row))
    return [common | row for row in rows]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        main((4, 8), times=1, modules=())
    else:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in main()))
