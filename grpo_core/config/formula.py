"""The objective in words: the formula of a run with its values in it, and what about it deserves a warning.

The formula of a function is the first line of its docstring, in its own arguments.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from grpo_core.config.sections import RunConfig
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.corrections import CORRECTIONS
from grpo_core.objective.kl import KLS
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.token_weights import AVERAGES
from grpo_core.objective.truncation import TRUNCATIONS
from grpo_core.registry import Registry, fact
from grpo_core.schema import keyword_arguments

LETTERS = """\
l, l_old, l_ref, l_roll   log-prob of a token: now, before the step's first update, under the reference, as sampled
r, R                      exp(l - l_old) of a token; exp of its mean over a completion
v                         exp(l_old - l_roll)
d                         l_ref - l
A                         advantage of the completion; in its own formula r is the reward
sg                        stop-gradient
n_i                       tokens of completion i; tokens, completions: of the whole optimizer step"""


def render(config: RunConfig) -> str:
    """What the run minimises: a few lines, every number in its place, and what should be remarked about them."""
    loss = config.loss
    rows = [("loss", _sum(config)), ("L", f"{_formula(LOSSES, loss.name, loss.args)}    ({loss.name})")]
    if loss.rollout_correction.name != "none":
        weight = _formula(CORRECTIONS, loss.rollout_correction.name, loss.rollout_correction.args)
        inside = "; within L, through l_old" if fact(LOSSES.get(loss.name), "corrects_rollout") else ""
        rows.append(("w", f"{weight}    ({loss.rollout_correction.name}{inside})"))
    average = _formula(AVERAGES, loss.average, {}, config.sampling.max_new_tokens)
    rows.append(("weight", f"{average}    ({loss.average})"))
    if loss.kl_coef:
        rows.append(("KL", f"{_formula(KLS, loss.kl, {})}    ({loss.kl}; {_reference(config)})"))
        if loss.kl_target is not None:
            towards = f"{_number(loss.kl_target)}, with a horizon of {loss.kl_horizon} completions"
            rows.append(("", f"its coefficient starts so and adapts towards a KL of {towards}"))
    if loss.entropy_coef or loss.entropy_target is not None:
        tokens = "the tokens of highest entropy" if loss.top_entropy < 1 else "the step's tokens"
        rows.append(("H", f"mean entropy of {tokens}"))
        if loss.entropy_target is not None:
            towards = f"{_number(loss.entropy_target)}, by {_number(loss.entropy_delta)} a step"
            rows.append(("", f"its coefficient starts so and adapts towards an entropy of {towards}"))
    advantage = config.advantage
    tied = f"; 0 where std < {_number(advantage.min_group_std)}" if advantage.min_group_std else ""
    rows.append(("A", f"{_formula(ADVANTAGES, advantage.name, advantage.args)}{tied}    ({advantage.name})"))
    rewards = " + ".join(f"{_number(reward.weight)} {reward.name}{_given(reward.args)}" for reward in config.rewards)
    if loss.kl_coef and loss.kl_in == "reward":
        rewards += f" - {_number(loss.kl_coef)} sum_t KL"
    rows.append(("reward", rewards))
    truncation = _formula(TRUNCATIONS, config.truncation.name, config.truncation.args, config.sampling.max_new_tokens)
    rows.append(("truncated", f"{truncation}    ({config.truncation.name})"))
    if config.sampling.dynamic_attempts:
        rows.append(("tied", f"replaced by fresh prompts, up to {config.sampling.dynamic_attempts} times a step"))
    rows += [("note", remark) for remark in list_remarks(config)]
    return "\n".join(f"{name:<9}  {text}" for name, text in rows)


def _sum(config: RunConfig) -> str:
    """The order of operations of trainer.token_loss."""
    loss, factors = config.loss, ["L"]
    if loss.off_policy_mask is not None:
        factors.append(f"[A >= 0 or mean_t(l_roll - l) <= {_number(loss.off_policy_mask)}]")
    if loss.top_entropy < 1:
        factors.append(f"[entropy in the top {loss.top_entropy:.0%}]")
    if loss.rollout_correction.name != "none" and not fact(LOSSES.get(loss.name), "corrects_rollout"):
        factors.append("w")
    token = " ".join(factors)
    if loss.kl_coef and loss.kl_in == "loss":
        token = f"({token} + {_number(loss.kl_coef)} KL)"
    bonus = loss.entropy_coef or loss.entropy_target is not None
    return f"sum over tokens of {token} * weight" + (f", - {_number(loss.entropy_coef)} H" if bonus else "")


def list_remarks(config: RunConfig) -> list[str]:
    """What the objective does that its author may not have meant; none of it stops a run."""
    loss, found = config.loss, []
    function = LOSSES.get(loss.name)
    ratio, averages = fact(function, "ratio"), fact(function, "averages")
    if loss.average == "row_sum" and ratio == "token":
        found.append(
            f"loss.average row_sum adds up {loss.name}'s token ratios, so a completion pulls in proportion to its "
            f"length; it is meant for a ratio of the whole sequence (luspo, gspo) or for reinforce"
        )
    if averages and loss.average not in averages:
        found.append(f"loss {loss.name} is defined with the average {' or '.join(averages)}, not {loss.average}")
    if loss.average == "micro_token":
        found.append(
            "loss.average micro_token makes the gradient depend on trainer.tokens_per_micro_batch; token does not"
        )
    if (loss.name == "gpg") != (config.advantage.name == "gpg"):
        found.append("gpg is the loss gpg with the advantage gpg, which carries its factor; here is only one of them")
    if loss.kl_coef and loss.kl_in == "loss" and loss.kl == "k1":
        found.append(
            "loss.kl k1 in the loss does not pull to the reference: on policy its expected gradient is 0; k1+ does"
        )
    if config.advantage.name == "opo" and loss.average == "sequence":
        found.append("advantage opo weighs by length what loss.average sequence does not let grow with it")
    several = config.trainer.num_minibatches * config.trainer.num_passes > 1
    if config.reference.every == 1 and config.reference.mixing == 1 and not several:
        found.append("reference.every 1 makes the reference the policy at every step, so the KL and its gradient are 0")
    if loss.name == "cispo" and loss.args.get("cap", 5.0) < 1:
        found.append("loss.args.cap is the ratio itself: below 1 it scales every gradient, on policy too")
    if config.advantage.name == "maxrl" and any(reward.weight < 0 for reward in config.rewards):
        found.append("advantage maxrl is made for rewards of 0 and 1, and a reward has a negative weight")
    return found


def merge_arguments(function: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """All of a function's keyword arguments, with the given values in place of the defaults."""
    return {name: p.default for name, p in keyword_arguments(function).items()} | given


