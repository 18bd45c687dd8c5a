"""Stop strings: a completion ends with the token in which one of them becomes complete in the decoded text.

A decoder calls `are_in` every few tokens, and so draws at most a few tokens too many. `cut` then ends every completion
at the same token, however often the decoder has called and whichever rows it decoded together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.sampling.request import Draws

Decode = Callable[[Sequence[Sequence[int]]], list[str]]  # texts of rows of token ids

MAX_STEPS = 16  # tokens that a decoder draws between two questions, at most


class StopStrings:
    """The texts that end a completion. `decode` returns the texts that rewards and users see."""

    def __init__(self, texts: Sequence[str], decode: Decode) -> None:
        self.texts, self.decode = list(texts), decode
        self.margin = 8 + 2 * max(len(text.encode()) for text in texts)  # tokens: one may be a part of a character
        self._last_characters = {text[-1] for text in texts}
        self._any_token = any(character.isspace() for character in self._last_characters)
        self._may_complete: dict[int, bool] = {}  # of token ids that were drawn

    def are_in(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return for rows of ids [R, T], of which the first `lengths` [R] are drawn, whether a stop string is in them.

        Of a row whose tokens since the last call may complete a stop string, these are decoded with a margin before
        them; the whole row only if a stop string is in them. One that became complete earlier is therefore not
        reported.
        """
        width = MAX_STEPS + self.margin
        place = (lengths[:, None] - width + torch.arange(width, device=lengths.device)).clamp(min=-1).to(ids.device)
        newest = ids.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1).tolist()
        self._learn({token for row in newest for token in row[-MAX_STEPS:] if token >= 0})
        rows = [i for i, row in enumerate(newest) if any(map(self._may_complete.get, row[-MAX_STEPS:]))]
        result = torch.zeros(len(newest), dtype=torch.bool, device="cpu")
        for row, text in zip(rows, self.decode([[i for i in newest[row] if i >= 0] for row in rows]), strict=True):
            if self._is_in(text):
                (text,) = self.decode([ids[row, : int(lengths[row])].tolist()])
                result[row] = self._is_in(text)
        return result.to(ids.device)

    def cut(self, draws: Draws, pad_id: int) -> Draws:
        """End each completion with the token that completes its first stop string; such a completion has ended."""
        rows = [row[:n] for row, n in zip(draws.ids.tolist(), draws.lengths.tolist(), strict=True)]
        ends = [
            self._find_end(row) if self._is_in(text) else None
            for row, text in zip(rows, self.decode(rows), strict=True)
        ]
        if not any(ends):
            return draws
        device = draws.lengths.device
        is_cut = torch.tensor([end is not None for end in ends], device=device)
        lengths = torch.tensor([end or len(row) for end, row in zip(ends, rows, strict=True)], device=device)
        used = int(lengths.max())
        beyond = torch.arange(used, device=device) >= lengths[:, None]
        return replace(
            draws,
            ids=draws.ids[:, :used].masked_fill(beyond, pad_id),
            logprobs=draws.logprobs[:, :used].masked_fill(beyond, 0.0),
            lengths=lengths,
            ended=draws.ended | is_cut,
            routed_experts=None if draws.routed_experts is None else draws.routed_experts[:, :used],
        )

    def cut_row(self, row: Sequence[int]) -> Sequence[int]:
        """Return the ids of a completion up to the token that completes its first stop string."""
        return row[: self.find(row)]

    def find(self, row: Sequence[int]) -> int | None:
        """Return the number of tokens up to the one that completes the first stop string; None without one."""
        return self._find_end(row) if self._is_in(self.decode([row])[0]) else None

    def _learn(self, tokens: set[int]) -> None:
        """Note which tokens may complete a stop string.

        Their text has the last character of one, or is a part of a character, or is unknown (a token may decode to
        nothing alone). Where a stop string ends with a space every token may: one alone loses its spaces.
        """
        new = sorted(tokens - self._may_complete.keys())
        for token, text in zip(new, self.decode([[token] for token in new]), strict=True):
            is_part = not text or "\N{REPLACEMENT CHARACTER}" in text
            self._may_complete[token] = self._any_token or is_part or not self._last_characters.isdisjoint(text)

    def _find_end(self, row: Sequence[int]) -> int:
        """Return the least number of tokens of `row` whose text has a stop string; the text of all of them has one."""
        low, high = 1, len(row)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_in(self.decode([row[:middle]])[0]) else (middle + 1, high)
        return high

    def _is_in(self, text: str) -> bool:
        return any(stop in text for stop in self.texts)
