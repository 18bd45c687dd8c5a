"""What a decode step is made of, in torch: the definition of every operation, and what runs on the CPU.

decode_kernels.py has the same operations for a GPU. Rows are what is being decoded now; `state` holds one column of
numbers for each (the constants below), `Tables` what the whole call reads and writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_core.batch import SamplingParams
from grpo_core.sampling.draw import draw

# The rows of `state` [8, R] int64.
TOKEN = 0  # the newest token, not yet in the cache
DRAWN = 1  # tokens drawn so far, that one among them
START = 2  # tokens of the prompt
LIMIT = 3  # tokens that may be drawn
PROMPT = 4  # which prompt
SLOT = 5  # where its keys and values lie
ROW = 6  # which row of the tables
DONE = 7  # 1: it draws nothing more
FIELDS = 8


@dataclass(frozen=True)
class Shape:
    """The sizes of attention, and the norm's epsilon."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


@dataclass
class Tables:
    """What a call reads and writes, B rows of T tokens."""

    noise: Tensor  # [B, T] float64, the uniforms; not read when greedy. What follows is written, but for eos
    ids: Tensor  # [B, T] int64
    logprobs: Tensor  # [B, T] float32
    lengths: Tensor  # [B] int64, tokens drawn
    ended: Tensor  # [B] bool, by an end-of-sequence token
    eos: Tensor  # [E] int64


class TorchOps:
    """The operations on any device, eagerly."""

    head_multiple = 2  # of which a head's dimension must be one

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + b, [R, O]; with several threads as (W xᵀ)ᵀ, which they share better (a tenth to a third faster).

        In float32, that is: in bfloat16 a processor without instructions for it takes twice as long so.
        """
        if x.dtype == torch.float32 and bias is None and len(x) >= 16 and torch.get_num_threads() > 1:
            return (weight @ x.t()).t()
        return F.linear(x, weight, bias)

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """x [R, H] += delta in place; then RMSNorm(x) * weight."""
        if delta is not None:
            x += delta
        return F.rms_norm(x, (x.shape[1],), weight, eps)

    def silu_mul(self, both: Tensor) -> Tensor:
        """silu(gate) * up of [R, 2 I] = (gate, up), [R, I]."""
        gate, up = both.chunk(2, dim=1)
        return F.silu(gate).mul_(up)

    def draw(self, logits: Tensor, state: Tensor, tables: Tables, settings: SamplingParams) -> None:
        """The next token of every row that is not done, from logits [R, V]; writes `state` and `tables`."""
        live = (state[DONE] == 0).nonzero().squeeze(1)
        rows, at = state[ROW, live], state[DRAWN, live]
        uniform = None if settings.greedy else tables.noise[rows, at]
        token, logprob = draw(logits[live], settings.temperature, uniform)
        tables.ids[rows, at], tables.logprobs[rows, at], tables.lengths[rows] = token, logprob, at + 1
        ended = torch.isin(token, tables.eos)
        tables.ended[rows] = ended
        state[TOKEN, live], state[DRAWN, live] = token, at + 1
        state[DONE, live] = (ended | (at + 1 >= state[LIMIT, live])).long()

    def columns(self, longest: int) -> None:
        """Say how wide the tables of this call are: graphs need to know, here the tables say it themselves."""

    def cache(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> TorchCache:
        """Keys and values, empty."""
        return TorchCache(shape, dtype, device)


class TorchCache:
    """Keys and values: those of the prompts, and every row's own copy with its completion behind it.

    In a call: `take`, `store` for every layer and part of the prompts, `admit` for rows that begin; then for each token
    `begin`, and `attend` for every layer; `keep` between tokens; `give_back`.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.give_back()

    def take(self, prompts: int, width: int, slots: int, length: int) -> None:
        """Have room for `prompts` prompts of `width` tokens and `slots` rows of `length`."""
        self.prompts, self.rows = self._room(prompts, width), self._room(slots, width + length)

    def give_back(self) -> None:
        """Hold no memory."""
        self.prompts = self.rows = self._room(0, 0)

    def _room(self, count: int, tokens: int) -> Tensor:
        s = self.shape  # zeros: what a mask hides must still be a number
        return torch.zeros(s.layers, 2, count, s.kv_heads, tokens, s.head_dim, dtype=self.dtype, device=self.device)

    def store(self, layer: int, first: int, keys: Tensor, values: Tensor) -> None:
        """Of prompts `first` and on, [n, kv_heads, w, dim]."""
        for j, part in enumerate((keys, values)):
            self.prompts[layer, j, first : first + len(part), :, : part.shape[2]] = part

    def admit(self, state: Tensor) -> None:
        """Rows enter: their columns of the state."""
        for rows, prompts in zip(self.rows, self.prompts, strict=True):
            rows[:, state[SLOT], :, : prompts.shape[3]] = prompts[:, state[PROMPT]]

    def keep(self, state: Tensor) -> None:
        """Only these rows stay, in this order; each then lies where its column is."""
        slots = state[SLOT].clone()
        for layer in self.rows:
            layer[:, : len(slots)] = layer[:, slots]
        state[SLOT] = torch.arange(len(slots), device=state.device)

    def begin(self, state: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Before the layers of a step: what they share. cos and sin are [positions, dim / 2]."""
        place = state[START] + state[DRAWN] - 1
        width = int(place.max()) + 1
        self._at = (torch.arange(len(place), device=place.device), place)
        self._width, self._cos, self._sin = width, cos[place][:, None], sin[place][:, None]
        seen = torch.arange(width, device=place.device) <= place[:, None]
        hidden = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill(~seen, -torch.inf)
        self._mask = None if bool(seen.all()) else hidden[:, None, None]

    def attend(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """Attention of one new token a row: qkv [R, (heads + 2 kv_heads) dim] -> [R, heads dim]; stores k and v."""
        heads, kv_heads, dim = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        q, k, v = rotated(qkv.reshape(len(qkv), -1, dim), self.shape, self._cos, self._sin, q_norm, k_norm)
        keys, values = self.rows[layer, 0, : len(qkv)], self.rows[layer, 1, : len(qkv)]
        row, place = self._at
        keys[row, :, place], values[row, :, place] = k, v
        keys, values = keys[:, :, : self._width], values[:, :, : self._width]
        grouped = q.reshape(len(qkv), kv_heads, heads // kv_heads, dim)  # a group's heads as positions: no repeat
        scores = (grouped * dim**-0.5) @ keys.transpose(2, 3)  # on two threads faster than SDPA for one position
        if self._mask is not None:
            scores += self._mask
        return (scores.softmax(dim=-1) @ values).reshape(len(qkv), -1)


def rotated(
    qkv: Tensor, shape: Shape, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v from [..., heads + 2 kv_heads, dim]: q and k normed where there are norms, then rotated (RoPE).

    cos and sin are [..., 1, dim / 2]. arXiv:2104.09864, in the halves that Llama's family uses.
    """
    both, v = qkv.split([shape.heads + shape.kv_heads, shape.kv_heads], dim=-2)
    if q_norm is not None and k_norm is not None:
        weight = torch.cat([q_norm.expand(shape.heads, -1), k_norm.expand(shape.kv_heads, -1)])
        both = F.rms_norm(both, (shape.head_dim,), eps=shape.eps) * weight
    first, second = both.chunk(2, dim=-1)
    turned = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
    q, k = torch.cat(turned, dim=-1).split([shape.heads, shape.kv_heads], dim=-2)
    return q, k, v
