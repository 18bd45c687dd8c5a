"""How the modules decoder finds what kernels may compute, with stand-ins for the kernels in torch."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from grpo_core.sampling import cache_check
from grpo_core.sampling.cache_check import check_steps, find_method
from grpo_core.sampling.decode_ops import TorchOps
from grpo_core.sampling.live_rows import begin
from grpo_core.sampling.modules import delta_net, elementwise, row_attention
from grpo_core.sampling.modules.layer_memory import LayerMemory
from grpo_core.sampling.modules.module_model import ModuleModel
from grpo_core.sampling.modules.row_attention import RowAttention


def make_model(name, **own):
    torch.manual_seed(0)
    return tiny_models.make_model(tiny_models.make_config(name, 61, **own))


def rotate_halves(original):
    """As in Llama, of the first dimensions."""

    def rotate(x, cos, sin):
        size = cos.shape[-1]
        first, second, rest = x.split([size // 2, size // 2, x.shape[-1] - size], dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return torch.cat([x[..., :size] * cos[:, None] + turned * sin[:, None], rest], dim=-1)

    return lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))


def multiply_gate(gate, up, activation):
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


ELEMENTWISE = SimpleNamespace(apply_rotary_pos_emb=rotate_halves, multiply_gate=multiply_gate)


@pytest.mark.parametrize("name, mlps", [("qwen3_5_text", 2), ("gemma3_text", 2), ("lfm2", 2), ("phi3", 2), ("granitemoehybrid", 3)])
def test_gated_mlps_and_rotations_of_halves_are_found(name, mlps):
    model = make_model(name, **({"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]} if name == "lfm2" else {}))
    rotations, forwards = [], []
    for substitute in elementwise.find_elementwise(model, ELEMENTWISE):
        (forwards if substitute.name == "forward" else rotations).append(substitute)
    assert [substitute.name for substitute in rotations] == ["apply_rotary_pos_emb"] and len(forwards) == mlps
    x = torch.randn(2, 5, 32)
    for module, _, function in forwards:
        torch.testing.assert_close(function(x), module(x))


def test_a_kernel_that_differs_is_not_used():
    model = make_model("qwen3_5_text")
    wrong = SimpleNamespace(
        apply_rotary_pos_emb=lambda original: lambda *arguments: tuple(1.01 * x for x in original(*arguments)),
        multiply_gate=lambda *arguments: 1.01 * multiply_gate(*arguments),
    )
    fails = SimpleNamespace(apply_rotary_pos_emb=lambda original: lambda *arguments: 1 / 0, multiply_gate=lambda *arguments: 1 / 0)
    assert elementwise.find_elementwise(model, wrong) == elementwise.find_elementwise(model, fails) == []


def test_a_rotation_of_neighbours_is_left_alone():
    assert not any(substitute.owner is cohere for substitute in elementwise.find_elementwise(make_model("cohere"), ELEMENTWISE))


def test_an_exact_gelu_is_not_taken_for_its_approximation():
    model = make_model("qwen3_5_text", hidden_act="gelu").to(torch.bfloat16)
    assert [s.name for s in elementwise.find_elementwise(model, ELEMENTWISE)] == ["apply_rotary_pos_emb"]


def step_in_torch(x, weights, conv_state, state):
    """One token of a gated delta net, as delta_net_kernels.py computes it."""
    rows, heads, key_dim, _ = state.shape
    channels = torch.cat([y.flatten(1) for y in (x.q, x.k, x.v)], dim=1)
    mixed = qwen.causal_conv1d_update(channels[..., None], conv_state, weights.conv, weights.conv_bias, "silu" if weights.is_silu else None)
    key_heads = x.q.shape[1]
    q, k, v = mixed[..., 0].split([key_heads * key_dim] * 2 + [x.v[0].numel()], dim=1)
    q, k = (y.view(rows, key_heads, key_dim).repeat_interleave(heads // key_heads, dim=1)[:, None] for y in (q, k))
    g = -weights.decay.float().exp() * F.softplus(x.a.flatten(1).float() + weights.decay_bias)
    beta = x.b.flatten(1).sigmoid() * weights.beta_scale
    out, after = qwen.torch_recurrent_gated_delta_rule(
        q, k, v.view(rows, 1, heads, -1), g=g[:, None], beta=beta[:, None], initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    state.copy_(after)
    return norm(out.flatten(0, 2), x.z.reshape(-1, x.z.shape[-1]), weights.norm, weights.eps, weights.offset, weights.gate_kind, 0).view(rows, -1)


def norm(x, gate, weight, eps, offset, gate_kind, group):
    x = x * F.silu(gate) if gate_kind == 1 else x
    x = F.rms_norm(x, weight.shape, eps=eps) * (offset + weight)
    return x * F.silu(gate) if gate_kind == 2 else x


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next", "olmo_hybrid"])
def test_gated_delta_nets_are_found_and_compared_with_the_module(name):
    own = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, **({"linear_allow_neg_eigval": True} if name == "olmo_hybrid" else {})}
    model, calls = make_model(name, **own), []
    live = begin("cached", model, [[3, 4, 5], [6, 7, 8]], 0)
    with torch.no_grad():
        live.prefill()
    before = [layer.recurrent_states[0].clone() for layer in live.cache.layers if hasattr(layer, "recurrent_states")]

    def find(factor):
        kernels = SimpleNamespace(delta_net=lambda *arguments: calls.append(1) or factor * step_in_torch(*arguments))
        return delta_net.find_delta_nets(model, live.cache, kernels, SimpleNamespace(norm=norm))

    assert len(find(1.0)) == 1 and len(calls) == 1 and find(1.01) == []
    after = [layer.recurrent_states[0] for layer in live.cache.layers if hasattr(layer, "recurrent_states")]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))  # law 13


def attention_by(change, fails=False):
    def attend_rows(query, keys, values, position, scale, *, window, is_chunked, softcap, sinks):
        assert not fails
        calls.append(1)
        first = None if window is None else position - position % window if is_chunked else position - window + 1
        return change * row_attention.attend_rows(query, keys, values, position, first, scale, softcap=softcap, sinks=sinks)

    calls = []
    return RowAttention(SimpleNamespace(MAX_DIM=256, attend_rows=attend_rows, store_tokens=row_attention.store_tokens)), calls


def test_attention_by_a_kernel_is_compared_once_for_each_kind_of_call():
    query, (keys, values), position = torch.randn(3, 4, 1, 16), torch.randn(2, 3, 2, 9, 16), torch.tensor([0, 8, 4])
    layer, other = LayerMemory(SimpleNamespace(sliding_window=None)), LayerMemory(SimpleNamespace(sliding_window=3), "chunked_attention")
    want = [row_attention.attend_rows(query, keys, values, position, one.first_visible(position), 0.3) for one in (layer, other)]
    assert not torch.allclose(*want)
    for change, fails, count in ((1.0, False, 6), (1.01, False, 2), (1.0, True, 0)):
        attention, calls = attention_by(change, fails)
        for _ in range(2):
            for kind, right in zip((layer, other), want, strict=True):
                torch.testing.assert_close(attention.attend(query, keys, values, position, kind, 0.3), right)
        assert len(calls) == count  # two trials, and four calls if the kernel is right
    wide = torch.randn(3, 4, 1, 300), torch.randn(3, 2, 9, 300), torch.randn(3, 2, 9, 300)
    attention, calls = attention_by(1.0)
    attention.attend(*wide, position, layer, 0.3)
    assert calls == []  # its heads are wider than the kernel supports


def test_a_kernel_that_stores_wrong_places_is_not_used():
    (keys, values), position = torch.zeros(2, 3, 2, 9, 16), torch.tensor([0, 8, 4])
    k, v = torch.randn(2, 3, 2, 1, 16)
    attention, _ = attention_by(1.0)
    attention._kernels.store_tokens = lambda k, v, keys, values, position: row_attention.store_tokens(k, k, keys, values, position)
    attention.store(k, v, keys, values, position)
    row = torch.arange(3)
    assert torch.equal(values[row, :, position], v[:, :, 0]) and torch.equal(keys[row, :, position], k[:, :, 0])


@pytest.mark.parametrize("name, dtype, most", [("granitemoehybrid", torch.bfloat16, 15), ("granitemoehybrid", torch.float32, 11), ("gemma3_text", torch.float32, 8)])
def test_few_forwards_show_how_a_model_can_be_decoded(name, dtype, most, monkeypatch):
    """The first call computes them one after another; of 40 layers each takes a fifth of a second on a GPU."""
    monkeypatch.setattr(cache_check, "ROUGH_TOLERANCE", 0)  # so that rows are decoded without padding, too, in 16 bits
    model, calls = make_model(name).to(dtype), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert find_method(model, 0) == "padded" and len(calls) <= most
    calls.clear()
    computation = ModuleModel(model, "padded", 0, TorchOps())
    assert len(calls) <= 7
    steps = []
    assert check_steps(computation, model, lambda step: steps.append(step()))
    assert len(steps) == 1  # which is a step of the check
