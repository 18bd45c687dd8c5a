"""The DeepSpeed configuration: the user's JSON, checked against the run's configuration and filled in."""

from __future__ import annotations

import copy
from typing import Any

import torch

from grpo_core.config.sections import RunConfig
from grpo_core.model.loading import DTYPES
from grpo_core.schema import ConfigError


def deepspeed_config(config: RunConfig, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's JSON with every "auto" filled in from the run config.

    Raises:
        ConfigError: a value in the JSON contradicts the run config, or belongs there; the message names both.
    """
    given = copy.deepcopy(config.engine.deepspeed)
    trainer = config.trainer
    for block, instead in (("optimizer", "engine.learning_rate and its neighbours"), ("scheduler", "engine.schedule")):
        if block in given:
            raise ConfigError(f"the DeepSpeed JSON has a block {block!r}; remove it, the run config's {instead} say it")
    stage = given.setdefault("zero_optimization", {}).setdefault("stage", 2)
    given["zero_optimization"].setdefault("overlap_comm", False)
    if stage not in (1, 2):
        why = "the sampler needs whole weights" if stage == 3 else "DeepSpeed's other stages are other code"
        raise ConfigError(f"the DeepSpeed JSON's zero_optimization.stage is {stage!r}; it must be 1 or 2: {why}")
    for timer in ("wall_clock_breakdown", "flops_profiler"):
        if given.get(timer):
            raise ConfigError(
                f"the DeepSpeed JSON has {timer}, which times forwards that do not go through DeepSpeed here; "
                f"remove it: metrics.jsonl has the seconds of every phase and the model FLOP utilisation"
            )
    per_optimizer_step = trainer.completions_per_step // trainer.num_minibatches
    _agree(given, "train_batch_size", per_optimizer_step, "trainer.completions_per_step / trainer.num_minibatches")
    _agree(given, "gradient_clipping", config.engine.max_grad_norm, "engine.max_grad_norm")
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if given.get(key, "auto") != "auto":
            raise ConfigError(
                f'the DeepSpeed JSON\'s {key} is {given[key]!r}; write "auto": micro-batches are cut by their tokens '
                f"(trainer.tokens_per_micro_batch), and a step has as many as it needs"
            )
    for block in ("bf16", "fp16"):
        given[block] = {"enabled": "auto", **given.get(block, {})}
        source = f"model.precision ({config.model.precision})"
        _agree(given[block], "enabled", dtype is DTYPES[block], source, f"{block}.enabled")
    given["fp16"].setdefault("initial_scale_power", 12)
    skips = "rule that a step which is not finite is skipped"
    _agree(given["bf16"], "check_grad_overflow", True, skips, "bf16.check_grad_overflow")
    given.pop("train_batch_size")  # ours counts completions of an optimizer step; DeepSpeed's would be of a micro-batch
    if given["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        given.setdefault("zero_force_ds_cpu_optimizer", False)
    return given | {
        "train_micro_batch_size_per_gpu": 1,  # read by nothing
        "gradient_accumulation_steps": 1,  # the trainer accumulates; see this file's first lines
        "managed_gradient_accumulation": False,
        "steps_per_print": 10**9,
    }


def _agree(given: dict[str, Any], key: str, value: Any, run_key: str, shown: str | None = None) -> None:
    if given.get(key, "auto") not in ("auto", value):
        raise ConfigError(
            f"the DeepSpeed JSON's {shown or key} is {given[key]!r}, but the run config's {run_key} makes it "
            f'{value!r}; write "auto" in the JSON, or make them agree'
        )
    given[key] = value
