"""Mixtures of experts in the sampler: the definitions against transformers, the Triton kernels against the definitions.

TRITON_INTERPRET=1 python -m pytest tests/test_expert_kernels.py        (the kernels on a CPU, where triton is installed)
"""

import os
from dataclasses import replace
from itertools import product

import pytest
import tiny_models
import torch
from test_sampler import MIXED, MODELS, make

from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.model.families import FAMILIES
from grpo_core.model.policy import Policy, wrap
from grpo_core.model.routing import find_routers
from grpo_core.sampling import expert_ops
from grpo_core.sampling.computation import Unsupported
from grpo_core.sampling.decode_ops import TorchOps
from grpo_core.sampling.expert_ops import ExpertWeights, Gating, Routing
from grpo_core.sampling.fused_mlp import ExpertMlp
from grpo_core.sampling.fused_model import FusedModel, check_model
from grpo_core.sampling.modules.module_model import ModuleModel
from grpo_core.sampling.modules.step_functions import find_expert_substitutes, installed

# Without an interpreter the tests of kernels are reported as skipped on a CPU; with it, a missing triton is a failure.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernel_test = (lambda test: test) if IS_INTERPRETED else pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES_WITH_EXPERTS = [name for name, family in FAMILIES.items() if family.experts]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.float16, *([] if IS_INTERPRETED else [torch.bfloat16])]
CLAMPED = Gating("silu", 1.7, 1.0, 1.0)
EXPERTS, TOP_K, HIDDEN, INNER = 7, 3, 48, 40


def make_model(name, seed=0):
    torch.manual_seed(seed)
    kind, config, _ = MODELS[name]
    model = kind(config).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.std() == 0:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_weights(dtype=torch.float32, is_transposed=False, is_interleaved=False, has_bias=False, gating=Gating()):  # noqa: B008
    sizes = [(2 * INNER, HIDDEN), (HIDDEN, INNER)]
    tensors = [torch.randn(EXPERTS, *(size[::-1] if is_transposed else size)) * 0.3 for size in sizes]
    biases = [torch.randn(EXPERTS, size[0]) if has_bias else None for size in sizes]
    moved = [x if x is None else x.to(DEVICE, dtype) for x in (*tensors, *biases)]
    return ExpertWeights(*moved, is_transposed, is_interleaved, gating)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def load_kernels():
    from grpo_core.sampling.kernels import expert_kernels  # needs triton, which only torch for a GPU brings

    torch.manual_seed(0)
    return expert_kernels


@pytest.mark.parametrize("name", [name for name in MODELS if name.split(",")[0] in FAMILIES_WITH_EXPERTS])
def test_a_mixture_is_transformers_own(name):
    model = make_model(name)
    config, family = model.config, FAMILIES[model.config.model_type]
    block = model.model.layers[-1].mlp
    mlp, x = ExpertMlp(block, family.experts, "silu", TorchOps(), config), 2 * random(9, config.hidden_size)
    with torch.no_grad():
        want = block(x[None])
        want = (want[0] if isinstance(want, tuple) else want)[0]
        got, experts = mlp(x, None)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert experts.shape == (9, mlp.routing.top_k) and len(experts.unique()) > 2
        done = torch.tensor([0, 1] * 4 + [0], device=DEVICE)
        got, experts = mlp(x, done)
    assert (experts[done == 1] == expert_ops.NO_EXPERT).all() and not got[done == 1].any()
    torch.testing.assert_close(got[done == 0], want[done == 0], atol=1e-5, rtol=1e-5)