def get_formula(function: Callable) -> str:
    """The first line of a function's docstring, or its name."""
    text = inspect.getdoc(function) or function.__name__
    return text.splitlines()[0]


def _formula(registry: Registry, name: str, given: dict[str, Any], max_new_tokens: int | None = None) -> str:
    """A function's formula with the values of its arguments in their places, bounds that are not there left out."""
    function = registry.get(name)
    text = get_formula(function)
    if max_new_tokens is not None:
        text = text.replace("max_new_tokens", str(max_new_tokens))
    rest = []
    for argument, value in merge_arguments(function, given).items():
        text, times = re.subn(rf"\b{argument}\b", _number(value), text)
        if not times:
            rest.append(f"{argument} {_number(value)}")
    text = re.sub(r"min\((\w+), none\)", r"\1", text)
    text = re.sub(r"clip\((\w+), none, none\)", r"\1", text)
    text = re.sub(r"clip\((\w+), none, (\S+)\)", r"min(\1, \2)", text)
    text = re.sub(r"clip\((\w+), (\S+), none\)", r"max(\1, \2)", text)
    text = text.replace("[none, ", "[0, ").replace(", none]", ", inf)")
    return text + (f", {', '.join(rest)}" if rest else "")


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _given(args: dict[str, Any]) -> str:
    return f"({', '.join(f'{name}={value}' for name, value in args.items())})" if args else ""


def _reference(config: RunConfig) -> str:
    every, mixing = config.reference.every, config.reference.mixing
    if not every:
        return "the reference is the base model"
    far = "" if mixing == 1 else f", {_number(mixing)} of the way"
    return f"the reference moves to the policy every {every} steps{far}"
