"""Open a task of Reasoning Gym, a package of procedural tasks with scorers: data.path reasoning_gym:NAME."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from grpo_core.schema import ConfigError, first_line, list_known

PREFIX = "reasoning_gym:"
EXTRA = "reasoning_gym"  # of pyproject.toml
MAX_ITEMS = 20_000  # from which rows are drawn, unless the argument `size` says otherwise


def is_gym_path(path: str) -> bool:
    """Return whether data.path names a task of Reasoning Gym."""
    return path.startswith(PREFIX)


def open_gym_task(path: str, args: dict[str, Any]) -> Any:
    """Return the data set of a task, whose items have a question, an answer and metadata, and which scores answers.

    Raises:
        ConfigError: the package is not installed, there is no such task, or it does not take `args`.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ConfigError(
            f"data.path is {path!r}, which needs the package reasoning-gym, which is not installed: "
            f"pip install -e '.[{EXTRA}]'"
        ) from None
    name = path.removeprefix(PREFIX)
    if name not in DATASETS:
        raise ConfigError(f"data.path is {path!r}, which is no task of reasoning-gym; {list_known(name, DATASETS)}")
    known = [field.name for field in fields(DATASETS[name][1])]
    for key in args:
        if key not in known:
            raise ConfigError(f"unknown key data.args.{key} of {path}; {list_known(key, known)}")
    try:
        return reasoning_gym.create_dataset(name, **{"seed": 0, "size": MAX_ITEMS, **args})
    except (AssertionError, ValueError, TypeError) as error:  # each task checks its arguments in its own way
        raise ConfigError(f"data.args is {args}, which {path} refuses: {first_line(error)}") from error
