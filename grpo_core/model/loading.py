"""Load a tokenizer and a model's configuration, and check a model before its weights load."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from grpo_core.config.lora_checks import ADAPTER_FILE
from grpo_core.config.sections import ModelConfig, RunConfig
from grpo_core.config.shipped import describe_run
from grpo_core.counts import quantify
from grpo_core.data.tool_schemas import offer_tools_of
from grpo_core.model.model_files import (
    CONFIG,
    describe_bad_config,
    describe_bad_files,
    describe_bad_tokenizer,
    read_config,
)
from grpo_core.model.rope import override_rope
from grpo_core.model.rotation import find_rotations
from grpo_core.schema import ConfigError, first_line, list_known, summarize_error

BUILTIN = Path(__file__).parents[1] / "builtin"


def resolve_model_path(path: str) -> str:
    """Return the folder or hub id of `model.path`; builtin:NAME is a folder inside this package.

    Raises:
        ConfigError: no such built-in model exists, or `path` can only be a folder and does not exist.
    """
    if not path.startswith("builtin:"):
        if run := describe_run(path):
            raise ConfigError(f"model.path is {path!r}, {run}")
        if problem := describe_missing_folder(path):
            raise ConfigError(f"model.path is {path!r}: {problem}")
        return path
    folder = BUILTIN / path.removeprefix("builtin:")
    if not folder.is_dir():
        names = [f"builtin:{builtin.name}" for builtin in BUILTIN.glob("*/")]
        raise ConfigError(f"model.path is {path!r}; {list_known(path, names)}")
    return str(folder)


def describe_missing_folder(path: str) -> str | None:
    """Return an error message if `path` can only be a folder and does not exist; otherwise None.

    `path` can only be a folder if it starts with "/", "." or "~", has more than one "/", or if its parent exists;
    anything else may be a hub id.
    """
    folder = Path(path)
    is_local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or ("/" in path and os.path.isdir(folder.parent))
    if os.path.exists(folder) or not is_local:
        return None
    if not os.path.isdir(folder.parent):
        return f"there is no folder {path}"
    siblings = [sibling.name for sibling in folder.parent.iterdir() if sibling.is_dir()]
    return f"there is no folder {path}; {list_known(folder.name, siblings)}"


def load_tokenizer_of(config: RunConfig, path: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run, with the chat template of data.chat_template and the tools, if there are any.

    `path` is another place of the tokenizer than model.path, such as the folder of an adapter.

    Raises:
        ConfigError: it cannot be loaded, or cannot describe the tools.
    """
    model = config.model
    revision = model.revision if path in (None, model.path) else None
    tokenizer = load_tokenizer(path or model.path, model.trust_remote_code, revision)
    if config.data.chat_template is not None:
        tokenizer.chat_template = config.data.chat_template
    offer_tools_of(config, tokenizer)
    return tokenizer


def load_tokenizer(path: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model at `path`.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    folder = Path(resolve_model_path(path))
    problem = f"model.path is {path!r}, and its tokenizer cannot be loaded: "
    no_files = f"{problem}the folder has no tokenizer files, such as tokenizer.json"
    if folder.is_dir() and not [*folder.glob("*token*"), *folder.glob("vocab*")]:
        _check_no_adapter(path, folder)
        raise ConfigError(no_files)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, **at_revision(revision)
        )
    except Exception as error:  # tokenizers raise errors of many types
        if damage := describe_bad_tokenizer(folder):
            raise ConfigError(problem + damage) from error
        if (folder / CONFIG).exists():  # which AutoTokenizer reads as well
            load_whole_config(ModelConfig(path, revision=revision, trust_remote_code=trust_remote_code))
        raise ConfigError(f"{problem}{first_line(error)}{_hub_hint(path)}") from error
    if not tokenizer("one 1", add_special_tokens=False)["input_ids"]:  # it loads without files, but empty
        raise ConfigError(no_files)
    return tokenizer


def at_revision(revision: str | None) -> dict[str, str]:
    """Return the argument of from_pretrained for a revision; none without one."""
    return {} if revision is None else {"revision": revision}


def _check_files(path: str, folder: Path) -> None:
    """Raise ConfigError if the folder of the model at `path` lacks config.json, or a file in it is damaged."""
    problem = describe_bad_files(folder)
    if folder.is_dir() and not (folder / CONFIG).exists():
        problem = f"{CONFIG} is missing"
    if problem:
        raise ConfigError(f"model.path is {path!r}, and it cannot be loaded: {problem}")


def _check_no_adapter(path: str, folder: Path) -> None:
    """Raise ConfigError if the folder of the model at `path` holds an adapter."""
    if (folder / ADAPTER_FILE).exists():
        raise ConfigError(
            f"model.path is {path!r}, which holds an adapter and not a model; merge the run that trained it into "
            f"a model with python -m grpo_core export RUN --merged, and set model.path to that"
        )


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """Load the transformers configuration of the model at `model.path`, with the overrides of model.rope.

    Of a composite model it is that of its text model.

    Raises:
        ConfigError: the configuration cannot be loaded or changed so, or the folder holds an adapter.
    """
    config = find_text_config(load_whole_config(model))
    override_rope(config, model.rope)
    return config


