"""Pass on the texts of groups whose completions have all ended, while others still decode.

Passing a group on changes no draw. Its texts are final, with one exception: if a decoder gives up during a call and
another decoder draws the completions again, up to rounding, a group may be passed on twice, and the second texts are
final.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

OnGroup = Callable[[int, list[str]], None]  # receives the number of a prompt and the texts of its G completions


class FinishedGroups:
    """The rows of groups of which some have ended. `decode` returns the texts of rows of token ids."""

    def __init__(self, group_size: int, decode: Callable[[Sequence[Sequence[int]]], list[str]], on_group: OnGroup):
        self.group_size, self.decode, self.on_group = group_size, decode, on_group
        self._ended: dict[int, dict[int, list[int]]] = {}  # number of the prompt -> row -> ids

    def add(self, rows: Tensor, ids: Tensor, lengths: Tensor) -> None:
        """Add rows [R] that have ended, with their ids [R, T], of which the first `lengths` [R] are drawn."""
        for row, tokens, length in zip(rows.tolist(), ids.tolist(), lengths.tolist(), strict=True):
            group = row // self.group_size
            ended = self._ended.setdefault(group, {})
            ended[row] = tokens[:length]
            if len(ended) == self.group_size:
                self.on_group(group, self.decode([ended[row] for row in sorted(ended)]))
                del self._ended[group]
