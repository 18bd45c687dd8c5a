"""Try a change of a model without a trace: the model is compared as it was loaded, and restored when the answer is no.

The probes of packed layouts, faster layers, LoRA's targets and the cache use it. Memory budgets (memory.py) do not yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

EXACT_DTYPES = (torch.float32, torch.float64)
TOLERANCE, ROUGH_TOLERANCE = 1e-3, 0.05  # relative, of a whole model; rough: for 16 bits


class Snapshot:
    """The state of a model's modules and configurations: attributes, hooks and buffers, but not the weights' values."""

    def __init__(self, model: nn.Module) -> None:
        modules = [*model.modules()]
        configs = {id(config): config for module in modules for config in _configs(module)}
        self._states = [(owner, _copy(vars(owner))) for owner in (*modules, *configs.values())]
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]

    @torch.no_grad()
    def restore(self) -> None:
        """Give every module and configuration the state that it had when the snapshot was made."""
        for owner, state in self._states:
            attributes = vars(owner)
            for name in attributes.keys() - state.keys():
                del attributes[name]
            for name, value in state.items():
                present = attributes.get(name)
                if isinstance(value, dict) and type(present) is type(value):
                    present.clear()
                    present.update(value)
                else:
                    attributes[name] = value
        for buffer, value in self._buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Restore the model's state and the random generators afterwards, whatever is tried inside."""
    snapshot, cpu = Snapshot(model), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        snapshot.restore()
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)


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


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if isinstance(value, dict) else value for name, value in state.items()}
