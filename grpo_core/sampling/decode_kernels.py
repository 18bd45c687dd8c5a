"""The operations of decode_ops.py as Triton kernels, where each is defined in torch.

All sums are float32; what chooses among the vocabulary's chunks is float64. What varies from call to call is not
specialised on, so that every kernel is compiled once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from grpo_core.batch import SamplingParams
from grpo_core.sampling.attention_kernels import COLUMNS, TritonCache
from grpo_core.sampling.decode_ops import DONE, DRAWN, LIMIT, ROW, TOKEN, Shape, Tables, TorchOps

_TOKEN, _DRAWN, _LIMIT, _ROW, _DONE = (tl.constexpr(x) for x in (TOKEN, DRAWN, LIMIT, ROW, DONE))
_COLUMNS = tl.constexpr(COLUMNS)

CHUNK = 4096  # of the vocabulary in one program


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
def _chunk_sums(logits, tops, sums, temperature, V, CHUNKS, CHUNK_: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK_ + tl.arange(0, CHUNK_)
    value = tl.load(logits + row * V + at, at < V, other=-float("inf")).to(tl.float32) / temperature
    top = tl.maximum(tl.max(value, 0), -1e30)
    tl.store(tops + row * CHUNKS + chunk, top)
    tl.store(sums + row * CHUNKS + chunk, tl.sum(tl.exp(value - top), 0))


@triton.jit
def _scaled(logits, position, at, temperature, V):
    value = tl.load(logits + position * V + at, at < V, other=-float("inf")).to(tl.float32)
    return value / temperature


@triton.jit
def _first(weights, target, at, SIZE: tl.constexpr):
    """The first place with a weight whose cumulative sum exceeds the target, else the last that has one."""
    last = tl.max(tl.where(weights > 0, at, 0), 0)
    over = (tl.cumsum(weights, 0) > target) & (weights > 0)
    return tl.minimum(tl.min(tl.where(over, at, SIZE), 0), last)


@triton.jit
def _advance(column, capacity, row, drawn, token, lengths, ended, eos, EOS: tl.constexpr):
    """A row has drawn `token`."""
    is_end = token < 0
    for e in tl.static_range(EOS):
        is_end = is_end | (token == tl.load(eos + e))
    tl.store(lengths + row, drawn + 1)
    tl.store(ended + row, is_end)
    tl.store(column + _TOKEN * capacity, token)
    tl.store(column + _DRAWN * capacity, drawn + 1)
    over_limit = drawn + 1 >= tl.load(column + _LIMIT * capacity)
    tl.store(column + _DONE * capacity, (is_end | over_limit).to(tl.int64))


@triton.jit(do_not_specialize=["capacity"])
def _choose(
    logits, tops, sums, state, capacity, noise, ids, logprobs, lengths, ended, eos, layout, temperature, V, CHUNKS,
    EOS: tl.constexpr, GREEDY: tl.constexpr, CHUNK_: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A row's token: first its chunk, from the chunks' sums, then its place in there."""
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
            value = _scaled(logits, position, chunk * CHUNK_ + i, temperature, V)
            inner = tl.min(tl.where(value == top, i, CHUNK_), 0)
        else:
            target = tl.load(noise + at) * total
            chunk = _first(mass, target, c, BLOCK_C)
            rest = target - tl.sum(tl.where(c < chunk, mass, 0.0), 0)
            own_top = tl.max(tl.where(c == chunk, chunk_top, -1e30), 0)
            value = _scaled(logits, position, chunk * CHUNK_ + i, temperature, V)
            weights = tl.exp(value - own_top)
            inner = _first(weights, (rest * tl.exp(top - own_top).to(tl.float64)).to(tl.float32), i, CHUNK_)
        token = tl.minimum(chunk * CHUNK_ + inner, V - 1).to(tl.int64)  # logits of NaN must not leave the vocabulary
        chosen = tl.max(tl.where(i == inner, value, -float("inf")), 0)
        tl.store(ids + at, token)
        tl.store(logprobs + at, chosen - top - tl.log(total).to(tl.float32))
        _advance(column, capacity, row, drawn, token, lengths, ended, eos, EOS)


class TritonOps(TorchOps):
    """The operations on a GPU, each one or two launches and fit for a captured graph."""

    head_multiple = 8  # loads of 16 bytes

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

    def draw(self, logits: Tensor, state: Tensor, tables: Tables, settings: SamplingParams) -> None:
        rows, width = logits.shape
        chunks = triton.cdiv(width, CHUNK)
        tops, sums = (torch.empty(rows, chunks, dtype=torch.float32, device=logits.device) for _ in range(2))
        _chunk_sums[(rows, chunks)](logits, tops, sums, settings.temperature, width, chunks, CHUNK)
        out = (tables.ids, tables.logprobs, tables.lengths, tables.ended)
        _choose[(rows,)](
            logits, tops, sums, state, state.stride(0), tables.noise, *out, tables.eos, self.layout,
            settings.temperature, width, chunks, len(tables.eos), settings.greedy, CHUNK,
            triton.next_power_of_2(chunks), num_warps=8,
        )  # fmt: skip

    def columns(self, longest: int) -> None:
        self.layout[COLUMNS] = longest

    def cache(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> TritonCache:
        return TritonCache(shape, dtype, self.layout)
