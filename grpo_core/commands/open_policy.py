"""Open a run folder, a checkpoint, an adapter or a model for use: one process, no engine, nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from grpo_core.batch import SamplingParams, Task
from grpo_core.config.damaged_files import describe_damage
from grpo_core.config.files import load, load_overrides, load_run_config
from grpo_core.config.lora_checks import (
    ADAPTER_FILE,
    ADAPTER_WEIGHTS,
    check_setting_types,
    describe_adapter_weights,
    read_adapter_settings,
)
from grpo_core.config.precision import resolve_dtype
from grpo_core.config.sections import DataConfig, LoraConfig, RunConfig
from grpo_core.config.shipped import describe_run
from grpo_core.config.words import check_overrides, split_word
from grpo_core.data.encoding import encode_prompts
from grpo_core.data.forms import recognise
from grpo_core.data.prompts import find_surrogate, render_chat
from grpo_core.distributed import ranks
from grpo_core.environments.setup import Environments, make_environments
from grpo_core.model.finite_weights import check_finite
from grpo_core.model.loading import check_vocabulary, describe_missing_folder, load_model_config, load_tokenizer_of
from grpo_core.model.policy import Policy, load_policy
from grpo_core.model.quieten import quieten
from grpo_core.model.rope_effect import check_rope_effect
from grpo_core.monitor.progress import show_elapsed
from grpo_core.random_keys import make_key
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError, check_integer, check_number, check_path, describe_impossible_path
from grpo_core.training import checkpoint
from grpo_core.training.prepare import make_sampler

Prompt = str | Sequence[Mapping[str, str]]  # a text, or the messages of a chat


@dataclass(frozen=True)
class OpenedPolicy:
    """A policy with its configuration, tokenizer and sampler."""

    source: str  # the path or name that was opened
    folder: Path | None  # the run folder; None for a model or an adapter outside of a run
    config: RunConfig  # the run's; model.path is the base model, or the model itself if it has no adapter
    weights: str  # a description of the weights, such as "the adapter in runs/tiny/adapter"
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    steps: int | None = None  # taken before the checkpoint that was opened; None for the end of a run, or no run

    @cached_property
    def environments(self) -> Environments | None:
        """The environments or tools of the run, whose process starts when they are first asked for."""
        return make_environments(self.config, self.sampler)

    def close(self) -> None:
        """End the process of the environments, if it was started."""
        if environments := vars(self).get("environments"):
            environments.close()

    @property
    def has_adapter(self) -> bool:
        """Return True if the adapter can be switched off to use the base model."""
        return hasattr(self.policy.model, "disable_adapter")

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,  # default: sampling.max_new_tokens
        temperature: float = 0.0,  # 0: greedy
        seed: int = 0,
    ) -> list[str]:
        """Return one completion of each prompt, without its special tokens.

        A prompt is a text, which is continued as it is, or a chat: a list of messages with `role` and `content`, for
        the model's chat template. The noise of a completion is a function of the seed and of the prompt's place in the
        list, so a prompt that stands in the list twice has two samples. Environments and tools are not used.

        Raises:
            ConfigError: a prompt is neither, is empty, or is too long for the completion to follow it; the model has no
                chat template; or a setting is out of range.
        """
        tasks = make_prompt_tasks(prompts, self.tokenizer, check_integer(seed, "seed"), self.config.data)
        if max_new_tokens is not None and check_integer(max_new_tokens, "max_new_tokens") < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        temperature = check_number(temperature, "temperature")
        try:
            settings = SamplingParams(temperature) if temperature else SamplingParams(greedy=True)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        size, texts = self.config.evaluation.batch_size, []
        for start in range(0, len(tasks), size):
            part = tasks[start : start + size]
            texts += self.sampler.generate(part, 1, settings=settings, max_new_tokens=max_new_tokens).completions
        return texts


@dataclass(frozen=True)
class _Source:
    """The files from which a policy is loaded."""

    config: RunConfig
    folder: Path | None
    weights: str
    tokenizer: str | Path
    adapter: Path | None = None
    checkpoint: Path | None = None


def open_source(
    source: str,
    overrides: Sequence[str] = (),
    *,
    config: Path | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> OpenedPolicy:
    """Open a run folder, one of its checkpoints, an adapter's folder, or a model (a folder, a hub id, builtin:tiny).

    `overrides` are `section.key=value` words. They change the run's config.yaml; for a source outside of a run they
    change the file `config`, or the defaults. `notify` receives notes, such as functions that could not be found.

    Raises:
        ConfigError: there is no such source, or it cannot be loaded.
    """
    quieten()
    source = os.path.expanduser(check_path(source, "the run or model"))
    overrides = check_overrides(overrides)
    if problem := describe_impossible_path(source):
        raise ConfigError(f"the run or model {problem}")
    if not os.path.exists(source) and os.path.isfile(Path("runs") / source / "config.yaml"):
        raise ConfigError(f"there is no folder {source}; did you mean the run {Path('runs') / source}?")
    run_folder = Path(source).parent.parent
    if Path(source).name == checkpoint.BEST and not os.path.exists(source) and (run_folder / "config.yaml").is_file():
        raise ConfigError(
            f"the run {run_folder} has kept no best checkpoint; set checkpoint.keep_best to true for a run"
        )
    if missing := describe_missing_folder(source):
        raise ConfigError(missing)
    try:
        return _load(_find_source(source, list(overrides), config, notify), source, notify)
    except ConfigError as error:
        if Path(source).exists() or source.startswith("builtin:") or "model.path" not in str(error):
            raise
        raise ConfigError(f"there is no folder {source}, and it cannot be loaded as a hub model: {error}") from error


def make_prompt_tasks(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, seed: int, config: DataConfig | None = None
) -> list[Task]:
    """Return prompts as tasks, in their order; `config` has the variables of the chat template.

    Raises:
        ConfigError: as `OpenedPolicy.generate`.
    """
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        kind = "one text" if isinstance(prompts, str) else f"a {type(prompts).__name__}"
        raise ConfigError(f"prompts is {kind}; it must be a list of texts or of chats, such as [text]")
    tasks = []
    for i, prompt in enumerate(prompts):
        is_text = isinstance(prompt, str)
        if not is_text and not _is_chat(prompt):
            raise ConfigError(
                f"prompts[{i}] is {str(prompt)[:60]!r}; it must be a text, or a list of messages with role and content"
            )
        if not is_text and not tokenizer.chat_template:
            raise ConfigError(f"prompts[{i}] is a chat, but the model's tokenizer has no chat template; give a text")
        text = prompt if is_text else render_chat(prompt, tokenizer, config or DataConfig())
        if (character := find_surrogate(text)) is not None:
            raise ConfigError(f"prompts[{i}] has the lone surrogate {character!a}, half of a character")
        (ids,) = encode_prompts(tokenizer, [text], add_special_tokens=is_text)
        if not ids:
            raise ConfigError(f"prompts[{i}] is empty; it needs at least one token")
        tasks.append(Task(i, text, ids, {}, seed=make_key("generate", seed, i)))
    return tasks


def _is_chat(prompt: object) -> bool:
    is_list = isinstance(prompt, Sequence) and bool(prompt)
    return is_list and all(isinstance(message, Mapping) and {"role", "content"} <= {*message} for message in prompt)


def _load(files: _Source, source: str, notify: Callable[[str], None]) -> OpenedPolicy:
    config = files.config
    dtype = resolve_dtype(config.model.precision)
    # the weights of an adapter at lora.path are replaced by those of the checkpoint
    lora = replace(config.lora, path=None) if files.checkpoint is not None else LoraConfig(r=0)
    with show_elapsed("loading the model"):
        tokenizer = load_tokenizer_of(config, str(files.tokenizer))
        check_vocabulary(load_model_config(config.model), tokenizer)
        check_rope_effect(config.model)
        policy = load_policy(
            config.model, lora, dtype=dtype, temperature=config.sampling.temperature, adapter=files.adapter
        )
        if files.checkpoint is not None:
            load_checkpoint(policy, files.checkpoint)
        policy.model.to(ranks.device())
    policy.model.requires_grad_(False)
    sampler = make_sampler(config.sampling, policy, tokenizer, notify)
    steps = checkpoint.read_steps(files.checkpoint) if files.checkpoint is not None else None
    return OpenedPolicy(source, files.folder, config, files.weights, policy, tokenizer, sampler, steps)


def _find_source(source: str, overrides: list[str], config_file: Path | None, notify: Callable[[str], None]) -> _Source:
    """Find the files of a source, without loading any weights."""
    path = Path(source)
    # <run folder>/checkpoints/step-000040, or the link best beside it
    path = path.parent / os.readlink(path) if path.name == checkpoint.BEST and path.is_symlink() else path
    if (path / checkpoint.META).exists() or checkpoint.is_checkpoint(path):
        if problem := checkpoint.describe_damage(path):
            raise ConfigError(f"the checkpoint {path} is damaged: {problem}")
        return _find_in_run(path.parents[1], overrides, path, notify)
    if (path / "config.yaml").exists():
        return _find_in_run(path, overrides, None, notify)
    if path.is_dir() and not [*path.glob("*.json"), *path.glob("*.safetensors")]:
        raise ConfigError(
            f"{source} is a folder, but neither a run (it has no config.yaml) nor a model or adapter "
            f"(it has no JSON or safetensors files)"
        )
    forms = {"recognise": recognise, "notify": notify}
    config = load(config_file, overrides, **forms) if config_file else None
    if any((path / name).exists() for name in (ADAPTER_FILE, *ADAPTER_WEIGHTS)):
        _check_adapter(path)
        config = config or load_overrides(overrides, **forms)
        if not any(
            split_word(word)[0] == "model.path" for word in overrides
        ):  # not that of the file `config`, which may be another
            base, revision = _find_base(path)
            config = replace(config, model=replace(config.model, path=base, revision=config.model.revision or revision))
        return _Source(config, None, f"the adapter in {path}", _find_tokenizer(path, config.model.path), adapter=path)
    config = config or load_overrides(overrides, **forms)
    config = replace(config, model=replace(config.model, path=source))
    return _Source(config, None, source, source)


def _find_in_run(folder: Path, overrides: list[str], chosen: Path | None, notify: Callable[[str], None]) -> _Source:
    """Find the weights of a run: the checkpoint `chosen`, else its adapter or model, else its newest checkpoint."""
    config = load_run_config(folder, overrides, notify)
    if chosen is None:
        adapter = folder / "adapter"
        if (adapter / ADAPTER_FILE).exists():
            _check_adapter(adapter)
            tokenizer = _find_tokenizer(adapter, config.model.path)
            return _Source(config, folder, f"the adapter in {adapter}", tokenizer, adapter=adapter)
        for model in (folder / "model", adapter):  # with lora.r 0, `train` writes the model into adapter/
            if (model / "config.json").exists():
                # its own config.json has what model.rope changed
                config = replace(config, model=replace(config.model, path=str(model), revision=None, rope={}))
                return _Source(config, folder, f"the model in {model}", model)
        undamaged = [
            path
            for path in checkpoint.list_checkpoints(folder / "checkpoints")
            if checkpoint.describe_damage(path) is None
        ]
        if not undamaged:
            raise ConfigError(f"{folder} holds a run that has written neither an adapter nor a checkpoint yet")
        chosen = undamaged[-1]
    return _Source(config, folder, f"the checkpoint {chosen}", config.model.path, checkpoint=chosen)


def _find_base(adapter: Path) -> tuple[str, str | None]:
    """Return the base model that an adapter names, and its revision on the hub; builtin:NAME for a built-in one.

    Raises:
        ConfigError: it names none.
    """
    settings = read_adapter_settings(adapter) or {}
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{adapter / ADAPTER_FILE} names no base model (base_model_name_or_path); set model.path")
    if Path(base).parts[-3:-1] == ("grpo_core", "builtin") and not os.path.exists(base):  # wherever it lies
        return f"builtin:{Path(base).name}", None
    is_path = base.startswith((".", "/", "~")) or describe_run(base) is not None  # the card's name of a folder, too
    if is_path and not os.path.exists(os.path.expanduser(base)):
        raise ConfigError(f"the base model of the adapter in {adapter} is not at {base}; set model.path to its folder")
    return base, None if os.path.isdir(base) else revision


def _check_adapter(folder: Path) -> None:
    """Raise ConfigError if the folder of an adapter lacks its configuration or its weights, or one is damaged."""
    if problem := describe_damage(folder / ADAPTER_FILE) or describe_adapter_weights(folder):
        raise ConfigError(f"the adapter in {folder} is incomplete: {problem}")
    check_setting_types(read_adapter_settings(folder) or {}, str(folder))


def _find_tokenizer(folder: Path, base: str) -> str | Path:
    """Return the folder of an adapter if it holds a tokenizer, else the base model."""
    return folder if [*folder.glob("*token*"), *folder.glob("vocab*")] else base


def load_checkpoint(policy: Policy, path: Path) -> None:
    """Copy the weights of a checkpoint into the policy.

    Raises:
        ConfigError: the checkpoint has other names or shapes than the policy's trained parameters, or holds a value
            that is not finite.
    """
    tensors = checkpoint.load_weights(path)
    parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in parameters.items()} != {name: x.shape for name, x in tensors.items()}:
        model_type = policy.causal_lm.config.model_type
        raise ConfigError(f"the weights in the checkpoint {path} do not fit the {model_type} model of the run")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    check_finite(policy.model, f"the checkpoint {path}")
