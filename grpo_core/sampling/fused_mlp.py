"""The MLP of a layer of the fused decoder: a gated MLP as two products, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grpo_core.model.families import ExpertLayers, Family
from grpo_core.sampling.computation import Unsupported
from grpo_core.sampling.decode_ops import Activation, TorchOps
from grpo_core.sampling.expert_ops import ExpertWeights, Gating, Routing
from grpo_core.sampling.joined_linear import JoinedLinear


class GatedMlp:
    """An MLP whose gate and up are one product."""

    def __init__(
        self, mlp: nn.Module, family: Family, activation: Activation, ops: TorchOps, dtype: torch.dtype
    ) -> None:
        self.ops, self.activation = ops, activation
        self.gate_up = JoinedLinear([getattr(mlp, name) for name in family.gate_up], ops, dtype)
        self.down = JoinedLinear([mlp.down_proj], ops, dtype)
        self.products = [self.gate_up, self.down]
        self.width = self.gate_up.width  # numbers for each token that its widest product returns

    def __call__(self, x: Tensor, done: Tensor | None) -> tuple[Any, Tensor | None]:
        """Return the output [R, H] for x [R, H], as `add_norm` takes it, and None, because there are no experts."""
        return self.down.product(self.ops.gate_mul(self.gate_up.product(x), self.activation)), None


class ExpertMlp:
    """A mixture of experts, from the live weights of its router and its experts, none of which has an adapter."""

    products: tuple[JoinedLinear, ...] = ()

    def __init__(self, mlp: Any, layers: ExpertLayers, activation: Activation, ops: TorchOps, config: Any) -> None:
        self.ops, self.layers, self.experts, self.router = ops, layers, mlp.experts, getattr(mlp, layers.router)
        self.routing = Routing(self.router.top_k, layers.is_normalized(config), layers.has_rounded_weights)
        clamp = (self.experts.alpha, self.experts.limit, 1.0) if layers.is_clamped else ()
        self.gating = Gating(activation, *clamp)
        self.width = self.routing.top_k * max(2 * self.weights.inner, self.router.weight.shape[1])

    @property
    def weights(self) -> ExpertWeights:
        """The weights of the experts where they are now."""
        experts, layers = self.experts, self.layers
        biases = (experts.gate_up_proj_bias, experts.down_proj_bias) if layers.has_bias else (None, None)
        return ExpertWeights(
            experts.gate_up_proj, experts.down_proj, *biases, layers.is_transposed, layers.is_interleaved, self.gating
        )

    def __call__(self, x: Tensor, done: Tensor | None) -> tuple[Any, Tensor | None]:
        """Return the output [R, H] for x [R, H], as `add_norm` takes it, and the experts [R, k] of each row.

        Rows that are `done` have none.
        """
        bias = getattr(self.router, "bias", None)
        experts, weights, groups = self.ops.route(x, self.router.weight, bias, self.routing, done)
        return self.ops.mix_experts(x, experts, weights, self.weights, groups), experts


def has_experts(mlp: nn.Module, family: Family) -> bool:
    """Return whether an MLP of a model of this family is a mixture of experts."""
    return family.experts is not None and hasattr(mlp, "experts")


def check_experts(mlp: Any, layers: ExpertLayers, norms: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Raise Unsupported unless the router, the experts and the layer's norms have plain weights of this dtype.

    An adapter on the router or the experts is not supported, and neither is a forward that takes the place of theirs.
    """
    for module in (mlp, getattr(mlp, layers.router), mlp.experts):
        if "forward" in vars(module):
            raise Unsupported(f"the forward of its {type(module).__name__} was replaced")
    for module in (getattr(mlp, layers.router), mlp.experts, *norms):
        name = type(module).__name__
        if any("lora_" in key for key, _ in module.named_parameters()) or hasattr(module, "base_layer"):
            raise Unsupported(
                "the model's experts or routers have an adapter; lora.target_modules='[q_proj, k_proj, v_proj, "
                "o_proj]' leaves them without"
            )
        if not type(module).__module__.startswith("transformers.models."):
            raise Unsupported(f"its {name} is not a class of transformers")
        if any(p.dtype != dtype for p in module.parameters()) or any([*x.parameters()] for x in module.children()):
            raise Unsupported(f"its {name} has weights that are not plain {str(dtype).removeprefix('torch.')}")
    for module, name, dim in ((mlp.experts, "gate_up_proj", 3), (getattr(mlp, layers.router), "weight", 2)):
        if not isinstance(weight := getattr(module, name, None), nn.Parameter) or weight.dim() != dim:
            raise Unsupported(f"its {type(module).__name__} has no {name} with {dim} dimensions")
