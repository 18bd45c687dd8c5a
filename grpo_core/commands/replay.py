"""`replay`: a dumped batch under the run's own objective and under others. One process, no engine, CPU or GPU.

The policy computes in float32, whatever the run did, and without dropout. The whole batch is one minibatch. At the
weights before the step its ratios are 1 and nothing is clipped; another model of the run (--model) has ratios against
the dumped log-probs, and then clipping is seen.
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
from grpo_core.commands.attribution import Attribution, attribute, classify, dot, pulls, shares
from grpo_core.commands.open_policy import open_source
from grpo_core.commands.replay_table import format_table
from grpo_core.config.files import load_run_config
from grpo_core.config.presets import PRESETS
from grpo_core.config.sections import RunConfig
from grpo_core.distributed import ranks
from grpo_core.model.memory import MAX_CPU_TOKENS
from grpo_core.model.packing import Budget
from grpo_core.model.policy import Policy, load_policy
from grpo_core.monitor.aggregates import Stats
from grpo_core.monitor.progress import show_elapsed
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.objective import Objective
from grpo_core.schema import ConfigError, finite_or_none, printable
from grpo_core.training import saved_batches
from grpo_core.training.control import Control
from grpo_core.training.freeze import freeze
from grpo_core.training.prepare import build_objective, quieten
from grpo_core.training.rollouts import compute_step_advantages, shape_rewards
from grpo_core.training.saved_batches import Dumped

READ = ("loss.", "advantage.", "truncation", "preset", "model.", "sampling.temperature", "sampling.max_new_tokens")
READ += ("trainer.tokens_per_micro_batch",)  # keys that a replay depends on
SOME = 12  # batches that an error message lists


@dataclass(frozen=True)
class Weights:
    """The policy that a batch is replayed with."""

    policy: Policy
    words: str  # which weights these are
    before: bool  # those that the step began with


@dataclass(frozen=True)
class Replayed:
    """A batch under one objective."""

    name: str
    batch: TrainBatch
    found: Attribution
    classes: dict  # partition -> class -> {"tokens", "share", "pull"}


def run_replay(
    batch: Path,
    overrides: Sequence[str],
    *,
    loss: Sequence[str] = (),
    model: str | None = None,
    output: Path | None = None,
) -> int:
    """Print how the batch's loss and gradient differ between the run's objective and others; with `output` as JSON too.

    Each of `loss` (a loss, file.py:function or a preset) is another objective; `overrides` are `section.key=value` of
    all of them, or of one more where there is no `loss`. `batch` is as in `read_dump`, `model` as in `open_source`.

    Raises:
        ConfigError: no such batch, an objective that is none, or a model of other weights.
    """
    for override in overrides:
        if not override.startswith(READ):
            raise ConfigError(
                f"{override} changes nothing in a replay, which reads {', '.join(READ).replace('.,', ',')}"
            )
    check_kept(batch)
    dumped = saved_batches.read_dump(batch)
    configs = objectives(dumped.folder, overrides, loss)
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
            output.write_text(json.dumps(finite_or_none(summary), allow_nan=False, indent=1), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output is {output}, which cannot be written: {error.strerror}") from None
    return 0


def check_kept(batch: Path) -> None:
    """Raise ConfigError where `batch` is named as one, but its step was not kept: with those that were."""
    found = re.fullmatch(r"(step-\d+)(-rank-\d+)?(\.safetensors|\.json)?", batch.name)
    folder, run = batch.parent, batch.absolute().parents[1]
    if not found or any(folder.glob(f"{found[1]}-rank-*")):
        return  # saved_batches.read says what is wrong with it
    if not run.is_dir():
        raise ConfigError(f"there is no run folder {run}")
    kept = sorted(path.name.removesuffix("-rank-0.json") for path in folder.glob("step-*-rank-0.json"))
    if not kept:
        raise ConfigError(f"{run} has kept no batches; debug.dump_batches=N keeps that of every N-th step")
    some = kept if len(kept) <= SOME else [*kept[: SOME - 2], "...", kept[-1]]
    raise ConfigError(f"{found[1]} was not kept in {folder}, which has {', '.join(some)}")


def objectives(folder: Path, overrides: Sequence[str], losses: Sequence[str]) -> list[tuple[str, RunConfig]]:
    """Names and configurations: the run's own first, then those asked for. A loss comes before a preset of its name."""
    own = load_run_config(folder)
    found = [(f"run ({own.loss.name})", own)]
    for name in losses:
        if name not in LOSSES.functions and name not in PRESETS and ".py:" not in name:
            names = f"losses: {', '.join(sorted(LOSSES.functions))}; presets: {', '.join(sorted(PRESETS))}"
            raise ConfigError(f"unknown loss or preset {name!r}; {names}; or file.py:function")
        word = f"preset={name}" if name in PRESETS and name not in LOSSES.functions else f"loss.name={name}"
        found.append((name, load_run_config(folder, [word, *overrides])))
    if overrides and not losses:
        found.append((" ".join(overrides), load_run_config(folder, overrides)))
    return found


