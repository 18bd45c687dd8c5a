"""Triton kernels for the attention of one new token per row: rotation and storing, attention over parts, their sum.

All values that change between calls (address and sizes of the cache) are read from the tensor `layout`, so a captured
graph stays valid when the cache is freed and allocated again. decode_ops.py defines the operations in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_core.sampling.decode_ops import DONE, DRAWN, PROMPT, SLOT, START, AttentionShape, LayerAttention, Rotation
from grpo_core.sampling.kernels.product_kernels import Product, finish, load_product, whole
from grpo_core.sampling.kernels.shared_memory import fit_attention

_DRAWN, _START, _PROMPT, _SLOT, _DONE = (tl.constexpr(x) for x in (DRAWN, START, PROMPT, SLOT, DONE))

# the fields of `layout` [6] int64: elements from the cache's anchor to its buffer, number of prompts, tokens of each,
# number of slots, tokens of each, width of the call's tables
OFFSET, PROMPTS, WIDTH, SLOTS, LENGTH, TABLE_WIDTH = range(6)
_OFFSET, _PROMPTS, _WIDTH, _SLOTS, _LENGTH = (tl.constexpr(x) for x in range(5))

KEYS_PER_BLOCK = 64  # keys that a program loads at once
MIN_PROGRAMS = 256  # programs that occupy a whole GPU
MAX_SPLITS = 16  # parts into which a row's attention may be split
NO_NORM, NORM_HEADS, NORM_WIDTH = range(3)  # of queries and keys: none, every head by itself, all heads together
_NO_NORM, _NORM_HEADS = tl.constexpr(NO_NORM), tl.constexpr(NORM_HEADS)


@triton.jit
def _prompt_offset(layout, layer, part, prompt, head, LAYERS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr):
    """Return the elements from the anchor to a prompt's keys (part 0) or values (part 1)."""
    row = (layer * 2 + part) * tl.load(layout + _PROMPTS) + prompt
    return tl.load(layout + _OFFSET) + (row * KV_HEADS + head) * tl.load(layout + _WIDTH) * DIM


@triton.jit
def _row_offset(layout, layer, part, slot, head, LAYERS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr):
    """Return the elements from the anchor to a slot's keys (part 0) or values (part 1), which follow all prompts."""
    prompts = LAYERS * 2 * tl.load(layout + _PROMPTS) * KV_HEADS * tl.load(layout + _WIDTH) * DIM
    row = (layer * 2 + part) * tl.load(layout + _SLOTS) + slot
    return tl.load(layout + _OFFSET) + prompts + (row * KV_HEADS + head) * tl.load(layout + _LENGTH) * DIM


@triton.jit
def multiply_by_weight(scaled, weight, inside, like, OFFSET: tl.constexpr):
    """Return normalized values times OFFSET + weight. If OFFSET is 0 they are rounded to the dtype of `like` before."""
    factor = tl.load(weight, inside, other=0.0).to(tl.float32)
    if OFFSET == 0:
        scaled = scaled.to(like.dtype.element_ty).to(tl.float32)
    else:
        factor += OFFSET
    return scaled * factor


