"""Find the gated delta nets of a model, and let one kernel compute their token step (delta_net_kernels.py).

A delta net is known by the names of its layers and sizes. A trial compares the kernel with the module on random states,
and the module keeps its own forward if they differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo_core.model.trial import EXACT_DTYPES
from grpo_core.sampling.modules.layer_memory import LayerMemory
from grpo_core.sampling.modules.step_functions import Substitute, find_kind

TRIAL_ROWS = 3
TOLERANCE, ROUGH_TOLERANCE = 1e-4, 0.03  # relative, of the outputs and the states of one step
ACTIVATIONS = {None: False, "silu": True, "swish": True}  # whether the convolution is followed by silu
SIZES = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "layer_idx", "hidden_size")


@dataclass(frozen=True)
class DeltaInputs:
    """The projections of the newest token of each row, as views: a key head serves `shared` value heads.

    q and k are [R, key heads, K], v and z (the gate of the norm) [R, key heads, shared, V], and b (of beta) and a (of
    the decay) [R, key heads, shared].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


@dataclass(frozen=True)
class DeltaWeights:
    """The weights of a gated delta net.

    conv [C, W] and conv_bias [C] are of the convolution over the channels of all q, then all k, then all v. decay
    (`A_log`) and decay_bias (`dt_bias`) are [heads], norm is [V]. The norm has the meaning of state_kernels.norm.
    """

    conv: Tensor
    conv_bias: Tensor | None
    decay: Tensor
    decay_bias: Tensor
    norm: Tensor
    eps: float
    offset: int
    gate_kind: int
    beta_scale: float
    is_silu: bool


def find_delta_nets(model: nn.Module, cache: Any, kernels: Any, state_kernels: Any) -> list[Substitute]:
    """Return forwards of the model's gated delta nets that compute one token of each row by `kernels.delta_net`.

    `cache` is a cache of transformers that a forward has filled. `kernels` is delta_net_kernels.py and `state_kernels`
    the file of that name.
    """
    substitutes: list[Substitute] = []
    kinds: dict[tuple, tuple[int, int] | None] = {}  # of the norm; None where the kernel differs
    for module in model.modules():
        project = next((project for names, project in FORMS.items() if _has(module, names)), None)
        if project is None or not _has(module, ("conv1d", "A_log", "dt_bias", *SIZES)):
            continue
        key = (type(module), *(getattr(module, name) for name in SIZES if name != "layer_idx"))
        if key not in kinds:
            kinds[key] = find_kind(_norm_of(module), state_kernels)
            if kinds[key] and not _agrees(module, _make_forward(module, project, kinds[key], kernels), cache):
                kinds[key] = None
        if kinds[key] and module.activation in ACTIVATIONS:
            substitutes.append(Substitute(module, "forward", _make_forward(module, project, kinds[key], kernels)))
    return substitutes


def _norm_of(module: Any) -> Any:
    return module.norm if hasattr(module, "norm") else module.o_norm


def _has(module: Any, names: tuple[str, ...]) -> bool:
    return all(getattr(module, name, None) is not None for name in names)