def test_weights_of_experts_by_every_rule():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.5]])
    p = logits.softmax(dim=-1)[0]
    for is_normalized, want in ((False, p[[1, 2]]), (True, p[[1, 2]] / p[[1, 2]].sum())):
        experts, weights = expert_ops.choose_experts(logits, Routing(2, is_normalized))
        assert experts.tolist() == [[1, 2]]
        torch.testing.assert_close(weights[0], want)
    rounded = expert_ops.choose_experts(logits.bfloat16(), Routing(2, True))[1]
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(rounded, expert_ops.choose_experts(logits.bfloat16(), Routing(2, True, is_rounded=False))[1])


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_normalized, is_rounded", list(product([False, True], repeat=2)))
def test_choice_of_experts(dtype, is_normalized, is_rounded):
    kernels, routing = load_kernels(), Routing(TOP_K, is_normalized, is_rounded)
    logits = torch.stack([torch.randperm(EXPERTS) for _ in range(6)]).to(DEVICE, dtype) / 3  # without ties
    done = torch.tensor([0, 0, 1, 0, 1, 0], device=DEVICE)
    for marks in (None, done):
        (experts, weights), (want, shares) = kernels.choose_experts(logits, routing, marks), expert_ops.choose_experts(logits, routing, marks)
        assert torch.equal(experts.long(), want)
        torch.testing.assert_close(weights, shares, atol=0 if dtype == torch.float32 else 4e-3, rtol=1e-5)


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, hidden", [(3, 48), (20, 544), (70, 48)])  # one part of the sum, three, and many rows
def test_a_router_of_every_size(dtype, rows, hidden):
    kernels, routing = load_kernels(), Routing(TOP_K, True)
    x, weight, bias = random(rows, hidden, dtype=dtype), random(EXPERTS, hidden, dtype=dtype), random(EXPERTS, dtype=dtype)
    for added in (None, bias):
        logits = (x.float() @ weight.float().t() + (0.0 if added is None else added.float())).to(dtype)
        done = (torch.arange(rows, device=DEVICE) == 1).long()
        got, weights, groups = kernels.route(x, weight, added, routing, done)
        check_groups(groups, got)
        assert (got[1] == expert_ops.NO_EXPERT).all() and not weights[1].any()
        want, shares = expert_ops.choose_experts(logits, routing, done)
        is_same = (got.long() == want).all(dim=1)  # two logits may round to the same number
        assert is_same.float().mean() > (0.99 if dtype == torch.float32 else 0.8)
        torch.testing.assert_close(weights[is_same], shares[is_same], atol=TOLERANCES[dtype] * 4, rtol=0.02)


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms_delta", [False, True])
def test_a_norm_after_the_sum_of_parts(dtype, norms_delta):
    from grpo_core.sampling.kernels.decode_kernels import TritonOps

    own, x = make_weights(dtype), random(5, HIDDEN, dtype=dtype)
    experts, weights = expert_ops.choose_experts(random(5, EXPERTS), Routing(TOP_K, True))
    experts[2], weights[2] = expert_ops.NO_EXPERT, 0.0
    weight, delta_weight = random(HIDDEN, dtype=dtype), random(HIDDEN, dtype=dtype) if norms_delta else None
    results = []
    for ops in (TritonOps(DEVICE), TorchOps()):
        stream = x.clone()
        delta = ops.mix_experts(x, experts, weights, own)
        results.append((ops.add_norm(stream, delta, weight, 1e-6, delta_weight=delta_weight), stream, ops.sum_experts(x, experts, weights, own)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCES[dtype] * float(theirs.abs().max() + 1), rtol=0)


@kernel_test
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
def test_broken_logits_choose_experts_that_exist(value):
    experts, _ = load_kernels().choose_experts(torch.full((2, EXPERTS), value, device=DEVICE), Routing(TOP_K, True))
    assert ((experts >= 0) & (experts < EXPERTS)).all()


@kernel_test
@pytest.mark.parametrize("rows, count", [(1, 3), (5, 7), (40, 7), (70, 130)])
def test_groups_list_every_pair_once(rows, count):
    kernels = load_kernels()
    experts = torch.stack([torch.randperm(count)[:3] for _ in range(rows)]).to(DEVICE)
    experts[rows // 2] = expert_ops.NO_EXPERT
    check_groups(kernels.group_rows(experts, count), experts)


def check_groups(groups, experts):
    """The groups have every pair of these experts [R, k] once."""
    listed = sorted(set(experts.flatten().tolist()) - {expert_ops.NO_EXPERT})
    assert int(groups.total) == len(listed) and sorted(groups.order[: len(listed)].tolist()) == listed
    for expert in range(len(groups.pairs)):
        pairs = groups.pairs[expert, : int(groups.sizes[expert])]
        assert sorted(pairs.tolist()) == (experts.flatten() == expert).nonzero().flatten().tolist()


LAYOUTS = [(False, False, False), (True, True, True), (True, False, True), (False, True, False)]


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 21])
@pytest.mark.parametrize("layout, gating", [
    (LAYOUTS[0], Gating()), (LAYOUTS[1], CLAMPED), (LAYOUTS[2], Gating("gelu_tanh")), (LAYOUTS[3], replace(CLAMPED, alpha=1.0, shift=0.0)),
])  # fmt: skip
def test_a_mixture_of_every_layout(dtype, rows, layout, gating):
    kernels, own = load_kernels(), make_weights(dtype, *layout, gating)
    x, (experts, weights) = random(rows, HIDDEN, dtype=dtype), expert_ops.choose_experts(random(rows, EXPERTS), Routing(TOP_K, True))
    if rows > 1:
        experts[3], weights[3] = expert_ops.NO_EXPERT, 0.0
    got, want = kernels.apply_experts(x, experts, weights, own).sum(), expert_ops.mix_experts(x, experts, weights, own)
    scale = float(want.abs().max())
    torch.testing.assert_close(got, want, atol=TOLERANCES[dtype] * max(1.0, scale), rtol=0)
    assert rows == 1 or not got[3].any()


