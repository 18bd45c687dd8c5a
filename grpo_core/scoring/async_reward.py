"""Call an async reward of this process beside the other rewards, with a time limit."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from grpo_core.objective.rewards import takes_groups
from grpo_core.schema import unwrap
from grpo_core.scoring.event_loop import forget_shared_loop, shared_loop
from grpo_core.scoring.reward_call import RewardOutcome, call_reward, collect_outcome, failed_outcome

CANCEL_TIMEOUT = 1.0  # seconds for the loop to take new work after a reward was cancelled


def is_async(function: Callable) -> bool:
    """Return whether `function` is defined with async def; it may be a partial or a callable object."""
    return inspect.iscoroutinefunction(unwrap(function))


class AsyncReward:
    """An async reward on the event loop of this process: `submit` a batch, then wait for its `result`."""

    def __init__(self, function: Callable, timeout: float) -> None:
        """Call `function` with every batch; it may take `timeout` seconds."""
        self.function, self.timeout = function, timeout
        self._future: Future[Any] | None = None

    def submit(self, completions: list[str], columns: dict[str, Any], group_size: int = 1) -> None:
        """Start the call for a batch."""
        self._group_size = group_size if takes_groups(self.function) else None
        self._count, self._deadline = len(completions), time.monotonic() + self.timeout
        self._future = shared_loop().start(self._call(completions, columns, group_size))

    def result(self) -> RewardOutcome:
        """Return the outcome of the submitted batch; a failure on all completions beyond the time limit."""
        assert self._future is not None, "submit comes first"
        if wait([self._future], timeout=max(0.0, self._deadline - time.monotonic())).done:
            return collect_outcome(self._future.result, self._count, self._group_size)
        self.close()
        if not shared_loop().responds(CANCEL_TIMEOUT):
            forget_shared_loop()  # the call blocks the loop, and a thread cannot be ended
        return failed_outcome(self._count, f"took more than {self.timeout:g} s")

    def close(self) -> None:
        """Cancel the call that is running, if there is one."""
        if self._future is not None:
            self._future.cancel()

    async def _call(self, completions: list[str], columns: dict[str, Any], group_size: int) -> Any:
        return await call_reward(self.function, completions, columns, group_size)
