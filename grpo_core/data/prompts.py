"""Rows to tasks: the tokenizer, the prompt, and which tasks belong to a (step, rank)."""

from __future__ import annotations

import string
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig
from grpo_core.data.rows import Row
from grpo_core.schema import ConfigError, list_known, summarize_error


def make_tasks(rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Task], int]:
    """Every row as a task, and the number of prompts longer than max_prompt_tokens, which long_prompts decides about.

    Raises:
        ConfigError: a column that the template or the mapping names is not there or holds no text, a prompt that is too
            long (with long_prompts: error), or no row is left.
    """
    if not rows:
        return [], 0
    rows = _renamed(rows, config.columns)
    for name in template_fields(config.template):
        if name not in rows[0]:
            raise ConfigError(f"data.template uses {{{name}}}, but the data has the columns {', '.join(rows[0])}")
        for number, row in enumerate(rows, 1):
            if not isinstance(row[name], str):
                is_what = "null" if row[name] is None else f"{str(row[name])[:40]!r}, which is no text"
                raise ConfigError(f"row {number} of the data: {name!r}, which data.template uses, is {is_what}")
    if config.prompt == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            "data.prompt is chat, but the model's tokenizer has no chat template; use data.prompt: template"
        )
    prompts = [render_prompt(row, config, tokenizer) for row in rows]
    ids = tokenizer(prompts, add_special_tokens=config.prompt != "chat", return_attention_mask=False)["input_ids"]
    if [] in ids:
        raise ConfigError(f"row {ids.index([]) + 1} of the data: the prompt is empty, and a completion needs a token")
    most = config.max_prompt_tokens
    long = [index for index, prompt_ids in enumerate(ids) if len(prompt_ids) > most]
    if long and config.long_prompts == "error":
        raise ConfigError(
            f"row {long[0] + 1} of the data: the prompt has {len(ids[long[0]])} tokens, and data.max_prompt_tokens is "
            f"{most}; {len(long)} of {len(ids)} are longer (data.long_prompts: drop leaves them out)"
        )
    for index in long if config.long_prompts == "truncate_left" else ():
        ids[index] = ids[index][-most:]
        prompts[index] = tokenizer.decode(ids[index])
    tasks = [
        Task(index, prompt, prompt_ids, row)
        for index, (prompt, prompt_ids, row) in enumerate(zip(prompts, ids, rows, strict=True))
        if len(prompt_ids) <= most
    ]
    if not tasks:
        raise ConfigError(f"data.max_prompt_tokens is {most}; every prompt is longer than that")
    return tasks, len(long)


def _renamed(rows: Sequence[Row], columns: dict[str, str]) -> list[Row]:
    """With our names for the data's columns."""
    for ours, theirs in columns.items():
        if theirs not in rows[0]:
            raise ConfigError(f"data.columns.{ours} is {theirs!r}; {list_known(theirs, rows[0])}")
        if ours in rows[0] and ours not in columns.values():
            raise ConfigError(f"data.columns.{ours} is {theirs!r}, but the data has a column {ours!r} of its own")
    names = {theirs: ours for ours, theirs in columns.items()}
    return [{names.get(name, name): value for name, value in row.items()} for row in rows]


def render_prompt(row: Row, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the policy continues.

    Raises:
        ConfigError: the template or the model's chat template cannot be filled in.
    """
    try:
        text = config.template.format(**row)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"data.template {config.template!r} cannot be filled in: {error}") from None
    if config.prompt == "template":
        return text
    system = [{"role": "system", "content": config.system}] if config.system else []
    turns = [*system, {"role": "user", "content": text}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is a program of the model's
        raise ConfigError(f"the model's chat template cannot be filled in: {summarize_error(error)}") from error


def template_fields(template: str) -> list[str]:
    """The column names in a template.

    Raises:
        ConfigError: the template is malformed.
    """
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"the template {template!r} is malformed: {error}") from None
