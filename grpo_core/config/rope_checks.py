"""Checks of model.rope, the overrides of a model's rotary position embedding."""

from __future__ import annotations

from typing import Any

from grpo_core.schema import ConfigError, coerce, list_known

COMMON = {"rope_type": str, "rope_theta": float, "partial_rotary_factor": float}  # of every type
LENGTH = {"original_max_position_embeddings": int}
REQUIRED: dict[str, dict[str, Any]] = {  # rope_type -> parameters that it needs
    "default": {},
    "linear": {"factor": float},
    "dynamic": {"factor": float},
    "yarn": {"factor": float},
    "longrope": {"short_factor": list[float], "long_factor": list[float]},
    "llama3": {"factor": float, "low_freq_factor": float, "high_freq_factor": float, **LENGTH},
}
OPTIONAL: dict[str, dict[str, Any]] = {
    "dynamic": LENGTH,
    "yarn": {
        **LENGTH,
        **{name: float for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")},
        "truncate": bool,
    },
    "longrope": {**LENGTH, "factor": float, "attention_factor": float},
}
GROWING = ("linear", "yarn")  # types with which a model has `factor` times its original positions


def check_rope(rope: dict[str, Any]) -> None:
    """Check model.rope as far as that needs no model: names and types of the parameters.

    Raises:
        ConfigError: names the parameter.
    """
    if rope and all(isinstance(value, dict) for value in rope.values()):  # one mapping for each type of layer
        for name, value in rope.items():
            check_parameters(value, f"model.rope.{name}", is_whole=False)
    else:
        check_parameters(rope, "model.rope", is_whole=False)


def check_parameters(values: dict[str, Any], key: str, *, is_whole: bool) -> None:
    """Check rotary parameters. Without `is_whole` they are overrides of a model's own, and none is required.

    Raises:
        ConfigError: an unknown name or type, a wrong value, or of the whole a missing parameter.
    """
    kind = values.get("rope_type")
    if kind is not None and kind not in REQUIRED:
        raise ConfigError(f"{key}.rope_type is {kind!r}; {list_known(str(kind), REQUIRED)}")
    kinds = REQUIRED if kind is None else [kind]
    known: dict[str, Any] = dict(COMMON)
    for name in kinds:
        known |= REQUIRED[name] | OPTIONAL.get(name, {})
    for name, value in values.items():
        if name not in known:
            if is_whole and name == "type":  # an older name that models' files still have
                continue
            of = f", which rope_type {kind} does not use" if kind else ""
            raise ConfigError(f"unknown key {key}.{name}{of}; {list_known(name, known)}")
        number = coerce(value, known[name], f"{key}.{name}")
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if is_number and not number > 0:
            raise ConfigError(f"{key}.{name} is {value}; it must be above 0")
        if name == "factor" and number < 1:
            raise ConfigError(f"{key}.factor is {value}; it must be at least 1")
    missing = [name for name in REQUIRED.get(kind or "default", {}) if name not in values]
    if is_whole and missing:
        raise ConfigError(f"{key}.rope_type is {kind!r}, which needs {missing[0]}; set {key}.{missing[0]}")
