"""Linear layers that share an input as one product, from live weights with at most one LoRA adapter each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo_core.sampling.computation import Unsupported
from grpo_core.sampling.decode_ops import TorchOps


class JoinedLinear:
    """The linear layers that share an input, as one product: y = x Wᵀ + b, plus s (x Aᵀ) Bᵀ of each with LoRA.

    If the layers themselves are trained, nothing is joined, and each is computed from its own weight.
    """

    def __init__(self, linears: Sequence[nn.Module], ops: TorchOps) -> None:
        self.linear = ops.linear
        self.linears = list(linears)
        self.bases: list[nn.Linear] = [getattr(linear, "base_layer", linear) for linear in linears]
        self.sizes = [base.out_features for base in self.bases]
        self.width = sum(self.sizes)
        self.is_trained = any(p.requires_grad for base in self.bases for p in base.parameters())
        if self.is_trained:
            return
        first = self.bases[0].weight
        self.ranks = [len(a) if (a := _lora_factors(linear)[0]) is not None else 0 for linear in self.linears]
        rows, self.rank = [*self.sizes, sum(self.ranks)], sum(self.ranks)
        self.weight = first.new_zeros(sum(rows), first.shape[1])
        *base_weights, self.a = self.weight.split(rows)
        self.b = first.new_zeros(self.width, self.rank)
        for base, part in zip(self.bases, base_weights, strict=True):
            part.copy_(base.weight.data)
            base.weight.data = part
        self.bias = None
        if any(base.bias is not None for base in self.bases):
            self.bias = first.new_zeros(sum(rows))
            for base, part in zip(self.bases, self.bias.split(rows), strict=False):
                if base.bias is not None:
                    part.copy_(base.bias.data)
                    base.bias.data = part

    def refresh(self) -> None:
        """Copy LoRA's factors as they are now, with their scale; zeros while the adapter is off."""
        if self.is_trained or not self.rank:
            return
        row = column = 0
        for linear, size, rank in zip(self.linears, self.sizes, self.ranks, strict=True):
            if rank:
                a, b, scale = _lora_factors(linear)
                if len(a) != rank:
                    raise Unsupported("the rank of its active adapter has changed")
                self.a[column : column + rank] = a
                self.b[row : row + size, column : column + rank] = b * scale
            row, column = row + size, column + rank

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_trained:
            return torch.cat([F.linear(x, base.weight, base.bias) for base in self.bases], dim=1)
        y = self.linear(x, self.weight, self.bias)
        return y[:, : self.width].addmm_(y[:, self.width :], self.b.t()) if self.rank else y


def check_linear(linear: nn.Module, base: nn.Module) -> None:
    """Raise Unsupported unless `linear` is `base`, a torch linear layer, or has one plain LoRA adapter on it."""
    if type(base) is not nn.Linear:
        raise Unsupported(f"its {type(base).__name__} is not a plain linear layer")
    if linear is base:
        return
    active = [name for name in linear.active_adapters if name in getattr(linear, "lora_A", {})]
    if not active and not linear.merged and linear.lora_A:  # the adapter of a teacher, which is not active
        return
    if len(active) != 1 or linear.merged:
        raise Unsupported("it does not have exactly one active, unmerged LoRA adapter")
    if getattr(linear, "lora_variant", {}).get(active[0]) or linear.lora_B[active[0]].bias is not None:
        raise Unsupported("its adapter is a variant of LoRA")


def _lora_factors(linear: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
    """Return LoRA's A, B and scale, where the scale of a disabled adapter is 0; (None, None, 0) without one."""
    if not hasattr(linear, "lora_A"):
        return None, None, 0.0
    name = next((name for name in linear.active_adapters if name in linear.lora_A), None)
    if name is None:
        return None, None, 0.0
    scale = 0.0 if linear.disable_adapters else linear.scaling[name]
    return linear.lora_A[name].weight.detach(), linear.lora_B[name].weight.detach(), scale
