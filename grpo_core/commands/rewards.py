"""The `rewards` command: list the built-in rewards."""

from __future__ import annotations

from grpo_core.commands.list_entry import INDENT, format_entry
from grpo_core.objective.rewards import REWARDS
from grpo_core.scoring.reward_call import list_needed_columns


def run_rewards() -> int:
    """Print every built-in reward."""
    print(list_rewards())
    return 0


def list_rewards() -> str:
    """Return every built-in reward with its value, its arguments and the columns that it needs."""
    lines = ["rewards (a reward of your own is my_rewards.py:my_reward)"]
    for name, function in REWARDS.functions.items():
        lines.append(format_entry(name, function))
        if columns := list_needed_columns(function):
            lines.append(f"{INDENT} reads: {', '.join(columns)}")
    return "\n".join(lines)
