"""The experts of a call's tokens, in tables that a captured graph can write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_core.model.routing import Routers
from grpo_core.sampling.computation import CallSize
from grpo_core.sampling.decode_ops import DONE, DRAWN, ROW


class ExpertTable:
    """The experts [B, C, L, k] of drawn tokens, and [N, P, L, k] of prompts padded on the left.

    A row's last token has none, because it is not computed. Place 0 of the table is written by columns that are done.
    """

    def __init__(self, routers: Routers, device: torch.device) -> None:
        self.routers, self._size, self._width = routers, CallSize(0, 0, 0, 0, 0, 0), torch.zeros((), device=device)
        self.release()

    def release(self) -> None:
        """Free the memory."""
        self._prompts = self._memory = self._width.new_zeros(0, dtype=self.routers.dtype)

    def allocate(self, size: CallSize) -> bool:
        """Allocate the tables of a call. Return whether the table of drawn tokens is another piece of memory."""
        self._size, shape = size, (len(self.routers), self.routers.top_k)
        self._prompts = self._memory.new_zeros(size.prompts, size.width, *shape)
        self._width.fill_(size.length)  # read by captured graphs
        is_moved = len(self._memory) <= size.rows * size.length
        if is_moved:
            self._memory = self._memory.new_zeros(1 + size.rows * size.length, *shape)
        self._memory.zero_()
        return is_moved

    def store_prompts(self, prompts: Sequence[int], experts: Tensor) -> None:
        """Store the experts [n * w, L, k] of the n prompts with these numbers, which are padded on the left to w."""
        experts = experts.unflatten(0, (len(prompts), -1))
        self._prompts[torch.tensor(prompts, device=self._prompts.device), -experts.shape[1] :] = experts

    def store(self, state: Tensor, experts: Tensor) -> None:
        """Store the experts [R, L, k] of the newest token of each column of the state."""
        place = 1 + state[ROW] * self._width.long() + state[DRAWN] - 1
        self._memory[torch.where(state[DONE] == 1, 0, place)] = experts

    def recorded(self) -> dict[str, Tensor]:
        """Return the tables as `Draws` has them, [B, P, L, k] and [B, C, L, k]."""
        size = self._size
        drawn = self._memory[1 : 1 + size.rows * size.length].unflatten(0, (size.rows, size.length))
        prompts = self._prompts.repeat_interleave(size.rows // size.prompts, dim=0)
        return {"prompt_routed_experts": prompts, "routed_experts": drawn}
