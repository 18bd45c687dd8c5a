"""The Triton kernels against their definitions in torch. On a CPU they run in Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest tests/test_decode_kernels.py        (where triton is installed)
"""

import os

import pytest
import torch

from grpo_core.batch import SamplingParams
from grpo_core.sampling import decode_ops as ops

# Without either, every test is reported as skipped; with one of them, a missing triton is a failure.
pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else [pytest.mark.gpu]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def close(ours, want, atol=1e-5):
    torch.testing.assert_close(ours, want, atol=atol, rtol=1e-5)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def both():
    from grpo_core.sampling.kernels.decode_kernels import TritonOps  # needs triton, which only torch for a GPU brings

    torch.manual_seed(0)
    return TritonOps(DEVICE), ops.TorchOps()


@pytest.mark.parametrize("width", [96, 1536])
def test_add_norm(width):
    triton_ops, torch_ops = both()
    x, delta, weight = random(5, width), random(5, width + 16)[:, :width], random(width)
    ours, theirs = x.clone(), x.clone()
    close(triton_ops.add_norm(ours, delta, weight, 1e-6), torch_ops.add_norm(theirs, delta, weight, 1e-6))
    close(ours, theirs)
    close(ours, x + delta)
    close(triton_ops.add_norm(ours, None, weight, 1e-6), torch_ops.add_norm(theirs, None, weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms_x, norms_delta, offset, scale", [
    (True, True, 1.0, 1.0), (True, True, 0.0, 1.0), (False, True, 0.0, 1.0), (True, False, 0.0, 0.3), (True, True, 1.0, 0.3), (True, False, 1.0, 1.0),
])  # fmt: skip
def test_add_norm_with_a_norm_or_a_factor_of_what_is_added(norms_x, norms_delta, offset, scale, dtype):
    triton_ops, torch_ops = both()
    x, delta, weight, delta_weight = (random(*shape, dtype=dtype) for shape in ((5, 96), (5, 112), (96,), (96,)))
    delta, tolerance = delta[:, :96], 1e-5 if dtype == torch.float32 else 0.15
    how = {"delta_weight": delta_weight if norms_delta else None, "offset": offset, "delta_scale": scale}
    ours, theirs = x.clone(), x.clone()
    normed = [
        one.add_norm(y, delta, weight if norms_x else None, 1e-6, **how) for one, y in ((triton_ops, ours), (torch_ops, theirs))
    ]
    close(*normed, tolerance)
    close(ours, theirs, tolerance)
    wide = delta.float() * (delta.float().pow(2).mean(1, keepdim=True) + 1e-6).rsqrt() * (offset + delta_weight.float())
    close(ours.float(), x.float() + scale * (wide if norms_delta else delta.float()), tolerance)
    assert (normed[0] is ours) == (not norms_x)
    assert triton_ops.add_norm(ours, None, None, 1e-6) is ours


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_mul_of_a_part_of_wider_rows(activation):
    triton_ops, torch_ops = both()
    x = 3 * random(5, 3 * 700)[:, :1400]
    close(triton_ops.gate_mul(x, activation), torch_ops.gate_mul(x, activation))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("greedy", [False, True])
