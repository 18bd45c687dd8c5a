"""Triton kernels for a mixture of experts, which expert_ops.py defines in torch.

`_multiply_router` and `_choose_experts` choose the experts of each row. `_group_pairs` lists the pairs of each expert,
and the experts that have any. `_multiply_groups` computes the product of every listed expert with its rows: gate and up
with the activation, then down. `sum_parts` adds the weighted outputs of a row. All sizes are those of the inputs, so a
graph can capture them, and every output is written by one program, so the same inputs give the same bits. Sums are
float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from grpo_core.sampling.expert_ops import NO_EXPERT, ExpertWeights, Gating, Routing
from grpo_core.sampling.kernels.shared_memory import available_bytes

_NO_EXPERT = tl.constexpr(NO_EXPERT)


class Blocks(NamedTuple):
    """The part of a product that a program computes at once."""

    pairs: int  # at least 16
    columns: int  # of the output
    inner: int  # of the sum
    warps: int
    stages: int


# (rows up to which the blocks are used, blocks of gate and up, blocks of down), for 16-bit weights; measured by
# benchmarks/experts.py
BLOCKS: list[tuple[int, Blocks, Blocks]] = [
    (16, Blocks(16, 32, 128, 4, 4), Blocks(16, 64, 128, 4, 4)),
    (32, Blocks(32, 32, 128, 4, 4), Blocks(16, 64, 128, 4, 4)),
    (512, Blocks(64, 32, 64, 4, 4), Blocks(64, 64, 64, 4, 4)),
    (1 << 60, Blocks(64, 64, 64, 4, 4), Blocks(64, 128, 64, 4, 4)),
]
WIDE_BLOCKS = Blocks(16, 16, 32, 4, 2)  # for float32, which tensor cores would round
COLUMNS_PER_PROGRAM = 1024  # of the sum of a row's parts
MAX_ROUTED_ROWS = 64  # for which the product of a router is divided
ROUTER_INNER, ROUTER_BLOCK, ROUTER_EXPERTS = 256, 128, 16  # dimensions of a part, those at once, and experts at once
PAIRS_PER_PROGRAM = 256  # that are grouped


@triton.jit(do_not_specialize=["R"])
def _multiply_router(
    x, weight, out, counters, R, E: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store one part of the sum of the logits of some rows and experts; the parts are [parts, R, E] in float32.

    The E + 1 `counters`, which the next kernel counts with, are set to 0.
    """
    part = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    if part == 0 and tl.program_id(0) == 0:
        tl.store(counters + e, 0, e <= E)
        tl.store(counters + E, 0)
    sums = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for start in tl.static_range(0, INNER, BLOCK_H):
        h = part * INNER + start + tl.arange(0, BLOCK_H)
        values = tl.load(x + row[:, None] * H + h[None, :], (row < R)[:, None] & (h < H)[None, :], other=0.0)
        factors = tl.load(weight + e[None, :] * H + h[:, None], (e < E)[None, :] & (h < H)[:, None], other=0.0)
        sums = tl.dot(values, factors, sums, input_precision=PRECISION)
    tl.store(out + (part * R + row[:, None]) * E + e[None, :], sums, (row < R)[:, None] & (e < E)[None, :])


@triton.jit
def _add_pairs(pair, expert, is_grouped, pairs, order, sizes, total, R):
    """Add some pairs to the rows of their experts in `pairs` [E, R], and list experts that had none; see `Groups`.

    Which pair comes first is left to chance, and changes no result: every pair has outputs of its own.
    """
    expert = expert.to(tl.int64)
    place = tl.atomic_add(sizes + expert, 1, is_grouped, sem="relaxed")
    tl.store(pairs + expert * R + place, pair, is_grouped)
    is_first = is_grouped & (place == 0)
    position = tl.atomic_add(total + expert * 0, 1, is_first, sem="relaxed")
    tl.store(order + position, expert, is_first)


