"""The operations of a decode step in torch: the definition of each, and the implementation for the CPU.

decode_kernels.py has the same operations for a GPU. The rows that are being decoded are the columns of `state`, whose
fields are the constants below. `Tables` holds the inputs and outputs of the whole call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_core.batch import SamplingParams
from grpo_core.model.quantized import QuantizedWeight, dequantize, split_rows
from grpo_core.sampling import expert_ops
from grpo_core.sampling.draw import draw
from grpo_core.sampling.end_of_sequence import is_eos
from grpo_core.sampling.expert_ops import ExpertWeights, Routing

# the fields of `state` [FIELDS, R] int64
TOKEN = 0  # the newest token, whose keys and values are not in the cache yet
DRAWN = 1  # number of tokens so far, drawn or given, the newest included
START = 2  # number of tokens in the prompt, and so the position of the first drawn token
LIMIT = 3  # number of tokens at which the row is done
PROMPT = 4  # index of the prompt
SLOT = 5  # index of the row's keys and values in the cache
ROW = 6  # index of the row in the tables
DONE = 7  # 1 if the row draws no more tokens, else 0
GIVEN = 8  # number of tokens up to the last given one, which stand in the tables and are taken from there
FIELDS = 9

MAX_BUFFER_VALUES = 1 << 25  # of a weight in 4 bits that exist whole at once, in a product with many rows


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of a model's attention, and what all of its layers share.

    eps, norm_offset: Of the norms of queries and keys, which multiply by norm_offset + weight.
    scale: Factor of the scores.
    rotated: Number of dimensions of a head that are rotated, the first ones.
    score_cap: Bound c of the scores: c tanh(x / c) takes the place of the score x.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    scale: float
    rotated: int
    norm_offset: float = 0.0
    score_cap: float | None = None


@dataclass(frozen=True)
class LayerAttention:
    """The settings and weights of one layer's attention.

    q_norm, k_norm: Weights of the norms of queries and keys, if there are norms: [dim] if every head is normalized by
        itself, [heads dim] and [kv_heads dim] if all are normalized together.
    rotation: Index of the layer's table of rotations; None without rotation.
    window: Number of tokens that a token sees, itself included; None if it sees all before it.
    sinks: Logits [heads] that take part in the softmax of each head without a value; None without.
    """

    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    rotation: int | None = 0
    window: int | None = None
    sinks: Tensor | None = None


Rotation = tuple[Tensor, Tensor]  # cos and sin, [positions, rotated / 2] each
Activation = Literal["silu", "gelu_tanh"]


@dataclass
class Tables:
    """The inputs and outputs of one decode call over B rows of up to T tokens."""

    noise: Tensor  # [B, T] float64, input: the uniforms; not read if greedy
    ids: Tensor  # [B, T] int64, output, and input where tokens are given
    logprobs: Tensor  # [B, T] float32, output; 0 where tokens are given
    lengths: Tensor  # [B] int64, output: number of tokens
    ended: Tensor  # [B] bool, output: whether an end-of-sequence token was drawn
    eos: Tensor  # [E] int64, input: the end-of-sequence tokens


class TorchOps:
    """The operations in eager torch, for any device."""

    head_multiple = 2  # a head's dimension must be a multiple of it
    _buffer: Tensor = torch.empty(0, device="cpu")  # of whole weights

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x Wᵀ + b, [R, O].

        In float32 with several threads it is computed as (W xᵀ)ᵀ, which is 10 to 30 % faster because the threads share
        it better. In bfloat16 that takes twice as long on processors without bfloat16 instructions.
        """
        if x.dtype == torch.float32 and bias is None and len(x) >= 16 and torch.get_num_threads() > 1:
            return (weight @ x.t()).t()
        return F.linear(x, weight, bias)

    def lora_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, ranks: Sequence[int]) -> Any:
        """Return y = x Wᵀ + bias + (x Aᵀ) B for `weight` [W; A] of layers with LoRAs of these ranks.

        `b` is [sum of ranks, O]. The result is [R, O], as `attend`, `add_norm` and `gate_mul` take it.
        """
        y = self.linear(x, weight, bias)
        return y[:, : b.shape[1]].addmm_(y[:, b.shape[1] :], b) if len(b) else y

    def finish(self, product: Any) -> Tensor:
        """Return what `lora_linear` returned as a tensor."""
        return product

    def quantized_linear(
        self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, a: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return x Wᵀ + b [R, O] for a weight in 4 bits, and x Aᵀ [R, rank] if there is an A.

        The weight is dequantised in parts, into one buffer that all layers share.
        """
        out, first = x.new_empty(len(x), weight.shape[0]), 0
        for part in split_rows(weight, MAX_BUFFER_VALUES):
            last = first + part.shape[0]
            values, columns = dequantize(part, x.dtype, self._reserve(part, x)), out[:, first:last]
            if bias is None:
                torch.mm(x, values.t(), out=columns)
            else:
                torch.addmm(bias[first:last], x, values.t(), out=columns)
            first = last
        return out, None if a is None else x @ a.t()

    def _reserve(self, weight: QuantizedWeight, like: Tensor) -> Tensor:
        """Return the buffer, which grows to the size of the greatest weight, but not above MAX_BUFFER_VALUES.

        Captured graphs read it where it is, so it is never freed while they exist: `reserve` is called before.
        """
        count = weight.shape[0] * weight.shape[1]
        if len(self._buffer) < count or self._buffer.dtype != like.dtype or self._buffer.device != like.device:
            self._buffer = like.new_empty(count)
        return self._buffer

    def reserve(self, weight: QuantizedWeight, like: Tensor) -> None:
        """Allocate the buffer for a weight that is multiplied later, with the dtype and the device of `like`."""
        for part in split_rows(weight, MAX_BUFFER_VALUES):
            self._reserve(part, like)

    def add_norm(
        self,
        x: Tensor,
        delta: Tensor | None,
        weight: Tensor | None,
        eps: float,
        *,
        delta_weight: Tensor | None = None,
        offset: float = 0.0,
        delta_scale: float = 1.0,
    ) -> Tensor:
        """Add delta_scale * delta to x [R, H] in place, then return RMSNorm(x) * (offset + weight).

        With `delta_weight`, RMSNorm(delta) * (offset + delta_weight) takes the place of `delta`. Without `weight`, x
        itself is returned.
        """
        if delta is not None:
            if delta_weight is not None:
                delta = rms_norm(delta, delta_weight, eps, offset)
            x += delta if delta_scale == 1.0 else delta * delta_scale
        return x if weight is None else rms_norm(x, weight, eps, offset)

    def gate_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """Return activation(gate) * up [R, I] for [gate, up] [R, 2 I]."""
        gate, up = gate_up.chunk(2, dim=1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")).mul_(up)

    def route(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing, done: Tensor | None
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the experts [R, k] of each row of x [R, H] by a router's weight [E, H], and their weights [R, k].

        Rows with a 1 in `done` [R] have none; see `expert_ops.choose_experts`. The third value is the groups that
        `mix_experts` takes.
        """
        return *expert_ops.choose_experts(self.linear(x, weight, bias), routing, done), None

    def mix_experts(self, x: Tensor, experts: Tensor, weights: Tensor, own: ExpertWeights, groups: Any = None) -> Any:
        """Return the weighted sum [R, H] of the outputs of each row's experts, as `add_norm` takes it.

        `groups` are those that `route` returned with the experts, if it did. See `expert_ops.mix_experts`.
        """
        return expert_ops.mix_experts(x, experts, weights, own)

    def sum_experts(self, x: Tensor, experts: Tensor, weights: Tensor, own: ExpertWeights) -> Tensor:
        """Return the weighted sum as a tensor."""
        return self.mix_experts(x, experts, weights, own)

    def draw(self, logits: Tensor, state: Tensor, tables: Tables, settings: SamplingParams) -> None:
        """Draw the next token of every row that is not done from logits [R, V]; write it to `state` and `tables`.

        A given token is taken from the tables and does not end its row.
        """
        live = (state[DONE] == 0).nonzero().squeeze(1)
        rows, at = state[ROW, live], state[DRAWN, live]
        uniform = None if settings.greedy else tables.noise[rows, at]
        token, logprob = draw(logits[live], settings.temperature, uniform)
        is_given = at < state[GIVEN, live]
        token, logprob = torch.where(is_given, tables.ids[rows, at], token), logprob.masked_fill(is_given, 0.0)
        tables.ids[rows, at], tables.logprobs[rows, at], tables.lengths[rows] = token, logprob, at + 1
        ended = is_eos(token, tables.eos) & ~is_given
        tables.ended[rows] = ended
        state[TOKEN, live], state[DRAWN, live] = token, at + 1
        state[DONE, live] = (ended | (at + 1 >= state[LIMIT, live])).long()

    def set_table_width(self, width: int) -> None:
        """Set the width T of the tables for captured graphs. Nothing to do here: the tables have their shape."""

    def make_cache(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> TorchCache:
        """Return an empty cache of keys and values."""
        return TorchCache(shape, dtype, device)


class TorchCache:
    """A cache of keys and values: those of every prompt, and for every row a copy followed by the row's own tokens.

    The order of calls is: `allocate`; `store_prompts` for every layer; `add_rows` for rows that begin; for every token
    `begin_step`, then `attend` for every layer; `keep_rows` between tokens; `free`.
    """

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.free()

    def allocate(self, prompts: int, width: int, slots: int, length: int) -> None:
        """Allocate memory for `prompts` prompts of `width` tokens, and for `slots` rows of `length` drawn tokens."""
        self.prompts, self.rows = self._zeros(prompts, width), self._zeros(slots, width + length)

    def free(self) -> None:
        """Free the memory."""
        self.prompts = self.rows = self._zeros(0, 0)

    def _zeros(self, count: int, tokens: int) -> Tensor:
        s = self.shape  # zeros, because masked values must still be finite
        return torch.zeros(s.layers, 2, count, s.kv_heads, tokens, s.head_dim, dtype=self.dtype, device=self.device)

    def store_prompts(self, layer: int, first: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [n, kv_heads, w, dim] of the n prompts from `first` on."""
        for j, part in enumerate((keys, values)):
            self.prompts[layer, j, first : first + len(part), :, : part.shape[2]] = part

    def add_rows(self, state: Tensor) -> None:
        """Start the rows of these columns of the state: copy their prompts into their slots."""
        for rows, prompts in zip(self.rows, self.prompts, strict=True):
            rows[:, state[SLOT], :, : prompts.shape[3]] = prompts[:, state[PROMPT]]

    def keep_rows(self, state: Tensor) -> None:
        """Drop all rows but these columns of the state, and set the slot of each to the number of its column."""
        slots = state[SLOT].clone()
        for layer in self.rows:
            layer[:, : len(slots)] = layer[:, slots]
        state[SLOT] = torch.arange(len(slots), device=state.device)

    def begin_step(self, state: Tensor, rotations: Sequence[Rotation]) -> None:
        """Prepare what the layers of a step share."""
        position = state[START] + state[DRAWN] - 1
        self._width = int(position.max()) + 1
        self._at = (torch.arange(len(position), device=position.device), position)
        self._rotations = [(cos[position][:, None], sin[position][:, None]) for cos, sin in rotations]
        self._masks: dict[int | None, Tensor | None] = {}

    def _mask(self, window: int | None) -> Tensor | None:
        """Return what is added to the scores of a layer with this window; None if every row sees all tokens."""
        if window not in self._masks:
            at, position = torch.arange(self._width, device=self._at[1].device), self._at[1][:, None]
            visible = at <= position
            if window is not None:
                visible &= at > position - window
            bias = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device).masked_fill(~visible, -torch.inf)
            self._masks[window] = None if bool(visible.all()) else bias[:, None, None]
        return self._masks[window]

    def attend(self, layer: int, qkv: Tensor, own: LayerAttention) -> Tensor:
        """Return the attention of one new token per row, [R, heads dim], and store its key and value.

        `qkv` is [R, (heads + 2 kv_heads) dim], before norms and rotation.
        """
        heads, kv_heads, dim = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        rotation = None if own.rotation is None else self._rotations[own.rotation]
        q, k, v = normalize_and_rotate(qkv.reshape(len(qkv), -1, dim), self.shape, own, rotation)
        keys, values = self.rows[layer, 0, : len(qkv)], self.rows[layer, 1, : len(qkv)]
        row, position = self._at
        keys[row, :, position], values[row, :, position] = k, v
        keys, values = keys[:, :, : self._width], values[:, :, : self._width]
        # query heads that share a key head are treated as positions, so that keys need not be repeated; on two threads
        # this is faster than SDPA for one position
        grouped = q.reshape(len(qkv), kv_heads, heads // kv_heads, dim)
        scores = (grouped * self.shape.scale) @ keys.transpose(2, 3)
        if self.shape.score_cap is not None:
            scores = self.shape.score_cap * torch.tanh(scores / self.shape.score_cap)
        mask = self._mask(own.window)
        if mask is not None:
            scores += mask
        sinks = None if own.sinks is None else own.sinks.view(kv_heads, -1)
        return (softmax_with_sinks(scores, sinks) @ values).reshape(len(qkv), -1)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax of scores [..., w, t], where the logits `sinks` [..., w] have a share too."""
    if sinks is None:
        return scores.softmax(dim=-1)
    column = sinks.to(scores.dtype).expand(scores.shape[:-1])[..., None]
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return RMSNorm(x) * (offset + weight) over the last dimension."""
    if offset == 0.0:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float() + offset, eps).to(x.dtype)


def normalize_and_rotate(
    qkv: Tensor, shape: AttentionShape, own: LayerAttention, rotation: Rotation | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [..., heads + 2 kv_heads, dim] into q, k and v; normalize q and k if there are norms, and rotate them.

    The rotation is RoPE (arXiv:2104.09864) over the two halves of the rotated dimensions, as in Llama. Its `cos` and
    `sin` are [..., 1, rotated / 2].
    """
    qk, v = qkv.split([shape.heads + shape.kv_heads, shape.kv_heads], dim=-2)
    if own.q_norm is not None and own.k_norm is not None:
        parts = zip(qk.split([shape.heads, shape.kv_heads], dim=-2), (own.q_norm, own.k_norm), strict=True)
        qk = torch.cat([_normalize_heads(x, weight, shape) for x, weight in parts], dim=-2)
    if rotation is not None:
        cos, sin = rotation
        first, second, rest = qk.split([shape.rotated // 2] * 2 + [shape.head_dim - shape.rotated], dim=-1)
        if cos.dtype != qk.dtype:
            first, second = first.to(cos.dtype), second.to(cos.dtype)
        rotated = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
        qk = torch.cat([*rotated, rest] if rest.shape[-1] else rotated, dim=-1).to(qkv.dtype)
    q, k = qk.split([shape.heads, shape.kv_heads], dim=-2)
    return q, k, v


def _normalize_heads(x: Tensor, weight: Tensor, shape: AttentionShape) -> Tensor:
    """Normalize x [..., n, dim] over as many values as `weight` has: each head, or all heads together."""
    joined = x.reshape(*x.shape[:-2], -1, len(weight))
    if shape.norm_offset == 0.0:  # rounded before the product with the weight, as Qwen3 does
        return (F.rms_norm(joined, weight.shape, eps=shape.eps) * weight).reshape(x.shape)
    return rms_norm(joined, weight, shape.eps, shape.norm_offset).reshape(x.shape)
