"""Time the kernels of mixtures of experts on a GPU against their floor: Qwen3-30B-A3B's and gpt-oss-20b's shapes, bf16, random data.

    python benchmarks/experts.py [--out FILE]             the kernels of one layer, with the blocks of expert_kernels.py
    python benchmarks/experts.py --tune [--out FILE]      the products with a list of blocks; prints the best of each
    python benchmarks/experts.py --check                  every part once, with small shapes on any machine; records nothing

Every result is a JSON line: the microseconds of a call, the median over replays of a CUDA graph, and their ratio to the floor, the time
to read the weights that the call needs at the bandwidth of a copy on the same card. Calls take turns with four choices of experts. Rows
prefer the same experts ("skewed", as with random weights of a model: about 38 of 128 for 32 rows), or not ("even"). `--tune` compiles
in several processes first. Each part has a time limit, and what it did not reach is left out.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from grpo_core.sampling.expert_ops import ExpertWeights, Gating, Routing, choose_experts, mix_experts

# name -> (experts, experts of a row, hidden, inner, routing, options of ExpertWeights)
SHAPES = {
    "qwen3_30b_a3b": (128, 8, 2048, 768, Routing(8, True), {}),
    "gpt_oss_20b": (32, 4, 2880, 2880, Routing(4, True), {"is_transposed": True, "is_interleaved": True, "gating": Gating("silu", 1.702, 7.0, 1.0)}),
}  # fmt: skip
SMALL = {"small": (8, 2, 32, 48, Routing(2, True), {})}
ROWS = (8, 32, 64, 256)
SKEW = {"skewed": 1.5, "even": 0.0}  # deviation of what all rows' logits share, beside rows' own of 1
PAIRS = {8: (16,), 32: (16, 32), 64: (16, 32, 64), 256: (32, 64)}  # rows -> blocks of pairs that are tried
COLUMNS, INNER_AND_STAGES, WARPS = (16, 32, 64), ((64, 4), (64, 6), (128, 3), (128, 4), (256, 2), (256, 3)), (4, 8)
PROCESSES = min(12, os.cpu_count() or 1)
LIMITS = {"compile": 75, "tune": 22, "parts": 60}  # seconds: of all compilations, of a shape's number of rows, of all parts
TURNS = 4
LINES = []


def report(row, is_printed=True):
    """Add a result to LINES, and print it."""
    LINES.append(json.dumps(row))
    if is_printed:
        print(LINES[-1], flush=True)


def make_weights(shape, device="cuda", dtype=torch.bfloat16):
    """Return the weights of the experts of one layer."""
    count, _, hidden, inner, _, options = shape
    sizes = [(2 * inner, hidden), (hidden, inner)]
    if options.get("is_transposed"):
        sizes = [size[::-1] for size in sizes]
    weights = [torch.empty(count, *size, device=device, dtype=dtype).normal_(0, 0.02) for size in sizes]
    biases = [None, None]
    if "gating" in options:
        biases = [torch.empty(count, width, device=device, dtype=dtype).normal_(0, 0.1) for width in (2 * inner, hidden)]
    return ExpertWeights(*weights, *biases, **options)


def make_inputs(shape, rows, skew, seed, device="cuda", dtype=torch.bfloat16):
    """Return hidden states [R, H] and the logits [R, E] of a router."""
    torch.manual_seed(seed)
    count, _, hidden, *_ = shape
    logits = SKEW[skew] * torch.randn(1, count) + torch.randn(rows, count)
    return torch.randn(rows, hidden).to(device, dtype), logits.to(device, dtype)


def measure(calls, times=7, repeats=3):
    """Return the microseconds of a call: the median over replays of a graph with all calls, `repeats` times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    durations = []
    for _ in range(times):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        durations.append(1000 * start.elapsed_time(end) / (repeats * len(calls)))
    return statistics.median(durations[1:])


