"""Log-probs against the plainest possible computation, on either side of padding; the reference; dropout."""

import pytest
import torch
from fakes import ragged_rollouts, tiny_policy
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_core.batch import split, take
from grpo_core.model.policy import Policy
from grpo_core.objective.kl import kl_exact
from grpo_core.schema import ConfigError


def naive_logprobs(policy, rollouts):
    """One row at a time, no padding, the model's own logits."""
    rows = torch.zeros(rollouts.completion_ids.shape)
    for i in range(len(rollouts)):
        prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i]]
        completion = rollouts.completion_ids[i][rollouts.completion_mask[i]]
        logits = policy.model(torch.cat([prompt, completion])[None]).logits[0] / policy.temperature
        predicting = logits[len(prompt) - 1 : -1].log_softmax(-1)
        rows[i, : len(completion)] = predicting.gather(1, completion[:, None]).squeeze(1)
    return rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_models_own(side, temperature):
    policy = tiny_policy(lora_noise=0.1, temperature=temperature)
    rollouts = ragged_rollouts(side=side)
    torch.testing.assert_close(policy.logprobs(rollouts), naive_logprobs(policy, rollouts), atol=1e-5, rtol=1e-5)


def test_logits_that_are_not_the_heads_output_are_refused():
    """What multiplies them is found (granite and cohere in test_packing); anything else would be wrong silently."""
    policy, rollouts = tiny_policy(lora_noise=0.1), ragged_rollouts()
    own = policy.causal_lm.forward

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits + torch.arange(out.logits.shape[-1])
        return out

    policy.causal_lm.forward = forward
    with pytest.raises(ConfigError, match="the qwen2 model at model.path is not supported: its logits are not a multiple"):
        policy.logprobs(rollouts)


def test_padding_and_neighbours_change_nothing():
    policy, rollouts = tiny_policy(lora_noise=0.1), ragged_rollouts()
    whole = policy.logprobs(rollouts)
    parts = torch.cat([policy.logprobs(micro) for micro in split(rollouts, 3)])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    short = take(rollouts, (rollouts.lengths() <= 3).nonzero().squeeze(1))  # all-padding columns on the right
    assert policy.logprobs(short).shape == short.completion_ids.shape
    assert (whole[~rollouts.completion_mask] == 0).all()


def test_the_gradient_is_the_naive_one_with_and_without_checkpointing():
    rollouts, weights = ragged_rollouts(), torch.rand(8, 6)
    grads = []
    for checkpointing, compute in ((False, naive_logprobs), (False, None), (True, None)):
        policy = tiny_policy(lora_noise=0.1, gradient_checkpointing=checkpointing)
        with policy.training():
            logprobs = compute(policy, rollouts) if compute else policy.logprobs(rollouts)
            (logprobs * weights * rollouts.completion_mask).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads[2], grads[0], atol=1e-5, rtol=1e-4)


def test_the_reference_is_the_base_model():
    policy, rollouts = tiny_policy(lora_noise=0.1), ragged_rollouts()
    with torch.no_grad():
        with policy.reference():
            reference = policy.logprobs(rollouts)
        base = tiny_policy(lora_noise=0.0).logprobs(rollouts)  # B = 0: the adapter adds nothing
        assert not torch.allclose(policy.logprobs(rollouts), reference, atol=1e-3)
    torch.testing.assert_close(reference, base)


def test_dropout_is_on_only_in_training():
    policy, rollouts = tiny_policy(lora_noise=0.3, dropout=0.5), ragged_rollouts()
    with torch.no_grad():
        quiet = policy.logprobs(rollouts)
        assert torch.equal(quiet, policy.logprobs(rollouts))
        with policy.training():
            assert not torch.allclose(quiet, policy.logprobs(rollouts), atol=1e-3)
        assert torch.equal(quiet, policy.logprobs(rollouts))


def test_only_the_adapter_is_trained_and_its_norm_is_told():
    policy = tiny_policy()
    names = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    before = policy.norm()
    with torch.no_grad():
        policy.parameters()[0].mul_(2)
    assert policy.norm() > before


def test_the_exact_divergence_is_zero_from_itself_and_agrees_with_its_sample():
    policy, rollouts = tiny_policy(lora_noise=0.1), ragged_rollouts()
    whole = policy.forward(rollouts, divergence=kl_exact).divergence
    assert (whole[rollouts.completion_mask] > 0).all() and (whole[~rollouts.completion_mask] == 0).all()
    keep = rollouts.completion_mask & (torch.arange(6) % 2 == 0)
    [packing] = policy.plan(rollouts)
    torch.testing.assert_close(policy.divergence(rollouts, packing, kl_exact, keep), whole[keep].detach())
    assert tiny_policy().forward(rollouts, divergence=kl_exact).divergence.abs().max() < 1e-6


@pytest.mark.parametrize("moved", [False, True])
def test_the_exact_divergence_sees_an_adapter_on_the_head(moved):
    """The reference's distribution is its own head's, and a moving one's too."""
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    model = get_peft_model(base, PeftLoraConfig(r=4, target_modules=["lm_head"]))
    policy, rollouts = Policy(model), ragged_rollouts()
    if moved:
        policy.move_reference()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
        with policy.reference():
            base = policy.model(input_ids=rollouts.prompt_ids).logits.log_softmax(-1)
        own = policy.model(input_ids=rollouts.prompt_ids).logits.log_softmax(-1)
    assert (own - base).abs().max() > 0.1
    assert policy.forward(rollouts, divergence=kl_exact).divergence[rollouts.completion_mask].mean() > 1e-3


def test_a_reference_has_no_dropout():
    policy, rollouts = tiny_policy(dropout=0.5, lora_noise=0.3), ragged_rollouts()
    policy.move_reference()
    with policy.training():
        assert policy.layout == "rows"  # tried now, dropout or not
        seen = []
        own = policy._hidden
        policy._hidden = lambda *args: seen.append(own(*args)) or seen[-1]
        for _ in range(2):
            policy.forward(rollouts, divergence=kl_exact)
        assert policy.model.training
    assert torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[2])


def test_a_moving_reference_starts_as_the_base_and_goes_towards_the_policy():
    policy, rollouts = tiny_policy(), ragged_rollouts()
    policy.move_reference()  # of a fresh adapter
    base = policy.logprobs(rollouts).detach()
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    own = [p.detach().clone() for p in policy.parameters()]

    def reference():
        with torch.no_grad(), policy.reference():
            return policy.logprobs(rollouts)

    torch.testing.assert_close(reference(), base)
    policy.move_reference(0.25)
    for value, p in zip(policy.reference_state(), own, strict=True):
        assert torch.allclose(value, 0.25 * p) or torch.allclose(value, p)  # B was 0, A has not moved
    policy.move_reference(1.0)
    torch.testing.assert_close(reference(), policy.logprobs(rollouts).detach())
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), own, strict=True))  # the policy is left alone
    fresh = tiny_policy()
    fresh.move_reference()
    fresh.load_reference(policy.reference_state())
    assert all(torch.equal(a, b) for a, b in zip(fresh.reference_state(), own, strict=True))