@triton.jit
def _scale_widths(qkv, stride, scales, eps, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Store the factor that normalizes all query heads of one row (part 0) or all of its key heads (part 1)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    size = tl.where(part == 0, QUERIES, KEYS)
    value = tl.load(qkv + row * stride + part * QUERIES + at, at < size, other=0.0).to(tl.float32)
    tl.store(scales + row * 2 + part, tl.rsqrt(tl.sum(value * value, 0) / size + eps))


@triton.jit
def _rotate(first, second, cos, sin, inside):
    """Return the two halves of a head, rotated."""
    c = tl.load(cos, inside, other=0.0).to(tl.float32)
    s = tl.load(sin, inside, other=0.0).to(tl.float32)
    return first * c - second * s, second * c + first * s


@triton.jit
def _load_head(
    qkv, part_stride, row_stride, bias, b, row, start, half, rest_at, linear, like,
    DIM: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """Return the two halves and the rest of the head of a `Product` that begins at column `start`."""
    at, inside = start + half, half < HALF
    first = load_product(
        qkv, part_stride, row_stride, bias, b, row, at, inside, linear, like, WIDTH, PARTS, HAS_BIAS, RANK
    )
    second = load_product(
        qkv, part_stride, row_stride, bias, b, row, at + HALF, inside, linear, like, WIDTH, PARTS, HAS_BIAS, RANK
    )
    at, inside = start + rest_at, rest_at < DIM
    rest = load_product(
        qkv, part_stride, row_stride, bias, b, row, at, inside, linear, like, WIDTH, PARTS, HAS_BIAS, RANK
    )
    return first, second, rest


# a head is two halves of HALF dimensions, which are rotated if ROTATES, and the rest of its DIM dimensions
@triton.jit(do_not_specialize=["layer", "capacity"])
def _rotate_and_store(
    qkv, part_stride, row_stride, bias, b, q_out, cos, sin, q_weight, k_weight, scales, eps, state, capacity, anchor,
    layout, layer, LAYERS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    ROTATES: tl.constexpr, LINEARS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """Process one head of one row: normalize and rotate a query or key, and write it to `q_out` or to the cache.

    Values are written to the cache as they are. `qkv` is a `Product` of one layer, or of three for q, k and v.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = state + row
    if tl.load(column + _DONE * capacity) == 0:
        place = tl.load(column + _DRAWN * capacity) - 1
        half = tl.arange(0, BLOCK_HALF)
        inside = half < HALF
        linear = 0
        if LINEARS == 3:
            linear = tl.where(head < HEADS, 0, 1 + (head - HEADS) // KV_HEADS)
        rest_at = 2 * HALF + tl.arange(0, BLOCK_REST)
        first, second, rest = _load_head(
            qkv, part_stride, row_stride, bias, b, row, head * DIM, half, rest_at, linear, q_out,
            DIM, HALF, WIDTH, PARTS, HAS_BIAS, RANK,
        )  # fmt: skip
        if head < HEADS + KV_HEADS:
            if NORM != _NO_NORM:
                weight = tl.where(head < HEADS, q_weight, k_weight)
                if NORM == _NORM_HEADS:  # the rest is 0 where there is none
                    squares = tl.sum(first * first, 0) + tl.sum(second * second, 0) + tl.sum(rest * rest, 0)
                    scale = tl.rsqrt(squares / DIM + eps)
                else:
                    weight += tl.where(head < HEADS, head, head - HEADS) * DIM
                    scale = tl.load(scales + row * 2 + tl.where(head < HEADS, 0, 1))
                first = multiply_by_weight(first * scale, weight + half, inside, q_out, OFFSET)
                second = multiply_by_weight(second * scale, weight + HALF + half, inside, q_out, OFFSET)
                rest = multiply_by_weight(rest * scale, weight + rest_at, rest_at < DIM, q_out, OFFSET)
            if ROTATES:
                at = (tl.load(column + _START * capacity) + place) * HALF + half
                first, second = _rotate(first, second, cos + at, sin + at, inside)
        if head < HEADS:
            target = q_out + (row * HEADS + head) * DIM
        else:
            part = (head - HEADS) // KV_HEADS
            slot, kv_head = tl.load(column + _SLOT * capacity), (head - HEADS) % KV_HEADS
            offset = _row_offset(layout, layer, part, slot, kv_head, LAYERS, KV_HEADS, DIM)
            target = anchor + offset + place * DIM
        tl.store(target + half, first, inside)
        tl.store(target + HALF + half, second, inside)
        tl.store(target + rest_at, rest, rest_at < DIM)


@triton.jit
def _token_offsets(at, start, prompt_offset, row_offset, DIM: tl.constexpr):
    """Return the elements from the anchor to the tokens `at` of a row: first its prompt's, then its own."""
    return tl.multiple_of(tl.where(at >= start, row_offset + (at - start) * DIM, prompt_offset + at * DIM), 8)


@triton.jit
def _find_part(total, split, splits, BLOCK_K: tl.constexpr, WINDOW: tl.constexpr):
    """Return the first token of one part of a row's tokens and the one after its last."""
    seen = total
    if WINDOW != 0:
        seen = tl.minimum(total, WINDOW)
    size = tl.cdiv(tl.cdiv(seen, splits), BLOCK_K) * BLOCK_K
    low = total - seen + split * size
    return low, tl.minimum(low + size, total)


@triton.jit
def _bound(scores, CAP: tl.constexpr):
    """Return CAP * tanh(scores / CAP), or the scores themselves if CAP is 0."""
    if CAP != 0:
        scores = CAP * (2 * tl.sigmoid(2 * scores / CAP) - 1)
    return scores


@triton.jit
def attend_to_block(
    query, keys, values, inside, maximum, weight_sum, result, scale, CAP: tl.constexpr, PRECISION: tl.constexpr
):
    """Return the largest score, the sum of exponentials and the result of the keys so far and those of a block.

    At least one key of the block must be inside.
    """
    scores = _bound(tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale, CAP)
    scores = tl.where(inside[None, :], scores, -1e30)
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp(scores - new_maximum[:, None])
    rescale = tl.exp(maximum - new_maximum)
    weight_sum = weight_sum * rescale + tl.sum(weights, 1)
    result = result * rescale[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return new_maximum, weight_sum, result


@triton.jit
def log_sum(maximum, weight_sum):
    """Return the log of a part's sum of exponentials, or a very small number if the part has no keys."""
    return tl.where(weight_sum > 0, maximum + tl.log(tl.maximum(weight_sum, 1e-30)), -1e30)


@triton.jit
def average_parts(
    parts, logsums, out, head, splits, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr
):
    """Store the average of the parts of one head of one row, weighted by their sums of exponentials."""
    split = tl.arange(0, BLOCK_SPLITS)
    d = tl.arange(0, BLOCK_D)
    logsum = tl.load(logsums + head * splits + split, split < splits, other=-1e30)
    weights = tl.exp(logsum - tl.max(logsum, 0))
    weights = weights / tl.sum(weights, 0)
    inside = (split < splits)[:, None] & (d < DIM)[None, :]
    values = tl.load(parts + (head * splits + split)[:, None] * DIM + d[None, :], inside, other=0.0)
    tl.store(out + head * DIM + d, tl.sum(values * weights[:, None], 0), d < DIM)


@triton.jit
def _begin_softmax(sinks, member, split, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SINKS: tl.constexpr):
    """Return the maximum and the sum with which a softmax begins: those of a sink in the first part, or of nothing."""
    maximum, weight_sum = member * 0.0 - 1e30, member * 0.0
    if SINKS:
        sink = tl.load(sinks, member < HEADS // KV_HEADS, other=0.0).to(tl.float32)
        maximum = tl.where(split == 0, sink, maximum)
        weight_sum = tl.where(split == 0, weight_sum + 1.0, weight_sum)
    return maximum, weight_sum


# the tokens of a row are its prompt's and its own, of which it sees the last WINDOW, or all if WINDOW is 0; with one
# part the result goes to `out`; with several, the result of each part and the log of its sum of exponentials go to
# `parts` and `logsums`, which `_combine` reads
@triton.jit(do_not_specialize=["layer", "capacity"])
def _attend(
    q, sinks, out, parts, logsums, state, capacity, anchor, layout, layer, scale,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """Attend with the query heads of one row that share a key head, to one of several parts of the row's tokens."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, splits = tl.program_id(2), tl.num_programs(2)
    column = state + row
    if tl.load(column + _DONE * capacity) == 0:
        start = tl.load(column + _START * capacity)
        total = start + tl.load(column + _DRAWN * capacity)
        low, high = _find_part(total, split, splits, BLOCK_K, WINDOW)
        prompt, slot = tl.load(column + _PROMPT * capacity), tl.load(column + _SLOT * capacity)
        k_prompt = _prompt_offset(layout, layer, 0, prompt, kv_head, LAYERS, KV_HEADS, DIM)
        v_prompt = _prompt_offset(layout, layer, 1, prompt, kv_head, LAYERS, KV_HEADS, DIM)
        k_row = _row_offset(layout, layer, 0, slot, kv_head, LAYERS, KV_HEADS, DIM)
        v_row = _row_offset(layout, layer, 1, slot, kv_head, LAYERS, KV_HEADS, DIM)

        member, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
        query_mask = (member < HEADS // KV_HEADS)[:, None] & (d < DIM)[None, :]
        heads = row * HEADS + kv_head * (HEADS // KV_HEADS) + member
        query = tl.load(q + heads[:, None] * DIM + d[None, :], query_mask, other=0.0)
        own_sinks = sinks + kv_head * (HEADS // KV_HEADS) + member
        maximum, weight_sum = _begin_softmax(own_sinks, member, split, HEADS, KV_HEADS, SINKS)
        result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for begin in range(low, high, BLOCK_K):
            at = begin + tl.arange(0, BLOCK_K)
            inside = at < high
            k_at = _token_offsets(at, start, k_prompt, k_row, DIM)
            v_at = _token_offsets(at, start, v_prompt, v_row, DIM)
            key_mask = inside[:, None] & (d < DIM)[None, :]
            keys = tl.load(anchor + k_at[:, None] + d[None, :], key_mask, other=0.0)
            values = tl.load(anchor + v_at[:, None] + d[None, :], key_mask, other=0.0)
            maximum, weight_sum, result = attend_to_block(
                query, keys, values, inside, maximum, weight_sum, result, scale, CAP, PRECISION
            )
        result = result / tl.maximum(weight_sum, 1e-30)[:, None]
        if splits == 1:
            tl.store(out + heads[:, None] * DIM + d[None, :], result, query_mask)
        else:
            tl.store(parts + (heads[:, None] * splits + split) * DIM + d[None, :], result, query_mask)
            tl.store(logsums + heads * splits + split, log_sum(maximum, weight_sum), member < HEADS // KV_HEADS)


@triton.jit(do_not_specialize=["capacity", "splits"])
def _combine(
    parts, logsums, out, state, capacity, splits,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Average the parts of one head of one row."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(state + row + _DONE * capacity) == 0:
        average_parts(parts, logsums, out, row * HEADS + tl.program_id(1), splits, DIM, BLOCK_D, BLOCK_SPLITS)


class TritonCache:
    """The cache of decode_ops.TorchCache in one buffer: the keys and values of all prompts, then those of all slots.

    Rows read their prompt's keys and values where they are, without a copy. Captured graphs find the buffer by its
    distance from `anchor`, a tensor that is never freed.
    """

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, layout: Tensor) -> None:
        self.shape, self.layout = shape, layout
        self.anchor = torch.empty(16, dtype=dtype, device=layout.device)
        self.free()

    def allocate(self, prompts: int, width: int, slots: int, length: int) -> None:
        s = self.shape
        prompts_shape = torch.Size((s.layers, 2, prompts, s.kv_heads, width, s.head_dim))
        slot_elements = s.layers * 2 * slots * s.kv_heads * length * s.head_dim
        buffer = self.anchor.new_empty(prompts_shape.numel() + slot_elements)
        self.buffer, self.prompts = buffer, buffer[: prompts_shape.numel()].view(prompts_shape)
        offset = (buffer.data_ptr() - self.anchor.data_ptr()) // buffer.element_size()
        self.layout[:TABLE_WIDTH] = torch.tensor([offset, prompts, width, slots, length])

    def free(self) -> None:
        self.buffer = self.prompts = self.anchor[:0]
        self._state = None

    def store_prompts(self, layer: int, first: int, keys: Tensor, values: Tensor) -> None:
        for j, part in enumerate((keys, values)):
            self.prompts[layer, j, first : first + len(part), :, : part.shape[2]] = part

    def add_rows(self, state: Tensor) -> None:
        """Do nothing: rows read their prompts where they are."""

    def keep_rows(self, state: Tensor) -> None:
        """Do nothing: every row keeps its slot."""

    def begin_step(self, state: Tensor, rotations: Sequence[Rotation]) -> None:
        self._state, self._rotations = state, rotations

    def attend(self, layer: int, qkv: Tensor | Product, own: LayerAttention) -> Tensor:
        product = whole(qkv) if isinstance(qkv, Tensor) else qkv
        s, state, rows = self.shape, self._state, product.parts.shape[1]
        sizes = (s.layers, s.heads, s.kv_heads, s.head_dim)
        memory = (state, state.stride(0), self.anchor, self.layout, layer)
        q = self._rotate_and_store(product, own, memory, sizes)
        out, splits = torch.empty_like(q), count_splits(rows * s.kv_heads)
        parts = torch.empty(rows * s.heads * splits, s.head_dim, dtype=torch.float32, device=q.device)
        logsums = torch.empty(rows * s.heads * splits, dtype=torch.float32, device=q.device)
        block_d = max(16, triton.next_power_of_2(s.head_dim))
        block_q = max(16, triton.next_power_of_2(s.heads // s.kv_heads))
        precision = "ieee" if q.dtype == torch.float32 else "tf32"
        is_wide = block_d * q.element_size() >= 512  # such heads need smaller blocks to fit into shared memory
        block_k, stages = fit_attention(
            KEYS_PER_BLOCK // 2 if is_wide else KEYS_PER_BLOCK, 1 if is_wide and q.element_size() > 2 else 3,
            bytes_per_key=2 * block_d * q.element_size(), bytes_of_queries=block_q * block_d * q.element_size(),
            device=q.device,
        )  # fmt: skip
        _attend[(rows, s.kv_heads, splits)](
            q, q if own.sinks is None else own.sinks, out, parts, logsums, *memory, s.scale, *sizes, block_d, block_q,
            block_k, precision, own.window or 0, s.score_cap or 0.0, own.sinks is not None, num_warps=4,
            num_stages=stages,
        )  # fmt: skip
        if splits > 1:
            sizes = (s.heads, s.head_dim, block_d, MAX_SPLITS)
            _combine[(rows, s.heads)](parts, logsums, out, state, state.stride(0), splits, *sizes, num_warps=2)
        return out

    def _rotate_and_store(self, qkv: Product, own: LayerAttention, memory: tuple, sizes: tuple[int, ...]) -> Tensor:
        """Store the keys and values of `qkv` in the cache; return the queries, [R, heads dim]."""
        s, rows = self.shape, qkv.parts.shape[1]
        q = qkv.parts.new_empty(rows, s.heads * s.head_dim, dtype=qkv.dtype)
        norm, weights, scales = NO_NORM, (q, q), q  # what is not read is passed as q
        if own.q_norm is not None and own.k_norm is not None:
            norm = NORM_HEADS if len(own.q_norm) == s.head_dim else NORM_WIDTH
            weights = (own.q_norm, own.k_norm)
        if norm == NORM_WIDTH:
            y = finish(qkv)
            scales = torch.empty(rows, 2, dtype=torch.float32, device=q.device)
            widths = (s.heads * s.head_dim, s.kv_heads * s.head_dim)
            _scale_widths[(rows, 2)](y, y.stride(0), scales, s.eps, *widths, triton.next_power_of_2(widths[0]))
            qkv = whole(y)
        rotation = (q, q) if own.rotation is None else self._rotations[own.rotation]
        half = s.head_dim // 2 if own.rotation is None else s.rotated // 2
        blocks = (triton.next_power_of_2(half), triton.next_power_of_2(max(1, s.head_dim - 2 * half)))
        _rotate_and_store[(rows, s.heads + 2 * s.kv_heads)](
            *qkv.inputs(), q, *rotation, *weights, scales, s.eps, *memory, *sizes, half, *blocks, norm, s.norm_offset,
            own.rotation is not None, qkv.layers, *qkv.constants(), num_warps=1,
        )  # fmt: skip
        return q


def count_splits(programs: int) -> int:
    """Return the parts into which each row's tokens are split, so that few rows still occupy the GPU: a power of 2."""
    splits = 1
    while programs * splits < MIN_PROGRAMS and splits < MAX_SPLITS:
        splits *= 2
    return splits