def open_weights(dumped: Dumped, own: RunConfig, model: str | None, overrides: Sequence[str] = ()) -> Weights:
    """The base model with the dumped adapter, or the weights that `model` names, with what the run trains switched on.

    Raises:
        ConfigError: `model` has other weights than those that the run trains.
    """
    quieten()
    config, device = load_run_config(dumped.folder, overrides), ranks.device()
    if dumped.weights and model is None:
        temperature = own.sampling.temperature
        policy = load_policy(config.model, own.lora, dtype=torch.float32, temperature=temperature)
        words = "the base model with the adapter as it was before the step"
    else:
        opened = open_source(model or str(dumped.folder), ["model.precision=fp32", *overrides])
        policy, words = opened.policy, opened.weights
        words += "" if model else " (a batch with lora.r 0 holds none: the newest there are)"
    named = dict(policy.model.named_parameters())
    trained = dumped.weights or named
    if any(name not in named or named[name].shape != value.shape for name, value in trained.items()):
        raise ConfigError(f"{words}: these are other weights than the ones that {dumped.folder} trains")
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
    if dumped.weights and model is None:
        with torch.no_grad():
            for name, value in dumped.weights.items():
                named[name].copy_(value)
    policy.model.to(device)
    if dumped.reference:
        policy.move_reference()
        policy.load_reference(dumped.reference)
    return Weights(policy, words, bool(dumped.weights) and model is None)


def replay(dumped: Dumped, weights: Weights, name: str, config: RunConfig, own: RunConfig) -> Replayed:
    """Compute the batch's loss and gradient under `config`, as one minibatch.

    Advantages are computed again from the rewards where `config` has others than `own`, the run's configuration.
    """
    dumped = replace(dumped, batch=_on(dumped.batch, ranks.device()))
    policy = weights.policy
    policy.temperature = config.sampling.temperature
    objective = replace(build_objective(config), steps_per_batch=1, learns_from_ties=True)
    budget, control = _budget(config), _control(dumped, config, own)
    batch = _frozen_batch(dumped, weights, objective, budget, config, own)
    found = attribute(policy, objective, budget, batch, control)
    classes = classify(batch, found)
    pull = pulls(policy, objective, budget, batch, control, found.gradient, classes)
    share = shares(found, classes)
    told = {
        partition: {
            label: {"tokens": int(mask.sum()), "share": share[partition][label], "pull": pull[partition][label]}
            for label, mask in masks.items()
        }
        for partition, masks in classes.items()
    }
    return Replayed(name, batch, found, told)


