"""A Triton product with weights in 4 bits, for few rows: they are dequantised in registers and never stored.

`TorchOps.quantized_linear` (decode_ops.py) is the definition. A program computes some outputs of all rows over one part
of the sum: it reads the bytes and the scale of each block, looks both halves of a byte up in the 16 numbers, multiplies
in float32, rounds to the dtype of x, as `dequantize` does, and adds a matrix product. Other programs of the same launch
compute the rows of LoRA's A. Parts of a sum are added in a fixed order, so the same inputs give the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_core.model.quantized import NESTED_BLOCK, QuantizedWeight

MAX_ROWS = 64  # above, whole weights and torch's product are faster
BLOCK = 64  # values that share a scale, which the kernel needs
_BLOCK, _NESTED_BLOCK = tl.constexpr(BLOCK), tl.constexpr(NESTED_BLOCK)
OUTPUTS_PER_PROGRAM = 1024  # of the sum of the parts
DEFAULT_PROCESSORS = 132  # of a GPU, where there is none


class Settings(NamedTuple):
    """The division of a product among programs, as benchmarks/four_bits.py measures it."""

    outputs: int = 64  # of a program
    blocks: int = 2  # of 64 values that one turn of the loop adds
    warps: int = 4
    stages: int = 4
    splits: int | None = None  # parts of the sum; None: so many that there are two programs for each processor
    lookup: str = "gather"  # how a number is looked up: gather (shared memory), load (the cache), select (registers)


# (rows up to which they are used, settings) for 16-bit values
SETTINGS = [(16, Settings()), (32, Settings()), (MAX_ROWS, Settings(stages=3))]
WIDE_SETTINGS = Settings(32, 1, 4, 2)  # for float32


@triton.jit
def _select(index, c0, c1, c2, c3, c4, c5, c6, c7):
    """Return the number of 8 that each index means, by its three bits."""
    is_odd, is_second, is_upper = (index & 1) != 0, (index & 2) != 0, index > 3
    lower = tl.where(is_second, tl.where(is_odd, c3, c2), tl.where(is_odd, c1, c0))
    upper = tl.where(is_second, tl.where(is_odd, c7, c6), tl.where(is_odd, c5, c4))
    return tl.where(is_upper, upper, lower)


@triton.jit
def _look_up(code, index, LOOKUP: tl.constexpr):
    """Return code[index] for index [M, N]."""
    if LOOKUP == "load":
        values = tl.load(code + index)
    elif LOOKUP == "gather":
        table = tl.load(code + tl.arange(0, 16))
        flat = tl.gather(table, tl.reshape(index, [index.shape[0] * index.shape[1]]), 0)
        values = tl.reshape(flat, [index.shape[0], index.shape[1]])
    else:
        lower = _select(index & 7, tl.load(code), tl.load(code + 1), tl.load(code + 2), tl.load(code + 3),
                        tl.load(code + 4), tl.load(code + 5), tl.load(code + 6), tl.load(code + 7))  # fmt: skip
        upper = _select(index & 7, tl.load(code + 8), tl.load(code + 9), tl.load(code + 10), tl.load(code + 11),
                        tl.load(code + 12), tl.load(code + 13), tl.load(code + 14), tl.load(code + 15))  # fmt: skip
        values = tl.where(index > 7, upper, lower)
    return values


@triton.jit
def _load_scale(absmax, nested_absmax, nested_offset, nested_code, block, inside, NESTED: tl.constexpr):
    """Return the greatest absolute values of these blocks."""
    if NESTED:
        index = tl.load(absmax + block, inside, other=0).to(tl.int32)
        outer = block // _NESTED_BLOCK
        factor = tl.load(nested_absmax + outer, inside, other=0.0)
        scale = tl.load(nested_code + index) * factor + tl.load(nested_offset + outer, inside, other=0.0)
    else:  # no return in front of this: the compiler reads what follows one, too
        scale = tl.load(absmax + block, inside, other=0.0)
    return scale


@triton.jit(do_not_specialize=["R", "x_stride"])
def _multiply(
    x, x_stride, packed, code, absmax, nested_absmax, nested_offset, nested_code, bias, a, out, R,
    OUT: tl.constexpr, IN: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr,
    NESTED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, UNROLL: tl.constexpr,
    LOOKUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store one part of the sum for BLOCK_O outputs of all rows; the parts are [SPLITS, R, OUT + RANK]."""
    tiles: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    blocks: tl.constexpr = IN // _BLOCK
    per_split: tl.constexpr = ((blocks + SPLITS - 1) // SPLITS + UNROLL - 1) // UNROLL * UNROLL
    tile, part = tl.program_id(0), tl.program_id(1)
    row, k, byte = tl.arange(0, BLOCK_R), tl.arange(0, _BLOCK), tl.arange(0, _BLOCK // 2)
    sums = tl.zeros([BLOCK_O, BLOCK_R], tl.float32)
    end = tl.minimum((part + 1) * per_split, blocks)
    if tile < tiles:
        o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        for first in range(part * per_split, end, UNROLL):
            for i in tl.static_range(UNROLL):
                block = first + i
                inside = (o < OUT) & (block < end)
                scale = _load_scale(
                    absmax, nested_absmax, nested_offset, nested_code, o * blocks + block, inside, NESTED
                )[:, None]
                at = packed + o[:, None] * (IN // 2) + block * (_BLOCK // 2) + byte[None, :]
                pair = tl.load(at, inside[:, None], other=0).to(tl.int32)
                high, low = _look_up(code, pair >> 4, LOOKUP), _look_up(code, pair & 15, LOOKUP)
                weight = tl.join((high * scale).to(x.dtype.element_ty), (low * scale).to(x.dtype.element_ty))
                weight = tl.reshape(weight, [BLOCK_O, _BLOCK])
                seen = (row < R)[None, :] & (block < end)
                values = tl.load(x + row[None, :] * x_stride + block * _BLOCK + k[:, None], seen, other=0.0)
                sums = tl.dot(weight, values, sums, input_precision=PRECISION)
        column, width = o, OUT
        if HAS_BIAS and SPLITS == 1:
            sums += tl.load(bias + o, o < OUT, other=0.0).to(tl.float32)[:, None]
    else:
        o = (tile - tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
        for block in range(part * per_split, end):
            factors = tl.load(a + o[:, None] * IN + block * _BLOCK + k[None, :], (o < RANK)[:, None], other=0.0)
            seen = (row < R)[None, :]
            values = tl.load(x + row[None, :] * x_stride + block * _BLOCK + k[:, None], seen, other=0.0)
            sums = tl.dot(factors, values, sums, input_precision=PRECISION)
        column, width = OUT + o, OUT + RANK
    at = out + (part * R + row[None, :]) * (OUT + RANK) + column[:, None]
    tl.store(at, sums, (column < width)[:, None] & (row < R)[None, :])


@triton.jit(do_not_specialize=["R"])
def _add_parts(
    parts, bias, out, R, OUT: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Store the sum of the parts of one row, and of the bias of the first OUT columns."""
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros([BLOCK_O], tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(parts + (part * R + row) * WIDTH + column, column < WIDTH, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + column, column < OUT, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, total, column < WIDTH)


@cache
def _processors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else DEFAULT_PROCESSORS
    )


def fits(x: Tensor, weight: QuantizedWeight) -> bool:
    """Return whether `multiply` computes this product: few rows, and no block in two rows of the weight."""
    return len(x) <= MAX_ROWS and weight.scales.block == BLOCK and weight.shape[1] % BLOCK == 0


def multiply(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, a: Tensor | None, settings: Settings | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return x Wᵀ + b [R, O], and x Aᵀ [R, rank] if there is an A, for x [R, I] with at most 64 rows."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, (outputs, inputs), rank = len(x), weight.shape, 0 if a is None else len(a)
    assert fits(x, weight)
    if settings is None:
        by_rows = next(settings for limit, settings in SETTINGS if rows <= limit)
        settings = WIDE_SETTINGS if x.dtype == torch.float32 else by_rows
    tiles = triton.cdiv(outputs, settings.outputs) + triton.cdiv(rank, settings.outputs)
    splits = settings.splits or max(1, min(8, 2 * _processors(x.device) // tiles, inputs // BLOCK))
    width, scales = outputs + rank, weight.scales
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, rows, width, dtype=dtype, device=x.device)
    nested = scales.nested
    outer = (x, x, x) if nested is None else (nested.absmax, nested.offset, nested.code)  # what is not read is x
    _multiply[(tiles, splits)](
        x, x.stride(0), weight.packed, scales.code, scales.absmax, *outer, x if bias is None else bias,
        x if a is None else a, out, rows, outputs, inputs, rank, splits, nested is not None, bias is not None,
        max(16, triton.next_power_of_2(rows)), settings.outputs, settings.blocks, settings.lookup,
        "ieee" if x.dtype == torch.float32 else "tf32", num_warps=settings.warps, num_stages=settings.stages,
    )  # fmt: skip
    total = out[0]
    if splits > 1:
        total = torch.empty(rows, width, dtype=x.dtype, device=x.device)
        grid = (rows, triton.cdiv(width, OUTPUTS_PER_PROGRAM))
        _add_parts[grid](
            out, x if bias is None else bias, total, rows, outputs, width, splits, bias is not None, OUTPUTS_PER_PROGRAM
        )
    return total[:, :outputs], total[:, outputs:] if rank else None
