"""Layers that compute the same as a model's own in fewer operations, and store less for the backward pass.

`install` replaces the forward of LoRA linear layers, RMSNorm layers and gated MLPs, after comparisons with the model
as it was loaded have shown the same outputs: of each kind of layer on random numbers, and of the whole model. All other
modules stay as they are. Norms that multiply by 1 + w, or by a gate, are replaced on a GPU alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo_core.model.families import FAMILIES
from grpo_core.model.quantized import QuantizedLinear, QuantizedWeight, dequantize
from grpo_core.model.trial import is_same, keep_if_same, without_trace

MAX_NORM = 16384  # columns of a norm that a kernel computes
TOLERANCE, ROUGH_TOLERANCE = 1e-4, 0.03  # relative, of one layer: tighter than those of a whole model in trial.py
MLP_CLASSES = {family.mlp_class for family in FAMILIES.values()} | {"Qwen3NextMLP", "Qwen3_5MLP"}


def install(model: nn.Module) -> None:
    """Replace the forward of the layers of `model` that have a faster one. Parameters and their names stay.

    A module whose forward was already replaced, by the model's own code or by another library, stays as it is.
    """
    chosen: dict[tuple, Callable | None] = {}
    replacements: list[tuple[nn.Module, Callable]] = []
    with without_trace(model):
        model.eval()  # with dropout no two outputs would be equal
        for module in model.modules():
            makers = tuple(make for applies, make in REPLACEMENTS if applies(module))
            if not makers or "forward" in vars(module):
                continue
            base = type(getattr(module, "base_layer", None))
            key = (type(module), base, makers, getattr(module, "variance_epsilon", None))
            if key not in chosen:
                dtype = _dtype_of(module, model)
                agreeing = (make for make in makers if _computes_the_same(module, make(module), dtype))
                chosen[key] = next(agreeing, None)
            if (make_forward := chosen[key]) is not None:
                replacements.append((module, make_forward(module)))

    def replace() -> None:
        for module, forward in replacements:
            module.forward = forward

    if replacements:
        keep_if_same(model, replace, lambda: _outputs(model))


def _dtype_of(module: nn.Module, model: nn.Module) -> torch.dtype:
    """Return the dtype in which a module computes: that of its weights, or of the model's if they are in 4 bits."""
    return next(p.dtype for p in (*module.parameters(), *model.parameters()) if p.is_floating_point())


def _outputs(model: nn.Module) -> Tensor:
    """Return the logits of two short rows."""
    model.eval()
    config = model.config.get_text_config()
    ids = (torch.arange(12, device=next(model.parameters()).device).view(2, 6) + 2) % config.vocab_size
    return model(input_ids=ids, use_cache=False).logits


def make_lora_forward(module: nn.Module) -> Callable[..., Tensor]:
    """Return a forward for x W' + b + scaling (x A') B' with frozen W and b, one adapter and no dropout.

    A W in 4 bits is computed for the product in the forward, and again in the backward.

    Any other case, such as a disabled or merged adapter, uses PEFT's forward.
    """
    original = type(module).forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in module.active_adapters if name in module.lora_A]
        is_plain = len(names) == 1 and not (args or kwargs or module.disable_adapters or module.merged)
        if is_plain and names[0] not in module.lora_variant:
            a, b, dropout = (group[names[0]] for group in (module.lora_A, module.lora_B, module.lora_dropout))
            no_dropout = not dropout.training or getattr(dropout, "p", 0.0) == 0.0
            base = module.base_layer
            is_frozen = not any(p.requires_grad for p in base.parameters()) and b.bias is None
            weight = base.quantized if isinstance(base, QuantizedLinear) else base.weight
            has_dtype = a.weight.dtype == x.dtype and (isinstance(weight, QuantizedWeight) or weight.dtype == x.dtype)
            if no_dropout and is_frozen and has_dtype:
                rows, scaling = x.reshape(-1, x.shape[-1]), float(module.scaling[names[0]])
                out = _Lora.apply(rows, weight, base.bias, a.weight, b.weight, scaling)
                return out.view(*x.shape[:-1], out.shape[-1])  # here, so that the output may be changed in place
        return original(module, x, *args, **kwargs)

    return forward


def make_norm_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a forward that computes x / rms(x) * weight in one operation."""
    eps, original = module.variance_epsilon, type(module).forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype != module.weight.dtype:  # the module decides in which dtype the product is
            return original(module, x)
        return F.rms_norm(x, module.weight.shape, module.weight, eps)

    return forward


def make_offset_norm_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a forward that computes x / rms(x) * (1 + weight) in one operation on a GPU, for a frozen weight."""
    original = type(module).forward

    def forward(x: Tensor) -> Tensor:
        if not _fits_kernel(module, x):
            return original(module, x)
        from grpo_core.model.layer_kernels import Norm

        return Norm.apply(x, None, module.weight, x.shape[-1], module.eps, 1.0, "none")

    return forward


