"""The kernels of recurrent layers and norms against the functions of transformers that they replace, on a GPU."""

import pytest
import torch
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
if torch.cuda.is_available():
    from grpo_core.sampling import state_kernels as kernels
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def close(ours, theirs, dtype):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), **({"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, width, activation, has_bias", [(6144, 4, "silu", False), (70, 3, None, True)])
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
    theirs = granite.mamba2_selective_state_update(state, x, *spread, **options)
    ours = kernels.mamba2_selective_state_update(None)(mine, x, *spread, **options)
    torch.testing.assert_close(ours.float(), theirs.float(), **({"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.5, "rtol": 0.05}))
    torch.testing.assert_close(mine, state, **({"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}))


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
    plain = qwen.Qwen3_5RMSNorm(96).to("cuda", dtype)
    after = qwen.Qwen3_5RMSNormGated(96).to("cuda", dtype)
    before = granite.GraniteMoeHybridRMSNormGated(96, **({"group_size": 96} if "group_size" in granite.GraniteMoeHybridRMSNormGated.__init__.__code__.co_varnames else {})).to("cuda", dtype)
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
