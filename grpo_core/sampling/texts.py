"""Decode completions to the text that rewards, files and users see: everything that the model wrote."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from transformers import PreTrainedTokenizerBase


def find_hidden_ids(tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int]) -> frozenset[int]:
    """Return the ids that are no text: the ends of sequence, and the tokenizer's end, padding and begin tokens.

    Other special tokens are text, such as <think> in the tokenizers of many reasoning models.
    """
    names = ("eos_token_id", "pad_token_id", "bos_token_id")
    ids = {getattr(tokenizer, name, None) for name in names}
    return frozenset({*eos_ids, *ids} - {None})


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], hidden: Collection[int]
) -> list[str]:
    """Return the texts of rows of token ids, without the ids in `hidden`."""
    if not rows:
        return []  # batch_decode takes an empty list for one row
    return tokenizer.batch_decode([[i for i in row if i not in hidden] for row in rows], skip_special_tokens=False)