def measure_bandwidth():
    """Return the bytes per microsecond that a copy reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / measure([lambda: target.copy_(source)])


class Case:
    """One number of rows of one shape: inputs, and the groups of four choices of experts."""

    def __init__(self, name, rows, skew, own):
        from grpo_core.sampling.kernels import expert_kernels as kernels

        self.name, self.rows, self.skew, self.own, self.kernels = name, rows, skew, own, kernels
        self.count, self.top_k, self.hidden, self.inner, self.routing, _ = SHAPES[name]
        self.inputs = [make_inputs(SHAPES[name], rows, skew, seed) for seed in range(TURNS)]
        self.chosen = [kernels.choose_experts(logits, self.routing) for _, logits in self.inputs]
        self.groups = [kernels.group_rows(experts, self.count) for experts, _ in self.chosen]
        self.touched = statistics.mean(int(group.total) for group in self.groups)
        self.middle = [torch.randn(rows * self.top_k, self.inner, device="cuda", dtype=torch.bfloat16) for _ in range(TURNS)]
        self.out = torch.empty(rows * self.top_k, max(self.hidden, self.inner), device="cuda", dtype=torch.bfloat16)

    def floor(self, part, bandwidth):
        """Return the microseconds to read the weights of the experts that are touched."""
        numbers = {"gate_up": 2, "down": 1, "layer": 3}.get(part, 0) * self.inner * self.hidden
        return 2 * self.touched * numbers / bandwidth

    def calls(self, part, blocks):
        """Return the calls of a product with these blocks."""
        is_first = part == "gate_up"
        width = self.inner if is_first else self.hidden
        out = self.out.flatten()[: self.rows * self.top_k * width].view(-1, width)
        weights, biases = (self.own.gate_up, self.own.gate_up_bias) if is_first else (self.own.down, self.own.down_bias)

        def make(turn):
            x, groups = self.inputs[turn][0] if is_first else self.middle[turn], self.groups[turn]
            share, gating = (self.top_k, self.own.gating) if is_first else (1, None)
            return lambda: self.kernels.multiply_groups(x, groups, weights, biases, out, self.top_k, share, self.own, gating, blocks)

        return [make(turn) for turn in range(TURNS)]

    def describe(self, part, microseconds, bandwidth, **others):
        """Return a result."""
        floor = self.floor(part, bandwidth)
        return {
            "bench": "experts", "shape": self.name, "part": part, "rows": self.rows, "routing": self.skew, "touched": self.touched,
            "us": round(microseconds, 2), "floor_us": round(floor, 2), "ratio": round(microseconds / floor, 3) if floor else None, **others,
        }  # fmt: skip


def list_blocks(pairs, part):
    """Return the blocks that are tried; with twice the columns for down, which has one column for each output."""
    from grpo_core.sampling.kernels.expert_kernels import Blocks

    scale = 1 if part == "gate_up" else 2
    return [Blocks(p, scale * n, k, warps, stages) for p, n, (k, stages), warps in product(pairs, COLUMNS, INNER_AND_STAGES, WARPS)]


def compile_share(share):
    """Compile some of the kernels in this process, which leaves them in Triton's cache."""
    import contextlib

    from grpo_core.sampling.kernels import expert_kernels as kernels

    index, end = share
    case_of = {}
    jobs = [(name, part, blocks) for name in SHAPES for part in ("gate_up", "down") for blocks in list_blocks((16, 32, 64), part)]
    for name, part, blocks in jobs[index::PROCESSES]:
        if time.time() > end:
            return
        if name not in case_of:
            count, _, hidden, inner, _, options = SHAPES[name]
            sizes = [(2 * inner, hidden), (hidden, inner)]
            sizes = [size[::-1] for size in sizes] if options.get("is_transposed") else sizes
            biases = [torch.empty(count, n, device="cuda", dtype=torch.bfloat16) for n in (2 * inner, hidden)] if "gating" in options else [None] * 2
            weights = [torch.empty(count, *size, device="cuda", dtype=torch.bfloat16) for size in sizes]
            case_of = {name: Case(name, 8, "even", ExpertWeights(*weights, *biases, **options))}
            case_of[name].groups = [kernels.Groups(*group[:3], torch.zeros_like(group.total)) for group in case_of[name].groups]
        with contextlib.suppress(Exception):  # too much shared memory; the measurement says so
            case_of[name].calls(part, blocks)[0]()


