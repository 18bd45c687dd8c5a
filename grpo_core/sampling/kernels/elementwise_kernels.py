"""Triton kernels of what a model computes value by value for one token: rotary embeddings and gated activations."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_core.sampling.kernels.decode_kernels import multiply_gate

__all__ = ["apply_rotary_pos_emb", "multiply_gate", "rotate"]


@triton.jit
def _rotate_head(
    q, q_row, q_head, k, k_row, k_head, cos, cos_row, sin, sin_row, q_out, k_out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTATED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotate one query or key head of one row. Products are rounded before they are added, as torch rounds them."""
    row, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_D)
    rotates = d < ROTATED
    if head < HEADS:
        source, target = q + row * q_row + head * q_head, q_out + (row * HEADS + head) * DIM
    else:
        head -= HEADS
        source, target = k + row * k_row + head * k_head, k_out + (row * KV_HEADS + head) * DIM
    value = tl.load(source + d, d < DIM, other=0.0)
    is_first = d < ROTATED // 2
    other = tl.load(source + tl.where(is_first, d + ROTATED // 2, d - ROTATED // 2), rotates, other=0.0).to(tl.float32)
    c = tl.load(cos + row * cos_row + d, rotates, other=1.0).to(tl.float32)
    s = tl.load(sin + row * sin_row + d, rotates, other=0.0).to(tl.float32)
    straight = (value.to(tl.float32) * c).to(value.dtype).to(tl.float32)
    turned = (tl.where(is_first, -other, other) * s).to(value.dtype).to(tl.float32)
    tl.store(target + d, straight + turned, d < DIM)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return RoPE (arXiv:2104.09864) of q and k [R, heads, 1, D] over two halves of the first dimensions, as in Llama.

    cos and sin are [R, 1, n] or [1, 1, n] for n rotated dimensions.
    """
    rows, heads, _, dim = q.shape
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    steps = [x.stride(0) if len(x) > 1 else 0 for x in (cos, sin)]
    _rotate_head[(rows, heads + k.shape[1])](
        q, *q.stride()[:2], k, *k.stride()[:2], cos, steps[0], sin, steps[1], q_out, k_out,
        heads, k.shape[1], dim, cos.shape[2], triton.next_power_of_2(dim), num_warps=1,
    )  # fmt: skip
    return q_out, k_out


def apply_rotary_pos_emb(original: Any) -> Any:
    """Return transformers' function of this name with `rotate` for one token."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **kwargs: Any) -> Any:
        is_plain = not others and not kwargs and q.dim() == 4 and q.shape[2] == 1 == k.shape[2] and cos.dim() == 3
        parts = (q, k, cos, sin)
        if (
            not is_plain
            or cos.shape[:2] not in ((len(q), 1), (1, 1))
            or cos.shape != sin.shape
            or not cos.shape[2] <= q.shape[3] == k.shape[3]
            or any(x.dtype != q.dtype or x.stride(-1) != 1 for x in parts)
        ):
            return original(q, k, cos, sin, *others, **kwargs)
        return rotate(q, k, cos, sin)

    return apply
