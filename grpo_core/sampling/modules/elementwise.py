"""Find a model's rotary embeddings and gated MLPs, and compute the elementwise part of each by one kernel.

Both kernels are compared with the model's own functions on random numbers, and are not used if they differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo_core.model.trial import is_same
from grpo_core.sampling.decode_ops import Activation
from grpo_core.sampling.modules.step_functions import ROUGH_TOLERANCE, TOLERANCE, Substitute

# names of the layers for gate, up and down, or of those for gate and up side by side, and down
MLP_FORMS = (
    ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate_up_proj", "down_proj"),
    ("input_linear", "output_linear"),
)  # fmt: skip
ACTIVATION_NAMES = ("act_fn", "activation_fn", "activation", "act")  # attributes of modules that may be functions


def find_elementwise(model: nn.Module, kernels: Any) -> list[Substitute]:
    """Return the functions of `kernels` (elementwise_kernels.py) that have a place in this model."""
    files = {id(file): file for module in model.modules() if (file := sys.modules.get(type(module).__module__))}
    substitutes = []
    for file in files.values():
        original = getattr(file, "apply_rotary_pos_emb", None)
        if file.__name__.startswith("transformers.models.") and original is not None:
            function = kernels.apply_rotary_pos_emb(original)
            if _rotates_equally(original, function, model):
                substitutes.append(Substitute(file, original.__name__, function))
    return substitutes + _find_mlps(model, kernels)


@torch.no_grad()
def _rotates_equally(original: Callable, function: Callable, model: Any) -> bool:
    """Return whether two functions rotate random queries and keys equally, wholly and in part if both can do that."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(model.device, model.dtype)

    for rotated in (16, 8):
        vectors, angles = (random(3, 1, 6, 16).transpose(1, 2), random(3, 1, rotated)), random(3, 1, rotated)
        q, k = vectors[0].split([4, 2], dim=1)
        try:
            expected = original(q, k, vectors[1], angles)
        except Exception:  # rotates whole heads, or has other arguments
            if rotated == 16:
                return False
            continue
        try:
            results = function(q, k, vectors[1], angles)
            if not all(is_same(*pair, TOLERANCE, ROUGH_TOLERANCE) for pair in zip(results, expected, strict=True)):
                return False
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a GPU that cannot run the kernel, or a function with other results
            return False
    return True


def _find_mlps(model: Any, kernels: Any) -> list[Substitute]:
    """Return forwards of gated MLPs."""
    substitutes: list[Substitute] = []
    activations: dict[tuple, Activation | None] = {}
    for module in model.modules():
        form = next((form for form in MLP_FORMS if all(_is_linear(getattr(module, name, None)) for name in form)), None)
        if form is None:
            continue
        key = (type(module), form, getattr(module, form[0]).in_features, _activation_of(module))
        if key not in activations:
            candidates = [name for name in ("silu", "gelu_tanh") if _is_activation(module, name)]
            forwards = ((name, _make_mlp(module, form, name, kernels)) for name in candidates)
            activations[key] = next(
                (name for name, forward in forwards if _is_equal_mlp(module, form, forward, model.dtype)), None
            )
        if (activation := activations[key]) is not None:
            substitutes.append(Substitute(module, "forward", _make_mlp(module, form, activation, kernels)))
    return substitutes


def _is_linear(module: Any) -> bool:
    return isinstance(getattr(module, "base_layer", module), nn.Linear)


def _activation_of(module: Any) -> Any:
    """Return the function that is the activation of an MLP; None if it is no attribute."""
    functions = (getattr(module, name, None) for name in ACTIVATION_NAMES)
    return next((function for function in functions if callable(function)), None)


def _is_activation(module: Any, name: Activation) -> bool:
    """Return whether the activation of an MLP has this name, in float32, where similar functions differ."""
    function = _activation_of(module)
    if function is None:
        return True
    x = torch.linspace(-6, 6, 97, device="cpu")
    try:
        return is_same(function(x), F.silu(x) if name == "silu" else F.gelu(x, approximate="tanh"), 1e-6)
    except Exception:  # an activation with weights on the GPU, or with other arguments
        return False


def _make_mlp(module: Any, form: tuple[str, ...], activation: Activation, kernels: Any) -> Callable[..., Tensor]:
    original, (*first, down) = module.forward, (getattr(module, name) for name in form)

    def forward(x: Tensor, *others: Any, **kwargs: Any) -> Tensor:
        if others or kwargs:
            return original(x, *others, **kwargs)
        parts = [layer(x) for layer in first]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        return down(kernels.multiply_gate(gate, up, activation))

    return forward


@torch.no_grad()
def _is_equal_mlp(module: Any, form: tuple[str, ...], forward: Callable[..., Tensor], dtype: torch.dtype) -> bool:
    """Return whether `forward` gives the module's output for a random input; `dtype` is that of layers in 4 bits."""
    layer = getattr(module, form[0])
    weight = getattr(layer, "base_layer", layer).weight
    dtype = weight.dtype if weight.is_floating_point() else dtype
    x = torch.randn(3, 1, layer.in_features, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x = x.to(weight.device, dtype)
    try:
        return is_same(forward(x), module.forward(x), TOLERANCE, ROUGH_TOLERANCE)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # an MLP with other arguments, or a GPU that cannot run the kernel
        return False
