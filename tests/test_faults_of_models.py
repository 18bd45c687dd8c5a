"""Faults of models, kernels and layers: probes without a trace, base dropout, rotations, caches, adapters."""

import copy
import math
from dataclasses import replace

import pytest
import tiny_models
import torch
import transformers
from fakes import EOS, Alphabet, tiny_policy
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from test_packing import forwards, grouped_rollouts
from test_policy import naive_logprobs
from transformers.models.lfm2 import modeling_lfm2

from grpo_core.batch import Rollouts, Task, take
from grpo_core.commands.export import untie_adapted_embeddings
from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.model import fast_layers, trial
from grpo_core.model.adapter_check import check_targets
from grpo_core.model.loading import check_lengths
from grpo_core.model.lora_targets import describe_frozen_experts
from grpo_core.model.packing import Budget
from grpo_core.model.policy import Policy, enable_gradient_checkpointing, load_policy, wrap
from grpo_core.model.update_mode import update_mode
from grpo_core.sampling.cache_check import find_method
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError

VOCAB = 32
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FALCON = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2,
    "eos_token_id": EOS, "bos_token_id": None,
}  # fmt: skip
BY_NAME = {  # models whose code compares the attention's name
    "falcon": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2, alibi=False)),
    "falcon, alibi": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**FALCON, alibi=True)),
    "gpt2": lambda: gpt2(),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2)),
}


def gpt2(dropout=0.0):
    rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), dropout)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, eos_token_id=EOS,
        bos_token_id=None, **rates,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **options))


