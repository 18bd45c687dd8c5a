"""A run folder, an adapter or a model, opened to be used: one process, no engine, nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from grpo_core.config.files import load, load_overrides, load_run_config
from grpo_core.config.sections import LoraConfig, RunConfig
from grpo_core.distributed import ranks
from grpo_core.model.loading import load_tokenizer, missing_folder
from grpo_core.model.policy import Policy, load_policy
from grpo_core.monitor.progress import working
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError
from grpo_core.training import checkpoint
from grpo_core.training.prepare import make_sampler, quieten

ADAPTER = "adapter_config.json"  # PEFT's


@dataclass(frozen=True)
class Opened:
    """A policy with what belongs to it."""

    source: str  # as it was named
    folder: Path | None  # the run folder; None for a model or an adapter by itself
    config: RunConfig  # the run's, with model.path as the base; of a model by itself the one that was given
    weights: str  # which weights these are, in words
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler

    @property
    def has_adapter(self) -> bool:
        """Whether there is a base model to compare with."""
        return hasattr(self.policy.model, "disable_adapter")


def open_source(
    source: str,
    overrides: Sequence[str] = (),
    *,
    config: Path | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Opened:
    """Open a run folder, one of its checkpoints, an adapter's folder, or a model (a folder, a hub id, builtin:tiny).

    `overrides` are `section.key=value` over the run's config.yaml, or over `config` for what is no run.

    Raises:
        ConfigError: nothing of that kind is there, or it cannot be loaded.
    """
    quieten()
    if missing := missing_folder(source):
        raise ConfigError(missing)
    try:
        return _open(_find(source, list(overrides), config, say), source, say)
    except ConfigError as error:
        if Path(source).exists() or source.startswith("builtin:") or "model.path" not in str(error):
            raise
        raise ConfigError(f"there is no folder {source}, and as a model of the hub: {error}") from error


def _open(found: _Found, source: str, say: Callable[[str], None]) -> Opened:
    settings, adapter, tensors = found.config, found.adapter, found.checkpoint
    dtype = ranks.resolve_dtype(settings.model.precision)
    lora = settings.lora if tensors is not None else LoraConfig(r=0)
    with working("loading the model"):
        tokenizer = load_tokenizer(str(found.tokenizer), settings.model.trust_remote_code)
        policy = load_policy(
            settings.model, lora, dtype=dtype, temperature=settings.sampling.temperature, adapter=adapter
        )
        if tensors is not None:
            _take_weights(policy, tensors)
        policy.model.to(ranks.device())
    policy.model.requires_grad_(False)
    sampler = make_sampler(settings.sampling, policy, tokenizer, say)
    return Opened(source, found.folder, settings, found.weights, policy, tokenizer, sampler)


@dataclass(frozen=True)
class _Found:
    config: RunConfig
    folder: Path | None
    weights: str
    tokenizer: str | Path
    adapter: Path | None = None
    checkpoint: Path | None = None


def _find(source: str, overrides: list[str], config: Path | None, say: Callable[[str], None]) -> _Found:
    """What `source` names, without loading any of it."""
    path = Path(source)
    if (path / checkpoint.META).exists():  # a checkpoint: <run folder>/checkpoints/step-000040
        if problem := checkpoint.damage(path):
            raise ConfigError(f"the checkpoint {path} is damaged: {problem}")
        return _of_run(path.parents[1], overrides, path, say)
    if (path / "config.yaml").exists():
        return _of_run(path, overrides, None, say)
    if path.is_dir() and not [*path.glob("*.json"), *path.glob("*.safetensors")]:
        raise ConfigError(f"{source} is a folder, but neither a run (no config.yaml) nor a model or adapter")
    settings = load(config, overrides) if config else None
    if (path / ADAPTER).exists():
        base = json.loads((path / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        settings = settings or load_overrides([f"model.path={base}", *overrides])
        return _Found(settings, None, f"the adapter in {path}", _tokenizer(path, settings.model.path), adapter=path)
    settings = settings or load_overrides(overrides)
    settings = replace(settings, model=replace(settings.model, path=source))
    return _Found(settings, None, source, source)


def _of_run(folder: Path, overrides: list[str], chosen: Path | None, say: Callable[[str], None]) -> _Found:
    """A run's last weights: its adapter or model, or those of a checkpoint where it has not come so far."""
    settings = load_run_config(folder, overrides, tell=say)
    model, adapter = folder / "model", folder / "adapter"
    if chosen is None and (adapter / ADAPTER).exists():
        tokenizer = _tokenizer(adapter, settings.model.path)
        return _Found(settings, folder, f"the adapter in {adapter}", tokenizer, adapter=adapter)
    for whole in (model, adapter):  # without LoRA train writes the model where the adapter would be
        if chosen is None and (whole / "config.json").exists():
            settings = replace(settings, model=replace(settings.model, path=str(whole)))
            return _Found(settings, folder, f"the model in {whole}", whole)
    if chosen is None:
        whole = [one for one in checkpoint.steps(folder / "checkpoints") if checkpoint.damage(one) is None]
        if not whole:
            raise ConfigError(f"{folder} holds a run that has written neither an adapter nor a checkpoint yet")
        chosen = whole[-1]
    return _Found(settings, folder, f"the checkpoint {chosen}", settings.model.path, checkpoint=chosen)


def _tokenizer(folder: Path, base: str) -> str | Path:
    """The tokenizer that lies beside an adapter, else the base model's."""
    return folder if [*folder.glob("*token*"), *folder.glob("vocab*")] else base


def _take_weights(policy: Policy, chosen: Path) -> None:
    """Put a checkpoint's weights into the policy.

    Raises:
        ConfigError: they are of other shapes.
    """
    tensors = checkpoint.weights(chosen)
    named = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in named.items()} != {name: value.shape for name, value in tensors.items()}:
        raise ConfigError(f"the checkpoint {chosen} holds other weights than {policy.causal_lm.config.model_type}'s")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])