def test_draw_with_rows_that_are_done_and_tokens_that_cannot_be(greedy, temperature):
    triton_ops, torch_ops = both()
    rows, width, vocabulary = 40, 4, 9000
    noise = torch.rand(rows, width, dtype=torch.double).to(DEVICE)
    state = torch.zeros(ops.FIELDS, rows, dtype=torch.long)
    state[ops.ROW], state[ops.LIMIT] = torch.randperm(rows), 2
    state[ops.DRAWN, [1, 3]] = state[ops.DONE, 2] = 1
    logits = 3 * random(rows, vocabulary)
    logits += 4 * random(rows, 3).repeat_interleave(4096, dim=1)[:, :vocabulary]  # chunks of different weight
    logits[0, 5:] = logits[1, 4096:8192] = -torch.inf
    logits[3, 7] = 100  # an end-of-sequence token
    state[ops.GIVEN, [1, 4, 5]] = torch.tensor([1, 1, 2])  # the last token given before; given tokens, one an end
    given = torch.randint(10, vocabulary, (rows, width))
    given[state[ops.ROW, 5]] = 7
    got = []
    for one in (triton_ops, torch_ops):
        tables = ops.Tables(
            noise,
            given.clone().to(DEVICE),
            torch.zeros(rows, width, device=DEVICE),
            torch.zeros(rows, dtype=torch.long, device=DEVICE),
            torch.zeros(rows, dtype=torch.bool, device=DEVICE),
            torch.tensor([3, 7], device=DEVICE),
        )
        mine = state.clone().to(DEVICE)
        one.set_table_width(width)
        one.draw(logits, mine, tables, SamplingParams(temperature, greedy))
        got.append((mine, tables))
    (ours, table), (theirs, other) = got
    assert torch.equal(ours, theirs) and torch.equal(table.ids, other.ids)
    assert torch.equal(table.lengths, other.lengths) and torch.equal(table.ended, other.ended)
    assert table.ended[state[ops.ROW, 3]] and ours[ops.DONE, 1:4].all() and not ours[ops.DONE].all()
    for i in (4, 5):
        row = state[ops.ROW, i]
        assert table.ids[row, 0] == given[row, 0] == ours[ops.TOKEN, i] and table.logprobs[row, 0] == 0
        assert not table.ended[row] and ours[ops.DONE, i] == 0 and ours[ops.DRAWN, i] == table.lengths[row] == 1
    assert table.logprobs[state[ops.ROW, 1], 1] < 0
    close(table.logprobs, other.logprobs)


def draw_one(logits, uniform, greedy=False):
    """The tables after one draw of one row."""
    state = torch.zeros(ops.FIELDS, 1, dtype=torch.long, device=DEVICE)
    state[ops.LIMIT] = 1
    tables = ops.Tables(
        torch.full((1, 1), uniform, dtype=torch.double, device=DEVICE),
        *(torch.zeros(1, 1, dtype=kind, device=DEVICE) for kind in (torch.long, torch.float)),
        *(torch.zeros(1, dtype=kind, device=DEVICE) for kind in (torch.long, torch.bool)),
        torch.tensor([0], device=DEVICE),
    )
    triton_ops, _ = both()
    triton_ops.set_table_width(1)
    triton_ops.draw(logits, state, tables, SamplingParams(greedy=greedy))
    return tables


@pytest.mark.parametrize("uniform, want", [(0.0, 1), (0.5, 1), (1 - 1e-16, 2)])
def test_draw_at_the_ends_never_takes_a_token_without_probability(uniform, want):
    logits = torch.full((1, 9000), -torch.inf, device=DEVICE)
    logits[0, 1], logits[0, 2] = 1.0, -2.0
    tables = draw_one(logits, uniform)
    assert tables.ids.item() == want
    close(tables.logprobs[0], logits.log_softmax(-1)[0, want][None])


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("greedy", [False, True])
def test_draw_from_broken_logits_stays_in_the_vocabulary(value, greedy):
    assert 0 <= draw_one(torch.full((1, 9000), value, device=DEVICE), 0.5, greedy).ids.item() < 9000


PLAIN = {"rotated": 1.0, "norm": "", "offset": 0.0, "cap": None, "windows": (None, None), "rotations": (0, 0), "sinks": False, "dtype": torch.float32}