def long_rows(lengths, seed=0):
    """Rows with a prompt of half their length, in one batch."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) // 2
    prompt_lengths = torch.tensor([[n // 2] for n in lengths])
    completion_lengths = torch.tensor([[n - n // 2] for n in lengths])
    prompt_mask = torch.arange(width) >= width - prompt_lengths
    mask = torch.arange(int(completion_lengths.max())) < completion_lengths
    ids, completions = (torch.randint(2, VOCAB, m.shape, generator=generator).masked_fill(~m, 0) for m in (prompt_mask, mask))
    return Rollouts(ids, prompt_mask, completions, mask, torch.zeros(mask.shape), torch.zeros(len(lengths), dtype=torch.bool))


@pytest.mark.parametrize("name", BY_NAME)
def test_fault_1_a_layout_that_is_tried_leaves_the_model_as_it_was(name):
    """FAULTS #1: Falcon adds its mask instead of passing it to sdpa once the attention has another name."""
    torch.manual_seed(0)
    model = BY_NAME[name]()
    model.config._attn_implementation = "sdpa"
    targets = {"gpt2": ["c_attn"], "qwen2": ["q_proj"]}.get(name, ["query_key_value"])
    policy = wrap(model, ModelConfig(attention="sdpa"), LoraConfig(target_modules=targets), temperature=1.0)
    ids = torch.arange(2, 22).view(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # padded on the left, as the sampler does
    with torch.no_grad():
        before = [policy.model(ids).logits, policy.model(ids, attention_mask=mask).logits]
        assert policy.layout in ("rows", "grid")
        after = [policy.model(ids).logits, policy.model(ids, attention_mask=mask).logits]
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    rollouts = grouped_rollouts(vocabulary=VOCAB)
    torch.testing.assert_close(forwards(policy, rollouts), naive_logprobs(policy, rollouts), atol=1e-4, rtol=1e-4)


def test_fault_1_attention_that_changes_its_mask_is_not_packed():
    """FAULTS #1: sparse attention looks the same on short rows, but the mask that it makes would be dropped."""
    policy = tiny_policy(lora_noise=0.1)
    layer = policy.causal_lm.model.layers[0].self_attn
    own = layer.forward

    def forward(hidden_states, position_embeddings, attention_mask, **kwargs):
        if attention_mask is not None and attention_mask.shape[-1] == 1:  # the mask of a packed forward
            attention_mask = attention_mask.expand(1, 1, hidden_states.shape[1], hidden_states.shape[1])
        return own(hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs)

    layer.forward = forward
    assert policy.layout == "grid"


@pytest.mark.parametrize("fault, problem", {
    "positions": r"fails \(TypeError: .*position_ids.*\)", "length": r"fails \(RuntimeError: the rows are too long \(.*, line \d+\)\)",
    "mask": "gives other hidden states than that of each row alone",
}.items())  # fmt: skip
def test_a_model_whose_rows_cannot_share_a_grid_is_refused(fault, problem):
    """As Reformer, which fails where it pads rows that have positions."""
    policy = tiny_policy(lora_noise=0.1)
    policy.causal_lm.set_attn_implementation("eager")  # so the grid is the layout
    body, own = policy._body, policy._body.forward

    def forward(input_ids, attention_mask=None, position_ids=None, **options):
        if fault == "positions" and position_ids is not None:
            raise TypeError("forward() got an unexpected keyword argument 'position_ids'")
        if fault == "length" and position_ids is not None and input_ids.shape[1] > 64:
            raise RuntimeError("the rows are too long")
        if fault == "mask" and attention_mask is not None:  # it reads the mask as if rows were padded on the left
            attention_mask = attention_mask.flip(1)
        return own(input_ids, attention_mask=attention_mask, position_ids=position_ids, **options)

    body.forward = forward
    with pytest.raises(ConfigError, match=f"model at model.path is not supported: .* that are padded on the right {problem}"):
        policy.layout  # noqa: B018
    assert body.forward is forward


def test_fault_1_a_trial_restores_attributes_buffers_modes_and_generators():
    """FAULTS #1: law 13, a probe leaves no trace."""
    model = tiny_policy().causal_lm
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    layer.mlp.train()
    state, buffer = {name: dict(vars(m)) for name, m in model.named_modules()}, rotary.inv_freq.clone()
    torch.manual_seed(3)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    with trial.without_trace(model):
        model.config._attn_implementation = "other"
        layer.mlp.forward, layer.new = (lambda x: x), 1
        layer.register_forward_hook(lambda *args: None)
        rotary.inv_freq.mul_(2)
        rotary.register_buffer("inv_freq", torch.zeros(1), persistent=False)
        model.eval()
        torch.rand(1)
    assert torch.equal(torch.rand(3), drawn)
    assert {name: dict(vars(m)) for name, m in model.named_modules()}.keys() == state.keys()
    for name, module in model.named_modules():
        assert vars(module).keys() == state[name].keys() and module.training == state[name]["training"], name
        assert not module._forward_hooks
    assert model.config._attn_implementation == "sdpa" and torch.equal(rotary.inv_freq, buffer)


def test_fault_1_layers_are_compared_with_the_model_as_it_was_loaded():
    """FAULTS #1: one module of a class may compute something else, and a forward may already be replaced."""
    torch.manual_seed(0)
    model, ids = llama(), torch.arange(2, 12)[None]
    own = model.model.layers[1].mlp
    own.forward = lambda x: -type(own).forward(own, x)  # by another library
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    with torch.no_grad():
        before = model(ids).logits
        fast_layers.install(model)
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-4)
    assert own.forward.__name__ == "<lambda>"


