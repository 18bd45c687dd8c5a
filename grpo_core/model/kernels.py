"""Triton kernels of the update: log-prob statistics of rows of logits, and the gated activation with its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS_PER_PROGRAM = 2048  # of the gated activation
COLUMNS_PER_BLOCK = 4096  # logits of a row that are loaded at once


def softmax_statistics(
    logits: Tensor, token_ids: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the same as `logprobs.softmax_statistics` for contiguous logits [n, V].

    The gradient overwrites the logits.
    """
    rows, width = logits.shape
    assert logits.is_contiguous()
    logprobs, entropy, sum_p_squared = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    if rows:
        _statistics[(rows,)](
            logits, token_ids, logprobs, entropy, sum_p_squared, 1.0 / temperature, width, with_gradient,
            COLUMNS_PER_BLOCK, num_warps=8,
        )  # fmt: skip
    return logprobs, entropy, sum_p_squared, logits if with_gradient else None


softmax_statistics.bytes_per_logit = 4  # memory that a call needs for each logit of 16 or 32 bits


@triton.jit(do_not_specialize=["scale"])
def _statistics(
    logits, token_ids, logprobs, entropy, sum_p_squared, scale, width, with_gradient: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Process one row of logits [width]: store its statistics, and with `with_gradient` its gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    columns = tl.arange(0, block)
    # each lane keeps the maximum of its columns, sum exp(x - maximum), and the same sum of its squares and times x
    maximum = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    squares = tl.zeros((block,), tl.float32)
    weighted = tl.zeros((block,), tl.float32)
    for start in range(0, width, block):
        inside = start + columns < width
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32) * scale
        new_maximum = tl.maximum(maximum, x)
        is_finite = new_maximum > float("-inf")
        old = tl.where(is_finite, tl.exp(maximum - new_maximum), 0.0)
        new = tl.where(is_finite, tl.exp(x - new_maximum), 0.0)
        total = total * old + new
        squares = squares * old * old + new * new
        weighted = weighted * old + tl.where(new > 0, new * x, 0.0)
        maximum = new_maximum
    row_maximum = tl.max(maximum, 0)
    share = tl.where(maximum > float("-inf"), tl.exp(maximum - row_maximum), 0.0)
    row_total = tl.sum(total * share, 0)
    normaliser = row_maximum + tl.log(row_total)
    token = tl.load(token_ids + row)
    token_logit = tl.load(logits + token).to(tl.float32) * scale
    tl.store(logprobs + row, token_logit - normaliser)
    tl.store(entropy + row, normaliser - tl.sum(weighted * share, 0) / row_total)
    tl.store(sum_p_squared + row, tl.sum(squares * share * share, 0) / (row_total * row_total))
    if with_gradient:
        for start in range(0, width, block):
            inside = start + columns < width
            x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32) * scale
            one_hot = tl.where(start + columns == token, 1.0, 0.0)
            tl.store(logits + start + columns, (one_hot - tl.exp(x - normaliser)) * scale, mask=inside)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    grid = (triton.cdiv(gate.numel(), ELEMENTS_PER_PROGRAM),)
    _silu_mul[grid](gate, up, out, gate.numel(), ELEMENTS_PER_PROGRAM)
    return out


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `silu_mul` for `gate` and `up`."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(gate.numel(), ELEMENTS_PER_PROGRAM),)
    _silu_mul_backward[grid](grad, gate, up, gate_grad, up_grad, gate.numel(), ELEMENTS_PER_PROGRAM)
    return gate_grad, up_grad


@triton.jit(do_not_specialize=["size"])
def _silu_mul(gate, up, out, size, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit(do_not_specialize=["size"])
def _silu_mul_backward(grad, gate, up, gate_grad, up_grad, size, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(gate_grad + at, d * u * s * (1 + g * (1 - s)), mask=inside)
    tl.store(up_grad + at, d * g * s, mask=inside)
