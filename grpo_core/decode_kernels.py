"""The operations of decode_ops.py as Triton kernels, where each is defined in torch.

Everything that changes between calls (the cache's place and sizes, the width of the tables) is read from `layout`, a
tensor, so a captured graph stays valid when the cache is given back and taken anew. All sums are float32, the choice of
a token float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from grpo_core.decode_ops import DONE, DRAWN, LIMIT, PROMPT, ROW, SLOT, START, TOKEN, Shape, Tables, TorchOps
from grpo_core.draw import Decoding

_TOKEN, _DRAWN, _START, _LIMIT = (tl.constexpr(x) for x in (TOKEN, DRAWN, START, LIMIT))
_PROMPT, _SLOT, _ROW, _DONE = (tl.constexpr(x) for x in (PROMPT, SLOT, ROW, DONE))

# Of `layout` [6] int64: elements from `anchor` to the cache, prompts in it, tokens of one, slots, tokens of one; the
# width of the tables.
OFFSET, PROMPTS, WIDTH, SLOTS, LENGTH, COLUMNS = range(6)
_OFFSET, _PROMPTS, _WIDTH, _SLOTS, _LENGTH, _COLUMNS = (tl.constexpr(x) for x in range(6))

CHUNK = 4096  # of the vocabulary in one program
BLOCK = 64  # keys in one go
SPLITS = 16  # parts of a row's attention at most


# What varies from call to call is not specialised on, so that every kernel is compiled once.
@triton.jit(do_not_specialize=["adds"])
def _add_norm(x, delta, delta_stride, weight, out, eps, adds, H: tl.constexpr, BLOCK_H: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_H)
    inside = at < H
    value = tl.load(x + row * H + at, inside, other=0.0)
    if adds != 0:
        more = tl.load(delta + row * delta_stride + at, inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
        tl.store(x + row * H + at, value, inside)
    wide = value.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    scale = tl.load(weight + at, inside, other=0.0).to(tl.float32)
    tl.store(out + row * H + at, scaled.to(value.dtype).to(tl.float32) * scale, inside)


@triton.jit
def _silu_mul(both, stride, out, INNER: tl.constexpr, BLOCK_I: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = at < INNER
    gate = tl.load(both + row * stride + at, inside, other=0.0)
    up = tl.load(both + row * stride + INNER + at, inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    active = (wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32)
    tl.store(out + row * INNER + at, active * up, inside)


@triton.jit
def _prompt_offset(layout, layer, part, prompt, head, LAYERS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr):
    """Elements from the anchor to a prompt's keys (part 0) or values (1)."""
    row = (layer * 2 + part) * tl.load(layout + _PROMPTS) + prompt
    return tl.load(layout + _OFFSET) + (row * KV_HEADS + head) * tl.load(layout + _WIDTH) * DIM


@triton.jit
def _row_offset(layout, layer, part, slot, head, LAYERS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr):
    """The same of a row's own tokens, which lie behind all prompts."""
    prompts = LAYERS * 2 * tl.load(layout + _PROMPTS) * KV_HEADS * tl.load(layout + _WIDTH) * DIM
    row = (layer * 2 + part) * tl.load(layout + _SLOTS) + slot
    return tl.load(layout + _OFFSET) + prompts + (row * KV_HEADS + head) * tl.load(layout + _LENGTH) * DIM


