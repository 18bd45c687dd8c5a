"""The sampler by either decoder; on the GPU where there is one."""

import copy

import pytest
import torch
from fakes import EOS, PAD, VOCAB, Alphabet, FixedTasks, tiny_policy
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from grpo_core.batch import SamplingParams, Task
from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.model.policy import Policy, wrap
from grpo_core.sampling.computation import Unsupported
from grpo_core.sampling.decode_ops import AttentionShape, LayerAttention
from grpo_core.sampling.draw import draw, restrict
from grpo_core.sampling.end_of_sequence import describe_eos_mismatch, find_eos_ids
from grpo_core.sampling.fused_model import attend_to_prompts, check_model
from grpo_core.sampling.graph_decoder import GraphDecoder
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TASKS = FixedTasks().batch(0)
MIXED = [*TASKS, Task(4, "p", [7, 3, 9, 14, 5, 12, 6, 11, 4], {}, seed=(0, 0, 4))]  # with a prompt longer than the windows
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SHORT = {"rope_type": "default", "rope_theta": 10.0}
PHI3 = SIZES | {"hidden_size": 64}  # heads of 16 dimensions, of which 12 are rotated
PARTIAL = {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.75}
GRANITE = {
    "logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.6,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10.0, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
    "long_factor": [3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}  # fmt: skip
QWEN3_MOE = SIZES | {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES), True),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16), True),
    "llama, untied": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), True),
    "llama, scaled": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3, max_position_embeddings=64), True),
    "llama, dynamic": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES, max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
        ),
        False,
    ),
    "qwen2, window": (
        Qwen2ForCausalLM, Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1), True,
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=64), True),
    "mistral, window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=6), True),
    "gemma3_text": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **SIZES | {"num_key_value_heads": 1}, head_dim=16, sliding_window=6, query_pre_attn_scalar=9, layer_types=SLIDING_AND_FULL,
            final_logit_softcapping=3.0, rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
            },
        ),
        True,
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config(**PHI3, rope_parameters=PARTIAL, sliding_window=6), True),
    "phi3, longrope": (Phi3ForCausalLM, Phi3Config(**PHI3, rope_parameters=LONGROPE, original_max_position_embeddings=20), True),
    "smollm3": (
        SmolLM3ForCausalLM,
        SmolLM3Config(**SIZES, no_rope_layers=[0, 1], use_sliding_window=True, sliding_window=6, rope_parameters=SHORT),
        True,
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config(**SIZES, rope_parameters=SHORT), True),
    "olmo3": (
        Olmo3ForCausalLM,
        Olmo3Config(
            **SIZES, sliding_window=6, layer_types=SLIDING_AND_FULL, max_position_embeddings=64, rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                "full_attention": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16},
            },
        ),
        True,
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(
            **SIZES, head_dim=8, sliding_window=6, final_logit_softcapping=2.0, attn_logit_softcapping=1.0,
            query_pre_attn_scalar=5, attn_implementation="eager",
        ),
        True,
    ),
    "granite": (GraniteForCausalLM, GraniteConfig(**GRANITE, **SIZES, rope_parameters=SHORT), True),
    "gemma": (GemmaForCausalLM, GemmaConfig(**SIZES, head_dim=16, rope_parameters=SHORT), True),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**QWEN3_MOE, mlp_only_layers=[0], norm_topk_prob=True), True),
    "qwen3_moe, window": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**QWEN3_MOE, use_sliding_window=True, sliding_window=6, decoder_sparse_step=2, rope_parameters=SHORT),
        True,
    ),
    "mixtral": (
        MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=6, rope_parameters=SHORT), True,
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig(
            **SIZES, head_dim=16, num_local_experts=6, num_experts_per_tok=2, sliding_window=6, layer_types=SLIDING_AND_FULL,
            swiglu_limit=1.5, max_position_embeddings=64, rope_parameters={
                "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
        ),
        True,
    ),
    "cohere": (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.3), False),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, eos_token_id=EOS,
            bos_token_id=None,
        ),
        False,
    ),
}  # fmt: skip


def policy_on_device(*args, **kwargs):
    policy = tiny_policy(*args, **kwargs)
    policy.model.to(DEVICE)
    return policy


