"""Find the tokens of the assistant's turns in a conversation, which are those that `sft` trains."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from grpo_core.config.sections import DataConfig
from grpo_core.data.encoding import apply_chat_template, encode_continuations, encode_prompts, get_tools
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
    {% generation %} marks them itself. Without marks, they are the tokens that a turn adds to the conversation before
    it.

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
    for i in range(1, len(ids)):  # a template may mark the text of a turn without its end
        marks[i] = marks[i] or (marks[i - 1] and ids[i] in eos_ids and ids[i - 1] not in eos_ids)
    if not (marks[-1] and ids[-1] in eos_ids):
        ids, marks = [*ids, eos], [*marks, True]
    if not any(marks[1:]):
        raise BadRow("has no token in front of the assistant's")
    return ids, [False, *marks[1:]]  # no token predicts the first


def _read_marks(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], config: DataConfig, eos_ids: Collection[int]
) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, and which of them the chat template marks as the assistant's.

    They end with the last of these, or with an end-of-sequence token behind it.
    """
    encoded = tokenizer.apply_chat_template(
        list(messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **get_tools(tokenizer),
        **config.chat_template_kwargs,
    )
    ids, marks = list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    while tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids, marks = ids[1:], marks[1:]
    if not any(marks):
        raise BadRow("has no token that the model's chat template marks with {% generation %}")
    end = max(i for i, mark in enumerate(marks) if mark) + 1
    if end < len(ids) and ids[end] in eos_ids and ids[end - 1] not in eos_ids:
        end += 1
    return ids[:end], marks[:end]


def _compare_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], config: DataConfig, eos_ids: Collection[int]
) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, and which of them its assistant's turns add to the prompts before them.

    They end with the last turn's own tokens.
    """
    ids: list[int] = []
    marks: list[bool] = []
    text, rest = "", []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answered = _render_turn(tokenizer, messages[: i + 1], config)
        if not prompt.startswith(text) or not answered.startswith(prompt):
            raise _lost_tokens(i, "renders the text before it in another way once more turns follow")
        given = prompt[len(text) :]
        row = encode_continuations(tokenizer, [text], [given])[0] if text else encode_text(tokenizer, given)
        ids += [*rest, *row]
        marks += [False] * (len(rest) + len(row))
        added, rest = _split_turn(tokenizer, prompt, answered[len(prompt) :], message["content"], eos_ids)
        ids += added
        marks += [True] * len(added)
        text = answered
    return ids, marks


def _lost_tokens(place: int, reason: str) -> BadRow:
    return BadRow(
        f"has a turn of the assistant (message {place + 1}) whose tokens cannot be found, because the model's chat "
        f"template {reason}; set data.chat_template to one with {{% generation %}} around what the assistant writes"
    )


def _render_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], config: DataConfig
) -> tuple[str, str]:
    """Return the text in front of what the assistant writes in the last message, and the text with that message.

    Raises:
        BadRow: the chat template does not render the beginning of a conversation, or not in this way.
    """
    place = len(messages) - 1
    try:
        answered = apply_chat_template(tokenizer, messages, config, add_generation_prompt=False)
        if place:
            return apply_chat_template(tokenizer, messages[:-1], config), answered
        opening = _find_opening(tokenizer, config)
    except Exception as error:  # the template is a program of the model's author, which may raise anything
        raise _lost_tokens(place, f"refuses the messages up to it ({summarize_error(error)})") from None
    content = messages[0]["content"] if opening + messages[0]["content"] in answered else messages[0]["content"].strip()
    start = answered.find(opening + content) if opening + content else -1
    if start < 0:
        raise _lost_tokens(place, "renders it in another way at the beginning of a conversation")
    return answered[:start] + opening, answered


def _find_opening(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """Return what the chat template adds to a prompt so that the assistant's turn begins.

    `transformers` renders no empty conversation, so in front of a first turn it is looked for behind another prompt.
    """
    turns = [{"role": "user", "content": "x"}]
    closed, opened = (apply_chat_template(tokenizer, turns, config, add_generation_prompt=on) for on in (False, True))
    return opened.removeprefix(closed) if opened.startswith(closed) else ""


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of the beginning of a conversation, as those of a prompt."""
    (ids,) = encode_prompts(tokenizer, [text], add_special_tokens=False)
    return ids


def _split_turn(
    tokenizer: PreTrainedTokenizerBase, prompt: str, added: str, content: str, eos_ids: Collection[int]
) -> tuple[list[int], list[int]]:
    """Return the ids of what the assistant writes in a turn, and those of what the template writes behind it.

    The turn ends with the end-of-sequence token that the template writes; without one, with its content.
    """
    start = 0 if added.startswith(content) else added.rfind(content)
    place = len(added) if start < 0 else start + len(content)
    closing = encode_continuations(tokenizer, [prompt + added[:place]], [added[place:]])[0] if added[place:] else []
    if start < 0 or any(token in eos_ids for token in closing):
        (ids,) = encode_continuations(tokenizer, [prompt], [added])
        end = max((i + 1 for i, token in enumerate(ids) if token in eos_ids), default=len(ids))
        return ids[:end], ids[end:]
    return encode_continuations(tokenizer, [prompt], [added[:place]])[0] if place else [], closing
