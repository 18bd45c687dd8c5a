"""Forwards of experts by the sampler's own kernels, which replace transformers' in a step of the modules decoder.

An `experts` module of transformers has joined weights `gate_up_proj` and `down_proj` for all experts, and takes the
hidden states, the experts of each row and their weights. Each forward is compared with the module on random numbers:
small ones, and ones so large that a bound of the activation has an effect.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from grpo_core.model.trial import is_same
from grpo_core.sampling.decode_ops import TorchOps
from grpo_core.sampling.expert_ops import ExpertWeights, Gating

TOLERANCE, ROUGH_TOLERANCE = 1e-4, 0.02  # relative, of one module
TRIED_ROWS, TRIED_EXPERTS = 7, 2
LARGE = 30.0  # deviation of gates and ups in the second trial: above every bound of an activation
LIMITS = ("limit", "swiglu_limit", "clamp_limit")  # names of an activation's bound, in the module or its configuration

Kind = tuple[bool, bool, Gating]  # is_transposed, is_interleaved, gating


def find_expert_forwards(model: nn.Module, ops: TorchOps) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """Yield the modules of experts that `ops` can compute, with their forwards."""
    kinds: dict[tuple, Kind | None] = {}
    for module in model.modules():
        if "forward" in vars(module) or not _has_joined_weights(module):
            continue
        shapes = tuple(p.shape for p in module.parameters(recurse=False))
        key = (type(module), shapes, *(getattr(module, name, None) for name in ("alpha", *LIMITS)))
        if key not in kinds:
            kinds[key] = _find_kind(module, ops)
        if (kind := kinds[key]) is not None:
            yield module, _make_forward(module, kind, ops)


def _has_joined_weights(module: nn.Module) -> bool:
    """Return whether a module has the weights of `ExpertWeights`, and nothing else that is trained or quantised."""
    own = dict(module.named_parameters(recurse=False))
    names = {"gate_up_proj", "down_proj"}
    biases = {f"{name}_bias" for name in names}
    if (
        not names <= own.keys()
        or own.keys() - names not in (set(), biases)
        or any(x.dim() != 3 for x in map(own.get, names))
    ):
        return False
    dtypes = {p.dtype for p in own.values()}
    return len(dtypes) == 1 and dtypes.pop().is_floating_point and own.keys() == dict(module.named_parameters()).keys()


def _make_forward(module: Any, kind: Kind, ops: TorchOps) -> Callable[..., Tensor]:
    signature = inspect.signature(type(module).forward)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x, experts, weights = [*signature.bind(module, *args, **kwargs).arguments.values()][1:]
        biases = (getattr(module, f"{name}_bias", None) for name in ("gate_up_proj", "down_proj"))
        own = ExpertWeights(module.gate_up_proj, module.down_proj, *biases, *kind)
        flat = x.reshape(-1, x.shape[-1])
        shape = (len(flat), experts.shape[-1])
        return ops.sum_experts(flat, experts.reshape(shape), weights.reshape(shape), own).view(x.shape)

    return forward


def _list_kinds(module: Any) -> Iterator[Kind]:
    """Yield the kinds that a module may be; those with a bound first, which are more special."""
    sources = (module, getattr(module, "config", None))
    bounds = {
        float(x) for name in LIMITS for source in sources if isinstance(x := getattr(source, name, None), int | float)
    }
    alpha = getattr(module, "alpha", 1.0)
    gatings = [Gating("silu", a, limit, shift) for limit in bounds for a, shift in ((alpha, 1.0), (1.0, 0.0))]
    gatings += [Gating("silu"), Gating("gelu_tanh")]
    (_, *first), (_, *second) = module.gate_up_proj.shape, module.down_proj.shape
    layouts = [
        is_transposed
        for is_transposed, inner, hidden in ((False, *first), (True, *first[::-1]))
        if second == ([inner // 2, hidden] if is_transposed else [hidden, inner // 2])
    ]
    yield from product(layouts, (False, True), gatings)


@torch.no_grad()
def _find_kind(module: Any, ops: TorchOps) -> Kind | None:
    """Return the kind with which `ops` computes what the module computes, or None."""
    weight, generator = module.gate_up_proj, torch.Generator("cpu").manual_seed(0)
    for kind in _list_kinds(module):
        hidden = weight.shape[1 if kind[0] else 2]
        try:
            x = torch.randn(TRIED_ROWS, hidden, generator=generator, device="cpu").to(weight.device, weight.dtype)
            spread = float(x.float().std() * weight[0].float().std()) * hidden**0.5
            chosen = [torch.randperm(len(weight), generator=generator, device="cpu") for _ in x]
            experts = torch.stack(chosen)[:, :TRIED_EXPERTS].to(weight.device)
            weights = torch.rand(experts.shape, generator=generator, device="cpu").to(weight.device, weight.dtype)
            compute = _make_forward(module, kind, ops)
            trials = [((x * factor).to(x.dtype), experts, weights) for factor in (1.0, LARGE / max(spread, 1e-6))]
            pairs = [(compute(*inputs), module(*inputs)) for inputs in trials]
            if all(is_same(ours, expected, TOLERANCE, ROUGH_TOLERANCE) for ours, expected in pairs):
                return kind
        except Exception:  # a module with other arguments
            return None
    return None
