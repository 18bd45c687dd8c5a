"""Turn the rows of a data set into tasks: render the prompt and tokenize it."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig
from grpo_core.counts import quantify
from grpo_core.data.columns import check_names, describe_other_keys, has_messages, is_conversation, rename
from grpo_core.data.encoding import apply_chat_template, cut_left, encode_prompts
from grpo_core.data.messages import BadRow, read_conversation, render_conversation, split_last_turn
from grpo_core.data.rows import Row, Rows
from grpo_core.schema import ConfigError, summarize_error

RESERVED_COLUMNS = ("completions", "prompts", "other_rewards")  # rewards receive them beside the columns of the data
TEXT_OF_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
MAX_EXAMPLES = 3  # of bad rows in a sentence


@dataclass(frozen=True)
class PromptForm:
    """The way from a row to its prompt, which is the same for all rows of a data set."""

    fields: tuple[str, ...]  # the columns of data.template
    conversation: str | None = None  # the one of them that holds messages; None: they hold text
    has_gold: bool = False  # the last turn of the assistant becomes the column answer


def make_tasks(
    rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase, notes: list[str] | None = None
) -> tuple[list[Task], int]:
    """Return the rows as tasks, and the number of prompts longer than max_prompt_tokens.

    long_prompts decides whether such a prompt is dropped, truncated or an error. With bad_rows: drop, `notes` gets a
    sentence about the rows that cannot be tasks. The number of a row, in messages and in the task, is that in its
    split, also where only a part of the split was taken (`rows.Rows`).

    Raises:
        ConfigError: a column that the template or `columns` names is missing, a row cannot be a task, a prompt is too
            long (with long_prompts: error), or no task is left.
    """
    if not rows:
        return [], 0
    numbers = rows.numbers if isinstance(rows, Rows) else range(len(rows))
    source = rows.source if isinstance(rows, Rows) else ""
    check_names(rows, config.columns)
    rows = [rename(row, config.columns) for row in rows]
    form = find_prompt_form(rows, config)
    check_form(rows[0], form, config, tokenizer)
    encoded, faults = encode_rows(rows, form, config, tokenizer)
    handle_bad_rows({numbers[i]: fault for i, fault in faults.items()}, len(rows), source, config, notes)
    too_long = handle_long_prompts(encoded, config, tokenizer)
    refuse_long_prompts({numbers[i]: length for i, length in too_long.items()}, len(rows), source, config)
    tasks = [Task(numbers[i], x.prompt, x.ids, x.row) for i, x in encoded.items()]
    check_any_left(tasks, config)
    return tasks, len(too_long)


@dataclass(frozen=True)
class Encoded:
    """A row with its prompt."""

    row: Row
    prompt: str
    ids: list[int]


def encode_rows(
    rows: Iterable[Row], form: PromptForm, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[int, Encoded], dict[int, str]]:
    """Return the rows with their prompts, and what is wrong with the others, both by their places in `rows`."""
    faults: dict[int, str] = {}
    prompts: dict[int, tuple[Row, str]] = {}
    for i, row in enumerate(rows):
        try:
            prompts[i] = make_prompt(row, form, config, tokenizer)
        except BadRow as error:
            faults[i] = str(error)
    texts = [prompt for _, prompt in prompts.values()]
    ids = encode_prompts(tokenizer, texts, add_special_tokens=config.prompt != "chat")
    encoded = {}
    for (i, (row, prompt)), row_ids in zip(prompts.items(), ids, strict=True):
        if row_ids:
            encoded[i] = Encoded(row, prompt, row_ids)
        else:
            faults[i] = "the prompt is empty; it needs at least one token"
    return encoded, dict(sorted(faults.items()))


def handle_long_prompts(
    encoded: dict[int, Encoded], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[int, int]:
    """Cut or remove the prompts longer than max_prompt_tokens, and return their lengths by their places."""
    limit = config.max_prompt_tokens
    too_long = {i: len(x.ids) for i, x in encoded.items() if len(x.ids) > limit}
    for i in too_long:
        if config.long_prompts == "truncate_left":
            ids = cut_left(tokenizer, encoded[i].ids, limit)
            encoded[i] = Encoded(encoded[i].row, tokenizer.decode(ids), ids)
        else:
            del encoded[i]
    return too_long


def refuse_long_prompts(too_long: Mapping[int, int], count: int, source: str, config: DataConfig) -> None:
    """Raise ConfigError if long_prompts is error and prompts are too long: the lengths by the numbers of their rows."""
    if config.long_prompts != "error":
        return
    for number, length in too_long.items():
        raise ConfigError(
            f"{name_row(number, source)}: the prompt has {quantify(length, 'token')}, more than data.max_prompt_tokens "
            f"({config.max_prompt_tokens}), as have {len(too_long):,} of {quantify(count, 'prompt')}; raise it, or set "
            f"data.long_prompts to drop or truncate_left"
        )


def check_any_left(tasks: Sequence[Any], config: DataConfig) -> None:
    """Raise ConfigError if no prompt is short enough."""
    if not tasks:
        raise ConfigError(f"data.max_prompt_tokens is {config.max_prompt_tokens}; every prompt is longer than that")


def find_prompt_form(rows: Sequence[Row], config: DataConfig) -> PromptForm:
    """Return how the rows become prompts: data.template is text with columns in it, or one column with messages.

    Raises:
        ConfigError: the template is malformed, or names a column that the data lacks.
    """
    fields = tuple(list_template_fields(config.template, "data.template"))
    for name in fields:
        if name not in rows[0]:
            raise ConfigError(
                f"data.template uses {{{name}}}, but the data has the columns {', '.join(rows[0])}"
                f"{_describe_messages(rows[0]) or _describe_template(name)}"
            )
    column = find_conversation_column(rows, config.template)
    if column is None:
        return PromptForm(fields)
    has_gold = config.last_turn == "gold" and "answer" not in rows[0]
    return PromptForm(fields, column, has_gold and any(ends_with_assistant(row[column]) for row in rows))


def _describe_messages(row: Row) -> str:
    """Return how the messages in a row are used, as the end of a sentence; "" if it has none."""
    for column, value in row.items():
        if has_messages(value):
            return f"; set data.template='{{{column}}}' and data.prompt=chat for the messages in it"
    for column, value in row.items():
        if fault := describe_other_keys(value):
            return f"; for conversations, {column!r} {fault}, and set data.template='{{{column}}}' and data.prompt=chat"
    return ""


def _describe_template(name: str) -> str:
    return f"; name the one with the prompt, such as data.columns='{{{name}: COLUMN}}' or data.template='{{COLUMN}}'"


def find_conversation_column(rows: Sequence[Row], template: str) -> str | None:
    """Return the column with messages that is the whole template, such as {prompt}; None if the prompts are text."""
    name = template[1:-1]
    if template != f"{{{name}}}" or name not in rows[0]:
        return None
    values = (row[name] for row in rows)
    return name if has_messages(next((value for value in values if value not in (None, [], ())), None)) else None


def ends_with_assistant(value: Any) -> bool:
    """Return whether a column's value is a conversation whose last turn is the assistant's."""
    return is_conversation(value) and value[-1]["role"] == "assistant"


def check_form(row: Row, form: PromptForm, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the settings that the form of the prompts needs, and the names of the columns.

    Raises:
        ConfigError: messages or data.prompt: chat without a chat template; a variable that it does not read; or a
            column with the name of an argument of every reward.
    """
    if form.conversation and config.prompt != "chat":
        raise ConfigError(
            f"data.prompt is {config.prompt}, but the column {form.conversation!r} holds messages, which need the "
            f"model's chat template; set data.prompt to chat"
        )
    if config.prompt == "chat" and not tokenizer.chat_template:
        remedy = "set data.chat_template to a Jinja file"
        raise ConfigError(
            "data.prompt is chat, but the model's tokenizer has no chat template; "
            f"{remedy if form.conversation else f'use data.prompt: template, or {remedy}'}"
        )
    for name in config.chat_template_kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise ConfigError(f"data.chat_template_kwargs has {name!r}, which the model's chat template does not read")
    for name in RESERVED_COLUMNS:
        if name in row:
            raise ConfigError(
                f"the data has a column {name!r}, which is the name of an argument that rewards get; rename it: "
                f"data.columns={{NEW: {name}}}"
            )


