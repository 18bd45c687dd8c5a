"""Products with few rows whose readers finish them, against the whole product in torch. On a CPU in Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest tests/test_product_kernels.py        (where triton is installed)
"""

import os

import pytest
import torch

from grpo_core.sampling.decode_ops import TorchOps

pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else [pytest.mark.gpu]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16  # Triton's interpreter has no products of bfloat16
TOLERANCE = 4e-3


def random(*shape, scale=1.0):
    return (scale * torch.randn(*shape)).to(DEVICE, DTYPE)


class Case:
    """The weights of layers that share an input, each with a LoRA of one rank, and rows x."""

    def __init__(self, rows, inner, sizes, rank, has_bias):
        from grpo_core.sampling.kernels.decode_kernels import TritonOps

        torch.manual_seed(0)
        self.ops, self.sizes, self.ranks = TritonOps(DEVICE), sizes, [rank] * len(sizes)
        width, total = sum(sizes), rank * len(sizes)
        self.x, self.weight = random(rows, inner), random(width + total, inner, scale=inner**-0.5)
        self.bias = None
        if has_bias:
            self.bias = torch.cat([random(width), random(total) * 0])
        self.b = torch.block_diag(*[random(rank, size).float() for size in sizes]).to(DEVICE, DTYPE)

    def product(self):
        return self.ops.lora_linear(self.x, self.weight, self.bias, self.b, self.ranks)

    def want(self):
        """y in the definition's order, from float64, rounded where torch rounds."""
        wide, width = self.x.double() @ self.weight.double().t(), sum(self.sizes)
        y = wide[:, :width] if self.bias is None else wide[:, :width] + self.bias[:width].double()
        return (y.to(DTYPE).double() + wide[:, width:].to(DTYPE).double() @ self.b.double()).to(DTYPE)


def close(ours, want, atol=TOLERANCE):
    torch.testing.assert_close(ours.float(), want.float(), atol=atol * max(1.0, float(want.abs().max())), rtol=0)


CASES = [
    (1, 64, (48,), 4, True), (5, 256, (48, 16, 16), 4, True), (33, 128, (96,), 0, False), (16, 1024, (70,), 16, False), (64, 64, (40, 40), 3, True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_sum_of_the_parts(case):
    from grpo_core.sampling.kernels.product_kernels import Product

    case = Case(*case)
    product = case.product()
    assert isinstance(product, Product)
    close(case.ops.finish(product), case.want())
    assert len(product.parts) > 1 or case.x.shape[1] == 64


@pytest.mark.parametrize("case", CASES)
def test_what_is_added_to_a_residual(case):
    case = Case(*case)
    x, weight = random(len(case.x), sum(case.sizes)), random(sum(case.sizes))
    ours, want = x.clone(), x.clone()
    if len(case.sizes) == 1:  # a product of several layers is never added
        normed = case.ops.add_norm(ours, case.product(), weight, 1e-6)
        close(normed, TorchOps().add_norm(want, case.want(), weight, 1e-6))
        close(ours, want)


@pytest.mark.parametrize("sizes", [(1100, 1100), (2200,)])
@pytest.mark.parametrize("rank", [0, 5])
def test_gates_of_one_or_two_layers(sizes, rank):
    case = Case(3, 64, sizes, rank, True)
    close(case.ops.gate_mul(case.product(), "silu"), TorchOps().gate_mul(case.want(), "silu"))


def test_a_library_computes_wide_products_and_the_reader_adds_lora(monkeypatch):
    from grpo_core.sampling.kernels import product_kernels

    monkeypatch.setattr(product_kernels, "MAX_COLUMN_BLOCKS", 2)
    case = Case(4, 128, (100, 100), 4, True)
    product = case.product()
    assert product.parts.dtype == DTYPE and product.parts.shape[0] == 1
    close(case.ops.finish(product), case.want())
    close(case.ops.gate_mul(product, "silu"), TorchOps().gate_mul(case.want(), "silu"))


@pytest.mark.parametrize("rows, inner, ranks", [(65, 64, (4, 4)), (4, 96, (4, 4)), (4, 64, (4, 8)), (4, 64, (4, 0)), (4, 64, (65, 65))])
def test_other_products_are_whole(rows, inner, ranks):
    case = Case(rows, inner, (32, 32), 4, False)
    case.ranks, case.b = list(ranks), random(sum(ranks), 64)
    case.weight = random(64 + sum(ranks), inner)
    assert isinstance(case.product(), torch.Tensor)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("norm", [None, "heads", "width"])
def test_queries_keys_and_values(layers, rank, norm):
    """Attention gives what it gives for the whole product."""
    from grpo_core.sampling import decode_ops as ops

    heads, kv_heads, dim, rows = 4, 2, 16, 3
    sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
    case = Case(rows, 128, sizes if layers == 3 else (sum(sizes),), rank, True)
    shape = ops.AttentionShape(1, heads, kv_heads, dim, 1e-6, dim**-0.5, dim)
    weights = {None: (None, None), "heads": (random(dim), random(dim)), "width": (random(sizes[0]), random(sizes[1]))}[norm]
    own, outputs = ops.LayerAttention(*weights), []
    state = torch.zeros(ops.FIELDS, rows, dtype=torch.long, device=DEVICE)
    state[ops.SLOT], state[ops.DRAWN], state[ops.START] = torch.arange(rows, device=DEVICE), 1, 2
    keys, values = (random(1, kv_heads, 2, dim) for _ in range(2))
    angles = torch.rand(8, dim // 2, device=DEVICE)
    for given in (case.product(), case.want()):
        cache = case.ops.make_cache(shape, DTYPE, DEVICE)
        cache.allocate(1, 2, rows, 4)
        cache.store_prompts(0, 0, keys, values)
        cache.begin_step(state, [(angles.cos().to(DTYPE), angles.sin().to(DTYPE))])
        outputs.append(cache.attend(0, given, own))
    close(*outputs)