def test_fault_1_a_replacement_that_is_wrong_in_one_layer_is_taken_back():
    """FAULTS #1: the comparison of a kind sees one layer; that of the whole model sees all."""
    torch.manual_seed(0)
    model = llama()
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    ids, training = torch.arange(2, 12)[None], model.training
    with torch.no_grad():
        before = model.eval()(ids).logits
        fast_layers.install(model.train(training))
        assert torch.equal(model.eval()(ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


DROPOUT = {
    "gpt2": (lambda: gpt2(0.3), ["c_attn"]),
    "opt": (
        lambda: transformers.OPTForCausalLM(transformers.OPTConfig(
            vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, dropout=0.3,
            attention_dropout=0.3, layerdrop=0.5, word_embed_proj_dim=32, max_position_embeddings=64,
        )), ["q_proj"]),
    "mixtral": (
        lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(
            **SIZES, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.5, attention_dropout=0.3,
        )), ["q_proj"]),
    "falcon": (
        lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**FALCON, alibi=True, hidden_dropout=0.3, attention_dropout=0.3)),
        ["query_key_value"]),
    "bloom": (
        lambda: transformers.BloomForCausalLM(transformers.BloomConfig(
            vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.3, attention_dropout=0.3)),
        ["query_key_value"]),
    "phi3": (
        lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(
            **SIZES, num_key_value_heads=2, resid_pdrop=0.3, embd_pdrop=0.3, attention_dropout=0.3)), ["qkv_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", DROPOUT)