def make_prompt(row: Row, form: PromptForm, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Row, str]:
    """Return a row, with the gold answer of a conversation as the column answer, and the text of its prompt.

    Raises:
        BadRow: the row cannot be a task.
        ConfigError: see `render_prompt`.
    """
    for name, value in row.items():
        if (character := find_surrogate(value)) is not None:
            raise BadRow(f"column {name!r} has the lone surrogate {character!a}, half of a character")
    if form.conversation:
        try:
            messages, gold = split_last_turn(read_conversation(row[form.conversation]), config.last_turn)
            prompt = render_conversation(messages, tokenizer, config)
        except BadRow as error:
            raise BadRow(f"column {form.conversation!r} {error}") from None
        row = {**row, "answer": gold} if form.has_gold else row
    else:
        for name in form.fields:
            check_text(row, name, "data.template")
            _refuse_text_of_messages(row, name, config)
        if form.fields and not any(str(row[name]).strip() for name in form.fields):
            raise BadRow(f"the prompt is empty, because data.template has no text from {', '.join(form.fields)}")
        prompt = render_prompt(row, config, tokenizer)
    if (character := find_surrogate(prompt)) is not None:
        raise BadRow(
            f"the prompt made from it with data.template and data.system has the lone surrogate {character!a}, half of "
            f"a character"
        )
    return row, prompt


