"""Stop strings: a completion ends with the token in which one of them becomes complete in the decoded text.

A decoder calls `are_in` every few tokens, and so draws at most a few tokens too many. `cut` then ends every completion
at the same token, however often the decoder has called and whichever rows it decoded together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.sampling.request import Draws

Decode = Callable[[Sequence[Sequence[int]]], list[str]]  # texts of rows of token ids

MAX_STEPS = 16  # tokens that a decoder draws between two questions, at most
KNOWN_IDS = 1 << 18  # token ids that `_is_ruled_out` has a place for, the last of which stands for all greater ones


class StopStrings:
    """The texts that end a completion. `decode` returns the texts that rewards and users see."""

    def __init__(self, texts: Sequence[str], decode: Decode) -> None:
        self.texts = list(texts)
        self.decode: Decode = lambda rows: decode(rows) if rows else []  # a tokenizer takes an empty list for one row
        self.margin = 8 + 2 * max(len(text.encode()) for text in texts)  # tokens: one may be a part of a character
        self._last_characters = {text[-1] for text in texts}
        self._any_token = any(character.isspace() for character in self._last_characters)
        self._may_complete: dict[int, bool] = {}  # of token ids that were drawn
        self._is_ruled_out = torch.zeros(0, dtype=torch.bool, device="cpu")  # [KNOWN_IDS] once it is needed

    def are_in(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return for rows of ids [R, T], of which the first `lengths` [R] are drawn, whether a stop string is in them.

        Of a row whose tokens since the last call may complete a stop string, these are decoded with a margin before
        them; the whole row only if a stop string is in them. One that became complete earlier is therefore not
        reported.
        """
        result, lengths = torch.zeros(len(ids), dtype=torch.bool, device="cpu"), lengths.to(ids.device)
        place = lengths[:, None] - MAX_STEPS + torch.arange(MAX_STEPS, device=ids.device)
        newest = ids.gather(1, place.clamp(min=0)).clamp(max=KNOWN_IDS - 1)
        rows = (~self._read_ruled_out(ids)[newest]).any(1).nonzero().flatten()
        if not len(rows):
            return result.to(ids.device)
        width, ends, windows = MAX_STEPS + self.margin, lengths[rows], ids[rows]
        place = ends[:, None] - width + torch.arange(width, device=ids.device)
        windows = windows.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1).tolist()
        windows = [[token for token in window if token >= 0] for window in windows]
        self._learn({token for window in windows for token in window[-MAX_STEPS:]})
        texts = self.decode([window if self._may_end(window[-MAX_STEPS:]) else [] for window in windows])
        for row, end, text in zip(rows.tolist(), ends.tolist(), texts, strict=True):
            if self._is_in(text):
                (text,) = self.decode([ids[row, :end].tolist()])
                result[row] = self._is_in(text)
        return result.to(ids.device)

    def cut(self, draws: Draws, pad_id: int) -> Draws:
        """End each completion with the token that completes its first stop string; such a completion has ended."""
        rows = [row[:n] for row, n in zip(draws.ids.tolist(), draws.lengths.tolist(), strict=True)]
        ends = [self.find(row) for row in rows]
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
        """Return the number of tokens up to the one that completes the first stop string; None without one.

        Only the tokens that may complete one are tried, by bisection.
        """
        self._learn(set(row))
        ends = [n for n, token in enumerate(row, 1) if self._may_complete[token]]
        if not ends or not self._is_in(self.decode([row[: ends[-1]]])[0]):
            return None
        return ends[bisect_left(ends[:-1], True, key=lambda n: self._is_in(self.decode([row[:n]])[0]))]

    def _may_end(self, tokens: Sequence[int]) -> bool:
        return any(map(self._may_complete.__getitem__, tokens))

    def _learn(self, tokens: set[int]) -> None:
        """Note which tokens may complete a stop string.

        Their text has the last character of one, or is a part of a character, or is unknown (a token may decode to
        nothing alone). Where a stop string ends with a space every token may: one alone loses its spaces.
        """
        new = sorted(token for token in tokens if token not in self._may_complete)
        if not new:
            return
        for token, text in zip(new, self.decode([[token] for token in new]), strict=True):
            is_part = not text or "\N{REPLACEMENT CHARACTER}" in text
            self._may_complete[token] = self._any_token or is_part or not self._last_characters.isdisjoint(text)
        self._rule_out(new)

    def _read_ruled_out(self, ids: Tensor) -> Tensor:
        """Return which token ids are known to complete no stop string, [KNOWN_IDS] bool on the device of `ids`."""
        if self._is_ruled_out.device != ids.device or not len(self._is_ruled_out):
            self._is_ruled_out = torch.zeros(KNOWN_IDS, dtype=torch.bool, device=ids.device)
            self._rule_out([*self._may_complete])
        return self._is_ruled_out

    def _rule_out(self, tokens: Sequence[int]) -> None:
        """Write those of `tokens` that complete no stop string to the table."""
        ids = [token for token in tokens if token < KNOWN_IDS - 1 and not self._may_complete[token]]
        if ids and len(self._is_ruled_out):
            self._is_ruled_out[torch.tensor(ids, device=self._is_ruled_out.device)] = True

    def _is_in(self, text: str) -> bool:
        return any(stop in text for stop in self.texts)
