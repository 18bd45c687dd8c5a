"""Find the tokens of the assistant's turns in a conversation, which are those that `sft` trains."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from grpo_core.config.sections import DataConfig
from grpo_core.data.encoding import apply_chat_template, encode_continuations, encode_prompts
from grpo_core.data.messages import BadRow, Message, add_system_turn
from grpo_core.schema import summarize_error

GENERATION = re.compile(r"\{%[-+]?\s*generation\b")  # a chat template's mark around what the assistant writes


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    config: DataConfig,
    eos_ids: Collection[int],  # every token that ends a completion
    eos: int,  # the end of a last turn which the chat template does not end with one of them
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation up to the end of the assistant's last turn, and which are the assistant's.

    Its tokens are the text of its turns and the end-of-sequence token behind each, as in sampling. A chat template with
    {% generation %} marks them itself. Without it they are what a turn adds to the prompt in front of it.

    Raises:
        BadRow: the assistant has no turn, or its tokens cannot be found.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise BadRow("has no turn of the assistant to train")
    turns = add_system_turn(messages[: last + 1], config)
    try:
        has_marks = GENERATION.search(str(tokenizer.chat_template))
        ids, marks = (_read_marks if has_marks else _compare_prefixes)(tokenizer, turns, config, eos_ids)
    except BadRow:
        raise
    except Exception as error:  # the template is a program of the model's author, which may raise anything
        raise BadRow(f"is refused by the model's chat template: {summarize_error(error)}") from None
    end = max(i for i, mark in enumerate(marks) if mark) + 1
    if end < len(ids) and ids[end] in eos_ids and ids[end - 1] not in eos_ids:
        end += 1
    ids, marks = ids[:end], marks[:end]
    for i in range(1, end):  # a template may mark the text of a turn without its end
        marks[i] = marks[i] or (marks[i - 1] and ids[i] in eos_ids and ids[i - 1] not in eos_ids)
    return (ids, marks) if ids[-1] in eos_ids else ([*ids, eos], [*marks, True])


def _read_marks(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], config: DataConfig, eos_ids: Collection[int]
) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, and which of them the chat template marks as the assistant's."""
    encoded = tokenizer.apply_chat_template(
        list(messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **config.chat_template_kwargs,
    )
    ids, marks = list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    while tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids, marks = ids[1:], marks[1:]
    if not any(marks):
        raise BadRow("has no token that the model's chat template marks with {% generation %}")
    return ids, marks


def _compare_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], config: DataConfig, eos_ids: Collection[int]
) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, and which of them its assistant's turns add to the prompts before them."""
    ids: list[int] = []
    marks: list[bool] = []
    text = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = apply_chat_template(tokenizer, messages[:i], config)
        answered = apply_chat_template(tokenizer, messages[: i + 1], config, add_generation_prompt=False)
        if not prompt.startswith(text) or not answered.startswith(prompt):
            raise BadRow(
                f"has a turn of the assistant (message {i + 1}) whose tokens cannot be found, because the model's chat "
                f"template renders the text before it in another way once more turns follow; set data.chat_template "
                f"to one with {{% generation %}} around what the assistant writes"
            )
        given = prompt[len(text) :]
        row = encode_continuations(tokenizer, [text], [given])[0] if text else encode_text(tokenizer, given)
        (added,) = encode_continuations(tokenizer, [prompt], [answered[len(prompt) :]])
        end = max((place + 1 for place, token in enumerate(added) if token in eos_ids), default=None)
        if end is None:  # the template ends a turn in another way
            added, rest = _split_after(tokenizer, prompt, answered[len(prompt) :], message["content"])
        else:
            added, rest = added[:end], added[end:]
        ids += [*row, *added, *rest]
        marks += [False] * len(row) + [True] * len(added) + [False] * len(rest)
        text = answered
    return ids, marks


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of the beginning of a conversation, as those of a prompt."""
    (ids,) = encode_prompts(tokenizer, [text], add_special_tokens=False)
    return ids


def _split_after(
    tokenizer: PreTrainedTokenizerBase, prompt: str, added: str, content: str
) -> tuple[list[int], list[int]]:
    """Return the ids of a turn up to the end of its content, and those of what the template writes behind it."""
    place = added.rfind(content) + len(content) if content in added else len(added)
    (ids,) = encode_continuations(tokenizer, [prompt], [added[:place]])
    rest = encode_continuations(tokenizer, [prompt + added[:place]], [added[place:]])[0] if added[place:] else []
    return ids, rest
