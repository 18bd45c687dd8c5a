"""The operations of decode_ops.py, which defines them in torch, as Triton kernels.

Sums are float32, except for the choice of a chunk of the vocabulary, which is float64. Values that vary between calls
are excluded from specialisation, so that every kernel is compiled once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from grpo_core.batch import SamplingParams
from grpo_core.model.quantized import QuantizedWeight
from grpo_core.sampling.decode_ops import (
    DONE,
    DRAWN,
    GIVEN,
    LIMIT,
    ROW,
    TOKEN,
    Activation,
    AttentionShape,
    Tables,
    TorchOps,
)
from grpo_core.sampling.expert_ops import ExpertWeights, Routing
from grpo_core.sampling.kernels import expert_kernels, four_bit_kernels, product_kernels
from grpo_core.sampling.kernels.attention_kernels import TABLE_WIDTH, TritonCache, multiply_by_weight
from grpo_core.sampling.kernels.expert_kernels import Groups, Parts, sum_parts
from grpo_core.sampling.kernels.product_kernels import Product, load_product, whole

_TOKEN, _DRAWN, _LIMIT, _ROW, _DONE, _GIVEN = (tl.constexpr(x) for x in (TOKEN, DRAWN, LIMIT, ROW, DONE, GIVEN))
_TABLE_WIDTH = tl.constexpr(TABLE_WIDTH)

TOKENS_PER_CHUNK = 4096  # of the vocabulary, processed by one program
ACTIVATIONS_PER_PROGRAM = 1024  # of the gated activation


@triton.jit
def _normalize(value, weight, inside, like, eps, H: tl.constexpr, OFFSET: tl.constexpr):
    """Return RMSNorm(value) * (OFFSET + weight) in float32."""
    wide = value.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    return multiply_by_weight(scaled, weight, inside, like, OFFSET)


@triton.jit(do_not_specialize=["adds"])
def _add_norm(
    x, delta, part_stride, row_stride, bias, b, experts, shares, weight, delta_weight, out, eps, delta_scale, adds,
    H: tl.constexpr, BLOCK_H: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr, NORMS_X: tl.constexpr, NORMS_DELTA: tl.constexpr, OFFSET: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Process one row: add `delta` to x in place if `adds` is not 0, and store RMSNorm(x) * (OFFSET + weight).

    `delta` is a `Product`, or if TOP_K is not 0, the sum of the outputs of that many experts. Before it is added, it is
    normalized if NORMS_DELTA, and multiplied by `delta_scale` if SCALES.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_H)
    inside = at < H
    value = tl.load(x + row * H + at, inside, other=0.0)
    if adds != 0:
        if TOP_K == 0:
            change = load_product(
                delta, part_stride, row_stride, bias, b, row, at, inside, 0, x, H, PARTS, HAS_BIAS, RANK
            ).to(x.dtype.element_ty)
        else:
            change = sum_parts(delta, experts, shares, row, at, H, TOP_K, BLOCK_H).to(x.dtype.element_ty)
        if NORMS_DELTA:
            change = _normalize(change, delta_weight + at, inside, x, eps, H, OFFSET).to(change.dtype)
        if SCALES:
            change = (change.to(tl.float32) * delta_scale).to(change.dtype)
        value = (value.to(tl.float32) + change.to(tl.float32)).to(value.dtype)
        tl.store(x + row * H + at, value, inside)
    if NORMS_X:
        tl.store(out + row * H + at, _normalize(value, weight + at, inside, x, eps, H, OFFSET), inside)


@triton.jit
def _gate_mul(
    gates, gate_stride, ups, up_stride, out, INNER: tl.constexpr, BLOCK_I: tl.constexpr, IS_SILU: tl.constexpr
):
    """Store activation(gate) * up for one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = at < INNER
    gate = tl.load(gates + row * gate_stride + at, inside, other=0.0)
    up = tl.load(ups + row * up_stride + at, inside, other=0.0).to(tl.float32)
    tl.store(out + row * INNER + at, _activate(gate, IS_SILU) * up, inside)