def _frozen_batch(
    dumped: Dumped, weights: Weights, objective: Objective, budget: Budget, config: RunConfig, own: RunConfig
) -> TrainBatch:
    """The batch that `objective` would have made of the step's completions and rewards."""
    policy, stored, stats = weights.policy, dumped.batch, Stats()
    if _learns_from(config) == _learns_from(own):
        frozen = freeze(policy, objective, budget, stored.rollouts)  # for the reference's log-probs
        frozen = replace(frozen, loss_mask=stored.loss_mask, surrogate_mask=stored.surrogate_mask)
        advantages = stored.advantages
    else:
        kl_coef = _control(dumped, config, own).kl_coef
        scores = replace(dumped.scores, weights=tuple(reward.weight for reward in config.rewards))
        rewards, trained = shape_rewards(objective, policy, budget, stored.rollouts, scores, kl_coef, stats)
        frozen = freeze(policy, objective, budget, stored.rollouts, trained)
        advantages = compute_step_advantages(objective, rewards, stored.rollouts, scores, stats)
    frozen = replace(frozen, old_logprobs=None if weights.before else stored.old_logprobs)
    return frozen.with_advantages(advantages)


def _learns_from(config: RunConfig) -> tuple:
    """Return the settings on which the advantages and the masks of a batch depend."""
    loss = config.loss
    in_reward = (loss.kl, loss.kl_coef) if loss.kl_in == "reward" else None
    limit = config.sampling.max_new_tokens if config.truncation.name != "keep" else None
    return config.advantage, config.truncation, loss.top_entropy, in_reward, limit


def _control(dumped: Dumped, config: RunConfig, own: RunConfig) -> Control:
    """The step's coefficients; where the configuration has others than the run's, those."""
    row, (loss, before) = dumped.row, (config.loss, own.loss)
    return Control(
        row["kl_coef"] if loss.kl_coef == before.kl_coef else loss.kl_coef,
        row["entropy_coef"] if loss.entropy_coef == before.entropy_coef else loss.entropy_coef,
    )


def _budget(config: RunConfig) -> Budget:
    """The tokens of one forward and backward: as configured, or few enough for any GPU."""
    tokens = config.trainer.tokens_per_micro_batch
    return Budget((16_384 if torch.cuda.is_available() else MAX_CPU_TOKENS) if tokens == "auto" else tokens)


def _on(batch: Any, device: torch.device) -> Any:
    """A TrainBatch or Rollouts with its tensors on `device`."""
    moved = {
        name: _on(value, device) if isinstance(value, Rollouts) else value.to(device)
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor | Rollouts)
    }
    return replace(batch, **moved)


def summarise(dumped: Dumped, weights: Weights, replayed: list[Replayed], own: RunConfig) -> dict[str, Any]:
    """Everything as JSON takes it; numbers of tokens are a list a completion."""
    mask, first = dumped.batch.rollouts.completion_mask, replayed[0].found
    gap = ((first.logprobs.cpu() - dumped.batch.old_logprobs).abs() * mask).max()
    return {
        "run": str(dumped.folder),
        "step": dumped.step,
        "ranks": dumped.ranks,
        "weights": weights.words,
        "ratio_is_1": weights.before,
        "optimizer_steps": own.trainer.num_minibatches * own.trainer.num_passes,
        "dropout": own.lora.dropout,
        "logprob_gap_max": float(gap),
        "row": dumped.row,
        "objectives": [_told(one, first, mask) for one in replayed],
        "completions": [{key: one[key] for key in ("task", "sample", "tokens")} for one in dumped.completions],
    }


def _told(one: Replayed, own: Attribution, mask: torch.Tensor) -> dict[str, Any]:
    norm, of_run = one.found.norm(), own.norm()
    tokens = {"loss": one.found.token_loss, "weight": one.found.weight}
    return {
        "name": one.name,
        "loss": one.found.loss,
        "grad_norm": norm,
        "cosine": dot(one.found.gradient, own.gradient) / (norm * of_run) if norm and of_run else None,
        "norm_ratio": norm / of_run if of_run else None,
        "classes": one.classes,
        "advantages": one.batch.advantages.flatten().tolist(),
        "tokens": {
            name: [row[kept].tolist() for row, kept in zip(values.cpu(), mask, strict=True)]
            for name, values in tokens.items()
        },
    }
