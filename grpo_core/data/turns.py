"""The prompt of a row as turns, for a judge and a reward model, which have chat templates of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig
from grpo_core.counts import quantify
from grpo_core.data.messages import BadRow, add_system_turn, read_conversation, split_last_turn
from grpo_core.data.prompts import check_text, fill_template, find_conversation_column, list_template_fields
from grpo_core.data.rows import Row
from grpo_core.schema import ConfigError

REASONING_END = "</think>"
Turn = dict[str, Any]  # role and content


def list_turns(row: Row, config: DataConfig) -> list[Turn]:
    """Return the turns of a row's prompt: its messages, or data.template as the user's turn; and data.system in front.

    Raises:
        ConfigError: a column of the template is missing or holds what a prompt cannot (see `check_text`).
    """
    if (column := find_conversation_column([row], config.template)) is not None:
        messages, _ = split_last_turn(read_conversation(row[column]), config.last_turn)
        return add_system_turn(messages, config)
    for name in list_template_fields(config.template):
        if name not in row:
            raise ConfigError(f"data.template uses {{{name}}}, but the data has the columns {', '.join(row)}")
        try:
            check_text(row, name, "data.template")
        except BadRow as error:
            raise ConfigError(str(error)) from None
    system = [{"role": "system", "content": config.system}] if config.system and config.prompt == "chat" else []
    return [*system, {"role": "user", "content": fill_template(row, config.template, "data.template")}]


def add_completion(turns: list[Turn], completion: str) -> list[Turn]:
    """Return the turns with the completion as the assistant's, or as the rest of its turn if that is the last."""
    if turns[-1]["role"] != "assistant":
        return [*turns, {"role": "assistant", "content": completion}]
    return [*turns[:-1], {**turns[-1], "content": turns[-1]["content"] + completion}]


def show_prompt(prompt: str, row: Row, config: DataConfig) -> str:
    """Return the prompt of a row without the tokens of the policy's chat template: its turns, the roles in front.

    A user's turn alone is its text.
    """
    if config.prompt != "chat":
        return prompt
    turns = list_turns(row, config)
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def describe_dropped_turns(config: DataConfig, tasks: Sequence[Task]) -> list[str]:
    """Return a sentence if the model's chat template leaves turns of the data out of the prompts.

    Reasoning that it takes out of earlier turns of the assistant does not count, nor do prompts that were cut, nor
    data.system, which `describe_prompt_changes` names.
    """
    if config.prompt != "chat":
        return []
    dropped: list[tuple[Task, int, str]] = []  # with the first turn that is left out
    for task in tasks:
        if config.long_prompts == "truncate_left" and len(task.prompt_ids) >= config.max_prompt_tokens:
            continue
        for number, turn in enumerate(list_turns(task.columns, config), 1):
            text = turn["content"].rpartition(REASONING_END)[2] if turn["role"] == "assistant" else turn["content"]
            if text.strip() not in task.prompt and text != config.system:
                dropped.append((task, number, turn["role"]))
                break
    if not dropped:
        return []
    task, number, role = dropped[0]
    return [
        f"the model's chat template leaves turns out of {quantify(len(dropped), 'prompt')}, such as turn {number} "
        f"({role}) of row {task.index + 1} of the data"
    ]
