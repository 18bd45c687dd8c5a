"""The kernels of the modules decoder against what they replace. On a CPU they run in Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest tests/test_state_kernels.py        (where triton is installed)
"""

import os

import pytest
import tiny_models
import torch
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from grpo_core.model.trial import is_same
from grpo_core.sampling.live_rows import begin
from grpo_core.sampling.modules import delta_net, elementwise, module_model, row_attention
from grpo_core.sampling.modules.module_model import ModuleModel

pytest.importorskip("triton")
HAS_GPU = torch.cuda.is_available()
RUNS = HAS_GPU or os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not RUNS, reason="needs a GPU, or TRITON_INTERPRET=1")
if RUNS:
    from grpo_core.sampling.kernels import delta_net_kernels, elementwise_kernels, row_attention_kernels
    from grpo_core.sampling.kernels import state_kernels as kernels
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
DOT_DTYPES = DTYPES if HAS_GPU else [torch.float32]  # the interpreter cannot multiply bfloat16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def close(ours, theirs, dtype):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), **({"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, width, activation, has_bias", [(1100, 4, "silu", False), (70, 3, None, True)])
def test_a_step_of_the_convolution(dtype, channels, width, activation, has_bias):
    state, weight = random(5, channels, width, dtype=dtype), random(channels, width, dtype=dtype)
    bias = random(channels, dtype=dtype) if has_bias else None
    x = random(5, 1, channels + 8, dtype=dtype)[..., :channels].transpose(1, 2)  # a view, as a split of a projection gives
    mine = state.clone()
    theirs = qwen.causal_conv1d_update(x, state, weight, bias, activation)
    ours = kernels.causal_conv1d_update(None)(x, mine, weight, bias, activation)
    close(ours, theirs, dtype)
    assert torch.equal(mine, state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_heads, heads, key_dim, value_dim", [(16, 32, 128, 128), (2, 2, 8, 24)])
def test_a_step_of_the_gated_delta_rule(dtype, key_heads, heads, key_dim, value_dim):
    q, k = (random(3, 1, key_heads, key_dim, dtype=dtype).repeat_interleave(heads // key_heads, dim=2) for _ in range(2))
    v, g, beta = random(3, 1, heads, value_dim, dtype=dtype), -random(3, 1, heads).abs(), random(3, 1, heads, dtype=dtype).sigmoid()
    state = random(3, heads, key_dim, value_dim)
    mine = state.clone()
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    theirs, after = qwen.torch_recurrent_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, **options)
    rule = kernels.torch_recurrent_gated_delta_rule(None)
    ours, same = rule(q, k, v, g=g, beta=beta, initial_state=mine, **options)
    assert same is mine
    close(ours, theirs, dtype)
    torch.testing.assert_close(mine, after, atol=1e-4, rtol=1e-4)
    shared = state.clone()  # each key head serves several heads, without being repeated
    step = heads // key_heads
    again, _ = rule(q[:, :, ::step], k[:, :, ::step], v, g=g, beta=beta, initial_state=shared, **options)
    assert torch.equal(again, ours) and torch.equal(shared, mine)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, groups, channels, size", [(48, 1, 64, 128), (6, 3, 20, 16)])
def test_a_step_of_the_state_space_model(dtype, heads, groups, channels, size):
    state = random(3, heads, channels, size)
    mine = state.clone()
    x, b, c = random(3, heads, channels, dtype=dtype), random(3, groups, size, dtype=dtype), random(3, groups, size, dtype=dtype)
    dt, bias, d = random(3, 1, heads, dtype=dtype), random(heads, dtype=dtype), random(heads, dtype=dtype)
    a = -random(heads).exp()
    spread = [dt.transpose(1, 2).expand(-1, -1, channels), a[:, None, None].expand(-1, channels, size), b, c, d[:, None].expand(-1, channels)]
    options = {"z": None, "dt_bias": bias[:, None].expand(-1, channels), "dt_softplus": True}
    wide = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    theirs = granite.mamba2_selective_state_update(state, x.float(), *[value.float() for value in spread], **wide)
    ours = kernels.mamba2_selective_state_update(None)(mine, x, *spread, **options)
    bound = 1e-5 if dtype == torch.float32 else 0.005  # the rounding of the outputs; all else is computed in float32
    assert ours.dtype == dtype and (ours - theirs).norm() < bound * theirs.norm()
    torch.testing.assert_close(mine, state, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("starts", [False, True])
def test_prompts_of_the_gated_delta_rule(starts):
    q, k, v = random(2, 9, 2, 16), random(2, 9, 2, 16), random(2, 9, 4, 24)
    g, beta = -random(2, 9, 4).abs(), random(2, 9, 4).sigmoid()
    options = {"initial_state": random(2, 4, 16, 24) if starts else None, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    q, k = (x.repeat_interleave(2, dim=2) for x in (q, k))
    theirs, after = qwen.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, **options)
    ours, mine = kernels.torch_chunk_gated_delta_rule(None)(q, k, v, g=g, beta=beta, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine, after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("starts", [False, True])
def test_prompts_of_the_state_space_model(starts):
    x, dt, b, c = random(2, 9, 6, 20), random(2, 9, 10)[..., :6], random(2, 9, 3, 16), random(2, 9, 3, 16)
    a, d, bias = -random(6).exp(), random(6), random(6)
    options = {"D": d, "dt_bias": bias, "dt_softplus": True, "return_final_states": True, "dt_limit": (0.1, 0.9)}
    options["initial_states"] = random(2, 6, 20, 16) if starts else None
    theirs, after = granite.mamba2_chunk_scan(x, dt, a, b, c, 4, **options)
    ours, mine = kernels.mamba2_chunk_scan(None)(x, dt, a, b, c, 4, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine, after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype):
    x, gate, weight = random(7, 3, 96, dtype=dtype), random(7, 3, 104, dtype=dtype)[..., :96], random(96, dtype=dtype)
    plain = qwen.Qwen3_5RMSNorm(96).to(DEVICE, dtype)
    after = qwen.Qwen3_5RMSNormGated(96).to(DEVICE, dtype)
    before = granite.GraniteMoeHybridRMSNormGated(96, **({"group_size": 96} if "group_size" in granite.GraniteMoeHybridRMSNormGated.__init__.__code__.co_varnames else {})).to(DEVICE, dtype)
    for module in (plain, after, before):
        module.weight.data.copy_(weight)
    with torch.no_grad():
        close(kernels.norm(x, None, weight, 1e-6, 1, 0, 96), plain(x), dtype)
        close(kernels.norm(x, gate, weight, 1e-6, 0, 2, 96), after(x, gate), dtype)
        close(kernels.norm(x, gate, weight, 1e-6, 0, 1, 96), before(x, gate), dtype)
        heads = random(7, 1, 300, dtype=dtype)[..., :288].view(7, 1, 3, 96)  # heads of a projection with more columns
        close(kernels.norm(heads, None, weight, 1e-6, 1, 0, 96), plain(heads), dtype)
        grouped = kernels.norm(x, gate, weight, 1e-6, 0, 1, 32)
        close(grouped.view(7, 3, 3, 32)[:, :, 1], kernels.norm(x[..., 32:64], gate[..., 32:64], weight[32:64], 1e-6, 0, 1, 32), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_heads, heads, key_dim, value_dim, width, columns", [(2, 4, 128, 128, 4, 64), (1, 3, 24, 40, 3, 16), (2, 2, 8, 8, 2, 64)])
@pytest.mark.parametrize("has_bias, gate_kind, offset, beta_scale", [(False, 2, 0, 1.0), (True, 1, 1, 2.0)])
def test_a_step_of_a_gated_delta_net(dtype, key_heads, heads, key_dim, value_dim, width, columns, has_bias, gate_kind, offset, beta_scale):
    """The convolution, the rule and the norm, each by transformers' functions or the kernel that is tested above."""
    sizes = [key_heads * key_dim] * 2 + [heads * value_dim] * 2 + [heads] * 2
    channels, shared = sum(sizes[:3]), heads // key_heads
    joined, more = random(3, 1, sum(sizes), dtype=dtype), random(3, channels, width, dtype=dtype)
    q, k, v, z, b, a = joined[:, 0].split(sizes, dim=-1)
    conv, bias = random(channels, width, dtype=dtype), random(channels, dtype=dtype) if has_bias else None
    decay, decay_bias, norm = random(heads), random(heads, dtype=dtype), random(value_dim, dtype=dtype)
    state = random(3, heads, key_dim, value_dim)
    own, own_state = more.clone(), state.clone()
    views = (*(x.unflatten(1, (key_heads, -1)) for x in (q, k)), *(x.unflatten(1, (key_heads, shared, -1)) for x in (v, z)))
    inputs = delta_net.DeltaInputs(*views, *(x.unflatten(1, (key_heads, shared)) for x in (b, a)))
    weights = delta_net.DeltaWeights(conv, bias, decay, decay_bias, norm, 1e-6, offset, gate_kind, beta_scale, True)
    ours = delta_net_kernels.delta_net(inputs, weights, own, own_state, columns=columns)

    mixed = qwen.causal_conv1d_update(joined[..., :channels].transpose(1, 2), more, conv, bias, "silu").transpose(1, 2)
    q, k, v = (x.unflatten(2, (n, -1)) for x, n in zip(mixed.split(sizes[:3], dim=-1), (key_heads, key_heads, heads), strict=True))
    q, k = (x.repeat_interleave(shared, dim=2) for x in (q, k))
    g = -decay.float().exp() * torch.nn.functional.softplus(a.float() + decay_bias)
    out, after = qwen.torch_recurrent_gated_delta_rule(
        q, k, v, g=g[:, None], beta=b.sigmoid()[:, None] * beta_scale, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    theirs = kernels.norm(out.reshape(-1, value_dim), z.reshape(-1, value_dim), norm, 1e-6, offset, gate_kind, value_dim)
    assert is_same(ours, theirs.view(3, -1), 1e-5, 0.03) and torch.equal(own, more)
    torch.testing.assert_close(own_state, after, **({"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next", "olmo_hybrid"])
def test_a_gated_delta_net_is_found_and_computed_by_the_kernel(name, dtype, monkeypatch):
    torch.manual_seed(0)
    model, calls = tiny_models.make_model(tiny_models.make_config(name, 61)).to(DEVICE, dtype), []
    live = begin("cached", model, [[3, 4, 5], [6, 7, 8]], 0)
    with torch.no_grad():
        live.prefill()
    step = delta_net_kernels.delta_net
    monkeypatch.setattr(delta_net_kernels, "delta_net", lambda *arguments: calls.append(1) or step(*arguments))
    (substitute,) = delta_net.find_delta_nets(model, live.cache, delta_net_kernels, kernels)
    assert len(calls) == 1  # by the trial
    monkeypatch.setattr(delta_net_kernels, "delta_net", lambda *arguments: 1.1 * step(*arguments))
    assert delta_net.find_delta_nets(model, live.cache, delta_net_kernels, kernels) == []
    module, x = substitute.owner, random(2, 1, model.config.hidden_size, dtype=dtype)
    monkeypatch.setattr(delta_net_kernels, "delta_net", lambda *arguments: 1 / 0)
    with torch.no_grad():
        assert torch.equal(substitute.function(x), module(x))  # without a cache, by the module itself


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("rows, heads, kv_heads, tokens, dim, value_dim, window, is_chunked, softcap, has_sinks", [
    (3, 4, 2, 100, 16, 16, None, False, None, False), (3, 4, 2, 200, 24, 16, 7, False, None, False), (3, 4, 4, 300, 16, 16, 70, True, None, False),
    (5, 8, 2, 130, 80, 80, None, False, 5.0, True), (20, 2, 1, 40, 16, 16, None, False, None, True), (2, 2, 1, 90, 256, 256, 64, False, None, True),
])  # fmt: skip
def test_attention_of_one_token_over_static_memory(dtype, rows, heads, kv_heads, tokens, dim, value_dim, window, is_chunked, softcap, has_sinks):
    query = random(rows, 1, heads, dim, dtype=dtype).transpose(1, 2)
    keys, values = random(rows, kv_heads, tokens, dim, dtype=dtype), random(rows, kv_heads, tokens, value_dim, dtype=dtype)
    position = torch.randint(0, tokens, (rows,)).to(DEVICE)
    position[0], position[-1] = 0, tokens - 1
    sinks = random(heads, dtype=dtype) if has_sinks else None
    first = None if window is None else position - position % window if is_chunked else position - window + 1
    theirs = row_attention.attend_rows(query, keys, values, position, first, 0.3, softcap=softcap, sinks=sinks)
    options = {"window": window, "is_chunked": is_chunked, "softcap": softcap, "sinks": sinks}
    for splits in (None, 1, 4):
        close(row_attention_kernels.attend_rows(query, keys, values, position, 0.3, **options, splits=splits), theirs, dtype)


def test_keys_and_values_are_stored_at_the_position_of_each_row():
    keys, values = random(3, 2, 9, 24), random(3, 2, 9, 16)
    k, v, position = random(3, 1, 2, 24).transpose(1, 2), random(3, 2, 1, 16), torch.tensor([8, 0, 4], device=DEVICE)
    mine, own = keys.clone(), values.clone()
    row_attention.store_tokens(k, v, keys, values, position)
    row_attention_kernels.store_tokens(k, v, mine, own, position)
    assert torch.equal(mine, keys) and torch.equal(own, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [24, 8])
def test_rotation_of_queries_and_keys(dtype, rotated):
    q, k = random(3, 1, 6, 24, dtype=dtype).transpose(1, 2).split([4, 2], dim=1)
    for rows in (3, 1):
        cos, sin = random(rows, 1, rotated, dtype=dtype), random(rows, 1, rotated, dtype=dtype)
        for ours, theirs in zip(elementwise_kernels.rotate(q, k, cos, sin), qwen.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            close(ours, theirs, dtype)
    replacement = elementwise_kernels.apply_rotary_pos_emb(lambda *arguments: "original")
    several = torch.cat([q, q], dim=2)
    assert replacement(several, several, cos, sin) == "original" and replacement(q, k, cos, sin, 2) == "original"


def test_a_rotation_of_neighbours_is_left_alone():
    model = tiny_models.make_model(tiny_models.make_config("cohere", 61)).to(DEVICE)
    assert not any(s.owner is cohere for s in elementwise.find_elementwise(model, elementwise_kernels))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_activation_of_parts_of_a_product(activation):
    gate, up = random(3, 1, 800)[..., :750].split(375, dim=-1)
    act = torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    close(elementwise_kernels.multiply_gate(gate, up, activation), act * up, torch.float32)


@pytest.mark.parametrize("name", ["qwen3_5_text", pytest.param("granitemoehybrid", marks=pytest.mark.soak), pytest.param("gpt_oss", marks=pytest.mark.soak),
    pytest.param("qwen3_next", marks=pytest.mark.soak), pytest.param("olmo_hybrid", marks=pytest.mark.soak), "gemma3_text"])  # fmt: skip
def test_with_kernels_the_draws_are_the_plain_decoders(name, monkeypatch):
    """On a CPU, too, by the interpreter; on a GPU tests/test_module_decoder.py has all model types."""
    from test_module_decoder import adapted, agree, make_sampler, tasks

    load = module_model.load_kernels
    monkeypatch.setattr(module_model, "load_kernels", lambda device: load(torch.device("cuda")))
    policy = adapted(name)
    want = make_sampler(policy.causal_lm, "plain").generate(tasks(61)[:3], 1, max_new_tokens=9)
    sampler = make_sampler(policy.causal_lm, "modules", rows_at_once=2)
    agree(sampler.generate(tasks(61)[:3], 1, max_new_tokens=9), want)
    computation: ModuleModel = sampler._decoders["modules"].computation
    names = {substitute.name for substitute in computation._variant.substitutes}
    assert sampler.decoder_name == "modules" and names >= {"forward"} and all(computation._attention._verdicts.values())
    assert ("apply_rotary_pos_emb" in names) == (name != "gpt_oss")
    is_delta_net = [hasattr(s.owner, "A_log") and hasattr(s.owner, "num_v_heads") for s in computation._variant.substitutes]
    assert any(is_delta_net) == (name in ("qwen3_5_text", "qwen3_next", "olmo_hybrid"))