@triton.jit
def _gate_mul_product(
    gate_up, part_stride, row_stride, bias, b, out, INNER: tl.constexpr, BLOCK_I: tl.constexpr, IS_SILU: tl.constexpr,
    LAYERS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Store activation(gate) * up for one block of one row of a `Product` of one or two layers."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = at < INNER
    gate = load_product(
        gate_up, part_stride, row_stride, bias, b, row, at, inside, 0, out, WIDTH, PARTS, HAS_BIAS, RANK
    ).to(out.dtype.element_ty)
    at_up = INNER + at
    up = load_product(
        gate_up, part_stride, row_stride, bias, b, row, at_up, inside, LAYERS - 1, out, WIDTH, PARTS, HAS_BIAS, RANK
    )
    tl.store(out + row * INNER + at, _activate(gate, IS_SILU) * up, inside)


@triton.jit
def _activate(gate, IS_SILU: tl.constexpr):
    """Return activation(gate), rounded to the dtype of `gate`, in float32."""
    wide = gate.to(tl.float32)
    argument = wide
    if not IS_SILU:  # 0.5 x (1 + tanh(u)) = x sigmoid(2 u), with 2 u = sqrt(8 / pi) (x + 0.044715 x^3)
        argument = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)
    return (wide * tl.sigmoid(argument)).to(gate.dtype).to(tl.float32)


@triton.jit
def _sum_chunks(logits, maxima, sums, temperature, V, CHUNKS, CHUNK_SIZE: tl.constexpr):
    """Store the maximum of one chunk of a row's scaled logits, and its sum of exp(logit - maximum)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK_SIZE + tl.arange(0, CHUNK_SIZE)
    value = tl.load(logits + row * V + at, at < V, other=-float("inf")).to(tl.float32) / temperature
    maximum = tl.maximum(tl.max(value, 0), -1e30)
    tl.store(maxima + row * CHUNKS + chunk, maximum)
    tl.store(sums + row * CHUNKS + chunk, tl.sum(tl.exp(value - maximum), 0))


@triton.jit
def _load_scaled(logits, position, at, temperature, V):
    """Return the logits `at` of one row, divided by the temperature."""
    value = tl.load(logits + position * V + at, at < V, other=-float("inf")).to(tl.float32)
    return value / temperature


@triton.jit
def _search(weights, target, at, SIZE: tl.constexpr):
    """Return the first place with a weight whose cumulative sum exceeds the target, else the last with a weight."""
    last = tl.max(tl.where(weights > 0, at, 0), 0)
    exceeds = (tl.cumsum(weights, 0) > target) & (weights > 0)
    return tl.minimum(tl.min(tl.where(exceeds, at, SIZE), 0), last)


@triton.jit
def _is_eos(token, eos, EOS: tl.constexpr):
    """Return whether `token` is one of the EOS end-of-sequence tokens at `eos`, as `is_eos` of end_of_sequence.py."""
    is_end = token < 0
    for e in tl.static_range(EOS):
        is_end = is_end | (token == tl.load(eos + e))
    return is_end


@triton.jit
def _advance(column, capacity, row, drawn, token, is_given, lengths, ended, eos, EOS: tl.constexpr):
    """Update the state and the tables of one row whose next token is `token`; a given token does not end it."""
    is_end = _is_eos(token, eos, EOS) & (is_given == 0)
    tl.store(lengths + row, drawn + 1)
    tl.store(ended + row, is_end)
    tl.store(column + _TOKEN * capacity, token)
    tl.store(column + _DRAWN * capacity, drawn + 1)
    reached_limit = drawn + 1 >= tl.load(column + _LIMIT * capacity)
    tl.store(column + _DONE * capacity, (is_end | reached_limit).to(tl.int64))


@triton.jit(do_not_specialize=["capacity"])
def _choose(
    logits, maxima, sums, state, capacity, noise, ids, logprobs, lengths, ended, eos, layout, temperature, V, CHUNKS,
    EOS: tl.constexpr, GREEDY: tl.constexpr, CHUNK_SIZE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Choose the token of one row: first its chunk, from the sums of the chunks, then its place in the chunk.

    A given token is in the tables already, and takes the place of the one that was chosen.
    """
    position = tl.program_id(0).to(tl.int64)
    column = state + position
    if tl.load(column + _DONE * capacity) == 0:
        c = tl.arange(0, BLOCK_C)
        chunk_maximum = tl.load(maxima + position * CHUNKS + c, c < CHUNKS, other=-1e30)
        chunk_sum = tl.load(sums + position * CHUNKS + c, c < CHUNKS, other=0.0)
        maximum = tl.max(chunk_maximum, 0)
        mass = (chunk_sum * tl.exp(chunk_maximum - maximum)).to(tl.float64)
        total = tl.sum(mass, 0)
        row = tl.load(column + _ROW * capacity)
        drawn = tl.load(column + _DRAWN * capacity)
        at = row * tl.load(layout + _TABLE_WIDTH) + drawn
        i = tl.arange(0, CHUNK_SIZE)
        if GREEDY:
            chunk = tl.min(tl.where(chunk_maximum == maximum, c, BLOCK_C), 0)
            value = _load_scaled(logits, position, chunk * CHUNK_SIZE + i, temperature, V)
            inner = tl.min(tl.where(value == maximum, i, CHUNK_SIZE), 0)
        else:
            target = tl.load(noise + at) * total
            chunk = _search(mass, target, c, BLOCK_C)
            rest = target - tl.sum(tl.where(c < chunk, mass, 0.0), 0)
            own_maximum = tl.max(tl.where(c == chunk, chunk_maximum, -1e30), 0)
            value = _load_scaled(logits, position, chunk * CHUNK_SIZE + i, temperature, V)
            weights = tl.exp(value - own_maximum)
            inner = _search(
                weights, (rest * tl.exp(maximum - own_maximum).to(tl.float64)).to(tl.float32), i, CHUNK_SIZE
            )
        token = tl.minimum(chunk * CHUNK_SIZE + inner, V - 1).to(tl.int64)  # NaN logits must not leave the vocabulary
        chosen = tl.max(tl.where(i == inner, value, -float("inf")), 0)
        is_given = (drawn < tl.load(column + _GIVEN * capacity)).to(tl.int32)
        token = tl.where(is_given != 0, tl.load(ids + at), token)
        tl.store(ids + at, token)
        logprob = chosen - maximum - tl.log(total).to(tl.float32)
        tl.store(logprobs + at, tl.where(is_given != 0, 0.0, logprob))
        _advance(column, capacity, row, drawn, token, is_given, lengths, ended, eos, EOS)


