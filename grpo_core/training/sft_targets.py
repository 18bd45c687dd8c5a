"""Build the targets of supervised fine-tuning: a template filled in with a task's columns, then end of sequence.

With several templates, the task's seed determines which of them it gets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from grpo_core.batch import Rollouts, Task
from grpo_core.config.sections import SftConfig
from grpo_core.counts import quantify
from grpo_core.data.encoding import encode_targets
from grpo_core.data.prompts import list_template_fields
from grpo_core.random_keys import make_generator, make_key
from grpo_core.schema import ConfigError, list_known


def build_target_rollouts(
    tasks: Sequence[Task], config: SftConfig, tokenizer: PreTrainedTokenizerBase, eos: int, device: torch.device
) -> Rollouts:
    """Return the tasks' targets as rollouts, with `eos` appended. Templates are drawn in proportion to shares."""
    shares = np.cumsum([target.share for target in config.targets])
    texts = []
    for task in tasks:
        place = make_generator(make_key("target", *task.seed)).random() * shares[-1]
        index = np.searchsorted(shares, place, side="right")
        texts.append(config.targets[index].template.format(**task.columns))
    targets = [[*ids, eos] for ids in encode_targets(tokenizer, tasks, texts)]
    prompt_ids, prompt_mask = pad_right([task.prompt_ids for task in tasks], device)
    ids, mask = pad_right(targets, device)
    ended = torch.zeros(len(tasks), dtype=torch.bool, device=device)
    return Rollouts(prompt_ids, prompt_mask, ids, mask, torch.zeros(ids.shape, device=device), ended, tuple(texts))


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids padded on the right and their mask, [B, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def find_longest_target(
    config: SftConfig,
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    model: PretrainedConfig,
    source: str = "the data",  # names the tasks' source in messages
) -> int:
    """Return the token count of the longest target over all tasks and templates, end of sequence included.

    Raises:
        ConfigError: a template cannot be filled in, or a target with its prompt exceeds the model's positions.
    """
    check_shares(config)
    longest_prompt, longest = max((len(task.prompt_ids) for task in tasks), default=0), 0
    positions = getattr(model.get_text_config(), "max_position_embeddings", None) or math.inf
    for target in config.targets:
        texts = fill_template(target.template, tasks, source)
        lengths = [len(ids) + 1 for ids in encode_targets(tokenizer, tasks, texts)] or [0]
        row = int(np.argmax(lengths))
        if longest_prompt + lengths[row] > positions:
            raise ConfigError(
                f"row {tasks[row].index + 1} of {source}: the target {target.template!r} (sft.targets) has "
                f"{quantify(lengths[row], 'token')} and the longest prompt {longest_prompt} (data.max_prompt_tokens), "
                f"but the model has only {positions} positions"
            )
        longest = max(longest, lengths[row])
    return longest


def fill_template(template: str, tasks: Sequence[Task], source: str) -> list[str]:
    """Return the template's text for every task.

    Raises:
        ConfigError: the template is malformed, or uses a column that is missing or is null in a row.
    """
    for name in list_template_fields(template) if tasks else ():
        if name not in tasks[0].columns:
            raise ConfigError(f"sft.targets uses the column {{{name}}}; {list_known(name, tasks[0].columns)}")
        for task in tasks:
            if task.columns[name] is None:
                raise ConfigError(
                    f"sft.targets uses the column {name!r}, which is null in row {task.index + 1} of {source}"
                )
    try:
        return [template.format(**task.columns) for task in tasks]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"sft.targets: {template!r} cannot be filled in: {error}") from None


def check_shares(config: SftConfig) -> None:
    """Raise ConfigError if there is no target, or if a share is not finite and above 0."""
    if not config.targets:
        raise ConfigError("sft.targets is empty; it must name at least one template")
    for i, target in enumerate(config.targets):
        if not 0 < target.share < math.inf:
            raise ConfigError(f"sft.targets[{i}].share is {target.share}; it must be above 0 and finite")
