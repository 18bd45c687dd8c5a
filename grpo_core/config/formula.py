"""The objective as text: its formula with the run's values, and remarks on combinations that are likely mistakes.

The formula of a function is the first line of its docstring, written with the function's own arguments.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from grpo_core.config.sections import RunConfig
from grpo_core.config.teacher_checks import asks_for_teacher
from grpo_core.counts import name_interval, quantify
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.corrections import CORRECTIONS
from grpo_core.objective.kl import KLS, TEACHER_KLS
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.rejections import REJECTIONS
from grpo_core.objective.token_weights import AVERAGES
from grpo_core.objective.truncation import TRUNCATIONS
from grpo_core.registry import Registry, get_fact
from grpo_core.schema import keyword_arguments

LETTERS = """\
l, l_old, l_ref, l_roll   log-prob of a token: now, before the step's first update, under the reference, as sampled
r, R                      exp(l - l_old) of a token; exp of its mean over a completion
v                         exp(l_old - l_roll)
p, q                      exp(l) and exp(l_roll), the policy's and the sampler's probability of the token
d                         l_ref - l
l_teacher                 log-prob of a token under the teacher
A                         advantage of the completion; in the formula of A, r is the reward
sg                        stop-gradient
n_i                       tokens of completion i; tokens and completions are those of the whole optimizer step"""


def render(config: RunConfig) -> str:
    """Return the objective that the run minimises, in a few lines with all values, and the remarks on it."""
    loss = config.loss
    rows = [("loss", _render_sum(config)), ("L", f"{_fill_formula(LOSSES, loss.name, loss.args)}    ({loss.name})")]
    if loss.rollout_correction.name != "none":
        weight = _fill_formula(CORRECTIONS, loss.rollout_correction.name, loss.rollout_correction.args)
        inside = "; applied inside L, through l_old" if get_fact(LOSSES.get(loss.name), "corrects_rollout") else ""
        mean = ", divided by its mean over the step" if loss.normalize_correction else ""
        rows.append(("w", f"{weight}{mean}    ({loss.rollout_correction.name}{inside})"))
    if loss.rejection.name != "none":
        rule = _fill_formula(REJECTIONS, loss.rejection.name, loss.rejection.args)
        place = "" if loss.rejection_in == "loss" else "; from the surrogate alone"
        rows.append(("rejected", f"{rule}    ({loss.rejection.name}{place})"))
    average = _fill_formula(AVERAGES, loss.average, {}, config.sampling.max_new_tokens)
    rows.append(("weight", f"{average}    ({loss.average})"))
    if loss.kl_coef:
        rows.append(("KL", f"{_fill_formula(KLS, loss.kl, {})}    ({loss.kl}; {_describe_reference(config)})"))
        if loss.kl_target is not None:
            target = f"{_format_number(loss.kl_target)}, with a horizon of {quantify(loss.kl_horizon, 'completion')}"
            rows.append(
                ("", f"its coefficient starts at {_format_number(loss.kl_coef)} and adapts to a KL of {target}")
            )
    if loss.entropy_coef or loss.entropy_target is not None:
        tokens = "the tokens of highest entropy" if loss.top_entropy < 1 else "the step's tokens"
        rows.append(("H", f"mean entropy of {tokens}"))
        if loss.entropy_target is not None:
            start, target = _format_number(loss.entropy_coef), _format_number(loss.entropy_target)
            change = f"adapts to an entropy of {target}, by {_format_number(loss.entropy_delta)} a step"
            rows.append(("", f"its coefficient starts at {start} and {change}"))
    if loss.positive_nll_coef:
        above = _format_number(loss.positive_nll_above)
        rows.append(("NLL", f"mean -l over the tokens of completions with a reward above {above}"))
    if loss.echo_coef:
        rows.append(("ECHO", "mean -l over the tokens that the environment gave"))
    if loss.router_aux_coef:
        rows.append(("B", "mean load-balancing loss of the step's completions"))
    rows += [("A", _describe_advantage(config)), *_describe_teacher(config)]
    rows += _describe_rewards(config)
    truncation = _fill_formula(
        TRUNCATIONS, config.truncation.name, config.truncation.args, config.sampling.max_new_tokens
    )
    rows.append(("truncated", f"{truncation}    ({config.truncation.name})"))
    if attempts := config.sampling.dynamic_attempts:
        most = quantify(attempts, "time")
        rows.append(("tied", f"groups with equal rewards are replaced by new prompts, up to {most} a step"))
    rows += [("note", remark) for remark in list_remarks(config)]
    return "\n".join(f"{name:<9}  {text}" for name, text in rows)


def _render_sum(config: RunConfig) -> str:
    """Return the sum over tokens, in the order of operations of training/update.py, `token_loss`."""
    loss, factors = config.loss, ["L"]
    if loss.off_policy_mask is not None:
        factors.append(f"[A >= 0 or mean_t(l_roll - l) <= {_format_number(loss.off_policy_mask)}]")
    if loss.top_entropy < 1:
        factors.append(f"[entropy in the top {loss.top_entropy:.0%}]")
    if loss.rollout_correction.name != "none" and not get_fact(LOSSES.get(loss.name), "corrects_rollout"):
        factors.append("w")
    token = " ".join(factors)
    terms = [token]
    if loss.kl_coef and loss.kl_in == "loss":
        terms.append(f"{_format_number(loss.kl_coef)} KL")
    if loss.log_ratio_coef:
        terms.append(f"{_format_number(loss.log_ratio_coef)} (l - l_roll)**2")
    if config.teacher.exists and config.teacher.kl and config.teacher.kl_coef:
        terms.append(f"{_format_number(config.teacher.kl_coef)} KL_teacher")
    text = f"sum over tokens of {_join(terms)} * weight"
    if loss.entropy_coef or loss.entropy_target is not None:
        text += f", - {_format_number(loss.entropy_coef)} H"
    text += f", + {_format_number(loss.positive_nll_coef)} NLL" if loss.positive_nll_coef else ""
    text += f", + {_format_number(loss.echo_coef)} ECHO" if loss.echo_coef else ""
    return text + (f", + {_format_number(loss.router_aux_coef)} B" if loss.router_aux_coef else "")


def _join(terms: list[str]) -> str:
    return terms[0] if len(terms) == 1 else f"({' + '.join(terms)})"


def list_remarks(config: RunConfig) -> list[str]:
    """Return a sentence for each combination of settings that is likely a mistake; none of them stops a run."""
    loss, texts = config.loss, []
    function = LOSSES.get(loss.name)
    ratio, averages = get_fact(function, "ratio"), get_fact(function, "averages")
    if loss.average == "row_sum" and ratio == "token":
        texts.append(
            f"loss.average row_sum sums the token ratios of {loss.name}, so a completion's gradient grows with its "
            f"length; use row_sum with a ratio of the whole completion (luspo, gspo) or with reinforce"
        )
    if averages and loss.average not in averages:
        texts.append(f"loss {loss.name} is defined with loss.average {' or '.join(averages)}, not {loss.average}")
    if loss.average == "micro_token":
        texts.append(
            "loss.average micro_token makes the gradient depend on trainer.tokens_per_micro_batch; use token instead"
        )
    if (loss.name == "gpg") != (config.advantage.name == "gpg"):
        texts.append(
            "the objective GPG is loss gpg with advantage gpg, which contains its factor; only one of them is set"
        )
    if loss.kl_coef and loss.kl_in == "loss" and loss.kl == "k1":
        texts.append(
            "loss.kl k1 with loss.kl_in loss has no effect: on policy its expected gradient is 0; use k1+ instead"
        )
    if config.advantage.name == "opo" and loss.average == "sequence":
        texts.append("advantage opo weights rewards by length, which fits every loss.average except sequence")
    one_update = config.trainer.num_minibatches * config.trainer.num_passes == 1
    if config.reference.every == 1 and config.reference.mixing == 1 and one_update:
        texts.append(
            "reference.every 1 sets the reference to the policy at every step, so the KL and its gradient are 0"
        )
    if loss.name == "cispo" and loss.args.get("cap", 5.0) < 1:
        texts.append("loss.args.cap is a bound on the ratio: below 1 it scales down every gradient, also on policy")
    if config.advantage.name == "maxrl" and any(reward.weight < 0 for reward in config.all_rewards):
        texts.append("advantage maxrl expects rewards of 0 and 1, but a reward has a negative weight")
    return texts


def merge_arguments(function: Callable, args: dict[str, Any]) -> dict[str, Any]:
    """Return all keyword arguments of a function: those in `args`, and defaults for the others."""
    return {name: p.default for name, p in keyword_arguments(function).items()} | args


def get_formula(function: Callable) -> str:
    """Return the first line of a function's docstring, or its name where it has none."""
    function = getattr(function, "func", function)  # of a partial
    text: str = inspect.getdoc(function) or getattr(function, "__name__", "") or type(function).__name__
    return text.splitlines()[0]


