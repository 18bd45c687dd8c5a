"""Turn prompts and supervised targets into token ids so that a target or a completion continues its prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig
from grpo_core.counts import quantify

PROBE = "a"  # a text that every tokenizer can encode
TOOLS_ATTRIBUTE = "offered_tools"  # of a tokenizer
MARKS_ATTRIBUTE = "marks_beginnings"  # of a tokenizer
REPLY = "reply"  # a turn of the assistant, of which the end is looked for
ANCHORS = ("\n", "a", "=", "1", ".")  # texts in front of a target, one of which does not merge with its beginning


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, add_special_tokens: bool
) -> list[list[int]]:
    """Return the token ids of prompts: one begin token at most, and none of the tokens that end a text."""
    if not prompts:
        return []
    rows = tokenizer(list(prompts), add_special_tokens=add_special_tokens, return_attention_mask=False)["input_ids"]
    before, after = find_added_tokens(tokenizer) if add_special_tokens else ([], [])
    return [_remove_surplus(row, before, after, getattr(tokenizer, "bos_token_id", None)) for row in rows]


def find_added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after every text, such as <s> and </s>."""
    (plain,) = tokenizer([PROBE], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    (whole,) = tokenizer([PROBE], add_special_tokens=True, return_attention_mask=False)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    config: DataConfig,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """Return a chat in the tokenizer's chat template with the variables of data.chat_template_kwargs and the tools.

    With `continue_final_message` it ends with the text of the last message.
    """
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    options |= {"continue_final_message": True} if continue_final_message else {}
    options |= get_tools(tokenizer)
    return tokenizer.apply_chat_template(list(messages), **options, **config.chat_template_kwargs)


def offer_tools(tokenizer: PreTrainedTokenizerBase, schemas: Sequence[Mapping[str, Any]]) -> None:
    """Let the chat template describe tools in every prompt, by their JSON schemas; it belongs to the tokenizer, too."""
    setattr(tokenizer, TOOLS_ATTRIBUTE, list(schemas))


def get_tools(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the argument `tools` of a chat template, if there are tools."""
    schemas = getattr(tokenizer, TOOLS_ATTRIBUTE, None)
    return {"tools": schemas} if schemas else {}


def find_turn_end(tokenizer: PreTrainedTokenizerBase, config: DataConfig, eos_ids: Collection[int]) -> int | None:
    """Return the end-of-sequence token with which the chat template ends a turn of the assistant.

    It may differ from the tokenizer's, as <end_of_turn> of Gemma does. None without a chat template, or if the template
    ends a turn in another way.
    """
    if config.prompt != "chat":
        return None
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": REPLY}]
    try:
        text = apply_chat_template(tokenizer, turns, config, add_generation_prompt=False)
    except Exception:  # the template is a program of the model's author, and may take no such turns
        return None
    _, reply, rest = text.rpartition(REPLY)
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if reply else []
    return next((token for token in ids[:1] if token in eos_ids), None)


def cut_left(tokenizer: PreTrainedTokenizerBase, ids: list[int], limit: int) -> list[int]:
    """Return the last tokens of a prompt, at most `limit` with the begin token, which stays in front of them."""
    before, _ = find_added_tokens(tokenizer)
    count = len(before) if before and ids[: len(before)] == before else 0
    if not count and ids[0] == getattr(tokenizer, "bos_token_id", None):
        count = 1
    count = min(count, limit - 1)
    return ids[:count] + ids[count:][count - limit :]


def describe_prompt_changes(tokenizer: PreTrainedTokenizerBase, config: DataConfig, tasks: Sequence[Task]) -> list[str]:
    """Return a sentence for each way in which the prompts differ from what the configuration says.

    `encode_prompts` leaves out tokens, and a chat template may leave out the system's turn, or do what a prompt should
    not.
    """
    sentences, bos = [], getattr(tokenizer, "bos_token", None)
    before, after = find_added_tokens(tokenizer) if config.prompt != "chat" else ([], [])
    if after:
        names = "".join(tokenizer.convert_ids_to_tokens(after))
        sentences.append(f"the tokenizer ends every text with {names}, which is left out: the model continues a prompt")
    added = bos if before and before[-1] == tokenizer.bos_token_id else ""
    if bos and any((added + task.prompt[: 2 * len(bos)]).startswith(2 * bos) for task in tasks):
        source = "is in the text of the prompts, and the tokenizer adds it" if added else "is there twice"
        sentences.append(f"the begin token {bos} {source}; a prompt gets it once")
    return sentences + (_describe_chat_template(tokenizer, config, tasks) if config.prompt == "chat" else [])


def _describe_chat_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig, tasks: Sequence[Task]) -> list[str]:
    sentences = []
    without = sum(config.system.strip() not in task.prompt for task in tasks) if config.system else 0
    if without == len(tasks) > 0:
        sentences.append("the model's chat template leaves data.system out of the prompts")
    elif without:
        sentences.append(f"data.system is not in {quantify(without, 'prompt')}, which have another system turn")
    turns = [{"role": "user", "content": "x"}]
    with contextlib.suppress(Exception):  # the template is a program of the model's author
        texts = [apply_chat_template(tokenizer, turns, config, add_generation_prompt=on) for on in (True, False)]
        if texts[0] == texts[1]:
            sentences.append("the model's chat template opens no turn of the assistant at the end of a prompt")
    if "strftime_now" in str(tokenizer.chat_template):
        sentences.append(
            "the model's chat template writes the time into the prompts, so they differ from one start to the next"
        )
    return sentences


def encode_targets(tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each task's target as they continue its prompt, without an end-of-sequence token."""
    return encode_continuations(tokenizer, [task.prompt for task in tasks], texts)


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], texts: Sequence[str]
) -> list[list[int]]:
    """Return the token ids of texts as they continue their prompts.

    A tokenizer that marks the beginning of a text, as SentencePiece does with a space, would mark the beginning of a
    target too, where sampling has no mark. With such a tokenizer a target is encoded after its prompt, or after another
    text if the prompt's last token would change.
    """

    def encode(parts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(parts), add_special_tokens=False, return_attention_mask=False)["input_ids"]

    if not texts:
        return []
    alone = encode(texts)
    if not _marks_beginnings(tokenizer):
        return alone
    whole = encode([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    rows = []
    for i, (prompt, row) in enumerate(zip(encode(prompts), whole, strict=True)):
        ids = row[len(prompt) :] if row[: len(prompt)] == prompt else None
        rows.append(_encode_behind_anchor(encode, texts[i], alone[i]) if ids is None else ids)
    return rows


def _marks_beginnings(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a text is encoded in another way at the beginning than behind a line break.

    It is looked up once and belongs to the tokenizer: environments ask for each answer.
    """
    marks: bool | None = getattr(tokenizer, MARKS_ATTRIBUTE, None)
    if marks is None:
        texts = [f"\n{PROBE}", "\n", PROBE]
        rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        marks = rows[0] != rows[1] + rows[2]
        setattr(tokenizer, MARKS_ATTRIBUTE, marks)
    return marks


def _encode_behind_anchor(encode: Callable[[Sequence[str]], list[list[int]]], text: str, alone: list[int]) -> list[int]:
    for anchor in ANCHORS:
        start, row = encode([anchor, anchor + text])
        if row[: len(start)] == start:
            return row[len(start) :]
    return alone


def _remove_surplus(row: list[int], before: list[int], after: list[int], bos: int | None) -> list[int]:
    if after and row[-len(after) :] == after:
        row = row[: -len(after)]
    if before and row[: 2 * len(before)] == before + before:
        row = row[len(before) :]
    while bos is not None and row[:2] == [bos, bos]:
        row = row[1:]
    return row