def make(policy, max_new_tokens=12, temperature=1.0, **how):
    return Sampler(policy.causal_lm, Alphabet(), max_new_tokens=max_new_tokens, temperature=temperature, **how)


def fused(sampler):
    """Whether the fused decoder drew everything so far."""
    return sampler.decoder_name == "fused" and not sampler._reported


def kept(rollouts):
    return [ids[mask].tolist() for ids, mask in zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_greedy_as_generate_and_logprobs_as_teacher_forced(name):
    """Greedy is token for token what generate gives; sampled log-probs are the trainer's; the decoder is the expected one."""
    torch.manual_seed(0)
    kind, config, expected = MODELS[name]
    model = kind(config).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that are not ones and zeros
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    attention = ["q_proj", "k_proj", "o_proj"]
    targets = {"gpt2": ["c_attn"], "qwen3_moe": attention, "mixtral": attention, "gpt_oss": attention, "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
    lora = LoraConfig(target_modules=targets.get(config.model_type, ["q_proj", "o_proj", "gate_proj", "down_proj"]))
    policy = wrap(model, ModelConfig(), lora, temperature=1.0)
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.1)
    said = []
    sampler = make(policy, notify=said.append)
    for rows in (
        kept(sampler.generate(MIXED, 1, greedy=True)),
        kept(make(policy, decoder="plain").generate(MIXED, 1, greedy=True)),
    ):
        for task, row in zip(MIXED, rows, strict=True):
            prompt = torch.tensor([task.prompt_ids], device=DEVICE)
            want = policy.causal_lm.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=PAD)[
                0, prompt.shape[1] :
            ]
            assert row == want.tolist()
    rollouts = sampler.generate(MIXED, 24)
    assert len(set(rollouts.lengths().tolist())) > 3  # ragged, or this shows little
    torch.testing.assert_close(policy.logprobs(rollouts), rollouts.rollout_logprobs, atol=1e-4, rtol=0)
    assert fused(sampler) == expected and (not said if expected else said)
    assert expected or "fused decoder" in said[0]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_attention_to_prompts_in_blocks_of_queries(cap, window, monkeypatch):
    """A prompt whose scores are too many is computed in parts, which leave out the keys that no query of a part sees."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 11, 8) for heads in (4, 2, 2))
    own = LayerAttention(window=window, sinks=torch.randn(4))
    shape = AttentionShape(1, 4, 2, 8, 1e-6, 0.4, 8, score_cap=cap)
    at = torch.arange(11)
    visible = (at <= at[:, None]) & (at > at[:, None] - (window or 11))
    scores = q @ k.repeat_interleave(2, dim=1).transpose(2, 3) * 0.4
    scores = (scores if cap is None else cap * torch.tanh(scores / cap)).masked_fill(~visible, -torch.inf)
    whole = torch.cat([scores, own.sinks[:, None, None].expand(3, 4, 11, 1)], dim=-1)
    want = whole.softmax(dim=-1)[..., :-1] @ v.repeat_interleave(2, dim=1)
    for limit in (1 << 20, 2 * 4 * 11 * 11, 3 * 4 * 11, 1):  # all prompts at once, two, three queries, one
        monkeypatch.setattr("grpo_core.sampling.fused_model.MAX_SCORES", limit)
        torch.testing.assert_close(attend_to_prompts(q, k, v, shape, own), want)


def test_rows_longer_than_the_length_at_which_a_rotation_changes_use_another_decoder():
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**PHI3, rope_parameters=LONGROPE, original_max_position_embeddings=8)).to(DEVICE)
    policy, said = wrap(model.eval(), ModelConfig(), LoraConfig(target_modules=["qkv_proj"]), temperature=1.0), []
    rollouts = make(policy, notify=said.append).generate(MIXED[-1:], 8)
    torch.testing.assert_close(policy.logprobs(rollouts), rollouts.rollout_logprobs, atol=1e-4, rtol=0)
    assert any("longer than 8 tokens, above which its rotary embedding changes" in text for text in said)


def test_bounds_of_scores_that_the_models_attention_may_leave_out_are_not_decoded():
    kind, config, _ = MODELS["gemma2"]
    model = kind(copy.deepcopy(config))
    check_model(model)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(Unsupported, match="bounds the scores"):
        check_model(model)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("decoder", ["auto", "plain"])
def test_the_samplers_logprobs_are_the_trainers(temperature, decoder):
    policy = policy_on_device(lora_noise=0.1, temperature=temperature)
    rollouts = make(policy, temperature=temperature, decoder=decoder).generate(TASKS, 8)
    assert len(set(rollouts.lengths().tolist())) > 3
    torch.testing.assert_close(policy.logprobs(rollouts), rollouts.rollout_logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "how", [{}, {"rows_at_once": 5}, {"rows_at_once": 1}, {"decoder": "plain"}, {"decoder": "plain", "rows_at_once": 5}]
)
def test_waves_refill_and_compaction_change_no_draw(how):
    policy = policy_on_device(lora_noise=0.1)
    whole = make(policy, 24)
    whole.generate(TASKS, 8)
    whole._decoders["fused"].compact = False
    want = whole.generate(TASKS, 8)
    rollouts = make(policy, 24, **how).generate(TASKS, 8)
    assert kept(rollouts) == kept(want) and torch.equal(rollouts.truncated, want.truncated)
    torch.testing.assert_close(rollouts.rollout_logprobs, want.rollout_logprobs, atol=1e-5, rtol=0)


def test_rows_really_leave_and_make_room(monkeypatch):
    """Fewer row-steps with compaction than without; with few slots no more rows at once than those."""
    sampler = make(policy_on_device(), 48)
    sampler.generate(TASKS, 8)
    sizes = []
    step = GraphDecoder._step
    monkeypatch.setattr(GraphDecoder, "_step", lambda self, size: (sizes.append(size), step(self, size)))
    monkeypatch.setattr(GraphDecoder, "_step_rows", lambda self, n: n)
    work = {}
    for rows_at_once, compact in ((None, False), (None, True), (6, True)):
        sampler.release()
        sampler._decoders["fused"].compact, sampler.rows_at_once = compact, rows_at_once
        sizes.clear()
        sampler.generate(TASKS, 8)
        work[rows_at_once, compact] = sum(sizes)
        assert max(sizes) <= (rows_at_once or 32)
    assert work[None, True] < 0.7 * work[None, False] and work[6, True] < 0.7 * work[None, False]


def test_what_does_not_fit_is_halved_once_and_comes_out_the_same(monkeypatch):
    policy, said = policy_on_device(lora_noise=0.1), []
    want = make(policy).generate(TASKS, 8)
    sampler = make(policy, notify=said.append)
    sampler.generate(TASKS[:1], 2)
    cache_type = type(sampler._decoders["fused"].computation.cache)
    allocate = cache_type.allocate

    def short(self, prompts, width, slots, length):
        if slots > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        allocate(self, prompts, width, slots, length)

    monkeypatch.setattr(cache_type, "allocate", short)
    for _ in range(2):
        assert kept(sampler.generate(TASKS, 8)) == kept(want)
    assert sampler.rows_at_once == 8 and len(said) == 2  # 32 -> 16 -> 8, and not again
    monkeypatch.setattr(cache_type, "allocate", lambda *_: short(None, 0, 0, 10, 0))
    with pytest.raises(torch.OutOfMemoryError):
        sampler.generate(TASKS, 8)


def test_it_draws_from_the_live_adapter_and_leaves_the_weights_alone():
    policy = policy_on_device(lora_noise=0.1)
    before = {key: value.clone() for key, value in policy.model.state_dict().items()}
    sampler = make(policy)
    first = sampler.generate(TASKS, 8)
    assert fused(sampler)
    assert all(torch.equal(value, before[key]) for key, value in policy.model.state_dict().items())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    second = sampler.generate(TASKS, 8)
    assert first.completions != second.completions
    torch.testing.assert_close(policy.logprobs(second), second.rollout_logprobs, atol=1e-4, rtol=0)
    with policy.reference():
        base = sampler.generate(TASKS, 8)
        torch.testing.assert_close(policy.logprobs(base), base.rollout_logprobs, atol=1e-4, rtol=0)
    assert base.completions != second.completions
    for parameter in policy.causal_lm.parameters():  # somebody puts all weights elsewhere
        parameter.data = parameter.data.clone()
    policy.causal_lm.model.layers[0].mlp.gate_proj.weight.data *= 1.5
    moved = sampler.generate(TASKS, 8)
    torch.testing.assert_close(policy.logprobs(moved), moved.rollout_logprobs, atol=1e-4, rtol=0)


def check(policy, sampler, expected=True):
    rollouts = sampler.generate(TASKS, 4)
    torch.testing.assert_close(policy.logprobs(rollouts), rollouts.rollout_logprobs, atol=1e-4, rtol=0)
    assert fused(sampler) == expected


def test_a_model_that_is_changed_between_calls_is_sampled_as_it_is():
    policy = policy_on_device(lora_noise=0.1)
    sampler, layer = make(policy), policy.causal_lm.model.layers[0]
    check(policy, sampler)
    layer.self_attn.q_proj.base_layer.bias.data.add_(1)  # in place
    check(policy, sampler)
    state = {name: 1.2 * value for name, value in policy.causal_lm.state_dict().items()}
    policy.causal_lm.load_state_dict(state, assign=True)
    check(policy, sampler)
    policy.model.merge_adapter()
    check(policy, sampler, expected=False)

    base = Qwen2ForCausalLM(Qwen2Config(**SIZES)).to(DEVICE).eval()
    sampler = make(Policy(base))
    check(Policy(base), sampler)
    policy = wrap(base, ModelConfig(), LoraConfig(), temperature=1.0)  # an adapter put on afterwards
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, 0.1)
    check(policy, sampler)


def test_what_only_looks_like_a_known_family_is_left_to_its_own_forward():
    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 0.25 * out.logits
            return out

    said = []
    make(Policy(Scaled(LlamaConfig(**SIZES)).to(DEVICE)), notify=said.append).generate(TASKS, 2)
    assert "Scaled is not a class of transformers" in said[0]
    policy = policy_on_device(lora_noise=0.1)
    policy.causal_lm.model.layers[0].self_attn.q_proj.base_layer.bias.requires_grad_(True)
    check(policy, make(policy), expected=False)


def test_all_weights_trained():
    """Without an adapter the weights themselves are live, and stay the parameters that an optimizer moves."""
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).to(DEVICE)
    policy = Policy(model)
    sampler = make(policy)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    sampler.generate(TASKS, 4)
    assert fused(sampler) and places == [parameter.data_ptr() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    rollouts = sampler.generate(TASKS, 4)
    torch.testing.assert_close(policy.logprobs(rollouts), rollouts.rollout_logprobs, atol=1e-4, rtol=0)


def test_nothing_large_is_held_between_calls():
    sampler = make(policy_on_device())
    sampler.generate(TASKS, 8)
    cache = sampler._decoders["fused"].computation.cache
    assert all(value.numel() == 0 for name, value in vars(cache).items() if name in ("prompts", "rows", "buffer"))


def test_first_tokens_are_drawn_as_often_as_the_model_says():
    """Chi-square over 20,000 samples of one prompt."""
    policy = policy_on_device(lora_noise=0.1, temperature=0.8)
    task = Task(0, "p", [5, 6, 7], {}, (3, 1, 4))
    rollouts = make(policy, 1, 0.8).generate([task], 20_000)
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([task.prompt_ids], device=DEVICE)).logits[0, -1]
    expected = 20_000 * (logits / 0.8).softmax(0).double().cpu()
    seen = torch.bincount(rollouts.completion_ids[:, 0], minlength=VOCAB).double().cpu()
    statistic = ((seen - expected).square() / expected).sum()
    assert expected.min() > 5 and statistic < 37.7  # 15 degrees of freedom, p = 0.001; the noise is fixed


def test_top_k_top_p_and_min_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]])
    probabilities = logits.softmax(-1)[0]  # 0.64, 0.24, 0.09, 0.03, 0.004

    def left(**how):
        return restrict(logits, SamplingParams(**how))[0].isfinite().tolist()

    assert left(top_k=2) == [True, True, False, False, False] and left(top_k=9) == [True] * 5
    assert (
        left(top_p=0.5) == [True] + [False] * 4
        and left(top_p=float(probabilities[:2].sum()) + 0.01) == [True] * 3 + [False] * 2
    )
    assert left(min_p=0.3) == [True, True, False, False, False] and left(min_p=1.0) == [True] + [False] * 4
    assert left(min_p=0.3, temperature=4.0) == [True] * 4 + [False]  # read at the temperature
    assert left(top_p=0.8, temperature=0.1) == [True] + [False] * 4
    for wrong in ({"top_k": 0}, {"top_p": 0.0}, {"min_p": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingParams(**wrong)


@pytest.mark.parametrize("decoder", ["auto", "plain"])
def test_restricted_sampling_draws_only_what_is_left(decoder):
    policy = policy_on_device(lora_noise=0.1)
    settings = SamplingParams(1.0, top_k=2)
    rollouts = make(policy, decoder=decoder).generate(TASKS, 8, settings=settings)
    exact = policy.logprobs(rollouts)
    mask = rollouts.completion_mask
    assert (rollouts.rollout_logprobs[mask] >= exact[mask] - 1e-5).all()
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
    seen = torch.cat([rollouts.prompt_mask, mask], 1).long()
    with torch.no_grad():
        logits = policy.causal_lm(ids, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0)).logits
    ahead = logits[:, rollouts.prompt_ids.shape[1] - 1 : -1]
    rank = (ahead > ahead.gather(2, rollouts.completion_ids[..., None])).sum(-1)
    assert set(rank[mask].tolist()) == {0, 1}


def test_limits():
    policy = policy_on_device()
    sampler = make(policy)
    with pytest.raises(ConfigError, match="empty"):
        sampler.generate([Task(0, "", [], {})], 2)
    policy.causal_lm.config.max_position_embeddings = 14
    with pytest.raises(ConfigError, match="14 positions"):
        sampler.generate([Task(0, "", [4] * 3, {})], 2)
    sampler.generate([Task(0, "", [4] * 2, {})], 2)


@pytest.mark.parametrize("decoder", ["auto", "plain"])
def test_rows_may_be_allowed_fewer_tokens(decoder):
    sampler, limits = make(policy_on_device(), decoder=decoder), torch.tensor([1, 2, 3, 12] * 4)
    whole, rollouts = sampler.generate(TASKS, 4), sampler.generate(TASKS, 4, limits=limits)
    assert kept(rollouts) == [row[:limit] for row, limit in zip(kept(whole), limits.tolist(), strict=True)]
    short = sampler.generate(TASKS, 4, limits=torch.full((16,), 2))  # fewer than the sampler allows, all of them
    assert kept(short) == [row[:2] for row in kept(whole)]
    assert rollouts.truncated.tolist() == [row[-1] != EOS for row in kept(rollouts)]


def test_prompts_that_go_through_the_model_in_several_parts(monkeypatch):
    policy = policy_on_device(lora_noise=0.1)
    want = make(policy).generate(TASKS, 4)
    monkeypatch.setattr("grpo_core.sampling.fused_model.MAX_PREFILL_CPU_TOKENS", 5)  # one or two prompts at a time
    assert kept(make(policy).generate(TASKS, 4)) == kept(want)


def test_the_mask_runs_through_the_chosen_end_and_truncation_is_told():
    rollouts = make(policy_on_device()).generate(TASKS, 16)
    assert rollouts.truncated.any() and not rollouts.truncated.all()
    for ids, mask, cut in zip(rollouts.completion_ids, rollouts.completion_mask, rollouts.truncated, strict=True):
        kept = ids[mask].tolist()
        assert mask[: len(kept)].all() and EOS not in kept[:-1]
        assert (kept[-1] != EOS and len(kept) == 12) if cut else kept[-1] == EOS


def test_every_end_of_sequence_id_ends():
    policy = policy_on_device()
    policy.causal_lm.generation_config.eos_token_id = [EOS, 5, 9]
    assert find_eos_ids(policy.causal_lm, Alphabet()) == {EOS, 5, 9}
    rollouts = make(policy).generate(TASKS, 16)
    last = rollouts.completion_ids.gather(1, rollouts.lengths()[:, None] - 1).squeeze(1)
    assert set(last[~rollouts.truncated].tolist()) == {EOS, 5, 9}


def test_a_tokenizer_that_ends_otherwise_than_the_model_is_told():
    class Converted(Alphabet):
        eos_token_id = 7

        def convert_ids_to_tokens(self, ids):
            return [f"<{i}>" for i in ids]

    model = policy_on_device().causal_lm
    model.generation_config.eos_token_id, model.config.eos_token_id = [EOS, 5], EOS
    assert describe_eos_mismatch(model, Alphabet()) is None
    sentence = describe_eos_mismatch(model, Converted())
    assert f"'<7>', the model's '<{min(EOS, 5)}>', '<{max(EOS, 5)}>'" in sentence
    model.generation_config.eos_token_id = [EOS, 7]
    assert describe_eos_mismatch(model, Converted()) is None


def test_a_rows_noise_does_not_depend_on_the_other_rows():
    """The same rollouts whatever the split over ranks, the group size, or the step's other prompts."""
    sampler = make(policy_on_device())
    whole = sampler.generate(TASKS, 4)
    for i, task in enumerate(TASKS):
        alone = sampler.generate([task], 6)
        for sample in range(4):
            row = 4 * i + sample
            assert kept(alone)[sample] == kept(whole)[row]


