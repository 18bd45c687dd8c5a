"""Triton kernels of the update: log-prob statistics of rows of logits, and the gated activation with its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048
COLUMNS = 4096  # columns


def softmax_statistics(
    logits: Tensor, token_ids: Tensor, temperature: float, slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As logprobs.softmax_statistics; the slope takes the place of the logits [n, V], which must be contiguous."""
    rows, width = logits.shape
    assert logits.is_contiguous()
    logprobs, entropy = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        _statistics[(rows,)](
            logits, token_ids, logprobs, entropy, 1.0 / temperature, width, slope, COLUMNS, num_warps=8
        )
    return logprobs, entropy, logits if slope else None


softmax_statistics.bytes_per_logit = 4  # the logits, in 16 or 32 bits


@triton.jit(do_not_specialize=["scale"])
def _statistics(logits, token_ids, logprobs, entropy, scale, width, slope: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    columns = tl.arange(0, block)
    # each lane keeps the greatest of its columns, sum exp(x - greatest) and sum exp(x - greatest) x
    greatest = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    weighted = tl.zeros((block,), tl.float32)
    for start in range(0, width, block):
        inside = start + columns < width
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(greatest, x)
        seen = higher > float("-inf")
        old = tl.where(seen, tl.exp(greatest - higher), 0.0)
        new = tl.where(seen, tl.exp(x - higher), 0.0)
        total = total * old + new
        weighted = weighted * old + tl.where(new > 0, new * x, 0.0)
        greatest = higher
    top = tl.max(greatest, 0)
    share = tl.where(greatest > float("-inf"), tl.exp(greatest - top), 0.0)
    whole = tl.sum(total * share, 0)
    normaliser = top + tl.log(whole)
    token = tl.load(token_ids + row)
    chosen = tl.load(logits + token).to(tl.float32) * scale
    tl.store(logprobs + row, chosen - normaliser)
    tl.store(entropy + row, normaliser - tl.sum(weighted * share, 0) / whole)
    if slope:
        for start in range(0, width, block):
            inside = start + columns < width
            x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32) * scale
            hot = tl.where(start + columns == token, 1.0, 0.0)
            tl.store(logits + start + columns, (hot - tl.exp(x - normaliser)) * scale, mask=inside)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of the same shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _silu_mul[(triton.cdiv(gate.numel(), ELEMENTS),)](gate, up, out, gate.numel(), ELEMENTS)
    return out


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Its gradients for gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    for_gate, for_up = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(gate.numel(), ELEMENTS),)
    _silu_mul_backward[grid](grad, gate, up, for_gate, for_up, gate.numel(), ELEMENTS)
    return for_gate, for_up


@triton.jit(do_not_specialize=["size"])
def _silu_mul(gate, up, out, size, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit(do_not_specialize=["size"])
def _silu_mul_backward(grad, gate, up, for_gate, for_up, size, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(for_gate + at, d * u * s * (1 + g * (1 - s)), mask=inside)
    tl.store(for_up + at, d * g * s, mask=inside)
