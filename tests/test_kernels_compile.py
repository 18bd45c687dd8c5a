"""Every Triton kernel is compiled for consumer cards, without one, and fits into their shared memory.

    python -m pytest tests/test_kernels_compile.py -m "soak or not soak"        (where triton is installed)
"""

import importlib
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from grpo_core.batch import SamplingParams
from grpo_core.model.quantized import BlockScales, NestedScales, QuantizedWeight
from grpo_core.sampling.decode_ops import FIELDS, AttentionShape, LayerAttention, Tables
from grpo_core.sampling.expert_ops import ExpertWeights, Gating, Routing

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
from offline_compiler import compiling_for
from triton.runtime.jit import JITFunction

from grpo_core.model import kernels as update_kernels
from grpo_core.model import layer_kernels
from grpo_core.sampling.kernels import (
    delta_net_kernels,
    elementwise_kernels,
    expert_kernels,
    four_bit_kernels,
    row_attention_kernels,
    shared_memory,
    state_kernels,
)
from grpo_core.sampling.kernels.decode_kernels import TritonOps
from grpo_core.sampling.kernels.product_kernels import whole
from grpo_core.sampling.modules.delta_net import DeltaInputs, DeltaWeights

SHARED_KB = {75: 64, 80: 163, 86: 99, 89: 99, 120: 99}  # compute capability -> shared memory of a block, CUDA C++ guide
CPU = torch.device("cpu")


def empty(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device=CPU)


def compile_decoder(dtype):
    """The fused decoder's kernels at the sizes of Qwen2.5-7B."""
    ops, x, weight = TritonOps(CPU), empty(32, 3584, dtype=dtype), empty(3584, dtype=dtype)
    ops.add_norm(x, x, weight, 1e-6)
    ops.add_norm(x, x, weight, 1e-6, delta_weight=weight, offset=1.0, delta_scale=0.5)
    for activation in ("silu", "gelu_tanh"):
        for gate_up in (empty(32, 2 * 18_944, dtype=dtype), whole(empty(32, 2 * 18_944, dtype=dtype))):
            ops.gate_mul(gate_up, activation)
    for rows in (1, 32, 64):
        product = ops.lora_linear(empty(rows, 3584, dtype=dtype), empty(4608 + 48, 3584, dtype=dtype), None, empty(48, 4608, dtype=dtype), [16] * 3)
        ops.gate_mul(product, "silu")
    state = torch.zeros(FIELDS, 32, dtype=torch.int64)
    shapes = ((torch.float64, 32, 256), (torch.int64, 32, 256), (torch.float32, 32, 256), (torch.int64, 32), (torch.bool, 32))
    tables = Tables(*(torch.zeros(*shape, dtype=kind) for kind, *shape in shapes), eos=torch.ones(2, dtype=torch.int64))
    for settings in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, greedy=True)):
        ops.draw(empty(32, 152_064, dtype=dtype), state, tables, settings)


