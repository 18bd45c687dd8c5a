"""Layers that compute the same as a model's own in fewer operations, and store less for the backward pass.

`install` replaces the forward of LoRA linear layers, RMSNorm layers and gated MLPs, after a comparison on random
numbers has shown the same outputs. All other modules stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo_core.model.families import FAMILIES

MLP_CLASSES = {family.mlp_class for family in FAMILIES.values()}


def install(model: nn.Module) -> None:
    """Replace the forward of the layers of `model` that have a faster one. Parameters and their names stay."""
    is_same, training = {}, model.training
    model.eval()  # with dropout no two outputs would be equal
    for module in model.modules():
        make_forward = next((make for applies, make in REPLACEMENTS if applies(module)), None)
        if make_forward is None:
            continue
        key = (type(module), make_forward, getattr(module, "variance_epsilon", None))
        if key not in is_same:
            is_same[key] = _computes_the_same(module, make_forward(module))
        if is_same[key]:
            module.forward = make_forward(module)
    model.train(training)


def make_lora_forward(module: nn.Module) -> Callable[..., Tensor]:
    """Return a forward for x W' + b + scaling (x A') B' with frozen W and b, one adapter and no dropout.

    Any other case, such as a disabled or merged adapter, uses PEFT's forward.
    """
    original = type(module).forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in module.active_adapters if name in module.lora_A]
        is_plain = len(names) == 1 and not (args or kwargs or module.disable_adapters or module.merged)
        if is_plain and names[0] not in module.lora_variant:
            a, b, dropout = (group[names[0]] for group in (module.lora_A, module.lora_B, module.lora_dropout))
            no_dropout = not module.training or getattr(dropout, "p", 0.0) == 0.0
            base = module.base_layer
            is_frozen = not any(p.requires_grad for p in base.parameters()) and b.bias is None
            if no_dropout and is_frozen and a.weight.dtype == x.dtype == base.weight.dtype:
                return _Lora.apply(x, base.weight, base.bias, a.weight, b.weight, float(module.scaling[names[0]]))
        return original(module, x, *args, **kwargs)

    return forward


def make_norm_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a forward that computes x / rms(x) * weight in one operation."""
    eps = module.variance_epsilon
    return lambda x: F.rms_norm(x, module.weight.shape, module.weight, eps)


def make_mlp_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a forward for down(silu(gate(x)) * up(x)); the backward pass recomputes silu instead of storing it."""
    return lambda x: module.down_proj(_SiluMul.apply(module.gate_proj(x), module.up_proj(x)))


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.flatten(0, -2)
        inner = rows @ a.T  # [n, r]
        out = F.linear(rows, weight, bias).addmm_(inner, b.T, alpha=scaling)
        context.save_for_backward(rows, weight, a, b, inner)
        context.scaling = scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, inner = context.saved_tensors
        needs_x, needs_a, needs_b = (context.needs_input_grad[i] for i in (0, 3, 4))
        shape, grad = grad.shape, grad.flatten(0, -2)
        inner_grad = (grad @ b).mul_(context.scaling)  # [n, r]
        x_grad = (grad @ weight).addmm_(inner_grad, a).view(*shape[:-1], -1) if needs_x else None
        a_grad = inner_grad.T @ rows if needs_a else None
        b_grad = (grad.T @ inner).mul_(context.scaling) if needs_b else None
        return x_grad, None, None, a_grad, b_grad, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, gate: Tensor, up: Tensor) -> Tensor:
        context.save_for_backward(gate, up)
        return _silu_mul_functions(gate)[0](gate, up)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = context.saved_tensors
        return _silu_mul_functions(gate)[1](grad, gate, up)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    return F.silu(gate) * up


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `silu_mul` for `gate` and `up`."""
    active = F.silu(gate)
    return torch.ops.aten.silu_backward(grad * up, gate), active.mul_(grad)


def _silu_mul_functions(x: Tensor) -> tuple[Callable, Callable]:
    """Return `silu_mul` and `silu_mul_backward` for the device of `x`."""
    if not x.is_cuda:
        return silu_mul, silu_mul_backward
    from grpo_core.model import kernels  # needs triton, which torch brings along where it has CUDA

    return kernels.silu_mul, kernels.silu_mul_backward


def _is_lora(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("lora_A", "lora_B", "lora_variant", "merged")) and (
        type(getattr(module, "base_layer", None)) is nn.Linear
    )


def _is_norm(module: nn.Module) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and hasattr(module, "weight")
    )


def _is_mlp(module: nn.Module) -> bool:
    return type(module).__name__ in MLP_CLASSES


REPLACEMENTS = [(_is_lora, make_lora_forward), (_is_norm, make_norm_forward), (_is_mlp, make_mlp_forward)]


@torch.no_grad()
def _computes_the_same(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> bool:
    """Return whether `forward` and the forward of the module's class agree on random input, up to rounding."""
    weight = next(module.parameters())
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(3, weight.shape[-1], generator=generator, device="cpu").to(weight.device, weight.dtype)
    try:
        ours, original = forward(x), type(module).forward(module, x)
    except Exception:  # a module of another kind with the same names
        return False
    tolerance = 1e-4 if x.dtype == torch.float32 else 0.03
    return bool((ours - original).float().norm() <= tolerance * original.float().norm())