# the logits of a row are the sum of their PARTS, and of `bias` if HAS_BIAS, rounded to the dtype of `like`
@triton.jit(do_not_specialize=["part_stride", "R"])
def _choose_experts(
    logits, stride, part_stride, bias, like, done, experts, weights, pairs, order, sizes, total, R,
    E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMALIZED: tl.constexpr, ROUNDED: tl.constexpr, HAS_DONE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Store the experts of one row and their weights; with GROUPS its pairs too, as `_add_pairs` does."""
    row = tl.program_id(0).to(tl.int64)
    e, j = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    value = tl.load(logits + row * stride + e, e < E, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(logits + part * part_stride + row * stride + e, e < E, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + e, e < E, other=0.0).to(tl.float32)
    value = tl.where(e < E, value.to(like.dtype.element_ty).to(tl.float32), -float("inf"))
    maximum = tl.max(value, 0)
    chosen = tl.full([BLOCK_K], E - 1, tl.int32)
    scores = tl.full([BLOCK_K], -float("inf"), tl.float32)
    rest = value
    for i in tl.static_range(K):
        best = tl.max(rest, 0)
        at = tl.minimum(tl.min(tl.where(rest == best, e, BLOCK_E), 0), E - 1)  # NaN is equal to nothing
        chosen = tl.where(j == i, at, chosen)
        scores = tl.where(j == i, best, scores)
        rest = tl.where(e == at, -float("inf"), rest)
    weight = tl.exp(scores - maximum)
    weight = weight / tl.sum(weight if NORMALIZED else tl.exp(value - maximum), 0)
    if ROUNDED:
        weight = weight.to(like.dtype.element_ty).to(tl.float32)
    if HAS_DONE:
        is_done = tl.load(done + row) != 0
        chosen = tl.where(is_done, _NO_EXPERT, chosen)
        weight = tl.where(is_done, 0.0, weight)
    tl.store(experts + row * K + j, chosen, j < K)
    tl.store(weights + row * K + j, weight, j < K)
    if GROUPS:
        _add_pairs(row.to(tl.int32) * K + j, chosen, (j < K) & (chosen >= 0), pairs, order, sizes, total, R)


@triton.jit(do_not_specialize=["count", "R"])
def _group_pairs(experts, pairs, order, sizes, total, count, R, BLOCK_P: tl.constexpr):
    """Group some pairs, as `_add_pairs` does."""
    pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    expert = tl.load(experts + pair, pair < count, other=_NO_EXPERT)
    _add_pairs(pair, expert, expert >= 0, pairs, order, sizes, total, R)


@triton.jit
def _activate(gates, ups, IS_SILU: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, like):
    """Return the activation in float32; LIMIT is 0 for no limit."""
    if LIMIT != 0:
        gates = tl.minimum(gates, LIMIT)
        ups = tl.minimum(tl.maximum(ups, -LIMIT), LIMIT)
    argument = ALPHA * gates
    if not IS_SILU:  # 0.5 x (1 + tanh(u)) = x sigmoid(2 u), with 2 u = sqrt(8 / pi) (x + 0.044715 x^3)
        argument = 1.5957691216057308 * (gates + 0.044715 * gates * gates * gates)
    active = (gates * tl.sigmoid(argument)).to(like.dtype.element_ty).to(tl.float32)
    return (ups + SHIFT) * active


# a GATED product has two columns of the weights for each of its N outputs, which lie side by side if they are
# INTERLEAVED; in a block of WIDTH columns they alternate, or all gates come first if HALVES
@triton.jit
def _find_columns(
    first, N: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HALVES: tl.constexpr
):
    """Return the output and the column of the weights that each column of a block belongs to."""
    i = tl.arange(0, WIDTH)
    unit = first + i
    column = unit
    if GATED:
        if HALVES:
            unit = first + i % (WIDTH // 2)
            column = i // (WIDTH // 2) * N + unit
        else:
            unit = first + i // 2
            column = i % 2 * N + unit
            if INTERLEAVED:
                column = 2 * first + i
    return unit, column


# pair p has the row p // SHARE of x
@triton.jit(do_not_specialize=["R"])
def _multiply_groups(
    x, pairs, order, sizes, total, weights, biases, out, R,
    N: tl.constexpr, K: tl.constexpr, EXPERT_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr,
    INNER_STRIDE: tl.constexpr, SHARE: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALVES: tl.constexpr, IS_SILU: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    SHIFT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute some outputs of all pairs of one listed expert."""
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    width: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    position = tl.program_id(0) // blocks
    if position < tl.load(total):
        expert = tl.load(order + position).to(tl.int64)
        size = tl.load(sizes + expert)
        first = (tl.program_id(0) % blocks) * BLOCK_N
        unit, column = _find_columns(first, N, width, GATED, INTERLEAVED, HALVES)
        source = weights + expert * EXPERT_STRIDE + column[None, :] * COLUMN_STRIDE
        for begin in range(0, size, BLOCK_P):
            at = begin + tl.arange(0, BLOCK_P)
            pair = tl.load(pairs + expert * R + at, at < size, other=0)
            rows = x + (pair // SHARE).to(tl.int64)[:, None] * K
            sums = tl.zeros([BLOCK_P, width], tl.float32)
            for start in range(0, K, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                values = tl.load(rows + k[None, :], (at < size)[:, None] & (k < K)[None, :], other=0.0)
                part = tl.load(source + k[:, None] * INNER_STRIDE, (k < K)[:, None] & (unit < N)[None, :], other=0.0)
                sums = tl.dot(values, part, sums, input_precision=PRECISION)
            if HAS_BIAS:
                columns: tl.constexpr = 2 * N if GATED else N
                sums += tl.load(biases + expert * columns + column, unit < N, other=0.0).to(tl.float32)[None, :]
            unit_out = first + tl.arange(0, BLOCK_N)
            target = out + pair.to(tl.int64)[:, None] * N + unit_out[None, :]
            inside = (at < size)[:, None] & (unit_out < N)[None, :]
            if GATED:
                sums = sums.to(x.dtype.element_ty).to(tl.float32)
                if HALVES:
                    sides = tl.permute(tl.reshape(sums, [BLOCK_P, 2, BLOCK_N]), (0, 2, 1))
                else:
                    sides = tl.reshape(sums, [BLOCK_P, BLOCK_N, 2])
                gates, ups = tl.split(sides)
                tl.store(target, _activate(gates, ups, IS_SILU, ALPHA, LIMIT, SHIFT, x), inside)
            else:
                tl.store(target, sums, inside)


@triton.jit
def sum_parts(parts, experts, weights, row, at, H: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr):
    """Return the columns `at` of the weighted sum of one row's parts [K, H], in float32."""
    total = tl.zeros([BLOCK_H], tl.float32)
    for j in tl.static_range(K):
        pair = row * K + j
        is_computed = tl.load(experts + pair) >= 0
        part = tl.load(parts + pair * H + at, (at < H) & is_computed, other=0.0).to(tl.float32)
        total += part * tl.load(weights + pair).to(tl.float32)
    return total


@triton.jit
def _add_parts(parts, experts, weights, out, H: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr):
    """Store some columns of the weighted sum of one row's parts."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    tl.store(out + row * H + at, sum_parts(parts, experts, weights, row, at, H, K, BLOCK_H), at < H)


def choose_experts(logits: Tensor, routing: Routing, done: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the experts [R, k] of each row, and their weights [R, k] in float32; of equal logits the first."""
    return _choose(logits[None], None, logits, routing, done, None)


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing, done: Tensor | None
) -> tuple[Tensor, Tensor, Groups]:
    """Return the experts [R, k] of each row, their weights, and the groups that apply_experts takes.

    The logits are x Wᵀ + b for x [R, H] and W [E, H]. For few rows the product is divided into parts of the sum, so
    that it occupies more of the GPU.
    """
    (rows, hidden), count = x.shape, len(weight)
    if rows > MAX_ROUTED_ROWS:
        experts, weights = choose_experts(F.linear(x, weight, bias), routing, done)
        return experts, weights, group_rows(experts, count)
    parts = triton.cdiv(hidden, ROUTER_INNER)
    logits = torch.empty(parts, rows, count, dtype=torch.float32, device=x.device)
    block_r, precision = max(16, triton.next_power_of_2(rows)), "ieee" if x.dtype == torch.float32 else "tf32"
    grid = (triton.cdiv(rows, block_r), triton.cdiv(count, ROUTER_EXPERTS), parts)
    sizes = (count, hidden, ROUTER_INNER, block_r, ROUTER_EXPERTS, ROUTER_BLOCK)
    groups, counters = _make_groups(rows, count, x.device)
    _multiply_router[grid](x.contiguous(), weight.contiguous(), logits, counters, rows, *sizes, precision, num_warps=4)
    return *_choose(logits, bias, x, routing, done, groups), groups


def _choose(
    logits: Tensor, bias: Tensor | None, like: Tensor, routing: Routing, done: Tensor | None, groups: Groups | None
) -> tuple[Tensor, Tensor]:
    """Choose experts by logits [parts, R, E], which are summed, and rounded to the dtype of `like`.

    Their pairs are added to `groups`, if there are any.
    """
    parts, rows, count = logits.shape
    experts = torch.empty(rows, routing.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(rows, routing.top_k, dtype=torch.float32, device=logits.device)
    sizes = (count, routing.top_k, triton.next_power_of_2(count), triton.next_power_of_2(routing.top_k))
    flags = (
        parts, bias is not None, routing.is_normalized, routing.is_rounded, done is not None, groups is not None,
    )  # fmt: skip
    inputs = (logits, logits.stride(1), logits.stride(0), logits if bias is None else bias, like)
    _choose_experts[(rows,)](
        *inputs, logits if done is None else done, experts, weights, *(groups or [experts] * 4), rows, *sizes, *flags,
        num_warps=1 if count <= 256 else 4,
    )  # fmt: skip
    return experts, weights


class Groups(NamedTuple):
    """The pairs of every expert: the inputs of `_multiply_groups`."""

    pairs: Tensor  # [E, R] int32: in the row of an expert its pairs, row * k + place, in any order
    order: Tensor  # [E] int32: first the experts with any pair, in any order
    sizes: Tensor  # [E] int32: the number of pairs of each expert
    total: Tensor  # [1] int32: the number of experts with any pair


def group_rows(experts: Tensor, count: int) -> Groups:
    """Return the pairs of each of `count` experts, for the experts [R, k] of rows."""
    groups, counters = _make_groups(len(experts), count, experts.device)
    counters.zero_()
    grid = (triton.cdiv(experts.numel(), PAIRS_PER_PROGRAM),)
    _group_pairs[grid](experts, *groups, experts.numel(), len(experts), PAIRS_PER_PROGRAM, num_warps=4)
    return groups


def _make_groups(rows: int, count: int, device: torch.device) -> tuple[Groups, Tensor]:
    """Return groups without pairs, and their counters [E + 1], which must be set to 0 before."""
    pairs, order = (torch.empty(size, dtype=torch.int32, device=device) for size in ((count, rows), (count,)))
    counters = torch.empty(count + 1, dtype=torch.int32, device=device)
    return Groups(pairs, order, *counters.split([count, 1])), counters


class Parts(NamedTuple):
    """The outputs of each row's experts, and what their sum needs."""

    parts: Tensor  # [R k, H]
    experts: Tensor  # [R, k]
    weights: Tensor  # [R, k]

    def sum(self) -> Tensor:
        """Return the weighted sums [R, H]."""
        (rows, top_k), hidden = self.experts.shape, self.parts.shape[1]
        out = self.parts.new_empty(rows, hidden)
        block = min(COLUMNS_PER_PROGRAM, triton.next_power_of_2(hidden))
        _add_parts[(rows, triton.cdiv(hidden, block))](*self, out, hidden, top_k, block)
        return out


def apply_experts(
    x: Tensor, experts: Tensor, weights: Tensor, own: ExpertWeights, groups: Groups | None = None
) -> Parts:
    """Return the outputs of each row's experts [R, k] for x [R, H], and their weights [R, k].

    `groups` are those of `experts`, if they are known.
    """
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    (rows, hidden), top_k = x.shape, experts.shape[1]
    _, gate_up_blocks, down_blocks = choose_blocks(rows, x.dtype)
    groups = groups or group_rows(experts, len(own.gate_up))
    inner, parts = x.new_empty(rows * top_k, own.inner), x.new_empty(rows * top_k, hidden)
    multiply_groups(x, groups, own.gate_up, own.gate_up_bias, inner, top_k, top_k, own, own.gating, gate_up_blocks)
    multiply_groups(inner, groups, own.down, own.down_bias, parts, top_k, 1, own, None, down_blocks)
    return Parts(parts, experts, weights)


def multiply_groups(
    x: Tensor,
    groups: Groups,
    weights: Tensor,
    biases: Tensor | None,
    out: Tensor,
    top_k: int,
    share: int,
    own: ExpertWeights,
    gating: Gating | None,
    blocks: Blocks,
) -> None:
    """Store the products of all pairs in `out` [R k, N]; pair p has the row p // share of x, which is contiguous.

    With `gating` the product is gate and up, and its activation is stored.
    """
    strides = weights.stride() if not own.is_transposed else (weights.stride(0), weights.stride(2), weights.stride(1))
    is_split = gating is not None and not own.is_interleaved and strides[1] == 1
    gate = gating or Gating()
    flags = (
        share, biases is not None, gating is not None, own.is_interleaved, is_split, gate.activation == "silu",
        gate.alpha, gate.limit or 0.0, gate.shift, "ieee" if x.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    blocks = fit(blocks, x, gating is not None)
    listed = min(len(weights), len(out))
    _multiply_groups[(listed * triton.cdiv(out.shape[1], blocks.columns),)](
        x, *groups, weights, weights if biases is None else biases, out, len(out) // top_k, out.shape[1], x.shape[1],
        *strides, *flags, *blocks[:3], num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def choose_blocks(rows: int, dtype: torch.dtype) -> tuple[int, Blocks, Blocks]:
    """Return the entry of BLOCKS for this number of rows."""
    if dtype == torch.float32:
        return rows, WIDE_BLOCKS, WIDE_BLOCKS
    return next(entry for entry in BLOCKS if rows <= entry[0])


def fit(blocks: Blocks, x: Tensor, is_gated: bool) -> Blocks:
    """Return the blocks with as many stages as the GPU's shared memory holds, at least 1."""
    stages = min(blocks.stages, available_bytes(x.device) // shared_bytes(blocks, x.element_size(), is_gated))
    return blocks._replace(stages=max(1, stages))


def shared_bytes(blocks: Blocks, itemsize: int, is_gated: bool) -> int:
    """Return the bytes of shared memory of one stage."""
    return (blocks.pairs + blocks.columns * (2 if is_gated else 1)) * blocks.inner * itemsize
