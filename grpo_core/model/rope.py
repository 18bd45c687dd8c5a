"""Override the rotary position embedding of a model: model.rope is laid over the parameters in its configuration."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from grpo_core.config.rope_checks import COMMON, GROWING, check_parameters
from grpo_core.schema import ConfigError, first_line, list_known

LENGTH = "original_max_position_embeddings"


def override_rope(config: PretrainedConfig, rope: dict[str, Any]) -> None:
    """Change the rotary parameters of a transformers configuration, and the number of positions that they stretch.

    Another rope_type drops the model's own parameters but for rope_theta and partial_rotary_factor. Where layers of
    several types have parameters of their own, `rope` has a mapping for each type that it changes.

    Raises:
        ConfigError: the model has no rotary embedding, or not one of these layer types; or a parameter is missing.
    """
    if not rope:
        return
    text = config.get_text_config()
    own = getattr(text, "rope_parameters", None)
    if not own:
        raise ConfigError(f"model.rope is {rope}, but the {config.model_type} model has no rotary embedding")
    types = [name for name, value in own.items() if isinstance(value, dict)]
    if types:
        for name, value in rope.items():
            if name not in types or not isinstance(value, dict):
                raise ConfigError(
                    f"model.rope has {name!r}, but this model has parameters for each type of layer, and model.rope "
                    f"must have a mapping for a type; {list_known(name, types)}"
                )
        merged = {name: _merge(text, own[name], rope.get(name, {}), f"model.rope.{name}") for name in types}
        merged = {**own, **merged}
    else:
        merged = _merge(text, own, rope, "model.rope")
    text.rope_parameters = merged
    try:
        for name in ("standardize_rope_params", "validate_rope"):
            if callable(method := getattr(text, name, None)):
                method()
    except Exception as error:  # of many types
        raise ConfigError(f"model.rope is {rope}, which transformers refuses: {first_line(error)}") from error


def _merge(config: Any, own: dict[str, Any], rope: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the parameters of one kind of layer, and raise the model's positions where they are stretched."""
    if not rope:
        return own
    kind, previous = rope.get("rope_type", own.get("rope_type", "default")), own.get("rope_type", "default")
    base = own if kind == previous else {name: value for name, value in own.items() if name in COMMON}
    merged = {**base, **rope, "rope_type": kind}
    check_parameters(merged, key, is_whole=True)
    if kind in GROWING:
        original = merged.get(LENGTH) or own.get(LENGTH) or config.max_position_embeddings
        if kind != "linear":
            merged[LENGTH] = original
        config.max_position_embeddings = max(config.max_position_embeddings, int(original * merged["factor"]))
    return merged


def describe_factors(config: PretrainedConfig, *, is_sure: bool = True) -> str | None:
    """Return a sentence about longrope's factors if they do not fit the heads, or each other; otherwise None.

    Their number is half the numbers of a head that are rotated. Without `is_sure` that the model cannot be made, only
    two different numbers are a fault, since a model's own code may rotate another part of a head.
    """
    text = config.get_text_config()
    own = getattr(text, "rope_parameters", None) or {}
    for values in [value for value in own.values() if isinstance(value, dict)] or [own]:
        lists = [values.get(name) for name in ("short_factor", "long_factor")]
        if not all(isinstance(factors, list) for factors in lists):
            continue
        short, long = map(len, lists)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        half = int(width * values.get("partial_rotary_factor", 1.0)) // 2
        if short != long or (is_sure and short != half):
            return (
                f"the rotary embedding has {short} numbers in short_factor and {long} in long_factor; both must have "
                f"{half}"
            )
    return None