def test_fault_4_the_base_models_randomness_is_off_in_the_update(name, checkpointing):
    """FAULTS #4: dropout of every kind, skipped layers and router jitter; only LoRA's dropout acts."""
    make, targets = DROPOUT[name]
    torch.manual_seed(0)
    model = make()
    if checkpointing:
        enable_gradient_checkpointing(model)
    policy = wrap(model, ModelConfig(), LoraConfig(target_modules=targets, dropout=0.0), temperature=1.0)
    rollouts = grouped_rollouts(vocabulary=VOCAB)
    with torch.no_grad():
        quiet = policy.logprobs(rollouts)
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        with policy.training():
            logprobs = policy.logprobs(rollouts)
            results.append(torch.autograd.grad(logprobs.sum(), policy.parameters(), allow_unused=True))
        torch.testing.assert_close(logprobs.detach(), quiet, atol=1e-6, rtol=1e-6)
    assert any(x is not None and x.abs().max() > 1e-4 for x in results[0])
    for one, two in zip(*results, strict=True):
        assert one is None or torch.equal(one, two)
    assert not any(module.training for module in policy.model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fault_4_loras_dropout_still_acts_and_checkpointing_stores_less(checkpointing):
    """FAULTS #4: the adapter's own dropout is the one that lora.dropout names."""
    torch.manual_seed(0)
    model = gpt2(0.3)
    if checkpointing:
        enable_gradient_checkpointing(model)
    policy = wrap(model, ModelConfig(), LoraConfig(target_modules=["c_attn"], dropout=0.5), temperature=1.0)
    with torch.no_grad():
        for p in policy.parameters():
            p.normal_(0, 0.3)
    rollouts, saved = grouped_rollouts(vocabulary=VOCAB), []
    with policy.training():
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            one = policy.logprobs(rollouts)
        assert not torch.allclose(one, policy.logprobs(rollouts), atol=1e-3)
        grads = torch.autograd.grad(one.sum(), policy.parameters())
    assert all(x.isfinite().all() for x in grads) and sum(saved) < 40_000 if checkpointing else sum(saved) > 80_000
    with torch.no_grad():
        assert torch.equal(policy.logprobs(rollouts), policy.logprobs(rollouts))


def test_fault_10_the_gradient_of_gpt2_is_that_of_plain_peft_row_by_row():
    """FAULTS #10: to 1e-5 relative in float32, against eager attention and PEFT's own layers."""
    torch.manual_seed(0)
    base = gpt2(0.1)
    plain = get_peft_model(copy.deepcopy(base), PeftLoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"]))
    plain.get_base_model().set_attn_implementation("eager")
    lora = LoraConfig(r=4, alpha=8, dropout=0.0, target_modules=["c_attn", "c_proj", "c_fc"])
    policy = wrap(base, ModelConfig(), lora, temperature=1.0)
    trained = [p for p in plain.parameters() if p.requires_grad]
    with torch.no_grad():
        for mine, theirs in zip(policy.parameters(), trained, strict=True):
            theirs.copy_(mine.normal_(0, 0.1))
    plain.eval()
    rollouts = grouped_rollouts(vocabulary=VOCAB)
    mask = rollouts.completion_mask
    with policy.training():
        ours = torch.autograd.grad((forwards(policy, rollouts, Budget(60)) * mask).sum(), policy.parameters())
    theirs = [torch.zeros_like(p) for p in trained]
    naive = naive_logprobs(Policy(plain), rollouts)
    theirs = torch.autograd.grad((naive * mask).sum(), trained)
    for mine, want in zip(ours, theirs, strict=True):
        assert (mine - want).norm() <= 1e-5 * want.norm()


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 4.0,
    "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0],
}  # fmt: skip
ROTATIONS = {
    "longrope": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(
        **SIZES, num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=LONGROPE)),
    "longrope, llama": lambda: llama(max_position_embeddings=256, rope_parameters=LONGROPE),
    "dynamic": lambda: llama(
        max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROTATIONS)
def test_fault_2_a_rows_log_probs_do_not_depend_on_its_neighbours(name):
    """FAULTS #2: the rotation is that of the row's own length, whichever rows share its batch or came before."""
    torch.manual_seed(0)
    policy = Policy(ROTATIONS[name]())
    rollouts = long_rows([20, 100, 64, 66, 100, 82, 20])
    with torch.no_grad():
        together = policy.logprobs(rollouts)
        budgeted = forwards(policy, rollouts, Budget(150))
        alone = []
        for row in range(len(rollouts)):
            fresh = Policy(ROTATIONS[name]())
            fresh.causal_lm.load_state_dict(policy.causal_lm.state_dict())
            alone.append(fresh.logprobs(take(rollouts, torch.tensor([row])))[0])
        short = take(rollouts, torch.tensor([0]))
        ids = torch.cat([short.prompt_ids[short.prompt_mask], short.completion_ids[short.completion_mask]])[None, :-1]
        plain = fresh.causal_lm(ids).logits[0, 9:].log_softmax(-1).gather(1, short.completion_ids[0, :10, None])[:, 0]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(budgeted, together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[0, :10], plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["longrope", "longrope, llama"])
def test_fault_2_sampling_does_not_depend_on_neighbours_and_agrees_with_the_trainer(name):
    """FAULTS #2: in the sampler rows of both rotations are decoded apart."""
    torch.manual_seed(0)
    policy = Policy(ROTATIONS[name]())
    generator = torch.Generator().manual_seed(1)
    tasks = [
        Task(i, "p", torch.randint(2, VOCAB, (n,), generator=generator).tolist(), {}, seed=(0, 0, i))
        for i, n in enumerate([20, 90, 40, 65])
    ]
    sampler = Sampler(policy.causal_lm, Alphabet(), max_new_tokens=12, notify=lambda message: None)
    sampler._decode_texts = lambda draws: ("",) * len(draws.lengths)
    together = sampler.generate(tasks, 2)
    torch.testing.assert_close(policy.logprobs(together), together.rollout_logprobs, atol=1e-4, rtol=0)
    for i, task in enumerate(tasks):
        alone = sampler.generate([task], 2)
        width = alone.completion_ids.shape[1]
        assert torch.equal(alone.completion_ids, together.completion_ids[2 * i : 2 * i + 2, :width])
        torch.testing.assert_close(
            alone.rollout_logprobs, together.rollout_logprobs[2 * i : 2 * i + 2, :width], atol=1e-4, rtol=0
        )


def test_fault_2_completions_whose_rotation_would_change_are_refused():
    """FAULTS #2: they would be drawn with one rotation and trained with another."""
    config = ROTATIONS["longrope"]().config
    check_lengths([60, 65], 5, config)
    with pytest.raises(ConfigError, match="sampling.max_new_tokens is 6, and a prompt has 60 tokens, but .* above 64 tokens"):
        check_lengths([60], 6, config)


def test_fault_9_a_moving_reference_arrives_in_bf16():
    """FAULTS #9: with mixing 0.01 the rest of the way after n moves is 0.99^n, not where 16 bits stop."""
    policy = tiny_policy(lora_noise=0.1)
    policy.model.to(torch.bfloat16)
    with torch.no_grad():
        own = [p.detach().clone().float() for p in policy.parameters()]
        for p in policy.parameters():
            p.zero_()
        policy.move_reference()
        for p, value in zip(policy.parameters(), own, strict=True):
            p.copy_(value)
        for _ in range(1000):
            policy.move_reference(0.01)
    left = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(policy.reference_state(), own, strict=True)))
    assert left <= 1e-3 * math.sqrt(sum(float(x.square().sum()) for x in own))
    before = [p.data for p in policy.parameters()]
    with policy.reference():
        assert all(p.dtype == torch.bfloat16 and p.data is not b for p, b in zip(policy.parameters(), before, strict=True))


