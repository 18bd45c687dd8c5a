"""Create a small Qwen2 with a tokenizer learned from text, as the built-in policy was."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

PAD, EOS = "<|endoftext|>", "<|end|>"  # Qwen2Tokenizer pads with the first
CHAT_TEMPLATE = (  # a user's turn is a prompt of configs/tiny.yaml, and the assistant's a target with its end
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'Question: ' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '\\n' + message.content + '<|end|>\\n' }}"
    "{% elif message.role == 'system' %}{{ message.content + '\\n' }}"
    "{% else %}{{ raise_exception('the roles are system, user and assistant, not ' + message.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
)


def new_model(
    texts: Iterable[str],
    *,
    vocab_size: int = 768,
    hidden_size: int = 128,
    intermediate_size: int = 384,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    """Return a randomly initialised Qwen2 and a byte-level BPE tokenizer learned from `texts`.

    Every digit is one token, <think> and </think> are one token each, and any text can be encoded.
    """
    tokenizer = new_tokenizer(texts, vocab_size)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config), tokenizer


def new_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Return the tokenizer of `new_model`, of the class that transformers loads for a Qwen2 folder."""
    qwen2 = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = qwen2.normalizer, qwen2.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, eos_token=EOS, pad_token=PAD)
    tokenizer.add_tokens(["<think>", "</think>"])  # ordinary tokens: decoding keeps them
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
