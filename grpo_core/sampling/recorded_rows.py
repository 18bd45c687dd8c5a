"""Rows of the plain decoder whose routers' choices of experts are recorded."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.model.routing import Routers
from grpo_core.sampling.live_rows import LiveRows


class RecordedRows:
    """Rows that grow as others do, and keep the experts of the tokens that were computed last.

    `prompt_experts` [N, P, L, k] are those of the prompts, after `prefill`, and `newest_experts` [rows, L, k] those of
    the token that was appended last.
    """

    def __init__(self, rows: LiveRows, routers: Routers) -> None:
        self.rows, self.routers = rows, routers
        self.prompt_experts = self.newest_experts = torch.empty(0)

    def prefill(self) -> Tensor:
        """Return the logits [N, V] after the prompts."""
        routed = self.routers.begin()
        with routed.active():
            logits = self.rows.prefill()
        self.prompt_experts = routed.own_experts().unflatten(0, (len(logits), -1))
        return logits

    def select(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, in this order."""
        self.rows.select(indices)

    def append(self, tokens: Tensor) -> Tensor:
        """Return the logits [rows, V] after one more token [rows] of each row."""
        routed = self.routers.begin()
        with routed.active():
            logits = self.rows.append(tokens)
        self.newest_experts = routed.own_experts().unflatten(0, (len(tokens), -1))[:, -1]
        return logits
