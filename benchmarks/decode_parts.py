"""What the parts of one token step cost on a GPU, as replays of a CUDA graph: Qwen2.5-1.5B's shapes, bf16, random data.

python benchmarks/decode_parts.py

The parts that a sampler's step is made of, each beside its floor (the bytes it must read, at the rate that reading the lm_head reached), so that what a step
can reach is a sum and not a guess.
"""

import json
from datetime import date
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F

HIDDEN, INTER, HEADS, KV_HEADS, DIM, VOCAB, RANK = 1536, 8960, 12, 2, 128, 151_936, 16
BANDWIDTH = 3.9e6  # bytes a microsecond: the most that was seen here, reading the lm_head
RESULTS = Path(__file__).parent / "results" / "decode_parts.json"
ROWS = []


def microseconds(function, calls=20, times=30):
    """Of one call, the median over replays of a graph with `calls` of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(times):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1000 * start.elapsed_time(end) / calls)
    return sorted(found)[times // 2]


def show(part, rows, function, floor_bytes=0, calls=20):
    row = {"bench": "decode_parts", "workload": part, "rows": rows, "ours": round(microseconds(function, calls), 2), "unit": "us"}
    row |= {"floor": round(floor_bytes / BANDWIDTH, 2), "hardware": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__}}
    ROWS.append(row | {"date": str(date.today())})
    print(json.dumps({key: row[key] for key in ("workload", "rows", "ours", "floor")}), flush=True)


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def linears(rows):
    """Against 28 different weights in turn, as in a model, so that none is in the cache."""
    qkv = HIDDEN + 2 * KV_HEADS * DIM
    for part, out, inner, copies in (
        ("qkv", qkv, HIDDEN, 28), ("qkv with LoRA's A below it", qkv + 3 * RANK, HIDDEN, 28), ("o", HIDDEN, HIDDEN, 28),
        ("gate_up", 2 * INTER, HIDDEN, 28), ("down", HIDDEN, INTER, 28), ("lm_head", VOCAB, HIDDEN, 2),
    ):  # fmt: skip
        weights, x = [random(out, inner) for _ in range(copies)], random(rows, inner)
        turn = cycle(weights)
        show(f"linear {part}", rows, lambda turn=turn, x=x: F.linear(x, next(turn)), 2 * out * inner, calls=2 * copies)
    x, a, xa, b, y = random(rows, HIDDEN), random(3 * RANK, HIDDEN), random(rows, 3 * RANK), random(qkv, 3 * RANK), random(rows, qkv)
    show("LoRA A", rows, lambda: F.linear(x, a), 2 * a.numel())
    show("LoRA B, added", rows, lambda: torch.addmm(y, xa, b.t()), 2 * b.numel())


def elementwise(rows):
    x, weight, both = random(rows, HIDDEN), random(HIDDEN), random(rows, 2 * INTER)

    def as_transformers():
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    show("RMSNorm as transformers writes it", rows, as_transformers)
    show("RMSNorm, F.rms_norm", rows, lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-6))
    show("silu(gate) * up", rows, lambda: F.silu(both[:, :INTER]) * both[:, INTER:])


def attention(rows, length):
    keys, values, queries = random(rows, KV_HEADS, length, DIM), random(rows, KV_HEADS, length, DIM), random(rows, HEADS, 1, DIM)
    grouped = queries.view(rows, KV_HEADS, HEADS // KV_HEADS, DIM)
    mask = torch.zeros(rows, 1, 1, length, device="cuda", dtype=torch.bfloat16).expand(-1, KV_HEADS, HEADS // KV_HEADS, -1)
    sdpa, read = F.scaled_dot_product_attention, 4 * keys.numel()
    show(f"attention over {length}, group as queries, no mask", rows, lambda: sdpa(grouped, keys, values), read)
    show(f"attention over {length}, group as queries, mask", rows, lambda: sdpa(grouped, keys, values, attn_mask=mask), read)
    show(f"attention over {length}, enable_gqa, no mask", rows, lambda: sdpa(queries, keys, values, enable_gqa=True), read)


def pick(rows):
    logits = random(rows, VOCAB)

    def draw():
        logprobs = logits.float().log_softmax(-1)
        sums = logprobs.exp().cumsum(-1)
        token = torch.searchsorted(sums, torch.rand(rows, 1, device="cuda") * sums[:, -1:]).clamp(max=VOCAB - 1)
        return token, logprobs.gather(-1, token)

    show("draw: log_softmax, exp, cumsum, search", rows, draw, 2 * logits.numel(), calls=4)
    show("draw: logsumexp alone", rows, lambda: torch.logsumexp(logits.float(), -1), 2 * logits.numel(), calls=4)


def main():
    for rows in (32, 256):
        linears(rows)
        elementwise(rows)
        for length in (256, 640):
            attention(rows, length)
        pick(rows)
    one = torch.zeros(32, device="cuda")
    show("the smallest kernel", 32, lambda: one.add_(1), calls=600)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


if __name__ == "__main__":
    main()