@triton.jit(do_not_specialize=["layer", "capacity"])
def _rotate_and_store(
    qkv, stride, q_out, cos, sin, q_weight, k_weight, eps, state, capacity, anchor, layout, layer,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_HALF: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = state + row
    if tl.load(column + _DONE * capacity) == 0:
        place = tl.load(column + _DRAWN * capacity) - 1
        half = tl.arange(0, BLOCK_HALF)
        inside = half < DIM // 2
        source = qkv + row * stride + head * DIM + half
        first = tl.load(source, inside, other=0.0).to(tl.float32)
        second = tl.load(source + DIM // 2, inside, other=0.0).to(tl.float32)
        if head < HEADS + KV_HEADS:
            if NORM:
                scale = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / DIM + eps)
                weight = tl.where(head < HEADS, q_weight, k_weight) + half
                kind = q_out.dtype.element_ty
                first = (first * scale).to(kind).to(tl.float32) * tl.load(weight, inside, other=0.0).to(tl.float32)
                second = (second * scale).to(kind).to(tl.float32) * tl.load(weight + DIM // 2, inside, other=0.0).to(tl.float32)
            position = tl.load(column + _START * capacity) + place
            c = tl.load(cos + position * (DIM // 2) + half, inside, other=0.0).to(tl.float32)
            s = tl.load(sin + position * (DIM // 2) + half, inside, other=0.0).to(tl.float32)
            turned = first * c - second * s
            second = second * c + first * s
            first = turned
        if head < HEADS:
            target = q_out + (row * HEADS + head) * DIM + half
        else:
            part = (head - HEADS) // KV_HEADS
            offset = _row_offset(
                layout, layer, part, tl.load(column + _SLOT * capacity), (head - HEADS) % KV_HEADS, LAYERS, KV_HEADS, DIM
            )
            target = anchor + offset + place * DIM + half
        tl.store(target, first, inside)
        tl.store(target + DIM // 2, second, inside)


@triton.jit(do_not_specialize=["layer", "capacity"])
def _attend(
    q, out, parts, logsums, state, capacity, anchor, layout, layer, scale,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row's query heads that share a key head, over one of several parts of the prompt and the row's own tokens."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split, splits = tl.program_id(2), tl.num_programs(2)
    column = state + row
    if tl.load(column + _DONE * capacity) == 0:
        start = tl.load(column + _START * capacity)
        total = start + tl.load(column + _DRAWN * capacity)
        share = tl.cdiv(tl.cdiv(total, splits), BLOCK_K) * BLOCK_K
        low = split * share
        high = tl.minimum(low + share, total)
        prompt, slot = tl.load(column + _PROMPT * capacity), tl.load(column + _SLOT * capacity)
        k_prompt = _prompt_offset(layout, layer, 0, prompt, kv_head, LAYERS, KV_HEADS, DIM)
        v_prompt = _prompt_offset(layout, layer, 1, prompt, kv_head, LAYERS, KV_HEADS, DIM)
        k_row = _row_offset(layout, layer, 0, slot, kv_head, LAYERS, KV_HEADS, DIM)
        v_row = _row_offset(layout, layer, 1, slot, kv_head, LAYERS, KV_HEADS, DIM)

        GROUP: tl.constexpr = HEADS // KV_HEADS
        member = tl.arange(0, BLOCK_Q)
        d = tl.arange(0, BLOCK_D)
        real = (member < GROUP)[:, None] & (d < DIM)[None, :]
        first_head = row * HEADS + kv_head * GROUP
        query = tl.load(q + (first_head + member)[:, None] * DIM + d[None, :], real, other=0.0)
        top = tl.full([BLOCK_Q], -1e30, tl.float32)
        weight_sum = tl.zeros([BLOCK_Q], tl.float32)
        mixed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for begin in range(low, high, BLOCK_K):
            at = begin + tl.arange(0, BLOCK_K)
            seen = at < high
            own = at >= start
            k_at = tl.multiple_of(tl.where(own, k_row + (at - start) * DIM, k_prompt + at * DIM), 8)
            v_at = tl.multiple_of(tl.where(own, v_row + (at - start) * DIM, v_prompt + at * DIM), 8)
            there = seen[:, None] & (d < DIM)[None, :]
            keys = tl.load(anchor + k_at[:, None] + d[None, :], there, other=0.0)
            values = tl.load(anchor + v_at[:, None] + d[None, :], there, other=0.0)
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
            scores = tl.where(seen[None, :], scores, -1e30)
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
            fade = tl.exp(top - higher)
            weight_sum = weight_sum * fade + tl.sum(weights, 1)
            mixed = mixed * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
            top = higher
        mixed = mixed / tl.maximum(weight_sum, 1e-30)[:, None]
        heads = first_head + member
        if splits == 1:
            tl.store(out + heads[:, None] * DIM + d[None, :], mixed, real)
        else:
            tl.store(parts + (heads[:, None] * splits + split) * DIM + d[None, :], mixed, real)
            logsum = tl.where(weight_sum > 0, top + tl.log(tl.maximum(weight_sum, 1e-30)), -1e30)
            tl.store(logsums + heads * splits + split, logsum, member < GROUP)


@triton.jit(do_not_specialize=["capacity", "splits"])
def _combine(
    parts, logsums, out, state, capacity, splits,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(state + row + _DONE * capacity) == 0:
        head = row * HEADS + tl.program_id(1)
        split = tl.arange(0, MOST)
        d = tl.arange(0, BLOCK_D)
        logsum = tl.load(logsums + head * splits + split, split < splits, other=-1e30)
        weights = tl.exp(logsum - tl.max(logsum, 0))
        weights = weights / tl.sum(weights, 0)
        there = (split < splits)[:, None] & (d < DIM)[None, :]
        values = tl.load(parts + (head * splits + split)[:, None] * DIM + d[None, :], there, other=0.0)
        tl.store(out + head * DIM + d, tl.sum(values * weights[:, None], 0), d < DIM)


@triton.jit
def _chunk_sums(logits, tops, sums, temperature, V, CHUNKS, CHUNK_: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK_ + tl.arange(0, CHUNK_)
    value = tl.load(logits + row * V + at, at < V, other=-float("inf")).to(tl.float32) / temperature
    top = tl.maximum(tl.max(value, 0), -1e30)
    tl.store(tops + row * CHUNKS + chunk, top)
    tl.store(sums + row * CHUNKS + chunk, tl.sum(tl.exp(value - top), 0))


@triton.jit(do_not_specialize=["capacity"])
def _choose(
    logits, tops, sums, state, capacity, noise, ids, logprobs, lengths, ended, eos, layout, temperature, V, CHUNKS,
    EOS: tl.constexpr, GREEDY: tl.constexpr, CHUNK_: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    column = state + position
    if tl.load(column + _DONE * capacity) == 0:
        c = tl.arange(0, BLOCK_C)
        chunk_top = tl.load(tops + position * CHUNKS + c, c < CHUNKS, other=-1e30)
        chunk_sum = tl.load(sums + position * CHUNKS + c, c < CHUNKS, other=0.0)
        top = tl.max(chunk_top, 0)
        mass = (chunk_sum * tl.exp(chunk_top - top)).to(tl.float64)
        total = tl.sum(mass, 0)
        row = tl.load(column + _ROW * capacity)
        drawn = tl.load(column + _DRAWN * capacity)
        at = row * tl.load(layout + _COLUMNS) + drawn
        i = tl.arange(0, CHUNK_)
        if GREEDY:
            chunk = tl.min(tl.where(chunk_top == top, c, BLOCK_C), 0)
            value = tl.load(logits + position * V + chunk * CHUNK_ + i, chunk * CHUNK_ + i < V, other=-float("inf")).to(tl.float32) / temperature
            inner = tl.min(tl.where(value == top, i, CHUNK_), 0)
        else:
            target = tl.load(noise + at) * total
            last = tl.max(tl.where(mass > 0, c, 0), 0)
            over = (tl.cumsum(mass, 0) > target) & (mass > 0)
            chunk = tl.minimum(tl.min(tl.where(over, c, BLOCK_C), 0), last)
            before = tl.sum(tl.where(c < chunk, mass, 0.0), 0)
            own_top = tl.max(tl.where(c == chunk, chunk_top, -1e30), 0)
            rest = ((target - before) * tl.exp(top - own_top).to(tl.float64)).to(tl.float32)
            value = tl.load(logits + position * V + chunk * CHUNK_ + i, chunk * CHUNK_ + i < V, other=-float("inf")).to(tl.float32) / temperature
            weight = tl.exp(value - own_top)
            final = tl.max(tl.where(weight > 0, i, 0), 0)
            beyond = (tl.cumsum(weight, 0) > rest) & (weight > 0)
            inner = tl.minimum(tl.min(tl.where(beyond, i, CHUNK_), 0), final)
        token = (chunk * CHUNK_ + inner).to(tl.int64)
        chosen = tl.max(tl.where(i == inner, value, -float("inf")), 0)
        tl.store(ids + at, token)
        tl.store(logprobs + at, chosen - top - tl.log(total).to(tl.float32))
        is_end = token < 0
        for e in tl.static_range(EOS):
            is_end = is_end | (token == tl.load(eos + e))
        tl.store(lengths + row, drawn + 1)
        tl.store(ended + row, is_end)
        tl.store(column + _TOKEN * capacity, token)
        tl.store(column + _DRAWN * capacity, drawn + 1)
        over_limit = drawn + 1 >= tl.load(column + _LIMIT * capacity)
        tl.store(column + _DONE * capacity, (is_end | over_limit).to(tl.int64))


class TritonOps(TorchOps):
    """The operations on a GPU, each one or two launches and fit for a captured graph."""

    def __init__(self, device: torch.device) -> None:
        self.layout = torch.zeros(6, dtype=torch.int64, device=device)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        out, width = torch.empty_like(x), x.shape[1]
        block = triton.next_power_of_2(width)
        given = (x, 0) if delta is None else (delta, delta.stride(0))
        warps = min(8, max(1, block // 512))
        _add_norm[(len(x),)](x, *given, weight, out, eps, int(delta is not None), width, block, num_warps=warps)
        return out

    def silu_mul(self, both: Tensor) -> Tensor:
        inner = both.shape[1] // 2
        out = both.new_empty(len(both), inner)
        _silu_mul[(len(both), triton.cdiv(inner, 1024))](both, both.stride(0), out, inner, 1024)
        return out

    def draw(self, logits: Tensor, state: Tensor, tables: Tables, settings: Decoding) -> None:
        rows, width = logits.shape
        chunks = triton.cdiv(width, CHUNK)
        tops, sums = (torch.empty(rows, chunks, dtype=torch.float32, device=logits.device) for _ in range(2))
        _chunk_sums[(rows, chunks)](logits, tops, sums, settings.temperature, width, chunks, CHUNK)
        _choose[(rows,)](
            logits, tops, sums, state, state.stride(0), tables.noise, tables.ids, tables.logprobs, tables.lengths, tables.ended,
            tables.eos, self.layout, settings.temperature, width, chunks,
            len(tables.eos), settings.greedy, CHUNK, triton.next_power_of_2(chunks), num_warps=8,
        )  # fmt: skip

    def columns(self, longest: int) -> None:
        self.layout[COLUMNS] = longest

    def cache(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> TritonCache:
        return TritonCache(shape, dtype, self.layout)


class TritonCache:
    """One buffer: the keys and values of the prompts, and behind them those of the rows. Rows share their prompt's.

    A graph finds the buffer by its distance from `anchor`, which stays, so the buffer need not.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, layout: Tensor) -> None:
        self.shape, self.layout = shape, layout
        self.anchor = torch.empty(16, dtype=dtype, device=layout.device)
        self.give_back()

    def take(self, prompts: int, width: int, slots: int, length: int) -> None:
        s = self.shape
        fronts = torch.Size((s.layers, 2, prompts, s.kv_heads, width, s.head_dim))
        rows = s.layers * 2 * slots * s.kv_heads * length * s.head_dim
        buffer = self.anchor.new_empty(fronts.numel() + rows)
        self.buffer, self.prompts = buffer, buffer[: fronts.numel()].view(fronts)
        offset = (buffer.data_ptr() - self.anchor.data_ptr()) // buffer.element_size()
        self.layout[:COLUMNS] = torch.tensor([offset, prompts, width, slots, length])

    def give_back(self) -> None:
        self.buffer = self.prompts = self.anchor[:0]

    def store(self, layer: int, first: int, keys: Tensor, values: Tensor) -> None:
        for j, part in enumerate((keys, values)):
            self.prompts[layer, j, first : first + len(part), :, : part.shape[2]] = part

    def admit(self, state: Tensor) -> None:
        """Nothing to do: a row reads its prompt where it lies."""

    def keep(self, state: Tensor) -> None:
        """Nothing to do: a row keeps its slot."""

    def begin(self, state: Tensor, cos: Tensor, sin: Tensor) -> None:
        self._state, self._cos, self._sin = state, cos, sin

    def attend(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        s, state, rows = self.shape, self._state, len(qkv)
        sizes = (s.layers, s.heads, s.kv_heads, s.head_dim)
        q = qkv.new_empty(rows, s.heads * s.head_dim)
        given = (state, state.stride(0), self.anchor, self.layout, layer)
        weights = (qkv, qkv) if q_norm is None else (q_norm, k_norm)
        half = triton.next_power_of_2(s.head_dim // 2)
        _rotate_and_store[(rows, s.heads + 2 * s.kv_heads)](
            qkv, qkv.stride(0), q, self._cos, self._sin, *weights, s.eps, *given, *sizes, half, q_norm is not None, num_warps=1
        )
        out, splits = torch.empty_like(q), _splits(rows * s.kv_heads)
        parts = torch.empty(rows * s.heads * splits, s.head_dim, dtype=torch.float32, device=q.device)
        logsums = torch.empty(rows * s.heads * splits, dtype=torch.float32, device=q.device)
        block_d = max(16, triton.next_power_of_2(s.head_dim))
        block_q = max(16, triton.next_power_of_2(s.heads // s.kv_heads))
        precision = "ieee" if q.dtype == torch.float32 else "tf32"
        _attend[(rows, s.kv_heads, splits)](
            q, out, parts, logsums, *given, s.head_dim**-0.5, *sizes, block_d, block_q, BLOCK, precision, num_warps=4
        )
        if splits > 1:
            into = (parts, logsums, out, state, state.stride(0), splits)
            _combine[(rows, s.heads)](*into, s.heads, s.head_dim, block_d, SPLITS, num_warps=2)
        return out


def _splits(programs: int) -> int:
    """Parts that a row's tokens are read in, so that few rows still fill the card."""
    splits = 1
    while programs * splits < 256 and splits < SPLITS:
        splits *= 2
    return splits
