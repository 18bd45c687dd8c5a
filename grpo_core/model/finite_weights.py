"""Refuse weights that are NaN or infinite: a forward with them gives false numbers instead of an error."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from grpo_core.counts import quantify
from grpo_core.model.quantized import find_quantized
from grpo_core.schema import ConfigError


def check_finite(model: nn.Module, description: str) -> None:
    """Check every floating-point parameter of the model, and the scales of weights in 4 bits.

    `description` begins the sentence of an error.

    Raises:
        ConfigError: a value is NaN or infinite; names the first parameter.
    """
    weights = [(name, p.detach()) for name, p in model.named_parameters() if p.is_floating_point() and p.numel()]
    weights += [(f"{name}.weight", layer.quantized.scales.maxima()) for name, layer in find_quantized(model).items()]
    bad = find_not_finite(weights)
    if not bad:
        return
    name, weight = bad[0]
    number = quantify(int((~weight.isfinite()).sum()), "value")
    others = f", and so has {quantify(len(bad) - 1, 'other weight')}" if len(bad) > 1 else ""
    hint = "; fp16 ends at 65,504, so try model.precision fp32" if weight.dtype == torch.float16 else ""
    raise ConfigError(f"{description} cannot be used: {name} holds {number} of NaN or infinity{others}{hint}")


def find_not_finite(weights: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return the (name, weight) pairs that hold a NaN or an infinity, which the least or the greatest value shows."""
    pairs = list(weights)
    if not pairs:
        return []
    ranges = [torch.stack(torch.aminmax(weight.detach())).float() for _, weight in pairs]  # NaN if one value is
    finite = torch.stack(ranges).isfinite().all(dim=1).tolist()
    return [pair for pair, is_finite in zip(pairs, finite, strict=True) if not is_finite]
