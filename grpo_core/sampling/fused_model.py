"""The computation of one decode step of a dense model as a few large products, from the model's live weights.

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
from grpo_core.sampling.computation import CallSize, Unsupported
from grpo_core.sampling.decode_ops import (
    TOKEN,
    Activation,
    AttentionShape,
    LayerAttention,
    Rotation,
    TorchOps,
    normalize_and_rotate,
)

# without cuDNN, which takes up to a second for every new shape
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
MAX_PREFILL_BYTES = 111e6  # on a GPU: activations of the widest layer for the prompts that are prefilled together
MAX_PREFILL_CPU_TOKENS = 2048  # on the CPU: tokens that are prefilled together; more are no faster


class JoinedLinear:
    """The linear layers that share an input, as one product: y = x Wᵀ + b, plus s (x Aᵀ) Bᵀ of each with LoRA.

    If the layers themselves are trained, nothing is joined, and each is computed from its own weight.
    """

    def __init__(self, linears: Sequence[nn.Module], ops: TorchOps) -> None:
        self.linear = ops.linear
        self.linears = list(linears)
        self.bases: list[nn.Linear] = [getattr(linear, "base_layer", linear) for linear in linears]
        self.sizes = [base.out_features for base in self.bases]
        self.width = sum(self.sizes)
        self.is_trained = any(p.requires_grad for base in self.bases for p in base.parameters())
        if self.is_trained:
            return
        first = self.bases[0].weight
        self.ranks = [len(a) if (a := _lora_factors(linear)[0]) is not None else 0 for linear in self.linears]
        rows, self.rank = [*self.sizes, sum(self.ranks)], sum(self.ranks)
        self.weight = first.new_zeros(sum(rows), first.shape[1])
        *base_weights, self.a = self.weight.split(rows)
        self.b = first.new_zeros(self.width, self.rank)
        for base, part in zip(self.bases, base_weights, strict=True):
            part.copy_(base.weight.data)
            base.weight.data = part
        self.bias = None
        if any(base.bias is not None for base in self.bases):
            self.bias = first.new_zeros(sum(rows))
            for base, part in zip(self.bases, self.bias.split(rows), strict=False):
                if base.bias is not None:
                    part.copy_(base.bias.data)
                    base.bias.data = part

    def refresh(self) -> None:
        """Copy LoRA's factors as they are now, with their scale; zeros while the adapter is off."""
        if self.is_trained or not self.rank:
            return
        row = column = 0
        for linear, size, rank in zip(self.linears, self.sizes, self.ranks, strict=True):
            if rank:
                a, b, scale = _lora_factors(linear)
                if len(a) != rank:
                    raise Unsupported("the rank of its active adapter has changed")
                self.a[column : column + rank] = a
                self.b[row : row + size, column : column + rank] = b * scale
            row, column = row + size, column + rank

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_trained:
            return torch.cat([F.linear(x, base.weight, base.bias) for base in self.bases], dim=1)
        y = self.linear(x, self.weight, self.bias)
        return y[:, : self.width].addmm_(y[:, self.width :], self.b.t()) if self.rank else y


