"""What a task's completion shall be: a template over the data's columns, and the end.

Several templates share the tasks: which of them a task gets is a function of its seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from grpo_core.batch import Rollouts, Task
from grpo_core.config.sections import SftConfig
from grpo_core.data.prompts import list_template_fields
from grpo_core.schema import ConfigError, list_known


def supervised_rollouts(
    tasks: Sequence[Task], config: SftConfig, tokenizer: PreTrainedTokenizerBase, eos: int, device: torch.device
) -> Rollouts:
    """The tasks' targets, each with `eos` behind it, as rollouts. Templates are mixed in proportion to their shares."""
    shares = np.cumsum([target.share for target in config.targets])
    texts = []
    for task in tasks:
        place = np.searchsorted(shares, np.random.default_rng(task.seed).random() * shares[-1], side="right")
        texts.append(config.targets[place].template.format(**task.columns))
    targets = [[*ids, eos] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    prompt_ids, prompt_mask = right_padded([task.prompt_ids for task in tasks], device)
    ids, mask = right_padded(targets, device)
    ended = torch.zeros(len(tasks), dtype=torch.bool, device=device)
    return Rollouts(prompt_ids, prompt_mask, ids, mask, torch.zeros(ids.shape, device=device), ended, tuple(texts))


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, [B, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def longest_target(
    config: SftConfig,
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    model: PretrainedConfig,
    of: str = "the data",  # what the tasks are rows of
) -> int:
    """The most tokens that a target may have, its end among them, whichever template its task gets.

    Raises:
        ConfigError: a template that the tasks' columns cannot fill in, or a target that the model has no positions for.
    """
    check_shares(config)
    prompt, most = max((len(task.prompt_ids) for task in tasks), default=0), 0
    positions = getattr(model.get_text_config(), "max_position_embeddings", None) or math.inf
    for target in config.targets:
        texts = fill_in(target.template, tasks, of)
        lengths = [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else [0]
        row = int(np.argmax(lengths))
        if prompt + lengths[row] > positions:
            raise ConfigError(
                f"row {tasks[row].index + 1} of {of}: the target {target.template!r} (sft.targets) has {lengths[row]} "
                f"tokens, which with a prompt of up to {prompt} (data.max_prompt_tokens) are more than the model's "
                f"{positions} positions"
            )
        most = max(most, lengths[row])
    return most


def fill_in(template: str, tasks: Sequence[Task], of: str) -> list[str]:
    """The template's text for every task.

    Raises:
        ConfigError: it names a column that is not there or that is null in a row, or is malformed.
    """
    for name in list_template_fields(template) if tasks else ():
        if name not in tasks[0].columns:
            raise ConfigError(f"sft.targets uses {{{name}}}; {list_known(name, tasks[0].columns)}")
        for task in tasks:
            if task.columns[name] is None:
                raise ConfigError(f"row {task.index + 1} of {of}: {name!r}, which sft.targets uses, is null")
    try:
        return [template.format(**task.columns) for task in tasks]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"sft.targets: {template!r} cannot be filled in: {error}") from None


def check_shares(config: SftConfig) -> None:
    """Raise ConfigError unless there is a target and every share is above 0."""
    if not config.targets:
        raise ConfigError("sft.targets is empty; it must name at least one template")
    for i, target in enumerate(config.targets):
        if not 0 < target.share < math.inf:
            raise ConfigError(f"sft.targets[{i}].share is {target.share}; it must be above 0")
