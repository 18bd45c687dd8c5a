"""Triton kernels of recurrent layers and norms without a gradient, as transformers' modeling files define them.

`FUNCTIONS` make functions with the names and signatures of transformers' (step_functions.py), and leave what the
kernels do not support to the original. Sums are float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS_PER_PROGRAM = 512
NO_LIMITS = (-math.inf, math.inf)
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


@triton.jit(do_not_specialize=["T"])
def _delta_rule(
    q, q_row, q_token, q_head, k, k_row, k_token, k_head, v, v_row, v_token, v_head, g, beta, state, out, T,
    HEADS: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Process some columns of the state [K, V] of one head of one row, over T tokens."""
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    i, j = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (i < K)[:, None] & (j < V)[None, :]
    place = state + ((row * HEADS + head) * K + i[:, None]) * V + j[None, :]
    memory = tl.load(place, inside, other=0.0).to(tl.float32)
    for t in range(T):
        query = tl.load(q + row * q_row + t * q_token + head // SHARED * q_head + i, i < K, other=0.0).to(tl.float32)
        key = tl.load(k + row * k_row + t * k_token + head // SHARED * k_head + i, i < K, other=0.0).to(tl.float32)
        if NORM:
            query = query * tl.rsqrt(tl.sum(query * query, 0) + 1e-6)
            key = key * tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
        value = tl.load(v + row * v_row + t * v_token + head * v_head + j, j < V, other=0.0).to(tl.float32)
        at = (row * T + t) * HEADS + head
        memory = memory * tl.exp(tl.load(g + at).to(tl.float32))
        change = (value - tl.sum(memory * key[:, None], 0)) * tl.load(beta + at).to(tl.float32)
        memory = memory + key[:, None] * change[None, :]
        result = tl.sum(memory * query[:, None], 0) * (K**-0.5)
        tl.store(out + at * V + j, result, j < V)
    tl.store(place, memory, inside)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, is_normalized: bool) -> Tensor:
    """Return the outputs [R, T, heads, V] of the gated delta rule (arXiv:2412.06464) for T tokens.

    q and k are [R, T, key heads, K], v is [R, T, heads, V], `g` (log of the decay) and `beta` [R, T, heads], and
    `state` [R, heads, K, V], which is updated. With `is_normalized`, q and k are divided by their norms.
    """
    rows, heads, key_dim, value_dim = state.shape
    tokens = q.shape[1]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = v.new_empty(rows, tokens, heads, value_dim)
    vectors = [part for x in (q, k, v) for part in (x, *x.stride()[:3])]
    grid = (rows * heads, triton.cdiv(value_dim, COLUMNS_PER_PROGRAM))
    sizes = (heads, heads // q.shape[2], key_dim, value_dim, triton.next_power_of_2(key_dim), COLUMNS_PER_PROGRAM)
    _delta_rule[grid](*vectors, g.contiguous(), beta.contiguous(), state, out, tokens, *sizes, is_normalized)
    return out


@triton.jit(do_not_specialize=["T"])
def _ssm(
    x, x_row, x_token, dt, dt_row, dt_token, a, b, b_row, b_token, c, c_row, c_token, d, bias, state, out, T, low, high,
    HEADS: tl.constexpr, SHARED: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Process some channels of the state [P, N] of one head of one row, over T tokens."""
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    i, j = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    inside = (i < P)[:, None] & (j < N)[None, :]
    place = state + ((row * HEADS + head) * P + i[:, None]) * N + j[None, :]
    memory = tl.load(place, inside, other=0.0).to(tl.float32)
    shift, skip = tl.load(bias + head).to(tl.float32), tl.load(d + head).to(tl.float32)
    rate, group = tl.load(a + head).to(tl.float32), head // SHARED * N
    for t in range(T):
        step = tl.load(dt + row * dt_row + t * dt_token + head).to(tl.float32) + shift
        if SOFTPLUS:
            step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
        step = tl.minimum(tl.maximum(step, low), high)
        value = tl.load(x + row * x_row + t * x_token + head * P + i, i < P, other=0.0).to(tl.float32)
        write = tl.load(b + row * b_row + t * b_token + group + j, j < N, other=0.0).to(tl.float32)
        read = tl.load(c + row * c_row + t * c_token + group + j, j < N, other=0.0).to(tl.float32)
        memory = memory * tl.exp(step * rate) + (step * value)[:, None] * write[None, :]
        result = tl.sum(memory * read[None, :], 1) + skip * value
        tl.store(out + ((row * T + t) * HEADS + head) * P + i, result, i < P)
    tl.store(place, memory, inside)


def ssm(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor, state: Tensor, *,
    is_softplus: bool, limits: tuple[float, float], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the outputs [R, T, heads, P] of Mamba-2's state space model (arXiv:2405.21060) for T tokens, in `dtype`.

    x is [R, T, heads, P], `dt` [R, T, heads], a, d and `bias` are [heads], b and c [R, T, groups, N], and `state`
    [R, heads, P, N], which is updated. `limits` bound dt after bias and softplus.
    """
    rows, heads, channels, size = state.shape
    tokens = x.shape[1]
    x, b, c = (y if y.stride(3) == 1 and y.stride(2) == y.shape[3] else y.contiguous() for y in (x, b, c))
    a, d, bias, dt = (y if y.stride(-1) == 1 else y.contiguous() for y in (a, d, bias, dt))
    out = x.new_empty(rows, tokens, heads, channels, dtype=dtype)
    grid = (rows * heads, triton.cdiv(channels, CHANNELS_PER_STATE_PROGRAM))
    sizes = (heads, heads // b.shape[2], channels, size, CHANNELS_PER_STATE_PROGRAM, triton.next_power_of_2(size))
    _ssm[grid](
        x, *x.stride()[:2], dt, *dt.stride()[:2], a, b, *b.stride()[:2], c, *c.stride()[:2], d, bias, state, out,
        tokens, *(min(max(limit, -3e38), 3e38) for limit in limits), *sizes, is_softplus,
    )  # fmt: skip
    return out


# GATE 1 multiplies by silu(gate) before the norm, 2 after it, 0 never
@triton.jit
def gate_before_norm(value, gate, GATE: tl.constexpr):
    """Return the values that a norm divides by their root mean square, in float32."""
    wide = value.to(tl.float32)
    if GATE == 1:
        opening = gate.to(tl.float32)
        wide = wide * opening * tl.sigmoid(opening)
    return wide


@triton.jit
def scale_after_norm(wide, gate, weight, like, OFFSET: tl.constexpr, GATE: tl.constexpr):
    """Return normalized values times OFFSET + weight. If OFFSET is 0 they are rounded to the dtype of `like` before."""
    if OFFSET == 0:
        wide = wide.to(like.dtype).to(tl.float32)
    wide = wide * (weight.to(tl.float32) + OFFSET)
    if GATE == 2:
        opening = gate.to(tl.float32)
        wide = wide * opening * tl.sigmoid(opening)
    return wide


@triton.jit
def _norm(
    x, x_stride, x_inner, gate, gate_stride, weight, out, eps, INNER, H,
    OFFSET: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize one group of one row."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < H
    place = x + row // INNER * x_stride + row % INNER * x_inner
    value = tl.load(place + group * H + at, inside, other=0.0)
    opening = value
    if GATE > 0:
        opening = tl.load(gate + row * gate_stride + group * H + at, inside, other=0.0)
    scale = tl.load(weight + group * H + at, inside, other=0.0)
    wide = gate_before_norm(value, opening, GATE)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    wide = scale_after_norm(wide, opening, scale, value, OFFSET, GATE)
    tl.store(out + (row * tl.num_programs(1) + group) * H + at, wide, inside)


def norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, offset: int, gate_kind: int, group: int) -> Tensor:
    """Return RMSNorm of x [..., H] in groups of `group` values, times `offset` + weight [H].

    With gate_kind 1, x is first multiplied by silu(gate [..., H]); with 2, the result is.
    """
    width = x.shape[-1]
    rows = x.squeeze(1) if x.dim() == 4 and x.shape[1] == 1 else x.reshape(-1, 1, width)  # [rows, INNER, H]
    gates = x if gate is None else gate.reshape(-1, width)
    rows, gates = (y if y.stride(-1) == 1 else y.contiguous() for y in (rows, gates))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    inner, block = rows.shape[1], triton.next_power_of_2(group)
    _norm[(len(rows) * inner, width // group)](
        rows, *rows.stride()[:2], gates, gates.stride(0), weight, out, eps, inner, group, offset, gate_kind, block,
        num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
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
    """Return transformers' function of this name with `delta_rule`; a given state is updated in place."""
    return _delta_rule_function(original, in_place=True)


def torch_chunk_gated_delta_rule(original: Any) -> Any:
    """Return transformers' function of this name with `delta_rule`, which reads the tokens one after another."""
    return _delta_rule_function(original, in_place=False)


def _delta_rule_function(original: Any, in_place: bool) -> Any:
    def rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
        state = options.get("initial_state")
        if g.dim() != 3 or options.get("cu_seqlens") is not None or not (state is None or state.is_contiguous()):
            return original(query, key, value, g=g, beta=beta, **options)
        if state is None:
            shape = (query.shape[0], value.shape[2], query.shape[3], value.shape[3])
            state = torch.zeros(shape, dtype=torch.float32, device=query.device)
        elif not in_place:
            state = state.clone()
        out = delta_rule(query, key, value, g, beta, state, bool(options.get("use_qk_l2norm_in_kernel")))
        return out, state if options.get("output_final_state") else None

    return rule


def mamba2_selective_state_update(original: Any) -> Any:
    """Return transformers' function of this name with `ssm` for one token."""

    def update(
        state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any = None, **kw: Any
    ) -> Tensor:
        spread = [dt, A, D, kw.get("dt_bias")]
        is_plain = all(y is not None and y.stride(-1) == 0 for y in spread)
        if not is_plain or kw.get("z") is not None or not state.is_contiguous():
            return original(state, x, dt, A, B, C, D, **kw)
        heads = (dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None], D[:, 0], kw["dt_bias"][:, 0])
        options = {"is_softplus": bool(kw.get("dt_softplus")), "limits": NO_LIMITS, "dtype": x.dtype}
        return ssm(x[:, None], *heads, state, **options)[:, 0]

    return update


def mamba2_chunk_scan(original: Any) -> Any:
    """Return transformers' function of this name with `ssm`, which reads the tokens one after another."""

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **kw: Any) -> Any:
        d, bias, state = kw.get("D"), kw.get("dt_bias"), kw.get("initial_states")
        if d is None or bias is None or d.dim() != 1 or kw.get("z") is not None or kw.get("seq_idx") is not None:
            return original(x, dt, A, B, C, chunk_size, **kw)
        if state is None:
            state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32)
        else:
            state = state.float().clone()
        limits = kw.get("dt_limit", NO_LIMITS)
        options = {"is_softplus": bool(kw.get("dt_softplus")), "limits": limits, "dtype": torch.float32}
        out = ssm(x, dt, A, B, C, d, bias, state, **options)
        return (out, state) if kw.get("return_final_states") else out

    return scan


FUNCTIONS = (
    causal_conv1d_update,
    torch_recurrent_gated_delta_rule,
    torch_chunk_gated_delta_rule,
    mamba2_selective_state_update,
    mamba2_chunk_scan,
)
