"""Checks of data.sources that need no data: names, weights and the rewards that are bound to a source."""

from __future__ import annotations

import math
import re
from typing import Any

from grpo_core.config.gym_tasks import PREFIX, is_gym_path
from grpo_core.config.sections import RunConfig
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.rewards import REWARDS
from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError

SET_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def check_sources(config: RunConfig) -> None:
    """Check the sources of the data.

    Raises:
        ConfigError: a name is no name or that of an earlier source, a weight or a limit is out of range, a key is
            empty, there is no such evaluation reward, or a reward has several weights and the advantage reads them.
    """
    sources = config.data.sources
    check_data_args("data", config.data.path, config.data.args)
    names = [source.name for source in sources]
    for i, source in enumerate(sources):
        key = f"data.sources[{i}]"
        for part in ("path", "subset", "split", "eval_path", "eval_split"):
            if getattr(source, part) == "":
                raise ConfigError(f"{key}.{part} is ''; it must not be empty")
        if not SET_NAME.fullmatch(source.name):
            raise ConfigError(
                f"{key}.name is {source.name!r}; it must be letters, digits, points, underscores or hyphens"
            )
        check_data_args(key, source.path, source.args)
        if source.name in names[:i]:
            raise ConfigError(f"{key}.name is {source.name!r}, as that of an earlier source; set another name")
        if not 0 < source.weight < math.inf:
            raise ConfigError(f"{key}.weight is {source.weight}; it must be above 0")
        if source.limit is not None and source.limit < 1:
            raise ConfigError(f"{key}.limit is {source.limit}; it must be at least 1")
        if source.eval_reward is not None:
            REWARDS.get(source.eval_reward)
    _check_weights(config)


def check_split_columns(config: RunConfig) -> None:
    """Refuse splits that a column names, such as level=3, beside others of the same data, which may share rows.

    Raises:
        ConfigError: names the keys.
    """
    for name in config.source_names:
        data, key = config.of_source(name).data, f"data.sources ({name})." if name else "data."
        splits = {f"{key}split": data.split}
        if data.eval_split is not None and data.eval_path in (None, data.path):
            splits[f"{key}eval_split"] = data.eval_split
        for i, part in enumerate(config.evaluation.sets):
            if part.split is not None and part.path in (None, data.path):
                splits[f"evaluation.sets[{i}].split"] = part.split
        if len({split.partition("=")[0] if "=" in split else None for split in splits.values()}) > 1:
            raise ConfigError(
                f"{' and '.join(f'{key} is {split!r}' for key, split in splits.items())}; name one column in all of "
                f"them or in none, so that no row is trained on and evaluated"
            )


def check_data_args(key: str, path: str, args: dict[str, Any]) -> None:
    """Refuse arguments of data that takes none.

    Raises:
        ConfigError: the path names no task of Reasoning Gym.
    """
    if args and not is_gym_path(path):
        raise ConfigError(
            f"{key}.args is {args}, but {key}.path is {path!r}, which takes no arguments; only {PREFIX}TASK does"
        )


def _check_weights(config: RunConfig) -> None:
    """Refuse a reward with several weights where the advantage function reads the weights, one for each reward."""
    advantage = config.advantage.name
    if not get_fact(ADVANTAGES.get(advantage), "reads_components"):
        return
    weights = {reward.name: reward.weight for reward in config.all_rewards}
    for i, source in enumerate(config.data.sources):
        for j, reward in enumerate(source.rewards):
            if reward.weight != weights[reward.name]:
                raise ConfigError(
                    f"data.sources[{i}].rewards[{j}].weight of {reward.name} is {reward.weight:g}, but elsewhere it is "
                    f"{weights[reward.name]:g}; advantage {advantage} reads one weight of each reward, so give it one"
                )
