"""Measure the parts of an update on a GPU.

    python benchmarks/update_parts.py [LABEL]
    python benchmarks/update_parts.py --check     a few short completions of the built-in model, also on a CPU; records nothing

The update is one micro-batch of 32 completions (prompts of 128 tokens, 256 new tokens, groups of 8) on a model of
Qwen2.5-1.5B's shape, and one of 4 completions. Measured are forward, backward, backward with the engine, and the engine's
step; torch.profiler counts the kernels and the calls that make the host wait. The rows are added to
results/update_parts.json with the label.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from update import GPU, gpu_job, short_job, stamp

from grpo_core.batch import TrainBatch, take
from grpo_core.config.files import load
from grpo_core.monitor.aggregates import Stats
from grpo_core.training import setup
from grpo_core.training.update import count_over_ranks, forward_with_gradient, micro_loss


def synchronize():
    """Wait for the GPU, if there is one."""
    if GPU:
        torch.cuda.synchronize()


def measure(function, times=5):
    """Return the result and the median milliseconds: `ms` until the GPU has finished, `host_ms` until the call returns."""
    durations = []
    for _ in range(times):
        synchronize()
        start = time.perf_counter()
        result = function()
        issued = time.perf_counter() - start
        synchronize()
        durations.append((time.perf_counter() - start, issued))
    seconds, issued = sorted(durations)[len(durations) // 2]
    return result, {"ms": round(1e3 * seconds, 1), "host_ms": round(1e3 * issued, 1)}


def measure_parts(run, batch, stats):
    """Return the times of the parts for one micro-batch, and what the profiler counts."""
    control, policy = run.control, run.policy
    [packing] = policy.plan(batch.rollouts)
    totals = count_over_ranks(run.objective, batch, 1)
    result = {"tokens": packing.tokens}
    with policy.training():
        tokens, result["forward"] = measure(lambda: forward_with_gradient(policy, run.objective, batch.rollouts, packing, control))
        _, result["loss"] = measure(lambda: micro_loss(run.objective, batch, tokens, totals, control, stats))

        def compute_gradient():
            tokens = forward_with_gradient(policy, run.objective, batch.rollouts, packing, control)
            return torch.autograd.grad(micro_loss(run.objective, batch, tokens, totals, control, stats), policy.parameters())

        _, result["forward and backward"] = measure(compute_gradient)

        def run_engine_backward():
            tokens = forward_with_gradient(policy, run.objective, batch.rollouts, packing, control)
            run.engine.backward(micro_loss(run.objective, batch, tokens, totals, control, stats))

        _, result["with the engine"] = measure(run_engine_backward)
        _, result["plan"] = measure(lambda: [*policy.plan(batch.rollouts)])
        _, result["engine step"] = measure(run.engine.step, 1)
        with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
            run_engine_backward()
            synchronize()
        run.engine.step()
    events = profile.key_averages()
    kernels = sorted(
        ((e.key[:70], e.count, round(e.self_device_time_total / 1e3, 2)) for e in events if e.self_device_time_total and e.device_type.name == "CUDA"),
        key=lambda e: -e[2],
    )  # fmt: skip
    result["kernels"], result["gpu_ms"] = sum(k[1] for k in kernels), round(sum(k[2] for k in kernels), 1)
    result["top"] = kernels[:14]
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    result["waits"] = {e.key: e.count for e in events if e.key in waits}
    result["host_top"] = [
        (e.key[:60], e.count, round(e.self_cpu_time_total / 1e3, 1))
        for e in sorted(events, key=lambda e: -e.self_cpu_time_total)[:12]
    ]
    return result


def main(label, check=False):
    """Set up a run, sample a batch, and measure all and 4 of its completions."""
    with tempfile.TemporaryDirectory() as folder:
        job = (short_job if check else gpu_job)(Path(os.environ.get("BENCH_FOLDER", folder)))
        overrides = [f"output_dir={folder}", f"model.path={job['model']}", f"data.path={job['data']}", "data.template='{question}'",
                     "data.eval_split=null", "evaluation.num_tasks=0", *job["overrides"]]  # fmt: skip
        config = load(ROOT / job["config"], overrides)
        run, _ = setup.setup(config)
        count = config.trainer.completions_per_step
        rollouts = run.sampler.generate(run.tasks.batch(0), config.sampling.group_size)
        rollouts = type(rollouts)(**{**rollouts.__dict__, "completions": ()})
        advantages = torch.randn(count, 1, device=rollouts.completion_ids.device)
        with torch.no_grad(), run.policy.reference():
            ref = run.policy.logprobs(rollouts)
        batch = TrainBatch(rollouts, advantages, rollouts.completion_mask, ref_logprobs=ref)
        for rows in (count, 4):
            row = {"bench": "update_parts", "label": label, "rows": rows, **measure_parts(run, take(batch, torch.arange(rows)), Stats())}
            row |= stamp()
            print(json.dumps(row), flush=True)
            if not check:
                file = ROOT / "benchmarks" / "results" / "update_parts.json"
                with open(os.environ.get("BENCH_OUT", file), "a") as output:
                    output.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--check"]
    main(words[0] if words else "now", check="--check" in sys.argv)
