"""Check before the weights load that the overrides of model.rope change the rotation of a model, and that it computes.

transformers hands rotary parameters to every model, and the code of a model reads those that it knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from grpo_core.config.sections import ModelConfig
from grpo_core.model.loading import load_model_config
from grpo_core.model.lora_targets import make_without_weights
from grpo_core.schema import ConfigError, summarize_error

DEFAULTS = {"rope_theta": None, "partial_rotary_factor": 1.0}  # parameters of every type, which a model may ignore


def check_rope_effect(model: ModelConfig) -> None:
    """Check what can be known of model.rope before the weights load; nothing without it.

    Raises:
        ConfigError: a parameter changes nothing, or the model cannot compute with them.
    """
    if not model.rope:
        return
    config, own = load_model_config(model), load_model_config(replace(model, rope={}))
    try:
        changed, plain = (make_without_weights(each, model.trust_remote_code) for each in (config, own))
    except Exception:  # loading the weights will raise the same error
        return
    kinds = [*dict.fromkeys(type(module) for module in changed.modules() if hasattr(module, "rope_type"))]
    rotation = _compute_rotation(kinds, config)
    for path, without in _leave_each_out(model.rope):
        other = load_model_config(replace(model, rope=without))
        value = _read(config, path)
        if rotation is None or value == _read(other, path):
            continue
        if _is_equal(rotation, _compute_rotation(kinds, other)):
            key = ".".join(("model.rope", *path))
            raise ConfigError(
                f"{key} is {value}, which changes nothing in this {config.model_type} model; leave it out"
            )
    if _describe_failure(plain) is None and (failure := _describe_failure(changed)):
        raise ConfigError(f"model.rope is {model.rope}, with which the {config.model_type} model fails: {failure}")


def _leave_each_out(rope: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield the path of each parameter that a model may ignore, and the overrides without it."""
    for name, value in rope.items():
        if isinstance(value, dict):
            for path, without in _leave_each_out(value):
                yield (name, *path), {**rope, name: without}
        elif name in DEFAULTS:
            yield (name,), {key: other for key, other in rope.items() if key != name}


def _read(config: PretrainedConfig, path: tuple[str, ...]) -> Any:
    """Return a rotary parameter of a configuration, or its default."""
    value: Any = config.get_text_config().rope_parameters
    for name in path:
        value = value.get(name, DEFAULTS.get(name))
    return value


@torch.no_grad()
def _compute_rotation(kinds: list[type[Any]], config: PretrainedConfig) -> dict[str, Tensor] | None:
    """Return the frequencies of rotary modules of these classes; None if they cannot be made or there are none."""
    try:
        modules = [kind(config) for kind in kinds]
    except Exception:  # a model's own code
        return None
    return {f"{i}.{name}": x for i, module in enumerate(modules) for name, x in module.named_buffers()} or None


def _is_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor] | None) -> bool:
    return theirs is not None and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@torch.no_grad()
def _describe_failure(model: nn.Module) -> str | None:
    """Return a description of the error of a forward without weights; None without one, and if it needs weights."""
    try:
        ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device="meta")  # of four dimensions, so no code looks into it
        model.eval()(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception as error:  # of many types
        return None if "meta" in str(error) else summarize_error(error)
    return None
