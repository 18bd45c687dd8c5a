"""The computation of one decode step of a model as a few large products, from the model's live weights.

The model's family (model/families.py) says what differs from Llama. The projections q, k and v are joined into one
product, gate and up into another, each followed by the rows of LoRA's A. Frozen weights are not copied: the model's own
weights become views of the joined ones. Only LoRA's small factors are copied, by `refresh`, so a change of the adapter
(an optimizer step, the reference) needs no new captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from grpo_core.counts import quantify
from grpo_core.model.families import FAMILIES, Family, head_dim
from grpo_core.model.rotation import find_rotations
from grpo_core.model.routing import Routers
from grpo_core.sampling.computation import CallSize, Unsupported
from grpo_core.sampling.decode_ops import (
    DONE,
    TOKEN,
    Activation,
    AttentionShape,
    LayerAttention,
    Rotation,
    TorchOps,
    normalize_and_rotate,
    softmax_with_sinks,
)
from grpo_core.sampling.expert_table import ExpertTable
from grpo_core.sampling.fused_mlp import ExpertMlp, GatedMlp, check_experts, has_experts
from grpo_core.sampling.joined_linear import JoinedLinear, check_linear

# without cuDNN, which takes up to a second for every new shape
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
MAX_PREFILL_BYTES = 111e6  # on a GPU: activations of the widest layer for the prompts that are prefilled together
MAX_SCORES = 1 << 26  # of attention that exist at once, where they are computed by themselves
MAX_PREFILL_CPU_TOKENS = 2048  # on the CPU: tokens that are prefilled together; more are no faster


class FusedLayer:
    """One transformer layer as a few products and its norms."""

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        rotation: int | None,
        window: int | None,
        ops: TorchOps,
        config: Any,
        dtype: torch.dtype,
    ) -> None:
        attention, activation = layer.self_attn, _activation(config, family)
        self._norms = [None if name is None else getattr(layer, name) for name in family.norms]
        self._head_norms = (attention.q_norm, attention.k_norm) if family.query_norm else None
        self._rotation, self._window = rotation, window
        self._attention = attention if family.has_sinks else None
        self.qkv = JoinedLinear([getattr(attention, name) for name in family.qkv], ops, dtype)
        self.o = JoinedLinear([attention.o_proj], ops, dtype)
        self.mlp: GatedMlp | ExpertMlp
        if family.experts is not None and has_experts(layer.mlp, family):
            self.mlp = ExpertMlp(layer.mlp, family.experts, activation, ops, config)
        else:
            self.mlp = GatedMlp(layer.mlp, family, activation, ops, dtype)
        self.products = (self.qkv, self.o, *self.mlp.products)

    @property
    def norms(self) -> list[Tensor | None]:
        """The weights of the norms before and after attention, and before and after the MLP; None for no norm."""
        return [None if norm is None else norm.weight for norm in self._norms]

    @property
    def attention(self) -> LayerAttention:
        """The settings and weights of the layer's attention."""
        weights = (None, None) if self._head_norms is None else [norm.weight for norm in self._head_norms]
        sinks = None if self._attention is None else self._attention.sinks
        return LayerAttention(*weights, self._rotation, self._window, sinks)


Attend = Callable[[int, Any, LayerAttention], Tensor]  # (index of the layer, qkv, own) -> attention [R, heads dim]


