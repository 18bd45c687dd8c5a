"""Triton kernels for one token of recurrent layers and norms, as transformers' modeling files define them in torch.

Each function has the signature of the function of transformers that it replaces (step_functions.py), for one token per
row, and updates the state in place. Sums are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS_PER_PROGRAM = 512
COLUMNS_PER_PROGRAM = 32  # of a state [K, V] of the gated delta rule
CHANNELS_PER_STATE_PROGRAM = 16  # of a state [P, N] of Mamba-2


@triton.jit
def _conv_step(
    x, x_stride, state, weight, bias, out, C,
    K: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Process some channels of one row: shift the state by one token, and store the convolution over it."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    new = tl.load(x + row * x_stride + c, inside, other=0.0)
    place = state + (row * C + c) * K
    total = new.to(tl.float32) * tl.load(weight + c * K + K - 1, inside, other=0.0).to(tl.float32)
    for j in tl.static_range(K - 1):
        value = tl.load(place + j + 1, inside, other=0.0)
        total += value.to(tl.float32) * tl.load(weight + c * K + j, inside, other=0.0).to(tl.float32)
        tl.store(place + j, value, inside)
    tl.store(place + K - 1, new, inside)
    if BIAS:
        total += tl.load(bias + c, inside, other=0.0).to(tl.float32)
    if SILU:
        total = total * tl.sigmoid(total)
    tl.store(out + row * C + c, total, inside)


def conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, is_silu: bool) -> Tensor:
    """Return the causal convolution [R, C, 1] of x [R, C, 1] after the tokens in `state` [R, C, K], which is updated.

    `weight` is [C, K] and `bias` [C].
    """
    rows, channels, _ = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(rows, channels)
    grid = (rows, triton.cdiv(channels, CHANNELS_PER_PROGRAM))
    options = (state.shape[2], bias is not None, is_silu, CHANNELS_PER_PROGRAM)
    _conv_step[grid](x, x.stride(0), state, weight, weight if bias is None else bias, out, channels, *options)
    return out[:, :, None]


@triton.jit
def _delta_step(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, g, beta, state, out,
    HEADS: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Process some columns of the state [K, V] of one head of one row."""
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    i, j = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    query = tl.load(q + row * q_row + head // SHARED * q_head + i, i < K, other=0.0).to(tl.float32)
    key = tl.load(k + row * k_row + head // SHARED * k_head + i, i < K, other=0.0).to(tl.float32)
    if NORM:
        query = query * tl.rsqrt(tl.sum(query * query, 0) + 1e-6)
        key = key * tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
    value = tl.load(v + row * v_row + head * v_head + j, j < V, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(g + row * HEADS + head).to(tl.float32))
    rate = tl.load(beta + row * HEADS + head).to(tl.float32)
    inside = (i < K)[:, None] & (j < V)[None, :]
    place = state + ((row * HEADS + head) * K + i[:, None]) * V + j[None, :]
    memory = tl.load(place, inside, other=0.0).to(tl.float32) * decay
    change = (value - tl.sum(memory * key[:, None], 0)) * rate
    memory = memory + key[:, None] * change[None, :]
    tl.store(place, memory, inside)
    result = tl.sum(memory * query[:, None], 0) * (K**-0.5)
    tl.store(out + (row * HEADS + head) * V + j, result, j < V)


def delta_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, is_normalized: bool) -> Tensor:
    """Return the output [R, 1, heads, V] of the gated delta rule (arXiv:2412.06464) for one token.

    q and k are [R, 1, key heads, K], v is [R, 1, heads, V], `g` (log of the decay) and `beta` [R, 1, heads], and
    `state` [R, heads, K, V], which is updated. With `is_normalized`, q and k are divided by their norms.
    """
    rows, heads, key_dim, value_dim = state.shape
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = v.new_empty(rows, 1, heads, value_dim)
    vectors = [part for x in (q, k, v) for part in (x, x.stride(0), x.stride(2))]
    grid = (rows * heads, triton.cdiv(value_dim, COLUMNS_PER_PROGRAM))
    sizes = (heads, heads // q.shape[2], key_dim, value_dim, triton.next_power_of_2(key_dim), COLUMNS_PER_PROGRAM)
    _delta_step[grid](*vectors, g.contiguous(), beta.contiguous(), state, out, *sizes, is_normalized)
    return out


@triton.jit
def _ssm_step(
    x, x_row, dt, dt_row, dt_head, a, a_head, b, b_row, c, c_row, d, d_head, bias, bias_head, state, out,
    HEADS: tl.constexpr, SHARED: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Process some channels of the state [P, N] of one head of one row."""
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    i, j = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    step = tl.load(dt + row * dt_row + head * dt_head).to(tl.float32) + tl.load(bias + head * bias_head).to(tl.float32)
    if SOFTPLUS:
        step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    decay = tl.exp(step * tl.load(a + head * a_head).to(tl.float32))
    value = tl.load(x + row * x_row + head * P + i, i < P, other=0.0).to(tl.float32)
    group = head // SHARED * N
    write = tl.load(b + row * b_row + group + j, j < N, other=0.0).to(tl.float32)
    read = tl.load(c + row * c_row + group + j, j < N, other=0.0).to(tl.float32)
    inside = (i < P)[:, None] & (j < N)[None, :]
    place = state + ((row * HEADS + head) * P + i[:, None]) * N + j[None, :]
    memory = tl.load(place, inside, other=0.0).to(tl.float32) * decay + (step * value)[:, None] * write[None, :]
    tl.store(place, memory, inside)
    result = tl.sum(memory * read[None, :], 1) + tl.load(d + head * d_head).to(tl.float32) * value
    tl.store(out + (row * HEADS + head) * P + i, result, i < P)


def ssm_step(
    state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor, is_softplus: bool
) -> Tensor:
    """Return the output [R, heads, P] of Mamba-2's state space model (arXiv:2405.21060) for one token.

    x is [R, heads, P], `dt` [R, heads, P] with equal values within a head, `a` [heads, P, N], b and c [R, groups, N], d
    and `bias` [heads, P] likewise, and `state` [R, heads, P, N], which is updated.
    """
    rows, heads, channels, size = state.shape
    x, b, c = (y if y.stride(2) == 1 and y.stride(1) == y.shape[2] else y.contiguous() for y in (x, b, c))
    out = x.new_empty(rows, heads, channels)
    grid = (rows * heads, triton.cdiv(channels, CHANNELS_PER_STATE_PROGRAM))
    sizes = (heads, heads // b.shape[1], channels, size, CHANNELS_PER_STATE_PROGRAM, triton.next_power_of_2(size))
    _ssm_step[grid](
        x, x.stride(0), dt, dt.stride(0), dt.stride(1), a, a.stride(0), b, b.stride(0), c, c.stride(0), d, d.stride(0),
        bias, bias.stride(0), state, out, *sizes, is_softplus,
    )  # fmt: skip
    return out


@triton.jit
def _norm(
    x, x_stride, gate, gate_stride, weight, out, eps, H,
    OFFSET: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize one group of one row. GATE 1 multiplies by silu(gate) before the norm, 2 after it, 0 never."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < H
    value = tl.load(x + row * x_stride + group * H + at, inside, other=0.0)
    wide = value.to(tl.float32)
    if GATE > 0:
        opening = tl.load(gate + row * gate_stride + group * H + at, inside, other=0.0).to(tl.float32)
        opening = opening * tl.sigmoid(opening)
    if GATE == 1:
        wide = wide * opening
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    scale = tl.load(weight + group * H + at, inside, other=0.0).to(tl.float32)
    if OFFSET == 0:
        wide = wide.to(value.dtype).to(tl.float32)
    wide = wide * (scale + OFFSET)
    if GATE == 2:
        wide = wide * opening
    tl.store(out + (row * tl.num_programs(1) + group) * H + at, wide, inside)


def norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, offset: int, gate_kind: int, group: int) -> Tensor:
    """Return RMSNorm of x [..., H] in groups of `group` values, times `offset` + weight [H].

    With gate_kind 1, x is first multiplied by silu(gate [..., H]); with 2, the result is.
    """
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    gates = flat if gate is None else gate.reshape(-1, width)
    flat, gates = (y if y.stride(1) == 1 else y.contiguous() for y in (flat, gates))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(group)
    warps = min(8, max(1, block // 512))
    _norm[(len(flat), width // group)](
        flat, flat.stride(0), gates, gates.stride(0), weight, out, eps, group, offset, gate_kind, block, num_warps=warps
    )
    return out


def causal_conv1d_update(original: Any) -> Any:
    """Return transformers' function of this name with `conv_step` for one token."""

    def update(x: Tensor, state: Tensor, weight: Tensor, bias: Any = None, activation: str | None = None) -> Tensor:
        is_plain = x.shape[2] == 1 and state.is_contiguous() and weight.is_contiguous()
        if not is_plain or activation not in (None, "silu", "swish"):
            return original(x, state, weight, bias, activation)
        return conv_step(x, state, weight, bias, activation is not None)

    return update


def torch_recurrent_gated_delta_rule(original: Any) -> Any:
    """Return transformers' function of this name with `delta_step` for one token."""

    def rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Any = None, **kw: Any) -> Any:
        is_plain = query.shape[1] == 1 and initial_state is not None and initial_state.is_contiguous()
        if not is_plain or g.dim() != 3 or kw.get("cu_seqlens") is not None:
            return original(query, key, value, g=g, beta=beta, initial_state=initial_state, **kw)
        is_normalized = bool(kw.get("use_qk_l2norm_in_kernel"))
        return delta_step(query, key, value, g, beta, initial_state, is_normalized), initial_state

    return rule


def mamba2_selective_state_update(original: Any) -> Any:
    """Return transformers' function of this name with `ssm_step`."""

    def update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any = None, **kw: Any) -> Tensor:
        bias, spread = kw.get("dt_bias"), [dt, A, D, kw.get("dt_bias")]
        is_plain = None not in spread and kw.get("z") is None and state.is_contiguous()
        if not is_plain or any(y.stride(-1) != 0 for y in spread):
            return original(state, x, dt, A, B, C, D, **kw)
        return ssm_step(state, x, dt, A, B, C, D, bias, bool(kw.get("dt_softplus")))

    return update


FUNCTIONS = (causal_conv1d_update, torch_recurrent_gated_delta_rule, mamba2_selective_state_update)
