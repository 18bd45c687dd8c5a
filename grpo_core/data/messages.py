"""Read prompts that are conversations: lists of messages, each with a role and a content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from grpo_core.config.sections import DataConfig
from grpo_core.data.columns import describe_other_keys, has_messages, is_conversation
from grpo_core.data.encoding import apply_chat_template
from grpo_core.schema import summarize_error

Message = dict[str, Any]  # role, content, and what else a chat template may read, such as tool_calls


class BadRow(ValueError):
    """A row that cannot be a task; the message is the rest of a sentence that begins with the row's place."""


def read_conversation(value: Any) -> list[Message]:
    """Return the messages of a column's value with their contents as text.

    A content is text, or a list of parts of type text, which are joined. Keys that are None are left out: a Parquet
    file has every key in every message.

    Raises:
        BadRow: the value is no list of messages, or one of them has a part of another type or no content.
    """
    if has_messages(value) and not is_conversation(value):
        number, message = next((i, x) for i, x in enumerate(value, 1) if not (isinstance(x, Mapping) and "role" in x))
        kind = "null" if message is None else repr(message)[:40]
        raise BadRow(f"has {kind} as message {number}; a message has role and content")
    if not is_conversation(value):
        if fault := describe_other_keys(value):
            raise BadRow(fault)
        kind = "an empty list" if value in ([], ()) else "null" if value is None else repr(value)[:40]
        raise BadRow(f"is {kind}; it must be a list of messages with role and content")
    return [_read_message(message, i) for i, message in enumerate(value, 1)]


def _read_message(message: Mapping[str, Any], number: int) -> Message:
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = "".join(_read_part(part, number) for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        value = "no content" if content is None else f"the content {repr(content)[:40]}"
        raise BadRow(f"has {value} in message {number}; it must be text, or a list of parts of type text")
    others = {name: value for name, value in message.items() if value is not None}
    return {**others, "content": content or ""}


def _read_part(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadRow(f"has a part of type {kind!r} in message {number}; only parts of type text are read")
    return part["text"]


def split_last_turn(
    messages: Sequence[Message], last_turn: Literal["gold", "drop", "continue"]
) -> tuple[list[Message], str | None]:
    """Return the messages of the prompt, and the text of the assistant's last turn if it is taken off as gold answer.

    Raises:
        BadRow: no turn of the user is left, or the prompt still ends with a turn of the assistant.
    """
    prompt, gold = list(messages), None
    if prompt[-1]["role"] == "assistant" and last_turn != "continue":
        text = prompt.pop()["content"]
        gold = text if last_turn == "gold" else None
    if not any(message["role"] == "user" for message in prompt):
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        raise BadRow(f"has no turn of the user; its roles are {roles}")
    if not any(message["role"] == "user" and message["content"].strip() for message in prompt):
        raise BadRow("has only empty turns of the user")
    if prompt[-1]["role"] == "assistant" and last_turn != "continue":
        raise BadRow("ends with two turns of the assistant")
    return prompt, gold


def render_conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """Return a conversation in the model's chat template, up to the place where the assistant continues.

    The place is the beginning of a turn, or the end of the last turn if that is the assistant's. A conversation without
    a system turn gets data.system.

    Raises:
        BadRow: the chat template refuses it.
    """
    continues = messages[-1]["role"] == "assistant"
    try:
        return apply_chat_template(
            tokenizer,
            add_system_turn(messages, config),
            config,
            add_generation_prompt=not continues,
            continue_final_message=continues,
        )
    except Exception as error:  # the template is a Jinja program of the model's author, which may raise anything
        raise BadRow(f"is refused by the model's chat template: {summarize_error(error)}") from None


def add_system_turn(messages: Sequence[Message], config: DataConfig) -> list[Message]:
    """Return the messages with data.system in front, unless they have a system turn or data.system is empty."""
    if not config.system or any(message["role"] == "system" for message in messages):
        return list(messages)
    return [{"role": "system", "content": config.system}, *messages]