def compile_attention(dtype):
    """The fused decoder's attention: heads of every size, with and without norms, window, bound and sinks."""
    for rows, heads, kv_heads, dim, own in (
        (32, 28, 4, 128, {}), (1, 12, 2, 128, {}), (32, 8, 4, 256, {"window": 512, "cap": 50.0}), (32, 4, 1, 256, {"norm": "heads"}),
        (256, 64, 8, 64, {"sinks": True, "window": 128}), (32, 32, 32, 128, {"norm": "width"}), (32, 9, 3, 64, {}), (32, 32, 4, 96, {}),
        (32, 32, 8, 512, {}),
    ):  # fmt: skip
        shape = AttentionShape(2, heads, kv_heads, dim, 1e-6, dim**-0.5, dim, score_cap=own.get("cap"))
        cache = TritonOps(CPU).make_cache(shape, dtype, CPU)
        cache.allocate(4, 128, rows, 64)
        cache.begin_step(torch.zeros(FIELDS, rows, dtype=torch.int64), [2 * (empty(512, dim // 2, dtype=torch.float32),)])
        norms = {"heads": (dim, dim), "width": (heads * dim, kv_heads * dim), None: ()}[own.get("norm")]
        norms = dict(zip(("q_norm", "k_norm"), (empty(n, dtype=dtype) for n in norms), strict=False))
        sinks = empty(heads, dtype=dtype) if own.get("sinks") else None
        cache.attend(0, empty(rows, (heads + 2 * kv_heads) * dim, dtype=dtype), LayerAttention(**norms, window=own.get("window"), sinks=sinks))


def compile_products_in_4_bits(dtype):
    """The product with weights in 4 bits at sizes of Qwen2.5-7B, for every entry of its table of settings."""
    for outputs, inputs, rank in ((4608, 3584, 48), (3584, 18_944, 0)):
        blocks = outputs * inputs // 64
        code, wide = empty(16, dtype=torch.float32), empty(blocks // 256, dtype=torch.float32)
        nested = NestedScales(wide, wide, empty(256, dtype=torch.float32))
        for scales in (
            BlockScales("nf4", 64, code, empty(blocks, dtype=torch.uint8), nested),
            BlockScales("nf4", 64, code, empty(blocks, dtype=torch.float32)),
        ):
            weight = QuantizedWeight(empty(outputs * inputs // 2, dtype=torch.uint8), scales, (outputs, inputs))
            for rows, _ in four_bit_kernels.SETTINGS:
                a, bias = (empty(rank, inputs, dtype=dtype), empty(outputs, dtype=dtype)) if rank else (None, None)
                four_bit_kernels.multiply(empty(rows, inputs, dtype=dtype), weight, bias, a)


def compile_experts(dtype):
    """A mixture of experts in both layouts of weights, for every entry of the table of blocks."""
    hidden, inner, count, top_k = 2048, 768, 128, 8
    for is_transposed in (False, True):
        sizes = ((count, hidden, 2 * inner), (count, inner, hidden)) if is_transposed else ((count, 2 * inner, hidden), (count, hidden, inner))
        gate_up, down = (empty(*size, dtype=dtype) for size in sizes)
        gating = Gating(alpha=1.702, limit=7.0, shift=1.0) if is_transposed else Gating()
        own = ExpertWeights(gate_up, down, is_transposed=is_transposed, is_interleaved=is_transposed, gating=gating)
        for rows in (1, 32, 256, 1024):
            x, routing = empty(rows, hidden, dtype=dtype), Routing(top_k, True)
            experts, weights, groups = expert_kernels.route(x, empty(count, hidden, dtype=dtype), None, routing, torch.zeros(rows, dtype=torch.int64))
            parts = expert_kernels.apply_experts(x, experts, weights, own, groups)
            parts.sum()
            TritonOps(CPU).add_norm(x, parts, empty(hidden, dtype=dtype), 1e-6)


def compile_modules(dtype):
    """The kernels of the modules decoder, at the sizes of Qwen3.5-4B and of a Mamba-2."""
    rows, heads, key_heads, dim = 32, 32, 16, 128
    q, k = (empty(rows, key_heads, 1, dim, dtype=dtype) for _ in range(2))
    elementwise_kernels.rotate(q, k, *2 * (empty(1, 1, dim // 2, dtype=dtype),))
    for size in (64, 128, 256):
        keys, position = empty(rows, 4, 384, size, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
        query = empty(rows, 16, 1, size, dtype=dtype)
        row_attention_kernels.store_tokens(keys[:, :, :1], keys[:, :, :1], keys, keys, position)
        row_attention_kernels.attend_rows(query, keys, keys, position, 0.1)
        row_attention_kernels.attend_rows(query, keys, keys, position, 0.1, window=128, softcap=50.0, sinks=empty(16, dtype=dtype))
    state = empty(rows, heads, dim, dim, dtype=torch.float32)
    channels = (2 * key_heads + heads) * dim
    state_kernels.conv_step(empty(rows, channels, 1, dtype=dtype), empty(rows, channels, 4, dtype=dtype), empty(channels, 4, dtype=dtype), None, True)
    vectors = [empty(rows, 1, n, dim, dtype=dtype) for n in (key_heads, key_heads, heads)]
    state_kernels.delta_rule(*vectors, empty(rows, 1, heads, dtype=torch.float32), empty(rows, 1, heads, dtype=dtype), state, True)
    per_head = [empty(48, dtype=torch.float32) for _ in range(3)]
    groups = [empty(rows, 1, 1, dim, dtype=dtype) for _ in range(2)]
    state_kernels.ssm(
        empty(rows, 1, 48, 64, dtype=dtype), empty(rows, 1, 48, dtype=dtype), per_head[0], *groups, *per_head[1:],
        empty(rows, 48, 64, dim, dtype=torch.float32), is_softplus=True, limits=(0.0, float("inf")), dtype=dtype,
    )  # fmt: skip
    state_kernels.norm(empty(rows, 1, 4096, dtype=dtype), empty(rows, 1, 4096, dtype=dtype), empty(4096, dtype=dtype), 1e-6, 0, 1, 4096)
    compile_delta_net(dtype, rows, heads, key_heads, dim)


def compile_delta_net(dtype, rows, heads, key_heads, dim):
    per = heads // key_heads
    inputs = DeltaInputs(
        *(empty(rows, key_heads, dim, dtype=dtype) for _ in range(2)), *(empty(rows, key_heads, per, dim, dtype=dtype) for _ in range(2)),
        *(empty(rows, key_heads, per, dtype=dtype) for _ in range(2)),
    )  # fmt: skip
    channels = (2 * key_heads + heads) * dim
    weights = DeltaWeights(
        conv=empty(channels, 4, dtype=dtype), conv_bias=None, decay=empty(heads, dtype=torch.float32),
        decay_bias=empty(heads, dtype=torch.float32), norm=empty(dim, dtype=dtype), eps=1e-6,
        offset=0, gate_kind=2, beta_scale=1.0, is_silu=True,
    )  # fmt: skip
    delta_net_kernels.delta_net(inputs, weights, empty(rows, channels, 4, dtype=dtype), empty(rows, heads, dim, dim, dtype=torch.float32))


def compile_update(dtype):
    """The kernels of the update."""
    gate = empty(256, 8960, dtype=dtype)
    update_kernels.silu_mul_backward(gate, gate, update_kernels.silu_mul(gate, gate))
    for with_gradient in (False, True):
        update_kernels.softmax_statistics(empty(256, 152_064, dtype=dtype), torch.zeros(256, dtype=torch.int64), 1.0, with_gradient)
    for width, columns, gating in ((5376, 5376, "none"), (128, 4096, "after"), (8192, 8192, "before"), (16384, 16384, "before")):
        x, gate = (empty(4, columns, dtype=dtype).requires_grad_() for _ in range(2))
        out = layer_kernels.Norm.apply(x, None if gating == "none" else gate, empty(columns, dtype=dtype), width, 1e-6, 1.0, gating)
        out.backward(torch.ones_like(out))
    for bias in (None, empty(6144, dtype=dtype)):
        x = empty(2, 100, 6144, dtype=dtype).transpose(1, 2).requires_grad_()
        out = layer_kernels.CausalConvolution.apply(x, empty(6144, 4, dtype=dtype), bias, bias is None)
        out.backward(torch.ones_like(out))


PARTS = [compile_decoder, compile_attention, compile_products_in_4_bits, compile_experts, compile_modules, compile_update]


def check(part, capability, dtype, monkeypatch):
    limit = SHARED_KB[capability] * 1024
    monkeypatch.setattr(shared_memory, "DEFAULT_BYTES", limit)  # which a GPU's properties give
    with compiling_for(capability) as compiled:
        part(dtype)
    assert compiled
    assert {name: size for name, size in compiled.items() if size > limit} == {}
    return {name.split()[0] for name in compiled}


def name_kernels():
    """The kernels of the package that are started from Python, by the files that have them."""
    names = set()
    for file in [*(ROOT / "grpo_core" / "sampling" / "kernels").glob("*_kernels.py"), *(ROOT / "grpo_core" / "model").glob("*kernels.py")]:
        text = file.read_text()
        module = importlib.import_module(".".join(Path(file).relative_to(ROOT).with_suffix("").parts))
        names |= {name for name, value in vars(module).items() if isinstance(value, JITFunction) and f"{name}[" in text}
    return names


def test_an_attention_is_lowered_to_what_fits_and_no_further(monkeypatch):
    def fit(keys, stages, dim, item, kb):
        monkeypatch.setattr(shared_memory, "DEFAULT_BYTES", kb * 1024)
        return shared_memory.fit_attention(keys, stages, bytes_per_key=2 * dim * item, bytes_of_queries=16 * dim * item, device=CPU)

    assert fit(64, 3, 128, 2, 99) == (64, 3)  # the sizes that were measured stay
    assert fit(32, 3, 256, 2, 99) == (32, 3)
    assert fit(32, 3, 512, 2, 99) == (32, 2)
    assert fit(32, 1, 256, 4, 99) == (32, 1) and fit(32, 1, 256, 4, 64) == (16, 1)


def test_products_in_4_bits_fit_into_a_card_with_99_kb(monkeypatch):
    assert check(compile_products_in_4_bits, 86, torch.bfloat16, monkeypatch) == {"_multiply", "_add_parts"}


@pytest.mark.soak
@pytest.mark.parametrize("capability", SHARED_KB)
def test_every_kernel_fits_into_the_shared_memory_of_a_consumer_card(capability, monkeypatch):
    dtype = torch.float16 if capability < 80 else torch.bfloat16
    assert set().union(*(check(part, capability, dtype, monkeypatch) for part in PARTS)) == name_kernels()


@pytest.mark.soak
@pytest.mark.parametrize("capability", [75, 86])
@pytest.mark.parametrize("part", PARTS)
def test_every_kernel_fits_in_float32(part, capability, monkeypatch):
    check(part, capability, torch.float32, monkeypatch)
