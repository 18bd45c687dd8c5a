"""A product with few rows that its reader finishes, as Triton kernels.

`multiply` computes x [W; A]ᵀ, in parts of the sum if that is needed to occupy the whole GPU. The kernel that reads the
product adds the parts, the bias and LoRA's change, by `load_product`. So a product of few rows is one launch, where a
library needs one for the product, one for the parts and one for LoRA's B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64
MAX_RANK = 64  # of one layer's LoRA, which is unrolled
BLOCK_N, BLOCK_K = 64, 64  # outputs and dimensions of the sum that a program computes at once
MIN_PROGRAMS = 100  # that occupy a GPU
MAX_PARTS = 8
MAX_COLUMN_BLOCKS = 128  # with more columns than these blocks hold, a library's product is as fast


class Product(NamedTuple):
    """A product y = x Wᵀ + b + s (x Aᵀ) Bᵀ that is not finished; W are the weights of one or more layers.

    parts: [S, R, O + r k]: parts of the sum of x [W; A]ᵀ, the k layers' A behind one another.
    bias: [O], or None if it is added already.
    b: [r k, O]: the layers' s B, transposed, each in its rows and columns.
    rank: The rank r of each layer; 0 without LoRA.
    layers: The number k of layers.
    width: The number O of outputs.
    dtype: That of y. The sum with the bias and the values x Aᵀ are rounded to it, as torch does.
    """

    parts: Tensor
    bias: Tensor | None
    b: Tensor
    rank: int
    layers: int
    width: int
    dtype: torch.dtype

    def inputs(self) -> tuple:
        """Return the arguments of `load_product`: pointers and strides, without the constants."""
        parts = self.parts
        return parts, parts.stride(0), parts.stride(1), parts if self.bias is None else self.bias, self.b

    def constants(self) -> tuple[int, int, bool, int]:
        """Return the constants of `load_product`: O, the number of parts, whether there is a bias, and r."""
        return self.width, len(self.parts), self.bias is not None, self.rank


def whole(y: Tensor) -> Product:
    """Return a finished product y [R, O] as its reader takes it."""
    return Product(y[None], None, y, 0, 1, y.shape[1], y.dtype)


def finish(product: Product | Tensor) -> Tensor:
    """Return y [R, O]."""
    if isinstance(product, Tensor):
        return product
    total = product.parts.float().sum(dim=0)
    y, inner = total[:, : product.width], total[:, product.width :].to(product.dtype)
    if product.bias is not None:
        y = y + product.bias
    y = y.to(product.dtype)
    return y if not product.rank else torch.addmm(y, inner, product.b)


def is_finishable(x: Tensor, inner: int, ranks: Sequence[int]) -> bool:
    """Return whether a product of x with weights of `inner` columns and LoRAs of these ranks can be left unfinished."""
    is_small = len(x) <= MAX_ROWS and len(set(ranks)) == 1 and ranks[0] <= MAX_RANK
    return is_small and inner % BLOCK_K == 0 and x.element_size() == 2


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, ranks: Sequence[int]) -> Product:
    """Return the product of x [R, I] with `weight` [O + r k, I], the weights and A's of k layers.

    `bias` [O + r k] is 0 for A, and `b` is that of `Product`. See `is_finishable`.
    """
    rows, width = len(x), b.shape[1]
    blocks, steps = triton.cdiv(len(weight), BLOCK_N), x.shape[1] // BLOCK_K
    if blocks > MAX_COLUMN_BLOCKS:
        return Product(F.linear(x, weight, bias)[None], None, b, ranks[0], len(ranks), width, x.dtype)
    counts = [count for count in range(1, MAX_PARTS + 1) if steps % count == 0]
    count = next((count for count in counts if blocks * count >= MIN_PROGRAMS), counts[-1])
    parts = torch.empty(count, rows, len(weight), dtype=torch.float32, device=x.device)
    block_r = max(16, triton.next_power_of_2(rows))
    _multiply_parts[(blocks, count)](
        x.contiguous(), weight, parts, rows, len(weight), x.shape[1], x.shape[1] // count, block_r, BLOCK_N, BLOCK_K,
        num_warps=4, num_stages=6 if block_r <= 32 else 4,
    )  # fmt: skip
    return Product(parts, None if bias is None else bias[:width], b, ranks[0], len(ranks), width, x.dtype)


@triton.jit(do_not_specialize=["R", "N"])
def _multiply_parts(x, weight, out, R, N, K, SIZE, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Store one part, SIZE of the K dimensions, of the sum of some outputs of all rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part, row = tl.program_id(1), tl.arange(0, BLOCK_R)
    sums = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(0, SIZE, BLOCK_K):
        k = part * SIZE + start + tl.arange(0, BLOCK_K)
        # every weight is read once
        weights = tl.load(
            weight + n[:, None] * K + k[None, :], (n < N)[:, None], other=0.0, eviction_policy="evict_first"
        )
        values = tl.load(x + row[None, :] * K + k[:, None], (row < R)[None, :], other=0.0)
        sums = tl.dot(weights, values, sums)
    tl.store(out + (part * R + row[None, :]) * N + n[:, None], sums, (row < R)[None, :] & (n < N)[:, None])


@triton.jit
def load_product(
    parts, part_stride, row_stride, bias, b, row, at, inside, layer, like,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Return the columns `at` of one row of a `Product` in float32; all of them are outputs of the layer `layer`.

    They are rounded to the dtype of `like` where torch rounds.
    """
    start = parts + row * row_stride
    value = tl.load(start + at, inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(start + part * part_stride + at, inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + at, inside, other=0.0).to(tl.float32)
    if RANK > 0:
        change = value * 0.0
        for i in tl.static_range(RANK):
            column = layer * RANK + i
            factor = tl.load(start + WIDTH + column).to(tl.float32)
            for part in tl.static_range(1, PARTS):
                factor += tl.load(start + part * part_stride + WIDTH + column)
            factor = factor.to(like.dtype.element_ty).to(tl.float32)
            change += factor * tl.load(b + column * WIDTH + at, inside, other=0.0).to(tl.float32)
        value = value.to(like.dtype.element_ty).to(tl.float32) + change
    return value.to(like.dtype.element_ty).to(tl.float32)
