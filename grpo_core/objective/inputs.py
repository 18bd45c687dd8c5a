"""Inputs of the objective's functions: those that a function always gets, and those that it may ask for by name.

A function gets the positional inputs of its kind in a fixed order, whatever its parameters are called. Each further
parameter asks for the input of its name:

    def my_loss(logprobs, old_logprobs, advantages, completion_mask, rollout_logprobs, *, bound: float = 0.2): ...

Parameters with a default after a `*` are the function's YAML arguments. What costs a forward is computed only if a
function of the run asks for it.

B completions, C tokens in the longest one, N prompts, G completions of each, V words in the vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError, first_line, keyword_arguments, list_known


@dataclass(frozen=True)
class Inputs:
    """The inputs of one kind of function."""

    positional: tuple[str, ...]
    by_name: tuple[str, ...] = ()

    def requested(self, function: Callable) -> tuple[str, ...]:
        """Return the inputs that `function` asks for by name."""
        return tuple(p.name for p in self._further(function) if p.name in self.by_name)

    def values_for(self, function: Callable, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of `values` that `function` asks for by name."""
        return {name: values[name] for name in self.requested(function)}

    def call(self, function: Callable, values: Mapping[str, Any]) -> Any:
        """Call `function` with its inputs; `values` has the positional ones and those that it asks for."""
        return function(*(values[name] for name in self.positional), **self.values_for(function, values))

    def check(self, function: Callable, title: str) -> None:
        """Check that `function` can be called so; `title`, such as "loss my.py:f", begins the message.

        Raises:
            ConfigError: it takes fewer inputs, or asks for one that there is not.
        """
        known = f"it is called with {', '.join(self.positional)}, in this order"
        if self.by_name:
            known += f", and by name {', '.join(self.by_name)}"
        known += ", and any other argument must be keyword-only with a default"
        further = self._further(function)
        unknown = [p.name for p in further if p.name not in self.by_name and p.default is p.empty]
        if unknown:
            hint = list_known(unknown[0], self.by_name).partition(" (")[2] if self.by_name else ""
            raise ConfigError(f"{title} asks for {', '.join(unknown)}{' (' + hint if hint else ''}; {known}")
        try:
            inspect.signature(function).bind(*self.positional, **dict.fromkeys(self.requested(function)))
        except TypeError as error:
            raise ConfigError(f"{title} cannot be called: {first_line(error)}; {known}") from None

    def _further(self, function: Callable) -> list[inspect.Parameter]:
        """Return the parameters that no positional input fills and that are no YAML arguments."""
        parameters = [*inspect.signature(function).parameters.values()]
        in_order = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        return [*in_order[len(self.positional) :], *keyword_only]


OF_TOKENS = (
    "completion_mask",
    "logprobs",
    "rollout_logprobs",
    "ref_logprobs",
    "teacher_logprobs",
    "entropy",
    "sum_p_squared",
    "rollout_weights",
    "turn_ids",
)
LOSS_INPUTS = Inputs(
    (
        "logprobs",  # [B, C] of the policy, with gradient
        "old_logprobs",  # [B, C] of the policy before this step's first update
        "advantages",  # [B, 1], or [B, C] where the advantage function returns a value for each token
        "completion_mask",  # [B, C] bool, the tokens that are trained
    ),
    (
        "rollout_logprobs",  # [B, C] of the sampler
        "ref_logprobs",  # [B, C] of the reference; costs a forward
        "entropy",  # [B, C] of the policy, in nats, without gradient
        "sum_p_squared",  # [B, C] sum over the vocabulary of the policy's squared probabilities, without gradient
        "rewards",  # [B, 1] as they enter the advantages; NaN where a completion has none
        "selected",  # [B, C] bool, the choice of the function that the loss has as its attribute `selects`
        "teacher_logprobs",  # [B, C] of the teacher (the section teacher); costs a forward of it
    ),
)
SELECTION_INPUTS = Inputs(  # of all rows of the optimizer step, on all ranks
    (
        "logprobs",  # [B, C] of the policy as it is before this optimizer step
        "old_logprobs",  # [B, C]
        "advantages",  # [B, C]
        "completion_mask",  # [B, C] bool
        "draws",  # [B, C] random numbers, uniform from 0 to 1, for a choice among equals
    ),
    ("rollout_logprobs",),  # [B, C] of the sampler
)


def select_tokens(loss_fn: Callable, values: Mapping[str, Any]) -> Any:
    """Return the choice of a loss's function `selects`, [B, C] bool, or None where it has none.

    `values` are the SELECTION_INPUTS. The function gets those of the loss's YAML arguments that it has too.
    """
    selects = get_fact(loss_fn, "selects")
    if selects is None:
        return None
    return SELECTION_INPUTS.call(bind_selection(loss_fn), values)


def bind_selection(loss_fn: Callable) -> Callable:
    """Return the function `selects` of a loss with those of the loss's YAML arguments that it has too."""
    selects = get_fact(loss_fn, "selects")
    names = inspect.signature(selects).parameters
    arguments = {name: p.default for name, p in keyword_arguments(loss_fn).items() if name in names}
    return functools.partial(selects, **arguments)


KL_INPUTS = Inputs(("logprobs", "ref_logprobs", "old_logprobs"))
CORRECTION_INPUTS = Inputs(
    ("old_logprobs", "rollout_logprobs", "completion_mask"),
    ("advantages", "ref_logprobs", "rewards"),
)
REJECTION_INPUTS = Inputs(("old_logprobs", "rollout_logprobs", "advantages", "completion_mask"))
ADVANTAGE_INPUTS = Inputs(
    ("rewards",),  # [N, G]
    (
        "lengths",  # [N, G] tokens
        "components",  # [K, N, G] the K rewards before they are summed
        "weights",  # [K]
        "completion_mask",  # [N, G, C] bool
        "logprobs",  # [N, G, C] of the policy before this step's first update; costs a forward, as the rest does
        "rollout_logprobs",  # [N, G, C]; costs nothing
        "ref_logprobs",  # [N, G, C]
        "teacher_logprobs",  # [N, G, C]
        "entropy",  # [N, G, C]
        "sum_p_squared",  # [N, G, C]
        "rollout_weights",  # [N, G, C] of the rollout correction, 1 without one
        "turn_ids",  # [N, G, C] number of the turn of every drawn token from 0, -1 elsewhere; costs nothing
        "turn_rewards",  # [N, G, T] the part of the reward that came with each turn; NaN where there is no such turn
    ),
)
TRUNCATION_INPUTS = Inputs(("rewards", "lengths", "truncated", "max_new_tokens"))
