"""Linear layers that share an input as one product, from live weights with at most one LoRA adapter each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo_core.model.quantized import QuantizedLinear, can_join, join, split
from grpo_core.sampling.computation import Unsupported
from grpo_core.sampling.decode_ops import TorchOps


class Weights(Protocol):
    """The frozen weights of layers that share an input, and the rows of LoRA's A, whose values `a` [rank, I] has."""

    a: Tensor

    def product(self, x: Tensor, b: Tensor, ranks: Sequence[int]) -> Any:
        """Return x Wᵀ + bias + (x Aᵀ) B for `b` [rank, O], as `TorchOps.lora_linear` returns it."""


class PlainWeights:
    """Weights as one tensor, with A behind them. The layers' own weights and biases become views of it."""

    def __init__(self, bases: Sequence[nn.Linear], rank: int, ops: TorchOps) -> None:
        first, sizes = bases[0].weight, [base.out_features for base in bases]
        self.ops = ops
        rows = [*sizes, rank]
        self.weight = first.new_zeros(sum(rows), first.shape[1])
        *base_weights, self.a = self.weight.split(rows)
        for base, part in zip(bases, base_weights, strict=True):
            part.copy_(base.weight.data)
            base.weight.data = part
        self.bias = _join_biases(bases, rows)

    def product(self, x: Tensor, b: Tensor, ranks: Sequence[int]) -> Any:
        return self.ops.lora_linear(x, self.weight, self.bias, b, ranks)


class QuantizedWeights:
    """Weights in 4 bits as one, of which the layers' own become views."""

    def __init__(self, bases: Sequence[QuantizedLinear], rank: int, ops: TorchOps, dtype: torch.dtype) -> None:
        self.ops, sizes = ops, [base.out_features for base in bases]
        self.weight = join([base.quantized for base in bases])
        if len(bases) > 1:
            for base, part in zip(bases, split(self.weight, sizes), strict=True):
                base.quantized = part
        self.a = torch.zeros(rank, bases[0].in_features, dtype=dtype, device=self.weight.packed.device)
        self.bias = _join_biases(bases, sizes)
        ops.reserve(self.weight, self.a)

    def multiply(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x Wᵀ + bias [R, O] and x Aᵀ [R, rank], None for rank 0."""
        return self.ops.quantized_linear(x, self.weight, self.bias, self.a if len(self.a) else None)

    def product(self, x: Tensor, b: Tensor, ranks: Sequence[int]) -> Tensor:
        y, inner = self.multiply(x)
        return y if inner is None else y.addmm_(inner, b)


class SeparateWeights:
    """Weights in 4 bits that have a block in common where they would meet, each by itself."""

    def __init__(self, bases: Sequence[QuantizedLinear], rank: int, ops: TorchOps, dtype: torch.dtype) -> None:
        first, *others = bases
        self.parts = [QuantizedWeights([first], rank, ops, dtype)]
        self.parts += [QuantizedWeights([base], 0, ops, dtype) for base in others]
        self.a = self.parts[0].a

    def product(self, x: Tensor, b: Tensor, ranks: Sequence[int]) -> Tensor:
        (first, inner), *others = [part.multiply(x) for part in self.parts]
        y = torch.cat([first, *(y for y, _ in others)], dim=1)
        return y if inner is None else y.addmm_(inner, b)


class JoinedLinear:
    """The linear layers that share an input, as one product: y = x Wᵀ + b, plus s (x Aᵀ) Bᵀ of each with LoRA.

    If the layers themselves are trained, nothing is joined, and each is computed from its own weight. `dtype` is that
    of x.

    Raises:
        Unsupported: some of the layers are in 4 bits, and others are not.
    """

    def __init__(self, linears: Sequence[nn.Module], ops: TorchOps, dtype: torch.dtype) -> None:
        self.linears, self.ops = list(linears), ops
        self.bases: list[nn.Linear] = [getattr(linear, "base_layer", linear) for linear in linears]
        self.sizes = [base.out_features for base in self.bases]
        self.width = sum(self.sizes)
        self.is_trained = any(p.requires_grad for base in self.bases for p in base.parameters())
        if self.is_trained:
            return
        self.ranks = [len(a) if (a := _lora_factors(linear)[0]) is not None else 0 for linear in self.linears]
        self.rank = sum(self.ranks)
        self.weights = _join_weights(self.bases, self.rank, ops, dtype)
        self.b = self.weights.a.new_zeros(self.rank, self.width)

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
                self.weights.a[column : column + rank] = a
                self.b[column : column + rank, row : row + size] = (b * scale).t()
            row, column = row + size, column + rank

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.finish(self.product(x))

    def product(self, x: Tensor) -> Any:
        """Return y as `TorchOps.lora_linear` does."""
        if self.is_trained:
            return torch.cat([F.linear(x, base.weight, base.bias) for base in self.bases], dim=1)
        return self.weights.product(x, self.b, self.ranks)


def _join_weights(bases: Sequence[nn.Linear], rank: int, ops: TorchOps, dtype: torch.dtype) -> Weights:
    quantized = [base for base in bases if isinstance(base, QuantizedLinear)]
    if not quantized:
        return PlainWeights(bases, rank, ops)
    if len(quantized) < len(bases):
        raise Unsupported("some of the layers that share an input are in 4 bits, and others are not")
    make = QuantizedWeights if can_join([base.quantized for base in quantized]) else SeparateWeights
    return make(quantized, rank, ops, dtype)


def _join_biases(bases: Sequence[nn.Linear], rows: Sequence[int]) -> Tensor | None:
    """Return the biases behind one another, of which the layers' own become views; None if there is none.

    `rows` are the numbers of outputs of the layers, and of what follows.
    """
    first = next((base.bias for base in bases if base.bias is not None), None)
    if first is None:
        return None
    bias = first.new_zeros(sum(rows))
    for base, part in zip(bases, bias.split([*rows]), strict=False):
        if base.bias is not None:
            part.copy_(base.bias.data)
            base.bias.data = part
    return bias


def check_linear(linear: nn.Module, base: nn.Module) -> None:
    """Raise Unsupported unless `linear` is `base`, a linear layer, or has one plain LoRA adapter on it.

    A linear layer is torch's, or one in 4 bits.
    """
    if type(base) not in (nn.Linear, QuantizedLinear):
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