LAYER_INPUTS = {"no rows": (0, 32), "no rows of many": (0, 3, 32), "one dimension": (32,), "three": (2, 3, 32)}


@pytest.mark.parametrize("name", LAYER_INPUTS)
def test_fault_14_the_lora_layer_takes_what_pefts_takes(name):
    """FAULTS #14: zero rows, 1-D input, and an output that is changed in place."""
    torch.manual_seed(0)
    policy = tiny_policy(lora_noise=0.1)
    layer = policy.causal_lm.model.layers[0].self_attn.q_proj
    fast_layers.install(policy.model)
    assert "forward" in vars(layer)
    x = torch.randn(LAYER_INPUTS[name])
    results = []
    for forward in (layer.forward, lambda x: type(layer).forward(layer, x)):
        own = x.clone().requires_grad_()
        out = forward(own)
        out += 1
        out.mul_(2)
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        results.append((out, *torch.autograd.grad(out.square().sum(), [own, *weights])))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_fault_14_norms_and_mlps_take_no_rows_and_other_dtypes():
    """FAULTS #14: the other replaced layers likewise."""
    torch.manual_seed(0)
    model = llama()
    theirs = copy.deepcopy(model)
    fast_layers.install(model)
    for name in ("input_layernorm", "mlp"):
        mine, want = getattr(model.model.layers[0], name), getattr(theirs.model.layers[0], name)
        assert "forward" in vars(mine)
        for shape in LAYER_INPUTS.values():
            x = torch.randn(shape)
            torch.testing.assert_close(mine(x), want(x), atol=1e-5, rtol=1e-4)
    norm, want = model.model.norm, theirs.model.norm
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert norm(x).dtype == want(x).dtype and torch.equal(norm(x), want(x))


def rwkv():
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, context_length=64))


def tasks_of(lengths):
    return [Task(i, "p", [*range(2, 2 + n)], {}, seed=(0, 0, i)) for i, n in enumerate(lengths)]


class Padless(Alphabet):
    def batch_decode(self, rows, skip_special_tokens=True):
        return ["" for _ in rows]


def alone(model, row):
    with torch.no_grad():
        return model(input_ids=torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)


def check_sampled(model, sampler, lengths=(3, 5)):
    """The sampled log-probs are those of each row alone."""
    rollouts = sampler.generate(tasks_of(lengths), 2)
    for i in range(len(rollouts)):
        prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i]].tolist()
        completion = rollouts.completion_ids[i][rollouts.completion_mask[i]]
        expected = alone(model, prompt + completion.tolist())[len(prompt) - 1 : -1].gather(1, completion[:, None])[:, 0]
        torch.testing.assert_close(rollouts.rollout_logprobs[i, : len(completion)], expected, atol=1e-4, rtol=1e-4)


