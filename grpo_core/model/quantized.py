"""Weights of 4 bits: their format, and the linear layer that computes with them.

The weights of the linear layers in a model's decoder layers are quantised (model.quantize); embeddings, head, norms and
routers are not. The format is that of bitsandbytes (QLoRA, arXiv:2305.14314): the values of a weight in a row are cut
into blocks of 64. A value is the product of one of 16 numbers (`code`) and the greatest absolute value of its block.
Two values are one byte, the first in its upper half. With double quantisation (model.double_quant) these maxima are
bytes themselves, in blocks of 256, after their mean was subtracted: 0.516 bytes for each weight instead of 0.563.

Interface:
- `quantize(weight, double)` returns a `QuantizedWeight`, and `dequantize(weight, dtype, out)` its values.
- `QuantizedLinear` is a linear layer with such a weight, which is frozen. It is a torch linear layer, so PEFT puts LoRA
  on it. `find_quantized` returns those of a model, and `to_plain` turns them into linear layers with whole weights.
- `join` and `split` put the weights of layers that share an input behind one another, without changing a value.

Laws:
- There is one copy of the weights in 4 bits. Trainer, reference and every decoder compute with it. Whole weights exist
  for the time of one product, in the forward and again in the backward; they are never stored for the backward.
- A layer computes x Wᵀ + b with W = dequantize(weight, dtype of x), whatever the device and the number of rows, up to
  rounding of sums.
- `quantize` depends on the values of the weight alone, not on its dtype, and works in slices, so its temporary memory
  has a bound. `dequantize` computes in float32 and rounds once. Both are deterministic, so a resumed run is bitwise the
  run left alone.
- A change of the model's dtype does not change the weights in 4 bits.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo_core.schema import ConfigError

BLOCK = 64  # values that share a maximum
NESTED_BLOCK = 256  # maxima that share a maximum with double quantisation
SLICE = 1 << 22  # values that are quantised at once: the temporary memory is about 20 bytes for each
PACKAGE = "bitsandbytes"


@dataclass(frozen=True)
class NestedScales:
    """The quantised maxima of blocks: maximum i is code[byte i] * absmax[i // 256] + offset[i // 256]."""

    absmax: Tensor  # [blocks / 256] float32
    offset: Tensor  # [blocks / 256] float32, the same number for all blocks of a weight
    code: Tensor  # [256] float32


@dataclass(frozen=True)
class BlockScales:
    """The numbers that 4 bits stand for, and the maximum of every block of a weight."""

    kind: str  # nf4 or fp4
    block: int  # values in a block
    code: Tensor  # [16] float32
    absmax: Tensor  # [blocks]: float32, or uint8 if they are quantised
    nested: NestedScales | None = None  # None: they are not

    def to(self, device: torch.device) -> BlockScales:
        """Return the same on another device."""
        return _map_tensors(self, lambda x: x.to(device))

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        own = [self.code, self.absmax]
        return own if self.nested is None else [*own, self.nested.absmax, self.nested.offset, self.nested.code]

    def maxima(self) -> Tensor:
        """Return the maximum of every block, [blocks] float32."""
        if self.nested is None:
            return self.absmax
        nested, count = self.nested, len(self.absmax)
        scale, offset = (x.repeat_interleave(NESTED_BLOCK)[:count] for x in (nested.absmax, nested.offset))
        return (nested.code[self.absmax.int()] * scale).add_(offset)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [O, I] in 4 bits."""

    packed: Tensor  # [O * I / 2] uint8
    scales: BlockScales
    shape: tuple[int, int]

    @property
    def bytes(self) -> int:
        """The memory that it takes, without the tables of numbers."""
        nested = self.scales.nested
        parts = [self.packed, self.scales.absmax, *((nested.absmax, nested.offset) if nested else ())]
        return sum(x.numel() * x.element_size() for x in parts)


def _map_tensors(record: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a dataclass with `function` applied to its tensors, and to those of dataclasses in it."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    changed: dict[str, Any] = {name: function(x) for name, x in values.items() if isinstance(x, Tensor)}
    changed |= {name: _map_tensors(x, function) for name, x in values.items() if isinstance(x, NestedScales)}
    return replace(record, **changed)


def is_installed() -> bool:
    """Return whether bitsandbytes is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def check_installed(key: str, value: object) -> None:
    """Raise ConfigError unless bitsandbytes is installed, which `key` with this value needs."""
    if not is_installed():
        raise ConfigError(
            f"{key} is {value}, which needs {PACKAGE}, which is not installed: pip install -e '.[four_bit]'"
        )


def load_functions() -> Any:
    """Return the functions of bitsandbytes."""
    import bitsandbytes.functional as functions

    return functions


@torch.no_grad()
def quantize(weight: Tensor, double: bool = True) -> QuantizedWeight:
    """Return a weight [O, I] in 4 bits (nf4); `double`: its maxima are quantised, too."""
    functions, flat = load_functions(), weight.detach().reshape(-1)
    parts = []
    for part in flat.split(SLICE):
        packed, state = functions.quantize_4bit(part.float(), blocksize=BLOCK, quant_type="nf4")
        parts.append((packed.view(-1), state.absmax))
    packed, absmax = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    code, shape = state.code.to(weight.device), (weight.shape[0], weight.shape[1])
    if not double:
        return QuantizedWeight(packed, BlockScales("nf4", BLOCK, code, absmax), shape)
    offset = absmax.mean()
    maxima, outer = functions.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    nested = NestedScales(outer.absmax, offset.expand(len(outer.absmax)).clone(), outer.code.to(weight.device))
    return QuantizedWeight(packed, BlockScales("nf4", BLOCK, code, maxima, nested), shape)


@torch.no_grad()
def dequantize(weight: QuantizedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return the values [O, I] of a weight in `dtype`; `out` is a buffer of at least O * I values for them."""
    load_functions()
    scales, (rows, width) = weight.scales, weight.shape
    count = rows * width
    arguments = (weight.packed.view(-1, 1), scales.maxima(), scales.block, scales.kind)
    if weight.packed.is_cuda:
        if out is None:
            return torch.ops.bitsandbytes.dequantize_4bit(*arguments, [rows, width], dtype)
        values = out.view(-1)[:count].view(rows, width)
        torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, [rows, width], dtype, out=values)
        return values
    # on a CPU bitsandbytes ends a block with each row, which is wrong for most widths, and compiles code for odd ones
    even = count + count % 2
    layout = [1, even] if even % scales.block else [even // scales.block, scales.block]
    values = torch.ops.bitsandbytes.dequantize_4bit(*arguments, layout, dtype).view(-1)[:count].view(rows, width)
    return values if out is None else out.view(-1)[:count].view(rows, width).copy_(values)


def can_join(weights: Sequence[QuantizedWeight]) -> bool:
    """Return whether these weights, behind one another, are one weight: no block has values of two of them."""
    first = weights[0].scales
    unit = first.block * (NESTED_BLOCK if first.nested else 1)
    return all(
        (w.scales.kind, w.scales.block, w.shape[1]) == (first.kind, first.block, weights[0].shape[1])
        and (w.scales.nested is None) == (first.nested is None)
        and w.shape[0] * w.shape[1] % unit == 0
        for w in weights
    )


def join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return weights for which `can_join` holds as one, with their rows behind one another."""
    if len(weights) == 1:
        return weights[0]
    assert can_join(weights)
    scales = [weight.scales for weight in weights]
    nested = [scale.nested for scale in scales if scale.nested is not None]
    joined = replace(scales[0], absmax=torch.cat([scale.absmax for scale in scales]))
    if nested:
        parts = {name: torch.cat([getattr(x, name) for x in nested]) for name in ("absmax", "offset")}
        joined = replace(joined, nested=replace(nested[0], **parts))
    rows = sum(weight.shape[0] for weight in weights)
    return QuantizedWeight(torch.cat([weight.packed for weight in weights]), joined, (rows, weights[0].shape[1]))


def split(weight: QuantizedWeight, rows: Sequence[int]) -> list[QuantizedWeight]:
    """Return parts of a weight with these numbers of rows, as views. Only the last may end within a block."""
    parts, width, first = [], weight.shape[1], 0
    for count in rows:
        begin, end = first * width, (first + count) * width
        blocks = slice(begin // weight.scales.block, -(-end // weight.scales.block))
        scales = replace(weight.scales, absmax=weight.scales.absmax[blocks])
        if scales.nested is not None:
            outer = slice(blocks.start // NESTED_BLOCK, -(-blocks.stop // NESTED_BLOCK))
            nested = scales.nested
            scales = replace(scales, nested=replace(nested, absmax=nested.absmax[outer], offset=nested.offset[outer]))
        parts.append(QuantizedWeight(weight.packed[begin // 2 : -(-end // 2)], scales, (count, width)))
        first += count
    return parts


def split_rows(weight: QuantizedWeight, max_values: int) -> list[QuantizedWeight]:
    """Return a weight as parts of its rows, as views, each of at most `max_values` values where its blocks allow it."""
    rows, width = weight.shape
    values = weight.scales.block * (NESTED_BLOCK if weight.scales.nested else 1)
    unit = values // math.gcd(values, width)  # rows between two places where a block begins
    count = max(unit, max_values // width // unit * unit)
    return split(weight, [min(count, rows - first) for first in range(0, rows, count)]) if rows > count else [weight]


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is frozen, in 4 bits. Its parameter `weight` holds the bytes, [O * I / 2] uint8."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: Any = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        count = -(-in_features * out_features // 2)
        self.weight = nn.Parameter(torch.empty(count, dtype=torch.uint8, device=device), requires_grad=False)
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self.scales: BlockScales | None = None  # set with the weight

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight. Setting it replaces the bytes and their scales; the parameter stays the same object."""
        assert self.scales is not None
        return QuantizedWeight(self.weight.data, self.scales, (self.out_features, self.in_features))

    @quantized.setter
    def quantized(self, value: QuantizedWeight) -> None:
        assert value.shape == (self.out_features, self.in_features)
        self.weight.data, self.scales = value.packed, value.scales

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.quantized, self.bias)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move the scales with the weight; their dtype stays, whatever that of the model becomes."""
        super()._apply(function, recurse)
        if self.scales is not None:
            self.scales = self.scales.to(self.weight.device)
        return self


def multiply(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b for x [..., I]. The backward, for x and b, computes the whole weight again."""
    return _Product.apply(x, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        context.weight = weight
        return F.linear(x, dequantize(weight, x.dtype), bias)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, needs_bias = context.needs_input_grad
        x_grad = grad @ dequantize(context.weight, grad.dtype) if needs_x else None
        return x_grad, None, grad.flatten(0, -2).sum(0) if needs_bias else None


def find_quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantised layers of a model by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def is_quantized(model: nn.Module) -> bool:
    """Return whether a model has a quantised layer."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def to_plain(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn the quantised layers of a model into linear layers whose weights in `dtype` have the same values."""
    for name, layer in find_quantized(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(dequantize(layer.quantized, dtype), requires_grad=False)
        plain.bias = layer.bias
        plain.train(layer.training)
        model.set_submodule(name, plain)


class Sizes(NamedTuple):
    """The size of weights."""

    count: int  # weights
    bytes: int


def count_weights(parameters: Iterable[nn.Parameter], model: nn.Module) -> Sizes:
    """Return the size of parameters, of which some may be those of layers in 4 bits in `model`."""
    layers = {id(layer.weight): layer for layer in find_quantized(model).values()}
    count = size = 0
    for parameter in parameters:
        layer = layers.get(id(parameter))
        count += parameter.numel() if layer is None else layer.in_features * layer.out_features
        size += parameter.numel() * parameter.element_size() if layer is None else layer.quantized.bytes
    return Sizes(count, size)
