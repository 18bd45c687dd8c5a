"""Means, sums and maxima over tokens, micro-batches and ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_core.distributed import ranks


class Stats:
    """Means and maxima of a step, kept as tensors until one collective each turns them into numbers.

    Every rank must add the same names.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # name -> [sum, count]
        self._maxima: dict[str, Tensor] = {}
        self._weights: set[str] = set()
        self._totals: set[str] = set()

    def mean(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Let `values` (where `mask`) count in the mean called `name`."""
        values = values.detach().double()
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand_as(values)
        pair = torch.stack([torch.where(mask, values, 0.0).sum(), mask.sum().double()]).to(ranks.device())
        self._add(name, pair)

    def total(self, name: str, value: Tensor) -> None:
        """Let `value` count in the sum called `name`."""
        pair = torch.zeros(2, dtype=torch.double, device=ranks.device())
        pair[0] = value.detach()
        if name not in self._sums:
            pair[1] = 1.0 / ranks.world_size()  # over all ranks the counts add up to 1: a mean that is a sum
        self._totals.add(name)
        self._add(name, pair)

    def weights(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Importance weights: their mean as `name`, and as `name`_ess their effective sample size over their number.

        ESS / n = mean(w)^2 / mean(w^2): 1 where all are equal.
        """
        self.mean(name, values, mask)
        self.mean(f"{name}_square", values.double().square(), mask)
        self._weights.add(name)

    def add(self, other: Stats) -> None:
        """Let what `other` holds count here too."""
        for name, pair in other._sums.items():
            self.total(name, pair[0]) if name in other._totals else self._add(name, pair)
        for name, value in other._maxima.items():
            self.max(name, value)
        self._weights |= other._weights

    def max(self, name: str, value: Tensor) -> None:
        """Let the greatest of `value` count in the maximum called `name`."""
        value = value.detach().double().max().to(ranks.device())
        self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def reduce(self) -> dict[str, float]:
        """Every name's number over all ranks, nan where nothing counted. A collective."""
        row = dict.fromkeys(self._sums, math.nan)
        names = sorted(self._sums)  # a rank that had nothing to compute named them in another order
        if names:
            pairs = ranks.all_sum(torch.stack([self._sums[name] for name in names])).tolist()
            row |= {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count}
        for name in self._weights:
            square = row.pop(f"{name}_square")
            row[f"{name}_ess"] = row[name] ** 2 / square if square else 0.0
        if names := sorted(self._maxima):
            maxima = ranks.all_max(torch.stack([self._maxima[name] for name in names])).tolist()
            row |= zip(names, maxima, strict=True)
        return row

    def _add(self, name: str, pair: Tensor) -> None:
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair
