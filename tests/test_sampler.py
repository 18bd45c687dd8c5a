import pytest
import torch
from fakes import EOS, VOCAB, Alphabet, FixedTasks, tiny_policy
from transformers import GPT2Config, GPT2LMHeadModel

from grpo_core.batch import Task
from grpo_core.policy import Policy
from grpo_core.sampler import Sampler, draw, eos_ids


def make(policy, max_new_tokens=12, temperature=1.0):
    return Sampler(policy.causal_lm, Alphabet(), max_new_tokens=max_new_tokens, temperature=temperature)


TASKS = FixedTasks().batch(0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_samplers_logprobs_are_the_trainers(temperature):
    policy = tiny_policy(lora_noise=0.1, temperature=temperature)
    rollouts = make(policy, temperature=temperature).generate(TASKS, 8)
    assert len(set(rollouts.lengths().tolist())) > 3  # ragged, or this shows little
    torch.testing.assert_close(policy.logprobs(rollouts), rollouts.rollout_logprobs, atol=1e-4, rtol=0)


def test_a_model_without_rotary_positions():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            initializer_range=0.3,
            eos_token_id=EOS,
            bos_token_id=None,
        )
    )
    policy = Policy(model)
    rollouts = make(policy).generate(TASKS, 4)
    torch.testing.assert_close(policy.logprobs(rollouts), rollouts.rollout_logprobs, atol=1e-4, rtol=0)


def test_greedy_is_what_generate_gives():
    policy = tiny_policy(lora_noise=0.1)
    rollouts = make(policy).generate(TASKS, 1, greedy=True)
    for i, task in enumerate(TASKS):
        want = policy.causal_lm.generate(torch.tensor([task.prompt_ids]), max_new_tokens=12, do_sample=False)[
            0, len(task.prompt_ids) :
        ]
        got = rollouts.completion_ids[i][rollouts.completion_mask[i]]
        assert got.tolist() == want.tolist()


def test_the_mask_runs_through_the_chosen_end_and_truncation_is_told():
    rollouts = make(tiny_policy()).generate(TASKS, 16)
    assert rollouts.truncated.any() and not rollouts.truncated.all()
    for ids, mask, cut in zip(rollouts.completion_ids, rollouts.completion_mask, rollouts.truncated, strict=True):
        kept = ids[mask].tolist()
        assert mask[: len(kept)].all() and EOS not in kept[:-1]
        assert (kept[-1] != EOS and len(kept) == 12) if cut else kept[-1] == EOS


def test_every_end_of_sequence_id_ends():
    policy = tiny_policy()
    policy.causal_lm.generation_config.eos_token_id = [EOS, 5, 9]
    assert eos_ids(policy.causal_lm, Alphabet()) == {EOS, 5, 9}
    rollouts = make(policy).generate(TASKS, 16)
    last = rollouts.completion_ids.gather(1, rollouts.lengths()[:, None] - 1).squeeze(1)
    assert set(last[~rollouts.truncated].tolist()) == {EOS, 5, 9}


def test_a_rows_noise_does_not_depend_on_the_other_rows():
    """The same rollouts whatever the split over ranks, the group size, or the step's other prompts."""
    sampler = make(tiny_policy())
    whole = sampler.generate(TASKS, 4)
    for i, task in enumerate(TASKS):
        alone = sampler.generate([task], 6)
        for sample in range(4):
            row = 4 * i + sample
            assert (
                alone.completion_ids[sample][alone.completion_mask[sample]].tolist()
                == whole.completion_ids[row][whole.completion_mask[row]].tolist()
            )


def test_other_seeds_give_other_completions_and_the_same_seed_the_same():
    sampler = make(tiny_policy())
    first, again = sampler.generate(TASKS, 4), sampler.generate(TASKS, 4)
    assert torch.equal(first.completion_ids, again.completion_ids)
    other = sampler.generate(FixedTasks().batch(1), 4)
    assert first.completions != other.completions
    assert len(set(first.completions[:4])) > 1  # samples of a group differ


def test_texts_are_the_unmasked_tokens_without_the_end():
    rollouts = make(tiny_policy()).generate(TASKS, 2)
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
    policy = tiny_policy(lora_noise=0.1)
    tasks = [Task(0, "p", [3] * 30, {}), Task(1, "p", [4], {})]
    rollouts = make(policy).generate(tasks, 4)
    torch.testing.assert_close(policy.logprobs(rollouts), rollouts.rollout_logprobs, atol=1e-4, rtol=0)
