"""The `losses` command: list every function of the objective by the key that chooses it, and the presets."""

from __future__ import annotations

from grpo_core.commands.list_entry import INDENT, format_entry
from grpo_core.commands.presets import list_presets
from grpo_core.config.formula import LETTERS
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.corrections import CORRECTIONS
from grpo_core.objective.kl import KLS
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.rejections import REJECTIONS
from grpo_core.objective.token_weights import AVERAGES
from grpo_core.objective.truncation import TRUNCATIONS
from grpo_core.registry import Registry

REGISTRIES: dict[str, Registry] = {  # key of the configuration -> the functions that it can name
    "loss.name": LOSSES,
    "loss.average": AVERAGES,
    "loss.kl": KLS,
    "loss.rollout_correction.name": CORRECTIONS,
    "loss.rejection.name": REJECTIONS,
    "advantage.name": ADVANTAGES,
    "truncation.name": TRUNCATIONS,
}


def run_losses() -> int:
    """Print every function of the objective and every preset."""
    print(list_losses())
    return 0


def list_losses() -> str:
    """Return every function of the objective with formula, arguments, defaults and source; then the presets."""
    parts = [LETTERS]
    parts += [f"{key}\n{_list_functions(registry)}" for key, registry in REGISTRIES.items()]
    return "\n\n".join([*parts, list_presets()])


def _list_functions(registry: Registry) -> str:
    """Return the entries of a registry. A second name of a function refers to its first name."""
    lines, first_names = [], {}
    for name, function in registry.functions.items():
        lines.append(format_entry(name, function))
        first_name = first_names.setdefault(function, name)
        if first_name != name:
            lines.append(f"{INDENT} the same as {first_name}")
    return "\n".join(lines)
