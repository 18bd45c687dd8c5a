"""Aggregate the metrics of a step: means, sums and maxima over tokens, micro-batches and ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_core.distributed import ranks


class Stats:
    """The means, sums and maxima of one step, each under a name.

    Values stay tensors until `reduce`, which needs one collective for means and sums and one for maxima. Every rank
    must add the same names.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # name -> [sum, count], of means and totals
        self._maxima: dict[str, Tensor] = {}
        self._weights: set[str] = set()
        self._totals: set[str] = set()

    def add_mean(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add `values` (where `mask` is true) to the mean `name`."""
        values = values.detach().double()
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand_as(values)
        pair = torch.stack([torch.where(mask, values, 0.0).sum(), mask.sum().double()]).to(ranks.device())
        self._add(name, pair)

    def add_total(self, name: str, value: Tensor) -> None:
        """Add the scalar `value` to the sum `name`."""
        pair = torch.zeros(2, dtype=torch.double, device=ranks.device())
        pair[0] = value.detach()
        if name not in self._sums:
            pair[1] = 1.0 / ranks.world_size()  # the counts of all ranks add up to 1, so `reduce` divides by 1
        self._totals.add(name)
        self._add(name, pair)

    def add_weights(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add importance weights: `reduce` returns their mean as `name` and their effective sample size as `name`_ess.

        The effective sample size is relative: ESS / n = mean(w)^2 / mean(w^2), which is 1 if all weights are equal.
        """
        self.add_mean(name, values, mask)
        self.add_mean(f"{name}_square", values.double().square(), mask)
        self._weights.add(name)

    def add_max(self, name: str, value: Tensor) -> None:
        """Add the largest element of `value` to the maximum `name`."""
        value = value.detach().double().max().to(ranks.device())
        self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def merge(self, other: Stats) -> None:
        """Add everything that `other` holds."""
        for name, pair in other._sums.items():
            if name in other._totals:
                self.add_total(name, pair[0])
            else:
                self._add(name, pair)
        for name, value in other._maxima.items():
            self.add_max(name, value)
        self._weights |= other._weights

    def reduce(self) -> dict[str, float]:
        """Return name -> number over all ranks; a mean over nothing is NaN. A collective."""
        row = dict.fromkeys(self._sums, math.nan)
        names = sorted(self._sums)  # ranks may have added the names in different orders
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
