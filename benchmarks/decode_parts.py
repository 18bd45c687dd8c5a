"""Measure the parts of one token step on a GPU as CUDA graph replays: Qwen2.5-1.5B's shapes, bf16, random data.

    python benchmarks/decode_parts.py
    python benchmarks/decode_parts.py --check     every part once, with small shapes on any machine; records nothing

Each row has the time of a part and its lower bound, `floor`: the bytes that the part must read, divided by the bandwidth
that reading the lm_head reached. The sum over the parts shows what a whole step can reach.
"""

import json
import sys
from datetime import date
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F

HIDDEN, INTER, HEADS, KV_HEADS, DIM, VOCAB, RANK = 1536, 8960, 12, 2, 128, 151_936, 16
BANDWIDTH = 3.9e6  # bytes per microsecond: the largest measured, by reading the lm_head
RESULTS = Path(__file__).parent / "results" / "decode_parts.json"
ROWS = []  # of RESULTS
ROW_COUNTS, LENGTHS, DEVICE = (32, 256), (256, 640), "cuda"


def measure(function, calls=20, times=30):
    """Return the microseconds of one call: the median over `times` replays of a graph of `calls` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    durations = []
    for _ in range(times):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        durations.append(1000 * start.elapsed_time(end) / calls)
    return sorted(durations)[times // 2]


def report(part, rows, function, floor_bytes=0, calls=20):
    """Measure a part, print its row and add the row to ROWS. `floor_bytes` are the bytes that the part must read."""
    row = {"bench": "decode_parts", "workload": part, "rows": rows, "ours": round(measure(function, calls), 2), "unit": "us"}
    row |= {"floor": round(floor_bytes / BANDWIDTH, 2), "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "versions": {"torch": torch.__version__}}
    ROWS.append(row | {"date": str(date.today())})
    print(json.dumps({key: row[key] for key in ("workload", "rows", "ours", "floor")}), flush=True)


def random(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def measure_linears(rows):
    """Measure the linear layers, with the weights of 28 layers in turn so that none is in the cache, as in a model."""
    qkv = HIDDEN + 2 * KV_HEADS * DIM
    for part, out, inner, copies in (
        ("qkv", qkv, HIDDEN, 28), ("qkv with LoRA's A below it", qkv + 3 * RANK, HIDDEN, 28), ("o", HIDDEN, HIDDEN, 28),
        ("gate_up", 2 * INTER, HIDDEN, 28), ("down", HIDDEN, INTER, 28), ("lm_head", VOCAB, HIDDEN, 2),
    ):  # fmt: skip
        weights, x = [random(out, inner) for _ in range(copies)], random(rows, inner)
        weight_cycle = cycle(weights)
        report(f"linear {part}", rows, lambda weight_cycle=weight_cycle, x=x: F.linear(x, next(weight_cycle)), 2 * out * inner, calls=2 * copies)
    x, a, xa, b, y = random(rows, HIDDEN), random(3 * RANK, HIDDEN), random(rows, 3 * RANK), random(qkv, 3 * RANK), random(rows, qkv)
    report("LoRA A", rows, lambda: F.linear(x, a), 2 * a.numel())
    report("LoRA B, added", rows, lambda: torch.addmm(y, xa, b.t()), 2 * b.numel())


def measure_elementwise(rows):
    x, weight, gate_up = random(rows, HIDDEN), random(HIDDEN), random(rows, 2 * INTER)

    def rms_norm():
        x32 = x.float()
        return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    report("RMSNorm as transformers writes it", rows, rms_norm)
    report("RMSNorm, F.rms_norm", rows, lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-6))
    report("silu(gate) * up", rows, lambda: F.silu(gate_up[:, :INTER]) * gate_up[:, INTER:])


def measure_attention(rows, length):
    keys, values, queries = random(rows, KV_HEADS, length, DIM), random(rows, KV_HEADS, length, DIM), random(rows, HEADS, 1, DIM)
    grouped = queries.view(rows, KV_HEADS, HEADS // KV_HEADS, DIM)
    mask = torch.zeros(rows, 1, 1, length, device=DEVICE, dtype=torch.bfloat16).expand(-1, KV_HEADS, HEADS // KV_HEADS, -1)
    sdpa, read_bytes = F.scaled_dot_product_attention, 4 * keys.numel()
    report(f"attention over {length}, group as queries, no mask", rows, lambda: sdpa(grouped, keys, values), read_bytes)
    report(f"attention over {length}, group as queries, mask", rows, lambda: sdpa(grouped, keys, values, attn_mask=mask), read_bytes)
    report(f"attention over {length}, enable_gqa, no mask", rows, lambda: sdpa(queries, keys, values, enable_gqa=True), read_bytes)


def measure_draw(rows):
    logits = random(rows, VOCAB)

    def draw():
        logprobs = logits.float().log_softmax(-1)
        sums = logprobs.exp().cumsum(-1)
        token = torch.searchsorted(sums, torch.rand(rows, 1, device=DEVICE) * sums[:, -1:]).clamp(max=VOCAB - 1)
        return token, logprobs.gather(-1, token)

    report("draw: log_softmax, exp, cumsum, search", rows, draw, 2 * logits.numel(), calls=4)
    report("draw: logsumexp alone", rows, lambda: torch.logsumexp(logits.float(), -1), 2 * logits.numel(), calls=4)


def main():
    for rows in ROW_COUNTS:
        measure_linears(rows)
        measure_elementwise(rows)
        for length in LENGTHS:
            measure_attention(rows, length)
        measure_draw(rows)
    values = torch.zeros(32, device=DEVICE)
    report("the smallest kernel", 32, lambda: values.add_(1), calls=600)


def call_once(function, calls=1):
    """Stand in for `measure` in a check: call the part, and return no time."""
    function()
    return 0.0


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        HIDDEN, INTER, HEADS, KV_HEADS, DIM, VOCAB, RANK = 16, 32, 4, 2, 4, 64, 2
        ROW_COUNTS, LENGTHS, DEVICE, measure = (2,), (8,), "cpu", call_once
    main()
    if "--check" not in sys.argv[1:]:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