def _fill_formula(registry: Registry, name: str, args: dict[str, Any], max_new_tokens: int | None = None) -> str:
    """Return a function's formula with the values of its arguments, and without bounds that are null."""
    function = registry.get(name)
    text = get_formula(function)
    if max_new_tokens is not None:
        text = text.replace("max_new_tokens", str(max_new_tokens))
    missing = []  # arguments that the formula does not contain
    for argument, value in merge_arguments(function, args).items():
        text, times = re.subn(rf"\b{argument}\b", _format_number(value), text)
        if not times:
            missing.append(f"{argument} {_format_number(value)}")
    text = re.sub(r"min\((\w+), none\)", r"\1", text)
    text = re.sub(r"clip\((\w+), none, none\)", r"\1", text)
    text = re.sub(r"clip\((\w+), none, (\S+)\)", r"min(\1, \2)", text)
    text = re.sub(r"clip\((\w+), (\S+), none\)", r"max(\1, \2)", text)
    text = text.replace("[none, ", "[0, ").replace(", none]", ", inf)")
    return ", ".join([text, *missing])


def _format_number(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _render_arguments(args: dict[str, Any]) -> str:
    return f"({', '.join(f'{name}={value}' for name, value in args.items())})" if args else ""


def _describe_rewards(config: RunConfig) -> list[tuple[str, str]]:
    """Return the weighted sum of the rewards, or those of each source with rewards of its own."""
    loss, texts = config.loss, dict[str, list[str]]()
    for name in config.source_names:
        text = " + ".join(
            f"{_format_number(reward.weight)} {reward.name}{_render_arguments(reward.args)}"
            for reward in [*config.of_source(name).rewards, *config.environment_rewards]
        )
        if loss.kl_coef and loss.kl_in == "reward":
            text += f" - {_format_number(loss.kl_coef)} sum_t KL"
        texts.setdefault(text or "none", []).append(name)
    if len(texts) == 1:
        return [("reward", next(iter(texts)))]
    return [
        ("reward" if i == 0 else "", f"{text}    ({', '.join(names)})") for i, (text, names) in enumerate(texts.items())
    ]


def _describe_advantage(config: RunConfig) -> str:
    """Return the formula of the advantage: that of the rewards, if there are any, and the teacher's part."""
    advantage, terms = config.advantage, []
    if config.all_rewards or asks_for_teacher(config):
        tied = f"; 0 where std < {_format_number(advantage.min_group_std)}" if advantage.min_group_std else ""
        terms.append(f"{_fill_formula(ADVANTAGES, advantage.name, advantage.args)}{tied}    ({advantage.name})")
    if config.teacher.exists and config.teacher.coef:
        terms.append(f"{_format_number(config.teacher.coef)} (l_teacher - l_old) of each token")
    return " + ".join(terms) or "0"


def _describe_teacher(config: RunConfig) -> list[tuple[str, str]]:
    """Return the rows about the teacher: its KL over the vocabulary, and what it is."""
    teacher = config.teacher
    if not teacher.exists:
        return []
    model = teacher.path or ("the policy's base" if teacher.adapter else "the policy itself")
    adapter = f" with the adapter {teacher.adapter}" if teacher.adapter else ""
    prompt = ", with a prompt of its own (teacher.prompt)" if teacher.prompt else ""
    rows = [("teacher", f"{model}{adapter}{prompt}")]
    if teacher.kl and teacher.kl_coef:
        rows.insert(0, ("KL_teacher", f"{get_formula(TEACHER_KLS[teacher.kl])}    ({teacher.kl})"))
    return rows


def _describe_reference(config: RunConfig) -> str:
    every, mixing = config.reference.every, config.reference.mixing
    interval = name_interval(every, "step")
    if not every:
        return "the reference is the base model"
    if mixing == 1:
        return f"the reference is set to the policy every {interval}"
    return f"the reference moves towards the policy every {interval}, {_format_number(mixing)} of the way"
