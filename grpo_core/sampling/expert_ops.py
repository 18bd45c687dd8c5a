"""The operations of a mixture of experts in torch: the definition of each, and the implementation for the CPU.

expert_kernels.py has the same operations for a GPU. A row is a token; every row has k experts, and a pair is a row with
one of them. A row without experts has the numbers -1 in their place, and the output 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NO_EXPERT = -1  # in the place of every expert of a row that is done


@dataclass(frozen=True)
class Routing:
    """The way in which a router chooses experts by its logits.

    top_k: Number k of experts for each row, those with the largest logits.
    is_normalized: The weights of the chosen experts are their softmax, instead of parts of the softmax over all.
    is_rounded: The weights are rounded to the dtype of the logits.
    """

    top_k: int
    is_normalized: bool
    is_rounded: bool = True


@dataclass(frozen=True)
class Gating:
    """The activation of an expert: (up + shift) * f(gate) for a gate and an up that are clamped.

    f(x) is x sigmoid(alpha x) ("silu"), or GELU's approximation by tanh, where alpha is 1. A gate is at most `limit`,
    and an up lies between -limit and limit.
    """

    activation: Literal["silu", "gelu_tanh"] = "silu"
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of E experts, which read and write vectors of H and have I inner dimensions.

    gate_up, down: [E, 2 I, H] and [E, H, I]; if `is_transposed`, [E, H, 2 I] and [E, I, H].
    gate_up_bias, down_bias: [E, 2 I] and [E, H], or None.
    is_interleaved: Gates and ups alternate; otherwise all gates come first.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    is_transposed: bool = False
    is_interleaved: bool = False
    gating: Gating = Gating()

    @property
    def inner(self) -> int:
        """The number I of inner dimensions."""
        return self.gate_up.shape[2 if self.is_transposed else 1] // 2


def choose_experts(logits: Tensor, routing: Routing, done: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the experts [R, k] of each row by its logits [R, E], best first, and their weights [R, k] in float32.

    Rows with a 1 in `done` [R] have no experts, and weights of 0.
    """
    wide = logits.float().softmax(dim=-1)
    weights, experts = wide.topk(routing.top_k, dim=-1)
    if routing.is_normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if routing.is_rounded:
        weights = weights.to(logits.dtype).float()
    if done is not None:
        is_done = done[:, None] != 0
        experts, weights = experts.masked_fill(is_done, NO_EXPERT), weights.masked_fill(is_done, 0.0)
    return experts, weights


def mix_experts(x: Tensor, experts: Tensor, weights: Tensor, own: ExpertWeights) -> Tensor:
    """Return the sum of the outputs of each row's experts [R, k] for x [R, H], times their weights [R, k].

    The sum is float32, in the order of the experts.
    """
    parts = torch.zeros(*experts.shape, x.shape[1], dtype=x.dtype, device=x.device)
    for expert in experts.unique().tolist():
        if expert == NO_EXPERT:
            continue
        row, place = (experts == expert).nonzero(as_tuple=True)
        gate_up = _multiply(x[row], own.gate_up, own.gate_up_bias, expert, own.is_transposed)
        inner = gate(gate_up, own.gating, own.is_interleaved)
        parts[row, place] = _multiply(inner, own.down, own.down_bias, expert, own.is_transposed)
    return (parts.float() * weights.float()[..., None]).sum(dim=1).to(x.dtype)


def _multiply(x: Tensor, weights: Tensor, biases: Tensor | None, expert: int, is_transposed: bool) -> Tensor:
    weight = weights[expert].t() if is_transposed else weights[expert]
    return F.linear(x, weight, None if biases is None else biases[expert])


def gate(gate_up: Tensor, gating: Gating, is_interleaved: bool) -> Tensor:
    """Return the activation [n, I] of gates and ups [n, 2 I]."""
    if is_interleaved:
        gates, ups = gate_up[:, ::2], gate_up[:, 1::2]
    else:
        gates, ups = gate_up.chunk(2, dim=1)
    if gating.limit is not None:
        gates, ups = gates.clamp(max=gating.limit), ups.clamp(-gating.limit, gating.limit)
    if gating.activation == "gelu_tanh":
        active = F.gelu(gates, approximate="tanh")
    else:
        active = F.silu(gates) if gating.alpha == 1.0 else gates * torch.sigmoid(gates * gating.alpha)
    return (ups + gating.shift) * active
