"""Layers that compute what a model's own do, in fewer operations, and keep less for backward.

`install` replaces the forward of the modules that it knows, after seeing on random numbers that nothing else comes out:
LoRA on a linear layer, RMSNorm, and the gated MLP. Whatever it does not know is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def install(model: nn.Module) -> None:
    """Let `model` compute its known layers as below. Parameters and their names stay."""
    seen, training = {}, model.training
    model.eval()  # dropout would make any two differ
    for module in model.modules():
        make = next((make for fits, make in KNOWN if fits(module)), None)
        if make is None:
            continue
        key = (type(module), make, getattr(module, "variance_epsilon", None))
        if key not in seen:
            seen[key] = _same(module, make(module))
        if seen[key]:
            module.forward = make(module)
    model.train(training)


def lora_forward(module: nn.Module) -> Callable[..., Tensor]:
    """x W' + b + scaling (x A') B' with W and b frozen, one adapter and no dropout; peft's own for anything else."""
    theirs = type(module).forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in module.active_adapters if name in module.lora_A]
        plain = len(names) == 1 and not (args or kwargs or module.disable_adapters or module.merged)
        if plain and names[0] not in module.lora_variant:
            a, b, drop = (group[names[0]] for group in (module.lora_A, module.lora_B, module.lora_dropout))
            quiet = not module.training or getattr(drop, "p", 0.0) == 0.0
            base = module.base_layer
            frozen = not any(p.requires_grad for p in base.parameters()) and b.bias is None
            if quiet and frozen and a.weight.dtype == x.dtype == base.weight.dtype:
                return _Lora.apply(x, base.weight, base.bias, a.weight, b.weight, float(module.scaling[names[0]]))
        return theirs(module, x, *args, **kwargs)

    return forward


def norm_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """x / rms(x) * weight in one operation."""
    eps = module.variance_epsilon
    return lambda x: F.rms_norm(x, module.weight.shape, module.weight, eps)


def mlp_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """down(silu(gate(x)) * up(x)); backward computes silu again."""
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
        for_x, for_a, for_b = (context.needs_input_grad[i] for i in (0, 3, 4))
        shape, grad = grad.shape, grad.flatten(0, -2)
        back = (grad @ b).mul_(context.scaling)  # [n, r]
        dx = (grad @ weight).addmm_(back, a).view(*shape[:-1], -1) if for_x else None
        return (
            dx,
            None,
            None,
            back.T @ rows if for_a else None,
            (grad.T @ inner).mul_(context.scaling) if for_b else None,
            None,
        )


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, gate: Tensor, up: Tensor) -> Tensor:
        context.save_for_backward(gate, up)
        return _operations(gate)[0](gate, up)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = context.saved_tensors
        return _operations(gate)[1](grad, gate, up)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Its gradients for gate and up."""
    active = F.silu(gate)
    return torch.ops.aten.silu_backward(grad * up, gate), active.mul_(grad)


def _operations(x: Tensor) -> tuple[Callable, Callable]:
    if not x.is_cuda:
        return silu_mul, silu_mul_backward
    from grpo_core.model import kernels  # triton is there where CUDA is

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
    return type(module).__name__ in ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")  # others clamp, or have dropout


KNOWN = [(_is_lora, lora_forward), (_is_norm, norm_forward), (_is_mlp, mlp_forward)]


@torch.no_grad()
def _same(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether `forward` gives what the module's own does, up to rounding."""
    weight = next(module.parameters())
    x = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    try:
        ours, theirs = forward(x), type(module).forward(module, x)
    except Exception:  # it only looks like one that is known
        return False
    allowed = 1e-4 if x.dtype == torch.float32 else 0.03
    return bool((ours - theirs).float().norm() <= allowed * theirs.float().norm())