def test_fault_3_a_model_that_ignores_its_cache_is_sampled_without():
    """FAULTS #3: RWKV saw only the token before each."""
    torch.manual_seed(0)
    model = rwkv().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    notes = []
    sampler = Sampler(model, Padless(), max_new_tokens=4, notify=notes.append)
    check_sampled(model, sampler)
    assert find_method(model, 0) == "uncached" and "the rwkv model's cache cannot be used" in notes[0]


@pytest.mark.parametrize(("ignored", "method"), [("past_key_values", "uncached"), ("attention_mask", "cached"), ("position_ids", "cached")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fault_3_what_a_model_ignores_is_noticed(ignored, method, dtype):
    """FAULTS #3: the cache, the padding on the left, or the positions after it."""
    torch.manual_seed(0)
    model = gpt2().eval().to(dtype)
    assert find_method(model, 0) == "padded"
    own = model.forward

    def forward(input_ids, past_key_values=None, attention_mask=None, position_ids=None, **kwargs):
        given = {"past_key_values": past_key_values, "attention_mask": attention_mask, "position_ids": position_ids}
        return own(input_ids, **{k: v for k, v in given.items() if k != ignored}, **kwargs)

    model.forward = forward
    if dtype == torch.float32 or ignored == "past_key_values":
        assert find_method(model, 0) == method


def test_a_model_that_sees_later_tokens_is_refused():
    """The log-probs of whole rows would not be those of the drawn tokens."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
    with pytest.raises(ConfigError, match="the bert model at model.path is not supported: its logits after a token depend on later"):
        find_method(transformers.BertLMHeadModel(config).eval(), 0)


RECURRENT = {  # layers with a state beside layers with attention, and without
    "lfm2": lambda: transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"])),
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.2, eos_token_id=EOS)),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(transformers.Mamba2Config(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8, initializer_range=0.2, eos_token_id=EOS)),
    "qwen3_next": lambda: transformers.AutoModelForCausalLM.from_config(tiny_models.make_config("qwen3_next", VOCAB, eos_token_id=EOS)),
}  # fmt: skip


PADDED = ["lfm2", "mamba2", "qwen3_next"]  # whose layers keep padding out of their states


@pytest.mark.parametrize("name", RECURRENT)
def test_fault_11_the_state_of_recurrent_layers_goes_with_its_row(name):
    """FAULTS #11: fanned out to the completions of a prompt, dropped with a row, and free of padding."""
    torch.manual_seed(0)
    model = RECURRENT[name]().eval()
    sampler = Sampler(model, Padless(), max_new_tokens=12, notify=lambda message: None)
    check_sampled(model, sampler, lengths=(3, 5, 3, 1, 20))
    assert sampler._plain.method == ("padded" if name in PADDED else "cached")
    if name != "qwen3_next":  # whose tokens go to other experts by rounding
        assert find_method(model.to(torch.bfloat16), 0) == sampler._plain.method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leak", [None, "input", "constant"])
def test_padding_that_enters_a_state_a_little_is_noticed(dtype, leak, monkeypatch):
    """Its token or its number: beside much padding a short prompt shows what one with little padding would not show."""
    torch.manual_seed(0)
    model = RECURRENT["lfm2"]().eval().to(dtype)
    own = modeling_lfm2.apply_mask_to_padding_states

    def mask_partly(states, mask):
        masked = own(states, mask)
        return masked + {None: 0, "input": 0.2, "constant": 1}[leak] * (states - masked if leak == "input" else (states != masked).to(dtype))

    monkeypatch.setattr(modeling_lfm2, "apply_mask_to_padding_states", mask_partly)
    assert find_method(model, 5) == ("cached" if leak else "padded")  # the embedding of token 0 is 0


@pytest.mark.parametrize("name", RECURRENT)
def test_fault_11_rows_of_recurrent_layers_are_not_packed(name):
    """FAULTS #11: the state would go from one row to the next."""
    torch.manual_seed(0)
    policy = Policy(RECURRENT[name]())
    rollouts = grouped_rollouts(vocabulary=VOCAB)
    assert policy.layout == "grid"
    torch.testing.assert_close(forwards(policy, rollouts, Budget(60)), naive_logprobs(policy, rollouts), atol=1e-4, rtol=1e-4)


MOE = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {
    "llama4": lambda: transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**MOE, intermediate_size_mlp=48, num_local_experts=4, head_dim=8)),
    "phimoe": lambda: transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**MOE, num_local_experts=4)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **MOE, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, head_dim=8)),
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(
        **MOE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)),
    "granitemoe": lambda: transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**MOE, num_local_experts=4)),
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama4", "phimoe"])
def test_fault_13_a_router_that_returns_a_tuple_is_left_out(name):
    """FAULTS #13: all-linear leaves it out; a list that names it is refused before the weights load."""
    torch.manual_seed(0)
    model = EXPERTS[name]()
    lora = LoraConfig(r=4, target_modules="all-linear")
    policy = wrap(model, ModelConfig(), lora, temperature=1.0)
    names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert names and not any("router" in name for name in names)
    rollouts = grouped_rollouts(vocabulary=VOCAB)
    with policy.training():
        policy.logprobs(rollouts).sum().backward()
    for targets in (["q_proj", "router"], r".*\.router"):
        with pytest.raises(ConfigError, match="lora.target_modules names .*router.*does not return one tensor"):
            check_targets(model.config, replace(lora, target_modules=targets))
    check_targets(model.config, replace(lora, target_modules=["q_proj"]))


