"""Attention of one new token a row as Triton kernels: rotation and the cache, the row's parts, and their sum.

Everything that changes between calls (the cache's place and its sizes) is read from `layout`, a tensor, so a captured
graph stays valid when the cache is given back and taken anew. decode_ops.py defines in torch what is computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_core.sampling.decode_ops import DONE, DRAWN, PROMPT, SLOT, START, Shape

_DRAWN, _START, _PROMPT, _SLOT, _DONE = (tl.constexpr(x) for x in (DRAWN, START, PROMPT, SLOT, DONE))

# Of `layout` [6] int64: elements from the cache's anchor to its buffer, prompts in it, tokens of one, slots, tokens of
# one; the width of the call's tables.
OFFSET, PROMPTS, WIDTH, SLOTS, LENGTH, COLUMNS = range(6)
_OFFSET, _PROMPTS, _WIDTH, _SLOTS, _LENGTH = (tl.constexpr(x) for x in range(5))

BLOCK = 64  # keys in one go
FILL = 256  # programs that fill a card
SPLITS = 16  # parts of a row's attention at most


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
                second = (second * scale).to(kind).to(tl.float32) * tl.load(weight + DIM // 2, inside, other=0.0).to(
                    tl.float32
                )
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
                layout,
                layer,
                part,
                tl.load(column + _SLOT * capacity),
                (head - HEADS) % KV_HEADS,
                LAYERS,
                KV_HEADS,
                DIM,
            )
            target = anchor + offset + place * DIM + half
        tl.store(target, first, inside)
        tl.store(target + DIM // 2, second, inside)


@triton.jit
def _offsets(at, start, of_prompt, of_row, DIM: tl.constexpr):
    """Elements from the anchor to the tokens `at`: those of the prompt, then the row's own."""
    return tl.multiple_of(tl.where(at >= start, of_row + (at - start) * DIM, of_prompt + at * DIM), 8)


@triton.jit(do_not_specialize=["layer", "capacity"])
def _attend(
    q, out, parts, logsums, state, capacity, anchor, layout, layer, scale,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row's query heads that share a key head, over one of several parts of the prompt and the row's own tokens."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, splits = tl.program_id(2), tl.num_programs(2)
    column = state + row
    if tl.load(column + _DONE * capacity) == 0:
        start = tl.load(column + _START * capacity)
        total = start + tl.load(column + _DRAWN * capacity)
        share = tl.cdiv(tl.cdiv(total, splits), BLOCK_K) * BLOCK_K
        low, high = split * share, tl.minimum(split * share + share, total)
        prompt, slot = tl.load(column + _PROMPT * capacity), tl.load(column + _SLOT * capacity)
        k_prompt = _prompt_offset(layout, layer, 0, prompt, kv_head, LAYERS, KV_HEADS, DIM)
        v_prompt = _prompt_offset(layout, layer, 1, prompt, kv_head, LAYERS, KV_HEADS, DIM)
        k_row = _row_offset(layout, layer, 0, slot, kv_head, LAYERS, KV_HEADS, DIM)
        v_row = _row_offset(layout, layer, 1, slot, kv_head, LAYERS, KV_HEADS, DIM)

        member, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
        real = (member < HEADS // KV_HEADS)[:, None] & (d < DIM)[None, :]
        heads = row * HEADS + kv_head * (HEADS // KV_HEADS) + member
        query = tl.load(q + heads[:, None] * DIM + d[None, :], real, other=0.0)
        top = tl.full([BLOCK_Q], -1e30, tl.float32)
        weight_sum = tl.zeros([BLOCK_Q], tl.float32)
        mixed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for begin in range(low, high, BLOCK_K):
            at = begin + tl.arange(0, BLOCK_K)
            seen = at < high
            k_at = _offsets(at, start, k_prompt, k_row, DIM)
            v_at = _offsets(at, start, v_prompt, v_row, DIM)
            there = seen[:, None] & (d < DIM)[None, :]
            keys = tl.load(anchor + k_at[:, None] + d[None, :], there, other=0.0)
            values = tl.load(anchor + v_at[:, None] + d[None, :], there, other=0.0)
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
            scores = tl.where(seen[None, :], scores * scale, -1e30)
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])  # some key of a block is always seen
            fade = tl.exp(top - higher)
            weight_sum = weight_sum * fade + tl.sum(weights, 1)
            mixed = mixed * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
            top = higher
        mixed = mixed / tl.maximum(weight_sum, 1e-30)[:, None]
        if splits == 1:
            tl.store(out + heads[:, None] * DIM + d[None, :], mixed, real)
        else:
            tl.store(parts + (heads[:, None] * splits + split) * DIM + d[None, :], mixed, real)
            logsum = tl.where(weight_sum > 0, top + tl.log(tl.maximum(weight_sum, 1e-30)), -1e30)
            tl.store(logsums + heads * splits + split, logsum, member < HEADS // KV_HEADS)


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
        self._state = None

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
            qkv,
            qkv.stride(0),
            q,
            self._cos,
            self._sin,
            *weights,
            s.eps,
            *given,
            *sizes,
            half,
            q_norm is not None,
            num_warps=1,
        )
        out, splits = torch.empty_like(q), _splits(rows * s.kv_heads)
        parts = torch.empty(rows * s.heads * splits, s.head_dim, dtype=torch.float32, device=q.device)
        logsums = torch.empty(rows * s.heads * splits, dtype=torch.float32, device=q.device)
        block_d = max(16, triton.next_power_of_2(s.head_dim))
        block_q = max(16, triton.next_power_of_2(s.heads // s.kv_heads))
        precision = "ieee" if q.dtype == torch.float32 else "tf32"
        wide = block_d * q.element_size() >= 512  # smaller blocks: smaller cards have less shared memory
        how = {"num_warps": 4, "num_stages": 1 if wide else 3}
        into = (q, out, parts, logsums, *given, s.head_dim**-0.5)
        _attend[(rows, s.kv_heads, splits)](
            *into, *sizes, block_d, block_q, BLOCK // 2 if wide else BLOCK, precision, **how
        )
        if splits > 1:
            into = (parts, logsums, out, state, state.stride(0), splits)
            _combine[(rows, s.heads)](*into, s.heads, s.head_dim, block_d, SPLITS, num_warps=2)
        return out


def _splits(programs: int) -> int:
    """Parts that a row's tokens are read in, so that few rows still fill the card."""
    splits = 1
    while programs * splits < FILL and splits < SPLITS:
        splits *= 2
    return splits
