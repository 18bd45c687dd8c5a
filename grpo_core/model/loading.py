"""Load a tokenizer and a model's configuration, and check what can be known of a model before its weights load."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.schema import ConfigError, first_line, list_known

BUILTIN = Path(__file__).parents[1] / "builtin"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by their names in the configuration


def resolve_dtype(name: str) -> torch.dtype:
    """Return the dtype of `model.precision`; auto is bf16 on GPUs that have it, fp16 on older ones, fp32 on the CPU.

    Raises:
        ConfigError: `name` is fp16 and there is no GPU; DeepSpeed refuses fp16 on the CPU.
    """
    if name == "fp16" and not torch.cuda.is_available():
        raise ConfigError("model.precision is fp16, which needs a GPU; use auto, fp32 or bf16")
    if name != "auto":
        return DTYPES[name]
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` without its module, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def model_path(path: str) -> str:
    """A hub id or folder as it is; builtin:NAME becomes the folder inside this package.

    Raises:
        ConfigError: no such built-in model, or no such folder where only a folder can be meant.
    """
    if not path.startswith("builtin:"):
        if missing := missing_folder(path):
            raise ConfigError(f"model.path is {path!r}: {missing}")
        return path
    folder = BUILTIN / path.removeprefix("builtin:")
    if not folder.is_dir():
        raise ConfigError(
            f"model.path is {path!r}; {list_known(path, [f'builtin:{p.name}' for p in BUILTIN.glob('*/')])}"
        )
    return str(folder)


def missing_folder(path: str) -> str | None:
    """Why nothing is at `path`, where it must be a folder: a name that begins as one or lies in one that is there."""
    where = Path(path)
    local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or ("/" in path and where.parent.is_dir())
    if where.exists() or not local:
        return None
    if not where.parent.is_dir():
        return f"there is no folder {path}"
    there = [beside.name for beside in where.parent.iterdir() if beside.is_dir()]
    return f"there is no folder {path}; {list_known(where.name, there)}"


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigError: it cannot be loaded.
    """
    folder = model_path(path)
    if Path(folder).is_dir() and not [*Path(folder).glob("*token*"), *Path(folder).glob("vocab*")]:
        raise ConfigError(f"model.path is {path!r}, and its tokenizer cannot be loaded: no file of it is there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of many kinds, by the tokenizer's
        raise ConfigError(
            f"model.path is {path!r}, and its tokenizer cannot be loaded: {first_line(error)}{local_hint(path)}"
        ) from error
    if not tokenizer("one 1", add_special_tokens=False)["input_ids"]:  # what comes of a folder that has none
        raise ConfigError(f"model.path is {path!r}, and its tokenizer cannot be loaded: no file of it is there")
    return tokenizer


def local_hint(path: str) -> str:
    """What to do where no hub can be reached."""
    folder = path.startswith(("builtin:", ".", "/")) or Path(path).exists()
    return "" if folder else "; if the hub cannot be reached, set model.path to a folder that holds the model"


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
                f"lora.target_modules names {target!r}, which the model does not have; {list_known(target, last)}"
            )
