"""Try a change of a model without a trace: the model is compared as it was loaded, and restored when the answer is no.

The probes of packed layouts, faster layers, kernels, routers, LoRA's targets, the cache and memory budgets use it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

EXACT_DTYPES = (torch.float32, torch.float64)
TOLERANCE, ROUGH_TOLERANCE = 1e-3, 0.05  # relative, of a whole model; rough: for 16 bits


class Snapshot:
    """The state of a model's modules and configurations: attributes, hooks, buffers, and of the weights all but values.

    Containers and tensors that are attributes are restored in place, so that others who hold them see the old values.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [*model.modules()]
        configs = {id(config): config for module in modules for config in _configs(module)}
        owners = (*modules, *configs.values())
        self._states = [(owner, dict(vars(owner))) for owner in owners]
        values = [value for _, state in self._states for value in state.values()]
        self._containers = [(value, value.copy()) for value in values if isinstance(value, (dict, list, set, deque))]
        tensors = [*model.buffers(), *(value for value in values if isinstance(value, Tensor))]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]
        self._parameters = [(p, p.data, p.requires_grad, p.grad, _clone(p.grad)) for p in model.parameters()]

    @torch.no_grad()
    def restore(self) -> None:
        """Give every module and configuration the state that it had when the snapshot was made."""
        for container, content in self._containers:
            _refill(container, content)
        for owner, state in self._states:
            attributes = vars(owner)
            for name in attributes.keys() - state.keys():
                del attributes[name]
            attributes.update(state)
        for tensor, value in self._tensors:
            if not torch.equal(tensor, value):
                tensor.copy_(value)
        for parameter, data, requires_grad, grad, grad_value in self._parameters:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = grad
            if grad is not None and not torch.equal(grad, grad_value):
                grad.copy_(grad_value)


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Restore the model's state and the random generators afterwards, whatever is tried inside."""
    snapshot, generators = Snapshot(model), _RandomStates()
    try:
        yield
    finally:
        snapshot.restore()
        generators.restore()


class _RandomStates:
    """The states of the random generators of torch, on the CPU and this process's GPU, of NumPy and of Python."""

    def __init__(self) -> None:
        self._cpu, self._numpy, self._python = torch.get_rng_state(), np.random.get_state(), random.getstate()
        has_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._gpu = torch.cuda.get_rng_state() if has_gpu else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu)


def keep_if_same(model: nn.Module, change: Callable[[], Any], compute: Callable[[], Tensor]) -> bool:
    """Apply `change` and keep it if `compute` gives the same before and after; otherwise restore the model.

    A `compute` that fails before the change cannot judge it: the change stays. Returns whether it stays.
    """
    snapshot = Snapshot(model)
    try:
        with torch.no_grad(), without_trace(model):
            expected = compute()
    except Exception:  # a module that is not a whole model, or that needs other inputs
        change()
        return True
    try:
        change()
        with torch.no_grad(), without_trace(model):
            agrees = is_same(compute(), expected)
    except Exception:
        agrees = False
    if not agrees:
        snapshot.restore()
    return agrees


def is_same(
    values: Tensor, expected: Tensor, tolerance: float = TOLERANCE, rough_tolerance: float = ROUGH_TOLERANCE
) -> bool:
    """Return whether two results are equal up to rounding, by the norm of their difference; False for NaN."""
    bound = tolerance if expected.dtype in EXACT_DTYPES else rough_tolerance
    if values.shape != expected.shape or values.dtype != expected.dtype:
        return False
    return bool((values - expected).float().norm() <= bound * expected.float().norm())


def _configs(module: nn.Module) -> Iterator[Any]:
    """Yield the configuration of a module and those nested in it."""
    config = vars(module).get("config")
    if hasattr(config, "to_dict"):
        yield config
        yield from (value for value in vars(config).values() if hasattr(value, "to_dict"))


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _refill(container: Any, content: Any) -> None:
    """Give a dict, list, set or deque the content of a copy of it."""
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)