def test_other_seeds_give_other_completions_and_the_same_seed_the_same():
    sampler = make(policy_on_device())
    first, again = sampler.generate(TASKS, 4), sampler.generate(TASKS, 4)
    assert torch.equal(first.completion_ids, again.completion_ids)
    other = sampler.generate(FixedTasks().batch(1), 4)
    assert first.completions != other.completions
    assert len(set(first.completions[:4])) > 1  # samples of a group differ


def test_texts_are_the_unmasked_tokens_without_the_end():
    rollouts = make(policy_on_device()).generate(TASKS, 2)
    for text, ids, mask in zip(rollouts.completions, rollouts.completion_ids, rollouts.completion_mask, strict=True):
        assert text == Alphabet().batch_decode([ids[mask].tolist()])[0]


def test_draw_follows_the_distribution_and_reports_its_logprob():
    logits = torch.tensor([0.5, -1.0, float("-inf"), 2.0])
    uniform = (torch.arange(20_000, dtype=torch.double) + 0.5) / 20_000
    token, logprob = draw(logits.expand(len(uniform), -1), 0.7, uniform)
    want = (logits / 0.7).softmax(0)
    torch.testing.assert_close(torch.bincount(token, minlength=4) / len(token), want, atol=1e-3, rtol=0)
    torch.testing.assert_close(logprob, want.log()[token])
    assert draw(logits[None], 1.0, torch.tensor([1.0 - 1e-16], dtype=torch.double))[0] == 3
    assert draw(logits.flip(0)[None, 1:], 1.0, torch.tensor([0.0], dtype=torch.double))[0] == 1  # the first has p = 0