def multiply_gate(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return activation(gate) * up, [..., I]."""
    inner = gate.shape[-1]
    gates, ups = (x.reshape(-1, inner) for x in (gate, up))
    gates, ups = (x if x.stride(1) == 1 else x.contiguous() for x in (gates, ups))
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grid = (len(gates), triton.cdiv(inner, ACTIVATIONS_PER_PROGRAM))
    _gate_mul[grid](
        gates, gates.stride(0), ups, ups.stride(0), out, inner, ACTIVATIONS_PER_PROGRAM, activation == "silu"
    )
    return out


def _as_product(y: Tensor | Product) -> Product:
    return whole(y) if isinstance(y, Tensor) else y


class TritonOps(TorchOps):
    """The operations on a GPU: one or two kernel launches each, which a graph can capture."""

    head_multiple = 8  # for loads of 16 bytes

    def __init__(self, device: torch.device) -> None:
        self.layout = torch.zeros(6, dtype=torch.int64, device=device)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def lora_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, ranks: Sequence[int]
    ) -> Tensor | Product:
        if product_kernels.is_finishable(x, weight.shape[1], ranks):
            return product_kernels.multiply(x, weight, bias, b, ranks)
        return super().lora_linear(x, weight, bias, b, ranks)

    def finish(self, product: Tensor | Product) -> Tensor:
        return product_kernels.finish(product)

    def quantized_linear(
        self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, a: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if four_bit_kernels.fits(x, weight):
            return four_bit_kernels.multiply(x, weight, bias, a)
        return super().quantized_linear(x, weight, bias, a)

    def add_norm(
        self,
        x: Tensor,
        delta: Tensor | Product | Parts | None,
        weight: Tensor | None,
        eps: float,
        *,
        delta_weight: Tensor | None = None,
        offset: float = 0.0,
        delta_scale: float = 1.0,
    ) -> Tensor:
        if delta is None and weight is None:
            return x
        out, width = x if weight is None else torch.empty_like(x), x.shape[1]
        block = triton.next_power_of_2(width)
        # what is not read is passed as x
        if isinstance(delta, Parts):
            added, constants = (
                (delta.parts, 0, 0, x, x, delta.experts, delta.weights),
                (delta.experts.shape[1], 1, False, 0),
            )
        else:
            product = _as_product(x if delta is None else delta)
            added, constants = (*product.inputs(), x, x), (0, *product.constants()[1:])
        weights = (x if weight is None else weight, x if delta_weight is None else delta_weight)
        flags = (weight is not None, delta_weight is not None, offset, delta_scale != 1.0)
        is_sum = constants[1] > 1 or constants[3] > 0  # of several values for each output, which more warps load sooner
        warps = min(16, max(1, block // (128 if is_sum else 512)), 16 if is_sum else 8)
        _add_norm[(len(x),)](
            x, *added, *weights, out, eps, delta_scale, int(delta is not None), width, block, *constants, *flags,
            num_warps=warps,
        )  # fmt: skip
        return out

    def gate_mul(self, gate_up: Tensor | Product, activation: Activation) -> Tensor:
        if isinstance(gate_up, Tensor):
            return multiply_gate(*gate_up.chunk(2, dim=1), activation)
        rows, inner = gate_up.parts.shape[1], gate_up.width // 2
        out = gate_up.parts.new_empty(rows, inner, dtype=gate_up.dtype)
        _gate_mul_product[(rows, triton.cdiv(inner, ACTIVATIONS_PER_PROGRAM))](
            *gate_up.inputs(), out, inner, ACTIVATIONS_PER_PROGRAM, activation == "silu", gate_up.layers,
            *gate_up.constants(),
        )  # fmt: skip
        return out

    def route(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing, done: Tensor | None
    ) -> tuple[Tensor, Tensor, Groups]:
        return expert_kernels.route(x, weight, bias, routing, done)

    def mix_experts(
        self, x: Tensor, experts: Tensor, weights: Tensor, own: ExpertWeights, groups: Groups | None = None
    ) -> Parts:
        return expert_kernels.apply_experts(x, experts, weights, own, groups)

    def sum_experts(self, x: Tensor, experts: Tensor, weights: Tensor, own: ExpertWeights) -> Tensor:
        return self.mix_experts(x, experts, weights, own).sum()

    def draw(self, logits: Tensor, state: Tensor, tables: Tables, settings: SamplingParams) -> None:
        rows, width = logits.shape
        chunks = triton.cdiv(width, TOKENS_PER_CHUNK)
        maxima, sums = (torch.empty(rows, chunks, dtype=torch.float32, device=logits.device) for _ in range(2))
        _sum_chunks[(rows, chunks)](logits, maxima, sums, settings.temperature, width, chunks, TOKENS_PER_CHUNK)
        outputs = (tables.ids, tables.logprobs, tables.lengths, tables.ended)
        _choose[(rows,)](
            logits, maxima, sums, state, state.stride(0), tables.noise, *outputs, tables.eos, self.layout,
            settings.temperature, width, chunks, len(tables.eos), settings.greedy, TOKENS_PER_CHUNK,
            triton.next_power_of_2(chunks), num_warps=8,
        )  # fmt: skip

    def set_table_width(self, width: int) -> None:
        self.layout[TABLE_WIDTH] = width

    def make_cache(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> TritonCache:
        return TritonCache(shape, dtype, self.layout)
