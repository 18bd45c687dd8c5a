"""A Llama-like model as few large products: what one decode step computes, from the live weights.

q, k and v become one product, gate and up another, each with the rows of LoRA's A below it. The frozen weights are not
copied: the model's own q, k, v, gate and up become views of the joined ones. Only LoRA's small factors are copied, by
`refresh`, so whatever moves them (an optimizer, a reference that is swapped in) needs no new graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from grpo_core.sampling.decode_ops import Shape, TorchOps, rotated

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Without cuDNN's, which takes up to a second for every new shape.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PREFILL_BYTES = 111e6  # of the widest layer's values for the prompts that go through the model at once
PREFILL_ON_CPU = 2048  # tokens; more are no faster there


class Unsupported(Exception):
    """Why this model cannot be decoded by its products."""


class Product:
    """y = x Wᵀ + b of linear layers that share their input, joined; with LoRA, + s (x Aᵀ) Bᵀ of each."""

    def __init__(self, linears: Sequence[nn.Module], ops: TorchOps) -> None:
        self.linear = ops.linear
        self.linears = list(linears)
        self.bases: list[nn.Linear] = [getattr(linear, "base_layer", linear) for linear in linears]
        self.sizes = [base.out_features for base in self.bases]
        self.width = sum(self.sizes)
        self.trained = any(p.requires_grad for base in self.bases for p in base.parameters())
        if self.trained:
            return
        first = self.bases[0].weight
        self.ranks = [len(a) if (a := _factors(linear)[0]) is not None else 0 for linear in self.linears]
        rows, self.rank = [*self.sizes, sum(self.ranks)], sum(self.ranks)
        self.weight = first.new_zeros(sum(rows), first.shape[1])
        *own, self.a = self.weight.split(rows)
        self.b = first.new_zeros(self.width, self.rank)
        for base, part in zip(self.bases, own, strict=True):
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
        """Take LoRA's factors as they are now, scale included; zeros where the adapter is off."""
        if self.trained or not self.rank:
            return
        row = column = 0
        for linear, size, rank in zip(self.linears, self.sizes, self.ranks, strict=True):
            if rank:
                a, b, scale = _factors(linear)
                if len(a) != rank:
                    raise Unsupported("its active adapter has another rank than before")
                self.a[column : column + rank] = a
                self.b[row : row + size, column : column + rank] = b * scale
            row, column = row + size, column + rank

    def __call__(self, x: Tensor) -> Tensor:
        if self.trained:
            return torch.cat([F.linear(x, base.weight, base.bias) for base in self.bases], dim=1)
        y = self.linear(x, self.weight, self.bias)
        return y[:, : self.width].addmm_(y[:, self.width :], self.b.t()) if self.rank else y


class Layer:
    def __init__(self, layer: nn.Module, ops: TorchOps) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.qkv = Product([attention.q_proj, attention.k_proj, attention.v_proj], ops)
        self.o = Product([attention.o_proj], ops)
        self.gate_up = Product([mlp.gate_proj, mlp.up_proj], ops)
        self.down = Product([mlp.down_proj], ops)
        self.products = (self.qkv, self.o, self.gate_up, self.down)


