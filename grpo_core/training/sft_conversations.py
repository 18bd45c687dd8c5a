"""Build the targets of supervised fine-tuning from conversations: every turn of the assistant in them is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_core.batch import Rollouts, Task
from grpo_core.config.sections import DataConfig
from grpo_core.counts import quantify
from grpo_core.data.assistant_tokens import encode_conversation
from grpo_core.data.messages import BadRow, read_conversation
from grpo_core.data.prompts import ends_with_assistant, find_conversation_column, handle_bad_rows
from grpo_core.data.tasks_on_disk import list_rows, select_tasks
from grpo_core.schema import ConfigError
from grpo_core.training.prepare import Prepared
from grpo_core.training.sft_targets import pad_right


def find_answered_column(config: DataConfig, tasks: Sequence[Task]) -> str | None:
    """Return the column with conversations that end with the assistant's turn; None if there are no such targets.

    With data.last_turn drop or continue this turn is not trained, and sft.targets gives the answers.
    """
    first = [row for _, row in islice(list_rows(tasks), 1)]  # a task has messages if the others have
    column = find_conversation_column(first, config.template)
    if column is None or config.last_turn != "gold":
        return None
    return column if any(ends_with_assistant(row[column]) for _, row in list_rows(tasks)) else None


def choose_conversations(
    prepared: Prepared,
    column: str,
    config: DataConfig,
    name_sources: Sequence[Callable[[Task], str]],
    eos_ids: Collection[int],
    eos: int,
) -> tuple[Prepared, int, int]:
    """Return the tasks whose conversations can be trained, and two token counts of the longest ones.

    The first count begins with the assistant's first turn, the second is that of the whole conversation. data.bad_rows
    decides about the other tasks. `name_sources` name the source of a task for training and of one for evaluation in
    messages. `eos_ids` and `eos` are as in `encode_conversation`: an end-of-sequence token tells where a turn ends.

    Raises:
        ConfigError: there are others and data.bad_rows is error; a conversation exceeds the model's positions; or a
            long prompt was cut: a conversation stays whole.
    """
    if prepared.num_too_long and config.long_prompts == "truncate_left":
        raise ConfigError(
            "data.long_prompts is truncate_left, but sft trains whole conversations, which are not cut; set it to drop "
            "or error"
        )
    notes: list[str] = []
    parts, longest, longest_whole = [], 0, 0
    for tasks, name_source in zip((prepared.tasks, prepared.eval_tasks), name_sources, strict=True):
        faults: dict[int, str] = {}
        trained: list[int] = []
        for place, task in enumerate(tasks):
            try:
                length, whole = _measure(task, column, config, prepared, name_source, eos_ids, eos)
            except BadRow as error:
                faults[task.index] = f"column {column!r} {error}"
            else:
                trained.append(place)
                longest, longest_whole = max(longest, length), max(longest_whole, whole)
        handle_bad_rows(faults, len(tasks), "", config, notes)
        parts.append(select_tasks(tasks, trained))
    prepared = replace(prepared, tasks=parts[0], eval_tasks=list(parts[1]), warnings=prepared.warnings + notes)
    return prepared, longest, longest_whole


def _measure(
    task: Task,
    column: str,
    config: DataConfig,
    prepared: Prepared,
    name_source: Callable[[Task], str],
    eos_ids: Collection[int],
    eos: int,
) -> tuple[int, int]:
    """Return the token counts of a conversation from the assistant's first turn on, and of the whole.

    Raises:
        BadRow: see `encode_conversation`.
        ConfigError: the conversation exceeds the model's positions.
    """
    messages = read_conversation(task.columns[column])
    ids, is_trained = encode_conversation(prepared.tokenizer, messages, config, eos_ids, eos)
    positions = getattr(prepared.model_config.get_text_config(), "max_position_embeddings", None) or math.inf
    if len(ids) > positions:
        raise ConfigError(
            f"row {task.index + 1} of {name_source(task)}: the conversation has {quantify(len(ids), 'token')}, but the "
            f"model has only {positions} positions"
        )
    return len(ids) - is_trained.index(True), len(ids)


def build_conversation_rollouts(
    tasks: Sequence[Task],
    column: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Collection[int],
    eos: int,
    device: torch.device,
) -> tuple[Rollouts, Tensor]:
    """Return whole conversations as rollouts, and the mask of the assistant's tokens, [B, C].

    A prompt ends where the assistant's first turn begins. The other turns are given tokens in the completion.
    """
    prompts, completions, marks = [], [], []
    for task in tasks:
        ids, is_trained = encode_conversation(tokenizer, read_conversation(task.columns[column]), config, eos_ids, eos)
        start = is_trained.index(True)
        prompts.append(ids[:start])
        completions.append(ids[start:])
        marks.append([int(mark) for mark in is_trained[start:]])
    prompt_ids, prompt_mask = pad_right(prompts, device)
    ids, mask = pad_right(completions, device)
    ended = torch.zeros(len(tasks), dtype=torch.bool, device=device)
    rollouts = Rollouts(prompt_ids, prompt_mask, ids, mask, torch.zeros(ids.shape, device=device), ended)
    return rollouts, pad_right(marks, device)[0].bool()
