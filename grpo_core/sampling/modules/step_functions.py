"""Faster functions for one token step, which take the place of a model's own while a step runs on a GPU.

They are of four kinds: functions of transformers' modeling files, which many recurrent model types share by name and
signature; the forward of RMSNorm modules; that of experts (expert_substitutes.py); and that of linear layers that share
an input, as one product. Each kind of norm and of experts is compared with the module on random numbers; the whole step
is compared with the model by `check_steps` (cache_check.py), and computed without these functions if it differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo_core.model.quantized import QuantizedLinear
from grpo_core.model.trial import is_same
from grpo_core.sampling.computation import Unsupported
from grpo_core.sampling.decode_ops import TorchOps
from grpo_core.sampling.joined_linear import JoinedLinear, check_linear
from grpo_core.sampling.modules.expert_substitutes import find_expert_forwards

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
        if (
            "RMSNorm" not in type(module).__name__
            or getattr(module, "weight", None) is None
            or module.weight.dim() != 1
        ):
            continue
        key = (type(module), _eps(module))
        if key not in kinds:
            kinds[key] = find_kind(module, kernels)
        if (kind := kinds[key]) is not None:
            substitutes.append(Substitute(module, "forward", _make_norm(module, kind, kernels)))
    return substitutes


def find_expert_substitutes(model: nn.Module, ops: TorchOps) -> list[Substitute]:
    """Return the forwards of the model's modules of experts that `ops` can compute."""
    return [Substitute(module, "forward", forward) for module, forward in find_expert_forwards(model, ops)]


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
def find_kind(module: Any, kernels: Any) -> tuple[int, int] | None:
    """Return the offset of a norm's weight and how it uses a gate (`norm` has the meaning), or None."""
    if _eps(module) is None:
        return None
    weight = module.weight
    generator = torch.Generator("cpu").manual_seed(0)
    draws = (torch.randn(3, weight.shape[0], generator=generator, device="cpu") for _ in range(2))
    x, gate = (draw.to(weight.device, weight.dtype) for draw in draws)
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


class JoinedCalls:
    """Linear layers that are called with the same input, computed as one product when the first of them is called."""

    def __init__(self, linears: Sequence[Any], ops: TorchOps, dtype: torch.dtype) -> None:
        self.joined = JoinedLinear(linears, ops, dtype)
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def substitutes(self) -> list[Substitute]:
        """Return the forwards of the layers."""
        return [
            Substitute(linear, "forward", partial(self._forward, i)) for i, linear in enumerate(self.joined.linears)
        ]

    def forget(self) -> None:
        """Free the last outputs."""
        self._input, self._outputs = None, ()

    def _forward(self, i: int, x: Tensor) -> Tensor:
        if x is not self._input:
            flat = self.joined(x.reshape(-1, x.shape[-1]))
            self._outputs = flat.unflatten(0, x.shape[:-1]).split(self.joined.sizes, dim=-1)
            self._input = x
        return self._outputs[i]


def find_joined_calls(model: nn.Module, forward: Callable[[], Any], ops: TorchOps) -> list[JoinedCalls]:
    """Return the layers that share an input while `forward` runs. Their weights are moved, and keep their values."""
    groups: dict[tuple[int, int], list[Any]] = {}
    inputs: list[Tensor] = []  # held, so that no other tensor can have their identity
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}

    def record(module: Any, arguments: tuple) -> None:
        if arguments and isinstance(x := arguments[0], Tensor) and x.dtype == _dtype_of(module, model):
            inputs.append(x)
            groups.setdefault((id(parents[id(module)]), id(x)), []).append(module)

    heads = {id(module) for module in (model.get_output_embeddings(), model.get_input_embeddings())}
    linears = [module for module in model.modules() if _is_joinable(module) and id(module) not in heads]
    handles = [linear.register_forward_pre_hook(record) for linear in linears]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    calls: dict[int, int] = {}
    for group in groups.values():
        for linear in group:
            calls[id(linear)] = calls.get(id(linear), 0) + 1
    whole = [group for group in groups.values() if all(calls[id(linear)] == 1 for linear in group)]
    return [JoinedCalls(group, ops, model.dtype) for group in _joinable(whole)]


def _joinable(groups: Iterable[list[Any]]) -> Iterator[list[Any]]:
    """Yield the groups that one product computes faster: several layers, one with LoRA, or one in 4 bits.

    Of a group with layers in 4 bits and others these two kinds are groups.
    """
    for group in groups:
        in_four_bits = [_is_quantized(linear) for linear in group]
        kinds = ([x for x, is_one in zip(group, in_four_bits, strict=True) if is_one == kind] for kind in (True, False))
        for kind in kinds:
            if len(kind) > 1 or (kind and (hasattr(kind[0], "lora_A") or _is_quantized(kind[0]))):
                yield kind


def _is_quantized(linear: Any) -> bool:
    return isinstance(getattr(linear, "base_layer", linear), QuantizedLinear)


def _dtype_of(linear: Any, model: Any) -> torch.dtype:
    """Return the dtype of the inputs of a linear layer."""
    return model.dtype if _is_quantized(linear) else linear.weight.dtype


def _is_joinable(module: Any) -> bool:
    """Return whether a module is a linear layer with frozen weights, and with one plain LoRA adapter or none."""
    if type(module) not in (nn.Linear, QuantizedLinear) and not hasattr(module, "lora_A"):
        return False
    base = getattr(module, "base_layer", module)
    try:
        check_linear(module, base)
    except Unsupported:
        return False
    return not any(p.requires_grad for p in base.parameters())
