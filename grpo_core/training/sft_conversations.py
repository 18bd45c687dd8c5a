"""Build the targets of supervised fine-tuning from conversations: every turn of the assistant in them is trained."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

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

    With data.last_turn drop or continue that turn is no target, so the answers are those of sft.targets.
    """
    first = [row for _, row in islice(list_rows(tasks), 1)]  # a task has messages if the others have
    column = find_conversation_column(first, config.template)
    if column is None or config.last_turn != "gold":
        return None
    return column if any(ends_with_assistant(row[column]) for _, row in list_rows(tasks)) else None


def leave_out_unanswered(prepared: Prepared, column: str, config: DataConfig) -> Prepared:
    """Return the tasks whose conversations have a turn of the assistant; data.bad_rows decides about the others.

    Raises:
        ConfigError: there are others and data.bad_rows is error, or a long prompt was cut: a conversation stays whole.
    """
    if prepared.num_too_long and config.long_prompts == "truncate_left":
        raise ConfigError(
            "data.long_prompts is truncate_left, but sft trains whole conversations, which are not cut; set it to drop "
            "or error"
        )
    notes: list[str] = []
    parts = []
    for tasks in (prepared.tasks, prepared.eval_tasks):
        fault, faults, answered = f"column {column!r} has no turn of the assistant to train", {}, []
        for place, (number, row) in enumerate(list_rows(tasks)):
            if any(message["role"] == "assistant" for message in row[column]):
                answered.append(place)
            else:
                faults[number] = fault
        handle_bad_rows(faults, len(tasks), "", config, notes)
        parts.append(select_tasks(tasks, answered))
    return replace(prepared, tasks=parts[0], eval_tasks=list(parts[1]), warnings=prepared.warnings + notes)


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


def find_longest_conversation(
    tasks: Sequence[Task],
    column: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PretrainedConfig,
    source: str,  # names the tasks' source in messages
) -> int:
    """Return the token count of the longest part of a conversation from the assistant's first turn on.

    Raises:
        ConfigError: the assistant's tokens cannot be found in a conversation, or it exceeds the model's positions.
    """
    longest, positions = 0, getattr(model.get_text_config(), "max_position_embeddings", None) or math.inf
    for task in tasks:
        place = f"row {task.index + 1} of {source}"
        try:
            ids, is_trained = encode_conversation(tokenizer, read_conversation(task.columns[column]), config, (), 0)
        except BadRow as error:
            raise ConfigError(f"{place}: column {column!r} {error}") from None
        if len(ids) > positions:
            raise ConfigError(
                f"{place}: the conversation has {quantify(len(ids), 'token')}, but the model has only {positions} "
                f"positions"
            )
        longest = max(longest, len(ids) - is_trained.index(True))
    return longest