def make_norm_forward_with_gate_after(module: nn.Module) -> Callable[..., Tensor]:
    """Return a forward that computes x / rms(x) * weight * silu(gate) in one operation on a GPU."""
    return _make_gated_norm_forward(module, "after")


def make_norm_forward_with_gate_before(module: nn.Module) -> Callable[..., Tensor]:
    """Return a forward that computes y / rms(y) * weight of y = x silu(gate) in one operation on a GPU."""
    return _make_gated_norm_forward(module, "before")


def _make_gated_norm_forward(module: nn.Module, gating: Literal["after", "before"]) -> Callable[..., Tensor]:
    """Return the forward of a gated norm with a frozen weight, which norms groups of columns by themselves."""
    original = type(module).forward

    def forward(x: Tensor, gate: Tensor | None = None) -> Tensor:
        width = getattr(module, "group_size", None) or x.shape[-1] // getattr(module, "n_groups", 1)
        if gate is None or gate.shape != x.shape or not _fits_kernel(module, x, width):
            return original(module, x, gate)
        from grpo_core.model.layer_kernels import Norm

        return Norm.apply(x, gate, module.weight, width, module.variance_epsilon, 0.0, gating)

    return forward


def _fits_kernel(module: nn.Module, x: Tensor, width: int | None = None) -> bool:
    """Return whether `layer_kernels.Norm` computes the norm of x, in groups of `width` columns."""
    width = width or x.shape[-1]
    has_dtype = x.dtype == module.weight.dtype and x.dtype != torch.float64
    is_trained = torch.is_grad_enabled() and module.weight.requires_grad
    return x.is_cuda and has_dtype and not is_trained and x.numel() > 0 and width <= MAX_NORM


def make_mlp_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a forward for down(silu(gate(x)) * up(x)); the backward pass recomputes silu instead of storing it."""
    return lambda x: module.down_proj(_SiluMul.apply(module.gate_proj(x), module.up_proj(x)))


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        rows: Tensor,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        inner = rows @ a.T  # [n, r]
        out = F.linear(rows, _whole(weight, rows.dtype), bias).addmm_(inner, b.T, alpha=scaling)
        context.save_for_backward(rows, a, b, inner)
        context.weight, context.scaling = weight, scaling  # frozen, so it needs no check for changes
        return out

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, b, inner = context.saved_tensors
        needs_x, needs_a, needs_b = (context.needs_input_grad[i] for i in (0, 3, 4))
        inner_grad = (grad @ b).mul_(context.scaling)  # [n, r]
        x_grad = (grad @ _whole(context.weight, grad.dtype)).addmm_(inner_grad, a) if needs_x else None
        a_grad = inner_grad.T @ rows if needs_a else None
        b_grad = (grad.T @ inner).mul_(context.scaling) if needs_b else None
        return x_grad, None, None, a_grad, b_grad, None


def _whole(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return dequantize(weight, dtype) if isinstance(weight, QuantizedWeight) else weight


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
        type(getattr(module, "base_layer", None)) in (nn.Linear, QuantizedLinear)
    )


def _is_norm(module: nn.Module) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and hasattr(module, "weight")
    )


def _is_offset_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "eps") and _is_on_gpu(module)


def _is_gated_norm(module: nn.Module) -> bool:
    is_named = type(module).__name__.endswith(("RMSNormGated", "GatedRMSNorm"))
    return is_named and hasattr(module, "variance_epsilon") and _is_on_gpu(module)


def _is_on_gpu(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor) and module.weight.is_cuda


def _is_mlp(module: nn.Module) -> bool:
    return type(module).__name__ in MLP_CLASSES


REPLACEMENTS = [
    (_is_lora, make_lora_forward),
    (_is_gated_norm, make_norm_forward_with_gate_after),
    (_is_gated_norm, make_norm_forward_with_gate_before),
    (_is_norm, make_norm_forward),
    (_is_offset_norm, make_offset_norm_forward),
    (_is_mlp, make_mlp_forward),
]


@torch.no_grad()
def _computes_the_same(module: nn.Module, forward: Callable[[Tensor], Tensor], dtype: torch.dtype) -> bool:
    """Return whether `forward` and the forward of the module's class agree on random input, up to rounding."""
    weight = next(module.parameters())
    first = next((layer for layer in module.modules() if isinstance(layer, QuantizedLinear)), None)
    width = weight.shape[-1] if first is None else first.in_features
    generator = torch.Generator("cpu").manual_seed(0)
    x, gate = torch.randn(2, 3, width, generator=generator, device="cpu").to(weight.device, dtype)
    inputs = (x, gate) if _is_gated_norm(module) else (x,)
    try:
        return is_same(forward(*inputs), module.forward(*inputs), TOLERANCE, ROUGH_TOLERANCE)
    except Exception:  # a module of another kind with the same names
        return False