class FusedModel:
    """A model as products. Building it moves the model's frozen weights in memory without changing their values.

    Raises:
        Unsupported: the model's type, activation, adapter or layers are not supported; see `check_model`.
    """

    has_states = False

    def __init__(self, model: Any, ops: TorchOps, routers: Routers | None = None) -> None:
        check_model(model)
        config, body = model.config, model.model
        family = FAMILIES[config.model_type]
        dim = head_dim(config)
        if dim % ops.head_multiple:
            raise Unsupported(f"its heads have {dim} dimensions, which is not a multiple of {ops.head_multiple}")
        self.model, self.ops, self.rotary, self.rotations = model, ops, body.rotary_emb, find_rotations(config)
        self.embedding, self.final_norm, self.head = body.embed_tokens, body.norm, model.lm_head
        self.dtype, self.device = self.embedding.weight.dtype, self.embedding.weight.device
        self.scales = family.find_scales(config, self.dtype)
        self._kinds = sorted(set(config.layer_types)) if family.rotation_per_type else [None]
        self._tables: list[Rotation] = []
        [rotated] = {cos.shape[1] * 2 for cos, _ in self._make_tables(1)}
        self.shape = AttentionShape(
            len(body.layers), config.num_attention_heads, config.num_key_value_heads, dim, config.rms_norm_eps,
            body.layers[0].self_attn.scaling, rotated, family.norm_offset, self.scales.score_cap,
        )  # fmt: skip
        self._add_norm = partial(
            ops.add_norm, eps=self.shape.eps, offset=family.norm_offset, delta_scale=self.scales.residual
        )
        self.layers = []
        for i, layer in enumerate(body.layers):
            rotation, window = self._kind_of(i, family), layer_window(config, family, i)
            self.layers.append(FusedLayer(layer, family, rotation, window, ops, config, self.dtype))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the weights' old memory is too fragmented for the next layer
        self.cache = ops.make_cache(self.shape, self.dtype, self.device)
        self._experts = None if routers is None else ExpertTable(routers, self.device)
        if routers is not None and len(routers) != sum(isinstance(layer.mlp, ExpertMlp) for layer in self.layers):
            raise Unsupported("its routers are not those of its mixtures of experts")

    def _kind_of(self, layer: int, family: Family) -> int | None:
        """Return the index of a layer's rotation; None for a layer without."""
        config = self.model.config
        if family.rotated_layers and not getattr(config, family.rotated_layers)[layer]:
            return None
        return self._kinds.index(config.layer_types[layer]) if family.rotation_per_type else 0

    def check(self, positions: int) -> None:
        """Raise Unsupported unless the model, with its adapter as it is now, supports rows of `positions` tokens."""
        check_model(self.model)
        if self.rotations.key(positions - 1) != self.rotations.key(1):  # the last token is not an input
            limit = min(rule.limit for rule in self.rotations.rules)
            raise Unsupported(
                f"prompts and completions could become longer than {quantify(limit, 'token')}, above which its rotary "
                f"embedding changes"
            )

    def refresh(self, positions: int) -> bool:
        """Copy the adapter as it is now, and let the table of rotations cover `positions` positions.

        Return whether the table was moved.
        """
        for layer in self.layers:
            for product in layer.products:
                product.refresh()
        return self._extend_rotations(positions)

    def addresses(self) -> tuple:
        """Return the addresses of the model's own weights, which captured graphs read, and whether each is trained."""
        weights = [(name, p) for name, p in self.model.named_parameters() if "lora_" not in name]
        return tuple((name, weight.data_ptr(), weight.requires_grad) for name, weight in weights)

    def _extend_rotations(self, positions: int) -> bool:
        """Let the tables of rotations cover `positions` positions. Return whether they grew, which is by doubling."""
        if self._tables and len(self._tables[0][0]) >= positions:
            return False
        self._tables = self._make_tables(1 << max(9, (positions - 1).bit_length()))
        return True

    def _make_tables(self, count: int) -> list[Rotation]:
        """Return the table of each kind of rotation for `count` positions.

        Above the position at which a rotation changes, a table repeats its last row, which no row of a call reads.
        """
        last = min([count, *(rule.limit for rule in self.rotations.rules)]) - 1
        places, tables = torch.arange(count, device=self.device).clamp(max=last)[None], []
        for kind in self._kinds:
            cos, sin = self.rotary(self.embedding.weight[:1], places, *(() if kind is None else (kind,)))
            half = cos.shape[2] // (2 if FAMILIES[self.model.config.model_type].rotation_is_doubled else 1)
            tables.append(tuple(x[0, :, :half].contiguous() for x in (cos, sin)))
        return tables

    def hidden(self, x: Tensor, attend: Attend, done: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the final hidden states of the embedded tokens x [R, H], and the experts [R, k] of layers with any.

        x is overwritten. The states of rows with a 1 in `done` are not those of the model.
        """
        add_norm, delta, after, chosen = self._add_norm, None, None, []
        for i, layer in enumerate(self.layers):
            before_attention, after_attention, before_mlp, after_mlp = layer.norms
            qkv = layer.qkv.product(add_norm(x, delta, before_attention, delta_weight=after))
            delta = layer.o.product(attend(i, qkv, layer.attention))
            delta, experts = layer.mlp(add_norm(x, delta, before_mlp, delta_weight=after_attention), done)
            after = after_mlp
            if experts is not None:
                chosen.append(experts)
        return add_norm(x, delta, self.final_norm.weight, delta_weight=after), chosen

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of `tokens`, [..., H]."""
        x = F.embedding(tokens, self.embedding.weight)
        return x if self.scales.embedding == 1.0 else x.mul_(self.scales.embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, V] of final hidden states [R, H]."""
        logits, scales = self.ops.linear(hidden, self.head.weight, self.head.bias), self.scales
        if scales.logit_divisor != 1.0:
            logits.div_(scales.logit_divisor)
        if scales.logit_cap is not None:
            logits.div_(scales.logit_cap).tanh_().mul_(scales.logit_cap)
        return logits

    def allocate(self, size: CallSize) -> bool:
        """Allocate the cache, which captured graphs find wherever it is, and the tables of experts."""
        self.cache.allocate(size.prompts, size.width, size.slots, size.length)
        return self._experts is not None and self._experts.allocate(size)

    def recorded_experts(self) -> dict[str, Tensor]:
        """Return the experts of the call's tokens as `Draws` has them, if they are recorded."""
        return {} if self._experts is None else self._experts.recorded()

    def free(self) -> bool:
        """Free the cache, and the hidden states of the prompts."""
        self._prompt_hidden = None
        self.cache.free()
        return False

    def release(self) -> None:
        """Free the experts that are recorded. The weights belong to the model."""
        if self._experts is not None:
            self._experts.release()

    def first_logits(self, prompts: Tensor) -> Tensor:
        """Return the logits [R, V] after the prompts with these numbers [R]."""
        return self.logits(self._prompt_hidden[prompts])

    def add_rows(self, state: Tensor) -> None:
        """Start the rows of these columns of the state."""
        self.cache.add_rows(state)

    def keep_rows(self, state: Tensor) -> None:
        """Drop all rows but these columns of the state."""
        self.cache.keep_rows(state)

    def park(self, slots: Tensor) -> None:
        """Do nothing: the rows have no recurrent states."""

    def unpark(self, slots: Tensor, parked: None, index: Tensor) -> None:
        """Do nothing: the rows have no recurrent states."""

    def step(self, state: Tensor) -> Tensor:
        """Return the logits [R, V] after the newest token of each column of the state."""
        self.cache.begin_step(state, self._tables)
        hidden, experts = self.hidden(self.embed(state[TOKEN]), self.cache.attend, state[DONE])
        if self._experts is not None:
            self._experts.store(state, torch.stack(experts, dim=1).to(self._experts.routers.dtype))
        return self.logits(hidden)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute the prompts: their keys and values, and the hidden states [N, H] after each prompt's last token."""
        width = max(len(prompt) for prompt in prompts)
        max_tokens = MAX_PREFILL_CPU_TOKENS
        if self.device.type == "cuda":
            widest = max(layer.mlp.width for layer in self.layers)
            max_tokens = int(MAX_PREFILL_BYTES // (1.5 * widest * self.dtype.itemsize))
        prompts_at_once, outputs = max(1, max_tokens // width), []
        for first in range(0, len(prompts), prompts_at_once):
            part = prompts[first : first + prompts_at_once]
            ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in part], device=self.device)
            lengths = torch.tensor([len(prompt) for prompt in part], device=self.device)
            place = torch.arange(width, device=self.device)
            is_padding = (place >= lengths[:, None]).long().flatten()
            attend = self._prefill_attention(first, *ids.shape)
            hidden, experts = self.hidden(self.embed(ids).flatten(0, 1), attend, is_padding)
            starts = torch.arange(len(part), device=self.device) * width
            outputs.append(hidden[starts + lengths - 1])
            if self._experts is not None:  # the table is padded on the left
                source = starts[:, None] + (place - width + lengths[:, None]).clamp(min=0)
                recorded = torch.stack(experts, dim=1)[source.flatten()].to(self._experts.routers.dtype)
                self._experts.store_prompts(range(first, first + len(part)), recorded)
        self._prompt_hidden = torch.cat(outputs)

    def _prefill_attention(self, first: int, count: int, width: int) -> Attend:
        """Return causal attention within `count` prompts from `first` on, padded on the right to `width`.

        What is computed after a prompt's end is never read.
        """
        heads, dim = self.shape.heads, self.shape.head_dim
        rotations = [(cos[:width, None], sin[:width, None]) for cos, sin in self._tables]

        def attend(i: int, product: Any, own: LayerAttention) -> Tensor:
            qkv = self.ops.finish(product)
            rotation = None if own.rotation is None else rotations[own.rotation]
            parts = normalize_and_rotate(qkv.reshape(count, width, -1, dim), self.shape, own, rotation)
            q, k, v = (x.transpose(1, 2) for x in parts)
            self.cache.store_prompts(i, first, k, v)
            return attend_to_prompts(q, k, v, self.shape, own).transpose(1, 2).reshape(count * width, heads * dim)

        return attend


def attend_to_prompts(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, own: LayerAttention) -> Tensor:
    """Return causal attention [n, heads, w, dim] of q [n, heads, w, dim] to k and v [n, kv_heads, w, dim]."""
    width, has_scores = q.shape[2], shape.score_cap is not None or own.sinks is not None
    if not has_scores and (own.window is None or width <= own.window):
        with sdpa_kernel(BACKENDS):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=shape.scale, enable_gqa=True)
    k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for x in (k, v))
    if not has_scores:
        with sdpa_kernel(BACKENDS):
            mask = _visible(0, 0, width, own.window, q.device)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=shape.scale)
    out, sinks = torch.empty_like(q), None if own.sinks is None else own.sinks[:, None]
    prompts = max(1, MAX_SCORES // (shape.heads * width * width))
    queries = width if prompts > 1 else max(1, min(width, MAX_SCORES // (shape.heads * width)))
    for i in range(0, len(q), prompts):
        for begin in range(0, width, queries):
            end = min(width, begin + queries)
            first = 0 if own.window is None else max(0, begin + 1 - own.window)
            part, seen = slice(i, i + prompts), slice(first, end)
            scores = q[part, :, begin:end] @ k[part, :, seen].transpose(2, 3) * shape.scale
            if shape.score_cap is not None:
                scores = torch.tanh(scores / shape.score_cap) * shape.score_cap
            scores = scores.float().masked_fill_(~_visible(begin, first, end, own.window, q.device), -torch.inf)
            out[part, :, begin:end] = softmax_with_sinks(scores, sinks).to(v.dtype) @ v[part, :, seen]
    return out


def _visible(begin: int, first: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """Return which of the tokens from `first` to `end` each token from `begin` to `end` sees."""
    at, key = torch.arange(begin, end, device=device)[:, None], torch.arange(first, end, device=device)
    return (key <= at) & (key > at - (window or end + 1))


def check_model(model: Any) -> None:
    """Raise Unsupported unless the model has a fused decoder's family, activation and rotation, and only plain layers.

    A plain layer is a torch linear layer, with one unmerged LoRA adapter or none.
    """
    config = model.config
    if not type(model).__module__.startswith("transformers.models."):
        raise Unsupported(f"{type(model).__name__} is not a class of transformers")
    supported = [name for name, family in FAMILIES.items() if family.has_fused_decoder]
    if config.model_type not in supported:
        raise Unsupported(f"its model type is {config.model_type}; the fused decoder supports {', '.join(supported)}")
    family = FAMILIES[config.model_type]
    _activation(config, family)
    if any(rule.each_length for rule in find_rotations(config).rules):
        raise Unsupported("its rotary embedding (dynamic) depends on the length of the sequence")
    has_cap = family.find_scales(config, torch.float32).score_cap is not None
    if has_cap and config._attn_implementation == "sdpa":  # which leaves out the bound
        raise Unsupported("it bounds the scores of attention, which sdpa does not support")
    if any("_active_adapter" in vars(module) and not hasattr(module, "lora_A") for module in model.modules()):
        raise Unsupported("its adapter trains whole modules or embeddings")
    for module in (model.lm_head, model.model.embed_tokens):
        if hasattr(module, "lora_A"):
            raise Unsupported("its embeddings or its head have an adapter")
        is_embedding = isinstance(module, nn.Embedding) and type(module).__name__ == family.embedding_class
        if type(module) is not nn.Linear and not is_embedding:
            raise Unsupported(f"its {type(module).__name__} is not a plain linear or embedding layer")
    for layer in model.model.layers:
        if family.experts is not None and has_experts(layer.mlp, family):
            norms = [getattr(layer, name) for name in family.norms if name is not None]
            check_experts(layer.mlp, family.experts, norms, model.model.embed_tokens.weight.dtype)
    parts = [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    linears = [module for part in parts for name, module in part.named_children() if name.endswith("_proj")]
    bases = [getattr(linear, "base_layer", linear) for linear in linears]
    for linear, base in zip(linears, bases, strict=True):
        check_linear(linear, base)
    if linears != bases and any(p.requires_grad for base in bases for p in base.parameters()):
        raise Unsupported("it trains base weights together with an adapter")


def layer_window(config: Any, family: Family, layer: int) -> int | None:
    """Return the number of tokens that a layer sees; None if it sees all."""
    if not family.passes_window:
        return None
    kinds = getattr(config, "layer_types", None)
    is_sliding = kinds[layer] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if is_sliding else None


def _activation(config: Any, family: Family) -> Activation:
    name = getattr(config, family.activation)
    if name not in ACTIVATIONS:
        raise Unsupported(f"its activation is {name}; the fused decoder supports {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