def test_fault_15_targets_that_peft_finds_in_packed_experts_are_not_refused():
    """FAULTS #15: PEFT adapts gate_proj, up_proj and down_proj of Qwen3-MoE in the packed weights."""
    config = EXPERTS["qwen3_moe"]().config
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    check_targets(config, LoraConfig(target_modules=targets))
    with pytest.raises(ConfigError, match="lora.target_modules names 'gates_proj', which the model does not have"):
        check_targets(config, LoraConfig(target_modules=["q_proj", "gates_proj"]))
    policy = wrap(EXPERTS["qwen3_moe"](), ModelConfig(), LoraConfig(r=4, target_modules=targets), temperature=1.0)
    assert describe_frozen_experts(policy.model) is None
    with policy.training():
        policy.logprobs(grouped_rollouts(vocabulary=VOCAB)).sum().backward()
    grads = [p.grad for name, p in policy.model.named_parameters() if p.requires_grad and "experts" in name]
    assert grads and any(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("name, targets, place", [
    ("granitemoe", "all-linear", "model.layers.0.block_sparse_moe.experts and 1 more"),
    ("qwen2_moe", "all-linear", "model.layers.0.mlp.experts and 1 more"),
    ("qwen3_moe", ["q_proj"], "model.layers.0.mlp.experts and 1 more"),
    ("phimoe", "all-linear", "model.layers.0.mlp.experts and 1 more"),
])  # fmt: skip
def test_fault_s7_experts_that_stay_frozen_are_said_once(name, targets, place):
    """FAULTS S7: and with the weights that adapt them, whose names are right."""
    policy = wrap(EXPERTS[name](), ModelConfig(), LoraConfig(r=4, target_modules=targets), temperature=1.0)
    sentence = describe_frozen_experts(policy.model)
    weights = "[experts.gate_up_proj, experts.down_proj]"
    assert sentence.endswith(f"so they stay frozen: {place}; lora.target_parameters='{weights}' adapts them")
    lora = LoraConfig(r=4, target_modules=targets, target_parameters=weights.strip("[]").split(", "))
    assert describe_frozen_experts(wrap(EXPERTS[name](), ModelConfig(), lora, temperature=1.0).model) is None


def test_fault_s7_nothing_is_said_where_there_are_no_experts():
    """FAULTS S7: nor where all weights are trained."""
    assert describe_frozen_experts(tiny_policy().model) is None
    assert describe_frozen_experts(EXPERTS["granitemoe"]()) is None


def gemma3():
    text = transformers.Gemma3TextConfig(**{**MOE, "head_dim": 8}, sliding_window=6, final_logit_softcapping=2.0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=30, boi_token_index=29, eoi_token_index=28,
    ))  # fmt: skip