class FusedLayer:
    """One transformer layer as four products and its norms."""

    def __init__(
        self, layer: nn.Module, family: Family, rotation: int | None, window: int | None, ops: TorchOps
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._norms = [None if name is None else getattr(layer, name) for name in family.norms]
        self._head_norms = (attention.q_norm, attention.k_norm) if family.query_norm else None
        self._rotation, self._window = rotation, window
        self.qkv = JoinedLinear([getattr(attention, name) for name in family.qkv], ops)
        self.o = JoinedLinear([attention.o_proj], ops)
        self.gate_up = JoinedLinear([getattr(mlp, name) for name in family.gate_up], ops)
        self.down = JoinedLinear([mlp.down_proj], ops)
        self.products = (self.qkv, self.o, self.gate_up, self.down)

    @property
    def norms(self) -> list[Tensor | None]:
        """The weights of the norms before and after attention, and before and after the MLP; None for no norm."""
        return [None if norm is None else norm.weight for norm in self._norms]

    @property
    def attention(self) -> LayerAttention:
        """The settings and weights of the layer's attention."""
        weights = (None, None) if self._head_norms is None else [norm.weight for norm in self._head_norms]
        return LayerAttention(*weights, self._rotation, self._window)


Attend = Callable[[int, Tensor, LayerAttention], Tensor]  # (index of the layer, qkv, own) -> attention [R, heads dim]


class FusedModel:
    """A model as products. Building it moves the model's frozen weights in memory without changing their values.

    Raises:
        Unsupported: the model's type, activation, adapter or layers are not supported; see `check_model`.
    """

    has_states = False

    def __init__(self, model: Any, ops: TorchOps) -> None:
        check_model(model)
        config, body = model.config, model.model
        family = FAMILIES[config.model_type]
        dim = head_dim(config)
        if dim % ops.head_multiple:
            raise Unsupported(f"its heads have {dim} dimensions, which is not a multiple of {ops.head_multiple}")
        self.model, self.ops, self.rotary, self.rotations = model, ops, body.rotary_emb, find_rotations(config)
        self.embedding, self.final_norm, self.head = body.embed_tokens, body.norm, model.lm_head
        self.dtype, self.device = self.embedding.weight.dtype, self.embedding.weight.device
        self.scales, self.activation = family.find_scales(config, self.dtype), _activation(config, family)
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
            self.layers.append(FusedLayer(layer, family, rotation, window, ops))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the weights' old memory is too fragmented for the next layer
        self.cache = ops.make_cache(self.shape, self.dtype, self.device)

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
            tables.append(tuple(x[0, :, : x.shape[2] // 2].contiguous() for x in (cos, sin)))
        return tables

    def hidden(self, x: Tensor, attend: Attend) -> Tensor:
        """Return the final hidden states of the embedded tokens x [R, H], which are overwritten."""
        add_norm, delta, after = self._add_norm, None, None
        for i, layer in enumerate(self.layers):
            before_attention, after_attention, before_mlp, after_mlp = layer.norms
            qkv = layer.qkv(add_norm(x, delta, before_attention, delta_weight=after))
            delta = layer.o(attend(i, qkv, layer.attention))
            inner = layer.gate_up(add_norm(x, delta, before_mlp, delta_weight=after_attention))
            delta, after = layer.down(self.ops.gate_mul(inner, self.activation)), after_mlp
        return add_norm(x, delta, self.final_norm.weight, delta_weight=after)

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
        """Allocate the cache, which captured graphs find wherever it is."""
        self.cache.allocate(size.prompts, size.width, size.slots, size.length)
        return False

    def recorded_experts(self) -> dict[str, Tensor]:
        """Return nothing: the families have no experts."""
        return {}

    def free(self) -> bool:
        """Free the cache, and the hidden states of the prompts."""
        self._prompt_hidden = None
        self.cache.free()
        return False

    def release(self) -> None:
        """Do nothing: the weights belong to the model."""

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
        return self.logits(self.hidden(self.embed(state[TOKEN]), self.cache.attend))

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute the prompts: their keys and values, and the hidden states [N, H] after each prompt's last token."""
        width = max(len(prompt) for prompt in prompts)
        max_tokens = MAX_PREFILL_CPU_TOKENS
        if self.device.type == "cuda":
            max_tokens = int(MAX_PREFILL_BYTES // (1.5 * self.layers[0].gate_up.width * self.dtype.itemsize))
        prompts_at_once, outputs = max(1, max_tokens // width), []
        for first in range(0, len(prompts), prompts_at_once):
            part = prompts[first : first + prompts_at_once]
            ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in part], device=self.device)
            hidden = self.hidden(self.embed(ids).flatten(0, 1), self._prefill_attention(first, *ids.shape))
            last = torch.tensor([i * width + len(prompt) - 1 for i, prompt in enumerate(part)], device=self.device)
            outputs.append(hidden[last])
        self._prompt_hidden = torch.cat(outputs)

    def _prefill_attention(self, first: int, count: int, width: int) -> Attend:
        """Return causal attention within `count` prompts from `first` on, padded on the right to `width`.

        What is computed after a prompt's end is never read.
        """
        heads, dim = self.shape.heads, self.shape.head_dim
        rotations = [(cos[:width, None], sin[:width, None]) for cos, sin in self._tables]

        def attend(i: int, qkv: Tensor, own: LayerAttention) -> Tensor:
            rotation = None if own.rotation is None else rotations[own.rotation]
            parts = normalize_and_rotate(qkv.reshape(count, width, -1, dim), self.shape, own, rotation)
            q, k, v = (x.transpose(1, 2) for x in parts)
            self.cache.store_prompts(i, first, k, v)
            return (
                attend_to_prompts(q, k, v, self.shape, own.window).transpose(1, 2).reshape(count * width, heads * dim)
            )

        return attend


def attend_to_prompts(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, window: int | None) -> Tensor:
    """Return causal attention [n, heads, w, dim] of q [n, heads, w, dim] to k and v [n, kv_heads, w, dim]."""
    width = q.shape[2]
    if shape.score_cap is None and (window is None or width <= window):
        with sdpa_kernel(BACKENDS):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=shape.scale, enable_gqa=True)
    mask = torch.ones(width, width, dtype=torch.bool, device=q.device).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for x in (k, v))
    if shape.score_cap is None:
        with sdpa_kernel(BACKENDS):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=shape.scale)
    out = torch.empty_like(q)
    for i in range(len(q)):  # one prompt at a time, because the scores are [heads, w, w]
        scores = torch.tanh(q[i] @ k[i].transpose(1, 2) * (shape.scale / shape.score_cap)) * shape.score_cap
        out[i] = scores.masked_fill(~mask, -torch.inf).float().softmax(dim=-1).to(v.dtype) @ v[i]
    return out


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


def check_linear(linear: nn.Module, base: nn.Module) -> None:
    """Raise Unsupported unless `linear` is `base`, a torch linear layer, or has one plain LoRA adapter on it."""
    if type(base) is not nn.Linear:
        raise Unsupported(f"its {type(base).__name__} is not a plain linear layer")
    if linear is base:
        return
    active = [name for name in linear.active_adapters if name in getattr(linear, "lora_A", {})]
    if not active and not linear.merged and linear.lora_A:  # the adapter of a teacher, which is not active
        return
    if len(active) != 1 or linear.merged:
        raise Unsupported("it does not have exactly one active, unmerged LoRA adapter")
    if getattr(linear, "lora_variant", {}).get(active[0]) or linear.lora_B[active[0]].bias is not None:
        raise Unsupported("its adapter is a variant of LoRA")


def _lora_factors(linear: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
    """Return LoRA's A, B and scale, where the scale of a disabled adapter is 0; (None, None, 0) without one."""
    if not hasattr(linear, "lora_A"):
        return None, None, 0.0
    name = next((name for name in linear.active_adapters if name in linear.lora_A), None)
    if name is None:
        return None, None, 0.0
    scale = 0.0 if linear.disable_adapters else linear.scaling[name]
    return linear.lora_A[name].weight.detach(), linear.lora_B[name].weight.detach(), scale
