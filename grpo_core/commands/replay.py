"""The `replay` command: compute the gradient of a saved batch under the run's own objective and under others.

It runs in one process without an engine, on a CPU or a GPU. The policy computes in float32 and without dropout,
whatever the run did, and the whole batch is one minibatch. With the weights before the step every ratio is 1 and
nothing is clipped. With other weights of the run (--model) the ratios are relative to the saved log-probs, which shows
what would be clipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from grpo_core.batch import Rollouts, TrainBatch
from grpo_core.commands.attribution import (
    Attribution,
    classify_tokens,
    compute_attribution,
    compute_gradient_shares,
    compute_weight_shares,
    dot,
)
from grpo_core.commands.open_policy import open_source
from grpo_core.commands.replay_table import format_table
from grpo_core.config.files import load_run_config
from grpo_core.config.presets import PRESETS
from grpo_core.config.sections import RunConfig
from grpo_core.distributed import ranks
from grpo_core.model.memory import MAX_CPU_TOKENS
from grpo_core.model.packing import Budget
from grpo_core.model.policy import Policy, load_policy
from grpo_core.model.quieten import quieten
from grpo_core.monitor.aggregates import Stats
from grpo_core.monitor.progress import show_elapsed
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.objective import Objective
from grpo_core.random_keys import make_key
from grpo_core.report.whole_files import write_whole
from grpo_core.schema import ConfigError, finite_or_none, printable
from grpo_core.training import saved_batches
from grpo_core.training.control import Control
from grpo_core.training.cross_row_masks import add_cross_row_masks
from grpo_core.training.freeze import freeze
from grpo_core.training.prepare import build_objective
from grpo_core.training.rollouts import compute_step_advantages, shape_rewards
from grpo_core.training.saved_batches import DumpedBatch

USED_KEYS = (  # a replay depends on keys that begin so
    *("loss.", "advantage.", "truncation", "preset", "model."),
    *("sampling.temperature", "sampling.max_new_tokens", "sampling.replay_routing", "trainer.tokens_per_micro_batch"),
)
MAX_GPU_TOKENS = 16_384  # in one forward and backward
MAX_LISTED_BATCHES = 12  # in an error message


@dataclass(frozen=True)
class Weights:
    """The policy that replays a batch."""

    policy: Policy
    description: str
    are_before_step: bool  # the weights with which the step began


@dataclass(frozen=True)
class Replayed:
    """A batch replayed under one objective."""

    name: str  # of the objective
    batch: TrainBatch
    attribution: Attribution
    classes: dict  # partition -> class -> {"tokens", "share" (of sum |dL/dl|), "gradient_share"}


def run_replay(
    batch: Path,
    overrides: Sequence[str],
    *,
    loss: Sequence[str] = (),
    model: str | None = None,
    output: Path | None = None,
) -> int:
    """Print loss and gradient of a batch under the run's own objective and others; also write `output` as JSON.

    Each item of `loss` (a loss, file.py:function or a preset) is another objective. `overrides` are `section.key=value`
    words that change all of them, or make one more objective if `loss` is empty. `batch` is as in
    `saved_batches.read_dump`, `model` as in `open_source`. Returns 0.

    Raises:
        ConfigError: there is no such batch or objective, or the model has other parameters than the run trains.
    """
    for override in overrides:
        if not override.startswith(USED_KEYS):
            keys = ", ".join(key.removesuffix(".") for key in USED_KEYS)
            raise ConfigError(f"{override} has no effect on a replay; only these keys have: {keys}")
    check_saved(batch)
    dumped = saved_batches.read_dump(batch)
    configs = list_objectives(dumped.folder, overrides, loss)
    if configs[0][1].teacher.kl is not None:
        raise ConfigError(
            "teacher.kl cannot be replayed: a saved batch holds the teacher's log-probs of its tokens, and not the "
            "teacher's distributions over the vocabulary"
        )
    with show_elapsed("loading the model"):
        weights = open_weights(dumped, configs[0][1], model, [word for word in overrides if word.startswith("model.")])
    replayed = []
    for name, config in configs:
        with show_elapsed(name):
            replayed.append(replay(dumped, weights, name, config, configs[0][1]))
    summary = summarise(dumped, weights, replayed, configs[0][1])
    print(printable(format_table(summary)))
    if output is not None:
        try:
            write_whole(output, json.dumps(finite_or_none(summary), allow_nan=False, indent=1).encode())
        except OSError as error:
            raise ConfigError(f"--output {output} cannot be written: {error.strerror}") from None
    return 0


def check_saved(batch: Path) -> None:
    """Raise ConfigError with the saved steps if `batch` has a batch's name, but no files of its step exist."""
    match = re.fullmatch(r"(step-\d+)(-rank-\d+)?(\.safetensors|\.json)?", batch.name)
    folder, run = batch.parent, batch.absolute().parents[1]
    if not match or any(folder.glob(f"{match[1]}-rank-*")):
        return  # any other error is raised when the batch is read
    if not run.is_dir():
        raise ConfigError(f"there is no run folder {run}")
    steps = sorted(path.name.removesuffix("-rank-0.json") for path in folder.glob("step-*-rank-0.json"))
    if not steps:
        raise ConfigError(f"{run} has no saved batches; debug.dump_batches=N saves the batch of every N-th step")
    if len(steps) > MAX_LISTED_BATCHES:
        steps = [*steps[: MAX_LISTED_BATCHES - 2], "...", steps[-1]]
    raise ConfigError(f"{match[1]} is not among the saved batches in {folder}: {', '.join(steps)}")


