"""Triton kernels of layers of the update with frozen weights, and their gradients: norms and short convolutions.

    norm         x / rms(x) * (offset + w), of each group of columns by itself; with a gate g also times silu(g), or
                 with silu(g) x in the place of x
    convolution  y[t] = b + sum_k w[k] x[t - K + 1 + k] of every channel by itself, and silu of it

All sums are in float32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Gating = Literal["none", "after", "before"]  # where the gate is multiplied: nowhere, after the norm, before it
ELEMENTS_PER_PROGRAM = 4096  # of a norm
TILE = (32, 64)  # tokens and channels of a convolution that one program computes


class Norm(torch.autograd.Function):
    """The norm of x [..., D] with a frozen weight [D], in groups of `width` columns; `gate` has the shape of x.

    Its gradients are those of x and of the gate. The dtype of the result is that of x.
    """

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor,
        width: int,
        eps: float,
        offset: float,
        gating: Gating,
    ) -> Tensor:
        """Return the norm, of the shape of x."""
        x, gate = x.contiguous(), None if gate is None else gate.contiguous()
        context.save_for_backward(x, gate, weight)
        context.options = width, eps, offset, gating
        out = torch.empty_like(x)
        grid, sizes, warps = _plan_norm(x, width)
        _norm[grid](x, x if gate is None else gate, weight, out, eps, offset, gating, *sizes, num_warps=warps)
        return out

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the gate."""
        (x, gate, weight), (width, *options) = context.saved_tensors, context.options
        x_grad, gate_grad = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        grid, sizes, warps = _plan_norm(x, width)
        gates = (x, x) if gate is None else (gate, gate_grad)
        _norm_backward[grid](
            x, gates[0], weight, grad.contiguous(), x_grad, gates[1], *options, *sizes, num_warps=warps
        )
        return x_grad, gate_grad, None, None, None, None, None


class CausalConvolution(torch.autograd.Function):
    """The convolution of x [B, C, L] with a frozen weight [C, K] and a frozen bias [C] or None.

    Its gradient is that of x. Tokens lie apart by all channels in memory, as linear layers leave them.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, with_silu: bool) -> Tensor:
        """Return the convolution [B, C, L]."""
        rows, weight = x.transpose(1, 2).contiguous(), weight.contiguous()
        context.save_for_backward(rows, weight, bias)
        context.with_silu = with_silu
        out = torch.empty_like(rows)
        grid, options = _plan_convolution(rows, weight, bias, with_silu)
        _convolution[grid](rows, weight, weight if bias is None else bias, out, *options)
        return out.transpose(1, 2)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x."""
        rows, weight, bias = context.saved_tensors
        x_grad = torch.empty_like(rows)
        grid, options = _plan_convolution(rows, weight, bias, context.with_silu)
        y_grad = grad.transpose(1, 2).contiguous()
        _convolution_backward[grid](rows, weight, weight if bias is None else bias, y_grad, x_grad, *options)
        return x_grad.transpose(1, 2), None, None, None


