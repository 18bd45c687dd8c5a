"""The interface between a decoder's loop (graph_decoder.py) and the computation of one token of every row.

Two modules implement it: fused_model.py computes a few model types as few large products, and module_model.py calls the
model's own modules. The columns of `state` are the rows that are being decoded (decode_ops.py has its fields); the slot
of a column is the place of its keys, values and recurrent states in memory.

Laws:
- The logits of a row are those of the model's own forward of that row alone, up to rounding.
- `step` reads nothing but `state`, the memory and the weights, and calls nothing that waits for the GPU. So it can be
  captured once as a graph and replayed, while `allocate`, `free` and `refresh` return False.
- Columns that are done, and columns beyond those in use, may be computed, but change no other column's memory. Their
  own keys and values stay as they are; recurrent states do not, so those of a row that goes on later are parked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Unsupported(Exception):
    """The reason why a computation cannot decode, as a clause that follows "because"."""


@dataclass(frozen=True)
class CallSize:
    """The sizes of one call of a decoder."""

    prompts: int
    width: int  # tokens of the longest prompt
    rows: int
    slots: int  # rows that are decoded at once
    columns: int  # of a step; those beyond the slots are never in use
    length: int  # drawn tokens of the longest row


class Computation(Protocol):
    """The computation of one token step, for the model's weights as they are now.

    The order of calls is: `check`; `refresh`; `allocate`; `prefill`; `add_rows` and `first_logits` for rows that begin;
    `step` for every token; `keep_rows`, `park` and `unpark` between tokens; `free`.
    """

    has_states: bool  # whether rows have recurrent states, which every step of their column changes

    def check(self, positions: int) -> None:
        """Raise Unsupported unless rows of `positions` tokens can be decoded with the model as it is now."""

    def addresses(self) -> tuple:
        """Return a value that changes when the model's weights are moved or replaced."""

    def refresh(self, positions: int) -> bool:
        """Take the weights as they are now. Return whether captured graphs have become invalid."""

    def allocate(self, size: CallSize) -> bool:
        """Allocate the memory of a call. Return whether captured graphs have become invalid."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute the prompts."""

    def first_logits(self, prompts: Tensor) -> Tensor:
        """Return the logits [R, V] after the prompts with these numbers [R]."""

    def add_rows(self, state: Tensor) -> None:
        """Start the rows of these columns of the state from their prompts."""

    def keep_rows(self, state: Tensor) -> None:
        """Drop all rows but these columns of the state, which are the first ones from now on."""

    def park(self, slots: Tensor) -> Any:
        """Return copies of the recurrent states of the rows in these slots [R]."""

    def unpark(self, slots: Tensor, parked: Any, index: Tensor) -> None:
        """Put the copies at `index` [R] of what `park` returned into these slots [R]."""

    def step(self, state: Tensor) -> Tensor:
        """Return the logits [R, V] after the newest token of each column of the state."""

    def recorded_experts(self) -> dict[str, Tensor]:
        """Return the fields of `Draws` that hold the experts of the call's tokens; empty if they are not recorded."""

    def free(self) -> bool:
        """Free the memory of a call. Return whether captured graphs have become invalid."""

    def release(self) -> None:
        """Free all memory that is held between calls."""
