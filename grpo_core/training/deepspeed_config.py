"""Check the user's DeepSpeed JSON against the run's configuration, and fill it in."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

from grpo_core.config.precision import DTYPES
from grpo_core.config.sections import RunConfig
from grpo_core.schema import ConfigError

BLOCKS = ("zero_optimization", "fp16", "bf16")  # that are read and filled in here
EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def deepspeed_config(config: RunConfig, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the user's JSON with every "auto" replaced by the run configuration's value.

    Raises:
        ConfigError: the JSON contradicts the run configuration, or sets something that belongs in the latter.
    """
    filled = _read_numbers(copy.deepcopy(config.engine.deepspeed))
    _check_blocks(filled)
    trainer = config.trainer
    for block, instead in (("optimizer", "engine.learning_rate, engine.beta1, ..."), ("scheduler", "engine.schedule")):
        if block in filled:
            raise ConfigError(f"the DeepSpeed JSON has a block {block!r}; remove it and use the run config's {instead}")
    stage = filled.setdefault("zero_optimization", {}).setdefault("stage", 2)
    filled["zero_optimization"].setdefault("overlap_comm", False)
    if stage not in (1, 2):
        reason = "the sampler needs whole weights" if stage == 3 else "other stages are not supported"
        raise ConfigError(
            f"the DeepSpeed JSON's zero_optimization.stage is {stage!r}; it must be 1 or 2, because {reason}"
        )
    for timer in ("wall_clock_breakdown", "flops_profiler"):
        if filled.get(timer):
            raise ConfigError(
                f"the DeepSpeed JSON has {timer}, which would measure nothing, because the forwards bypass DeepSpeed; "
                f"remove it and read the seconds and the model FLOP utilisation in metrics.jsonl"
            )
    per_optimizer_step = trainer.completions_per_step // trainer.num_minibatches
    _agree(filled, "train_batch_size", per_optimizer_step, "trainer.completions_per_step / trainer.num_minibatches")
    _agree(filled, "gradient_clipping", config.engine.max_grad_norm, "engine.max_grad_norm")
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if filled.get(key, "auto") != "auto":
            raise ConfigError(
                f'the DeepSpeed JSON\'s {key} is {filled[key]!r}; it must be "auto", because the size of '
                f"micro-batches is set in tokens by trainer.tokens_per_micro_batch"
            )
    for block in ("bf16", "fp16"):
        filled[block] = {"enabled": "auto", **filled.get(block, {})}
        source = f"model.precision ({config.model.precision})"
        _agree(filled[block], "enabled", dtype is DTYPES[block], source, f"{block}.enabled")
    filled["fp16"].setdefault("initial_scale_power", 12)
    skips = "rule that skips an optimizer step whose gradient is not finite"
    _agree(filled["bf16"], "check_grad_overflow", True, skips, "bf16.check_grad_overflow")
    # The checked value counts completions per optimizer step; DeepSpeed's counts rows per micro-batch.
    filled.pop("train_batch_size")
    if (filled["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none":
        filled.setdefault("zero_force_ds_cpu_optimizer", False)
    return filled | {
        "train_micro_batch_size_per_gpu": 1,  # required, but unused
        "gradient_accumulation_steps": 1,  # the engine accumulates; see the first lines of engine.py
        "managed_gradient_accumulation": False,
        "steps_per_print": 10**9,
    }


def _read_numbers(value: Any) -> Any:
    """Return the JSON with text such as 2e8, which YAML 1.1 does not read as a number, as a number."""
    if isinstance(value, dict):
        return {key: _read_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_read_numbers(inner) for inner in value]
    if not isinstance(value, str) or not EXPONENT.fullmatch(value):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number


def _check_blocks(filled: dict[str, Any]) -> None:
    """Raise ConfigError if a block that is read here is no mapping."""
    zero = filled.get("zero_optimization", {})
    blocks = {name: filled.get(name, {}) for name in BLOCKS}
    if isinstance(zero, dict):
        offload = zero.get("offload_optimizer")
        blocks["zero_optimization.offload_optimizer"] = {} if offload is None else offload
    for name, block in blocks.items():
        if not isinstance(block, dict):
            raise ConfigError(
                f"the DeepSpeed JSON's {name} is {block!r}; it must be a mapping of DeepSpeed's keys, or be left out"
            )


def _agree(filled: dict[str, Any], key: str, value: Any, run_key: str, json_key: str | None = None) -> None:
    if filled.get(key, "auto") not in ("auto", value):
        raise ConfigError(
            f"the DeepSpeed JSON's {json_key or key} is {filled[key]!r}, but the run config's {run_key} makes it "
            f'{value!r}; write "auto" in the JSON, or make the two agree'
        )
    filled[key] = value