class FusedModel:
    """`model` as products. Building it moves the model's frozen weights, without changing them.

    Raises:
        Unsupported: another family than FAMILIES, other activations, adapters or linear layers than plain ones.
    """

    def __init__(self, model: Any, ops: TorchOps) -> None:
        check_model(model)
        config, body = model.config, model.model
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if dim % ops.head_multiple:
            raise Unsupported(f"its heads have {dim} dimensions, no multiple of {ops.head_multiple}")
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.shape = Shape(len(body.layers), heads, kv_heads, dim, config.rms_norm_eps)
        self.model, self.ops, self.rotary = model, ops, body.rotary_emb
        self.embedding, self.norm, self.head = body.embed_tokens, body.norm, model.lm_head
        self.dtype, self.device = self.embedding.weight.dtype, self.embedding.weight.device
        self.layers = []
        for layer in body.layers:
            self.layers.append(Layer(layer, ops))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the weights' old places, too small for the next layer's
        self.cos = self.sin = self.embedding.weight.new_zeros(0, dim // 2)

    def refresh(self) -> None:
        """Take the adapter as it is now."""
        for layer in self.layers:
            for product in layer.products:
                product.refresh()

    def addresses(self) -> tuple:
        """Where the model's own weights lie, which a captured graph reads, and what decides how they are read."""
        named = [(n, p) for n, p in self.model.named_parameters() if "lora_" not in n]
        return tuple((name, weight.data_ptr(), weight.requires_grad) for name, weight in named)

    def reach(self, positions: int) -> bool:
        """Have the table of rotations for so many positions; whether it grew, which it does by doubling."""
        grows = len(self.cos) < positions
        if grows:
            count = 1 << max(9, (positions - 1).bit_length())
            at = torch.arange(count, device=self.device)[None]
            cos, sin = self.rotary(self.embedding.weight[:1], at)
            if cos.shape[2] != self.shape.head_dim:
                raise Unsupported("its rotation covers only a part of a head")
            self.cos, self.sin = (x[0, :, : x.shape[2] // 2].contiguous() for x in (cos, sin))
        return grows

    def hidden(self, x: Tensor, attend: Callable[[int, Tensor, Layer], Tensor]) -> Tensor:
        """The final hidden states of x [R, H], embedded tokens, which it overwrites.

        attend(i, qkv, layer) gives layer i's attention [R, heads dim].
        """
        delta, norm = None, self.ops.add_norm
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(norm(x, delta, layer.input_norm.weight, self.shape.eps))
            inner = norm(x, layer.o(attend(i, qkv, layer)), layer.post_norm.weight, self.shape.eps)
            delta = layer.down(self.ops.silu_mul(layer.gate_up(inner)))
        return norm(x, delta, self.norm.weight, self.shape.eps)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.ops.linear(hidden, self.head.weight, self.head.bias)

    def prefill(self, prompts: Sequence[Sequence[int]], cache: Any) -> Tensor:
        """Hidden states [N, H] after each prompt's last token; their keys and values go to `cache`."""
        width, widest = max(len(prompt) for prompt in prompts), self.layers[0].gate_up.width
        tokens = PREFILL_BYTES // (1.5 * widest * self.dtype.itemsize) if self.device.type == "cuda" else PREFILL_ON_CPU
        at_once, found = max(1, int(tokens) // width), []
        for first in range(0, len(prompts), at_once):
            part = prompts[first : first + at_once]
            ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in part]).to(self.device)
            hidden = self.hidden(self.embed(ids).flatten(0, 1), self._causal(first, *ids.shape, cache))
            last = torch.tensor([i * width + len(prompt) - 1 for i, prompt in enumerate(part)]).to(self.device)
            found.append(hidden[last])
        return torch.cat(found)

    def _causal(self, first: int, count: int, width: int, cache: Any) -> Callable[[int, Tensor, Layer], Tensor]:
        """Attention within prompts padded on the right: what comes after a prompt's end is never read."""
        heads, dim = self.shape.heads, self.shape.head_dim
        cos, sin = (x[:width, None] for x in (self.cos, self.sin))

        def attend(i: int, qkv: Tensor, layer: Layer) -> Tensor:
            parts = rotated(qkv.reshape(count, width, -1, dim), self.shape, cos, sin, *norms(layer))
            q, k, v = (x.transpose(1, 2) for x in parts)
            cache.store(i, first, k, v)
            with sdpa_kernel(BACKENDS):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(count * width, heads * dim)

        return attend


def norms(layer: Layer) -> tuple[Tensor | None, Tensor | None]:
    """The weights of the norms on q and k, where the family has them."""
    return (None, None) if layer.q_norm is None else (layer.q_norm.weight, layer.k_norm.weight)


def check_model(model: Any) -> None:
    """Raise Unsupported unless it is RMSNorm, rotary grouped-query attention and SwiGLU, in plain layers throughout."""
    config = model.config
    if not type(model).__module__.startswith("transformers.models."):
        raise Unsupported(f"{type(model).__name__} is not transformers' own")
    if config.model_type not in FAMILIES:
        raise Unsupported(f"model type {config.model_type}; the fast path knows {', '.join(FAMILIES)}")
    if config.hidden_act not in ("silu", "swish"):
        raise Unsupported(f"its activation is {config.hidden_act}")
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise Unsupported(f"its rotation ({kind}) changes with the length")
    for module in (model.lm_head, model.model.embed_tokens):
        if type(module) not in (nn.Linear, nn.Embedding):
            raise Unsupported(f"its {type(module).__name__} is not a plain layer")
    parts = [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    linears = [module for part in parts for name, module in part.named_children() if name.endswith("_proj")]
    bases = [getattr(linear, "base_layer", linear) for linear in linears]
    for linear, base in zip(linears, bases, strict=True):
        _check_linear(linear, base)
    if linears != bases and any(p.requires_grad for base in bases for p in base.parameters()):
        raise Unsupported("it trains weights beside an adapter")


def window(config: Any) -> int | None:
    """Tokens that a layer looks back on, where a layer does not see everything."""
    kinds = getattr(config, "layer_types", None)
    limited = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if limited else None


def _check_linear(linear: nn.Module, base: nn.Module) -> None:
    if type(base) is not nn.Linear:
        raise Unsupported(f"a {type(base).__name__} is not a plain linear layer")
    if linear is base:
        return
    active = [name for name in linear.active_adapters if name in getattr(linear, "lora_A", {})]
    plain = (
        len(active) == 1
        and not linear.merged
        and not getattr(linear, "lora_variant", {}).get(active[0] if active else "")
    )
    if not plain or linear.lora_B[active[0]].bias is not None:
        raise Unsupported("its adapter is more than one plain LoRA")


def _factors(linear: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
    """LoRA's A, B and scale, (None, None, 0) without."""
    if not hasattr(linear, "lora_A"):
        return None, None, 0.0
    name = next(name for name in linear.active_adapters if name in linear.lora_A)
    scale = 0.0 if linear.disable_adapters else linear.scaling[name]
    return linear.lora_A[name].weight.detach(), linear.lora_B[name].weight.detach(), scale