def _refuse_text_of_messages(row: Row, name: str, config: DataConfig) -> None:
    """Raise BadRow if a prompt is the text of a list of messages, as CSV files have it."""
    value = row[name]
    if config.template == f"{{{name}}}" and isinstance(value, str) and TEXT_OF_MESSAGES.match(value):
        raise BadRow(
            f"column {name!r} is the text of a list of messages, {value[:40]!r}; save the list itself, as JSON Lines "
            f"or Parquet"
        )


def handle_bad_rows(
    faults: Mapping[int, str], count: int, source: str, config: DataConfig, notes: list[str] | None
) -> None:
    """Refuse rows that cannot be tasks, or say in `notes` that they are left out; `faults` are of `count` rows.

    Raises:
        ConfigError: there are such rows and data.bad_rows is error, or no other rows are left.
    """
    if not faults:
        return
    sentences = [f"{name_row(number, source)}: {fault}" for number, fault in faults.items()]
    if config.bad_rows == "error":
        raise ConfigError(f"{sentences[0]}; correct the row, or leave such rows out with data.bad_rows: drop")
    if len(faults) == count:
        raise ConfigError(f"data.bad_rows is drop, and no row is left; {sentences[0]}")
    if notes is not None:
        notes.append(
            f"{quantify(len(faults), 'row is', 'rows are')} left out of {quantify(count, 'row')}, because "
            f"data.bad_rows is drop: {'; '.join(sentences[:MAX_EXAMPLES])}"
        )


def name_row(number: int, source: str = "") -> str:
    """Return the name of a row in messages, with the file or split that it comes from where it is known."""
    return f"{f'{source}, ' if source else ''}row {number + 1} of the data"


