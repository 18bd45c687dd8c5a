"""The computation of one decode step of a Llama-like model as a few large products, from the model's live weights.

The projections q, k and v are joined into one product, gate and up into another, each followed by the rows of LoRA's A.
Frozen weights are not copied: the model's own weights become views of the joined ones. Only LoRA's small factors are
copied, by `refresh`, so a change of the adapter (an optimizer step, the reference) needs no new captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from grpo_core.counts import quantify
from grpo_core.model.families import FAMILIES, head_dim
from grpo_core.sampling.computation import CallSize, Unsupported
from grpo_core.sampling.decode_ops import TOKEN, AttentionShape, TorchOps, normalize_and_rotate

# without cuDNN, which takes up to a second for every new shape
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
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

    def __init__(self, layer: nn.Module, normalizes_heads: bool, ops: TorchOps) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = (attention.q_norm, attention.k_norm) if normalizes_heads else (None, None)
        self.qkv = JoinedLinear([attention.q_proj, attention.k_proj, attention.v_proj], ops)
        self.o = JoinedLinear([attention.o_proj], ops)
        self.gate_up = JoinedLinear([mlp.gate_proj, mlp.up_proj], ops)
        self.down = JoinedLinear([mlp.down_proj], ops)
        self.products = (self.qkv, self.o, self.gate_up, self.down)

    @property
    def head_norms(self) -> tuple[Tensor | None, Tensor | None]:
        """The weights of the norms of queries and keys; None for a family without these norms."""
        return (None, None) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight)


Attend = Callable[[int, Tensor, FusedLayer], Tensor]  # (layer index, qkv, layer) -> attention [R, heads dim]


class FusedModel:
    """A model as products. Building it moves the model's frozen weights in memory without changing their values.

    Raises:
        Unsupported: the model's type, activation, adapter or layers are not supported; see `check_model`.
    """

    def __init__(self, model: Any, ops: TorchOps) -> None:
        check_model(model)
        config, body = model.config, model.model
        dim = head_dim(config)
        if dim % ops.head_multiple:
            raise Unsupported(f"its heads have {dim} dimensions, which is not a multiple of {ops.head_multiple}")
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.shape = AttentionShape(len(body.layers), heads, kv_heads, dim, config.rms_norm_eps)
        self.model, self.ops, self.rotary = model, ops, body.rotary_emb
        self.embedding, self.norm, self.head = body.embed_tokens, body.norm, model.lm_head
        self.dtype, self.device = self.embedding.weight.dtype, self.embedding.weight.device
        self.layers = []
        for layer in body.layers:
            self.layers.append(FusedLayer(layer, FAMILIES[config.model_type].normalizes_heads, ops))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the weights' old memory is too fragmented for the next layer
        self.cos = self.sin = self.embedding.weight.new_zeros(0, dim // 2)
        self.cache = ops.make_cache(self.shape, self.dtype, self.device)

    def check(self, positions: int) -> None:
        """Raise Unsupported unless the model, with its adapter as it is now, supports rows of `positions` tokens."""
        check_model(self.model)
        window = sliding_window(self.model.config)
        if window is not None and positions > window:
            raise Unsupported(
                f"prompts and completions could become longer than its sliding window of {quantify(window, 'token')}"
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
        """Let the table of rotations cover `positions` positions. Return whether it grew, which it does by doubling."""
        if len(self.cos) >= positions:
            return False
        count = 1 << max(9, (positions - 1).bit_length())
        cos, sin = self.rotary(self.embedding.weight[:1], torch.arange(count, device=self.device)[None])
        if cos.shape[2] != self.shape.head_dim:
            raise Unsupported("its rotary embedding rotates only a part of each head")
        self.cos, self.sin = (x[0, :, : x.shape[2] // 2].contiguous() for x in (cos, sin))
        return True

    def hidden(self, x: Tensor, attend: Attend) -> Tensor:
        """Return the final hidden states of the embedded tokens x [R, H], which are overwritten."""
        delta, norm = None, self.ops.add_norm
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(norm(x, delta, layer.input_norm.weight, self.shape.eps))
            inner = norm(x, layer.o(attend(i, qkv, layer)), layer.post_norm.weight, self.shape.eps)
            delta = layer.down(self.ops.silu_mul(layer.gate_up(inner)))
        return norm(x, delta, self.norm.weight, self.shape.eps)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of `tokens`, [..., H]."""
        return F.embedding(tokens, self.embedding.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, V] of final hidden states [R, H]."""
        return self.ops.linear(hidden, self.head.weight, self.head.bias)

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

    def step(self, state: Tensor) -> Tensor:
        """Return the logits [R, V] after the newest token of each column of the state."""
        self.cache.begin_step(state, self.cos, self.sin)
        attend = self.cache.attend
        return self.logits(
            self.hidden(self.embed(state[TOKEN]), lambda i, qkv, layer: attend(i, qkv, *layer.head_norms))
        )

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
        cos, sin = (x[:width, None] for x in (self.cos, self.sin))

        def attend(i: int, qkv: Tensor, layer: FusedLayer) -> Tensor:
            parts = normalize_and_rotate(qkv.reshape(count, width, -1, dim), self.shape, cos, sin, *layer.head_norms)
            q, k, v = (x.transpose(1, 2) for x in parts)
            self.cache.store_prompts(i, first, k, v)
            with sdpa_kernel(BACKENDS):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(count * width, heads * dim)

        return attend


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
    if config.hidden_act not in ("silu", "swish"):
        raise Unsupported(f"its activation is {config.hidden_act}; the fused decoder supports silu")
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise Unsupported(f"its rotary embedding ({rope_type}) depends on the length of the sequence")
    if any("_active_adapter" in vars(module) and not hasattr(module, "lora_A") for module in model.modules()):
        raise Unsupported("its adapter trains whole modules or embeddings")
    for module in (model.lm_head, model.model.embed_tokens):
        if hasattr(module, "lora_A"):
            raise Unsupported("its embeddings or its head have an adapter")
        if type(module) not in (nn.Linear, nn.Embedding):
            raise Unsupported(f"its {type(module).__name__} is not a plain linear or embedding layer")
    parts = [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    linears = [module for part in parts for name, module in part.named_children() if name.endswith("_proj")]
    bases = [getattr(linear, "base_layer", linear) for linear in linears]
    for linear, base in zip(linears, bases, strict=True):
        check_linear(linear, base)
    if linears != bases and any(p.requires_grad for base in bases for p in base.parameters()):
        raise Unsupported("it trains base weights together with an adapter")


def sliding_window(config: Any) -> int | None:
    """Return the number of tokens that a layer with a sliding window sees; None if every layer sees all tokens."""
    layer_types = getattr(config, "layer_types", None)
    has_window = "sliding_attention" in layer_types if layer_types else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if has_window else None


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