@kernel_test
@pytest.mark.parametrize("rows", [3, 40])
def test_uneven_rows(rows):
    """All rows to the same experts, more of them than a block holds, and experts without a row."""
    kernels, own, x = load_kernels(), make_weights(), random(rows, HIDDEN)
    experts = torch.tensor([5, 0, 2], device=DEVICE).expand(rows, 3)
    weights = random(rows, 3)
    torch.testing.assert_close(
        kernels.apply_experts(x, experts, weights, own).sum(), expert_ops.mix_experts(x, experts, weights, own), atol=1e-5, rtol=1e-5
    )
    nobody = torch.full((rows, 3), expert_ops.NO_EXPERT, device=DEVICE)
    assert not kernels.apply_experts(x, nobody, weights, own).sum().any()


@kernel_test
def test_the_same_bits_every_time_and_for_a_row_among_others():
    kernels, own, x = load_kernels(), make_weights(), random(24, HIDDEN)
    chosen = expert_ops.choose_experts(random(24, EXPERTS), Routing(TOP_K, True))
    first = kernels.apply_experts(x, *chosen, own).sum()
    assert torch.equal(first, kernels.apply_experts(x, *chosen, own).sum())
    order = torch.randperm(24, device=DEVICE)
    assert torch.equal(first[order], kernels.apply_experts(x[order], *(part[order] for part in chosen), own).sum())


@kernel_test
def test_every_entry_of_the_table_of_blocks():
    kernels, own = load_kernels(), make_weights(torch.float16)
    for limit, *_ in kernels.BLOCKS:
        rows = min(limit, 600 if DEVICE.type == "cuda" else 33)
        x, (experts, weights) = random(rows, HIDDEN, dtype=torch.float16), expert_ops.choose_experts(random(rows, EXPERTS), Routing(1, False))
        _, first, second = next(entry for entry in kernels.BLOCKS if entry[0] == limit)
        groups = kernels.group_rows(experts, EXPERTS)
        inner, out = x.new_empty(rows, INNER), x.new_empty(rows, HIDDEN)
        kernels.multiply_groups(x, groups, own.gate_up, None, inner, 1, 1, own, own.gating, first)
        kernels.multiply_groups(inner, groups, own.down, None, out, 1, 1, own, None, second)
        want = expert_ops.mix_experts(x, experts, torch.ones_like(weights), own)
        torch.testing.assert_close(out, want, atol=4e-3 * float(want.abs().max()), rtol=0)


def test_blocks_fit_into_the_memory_of_small_gpus():
    pytest.importorskip("triton")
    from grpo_core.sampling.kernels.expert_kernels import BLOCKS, fit, shared_bytes
    from grpo_core.sampling.kernels.shared_memory import DEFAULT_BYTES

    for (_, *both), itemsize in product(BLOCKS, (2,)):
        for blocks, is_gated in zip(both, (True, False), strict=True):
            fitted = fit(blocks, torch.empty(0, dtype=torch.float16), is_gated)
            assert fitted.stages >= 2 and fitted.stages * shared_bytes(fitted, itemsize, is_gated) <= DEFAULT_BYTES


