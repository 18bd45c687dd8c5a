"""The operations of a decode step in torch: the definition of each, and the implementation for the CPU.

decode_kernels.py has the same operations for a GPU. The rows that are being decoded are the columns of `state`, whose
fields are the constants below. `Tables` holds the inputs and outputs of the whole call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_core.batch import SamplingParams
from grpo_core.sampling.draw import draw

# the fields of `state` [FIELDS, R] int64
TOKEN = 0  # the newest token, whose keys and values are not in the cache yet
DRAWN = 1  # number of tokens drawn so far, the newest included
START = 2  # number of tokens in the prompt, and so the position of the first drawn token
LIMIT = 3  # number of tokens that may be drawn
PROMPT = 4  # index of the prompt
SLOT = 5  # index of the row's keys and values in the cache
ROW = 6  # index of the row in the tables
DONE = 7  # 1 if the row draws no more tokens, else 0
FIELDS = 8


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of a model's attention, and the epsilon of its norms."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


@dataclass
class Tables:
    """The inputs and outputs of one decode call over B rows of up to T tokens."""

    noise: Tensor  # [B, T] float64, input: the uniforms; not read if greedy
    ids: Tensor  # [B, T] int64, output
    logprobs: Tensor  # [B, T] float32, output
    lengths: Tensor  # [B] int64, output: number of tokens drawn
    ended: Tensor  # [B] bool, output: whether an end-of-sequence token was drawn
    eos: Tensor  # [E] int64, input: the end-of-sequence tokens


class TorchOps:
    """The operations in eager torch, for any device."""

    head_multiple = 2  # a head's dimension must be a multiple of it

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x Wᵀ + b, [R, O].

        In float32 with several threads it is computed as (W xᵀ)ᵀ, which is 10 to 30 % faster because the threads share
        it better. In bfloat16 that takes twice as long on processors without bfloat16 instructions.
        """
        if x.dtype == torch.float32 and bias is None and len(x) >= 16 and torch.get_num_threads() > 1:
            return (weight @ x.t()).t()
        return F.linear(x, weight, bias)

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add `delta` to x [R, H] in place, then return RMSNorm(x) * weight."""
        if delta is not None:
            x += delta
        return F.rms_norm(x, (x.shape[1],), weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up [R, I] for [gate, up] [R, 2 I]."""
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate).mul_(up)

    def draw(self, logits: Tensor, state: Tensor, tables: Tables, settings: SamplingParams) -> None:
        """Draw the next token of every row that is not done from logits [R, V]; write it to `state` and `tables`."""
        live = (state[DONE] == 0).nonzero().squeeze(1)
        rows, at = state[ROW, live], state[DRAWN, live]
        uniform = None if settings.greedy else tables.noise[rows, at]
        token, logprob = draw(logits[live], settings.temperature, uniform)
        tables.ids[rows, at], tables.logprobs[rows, at], tables.lengths[rows] = token, logprob, at + 1
        ended = torch.isin(token, tables.eos)
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

    def begin_step(self, state: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Prepare what the layers of a step share. `cos` and `sin` are [positions, dim / 2]."""
        position = state[START] + state[DRAWN] - 1
        width = int(position.max()) + 1
        self._at = (torch.arange(len(position), device=position.device), position)
        self._width, self._cos, self._sin = width, cos[position][:, None], sin[position][:, None]
        visible = torch.arange(width, device=position.device) <= position[:, None]
        bias = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device).masked_fill(~visible, -torch.inf)
        self._mask = None if bool(visible.all()) else bias[:, None, None]

    def attend(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """Return the attention of one new token per row, [R, heads dim], and store its key and value.

        `qkv` is [R, (heads + 2 kv_heads) dim], before norms and rotation.
        """
        heads, kv_heads, dim = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        q, k, v = normalize_and_rotate(qkv.reshape(len(qkv), -1, dim), self.shape, self._cos, self._sin, q_norm, k_norm)
        keys, values = self.rows[layer, 0, : len(qkv)], self.rows[layer, 1, : len(qkv)]
        row, position = self._at
        keys[row, :, position], values[row, :, position] = k, v
        keys, values = keys[:, :, : self._width], values[:, :, : self._width]
        # query heads that share a key head are treated as positions, so that keys need not be repeated; on two threads
        # this is faster than SDPA for one position
        grouped = q.reshape(len(qkv), kv_heads, heads // kv_heads, dim)
        scores = (grouped * dim**-0.5) @ keys.transpose(2, 3)
        if self._mask is not None:
            scores += self._mask
        return (scores.softmax(dim=-1) @ values).reshape(len(qkv), -1)


def normalize_and_rotate(
    qkv: Tensor, shape: AttentionShape, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [..., heads + 2 kv_heads, dim] into q, k and v; normalize q and k if there are norms, and rotate them.

    The rotation is RoPE (arXiv:2104.09864) over the two halves of a head, as in Llama. `cos` and `sin` are
    [..., 1, dim / 2].
    """
    qk, v = qkv.split([shape.heads + shape.kv_heads, shape.kv_heads], dim=-2)
    if q_norm is not None and k_norm is not None:
        weight = torch.cat([q_norm.expand(shape.heads, -1), k_norm.expand(shape.kv_heads, -1)])
        qk = F.rms_norm(qk, (shape.head_dim,), eps=shape.eps) * weight
    first, second = qk.chunk(2, dim=-1)
    rotated = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
    q, k = torch.cat(rotated, dim=-1).split([shape.heads, shape.kv_heads], dim=-2)
    return q, k, v