def _make_forward(module: Any, project: Callable, kind: tuple[int, int], kernels: Any) -> Callable[..., Tensor]:
    original, norm = module.forward, _norm_of(module)
    last = module.out_proj if hasattr(module, "out_proj") else module.o_proj

    def forward(hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        states = None if attention_mask is not None else _find_states(module, hidden_states, cache_params)
        if states is None:
            return original(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
        conv, eps = module.conv1d, getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        weights = DeltaWeights(
            conv.weight.squeeze(1), conv.bias, module.A_log, module.dt_bias, norm.weight, eps, *kind,
            2.0 if getattr(module, "allow_neg_eigval", False) else 1.0, ACTIVATIONS[module.activation],
        )  # fmt: skip
        out = kernels.delta_net(DeltaInputs(*project(module, hidden_states)), weights, *states)
        return last(out[:, None])

    return forward


def _find_states(module: Any, x: Tensor, cache: Any) -> tuple[Tensor, Tensor] | None:
    """Return the states of the convolution and of the delta rule; None unless x is one token that follows others."""
    if cache is None or x.shape[1] != 1:
        return None
    layer = cache.layers[module.layer_idx]
    if not layer.has_previous_state[0] or layer.record_past:
        return None
    states = layer.conv_states[0], layer.recurrent_states[0]
    return states if all(state.is_contiguous() for state in states) else None


def _project_three_parts(module: Any, x: Tensor) -> Iterator[Tensor]:
    """Yield the inputs of the kernel for Qwen3.5: q, k and v are one product."""
    heads, shared = module.num_k_heads, module.num_v_heads // module.num_k_heads
    q, k, v = module.in_proj_qkv(x)[:, 0].split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    yield from (y.unflatten(1, (heads, -1)) for y in (q, k))
    yield from (y.unflatten(1, (heads, shared, -1)) for y in (v, module.in_proj_z(x)[:, 0]))
    yield from (layer(x)[:, 0].unflatten(1, (heads, shared)) for layer in (module.in_proj_b, module.in_proj_a))


def _project_by_key_heads(module: Any, x: Tensor) -> Iterator[Tensor]:
    """Yield the inputs of the kernel for Qwen3-Next: a product has all parts of one key head side by side."""
    heads, shared = module.num_k_heads, module.num_v_heads // module.num_k_heads
    key_dim, value_dim = module.head_k_dim, shared * module.head_v_dim
    q, k, v, z = (
        module.in_proj_qkvz(x)[:, 0].unflatten(1, (heads, -1)).split([key_dim, key_dim, value_dim, value_dim], dim=-1)
    )
    yield from (q, k, v.unflatten(2, (shared, -1)), z.unflatten(2, (shared, -1)))
    yield from module.in_proj_ba(x)[:, 0].unflatten(1, (heads, -1)).split(shared, dim=-1)


def _project_apart(module: Any, x: Tensor) -> Iterator[Tensor]:
    """Yield the inputs of the kernel for OLMo Hybrid: every part has its own layer."""
    heads, shared = module.num_k_heads, module.num_v_heads // module.num_k_heads
    yield from (layer(x)[:, 0].unflatten(1, (heads, -1)) for layer in (module.q_proj, module.k_proj))
    yield from (layer(x)[:, 0].unflatten(1, (heads, shared, -1)) for layer in (module.v_proj, module.g_proj))
    yield from (layer(x)[:, 0].unflatten(1, (heads, shared)) for layer in (module.b_proj, module.a_proj))


FORMS: dict[tuple[str, ...], Callable] = {
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "norm", "out_proj"): _project_three_parts,
    ("in_proj_qkvz", "in_proj_ba", "norm", "out_proj"): _project_by_key_heads,
    ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_norm", "o_proj"): _project_apart,
}  # names of the layers and the function that uses them


@torch.no_grad()
def _agrees(module: Any, forward: Callable[..., Tensor], cache: Any) -> bool:
    """Return whether `forward` gives the module's output and states after one token, for random states."""
    generator = torch.Generator("cpu").manual_seed(0)
    memory = LayerMemory(cache.layers[module.layer_idx])
    weight = module.conv1d.weight

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(weight.device)

    states = {name: random(*x.shape).to(x.dtype) for name, x in memory.make(TRIAL_ROWS, 1).items()}
    x, results = random(TRIAL_ROWS, 1, module.hidden_size).to(weight.dtype), []
    try:
        for function in (module.forward, forward):
            memory.rows = {name: state.clone() for name, state in states.items()}
            own = copy.copy(cache)
            own.layers = [*cache.layers]
            own.layers[module.layer_idx] = memory.make_layer(TRIAL_ROWS, None)
            results.append([function(x, cache_params=own), *memory.rows.values()])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a module with other arguments or states, or a GPU that cannot run the kernel
        return False
    bound = TOLERANCE if weight.dtype in EXACT_DTYPES else ROUGH_TOLERANCE
    return all(
        want.dtype == got.dtype and bool((got - want).float().norm() <= bound * want.float().norm())
        for want, got in zip(*results, strict=True)
    )
