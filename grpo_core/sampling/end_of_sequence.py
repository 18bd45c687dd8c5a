"""Find the end-of-sequence tokens of a model: every one of them ends a completion, and the one drawn is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo_core.schema import ConfigError


def find_eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return every token id that ends a completion: those of the generation config, model config and tokenizer.

    Raises:
        ConfigError: there is none, or one of them is no token id of the model.
    """
    return find_eos_ids_of(model.generation_config, model.config, tokenizer)


def find_eos_ids_of(
    generation_config: GenerationConfig | None, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> set[int]:
    """Return every token id that ends a completion of a model with these configurations; see `find_eos_ids`."""
    check_eos_ids(config, config, "config.json")
    check_eos_ids(generation_config, config, "generation_config.json")
    ids = _eos_ids_of(generation_config) | _eos_ids_of(config) | _eos_ids_of(tokenizer)
    if not ids:
        raise ConfigError(
            "neither the model nor its tokenizer has an end-of-sequence token, so no completion would ever end; set "
            "eos_token_id in the model's generation_config.json"
        )
    return ids


def is_eos(tokens: Tensor, eos_ids: Tensor) -> Tensor:
    """Return which of `tokens` are end-of-sequence tokens, bool. `_is_eos` of kernels/decode_kernels.py is its twin."""
    return torch.isin(tokens, eos_ids)


def check_eos_ids(source: object, config: PretrainedConfig, file: str) -> None:
    """Raise ConfigError if an end-of-sequence token in `file` is no token id of the model: no completion has it."""
    size = config.get_text_config().vocab_size
    for token in _eos_ids_of(source):
        if not isinstance(token, int) or not 0 <= token < size:
            raise ConfigError(
                f"eos_token_id in the model's {file} is {token!r}; the model's token ids are 0 to {size - 1}"
            )


def describe_eos_mismatch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a warning if tokenizer and model share no end-of-sequence token, as after a faulty conversion."""
    model_ids = _eos_ids_of(model.generation_config) | _eos_ids_of(model.config)
    tokenizer_ids = _eos_ids_of(tokenizer)
    if not model_ids or not tokenizer_ids or model_ids & tokenizer_ids:
        return None
    names = [", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(ids)))) for ids in (tokenizer_ids, model_ids)]
    return (
        f"the tokenizer's end-of-sequence token is {names[0]}, the model's {names[1]}; both end a completion, and the "
        f"targets of sft end with the tokenizer's"
    )


def _eos_ids_of(source: object) -> set[Any]:
    ids = getattr(source, "eos_token_id", None)
    return {ids} if isinstance(ids, (int, str)) else set(ids or ())