def list_objectives(folder: Path, overrides: Sequence[str], losses: Sequence[str]) -> list[tuple[str, RunConfig]]:
    """Return names and configurations, the run's own first.

    A name in `losses` that is a loss and a preset is the loss.
    """
    own = load_run_config(folder)
    objectives = [(f"run ({own.loss.name})", own)]
    for name in losses:
        if name not in LOSSES.functions and name not in PRESETS and ".py:" not in name:
            known = f"losses: {', '.join(sorted(LOSSES.functions))}; presets: {', '.join(sorted(PRESETS))}"
            raise ConfigError(f"unknown loss or preset {name!r}; {known}; or file.py:function")
        word = f"preset={name}" if name in PRESETS and name not in LOSSES.functions else f"loss.name={name}"
        objectives.append((name, load_run_config(folder, [word, *overrides])))
    if overrides and not losses:
        objectives.append((" ".join(overrides), load_run_config(folder, overrides)))
    return objectives


def open_weights(dumped: DumpedBatch, own: RunConfig, model: str | None, overrides: Sequence[str] = ()) -> Weights:
    """Load the base model with the saved adapter, or the weights that `model` names; the run's parameters need grad.

    Raises:
        ConfigError: `model` lacks a parameter that the run trains, or has it in another shape.
    """
    quieten()
    config, device = load_run_config(dumped.folder, overrides), ranks.device()
    if dumped.weights and model is None:
        temperature = own.sampling.temperature
        policy = load_policy(config.model, replace(own.lora, path=None), dtype=torch.float32, temperature=temperature)
        description = "the base model with the adapter before the step"
    else:
        opened = open_source(model or str(dumped.folder), ["model.precision=fp32", *overrides])
        policy, description = opened.policy, opened.weights
        if not model:
            description += " (the newest weights: with lora.r 0 a batch is saved without its weights)"
    parameters = dict(policy.model.named_parameters())
    trained = dumped.weights or parameters
    if any(name not in parameters or parameters[name].shape != x.shape for name, x in trained.items()):
        raise ConfigError(
            f"{description} does not have the parameters that {dumped.folder} trains; name weights of that run"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    if dumped.weights and model is None:
        with torch.no_grad():
            for name, value in dumped.weights.items():
                parameters[name].copy_(value)
    policy.model.to(device)
    if dumped.reference:
        policy.move_reference()
        policy.load_reference(dumped.reference)
    return Weights(policy, description, bool(dumped.weights) and model is None)


def replay(dumped: DumpedBatch, weights: Weights, name: str, config: RunConfig, own: RunConfig) -> Replayed:
    """Compute the batch's loss and gradient under `config`, as one minibatch.

    The advantages are computed again from the rewards if they or the masks differ between `config` and `own`, the
    run's configuration.
    """
    dumped = replace(dumped, batch=_move_to(dumped.batch, ranks.device()))
    policy = weights.policy
    policy.temperature, policy.replays_routing = config.sampling.temperature, config.sampling.replay_routing
    # the load-balancing loss of routers is no sum over tokens, and that of given tokens none over drawn ones
    objective = build_objective(config)
    objective = replace(objective, steps_per_batch=1, learns_from_ties=True, router_aux_coef=0.0, echo_coef=0.0)
    budget, control = _choose_budget(config), _make_control(dumped, config, own)
    batch = _rebuild_batch(dumped, weights, objective, budget, config, own)
    attribution = compute_attribution(policy, objective, budget, batch, control)
    classes = classify_tokens(batch, attribution)
    gradient_shares = compute_gradient_shares(policy, objective, budget, batch, control, attribution.gradient, classes)
    weight_shares = compute_weight_shares(attribution, classes)
    numbers = {
        partition: {
            label: {
                "tokens": int(mask.sum()),
                "share": weight_shares[partition][label],
                "gradient_share": gradient_shares[partition][label],
            }
            for label, mask in masks.items()
        }
        for partition, masks in classes.items()
    }
    return Replayed(name, batch, attribution, numbers)


def _rebuild_batch(
    dumped: DumpedBatch, weights: Weights, objective: Objective, budget: Budget, config: RunConfig, own: RunConfig
) -> TrainBatch:
    """Return the batch that the run would have trained on with `objective`, from the saved completions and rewards."""
    policy, stored, stats = weights.policy, dumped.batch, Stats()
    if _select_batch_settings(config) == _select_batch_settings(own):
        frozen = freeze(policy, objective, budget, stored.rollouts)  # for the reference's log-probs
        frozen = replace(frozen, loss_mask=stored.loss_mask, surrogate_mask=stored.surrogate_mask)
        frozen = replace(frozen, teacher_logprobs=stored.teacher_logprobs)
        advantages, rewards = stored.advantages, stored.shaped_rewards
    else:
        kl_coef = _make_control(dumped, config, own).kl_coef
        scores = replace(dumped.scores, weights=tuple(reward.weight for reward in config.all_rewards))
        rewards, trained = shape_rewards(objective, policy, budget, stored.rollouts, scores, kl_coef, stats)
        frozen = freeze(policy, objective, budget, stored.rollouts, trained)
        frozen = replace(frozen, teacher_logprobs=stored.teacher_logprobs, logprobs=stored.old_logprobs)
        advantages = compute_step_advantages(objective, rewards, stored.rollouts, scores, stats, frozen)
    batch = frozen.with_advantages(advantages, rewards)
    batch = replace(batch, old_logprobs=stored.old_logprobs)
    key = make_key("selection", config.seed, dumped.step, 0)
    batch = add_cross_row_masks(policy, objective, budget, batch, key, stats, is_first=weights.are_before_step)
    return replace(batch, old_logprobs=None if weights.are_before_step else stored.old_logprobs)


def _select_batch_settings(config: RunConfig) -> tuple:
    """Return the settings on which the advantages and the masks of a batch depend."""
    loss = config.loss
    in_reward = (loss.kl, loss.kl_coef) if loss.kl_in == "reward" else None
    limit = config.sampling.max_new_tokens if config.truncation.name != "keep" else None
    return config.advantage, config.truncation, loss.top_entropy, in_reward, limit


def _make_control(dumped: DumpedBatch, config: RunConfig, own: RunConfig) -> Control:
    """Return the coefficients: the step's, which may have adapted, unless `config` changes their start values."""
    row, loss, own_loss = dumped.row, config.loss, own.loss
    return Control(
        row["kl_coef"] if loss.kl_coef == own_loss.kl_coef else loss.kl_coef,
        row["entropy_coef"] if loss.entropy_coef == own_loss.entropy_coef else loss.entropy_coef,
    )


def _choose_budget(config: RunConfig) -> Budget:
    """Return the tokens of one forward and backward. For `auto` the number is fixed; no memory is measured here."""
    tokens = config.trainer.tokens_per_micro_batch
    if tokens == "auto":
        tokens = MAX_GPU_TOKENS if torch.cuda.is_available() else MAX_CPU_TOKENS
    return Budget(tokens)


def _move_to(batch: Any, device: torch.device) -> Any:
    """Return a TrainBatch or Rollouts with its tensors on `device`."""
    moved = {
        name: _move_to(value, device) if isinstance(value, Rollouts) else value.to(device)
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor | Rollouts)
    }
    return replace(batch, **moved)


