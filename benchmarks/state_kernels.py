"""Measure kernels of one token step on a GPU over block sizes and warps: Qwen3.5's shapes, bf16, random data.

    python benchmarks/state_kernels.py --tune      every combination, in at most 3 minutes; the best of each last
    python benchmarks/state_kernels.py             the settings that the kernels have
    python benchmarks/state_kernels.py --check     small shapes on any machine with triton; measures nothing

Each line is one result: the microseconds of one layer as a replayed CUDA graph, and its lower bound, `floor`: the bytes
that it must read and write, divided by the bandwidth. Nothing is recorded.
"""

import importlib.util
import json
import sys
import time
from itertools import product

import torch

from grpo_core.sampling.modules.delta_net import DeltaInputs, DeltaWeights

BANDWIDTH = 4.3e6  # bytes per microsecond
MAX_SECONDS = 170
COLD_BYTES = 300e6  # of the memory that a graph reads before it reads the same again: more than a cache holds
DEVICE, DTYPE = "cuda", torch.bfloat16
ROWS, TOKENS, SEEN = (32, 256), 384, 256
# key heads, value heads, their sizes; heads, key heads, their size
SHAPES = {"Qwen3.5-4B": ((16, 32, 128, 128), (16, 4, 256)), "Qwen3.5-0.8B": ((16, 16, 128, 128), (8, 2, 256))}
DELTA_NET = [
    {"columns": columns, "warps": warps, "registers": registers}
    for columns, warps, registers in (
        (64, 8, 128), (64, 8, 96), (64, 8, 80), (64, 4, 255), (64, 4, 168), (64, 4, 128), (64, 16, 64), (32, 4, 128),
        (32, 4, 96), (32, 8, 64), (32, 2, 168), (128, 8, 255), (128, 8, 168), (128, 8, 128), (128, 16, 128),
        (128, 16, 96), (128, 16, 64), (16, 4, 64), (16, 2, 96),
    )
]  # fmt: skip
ATTENTION = [
    {"block": block, "warps": warps, "stages": stages, "splits": splits}
    for (block, warps, stages), splits in product(
        ((32, 4, 3), (32, 4, 2), (32, 8, 3), (64, 4, 2), (64, 8, 2), (64, 4, 1), (16, 4, 4), (16, 2, 4), (128, 8, 1)),
        (None, 1, 4),
    )
]


def measure(functions, times=15):
    """Return the microseconds of one of the functions, which a graph calls one after another: the median of replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    durations = []
    for _ in range(times):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        durations.append(1000 * start.elapsed_time(end) / len(functions))
    return sorted(durations)[times // 2]


def random(*shape, dtype=None):
    return torch.randn(*shape, device=DEVICE).to(dtype or DTYPE)


def make_delta_nets(kernels, rows, key_heads, heads, key_dim, value_dim, width=4):
    """Return the bytes of one step, and functions of the options for steps with different states."""
    shared, channels = heads // key_heads, 2 * key_heads * key_dim + heads * value_dim
    sizes = [key_heads * key_dim] * 2 + [heads * value_dim] * 2 + [heads] * 2
    q, k, v, z, b, a = random(rows, sum(sizes)).split(sizes, dim=1)
    inputs = DeltaInputs(
        *(x.unflatten(1, (key_heads, -1)) for x in (q, k)), *(x.unflatten(1, (key_heads, shared, -1)) for x in (v, z)),
        *(x.unflatten(1, (key_heads, shared)) for x in (b, a)),
    )  # fmt: skip
    vectors = (random(heads), random(heads), random(value_dim))
    weights = DeltaWeights(random(channels, width), None, *vectors, 1e-6, 0, 2, 1.0, True)
    bytes_of_states = 2 * rows * (4 * heads * key_dim * value_dim + 2 * channels * width)
    copies = count_copies(bytes_of_states / 2)
    states = [
        (random(rows, channels, width), random(rows, heads, key_dim, value_dim, dtype=torch.float32))
        for _ in range(copies)
    ]
    steps = [lambda own=own, **options: kernels.delta_net(inputs, weights, *own, **options) for own in states]
    return bytes_of_states + 2 * rows * (sum(sizes) + heads * value_dim), steps


def make_attention(kernels, rows, heads, kv_heads, dim):
    """Return the bytes of one step, and functions of the options for steps with different keys."""
    query, position = random(rows, heads, 1, dim), torch.full((rows,), SEEN - 1, device=DEVICE)
    copies = count_copies(4 * rows * kv_heads * SEEN * dim)
    memory = [[random(rows, kv_heads, TOKENS, dim) for _ in range(2)] for _ in range(copies)]
    steps = [
        lambda own=own, **options: kernels.attend_rows(query, *own, position, dim**-0.5, **options) for own in memory
    ]
    return 4 * rows * kv_heads * SEEN * dim, steps


def count_copies(size):
    return max(2, min(24, round(COLD_BYTES / size)))


def run(workload, rows, step_bytes, steps, options):
    """Measure one combination and print its line; return the line."""
    row = {"bench": "state_kernels", "workload": workload, "rows": rows, **options}
    try:
        duration = measure([lambda step=step: step(**options) for step in steps])
        row |= {"us": round(duration, 2), "floor": round(step_bytes / BANDWIDTH, 2)}
        row["share"] = round(row["floor"] / duration, 3) if duration else 0.0
    except Exception as error:  # a combination that this GPU has too little shared memory or registers for
        row["error"] = f"{type(error).__name__}: {error}"[:200]
    print(json.dumps(row), flush=True)
    return row


def main(combinations):
    from grpo_core.sampling.kernels import delta_net_kernels, row_attention_kernels

    started, results = time.monotonic(), []
    for (name, (delta, attention)), rows in product(SHAPES.items(), ROWS):
        for workload, options, make, kernels, sizes in (
            (f"delta net, {name}", combinations[0], make_delta_nets, delta_net_kernels, delta),
            (f"attention, {name}", combinations[1], make_attention, row_attention_kernels, attention),
        ):
            step_bytes, steps = make(kernels, rows, *sizes)
            for own in options:
                if time.monotonic() - started < MAX_SECONDS:
                    results.append(run(workload, rows, step_bytes, steps, own))
    for key in dict.fromkeys((row["workload"], row["rows"]) for row in results):
        own = [row for row in results if (row["workload"], row["rows"]) == key and "us" in row]
        if own and len(results) > len(SHAPES) * len(ROWS) * 2:
            print(json.dumps({"best": True, **min(own, key=lambda row: row["us"])}), flush=True)


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        DEVICE, DTYPE, ROWS, TOKENS, SEEN = "cpu", torch.float32, (2,), 40, 30
        SHAPES = {"small": ((1, 2, 8, 16), (2, 1, 16))}
        COLD_BYTES, measure = 0, lambda functions: functions[0]() is None
        if importlib.util.find_spec("triton") is None:
            print(json.dumps({"bench": "state_kernels", "skipped": "triton is not installed"}))
            sys.exit()
    main((DELTA_NET, ATTENTION) if "--tune" in sys.argv[1:] else ([{}], [{}]))