def tune(bandwidth):
    """Measure the products with every list of blocks; print the three best of each."""
    end = time.time() + LIMITS["compile"]
    context = multiprocessing.get_context("spawn")
    with context.Pool(PROCESSES) as pool:
        pool.map(compile_share, [(index, end) for index in range(PROCESSES)])
    for name, shape in SHAPES.items():
        own = make_weights(shape)
        for rows in ROWS:
            case, end = Case(name, rows, "skewed", own), time.time() + LIMITS["tune"]
            even = Case(name, rows, "even", own)
            for part in ("gate_up", "down"):
                results = tune_part(case, part, bandwidth, end)
                for result, blocks in results[:3]:
                    result["even"] = round(measure(even.calls(part, blocks)) / even.floor(part, bandwidth), 3)
                    print(json.dumps(result), flush=True)
        del own


def tune_part(case, part, bandwidth, end):
    """Return the results of one product and their blocks, the fastest first."""
    results = []
    for blocks in list_blocks(PAIRS[case.rows], part):
        if time.time() > end:
            print(json.dumps({"stopped": part, "shape": case.name, "rows": case.rows, "measured": len(results)}), flush=True)
            break
        try:
            microseconds = measure(case.calls(part, blocks), times=4, repeats=2)
        except Exception as error:
            LINES.append(json.dumps({"failed": str(error)[:200], "blocks": list(blocks), "part": part, "shape": case.name}))
            continue
        result = case.describe(part, microseconds, bandwidth, blocks=list(blocks))
        report(result, is_printed=False)
        results.append((result, blocks))
    return sorted(results, key=lambda pair: pair[0]["us"])


def measure_parts(bandwidth):
    """Measure every kernel of a layer, and the layer, with the blocks of expert_kernels.py; first compare it with its definition."""
    from grpo_core.sampling.kernels import expert_kernels as kernels

    end = time.time() + LIMITS["parts"]
    for name, shape in SHAPES.items():
        own = make_weights(shape)
        router = torch.randn(shape[0], shape[2], device="cuda", dtype=torch.bfloat16)
        for rows, skew in product(ROWS, SKEW):
            if time.time() > end:
                return
            case = Case(name, rows, skew, own)
            (x, logits), (experts, weights) = case.inputs[0], case.chosen[0]
            ours, want = kernels.apply_experts(x, experts, weights, own).sum().float(), mix_experts(x, experts, weights, own).float()
            gap = float((ours - want).norm() / want.norm())
            is_same = torch.equal(ours, kernels.apply_experts(x, experts, weights, own).sum().float())
            _, first, second = kernels.choose_blocks(rows, x.dtype)
            turns = range(TURNS)
            parts = {
                "router": [lambda x=x, router=router: torch.nn.functional.linear(x, router)],
                "choose": [lambda logits=logits, case=case: kernels.choose_experts(logits, case.routing)],
                "route": [lambda x=x, router=router, case=case: kernels.route(x, router, None, case.routing, None)],
                "group": [lambda experts=experts, case=case: kernels.group_rows(experts, case.count)],
                "gate_up": case.calls("gate_up", first),
                "down": case.calls("down", second),
                "layer": [lambda t=t, case=case: kernels.apply_experts(case.inputs[t][0], *case.chosen[t], case.own).sum() for t in turns],
            }
            for part, calls in parts.items():
                report(case.describe(part, measure(calls), bandwidth))
            report({"bench": "experts", "shape": name, "part": "check", "rows": rows, "routing": skew, "gap": gap, "same_bits_again": is_same})


def check():
    """Compute a small layer by its definition, and by the kernels where there is a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, shape in SMALL.items():
        own = make_weights(shape, device, torch.float32)
        x, logits = make_inputs(shape, 5, "even", 0, device, torch.float32)
        want = mix_experts(x, *choose_experts(logits, shape[4]), own)
        if device == "cuda":
            from grpo_core.sampling.kernels import expert_kernels as kernels

            ours = kernels.apply_experts(x, *kernels.choose_experts(logits, shape[4]), own).sum()
            torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-4)
        print(json.dumps({"bench": "experts", "shape": name, "part": "check", "norm": float(want.norm())}))


def main():
    """Run what the command names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, help="file for all lines, those that are not printed included")
    options = parser.parse_args()
    if options.check:
        return check()
    bandwidth = measure_bandwidth()
    report({"bench": "experts", "part": "copy", "gb_per_second": round(bandwidth / 1e3), "card": torch.cuda.get_device_name()})
    try:
        (tune if options.tune else measure_parts)(bandwidth)
    finally:
        if options.out:
            options.out.write_text("".join(line + "\n" for line in LINES))


if __name__ == "__main__":
    main()