def summarise(dumped: DumpedBatch, weights: Weights, replayed: list[Replayed], own: RunConfig) -> dict[str, Any]:
    """Return the result as JSON values. Numbers per token are one list per completion."""
    mask, run_attribution = dumped.batch.rollouts.completion_mask, replayed[0].attribution
    gap = ((run_attribution.logprobs.cpu() - dumped.batch.old_logprobs).abs() * mask).max()
    return {
        "run": str(dumped.folder),
        "step": dumped.step,
        "ranks": dumped.ranks,
        "weights": weights.description,
        "ratio_is_1": weights.are_before_step,
        "optimizer_steps": own.trainer.num_minibatches * own.trainer.num_passes,
        "dropout": own.lora.dropout,
        "logprob_gap_max": float(gap),
        "row": dumped.row,
        "objectives": [_summarise_objective(objective, run_attribution, mask) for objective in replayed],
        "completions": [
            {"task": row["task"], "sample": row["sample"], "tokens": _drawn_tokens(row)} for row in dumped.completions
        ],
    }


def _drawn_tokens(completion: dict[str, Any]) -> list[str]:
    """Return the texts of a saved completion's drawn tokens, which the numbers per token belong to."""
    turns = completion.get("turns")
    if turns is None:
        return completion["tokens"]
    return [text for text, turn in zip(completion["tokens"], turns, strict=True) if turn >= 0]


def _summarise_objective(replayed: Replayed, run_attribution: Attribution, mask: torch.Tensor) -> dict[str, Any]:
    """Return the result of one objective; cosine and norm_ratio compare with the run's own, None if undefined."""
    attribution = replayed.attribution
    norm, run_norm = attribution.norm(), run_attribution.norm()
    inner = dot(attribution.gradient, run_attribution.gradient)
    tokens = {"loss": attribution.token_loss, "weight": attribution.weight}
    return {
        "name": replayed.name,
        "loss": attribution.loss,
        "grad_norm": norm,
        "cosine": inner / (norm * run_norm) if norm and run_norm else None,
        "norm_ratio": norm / run_norm if run_norm else None,
        "classes": replayed.classes,
        "advantages": replayed.batch.mean_advantages().tolist(),
        "tokens": {
            name: [row[is_token].tolist() for row, is_token in zip(values.cpu(), mask, strict=True)]
            for name, values in tokens.items()
        },
    }
