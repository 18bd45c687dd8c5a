"""Triton kernels for the attention of one new token per row over static memory of keys and values, [R, heads, T, D].

A program reads the positions that its row sees and no others. row_attention.py defines the operations in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_core.sampling.kernels.attention_kernels import (
    MAX_SPLITS,
    attend_to_block,
    average_parts,
    count_splits,
    log_sum,
)
from grpo_core.sampling.kernels.shared_memory import fit_attention

MAX_DIM = 256  # of a head
KEYS_PER_BLOCK = 64  # keys that a program loads at once
KEYS_PER_WIDE_BLOCK = 32  # of heads with WIDE_BYTES or more, which must fit into shared memory
WIDE_BYTES = 512
WARPS, STAGES = 4, 3


@triton.jit(do_not_specialize=["T"])
def _store_tokens(
    k, k_row, k_head, v, v_row, v_head, keys, values, position, T,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the newest key and value of one head of one row at the row's position."""
    row, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_D)
    token = (row * KV_HEADS + head) * T + tl.load(position + row)
    key = tl.load(k + row * k_row + head * k_head + d, d < DIM, other=0.0)
    value = tl.load(v + row * v_row + head * v_head + d, d < VALUE_DIM, other=0.0)
    tl.store(keys + token * DIM + d, key, d < DIM)
    tl.store(values + token * VALUE_DIM + d, value, d < VALUE_DIM)


def store_tokens(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
    """Store k and v [R, kv_heads, 1, D] in `keys` and `values` [R, kv_heads, T, D] at the positions [R]."""
    rows, heads, tokens, dim = keys.shape
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    sizes = (heads, dim, values.shape[3], triton.next_power_of_2(max(dim, values.shape[3])))
    _store_tokens[(rows, heads)](
        k, *k.stride()[:2], v, *v.stride()[:2], keys, values, position, tokens, *sizes, num_warps=1
    )


# with one part the result goes to `out`; with several, the result of each part and the log of its sum of exponentials
# go to `parts` and `logsums`; a sink, the logit of a key without a value, belongs to the first part
@triton.jit(do_not_specialize=["T"])
def _attend(
    q, q_row, q_head, keys, values, position, sinks, out, parts, logsums, T, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, CHUNKED: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Attend with the query heads of one row that share a key head, to one of several parts of the row's tokens."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, splits = tl.program_id(2), tl.num_programs(2)
    newest = tl.load(position + row).to(tl.int32)
    first = 0
    if CHUNKED:
        first = newest - newest % WINDOW
    elif WINDOW != 0:
        first = tl.maximum(newest - WINDOW + 1, 0)
    size = tl.cdiv(tl.cdiv(newest + 1 - first, splits), BLOCK_K) * BLOCK_K
    low = first + split * size
    high = tl.minimum(low + size, newest + 1)

    member, d, e = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_VALUE)
    is_member = member < HEADS // KV_HEADS
    head = kv_head * (HEADS // KV_HEADS) + member
    query_mask = is_member[:, None] & (d < DIM)[None, :]
    query = tl.load(q + row * q_row + head[:, None] * q_head + d[None, :], query_mask, other=0.0)
    maximum = tl.full([BLOCK_Q], -1e30, tl.float32)
    weight_sum = tl.zeros([BLOCK_Q], tl.float32)
    if SINKS:
        sink = tl.load(sinks + head, is_member, other=0.0).to(tl.float32)
        maximum = tl.where(split == 0, sink, maximum)
        weight_sum = tl.where(split == 0, 1.0, weight_sum)
    result = tl.zeros([BLOCK_Q, BLOCK_VALUE], tl.float32)
    own = (row * KV_HEADS + kv_head) * T
    for begin in range(low, high, BLOCK_K):
        at = begin + tl.arange(0, BLOCK_K)
        inside = at < high
        key = tl.load(keys + (own + at)[:, None] * DIM + d[None, :], inside[:, None] & (d < DIM)[None, :], other=0.0)
        value_mask = inside[:, None] & (e < VALUE_DIM)[None, :]
        value = tl.load(values + (own + at)[:, None] * VALUE_DIM + e[None, :], value_mask, other=0.0)
        maximum, weight_sum, result = attend_to_block(
            query, key, value, inside, maximum, weight_sum, result, scale, CAP, PRECISION
        )
    result = result / tl.maximum(weight_sum, 1e-30)[:, None]
    place = (row * HEADS + head) * splits + split
    result_mask = is_member[:, None] & (e < VALUE_DIM)[None, :]
    if splits == 1:
        tl.store(out + place[:, None] * VALUE_DIM + e[None, :], result, result_mask)
    else:
        tl.store(parts + place[:, None] * VALUE_DIM + e[None, :], result, result_mask)
        tl.store(logsums + place, log_sum(maximum, weight_sum), is_member)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    parts, logsums, out, splits, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Average the parts of one head of one row."""
    head = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    average_parts(parts, logsums, out, head, splits, DIM, BLOCK_D, BLOCK_SPLITS)


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scale: float,
    *,
    window: int | None = None,
    is_chunked: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    block: int | None = None,
    warps: int = WARPS,
    stages: int | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return the attention [R, 1, heads, D] of queries [R, heads, 1, D] to keys [R, kv_heads, T, D] up to `position`.

    A row sees `window` tokens, or its chunk of so many tokens if `is_chunked`. The sizes of the values may differ.
    """
    rows, heads, _, dim = query.shape
    kv_heads, tokens, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    query = query if query.stride(3) == 1 else query.contiguous()
    block_d, block_value = (max(16, triton.next_power_of_2(n)) for n in (dim, value_dim))
    is_wide = max(block_d, block_value) * query.element_size() >= WIDE_BYTES
    block_q = max(16, triton.next_power_of_2(heads // kv_heads))
    keys_at_once, most_stages = fit_attention(
        KEYS_PER_WIDE_BLOCK if is_wide else KEYS_PER_BLOCK, 1 if is_wide and query.element_size() > 2 else STAGES,
        bytes_per_key=(block_d + block_value) * query.element_size(),
        bytes_of_queries=block_q * max(block_d, block_value) * query.element_size(), device=query.device,
    )  # fmt: skip
    block, stages = block or keys_at_once, stages or most_stages
    splits = splits or min(count_splits(rows * kv_heads), triton.next_power_of_2(triton.cdiv(window or tokens, block)))
    out = query.new_empty(rows, 1, heads, value_dim)
    parts = logsums = out
    if splits > 1:
        parts = torch.empty(rows * heads * splits, value_dim, dtype=torch.float32, device=query.device)
        logsums = torch.empty(rows * heads * splits, dtype=torch.float32, device=query.device)
    _attend[(rows, kv_heads, splits)](
        query, *query.stride()[:2], keys, values, position, query if sinks is None else sinks, out, parts, logsums,
        tokens, scale, heads, kv_heads, dim, value_dim, block_d, block_value,
        block_q, block, "ieee" if query.dtype == torch.float32 else "tf32",
        window or 0, is_chunked, softcap or 0.0, sinks is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows, heads)](parts, logsums, out, splits, heads, value_dim, block_value, MAX_SPLITS, num_warps=2)
    return out