def encode_teacher_prompts(
    tasks: Sequence[Task], template: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Task]:
    """Return the tasks with the prompts that a teacher sees: `template`, teacher.prompt, in place of data.template.

    In it {prompt} is data.template filled in, or the last turn of the user in a conversation; other names in braces
    are the row's columns.

    Raises:
        ConfigError: it names a column that the data lacks, or that holds no text.
    """
    key, column = "teacher.prompt", find_conversation_column([task.columns for task in tasks], config.template)
    fields = list_template_fields(template, key)
    teacher, prompts = replace(config, template=template), []
    for task in tasks:
        row, messages, place = dict(task.columns), [], 0
        if column is None:
            row["prompt"] = config.template.format(**row)
        else:
            messages, _ = split_last_turn(read_conversation(row[column]), config.last_turn)
            place = max(i for i, message in enumerate(messages) if message["role"] == "user")
            row["prompt"] = messages[place]["content"]
        try:
            for name in fields:
                if name not in row:
                    raise ConfigError(f"{key} uses {{{name}}}, but the data has the columns {', '.join(row)}")
                check_text(row, name, key)
            if messages:
                messages[place] = {**messages[place], "content": fill_template(row, template, key)}
                prompts.append(render_conversation(messages, tokenizer, config))
            else:
                prompts.append(render_prompt(row, teacher, tokenizer, key))
        except BadRow as error:
            raise ConfigError(f"{name_row(task.index)}: {error}") from None
    ids = encode_prompts(tokenizer, prompts, add_special_tokens=config.prompt != "chat")
    return [replace(task, teacher_prompt_ids=prompt_ids) for task, prompt_ids in zip(tasks, ids, strict=True)]


def render_prompt(row: Row, config: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str = "data.template") -> str:
    """Return the text that the policy continues: the template, inside the model's chat template if configured.

    Raises:
        ConfigError: the template or the model's chat template cannot be filled in.
    """
    text = fill_template(row, config.template, key)
    if config.prompt == "template":
        return text
    system = [{"role": "system", "content": config.system}] if config.system else []
    return render_chat([*system, {"role": "user", "content": text}], tokenizer, config)


def fill_template(row: Row, template: str, key: str) -> str:
    """Return the template with the columns of a row in it; `key` names it in a message.

    Raises:
        ConfigError: it cannot be filled in.
    """
    try:
        return template.format(**row)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{key} {template!r} cannot be filled in: {error}") from None


def render_chat(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """Return a chat in the model's chat template, up to the place where the assistant's turn begins.

    Raises:
        ConfigError: the template cannot be filled in.
    """
    try:
        return apply_chat_template(tokenizer, messages, config)
    except Exception as error:  # the template is a Jinja program of the model's author, which may raise anything
        name = "data.chat_template" if config.chat_template else "the model's chat template"
        raise ConfigError(f"{name} cannot be filled in: {summarize_error(error)}") from error


def is_text(value: Any) -> bool:
    """Return True if a column's value can be a part of a prompt or a target: text, or a number that is one."""
    if isinstance(value, (float, Decimal)):
        return math.isfinite(value)
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return is_text(value) and not isinstance(value, str)


def list_template_fields(template: str, key: str = "the template") -> list[str]:
    """Return the column names in a template.

    Raises:
        ConfigError: the template is malformed.
    """
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"{key} {template!r} is malformed: {error}") from None


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


def check_text(row: Row, name: str, key: str) -> None:
    """Check that a column that a template uses holds text, a number, or a list of numbers; `key` names the template.

    Raises:
        BadRow: it holds another value.
    """
    value = row[name]
    if is_text(value) or (isinstance(value, list) and value and all(map(_is_number, value))):
        return
    if has_messages(value):
        raise BadRow(f"column {name!r} holds messages, which {key} may only use alone, as {{{name}}}, in all rows")
    if fault := describe_other_keys(value):
        raise BadRow(f"column {name!r}, which {key} uses, {fault}")
    text = "null" if value is None else repr(str(value)[:40])
    raise BadRow(f"column {name!r}, which {key} uses, is {text}; it must be text or a number")