def test_fault_12_a_nested_text_configuration_is_read_everywhere():
    """FAULTS #12: the vocabulary, the sliding window and the cap of the logits are those of the text model."""
    torch.manual_seed(0)
    policy = wrap(gemma3(), ModelConfig(), LoraConfig(r=4, target_modules=["q_proj"]), temperature=1.0)
    assert policy.layout == "rows"
    rollouts = grouped_rollouts(vocabulary=20)
    with torch.no_grad():
        for p in policy.parameters():
            p.normal_(0, 0.1)
        torch.testing.assert_close(policy.logprobs(rollouts), naive_logprobs(policy, rollouts), atol=1e-4, rtol=1e-4)
    sampler = Sampler(policy.causal_lm, Padless(), max_new_tokens=6, notify=lambda message: None)
    drawn = sampler.generate(tasks_of([3, 5]), 2)
    torch.testing.assert_close(policy.logprobs(drawn), drawn.rollout_logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_fault_26_tied_embeddings_with_an_adapter_are_untied_when_merged(target):
    """FAULTS #26: the merged model computes what base and adapter computed."""
    torch.manual_seed(0)
    base = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))
    model = get_peft_model(base, PeftLoraConfig(r=4, target_modules=["q_proj", target]))
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.2)
        before = model.eval()(ids).logits
        untie_adapted_embeddings(model.get_base_model())
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, before, atol=1e-4, rtol=1e-4)
    assert not merged.config.tie_word_embeddings


def test_fault_26_embeddings_without_an_adapter_stay_tied():
    """FAULTS #26: only what has an adapter is untied."""
    base = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))
    model = get_peft_model(base, PeftLoraConfig(r=4, target_modules=["q_proj"]))
    untie_adapted_embeddings(model.get_base_model())
    assert base.lm_head.weight is base.model.embed_tokens.weight and base.config.tie_word_embeddings


@pytest.mark.parametrize("rows, rank", [(40, 4), (VOCAB, 8)])
def test_fault_27_an_adapter_of_other_sizes_is_refused_with_both(tmp_path, rows, rank):
    """FAULTS #27: resized embeddings, or another rank than adapter_config.json says."""
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    config.vocab_size = rows
    model = get_peft_model(transformers.Qwen2ForCausalLM(config), PeftLoraConfig(r=rank, target_modules=["q_proj", "embed_tokens"]))
    model.save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(f'"r": {rank}', '"r": 4'))
    own, theirs = (rf"\[{rows}, 32\]", rf"\[{VOCAB}, 32\]") if rank == 4 else (r"\[8, ", r"\[4, ")
    with pytest.raises(ConfigError, match=f"its weight .* has the size {own}.*that of the model {theirs}"):
        load_policy(
            ModelConfig(path=str(tmp_path / "base")), LoraConfig(), dtype=torch.float32, temperature=1.0,
            adapter=tmp_path / "adapter",
        )  # fmt: skip


class SkipsLayers(torch.nn.Module):
    """A stack in the older style: it checkpoints by itself, and drops a layer at random while it trains."""

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing, self.layerdrop = True, 1.0
        self._gradient_checkpointing_func = lambda function, x: function(x)
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x):
        if self.training and torch.rand(()) < self.layerdrop:
            return x
        return self._gradient_checkpointing_func(self.layer, x) if self.training else self.layer(x)


def test_fault_4_a_module_that_checkpoints_by_itself_drops_no_layer_in_the_update():
    model, x = SkipsLayers().eval(), torch.ones(1, 2)
    expected = model(x)
    with update_mode([*model.modules()], []):
        assert model.training
        torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
    assert model.layerdrop == 1.0 and not model.training
