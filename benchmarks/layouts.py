"""Measure an update with two layouts and three sizes of its micro-batches, on one GPU.

    python benchmarks/layouts.py [--out FILE] [section.key=value ...]         all six cases, each in its own process
    python benchmarks/layouts.py --check                                      one short case with the built-in model
    python benchmarks/layouts.py one LAYOUT TOKENS [section.key=value ...]    one case in this process

The job is that of docs/results, part 5, and needs smollm2/. Two texts hardly ever have the same reward, so no group is
tied and skipped, and every run does the same work up to the lengths of the completions.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
CASES = [(layout, tokens) for layout in ("rows", "segments") for tokens in (32_768, 65_536, 131_072)]
JOB = [
    "name=layouts", "trainer.num_steps=5", "evaluation.every=0", "evaluation.num_tasks=0", "sampling.max_new_tokens=32",
    "truncation={name: keep}", "rewards=[benchmarks/update.py:pseudo_reward]", "log.every=1",
]  # fmt: skip

SHORT = [
    "model.path=builtin:tiny", "data.prompt=template", "trainer.num_steps=2", "trainer.completions_per_step=16",
    "sampling.group_size=4", "sampling.max_new_tokens=8",
]  # fmt: skip


def measure(layout: str, tokens: int, overrides: list[str]) -> dict:
    """Return seconds and memory of the update, medians over the steps after the first."""
    from update import stamp

    from grpo_core import load_config, train
    from grpo_core.model import memory, packed_attention

    find_layout = packed_attention.find_layout
    packed_attention.find_layout = lambda *arguments: find_layout(*arguments) and layout  # the call installs the attention
    memory.MAX_TRIED_TOKENS = tokens
    with tempfile.TemporaryDirectory() as folder:
        run = train(load_config(ROOT / "configs" / "experiments" / "one_gpu.yaml", [*JOB, *overrides, f"output_dir={folder}"]))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    names = ("seconds/update", "micro_batches", "tokens_updated", "memory_gb/update", "peak_memory_gb", "memory_retries")
    medians = {name: round(statistics.median(row[name] for row in rows), 3) for name in names if name in rows[0]}
    return {"bench": "layouts", "layout": layout, "most_tokens": tokens, **medians, **stamp()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "layouts.json")
    parser.add_argument("--check", action="store_true", help="measure one short case and record nothing")
    options = parser.parse_intermixed_args()
    if options.check:
        print(json.dumps(measure(*CASES[0], SHORT)))
        return
    if options.words[:1] == ["one"]:
        print(json.dumps(measure(options.words[1], int(options.words[2]), options.words[3:])))
        return
    rows = []
    for layout, tokens in CASES:
        command = [sys.executable, __file__, "one", layout, str(tokens), *options.words]
        process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(process.stdout.splitlines()[-1])
        print(rows[-1], flush=True)
    options.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
