"""The `check-advantage` command: check an advantage against the laws of advantages. Takes seconds on a CPU."""

from __future__ import annotations

from typing import Any

from grpo_core.commands.law_table import check_breaks, print_laws, warn_of_fixed_arguments
from grpo_core.config.function_checks import try_advantage
from grpo_core.objective.advantage_laws import ADVANTAGE_LAWS, check_advantage


def run_check_advantage(name: str, args: dict[str, Any]) -> int:
    """Print which laws the advantage obeys. Returns 0 if all laws pass, otherwise 1.

    Raises:
        ConfigError: there is no such advantage, or it does not take these arguments.
    """
    advantage_fn = try_advantage(name, args)
    check_breaks(name, advantage_fn, [*ADVANTAGE_LAWS])
    warn_of_fixed_arguments(advantage_fn)
    return print_laws(name, args, check_advantage(advantage_fn), ADVANTAGE_LAWS)
