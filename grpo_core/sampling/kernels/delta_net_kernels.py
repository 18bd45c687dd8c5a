"""Triton kernels of one token step of a gated delta net (arXiv:2412.06464), from its projections to its gated norm.

A program owns one key head of one row: its channels of the convolution, and the states of the value heads that share
the key. So no other program reads or writes its memory, and both states are updated in place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grpo_core.sampling.kernels.state_kernels import gate_before_norm, scale_after_norm
from grpo_core.sampling.modules.delta_net import DeltaInputs, DeltaWeights

MAX_COLUMNS = 64  # of a state [K, V] that a program holds at once
ELEMENTS_PER_WARP = 2048  # of those columns
MAX_WARPS = 16
MAX_REGISTERS = 168  # of a thread, so that several programs share a processor


@triton.jit
def _load_window(x, state, channel, inside, W: tl.constexpr):
    """Return the newest W tokens of some channels as a tuple; the newest of them is at `x`."""
    window = ()
    for w in tl.static_range(W - 1):
        window += (tl.load(state + channel * W + w + 1, inside, other=0.0),)
    window += (tl.load(x, inside, other=0.0).to(state.dtype.element_ty),)
    return window


@triton.jit
def _convolve(
    window, state, weight, bias, mixed, channel, inside, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr
):
    """Store a window and the convolution over it, which is rounded before the activation as transformers rounds it."""
    total = tl.zeros(channel.shape, tl.float32)
    for w in tl.static_range(W):
        tl.store(state + channel * W + w, window[w], inside)
        total += window[w].to(tl.float32) * tl.load(weight + channel * W + w, inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + channel, inside, other=0.0).to(tl.float32)
    total = total.to(mixed.dtype.element_ty).to(tl.float32)
    if SILU:
        total = total * tl.sigmoid(total)
    tl.store(mixed + channel, total, inside)


# the channels go through memory, because the layout in which a state is read would have each thread convolve many
@triton.jit
def _mix(
    q, k, v, v_shared, state, weight, bias, mixed, group, KEY_HEADS: tl.constexpr, SHARED: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_VALUES: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Convolve the channels of one key head of one row, and store them in `mixed`."""
    i, j = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_VALUES)
    inside_k, inside_v = i < K, j < SHARED * V
    q_channel, k_channel = group * K + i, (KEY_HEADS + group) * K + i
    v_channel = 2 * KEY_HEADS * K + group * SHARED * V + j
    q_window = _load_window(q + i, state, q_channel, inside_k, W)
    k_window = _load_window(k + i, state, k_channel, inside_k, W)
    v_window = _load_window(v + j // V * v_shared + j % V, state, v_channel, inside_v, W)
    tl.debug_barrier()  # several threads may have read the same window: all must have it before it changes
    _convolve(q_window, state, weight, bias, mixed, q_channel, inside_k, W, BIAS, SILU)
    _convolve(k_window, state, weight, bias, mixed, k_channel, inside_k, W, BIAS, SILU)
    _convolve(v_window, state, weight, bias, mixed, v_channel, inside_v, W, BIAS, SILU)
    tl.debug_barrier()  # all threads read what others have stored


@triton.jit
def _load_unit_vector(x, inside):
    """Return a vector divided by its norm."""
    value = tl.load(x, inside, other=0.0).to(tl.float32)
    return value * tl.rsqrt(tl.sum(value * value, 0) + 1e-6)


@triton.jit
def _load_gates(a, b, decay, decay_bias):
    """Return the factor of a state, exp(-exp(decay) softplus(a + decay_bias)), and sigmoid(b)."""
    step = tl.load(a).to(tl.float32) + tl.load(decay_bias).to(tl.float32)
    step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    opening = tl.load(b)
    beta = tl.sigmoid(opening.to(tl.float32)).to(opening.dtype).to(tl.float32)
    return tl.exp(-tl.exp(tl.load(decay).to(tl.float32)) * step), beta


@triton.jit
def _store_normalized(
    results, scale, z, norm, out, V: tl.constexpr, BLOCK_V: tl.constexpr, OFFSET: tl.constexpr, GATE: tl.constexpr
):
    """Store the results of one head, a tuple of blocks, times `scale` and the weight of the norm."""
    for block in tl.static_range(0, V, BLOCK_V):
        j = block + tl.arange(0, BLOCK_V)
        gate = tl.load(z + j, j < V, other=0.0)
        weight = tl.load(norm + j, j < V, other=0.0)
        tl.store(out + j, scale_after_norm(results[block // BLOCK_V] * scale, gate, weight, gate, OFFSET, GATE), j < V)


@triton.jit
def _delta_net(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, v_shared, z, z_row, z_head, z_shared,
    b, b_row, b_head, a, a_row, a_head, conv_state, state, conv, conv_bias, mixed, decay, decay_bias, norm, out, eps,
    KEY_HEADS: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_VALUES: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    BETA_SCALE: tl.constexpr, OFFSET: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Process one key head of one row, its states in blocks of BLOCK_V columns."""
    row, group = (tl.program_id(0) // KEY_HEADS).to(tl.int64), tl.program_id(0) % KEY_HEADS
    channels: tl.constexpr = KEY_HEADS * (2 * K + SHARED * V)
    q_at, k_at, v_at = (
        q + row * q_row + group * q_head,
        k + row * k_row + group * k_head,
        v + row * v_row + group * v_head,
    )
    mixed += row * channels
    _mix(
        q_at, k_at, v_at, v_shared, conv_state + row * channels * W, conv, conv_bias, mixed, group,
        KEY_HEADS, SHARED, K, V, W, BLOCK_K, BLOCK_VALUES, BIAS, SILU,
    )  # fmt: skip
    i = tl.arange(0, BLOCK_K)
    inside_k = i < K
    query = _load_unit_vector(mixed + group * K + i, inside_k) * (K**-0.5)
    key = _load_unit_vector(mixed + (KEY_HEADS + group) * K + i, inside_k)
    overlap = tl.sum(query * key, 0)
    for s in range(SHARED):
        head = group * SHARED + s
        a_at, b_at = a + row * a_row + group * a_head + s, b + row * b_row + group * b_head + s
        factor, beta = _load_gates(a_at, b_at, decay + head, decay_bias + head)
        beta *= BETA_SCALE
        gate = z + row * z_row + group * z_head + s * z_shared
        results, squares = (), 0.0
        for block in tl.static_range(0, V, BLOCK_V):
            j = block + tl.arange(0, BLOCK_V)
            inside_v = j < V
            inside = inside_k[:, None] & inside_v[None, :]
            place = state + ((row * KEY_HEADS * SHARED + head) * K + i[:, None]) * V + j[None, :]
            memory = tl.load(place, inside, other=0.0).to(tl.float32)
            value = tl.load(mixed + 2 * KEY_HEADS * K + head * V + j, inside_v, other=0.0).to(tl.float32)
            memory = memory * factor
            change = (value - tl.sum(memory * key[:, None], 0)) * beta
            result = tl.sum(memory * query[:, None], 0) + overlap * change  # of the memory after the change
            tl.store(place, memory + key[:, None] * change[None, :], inside)
            result = tl.where(inside_v, result, 0.0).to(out.dtype.element_ty)
            wide = gate_before_norm(result, tl.load(gate + j, inside_v, other=0.0), GATE)
            squares += tl.sum(wide * wide, 0)
            results += (wide,)
        place = out + (row * KEY_HEADS * SHARED + head) * V
        _store_normalized(results, tl.rsqrt(squares / V + eps), gate, norm, place, V, BLOCK_V, OFFSET, GATE)


def delta_net(
    x: DeltaInputs,
    weights: DeltaWeights,
    conv_state: Tensor,
    state: Tensor,
    *,
    columns: int = MAX_COLUMNS,
    warps: int | None = None,
    registers: int = MAX_REGISTERS,
) -> Tensor:
    """Return the outputs [R, heads V] before the last projection; `conv_state` [R, C, W] and `state` are updated.

    `state` is [R, heads, K, V]. Both states must be contiguous.
    """
    rows, heads, key_dim, value_dim = state.shape
    key_heads = x.q.shape[1]
    assert conv_state.is_contiguous() and state.is_contiguous()
    inner = (x.q.stride(2), x.k.stride(2), x.v.stride(3), x.z.stride(3), x.b.stride(2), x.a.stride(2))
    assert all(stride == 1 for stride in inner)
    views = [
        *(x.q, *x.q.stride()[:2], x.k, *x.k.stride()[:2], x.v, *x.v.stride()[:3], x.z, *x.z.stride()[:3]),
        *(x.b, *x.b.stride()[:2], x.a, *x.a.stride()[:2]),
    ]
    out, mixed = x.q.new_empty(rows, heads * value_dim), x.q.new_empty(conv_state.shape[:2])
    block_k, block_v = triton.next_power_of_2(key_dim), min(columns, triton.next_power_of_2(value_dim))
    width = conv_state.shape[2]
    bias = weights.conv if weights.conv_bias is None else weights.conv_bias
    _delta_net[(rows * key_heads,)](
        *views, conv_state, state, weights.conv, bias, mixed, weights.decay, weights.decay_bias, weights.norm, out,
        weights.eps, key_heads, heads // key_heads, key_dim, value_dim, width, block_k, block_v,
        triton.next_power_of_2(heads // key_heads * value_dim),
        weights.conv_bias is not None, weights.is_silu, weights.beta_scale, weights.offset, weights.gate_kind,
        num_warps=warps or _count_warps(block_k * block_v), maxnreg=registers,
    )  # fmt: skip
    return out


def _count_warps(elements: int) -> int:
    """Return the warps that hold a state of so many elements: a power of 2."""
    return min(MAX_WARPS, max(1, elements // ELEMENTS_PER_WARP))
