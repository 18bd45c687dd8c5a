"""What crosses the borders between rooms: a task, what the sampler made of it, and what the loss reads.

Rows are prompt-major: completions n*G .. n*G + G-1 belong to prompt n. Column t of every [B, C] tensor is completion
token t, so nothing outside policy.py ever shifts by one. Two prompts, G = 1, the second completion cut off:

    prompt_ids       [[0, 5, 6], [7, 8, 9]]     prompt_mask      [[0, 1, 1], [1, 1, 1]]
    completion_ids   [[4, 2, 0], [4, 4, 4]]     completion_mask  [[1, 1, 0], [1, 1, 1]]     2 ends a completion
    truncated        [False, True]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One row of the data set, ready to be sampled from."""

    index: int  # row in the data set
    prompt: str
    prompt_ids: list[int]
    columns: dict[str, Any]  # what the rewards may read
    seed: tuple[int, ...] = (0,)  # entropy of its completions: (run seed, step, position in the step)


@dataclass(frozen=True)
class Rollouts:
    """Completions as the sampler drew them. Masks come from here and never from ids."""

    prompt_ids: Tensor  # [B, P] padded on either side
    prompt_mask: Tensor  # [B, P] bool
    completion_ids: Tensor  # [B, C] padded on the right
    completion_mask: Tensor  # [B, C] bool, true up to and including the end-of-sequence token that the policy chose
    rollout_logprobs: Tensor  # [B, C] float32, as the sampler drew them; 0 where masked
    truncated: Tensor  # [B] bool, no end-of-sequence token within the allowed length
    completions: tuple[str, ...] = ()  # B texts, where the maker decoded them

    def __post_init__(self) -> None:
        rows, width = self.completion_ids.shape
        assert self.prompt_ids.shape == self.prompt_mask.shape and len(self.prompt_ids) == rows
        assert self.completion_mask.shape == self.rollout_logprobs.shape == (rows, width)
        assert self.truncated.shape == (rows,) and len(self.completions) in (0, rows)
        assert self.completion_mask.dtype == self.prompt_mask.dtype == torch.bool

    def __len__(self) -> int:
        return len(self.completion_ids)

    def lengths(self) -> Tensor:
        """Completion tokens of each row, [B]."""
        return self.completion_mask.sum(dim=1)


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen.

    The last three cut the distribution off, and the log-probs are then those of what is left; training allows none of
    them (config_check.py says why).
    """

    temperature: float = 1.0
    greedy: bool = False
    top_k: int | None = None  # the k most probable tokens, and those as probable as the k-th
    top_p: float | None = None  # the fewest tokens that hold this much probability. arXiv:1904.09751
    min_p: float | None = None  # tokens with at least this share of the most probable one's. arXiv:2407.01082

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be above 0, or use greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; it must be above 0 and at most 1")

    @property
    def restricted(self) -> bool:
        """Whether any of them is set."""
        return not (self.top_k is None and self.top_p is None and self.min_p is None)


@dataclass(frozen=True)
class TrainBatch:
    """Rollouts with everything the loss compares against, fixed before the first gradient."""

    rollouts: Rollouts
    advantages: Tensor  # [B, 1]
    loss_mask: Tensor  # [B, C] bool, completion tokens that are trained
    surrogate_mask: Tensor | None = None  # [B, C] bool, those of them that the surrogate acts on; None: all
    old_logprobs: Tensor | None = None  # [B, C]; None when the batch is used once, where they equal the policy's own
    ref_logprobs: Tensor | None = None  # [B, C]; None when the loss has no KL of theirs

    def __post_init__(self) -> None:
        shape = self.rollouts.completion_ids.shape
        assert self.advantages.shape == (len(self.rollouts), 1) and self.loss_mask.shape == shape
        rest = (self.surrogate_mask, self.old_logprobs, self.ref_logprobs)
        assert all(x is None or x.shape == shape for x in rest)

    def __len__(self) -> int:
        return len(self.rollouts)

    def minibatches(self, count: int, passes: int, group_size: int, generator: torch.Generator) -> Iterator[TrainBatch]:
        """`passes` passes over the rows in `count` equal parts, one optimizer step each.

        A part holds the same shuffled share of every group's samples: it does not depend on the number of ranks.
        """
        for _ in range(passes):
            if count == 1:
                yield self
                continue
            rows = torch.arange(len(self)).view(-1, group_size)
            for samples in torch.randperm(group_size, generator=generator).chunk(count):
                yield take(self, rows[:, samples].flatten())


def replace_rows(rollouts: Rollouts, rows: Tensor, others: Rollouts) -> Rollouts:
    """`rollouts` with `others` in the places `rows` [len(others)]; the narrower of the two is padded."""

    def put(name: str, left: bool) -> Tensor:
        ours, theirs = getattr(rollouts, name), getattr(others, name)
        width = max(ours.shape[1], theirs.shape[1])
        ours, theirs = (F.pad(x, (width - x.shape[1], 0) if left else (0, width - x.shape[1])) for x in (ours, theirs))
        ours = ours.clone()
        ours[rows.to(ours.device)] = theirs
        return ours

    truncated, texts = rollouts.truncated.clone(), list(rollouts.completions)
    truncated[rows.to(truncated.device)] = others.truncated
    for row, text in zip(rows.tolist(), others.completions, strict=True):
        texts[row] = text
    wide = {"prompt_ids": True, "prompt_mask": True}
    wide |= {"completion_ids": False, "completion_mask": False, "rollout_logprobs": False}
    return Rollouts(**{n: put(n, left) for n, left in wide.items()}, truncated=truncated, completions=tuple(texts))


Batch = TypeVar("Batch", Rollouts, TrainBatch)


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """Consecutive micro-batches of at most `size` rows."""
    for start in range(0, len(batch), size):
        yield take(batch, torch.arange(start, min(start + size, len(batch))))


def take(batch: Batch, rows: Tensor) -> Batch:
    """The same rows of every field."""

    def pick(value: Any) -> Any:
        if value is None or value == ():
            return value
        if isinstance(value, Tensor):
            return value[rows.to(value.device)]
        return tuple(value[i] for i in rows.tolist()) if isinstance(value, tuple) else take(value, rows)

    return type(batch)(**{f.name: pick(getattr(batch, f.name)) for f in fields(batch)})
