"""Faster functions for one token step, which take the place of a model's own while a step runs on a GPU.

They are of two kinds: functions of transformers' modeling files, which many recurrent model types share by name and
signature, and the forward of RMSNorm modules. Each kind of norm is compared with the module on random numbers; the whole
step is compared with the model by `check_steps` (cache_check.py), and without the functions if it differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo_core.model.trial import is_same

TOLERANCE, ROUGH_TOLERANCE = 1e-4, 0.02  # relative, of one norm


class Substitute(NamedTuple):
    """A function that takes the place of an attribute of a module, of Python or of torch."""

    owner: Any
    name: str
    function: Callable


def find_substitutes(model: nn.Module, kernels: Any) -> list[Substitute]:
    """Return the functions of `kernels` (state_kernels.py) that have a place in this model."""
    files = {id(file): file for module in model.modules() if (file := sys.modules.get(type(module).__module__))}
    substitutes = [
        Substitute(file, make.__name__, make(getattr(file, make.__name__)))
        for file in files.values()
        if file.__name__.startswith("transformers.models.")
        for make in kernels.FUNCTIONS
        if hasattr(file, make.__name__)
    ]
    kinds: dict[tuple, tuple[int, int] | None] = {}
    for module in model.modules():
        if "RMSNorm" not in type(module).__name__ or getattr(module, "weight", None) is None or module.weight.dim() != 1:
            continue
        key = (type(module), _eps(module))
        if key not in kinds:
            kinds[key] = _find_kind(module, kernels)
        if (kind := kinds[key]) is not None:
            substitutes.append(Substitute(module, "forward", _make_norm(module, kind, kernels)))
    return substitutes


@contextmanager
def installed(substitutes: list[Substitute]) -> Iterator[None]:
    """Put the functions in their places, and restore what was there afterwards."""
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in substitutes]
    for owner, name, function in substitutes:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _make_norm(module: Any, kind: tuple[int, int], kernels: Any) -> Callable[..., Tensor]:
    offset, gate_kind = kind
    group, eps = getattr(module, "group_size", None) or module.weight.shape[0], _eps(module)

    def forward(x: Tensor, gate: Tensor | None = None) -> Tensor:
        return kernels.norm(x, gate, module.weight, eps, offset, gate_kind if gate is not None else 0, group)

    return forward


@torch.no_grad()
def _find_kind(module: Any, kernels: Any) -> tuple[int, int] | None:
    """Return the offset of a norm's weight and how it uses a gate (`norm` has the meaning), or None."""
    if _eps(module) is None:
        return None
    weight = module.weight
    generator = torch.Generator("cpu").manual_seed(0)
    x, gate = (torch.randn(3, weight.shape[0], generator=generator).to(weight.device, weight.dtype) for _ in range(2))
    is_gated = "Gated" in type(module).__name__
    inputs = (x, gate) if is_gated else (x,)
    try:
        expected = module(*inputs)
        for kind in [(offset, gate_kind) for offset in (0, 1) for gate_kind in ((1, 2) if is_gated else (0,))]:
            if is_same(_make_norm(module, kind, kernels)(*inputs), expected, TOLERANCE, ROUGH_TOLERANCE):
                return kind
    except Exception:  # a norm with other arguments
        return None
    return None