def adapted(name, **lora):
    options = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]} | lora
    policy = wrap(make_model(name), ModelConfig(), LoraConfig(r=3, **options), temperature=1.0)
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.1)
    return policy


def draw(policy, decoder, routers=None, **options):
    sampler = make(policy, decoder=decoder, routers=routers, **options)
    return sampler.generate(MIXED, 3), sampler


@pytest.mark.parametrize("name", FAMILIES_WITH_EXPERTS)
@pytest.mark.parametrize("prefill_tokens", [2048, 12])
def test_the_fused_decoder_records_the_experts_that_the_plain_decoder_records(name, prefill_tokens, monkeypatch):
    monkeypatch.setattr("grpo_core.sampling.fused_model.MAX_PREFILL_CPU_TOKENS", prefill_tokens)
    policy = adapted(name)
    routers = find_routers(policy.causal_lm)
    (got, sampler), (want, _) = draw(policy, "auto", routers), draw(policy, "plain", routers)
    assert sampler.decoder_name == "fused" and torch.equal(got.completion_ids, want.completion_ids)
    assert torch.equal(got.routed_experts, want.routed_experts) and want.routed_experts.unique().numel() > 2
    assert torch.equal(got.prompt_routed_experts[want.prompt_mask], want.prompt_routed_experts[want.prompt_mask])
    torch.testing.assert_close(got.rollout_logprobs, want.rollout_logprobs, atol=1e-4, rtol=0)
    again = sampler.generate(MIXED[:1], 2, max_new_tokens=3)
    assert again.routed_experts.shape[:2] == again.completion_ids.shape


def test_rows_that_are_done_have_no_experts(monkeypatch):
    """Between two checks for ended rows, those that have ended read no weights of experts."""
    policy = adapted("qwen3_moe, window")
    _, sampler = draw(policy, "auto")
    seen, ops = [], sampler._decoders["fused"].ops
    mix = type(ops).mix_experts
    monkeypatch.setattr(ops, "mix_experts", lambda x, experts, *rest: (seen.append(experts), mix(ops, x, experts, *rest))[1], raising=False)
    want = make(policy, decoder="plain").generate(MIXED, 6)
    assert torch.equal(sampler.generate(MIXED, 6).completion_ids, want.completion_ids)
    idle = [(experts == expert_ops.NO_EXPERT).all(dim=1) for experts in seen[1:]]  # the first are the prompts
    assert any(row.any() and not row.all() for row in idle)


@pytest.mark.parametrize("change, reason", [
    ("adapter", "the model's experts or routers have an adapter; lora.target_modules=.* leaves them without"),
    ("quantised", "its Qwen3MoeExperts has weights that are not plain float32"),
    ("router", "the model's experts or routers have an adapter|trains whole modules"),
    ("class", "its Linear is not a class of transformers"),
    ("forward", "the forward of its Qwen3MoeTopKRouter was replaced"),
])  # fmt: skip
def test_what_the_fused_decoder_refuses(change, reason):
    if change == "adapter":
        policy = adapted("qwen3_moe, window", target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    elif change == "router":
        policy = adapted("qwen3_moe, window", modules_to_save=["gate"])
    else:
        policy = adapted("qwen3_moe, window")
    block = policy.causal_lm.model.layers[-1].mlp
    if change == "quantised":
        block.experts.gate_up_proj.data = block.experts.gate_up_proj.data.half()
    if change == "forward":
        block.gate.forward = block.gate.forward
    if change == "class":
        block.gate = torch.nn.Linear(32, 6, bias=False)
    with pytest.raises(Unsupported, match=reason):
        check_model(policy.causal_lm)


def test_routers_that_are_no_part_of_the_layers_are_refused():
    model = make_model("qwen3_moe, window")
    routers = find_routers(model)
    with pytest.raises(Unsupported, match="its routers are not those of its mixtures"):
        FusedModel(model, TorchOps(), replace(routers, places=[*routers.places] * 2, numbers=[*routers.numbers] * 2))


def test_trained_experts_are_read_where_they_are():
    """A whole model that is trained: its experts change in place, or are replaced."""
    model = make_model("gpt_oss")
    policy = Policy(model)
    sampler = make(policy)
    for change in (lambda x: x, lambda x: 1.3 * x):
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.data = change(layer.mlp.experts.down_proj.data)
            layer.mlp.router.bias.data.add_(0.1)
        rollouts = sampler.generate(MIXED, 4)
        assert sampler.decoder_name == "fused"
        torch.testing.assert_close(policy.logprobs(rollouts), rollouts.rollout_logprobs, atol=1e-4, rtol=0)


def make_tiny(name, **own):
    return tiny_models.make_model(tiny_models.make_config(name, 61, **own)).to(DEVICE)


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 13, device=DEVICE)[None], use_cache=False).logits


