"""The static memory of one layer's cache: keys, values and recurrent states of prompts and of rows.

What a layer holds is read from a cache of transformers that a trial has filled: tensors named `keys` and `values` grow
by a token at a time, and all others are states of a fixed shape, which the model updates in place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

Name = tuple[str, int | None]  # an attribute of a cache's layer, and the key in it if it is a dict


class LayerMemory:
    """The memory of one layer's cache: that of the prompts, and that of the rows."""

    def __init__(self, template: Any, kind: str = "") -> None:
        self.template = template  # a layer of transformers' cache, filled by a trial
        self.is_chunked = kind == "chunked_attention"
        self.samples = {name: tensor[:0].clone() for name, tensor in _tensors(template)}
        self.prompts: dict[Name, Tensor] = {}
        self.rows: dict[Name, Tensor] = {}

    def make(self, count: int, tokens: int) -> dict[Name, Tensor]:
        """Return memory for `count` prompts or rows of `tokens` tokens: zeros, because masked values must be finite."""
        return {name: x.new_zeros(count, *self._shape(name, x, tokens)) for name, x in self.samples.items()}

    def bytes_per_row(self, tokens: int) -> int:
        """Return the bytes of one row of `tokens` tokens."""
        return sum(x.itemsize * math.prod(self._shape(name, x, tokens)) for name, x in self.samples.items())

    @property
    def window(self) -> int | None:
        """The number of tokens that the layer sees, if it has a sliding window, or that a chunk has."""
        return getattr(self.template, "sliding_window", None)

    def first_visible(self, position: Tensor) -> Tensor | None:
        """Return the first position that a token at `position` [...] sees; None if it sees all before it."""
        if self.window is None:
            return None
        return position - position % self.window if self.is_chunked else position - self.window + 1

    @staticmethod
    def _shape(name: Name, sample: Tensor, tokens: int) -> tuple[int, ...]:
        shape = tuple(sample.shape[1:])
        return (*shape[:-2], tokens, shape[-1]) if grows(name) else shape

    def store_prompts(self, layer: Any, indices: Tensor, lengths: Sequence[int]) -> None:
        """Store what the model's cache holds of the prompts at `indices`, whose tokens are its last `lengths`."""
        for name, tensor in _tensors(layer):
            if not grows(name):
                self.prompts[name][indices] = tensor
                continue
            for i, row, length in zip(indices.tolist(), tensor, lengths, strict=True):
                first = max(0, length - row.shape[-2])  # a layer with a window holds no tokens before it
                self.prompts[name][i, ..., first:length, :] = row[..., row.shape[-2] - (length - first) :, :]

    def add_rows(self, slots: Tensor, prompts: Tensor) -> None:
        """Copy prompts into the slots of rows."""
        for name, rows in self.rows.items():
            source = self.prompts[name][prompts]
            if grows(name):
                rows[slots, ..., : source.shape[-2], :] = source
            else:
                rows[slots] = source

    def keep_rows(self, slots: Tensor) -> None:
        """Move the rows in these slots to the first ones, in this order."""
        for rows in self.rows.values():
            rows[: len(slots)] = rows[slots]

    def park(self, slots: Tensor) -> dict[Name, Tensor]:
        """Return copies of the states of the rows in these slots."""
        return {name: rows[slots] for name, rows in self.rows.items() if not grows(name)}

    def unpark(self, slots: Tensor, parked: dict[Name, Tensor], index: Tensor) -> None:
        """Put the copies at `index` into these slots."""
        for name, states in parked.items():
            self.rows[name][slots] = states[index]

    def make_layer(self, size: int, update: Any) -> Any:
        """Return a layer of transformers' cache over the memory of the first `size` rows.

        `update` takes the place of the method of this name, which stores new keys and values and returns all.
        """
        layer = copy.copy(self.template)
        for attribute in {attribute for attribute, key in self.rows if key is not None}:
            setattr(layer, attribute, dict(getattr(layer, attribute)))
        for (attribute, key), rows in self.rows.items():
            if key is None:
                setattr(layer, attribute, rows[:size])
            else:
                getattr(layer, attribute)[key] = rows[:size]
        if any(grows(name) for name in self.rows):
            tokens = next(rows.shape[-2] for name, rows in self.rows.items() if grows(name))
            layer.update, layer.get_seq_length = update, lambda *_: tokens - 1
            layer.get_mask_sizes = lambda *_: (tokens, 0)
        return layer


def grows(name: Name) -> bool:
    """Return whether a tensor of a cache's layer has one entry for each token."""
    return name[0] in ("keys", "values")


def _tensors(layer: Any) -> Iterator[tuple[Name, Tensor]]:
    """Yield the names and tensors of a layer of transformers' cache, whose first dimension is the rows."""
    for attribute, value in vars(layer).items():
        if isinstance(value, Tensor) and value.dim() > 1:
            yield (attribute, None), value
        elif isinstance(value, dict):
            yield from (((attribute, key), x) for key, x in value.items() if isinstance(x, Tensor) and x.dim() > 1)
