"""The computation of one token step by the model's own modules, with a cache of static shape, for every architecture.

Each row's keys, values and recurrent states lie in its own slot of static memory, so rows of any length share a step,
and rows enter and leave between steps. Prompts are computed by the model with its own cache (live_rows.py), and their
cache is copied to the rows (layer_memory.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grpo_core.model.packed_attention  # noqa: F401  registers the attention function that takes `attend_rows`
from grpo_core.counts import quantify
from grpo_core.model.rotation import find_rotations
from grpo_core.model.routing import RoutedForward, Routers, watching
from grpo_core.sampling.cache_check import CACHE_ERRORS, check_steps
from grpo_core.sampling.computation import CallSize, Unsupported
from grpo_core.sampling.decode_ops import DRAWN, PROMPT, SLOT, START, TOKEN, TorchOps
from grpo_core.sampling.expert_table import ExpertTable
from grpo_core.sampling.graph_capture import capture_graph
from grpo_core.sampling.live_rows import Method, begin, next_logits
from grpo_core.sampling.modules.delta_net import find_delta_nets
from grpo_core.sampling.modules.elementwise import find_elementwise
from grpo_core.sampling.modules.layer_memory import LayerMemory, Name, grows
from grpo_core.sampling.modules.row_attention import RowAttention, make_bias
from grpo_core.sampling.modules.step_functions import (
    Substitute,
    find_expert_substitutes,
    find_joined_calls,
    find_substitutes,
    installed,
)

MAX_PREFILL_TOKENS = 8192  # of the prompts that are computed together
MAX_HELD_SHARE = 0.05  # of the GPU's memory that may be held between calls, so that captured graphs stay valid


class Variant(NamedTuple):
    """A way to compute a step: the substitutes for the model's own functions, and the settings of its modules."""

    substitutes: list[Substitute]
    passes_rows: bool  # whether attention is computed by `_attend`; otherwise by the model, with a mask
    experts: str | None  # transformers' implementation of experts; None for that of the configuration