def _plan_norm(x: Tensor, width: int) -> tuple[tuple[int], tuple[int, ...], int]:
    """Return the grid, the sizes that the kernels of a norm take, and their number of warps."""
    block, groups = triton.next_power_of_2(width), x.numel() // width
    together = max(1, min(ELEMENTS_PER_PROGRAM // block, 32))
    sizes = (groups, x.shape[-1] // width, width, together, block)
    return (triton.cdiv(groups, together),), sizes, 4 if block <= ELEMENTS_PER_PROGRAM else 8


def _plan_convolution(rows: Tensor, weight: Tensor, bias: Tensor | None, with_silu: bool) -> tuple[tuple, tuple]:
    """Return the grid and the sizes and options that the kernels of a convolution take."""
    count, length, channels = rows.shape
    grid = (count * triton.cdiv(length, TILE[0]), triton.cdiv(channels, TILE[1]))
    return grid, (length, channels, weight.shape[1], bias is not None, with_silu, *TILE)


@triton.jit
def _find_group(groups, width: tl.constexpr, parts: tl.constexpr, together: tl.constexpr, block: tl.constexpr):
    """Return the places of a program's elements, of their weights, and which of them exist; [together, block] each."""
    group = tl.program_id(0).to(tl.int64) * together + tl.arange(0, together)
    column = tl.arange(0, block)
    inside = (group < groups)[:, None] & (column < width)[None, :]
    return group[:, None] * width + column[None, :], (group % parts)[:, None] * width + column[None, :], inside


@triton.jit(do_not_specialize=["groups", "eps"])
def _norm(
    x, gate, weight, out, eps, offset: tl.constexpr, gating: tl.constexpr, groups, parts: tl.constexpr,
    width: tl.constexpr, together: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    at, at_weight, inside = _find_group(groups, width, parts, together, block)
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at_weight, inside, other=0.0).to(tl.float32) + offset
    if gating != "none":
        g = tl.load(gate + at, inside, other=0.0).to(tl.float32)
        active = g * tl.sigmoid(g)
        if gating == "before":
            value *= active
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    result = value * scale * w
    if gating == "after":
        result *= active
    tl.store(out + at, result, inside)


@triton.jit(do_not_specialize=["groups", "eps"])
def _norm_backward(
    x, gate, weight, grad, x_grad, gate_grad, eps, offset: tl.constexpr, gating: tl.constexpr, groups,
    parts: tl.constexpr, width: tl.constexpr, together: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    at, at_weight, inside = _find_group(groups, width, parts, together, block)
    plain = tl.load(x + at, inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at_weight, inside, other=0.0).to(tl.float32) + offset
    d = tl.load(grad + at, inside, other=0.0).to(tl.float32) * w
    value = plain
    if gating != "none":
        g = tl.load(gate + at, inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        active, slope = g * s, s * (1 + g * (1 - s))
        if gating == "before":
            value = plain * active
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    normed = value * scale
    if gating == "after":
        tl.store(gate_grad + at, d * normed * slope, inside)
        d *= active
    d = scale * (d - normed * (tl.sum(d * normed, 1) / width)[:, None])
    if gating == "before":
        tl.store(gate_grad + at, d * plain * slope, inside)
        d *= active
    tl.store(x_grad + at, d, inside)


@triton.jit
def _convolve(
    x, weight, bias, token, channel, length, channels, taps: tl.constexpr, has_bias: tl.constexpr,
    tokens: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Return y at `token` [tokens] and `channel` [width] of the row that begins at `x`, rounded to its dtype."""
    exists = channel < channels
    y = tl.zeros((tokens, width), tl.float32)
    if has_bias:
        y += tl.load(bias + channel, exists, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(taps):
        source = token - (taps - 1) + k
        inside = ((source >= 0) & (source < length))[:, None] & exists[None, :]
        value = tl.load(x + source.to(tl.int64)[:, None] * channels + channel[None, :], inside, other=0.0)
        y += value.to(tl.float32) * tl.load(weight + channel * taps + k, exists, other=0.0).to(tl.float32)[None, :]
    return y.to(x.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def _convolution(
    x, weight, bias, out, length, channels: tl.constexpr, taps: tl.constexpr, has_bias: tl.constexpr,
    with_silu: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, tokens)
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    token, channel = tile * tokens + tl.arange(0, tokens), tl.program_id(1) * width + tl.arange(0, width)
    x += row * length * channels
    y = _convolve(x, weight, bias, token, channel, length, channels, taps, has_bias, tokens, width)
    if with_silu:
        y = y * tl.sigmoid(y)
    inside = (token < length)[:, None] & (channel < channels)[None, :]
    tl.store(out + row * length * channels + token.to(tl.int64)[:, None] * channels + channel[None, :], y, inside)


@triton.jit(do_not_specialize=["length"])
def _convolution_backward(
    x, weight, bias, grad, x_grad, length, channels: tl.constexpr, taps: tl.constexpr, has_bias: tl.constexpr,
    with_silu: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, tokens)
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    token, channel = tile * tokens + tl.arange(0, tokens), tl.program_id(1) * width + tl.arange(0, width)
    x += row * length * channels
    grad += row * length * channels
    total = tl.zeros((tokens, width), tl.float32)
    for j in tl.static_range(taps):  # the token reaches y of itself and of the next taps - 1 tokens
        later = token + j
        inside = (later < length)[:, None] & (channel < channels)[None, :]
        d = tl.load(grad + later.to(tl.int64)[:, None] * channels + channel[None, :], inside, other=0.0).to(tl.float32)
        if with_silu:
            y = _convolve(x, weight, bias, later, channel, length, channels, taps, has_bias, tokens, width)
            s = tl.sigmoid(y)
            d *= s * (1 + y * (1 - s))
        w = tl.load(weight + channel * taps + (taps - 1 - j), channel < channels, other=0.0).to(tl.float32)
        total += d * w[None, :]
    inside = (token < length)[:, None] & (channel < channels)[None, :]
    tl.store(
        x_grad + row * length * channels + token.to(tl.int64)[:, None] * channels + channel[None, :], total, inside
    )
