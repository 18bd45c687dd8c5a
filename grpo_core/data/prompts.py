"""Turn the rows of a data set into tasks: render the prompt and tokenize it."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig
from grpo_core.counts import quantify
from grpo_core.data.encoding import apply_chat_template, cut_left, encode_prompts
from grpo_core.data.rows import Row, Rows
from grpo_core.schema import ConfigError, list_known, summarize_error

RESERVED_COLUMNS = ("completions", "prompts", "other_rewards")  # rewards receive them beside the columns of the data


def make_tasks(rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Task], int]:
    """Return the rows as tasks, and the number of prompts longer than max_prompt_tokens.

    long_prompts decides whether such a prompt is dropped, truncated or an error. The number of a row, in messages and
    in the task, is that in its split, also where only a part of the split was taken (`rows.Rows`).

    Raises:
        ConfigError: a column that the template or `columns` names is missing or holds no text, a prompt is empty or too
            long (with long_prompts: error), or no task is left.
    """
    if not rows:
        return [], 0
    numbers = rows.numbers if isinstance(rows, Rows) else range(len(rows))
    places = _name_rows(numbers, rows.source if isinstance(rows, Rows) else "")
    rows = _rename_columns(rows, config.columns)
    _check_columns(rows, places)
    _check_template_columns(rows, places, config.template)
    if config.prompt == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            "data.prompt is chat, but the model's tokenizer has no chat template; use data.prompt: template"
        )
    for name in config.chat_template_kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise ConfigError(f"data.chat_template_kwargs has {name!r}, which the model's chat template does not read")
    prompts = [render_prompt(row, config, tokenizer) for row in rows]
    _check_characters(prompts, places, "the prompt made from it with data.template and data.system")
    ids = encode_prompts(tokenizer, prompts, add_special_tokens=config.prompt != "chat")
    if [] in ids:
        raise ConfigError(f"{places[ids.index([])]}: the prompt is empty; it needs at least one token")
    limit = config.max_prompt_tokens
    too_long = [index for index, prompt_ids in enumerate(ids) if len(prompt_ids) > limit]
    if too_long and config.long_prompts == "error":
        raise ConfigError(
            f"{places[too_long[0]]}: the prompt has {quantify(len(ids[too_long[0]]), 'token')}, more than "
            f"data.max_prompt_tokens ({limit}), as have {len(too_long):,} of {quantify(len(ids), 'prompt')}; raise it, "
            f"or set data.long_prompts to drop or truncate_left"
        )
    for index in too_long if config.long_prompts == "truncate_left" else ():
        ids[index] = cut_left(tokenizer, ids[index], limit)
        prompts[index] = tokenizer.decode(ids[index])
    tasks = [
        Task(number, prompt, prompt_ids, row)
        for number, prompt, prompt_ids, row in zip(numbers, prompts, ids, rows, strict=True)
        if len(prompt_ids) <= limit
    ]
    if not tasks:
        raise ConfigError(f"data.max_prompt_tokens is {limit}; every prompt is longer than that")
    return tasks, len(too_long)


def encode_teacher_prompts(
    tasks: Sequence[Task], template: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Task]:
    """Return the tasks with the prompts that a teacher sees: `template`, teacher.prompt, in place of data.template.

    In it {prompt} is data.template filled in, and other names in braces are the row's columns.

    Raises:
        ConfigError: it names a column that the data lacks, or that holds no text.
    """
    key, places = "teacher.prompt", [f"row {task.index + 1} of the data" for task in tasks]
    rows = [{**task.columns, "prompt": config.template.format(**task.columns)} for task in tasks]
    _check_template_columns(rows, places, template, key)
    config = replace(config, template=template)
    prompts = [render_prompt(row, config, tokenizer, key) for row in rows]
    ids = encode_prompts(tokenizer, prompts, add_special_tokens=config.prompt != "chat")
    return [replace(task, teacher_prompt_ids=prompt_ids) for task, prompt_ids in zip(tasks, ids, strict=True)]


def render_prompt(row: Row, config: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str = "data.template") -> str:
    """Return the text that the policy continues: the template, inside the model's chat template if configured.

    Raises:
        ConfigError: the template or the model's chat template cannot be filled in.
    """
    try:
        text = config.template.format(**row)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"{key} {config.template!r} cannot be filled in: {error}") from None
    if config.prompt == "template":
        return text
    system = [{"role": "system", "content": config.system}] if config.system else []
    return render_chat([*system, {"role": "user", "content": text}], tokenizer, config)


def render_chat(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """Return a chat in the model's chat template, up to the place where the assistant's turn begins.

    Raises:
        ConfigError: the template cannot be filled in.
    """
    try:
        return apply_chat_template(tokenizer, messages, config)
    except Exception as error:  # the template is a Jinja program of the model's author, which may raise anything
        raise ConfigError(f"the model's chat template cannot be filled in: {summarize_error(error)}") from error


def is_text(value: Any) -> bool:
    """Return True if a column's value can be a part of a prompt or a target: text, or a number that is one."""
    if isinstance(value, (float, Decimal)):
        return math.isfinite(value)
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def list_template_fields(template: str, key: str = "the template") -> list[str]:
    """Return the column names in a template.

    Raises:
        ConfigError: the template is malformed.
    """
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"{key} {template!r} is malformed: {error}") from None


