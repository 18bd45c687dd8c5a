"""The text that a model wrote is what rewards, files and users see (FAULTS 6)."""

import pytest
import torch
from fakes import tiny_policy

from grpo_core.commands.sample import TokenPrinter
from grpo_core.model.new_model import new_tokenizer
from grpo_core.sampling.request import Draws
from grpo_core.sampling.sampler import Sampler
from grpo_core.sampling.texts import decode_completions, find_hidden_ids


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer in which <think>, </think> and a token for tools are special, as in many reasoning models."""
    tokenizer = new_tokenizer(["one two three"] * 4, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<tool>"], "bos_token": "<|begin|>"})
    return tokenizer


def test_fault_6_special_tokens_that_the_model_wrote_stay(tokenizer):
    text = "<think>one</think>two<tool>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "onetwo"  # what rewards were given
    hidden = find_hidden_ids(tokenizer, [tokenizer.eos_token_id])
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert decode_completions(tokenizer, [row, ids], hidden) == [text, text]


def test_fault_6_every_end_of_the_model_is_removed(tokenizer):
    ids, end = tokenizer("one")["input_ids"], tokenizer("<tool>")["input_ids"]
    assert decode_completions(tokenizer, [ids + end], find_hidden_ids(tokenizer, end)) == ["one"]


def test_fault_6_the_sampler_and_the_sample_command_decode_in_the_same_way(tokenizer):
    text = "<think>one</think>two"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    sampler = Sampler(tiny_policy().causal_lm, tokenizer, max_new_tokens=5)
    draws = Draws(torch.tensor([ids]), torch.zeros(1, len(ids)), torch.tensor([len(ids)]), torch.tensor([True]))
    assert sampler._decode_texts(draws) == (text,)
    written = []
    printer = TokenPrinter(tokenizer, [tokenizer.eos_token_id], written.append)
    for token in ids:
        printer([0], [token])
    assert "".join(written) + printer.rest() == text
