"""Try the functions of an objective on small batches, before a model is loaded.

A function that does not exist, cannot be called with the inputs of its section, raises, or returns something else than
it must, ends in a ConfigError that names the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from grpo_core.config.sections import RunConfig
from grpo_core.objective.advantages import ADVANTAGES, compute_advantages
from grpo_core.objective.corrections import CORRECTIONS
from grpo_core.objective.diagnostics import describe_wrong_diagnostics, find_not_finite
from grpo_core.objective.inputs import (
    ADVANTAGE_INPUTS,
    CORRECTION_INPUTS,
    KL_INPUTS,
    LOSS_INPUTS,
    OF_TOKENS,
    REJECTION_INPUTS,
    SELECTION_INPUTS,
    TRUNCATION_INPUTS,
    bind_selection,
    select_tokens,
)
from grpo_core.objective.kl import KLS
from grpo_core.objective.losses import LOSSES, PolicyLoss
from grpo_core.objective.rejections import REJECTIONS
from grpo_core.objective.token_weights import AVERAGES
from grpo_core.objective.truncation import TRUNCATIONS
from grpo_core.registry import ProcessExit, exits_as_errors, get_fact
from grpo_core.schema import ConfigError, summarize_error

MAX_TRIED = 64  # completions, and tokens of each, of the larger batch on which a loss is tried
INPUTS = {
    "loss": LOSS_INPUTS,
    "loss.kl": KL_INPUTS,
    "loss.rollout_correction": CORRECTION_INPUTS,
    "loss.rejection": REJECTION_INPUTS,
    "advantage": ADVANTAGE_INPUTS,
    "truncation": TRUNCATION_INPUTS,
}


def check_functions(config: RunConfig) -> None:
    """Check that every function of the objective exists, takes its arguments, and works on small batches."""
    loss, small = config.loss, _make_batch(2, 3)
    check_inputs("loss.kl", loss.kl, KLS.get(loss.kl))
    AVERAGES.get(loss.average)
    try_loss(loss.name, loss.args, _larger_batch(config))
    advantage = try_advantage(config.advantage.name, config.advantage.args)
    correction, rejection, truncation = loss.rollout_correction, loss.rejection, config.truncation
    function = CORRECTIONS.build(correction.name, correction.args, "loss.rollout_correction.args")
    _try("loss.rollout_correction", correction.name, function, small)
    _check_order(config, advantage, function)
    function = REJECTIONS.build(rejection.name, rejection.args, "loss.rejection.args")
    _try("loss.rejection", rejection.name, function, small)
    function = TRUNCATIONS.build(truncation.name, truncation.args, "truncation.args")
    inputs = {"rewards": torch.eye(2), "lengths": torch.ones(2, 2), "truncated": torch.zeros(2, 2, dtype=torch.bool)}
    _try("truncation", truncation.name, function, {**inputs, "max_new_tokens": 8})


def _check_order(config: RunConfig, advantage: Callable, correction: Callable) -> None:
    """Check that the correction needs nothing that comes after its weights, where the advantages need these."""
    late = [name for name in CORRECTION_INPUTS.requested(correction) if name in ("advantages", "rewards")]
    if late and "rollout_weights" in ADVANTAGE_INPUTS.requested(advantage):
        raise ConfigError(
            f"loss.rollout_correction {config.loss.rollout_correction.name} needs {' and '.join(late)}, but advantage "
            f"{config.advantage.name} needs the weights of the correction first; choose another of the two"
        )


def try_loss(name: str, args: dict[str, Any], larger: tuple[int, int] | None = None) -> Callable:
    """Build the loss `name` with `args`, call it on a batch of two and on one of the shape `larger`, and return it.

    Raises:
        ConfigError: the loss does not exist, does not take the arguments, raises, or does not return a PolicyLoss with
            per_token_loss [B, C] and diagnostics [B, C] whose names no metric has.
    """
    function = LOSSES.build(name, args, "loss.args")
    for shape in dict.fromkeys(((2, 3), larger or (2, 3))):
        _try_loss_on(name, function, _make_batch(*shape))
    return function


def try_advantage(name: str, args: dict[str, Any]) -> Callable:
    """Build the advantage `name` with `args`, call it on a batch of two groups, and return it; errors as `try_loss`."""
    function = ADVANTAGES.build(name, args, "advantage.args")
    tokens = {x: value.expand(2, 2, 3) for x, value in _make_batch(2, 3).items() if x in OF_TOKENS}
    _try("advantage", name, function, {"rewards": torch.tensor([[1.0, 0.0], [0.5, 1.0]]), **tokens})
    return function


def check_inputs(key: str, name: str, function: Callable) -> None:
    """Raise ConfigError if a function of the objective cannot be called with the inputs of its section."""
    INPUTS[key].check(function, f"{key} {name}")


def _larger_batch(config: RunConfig) -> tuple[int, int]:
    """Return the completions and tokens of an optimizer step, at most MAX_TRIED of each."""
    sampling, trainer = config.sampling, config.trainer  # whose numbers are checked later
    group = max(1, min(sampling.group_size, MAX_TRIED))
    rows = trainer.completions_per_step // max(1, trainer.num_minibatches)
    return max(1, min(rows, MAX_TRIED // group * group)), max(1, min(sampling.max_new_tokens, MAX_TRIED))


def _make_batch(rows: int, tokens: int) -> dict[str, Tensor]:
    """Return the inputs of a loss, a correction and a rejection for completions of different lengths."""
    old = -(torch.arange(rows * tokens) % 7 + 1).view(rows, tokens) / 4
    row, token = torch.arange(rows)[:, None], torch.arange(tokens)
    entropy = -old.detach() / 2
    return {
        "logprobs": (old + 0.1).requires_grad_(),
        "old_logprobs": old,
        "advantages": 1 - row % 2 * 1.5,  # 1 and -0.5
        "completion_mask": token < tokens - row * 2 % tokens,
        "rollout_logprobs": old - 0.01,
        "ref_logprobs": old - 0.2,
        "teacher_logprobs": old - 0.3,
        "entropy": entropy,
        "sum_p_squared": (-entropy).exp(),
        "rewards": (row % 2 == 0).float(),
        "rollout_weights": torch.ones_like(old),
        "draws": torch.full_like(old, 0.5),
        "turn_ids": torch.zeros(rows, tokens, dtype=torch.long),
    }


def _try_loss_on(name: str, function: Callable, inputs: dict[str, Tensor]) -> None:
    old, mask = inputs["old_logprobs"], inputs["completion_mask"]
    out = _try("loss", name, function, {**inputs, "selected": _try_selection(name, function, inputs)})
    if not isinstance(out, PolicyLoss):
        raise ConfigError(f"loss {name} returned {type(out).__name__}; it must return a PolicyLoss")
    if not isinstance(out.per_token_loss, Tensor):
        kind = type(out.per_token_loss).__name__
        raise ConfigError(f"loss {name} returned per_token_loss of type {kind}; it must be a tensor [B, C]")
    if out.per_token_loss.shape != old.shape:
        shape, expected = list(out.per_token_loss.shape), list(old.shape)
        raise ConfigError(
            f"loss {name} returned per_token_loss {shape}; it must be [B, C] = {expected}, unreduced, because "
            f"loss.average averages it"
        )
    problem = describe_wrong_diagnostics(out.diagnostics, old.shape) or find_not_finite(out.diagnostics, mask)
    if problem:
        raise ConfigError(f"loss {name} {problem}")


def _try_selection(name: str, loss_fn: Callable, inputs: Mapping[str, Any]) -> Tensor:
    """Return what the loss chooses of a batch, [B, C] bool; no token if it has no function for that.

    Raises:
        ConfigError: the loss asks for a choice and has no function for it, or the function returned something else.
    """
    mask, selects = inputs["completion_mask"], get_fact(loss_fn, "selects")
    if selects is None:
        if "selected" in LOSS_INPUTS.requested(loss_fn):
            raise ConfigError(
                f"loss {name} asks for selected, but has no attribute selects, the function that chooses the tokens"
            )
        return torch.zeros_like(mask)
    SELECTION_INPUTS.check(bind_selection(loss_fn), f"the function selects of loss {name}")
    with torch.no_grad():
        values = {**inputs, "advantages": inputs["advantages"].expand_as(mask)}
        selected = _guard("loss", name, lambda: select_tokens(loss_fn, values), len(mask))
    if not isinstance(selected, Tensor) or selected.dtype is not torch.bool or selected.shape != mask.shape:
        raise ConfigError(f"loss {name}: its function selects must return a tensor [B, C] of bool")
    return selected


def _try(key: str, name: str, function: Callable, inputs: Mapping[str, Any]) -> Any:
    """Check the function's inputs and call it with them; errors as `_guard`."""
    check_inputs(key, name, function)
    if key == "advantage":
        return _guard(key, name, lambda: compute_advantages(function, **inputs))
    rows = len(inputs["old_logprobs"]) if "old_logprobs" in inputs else 2
    return _guard(key, name, lambda: INPUTS[key].call(function, inputs), rows)


def _guard(key: str, name: str, call: Callable[[], Any], rows: int = 2) -> Any:
    """Return what `call` returns; turn what it raises into a ConfigError that names the key and the function."""
    batch = "a batch of two" if rows == 2 else f"a batch of {rows}"
    try:
        with exits_as_errors():
            return call()
    except ProcessExit as error:
        raise ConfigError(f"{key} {name} {error} on {batch}") from None
    except ConfigError as error:
        has_key = str(error).startswith(key)
        raise ConfigError(str(error) if has_key else f"{key} {name}: {error}") from None
    except Exception as error:
        raise ConfigError(f"{key} {name} fails on {batch}: {summarize_error(error)}") from error