def test_prompts_of_very_different_lengths():
    policy = policy_on_device(lora_noise=0.1)
    tasks = [Task(0, "p", [3] * 30, {}), Task(1, "p", [4], {})]
    rollouts = make(policy).generate(tasks, 4)
    torch.testing.assert_close(policy.logprobs(rollouts), rollouts.rollout_logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("width", [5, 2047, 5000, 4 * 512 + 1])
def test_draw_is_the_inverse_of_the_cumulative_sum_at_any_width(width):
    torch.manual_seed(0)
    logits = 4 * torch.randn(64, width)
    logits[:, torch.rand(width) < 0.3] = -torch.inf
    logits[:32, width // 2 :] = -torch.inf  # whole chunks without probability
    logits[:, 0] = 1.0
    uniform = torch.rand(64, dtype=torch.double)
    uniform[:4] = torch.tensor([0.0, 0.5, 1.0, 1e-9], dtype=torch.double)  # 1 is never drawn, but rounding may make it
    probabilities = logits.double().softmax(-1)
    cumulative = probabilities.cumsum(-1)
    token, logprob = draw(logits, 1.0, uniform)
    rows = torch.arange(64)
    before = torch.where(token > 0, cumulative[rows, (token - 1).clamp(min=0)], 0.0)
    assert (before <= uniform + 1e-6).all() and (cumulative[rows, token] >= uniform - 1e-6).all()
    torch.testing.assert_close(logprob.double(), probabilities.log()[rows, token], atol=1e-5, rtol=0)