def load_whole_config(model: ModelConfig) -> PretrainedConfig:
    """Load the transformers configuration of the model at `model.path` as it is in its files.

    Raises:
        ConfigError: see `load_model_config`.
    """
    folder = Path(resolve_model_path(model.path))
    _check_no_adapter(model.path, folder)
    _check_files(model.path, folder)
    if model.revision is not None and folder.is_dir():
        raise ConfigError(
            f"model.revision is {model.revision!r}, but model.path is {model.path!r}, a folder, which has no "
            f"revisions; leave it out"
        )
    try:
        options = {"trust_remote_code": model.trust_remote_code, **at_revision(model.revision)}
        config = AutoConfig.from_pretrained(str(folder), **options)
    except Exception as error:  # models raise errors of many types
        reason = f"{first_line(error)}{_hub_hint(model.path)}"
        if not model.trust_remote_code and "trust_remote_code" in str(error):
            reason = "it has code of its own; set model.trust_remote_code to true to let that run"
        elif folder.is_dir() and not re.search("model.type", reason):
            reason = describe_bad_config(error, read_config(folder))
        raise ConfigError(f"model.path is {model.path!r}, and it cannot be loaded: {reason}") from error
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise ConfigError(
            f"model.path is {model.path!r}, and it cannot be loaded: num_hidden_layers in its {CONFIG} is {layers}; it "
            f"must be at least 1"
        )
    return config


def load_generation_config(model: ModelConfig) -> GenerationConfig | None:
    """Load the generation config of model.path; None if it has none that can be read, as the model would then have."""
    try:
        return GenerationConfig.from_pretrained(resolve_model_path(model.path), **at_revision(model.revision))
    except OSError:
        return None


def find_text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of a composite model's text model, if transformers has that as a causal language model.

    Any other configuration is returned as it is. The end-of-sequence token and tied embeddings may be in the composite
    one alone.
    """
    text = config.get_text_config(decoder=True)
    if text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    if getattr(config, "eos_token_id", None) is not None:
        text.eos_token_id = config.eos_token_id
    text.tie_word_embeddings = bool(text.tie_word_embeddings or getattr(config, "tie_word_embeddings", False))
    return text


def is_composite(config: PretrainedConfig) -> bool:
    """Return whether a model of this configuration has towers beside a text model that is loaded alone."""
    text = config.get_text_config(decoder=True)
    return text is not config and (
        type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
        or getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "config_class", None) is type(text)
    )


def check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError if the tokenizer has token ids for which the model has no embedding."""
    size, highest = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if highest >= size:
        raise ConfigError(
            f"the tokenizer has token ids up to {highest}, but the model has only {size} embeddings; use the tokenizer "
            f"that belongs to the model"
        )


def check_lengths(lengths: Sequence[int], max_new_tokens: int, config: PretrainedConfig) -> None:
    """Raise ConfigError if a prompt of these lengths is empty, or `max_new_tokens` cannot follow it.

    They cannot if both are together longer than the model's positions, or if its rotary embedding changes on the way.
    """
    if not all(lengths):
        raise ConfigError("a prompt is empty; it must have at least one token")
    longest = max(lengths)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest + max_new_tokens > positions:
        raise ConfigError(
            f"a prompt of {quantify(longest, 'token')} and sampling.max_new_tokens {max_new_tokens} are together "
            "more than the "
            f"model's {positions} positions"
        )
    find_rotations(config).check_lengths(lengths, max_new_tokens)


def describe_misfit(error: Exception) -> str:
    """Return a clause about an adapter that cannot be loaded, with both sizes where a weight's shape differs."""
    pattern = r"size mismatch for (\S+): copying a param with shape torch.Size\((.*?)\).* torch.Size\((.*?)\)"
    if match := re.search(pattern, str(error)):
        name, own, models = match.groups()
        return f"its weight {name.removeprefix('base_model.model.')} has the size {own}, that of the model {models}"
    return first_line(error) if isinstance(error, (OSError, ValueError, RuntimeError)) else summarize_error(error)


def _is_hub_run(path: str) -> bool:
    """Return True if a hub id is a run folder that someone has uploaded."""
    try:
        return cached_file(path, "config.yaml") is not None
    except Exception:  # the hub cannot be reached, or has no such repository or file
        return False


def _hub_hint(path: str) -> str:
    """Return the end of an error message for a `path` that may be a hub id; empty for a folder."""
    is_folder = path.startswith(("builtin:", ".", "/")) or os.path.exists(path)
    if not is_folder and _is_hub_run(path):
        return f"; {path} is a run; did you mean {path}/adapter, downloaded into a folder?"
    return "" if is_folder else "; if the hub cannot be reached, set model.path to a folder that holds the model"


@contextmanager
def using_key(key: str) -> Iterator[None]:
    """Let errors name `key` instead of model.path."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", key)) from error