class ModuleModel:
    """A model as its own modules. `method` is how the model's own cache can be used (cache_check.py).

    The experts that `routers` choose are recorded.

    Raises:
        Unsupported: a trial shows that the model cannot be computed so.
    """

    def __init__(self, model: Any, method: Method, pad_id: int, ops: TorchOps, routers: Routers | None = None) -> None:
        if method == "uncached":
            raise Unsupported("its cache cannot be used")
        self.model, self.method, self.pad_id, self._ops = model, method, pad_id, ops
        self.device, self._columns, self._tokens = model.device, 0, 0
        self._experts = None if routers is None else ExpertTable(routers, model.device)
        self._check_rotations()
        live = begin(method, model, [[self.pad_id, self.pad_id]], pad_id)
        with torch.no_grad():
            self._joined = find_joined_calls(model, live.prefill, ops)
        self._template = live.cache
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(live.cache.layers)
        self._layers = [LayerMemory(layer, kind) for layer, kind in zip(live.cache.layers, kinds, strict=False)]
        self.has_states = any(not grows(name) for layer in self._layers for name in layer.samples)
        configs = [model.config, model.config.get_text_config(), *(getattr(m, "config", None) for m in model.modules())]
        self._configs = [*{id(config): config for config in configs if config is not None}.values()]
        self._switches: list[tuple] = []
        self._caches: dict[int, Any] = {}
        self._first_logits = torch.zeros(0)
        kernels = load_kernels(self.device)
        self._attention = RowAttention(kernels and kernels.attention)
        if not any(self._is_right(variant) for variant in self._list_variants(kernels)):
            raise Unsupported("its own forward does not take a cache of static shape, or cannot be captured as a graph")

    def _list_variants(self, kernels: Kernels | None) -> Iterator[Variant]:
        """Yield the ways to compute a step, the fastest first."""
        faster = [substitute for group in self._joined for substitute in group.substitutes()]
        if kernels is not None:
            faster += find_substitutes(self.model, kernels.state)
            faster += find_elementwise(self.model, kernels.elementwise)
            faster += find_delta_nets(self.model, self._template, kernels.delta_net, kernels.state)
            faster += find_expert_substitutes(self.model, self._ops)
        experts = [None]
        if self.device.type == "cuda" and hasattr(self.model.config, "_experts_implementation"):
            experts.append("batched_mm")  # which waits for nothing, whatever the sizes are
        for substitutes in (faster, []) if faster else ([],):
            for passes_rows in (True, False):
                yield from (Variant(substitutes, passes_rows, name) for name in experts)

    def _is_right(self, variant: Variant) -> bool:
        """Return whether a variant, which is used from now on, computes what the model computes."""
        self._variant = variant
        replaced = {id(owner) for owner, name, _ in variant.substitutes if name == "forward"}
        self._tuned = [m for m in self.model.modules() if hasattr(m, "_disable_adapters") and id(m) not in replaced]
        try:
            self.refresh(0)
            # the first step is captured, too, because a model that waits for the GPU fails there
            return check_steps(self, self.model, capture_graph if self.device.type == "cuda" else None)
        except (Unsupported, *CACHE_ERRORS) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        finally:
            self.release()

    def check(self, positions: int) -> None:
        """Raise Unsupported if rows of `positions` tokens are longer than a window that the model itself applies."""
        windows = [layer.window for layer in self._layers if layer.window is not None]
        if windows and positions > min(windows) and not self._variant.passes_rows:
            raise Unsupported(
                f"prompts and completions could become longer than its window of {quantify(min(windows), 'token')}"
            )

    def addresses(self) -> tuple:
        """Return the addresses of the model's weights, which captured graphs read."""
        return tuple((name, weight.data_ptr(), weight.dtype) for name, weight in self.model.named_parameters())

    def refresh(self, positions: int) -> bool:
        """Copy the adapter of joined layers as it is now; all other modules read their weights as they are.

        Return whether an adapter was switched on or off in a module that reads its own: a graph holds what it did.
        """
        for group in self._joined:
            group.joined.refresh()
        before, self._switches = self._switches, [_switch(module) for module in self._tuned]
        return before != self._switches

    def allocate(self, size: CallSize) -> bool:
        """Allocate memory for the prompts, and for the rows unless there is enough from an earlier call."""
        for layer in self._layers:
            layer.prompts = layer.make(size.prompts, size.width)
        is_moved = self._experts is not None and self._experts.allocate(size)
        if size.columns <= self._columns and size.width + size.length <= self._tokens:
            return is_moved
        self._release_rows()
        self._columns, self._tokens = size.columns, size.width + size.length
        for layer in self._layers:
            layer.rows = layer.make(self._columns, self._tokens)
        self._layer_of = {
            rows.data_ptr(): layer for layer in self._layers for name, rows in layer.rows.items() if name[0] == "keys"
        }
        return True

    def recorded_experts(self) -> dict[str, Tensor]:
        """Return the experts of the call's tokens as `Draws` has them, if they are recorded."""
        return {} if self._experts is None else self._experts.recorded()

    def free(self) -> bool:
        """Free the memory of the prompts, and that of the rows unless it is small."""
        for layer in self._layers:
            layer.prompts = {}
        self._first_logits = torch.zeros(0)
        held = self._columns * sum(layer.bytes_per_row(self._tokens) for layer in self._layers)
        if self.device.type == "cuda" and held <= MAX_HELD_SHARE * torch.cuda.mem_get_info(self.device)[1]:
            return False
        self.release()
        return True

    def release(self) -> None:
        """Free the memory of the rows, and of the experts that are recorded."""
        self._release_rows()
        if self._experts is not None:
            self._experts.release()

    def _release_rows(self) -> None:
        self._caches, self._layer_of = {}, {}
        self._columns = self._tokens = 0
        for layer in self._layers:
            layer.rows = {}

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute the prompts with the model's own cache, and store their caches and the logits [N, V] after them."""
        logits: list[Tensor | None] = [None] * len(prompts)
        for part in self._parts(prompts):
            live = begin(self.method, self.model, [prompts[i] for i in part], self.pad_id)
            with self._installed(), self._recording() as routed:
                out = live.prefill()
            if self._experts is not None and routed is not None:
                self._experts.store_prompts(part, routed.own_experts())
            indices, lengths = torch.tensor(part, device=self.device), [len(prompts[i]) for i in part]
            for layer, computed in zip(self._layers, live.cache.layers, strict=True):
                layer.store_prompts(computed, indices, lengths)
            for i, row in zip(part, out, strict=True):
                logits[i] = row
        self._first_logits = torch.stack([row for row in logits if row is not None])

    def first_logits(self, prompts: Tensor) -> Tensor:
        """Return the logits [R, V] after the prompts with these numbers [R]."""
        return self._first_logits[prompts]

    def add_rows(self, state: Tensor) -> None:
        """Start the rows of these columns of the state."""
        for layer in self._layers:
            layer.add_rows(state[SLOT], state[PROMPT])

    def keep_rows(self, state: Tensor) -> None:
        """Drop all rows but these columns of the state, and set the slot of each to the number of its column."""
        for layer in self._layers:
            layer.keep_rows(state[SLOT])
        state[SLOT] = torch.arange(state.shape[1], device=state.device)

    def park(self, slots: Tensor) -> list[dict[Name, Tensor]]:
        """Return copies of the recurrent states of the rows in these slots."""
        return [layer.park(slots) for layer in self._layers]

    def unpark(self, slots: Tensor, parked: list[dict[Name, Tensor]], index: Tensor) -> None:
        """Put the copies at `index` of what `park` returned into these slots."""
        for layer, states in zip(self._layers, parked, strict=True):
            layer.unpark(slots, states, index)

    def step(self, state: Tensor) -> Tensor:
        """Return the logits [R, V] after the newest token of each column of the state."""
        size = state.shape[1]
        position = self._position = (state[START] + state[DRAWN] - 1).clamp(0, self._tokens - 1)
        if size not in self._caches:
            cache = copy.copy(self._template)
            cache.layers = [layer.make_layer(size, partial(self._update, layer)) for layer in self._layers]
            self._caches[size] = cache
        options: dict[str, Any] = {}
        if not self._layer_of:  # no layer has keys
            mask = None
        elif self._variant.passes_rows:
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
            options = {"attend_rows": self._attend}
        else:
            mask = make_bias(position, None, self._tokens, self.model.dtype)
        with self._installed(), self._implementations(), self._recording() as routed:
            logits = next_logits(
                self.model, state[TOKEN][:, None], self._caches[size], attention_mask=mask,
                position_ids=position[:, None], **options,
            )  # fmt: skip
        if self._experts is not None and routed is not None:
            self._experts.store(state, routed.own_experts())
        return logits

    @contextmanager
    def _recording(self) -> Iterator[RoutedForward | None]:
        """Watch the routers if their experts are recorded."""
        routed = None if self._experts is None else self._experts.routers.begin()
        with watching(routed):
            yield routed

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """Let the faster functions take their places."""
        with installed(self._variant.substitutes):
            yield
        for group in self._joined:
            group.forget()

    @contextmanager
    def _implementations(self) -> Iterator[None]:
        """Let the modules use the attention function that takes `attend_rows`, and the variant's experts."""
        values = {
            "_attn_implementation": "sdpa" if self._variant.passes_rows else None,
            "_experts_implementation": self._variant.experts,
        }
        before = [
            (config, name, getattr(config, name))
            for config in self._configs
            for name, value in values.items()
            if value is not None and hasattr(config, name)
        ]
        for config, name, _ in before:
            setattr(config, name, values[name])
        try:
            yield
        finally:
            for config, name, value in before:
                setattr(config, name, value)

    def _check_rotations(self) -> None:
        if find_rotations(self.model.config):
            raise Unsupported("its rotary embedding depends on the length of the sequence")

    def _parts(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield the numbers of prompts that are computed together."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        part: list[int] = []
        for i in order:
            length = len(prompts[i])
            is_other = part and self.method != "padded" and len(prompts[part[-1]]) != length
            if part and (is_other or (len(part) + 1) * length > MAX_PREFILL_TOKENS):
                yield part
                part = []
            part.append(i)
        yield part

    def _update(self, layer: LayerMemory, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values [R, kv_heads, 1, D] of the newest tokens; return those of all tokens."""
        memory = [layer.rows[name, None][: len(keys)] for name in ("keys", "values")]
        self._attention.store(keys, values, *memory, self._position)
        return memory[0], memory[1]

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float | None,
        *,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """Return the attention [R, 1, heads, D] of queries [R, heads, 1, D] to keys [R, kv_heads, T, D]."""
        if any(value is not None for value in others.values()):
            raise Unsupported(f"its attention has the options {', '.join(others)}")
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        layer = self._layer_of[keys.data_ptr()]
        return self._attention.attend(query, keys, values, self._position, layer, scale, softcap=softcap, sinks=s_aux)


def _switch(module: Any) -> tuple:
    """Return which adapters a module of PEFT applies."""
    return (
        module._disable_adapters,
        str(getattr(module, "active_adapters", None)),
        bool(getattr(module, "merged", False)),
    )


class Kernels(NamedTuple):
    """The files of kernels."""

    state: Any
    delta_net: Any
    attention: Any
    elementwise: Any


def load_kernels(device: torch.device) -> Kernels | None:
    """Return the files of kernels; None where they cannot run.

    Raises:
        Unsupported: triton cannot be imported.
    """
    if device.type != "cuda":
        return None
    try:
        from grpo_core.sampling.kernels import (
            delta_net_kernels,
            elementwise_kernels,
            row_attention_kernels,
            state_kernels,
        )
    except ImportError as error:
        raise Unsupported(f"triton cannot be imported: {error}") from error
    return Kernels(state_kernels, delta_net_kernels, row_attention_kernels, elementwise_kernels)
