"""What there is to choose from: `losses`, `rewards` and `presets` print what a name in the YAML can pick."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable

from grpo_core.config.files import to_inline_yaml
from grpo_core.config.formula import LETTERS, get_formula
from grpo_core.config.presets import PRESETS
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.corrections import CORRECTIONS
from grpo_core.objective.kl import KLS
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.rewards import REWARDS
from grpo_core.objective.token_weights import AVERAGES
from grpo_core.objective.truncation import TRUNCATIONS
from grpo_core.registry import Registry
from grpo_core.schema import keyword_arguments
from grpo_core.scoring.reward_call import needed_columns

KEYS: dict[str, Registry] = {
    "loss.name": LOSSES,
    "loss.average": AVERAGES,
    "loss.kl": KLS,
    "loss.rollout_correction.name": CORRECTIONS,
    "advantage.name": ADVANTAGES,
    "truncation.name": TRUNCATIONS,
}


def catalogue() -> str:
    """Every function of the objective by its key, with formula, arguments, defaults and source; then the presets."""
    parts = [LETTERS]
    for key, registry in KEYS.items():
        first = {function: name for name, function in reversed(registry.functions.items())}
        entries = [
            _entry(name, function) + ("" if first[function] == name else f"\n{'':<24} the same as {first[function]}")
            for name, function in registry.functions.items()
        ]
        parts.append(f"{key}\n" + "\n".join(entries))
    return "\n\n".join([*parts, presets()])


def presets() -> str:
    """Every published objective, with its source and what it sets."""
    entries = [f"  {name:<22} {source}\n{'':<24} {_differences(name)}" for name, (source, _) in PRESETS.items()]
    return "preset (over grpo, on policy, no reference)\n" + "\n".join(entries)


def rewards() -> str:
    """Every built-in reward, with what it says of a completion, its arguments and the columns it needs."""
    entries = []
    for name, function in REWARDS.functions.items():
        entries.append(_entry(name, function, get_formula(function)))
        if columns := needed_columns(function):
            entries.append(f"{'':<24} reads: {', '.join(columns)}")
    return "rewards (or my_rewards.py:mine)\n" + "\n".join(entries)


def _entry(name: str, function: Callable, says: str | None = None) -> str:
    lines = [f"  {name:<22} {says or get_formula(function)}"]
    given = ", ".join(f"{key} = {to_inline_yaml(p.default)}" for key, p in keyword_arguments(function).items())
    if given:
        lines.append(f"{'':<24} args: {given}")
    if found := sources(function):
        lines.append(f"{'':<24} {', '.join(found)}")
    return "\n".join(lines)


def sources(function: Callable) -> list[str]:
    """arXiv numbers and addresses in a docstring."""
    return re.findall(r"arXiv:\d{4}\.\d{5}|https?://\S+[^\s.,;)]", inspect.getdoc(function) or "")


def _differences(name: str) -> str:
    """A preset's keys as overrides, quoted for a shell."""

    def flat(tree: dict, prefix: str) -> list[str]:
        found = []
        for key, value in tree.items():
            if isinstance(value, dict) and key != "args":
                found += flat(value, f"{prefix}{key}.")
            elif value != {}:
                found.append(f"{prefix}{key}={shlex.quote(to_inline_yaml(value))}")
        return found

    return " ".join(flat(PRESETS[name][1], ""))