@pytest.mark.parametrize("name, kind", [
    ("ernie4_5_moe", (False, False, Gating())), ("gpt_oss", (True, True, Gating("silu", 1.702, 7.0, 1.0))),
    ("aria_text", (True, False, Gating())), ("deepseek_v4", (False, False, Gating("silu", 1.0, 10.0))),
])  # fmt: skip
def test_modules_of_experts_have_a_substitute_of_their_kind(name, kind, monkeypatch):
    ops, seen, model = TorchOps(), [], make_tiny(name)
    mix = ops.mix_experts
    monkeypatch.setattr(ops, "mix_experts", lambda *inputs: (seen.append(inputs[3]), mix(*inputs))[1], raising=False)
    substitutes, want = find_expert_substitutes(model, ops), logits_of(model)
    if name == "aria_text" and not any(hasattr(module, "gate_up_proj") for module in model.modules()):
        pytest.skip("this version of transformers computes the experts of Aria in another way")
    seen.clear()
    with installed(substitutes):
        torch.testing.assert_close(logits_of(model), want, atol=1e-5, rtol=1e-5)
    assert len(seen) == len(substitutes) > 0
    assert all((own.is_transposed, own.is_interleaved, own.gating) == kind for own in seen)
    assert not any("forward" in vars(module) for module in model.modules())
    seen.clear()
    assert torch.equal(logits_of(model), want) and not seen


class Bounded(torch.nn.SiLU):
    """An activation with a bound that only large gates reach."""

    def forward(self, gate):
        return super().forward(gate.clamp(max=5.0))


def test_a_bound_that_no_attribute_names_is_noticed():
    model = make_tiny("olmoe")
    assert len(find_expert_substitutes(model, TorchOps())) == 2
    model.model.layers[0].mlp.experts.act_fn = Bounded()
    assert not find_expert_substitutes(model, TorchOps())


def test_experts_whose_forward_was_replaced_are_left_alone():
    model = make_tiny("olmoe")
    experts = [layer.mlp.experts for layer in model.model.layers]
    experts[0].forward = experts[0].forward
    assert [substitute.owner for substitute in find_expert_substitutes(model, TorchOps())] == experts[1:]


@pytest.mark.parametrize("name", ["llama4_text", "nemotron_h", "jetmoe"])  # weights of inputs, no gate, other weights
def test_experts_of_other_kinds_have_no_substitute(name):
    assert not find_expert_substitutes(make_tiny(name), TorchOps())


def test_an_adapter_on_experts_goes_through_the_substitute():
    policy = wrap(make_tiny("qwen3_moe"), ModelConfig(), LoraConfig(r=3, target_modules=["gate_proj", "up_proj", "down_proj"]), temperature=1.0)
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.1)
    model = policy.causal_lm
    want = logits_of(model)
    with installed(find_expert_substitutes(model, TorchOps())):
        torch.testing.assert_close(logits_of(model), want, atol=1e-4, rtol=1e-4)
        with policy.reference():
            base = logits_of(model)
    with policy.reference():
        torch.testing.assert_close(base, logits_of(model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(base, want, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["olmoe", "ernie4_5_moe", "qwen3_next"])
def test_the_modules_decoder_uses_the_substitutes(name):
    from grpo_core.sampling.kernels.decode_kernels import TritonOps

    model = make_tiny(name)
    computation = ModuleModel(model, "padded", 0, TritonOps(DEVICE))
    owners = [type(substitute.owner).__name__ for substitute in computation._variant.substitutes if substitute.name == "forward"]
    assert any(owner.endswith("Experts") for owner in owners)