def _rename_columns(rows: Sequence[Row], columns: dict[str, str]) -> list[Row]:
    """Return the rows with the columns of the data under the names that `columns` gives them."""
    for new_name, data_name in columns.items():
        if data_name not in rows[0]:
            raise ConfigError(f"data.columns.{new_name} is {data_name!r}; {list_known(data_name, rows[0])}")
        if new_name in rows[0] and new_name not in columns.values():
            raise ConfigError(
                f"data.columns.{new_name} is {data_name!r}, but the data already has a column {new_name!r}"
            )
    new_names = {data_name: new_name for new_name, data_name in columns.items()}
    return [{new_names.get(name, name): value for name, value in row.items()} for row in rows]


def _name_rows(numbers: Sequence[int], source: str) -> list[str]:
    """Return the names of rows in messages, with the file or split that they come from where it is known."""
    prefix = f"{source}, " if source else ""
    return [f"{prefix}row {number + 1} of the data" for number in numbers]


def _check_columns(rows: Sequence[Row], places: Sequence[str]) -> None:
    """Refuse columns whose names the rewards' arguments have, and text that cannot be encoded."""
    for name in RESERVED_COLUMNS:
        if name in rows[0]:
            raise ConfigError(
                f"the data has a column {name!r}, which is the name of an argument that rewards get; rename it: "
                f"data.columns={{NEW: {name}}}"
            )
    for name in rows[0]:
        _check_characters([row[name] for row in rows], places, f"column {name!r}")


def _check_characters(values: Sequence[Any], places: Sequence[str], part: str) -> None:
    """Raise ConfigError if a text, or a text in a list or mapping, has a lone surrogate, which no tokenizer encodes."""
    for place, value in zip(places, values, strict=True):
        if (character := find_surrogate(value)) is not None:
            raise ConfigError(
                f"{place}: {part} has the lone surrogate {character!a}, half of a character; "
                f"correct it or remove the row"
            )


def find_surrogate(value: Any) -> str | None:
    """Return the first lone surrogate in a text, list or mapping, or None."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return value[error.start]
        return None
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return next((character for item in value if (character := find_surrogate(item)) is not None), None)
    return None


def _check_template_columns(
    rows: Sequence[Row], places: Sequence[str], template: str, key: str = "data.template"
) -> None:
    """Check that the columns that the template uses hold text or a number in every row."""
    for name in list_template_fields(template, key):
        if name not in rows[0]:
            raise ConfigError(f"{key} uses {{{name}}}, but the data has the columns {', '.join(rows[0])}")
        for place, row in zip(places, rows, strict=True):
            if not is_text(row[name]):
                value = "null" if row[name] is None else repr(str(row[name])[:40])
                raise ConfigError(
                    f"{place}: column {name!r}, which {key} uses, is {value}; it must be text or a number"
                )
