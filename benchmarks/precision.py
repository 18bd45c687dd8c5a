"""Compare precisions of the base model and of LoRA: the embedded job, 200 steps, in three ways.

    python benchmarks/precision.py [--steps 200] [WAY ...]
    python benchmarks/precision.py --check        one short step in each way; records nothing

fp32       base and LoRA in float32: the reference of the comparison
bf16       base and LoRA in bf16; DeepSpeed's bf16 block keeps float32 master weights of LoRA
mixed      base in bf16, LoRA in float32, without the block

Prints one row per way and adds it to results/precision.json: mean reward and KL of the last 20 steps, held-out accuracy,
seconds per step, the largest gap between the log-probs of sampler and trainer, and the relative distance of the final
adapter from that of the first way.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from grpo_core.config.files import load
from grpo_core.model.policy import load_policy
from grpo_core.training import resume, setup
from grpo_core.training.prepare import prepare
from grpo_core.training.trainer import train

OUT = ROOT / "benchmarks" / "results" / "precision.json"
SHORT = ["trainer.completions_per_step=16", "evaluation.num_tasks=8", "sampling.max_new_tokens=8"]


def run_way(way: str, steps: int, overrides: list[str]) -> tuple[dict, torch.Tensor]:
    """Train in one way; return its row and the final adapter as one float32 vector."""
    with tempfile.TemporaryDirectory() as out:
        config = load(
            ROOT / "configs" / "tiny.yaml", [f"trainer.num_steps={steps}", f"output_dir={out}", f"name={way}", "checkpoint.every=0", *overrides]
        )
        config = replace(config, model=replace(config.model, precision="fp32" if way != "bf16" else "bf16"))
        dtype = setup.initialise_process(config)
        start, prepared = resume.find_and_lock_start(config), prepare(config)
        base = torch.float32 if way == "fp32" else torch.bfloat16
        torch.manual_seed(0)
        policy = load_policy(config.model, config.lora, dtype=base, temperature=1.0)
        for parameter in policy.parameters():
            parameter.data = parameter.data.to(dtype)
        run = setup.build_run(config, start, policy, prepared, config.prompts_per_step, dtype)
        train(run)
        run.log.close()
        rows, evaluations = (
            [json.loads(line) for line in (Path(out) / way / f"{name}.jsonl").read_text().splitlines()]
            for name in ("metrics", "evaluation")
        )
    weights = torch.cat([p.detach().float().flatten().cpu() for p in policy.parameters()])
    last = rows[-20:]
    return {
        "bench": "precision", "way": way, "steps": steps,
        "reward_last_20": statistics.mean(row["reward"] for row in last),
        "accuracy": [row["accuracy"] for row in evaluations], "kl_last_20": statistics.mean(row["kl"] for row in last),
        "seconds_a_step": statistics.median(row["seconds"] for row in rows[1:]),
        "update_seconds": statistics.median(row["seconds/update"] for row in rows[1:]),
        "logprob_gap_max": max(row["logprob_gap_max"] for row in rows), "grad_norm_first": rows[0]["grad_norm"],
        "adapter_norm": float(weights.norm()),
    }, weights  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--check", action="store_true", help="take one short step in each way and record nothing")
    parser.add_argument("ways", nargs="*", default=["fp32", "bf16", "mixed"])
    options, reference = parser.parse_args(), None
    if options.check:
        options.steps, options.out = 2, Path(os.devnull)
    for way in options.ways:
        row, weights = run_way(way, options.steps, SHORT if options.check else [])
        reference = weights if reference is None else reference
        hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        row |= {"distance": float((weights - reference).norm() / reference.norm()), "hardware": hardware}
        row |= {"versions": {n: version(n) for n in ("torch", "peft", "deepspeed")}, "date": datetime.date.today().isoformat()}
        print(json.dumps(row), flush=True)
        with open(options.out, "a") as file:
            file.write(json.dumps(row) + "\n")
