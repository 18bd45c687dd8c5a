"""What can be told of a model from its configuration, before its weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from grpo_core.config import LoraConfig, ModelConfig
from grpo_core.data import first_line, local_hint, model_path
from grpo_core.schema import ConfigError, known


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """The configuration that lies beside the weights.

    Raises:
        ConfigError: it cannot be loaded, or is of an adapter.
    """
    folder = model_path(model.path)
    if (Path(folder) / "adapter_config.json").exists():
        raise ConfigError(
            f"model.path is {model.path!r}, which holds an adapter and not a model; make a whole model of its run with "
            f"python -m grpo_core export RUN --merged, and name that"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # of many kinds, by the model's
        raise ConfigError(
            f"model.path is {model.path!r}, and it cannot be loaded: {first_line(error)}{local_hint(model.path)}"
        ) from error


def check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError for a tokenizer that has ids which the model has no embedding of."""
    size, highest = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if highest >= size:
        raise ConfigError(
            f"the tokenizer has tokens up to id {highest}, but the model has embeddings of {size} only; "
            f"take the tokenizer that belongs to the model"
        )


def check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, config: PretrainedConfig) -> None:
    """Raise ConfigError for an empty prompt, and for one that leaves no room for max_new_tokens."""
    if not all(prompts):
        raise ConfigError("a prompt is empty: a completion needs at least one token to follow")
    longest = max(len(prompt) for prompt in prompts)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest + max_new_tokens > positions:
        raise ConfigError(
            f"a prompt of {longest} tokens and sampling.max_new_tokens {max_new_tokens} are together more than the "
            f"model's {positions} positions"
        )


def check_targets(config: PretrainedConfig, lora: LoraConfig, trust_remote_code: bool = False) -> None:
    """Raise ConfigError for LoRA targets that name no layer of the model."""
    if not lora.r or lora.target_modules == "all-linear":
        return
    try:
        with torch.device("meta"):  # shapes without weights
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # what cannot be made so is seen when it is loaded
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(lora.target_modules, str):
        if not any(re.fullmatch(lora.target_modules, name) for name in names):
            raise ConfigError(f"lora.target_modules is {lora.target_modules!r}, which matches no module of the model")
        return
    last = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"lora.target_modules names {target!r}, which the model does not have; {known(target, last)}"
            )
