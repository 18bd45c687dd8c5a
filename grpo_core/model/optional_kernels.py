"""Use the kernels of optional packages (flash-linear-attention, causal-conv1d, mamba-ssm) only where they are right.

transformers uses a package's function instead of its own wherever the package can be imported. Some versions refuse a
GPU, or compute wrong gradients with a version of Triton. So before the first forward with a gradient each of these
functions is called as the model calls it, and its outputs and gradients are compared with those of transformers' own
function, which is slower. One that fails or differs is replaced by transformers' own in this process.

Without causal-conv1d, this package's own kernel computes the short convolutions on a GPU, after the same comparison.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo_core.model.trial import is_same
from grpo_core.schema import summarize_error

PACKAGES = ("fla", "causal_conv1d", "mamba_ssm")
CONVOLUTION = "causal_conv1d_fn"
SILU = ("silu", "swish")  # its names
PACKED_ROWS = ("seq_idx", "cu_seqlens")  # arguments for rows that lie one behind the other
GRADIENT_TOLERANCE, ROUGH_GRADIENT_TOLERANCE = 0.01, 0.1  # relative, of one function; rough: for 16 bits


class OptionalKernel(NamedTuple):
    """A function in a modeling file of transformers that a package may have replaced."""

    file: ModuleType
    name: str

    @property
    def function(self) -> Callable:
        """The function in use."""
        return getattr(self.file, self.name)

    def use(self, function: Callable) -> None:
        """Use another function from now on."""
        setattr(self.file, self.name, function)

    def use_own(self) -> None:
        """Use transformers' own function from now on."""
        self.use(self.function.__wrapped__)


def drop_wrong_kernels(model: nn.Module, forward: Callable[[], Any], packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """Replace functions whose outputs or gradients are not those of transformers' own; return a sentence for each.

    `forward` computes the model for a row. Functions that it does not call are not checked.
    """
    if not any(importlib.util.find_spec(package) for package in packages):
        return []
    sentences = []
    for kernel in find_optional_kernels(model):
        call = _record_call(kernel, forward)
        if call is not None and (problem := _find_problem(kernel.function, *call)):
            kernel.use_own()
            sentences.append(
                f"{kernel.name} is computed by transformers, which is slower, because the function of the installed "
                f"package {problem}"
            )
    return sentences


def use_convolution_kernel(model: nn.Module, forward: Callable[[], Any]) -> None:
    """Let the model's files compute short convolutions with `layer_kernels`, unless causal-conv1d is installed.

    `forward` and the comparison are those of `drop_wrong_kernels`.
    """
    if importlib.util.find_spec("causal_conv1d"):
        return
    for kernel in find_optional_kernels(model):
        if kernel.name == CONVOLUTION and not hasattr(kernel.function, "for_other_calls"):
            call, function = _record_call(kernel, forward), make_convolution(kernel.function)
            if call is not None and not _find_problem(function, *call):
                kernel.use(function)


def make_convolution(other: Callable) -> Callable:
    """Return a function that convolves with a kernel on a GPU, for frozen weights; all other calls go to `other`."""

    @functools.wraps(other)
    def convolve(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
    ) -> Tensor:
        is_trained = torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in (weight, bias))
        is_known = activation in (None, *SILU) and all(kwargs.get(name) is None for name in PACKED_ROWS)
        if not x.is_cuda or x.dtype != weight.dtype or x.dtype == torch.float64 or is_trained or not is_known:
            return other(x, weight, bias, activation=activation, **kwargs)
        from grpo_core.model.layer_kernels import CausalConvolution

        return CausalConvolution.apply(x, weight, bias, activation is not None)

    convolve.for_other_calls = other
    return convolve


def find_optional_kernels(model: nn.Module) -> list[OptionalKernel]:
    """Return the functions in the model's modeling files that a package may have replaced."""
    files = {id(file): file for module in model.modules() if (file := sys.modules.get(type(module).__module__))}
    return [
        OptionalKernel(file, name)
        for file in files.values()
        if file.__name__.startswith("transformers.models.")
        for name, value in vars(file).items()
        if not isinstance(value, type) and callable(value) and hasattr(value, "__wrapped__") and name.islower()
        if getattr(value, "__module__", "") == file.__name__
    ]


def _record_call(kernel: OptionalKernel, forward: Callable[[], Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Return the arguments of the first call of the function in a forward; None if it is not called."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    function = kernel.function

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return function.__wrapped__(*args, **kwargs)

    kernel.use(record)
    try:
        with torch.no_grad():
            forward()
    finally:
        kernel.use(function)
    return calls[0] if calls else None


def _find_problem(function: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Return why a function cannot take the place of the one that it wraps, as a verb phrase; None if it can."""
    expected = _call_with_gradient(function.__wrapped__, args, kwargs)
    try:
        computed = _call_with_gradient(function, args, kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"fails ({summarize_error(error)})"
    tolerances = (GRADIENT_TOLERANCE, ROUGH_GRADIENT_TOLERANCE)
    if len(computed) == len(expected) and all(
        is_same(x, y, *tolerances) for x, y in zip(computed, expected, strict=True)
    ):
        return None
    return "gives other outputs or gradients"


def _call_with_gradient(function: Callable, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the outputs of a call, and the gradients of their sum of squares for its floating-point arguments."""
    inputs: list[Tensor] = []

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        if value.is_floating_point():
            inputs.append(value.requires_grad_())
        return value

    with torch.enable_grad():
        result = function(*map(copy, args), **{name: copy(value) for name, value in kwargs.items()})
        results = result if isinstance(result, (tuple, list)) else (result,)
        outputs = [x for x in results if isinstance(x, Tensor)]
        loss = sum((x.float().square().sum() for x in outputs if x.requires_grad), start=torch.zeros(()).to(outputs[0]))
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [x.detach() for x in (*outputs, *gradients) if x is not None]