@pytest.mark.parametrize("rows, heads, kv_heads, dim, own", [
    (5, 6, 2, 32, {"norm": "head"}),
    (40, 4, 4, 16, {}),
    (300, 9, 3, 24, {}),
    (3, 12, 2, 128, {}),
    (5, 4, 1, 64, {"norm": "head", "offset": 1.0, "windows": (17, None), "rotations": (1, 0)}),  # as Gemma 3
    (5, 4, 2, 32, {"cap": 1.5, "windows": (None, 40)}),  # as Gemma 2
    (5, 3, 3, 32, {"rotated": 0.75}),  # as Phi-4-mini
    (5, 4, 2, 32, {"rotated": 0.75, "norm": "head", "offset": 1.0}),
    (5, 4, 2, 32, {"rotations": (0, None)}),  # as SmolLM3
    (5, 6, 2, 24, {"norm": "width", "windows": (1, 64)}),  # as OLMo 3
    (300, 2, 2, 16, {"windows": (30, 70)}),
    (3, 16, 2, 32, {"windows": (20, None), "sinks": True}),  # as gpt-oss
    (300, 2, 1, 16, {"sinks": True}),
    (5, 4, 1, 256, {"norm": "head", "offset": 1.0, "windows": (40, None), "dtype": torch.float16}),
])  # fmt: skip
def test_attention_with_ragged_prompts_shared_by_rows_in_any_slot(rows, heads, kv_heads, dim, own):
    triton_ops, torch_ops = both()
    own, prompts, width, length = PLAIN | own, 3, 70, 90
    rotated = int(dim * own["rotated"])
    shape = ops.AttentionShape(2, heads, kv_heads, dim, 1e-6, 0.3 * dim**-0.5, rotated, own["offset"], own["cap"])
    dtype = own["dtype"]
    ours, theirs = (one.make_cache(shape, dtype, DEVICE) for one in (triton_ops, torch_ops))
    for cache in (ours, theirs):
        cache.allocate(prompts, width, rows, length)
    ours.buffer.fill_(torch.nan)  # what nobody wrote must not be read
    for layer in range(2):
        keys, values = (random(prompts, kv_heads, width, dim, dtype=dtype) for _ in range(2))
        ours.store_prompts(layer, 0, keys, values), theirs.store_prompts(layer, 0, keys, values)
    state = torch.zeros(ops.FIELDS, rows, dtype=torch.long)
    state[ops.PROMPT] = torch.randint(0, prompts, (rows,))
    state[ops.START] = torch.tensor([70, 3, 64])[state[ops.PROMPT]]
    state[ops.DRAWN], state[ops.SLOT] = 1, torch.randperm(rows)
    state = state.to(DEVICE)
    straight = state.clone()
    straight[ops.SLOT] = torch.arange(rows)
    theirs.add_rows(straight)
    rotations = [tuple(random(200, rotated // 2, dtype=dtype) for _ in range(2)) for _ in range(2)]
    sizes = {"": (), "head": (dim, dim), "width": (heads * dim, kv_heads * dim)}[own["norm"]]
    weights = [random(size, dtype=dtype) for size in sizes] or [None, None]
    for _ in range(3 if rows < 200 else 1):
        for layer in range(2):
            sinks = random(heads, dtype=dtype) if own["sinks"] else None
            layer_own = ops.LayerAttention(*weights, own["rotations"][layer], own["windows"][layer], sinks)
            qkv = random(rows, (heads + 2 * kv_heads) * dim + 8, dtype=dtype)[:, :-8]
            ours.begin_step(state, rotations), theirs.begin_step(straight, rotations)
            close(ours.attend(layer, qkv, layer_own), theirs.attend(layer, qkv, layer_own), 2e-4 if dtype == torch.float32 else 0.03)
        state[ops.DRAWN] += 1
        straight[ops.DRAWN] += 1


def test_attention_in_the_shared_memory_of_a_smaller_card(monkeypatch):
    """Fewer keys at once, as on a card with 64 KB."""
    from grpo_core.sampling.kernels import shared_memory

    sizes = []
    monkeypatch.setattr(shared_memory, "available_bytes", lambda device: sizes.append(device) or 64 * 1024)
    test_attention_with_ragged_prompts_shared_by_rows_in_any_slot(2, 4, 1, 256, {"windows": (40, None)})
    assert sizes
