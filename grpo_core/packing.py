"""Which rows share a forward, and where each of their tokens stands in it: no padding is computed, a prompt once.

A packed forward is one long row of tokens [T]: the prompts, each once for all the rows after one another that share it,
then every completion but its last token, which predicts nothing. Only attention sees rows: it gathers their queries,
keys and values from the tokens, in buckets of rows of similar length. A model whose attention cannot do that gets a
grid [R, L], padded on the right, of which the rest of the package notices nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_core.batch import Rollouts

RAGGED = 0.6  # a row shorter than this share of its bucket's longest begins another bucket


@dataclass(frozen=True)
class Budget:
    """How much one forward may hold."""

    tokens: float  # that are computed
    places: float = float("inf")  # of attention's padded rows; for a grid the tokens bound these too


@dataclass(frozen=True)
class Shapes:
    """Of every row, [B] on the host."""

    start: np.ndarray  # the prompt's first column
    prompt: np.ndarray  # its tokens
    completion: np.ndarray  # its tokens
    group: np.ndarray  # rows after one another with the same prompt have the same number

    def computed(self) -> np.ndarray:
        """The completion tokens that are computed: the last one predicts nothing."""
        return np.maximum(self.completion - 1, 0)


@dataclass(frozen=True)
class Gather:
    """x [T, ...] -> x[index] [M, ...], whose backward adds up in a fixed order what was read more than once."""

    index: Tensor  # [M]
    once: tuple[Tensor, Tensor]  # tokens that are read once, and where they went, [K] each
    shared: tuple[tuple[Tensor, Tensor], ...]  # tokens that are read S times [K], and where they went [K, S]
    size: int  # T

    def __call__(self, x: Tensor) -> Tensor:
        return _Gathered.apply(x, self)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, gather: Gather) -> Tensor:
        context.gather = gather
        return x.index_select(0, gather.index)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None]:
        gather = context.gather
        out = grad.new_zeros(gather.size, *grad.shape[1:])
        token, place = gather.once
        out.index_copy_(0, token, grad.index_select(0, place))
        for token, place in gather.shared:
            parts = grad.index_select(0, place.flatten()).view(*place.shape, *grad.shape[1:])
            out.index_copy_(0, token, parts.sum(dim=1))
        return out, None


@dataclass(frozen=True)
class AttentionRows:
    """The rows that attention sees: [R, L] for every bucket, one after another, M places in all."""

    spread: Gather  # T tokens -> M places
    buckets: tuple[tuple[int, int], ...]  # R, L
    back: Tensor  # [T] a place of every token


@dataclass(frozen=True)
class Packing:
    """One forward over some rows of a batch."""

    rows: Tensor  # [b] of the batch
    source: Tensor  # [T] where each token stands in the rows' prompt_ids | completion_ids, flattened
    positions: Tensor  # [T]
    predictors: Gather  # T hidden states -> the n that predict a completion token
    places: Tensor  # [n] of those in [b, C], flattened
    attention: AttentionRows | None  # None: a grid
    mask: Tensor | None  # [R, L] bool of a grid
    tokens: int  # T


@dataclass(frozen=True)
class Plan:
    """The forwards that some rows of rollouts divide into, each laid out when its turn comes."""

    rollouts: Rollouts
    shapes: Shapes
    forwards: list[list[int]]  # rows
    grid: bool

    def __len__(self) -> int:
        return len(self.forwards)

    def __iter__(self) -> Iterator[Packing]:
        return (pack(self.rollouts, self.shapes, rows, grid=self.grid) for rows in self.forwards)


def plan(rollouts: Rollouts, budget: Budget, rows: Sequence[int] | None = None, *, grid: bool = False) -> Plan:
    """Divide `rows` (default: all) into as few forwards as `budget` allows. Reads the device once."""
    shapes = survey(rollouts)
    return Plan(
        rollouts,
        shapes,
        fill(shapes, range(len(rollouts)) if rows is None else rows, budget, grid=grid),
        grid,
    )


def survey(rollouts: Rollouts) -> Shapes:
    """The rows' shapes, in one transfer from the device."""
    mask, ids = rollouts.prompt_mask, rollouts.prompt_ids
    same = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    same[1:] = ((ids[1:] == ids[:-1]) & (mask[1:] == mask[:-1])).all(dim=1)
    start = (mask.cumsum(dim=1) == 0).sum(dim=1)
    rows = torch.stack([start, mask.sum(dim=1), rollouts.lengths(), (~same).cumsum(dim=0)])
    return Shapes(*rows.cpu().numpy())


def fill(shapes: Shapes, rows: Sequence[int], budget: Budget, *, grid: bool = False) -> list[list[int]]:
    """Divide `rows` into as few forwards as the budget allows, longest first; a row that is too long gets its own.

    A group stays together where it fits, so that its prompt is computed once.
    """
    length = shapes.prompt + shapes.computed()
    if grid:
        units = [[row] for row in rows]
    else:
        units = []
        for row in rows:
            together = bool(units) and shapes.group[units[-1][0]] == shapes.group[row]
            if together and _fits(shapes, [*units[-1], row], budget, grid):
                units[-1].append(row)
            else:
                units.append([row])
    least = length if grid else shapes.computed()  # what a row adds at least
    bins: list[list[int]] = []
    held: list[int] = []  # what each holds at least: most that are full are told by it
    for unit in sorted(units, key=lambda unit: -max(length[unit])):
        more = int(least[unit].sum())
        for i, one in enumerate(bins):
            if held[i] + more <= budget.tokens and _fits(shapes, one + unit, budget, grid):
                one.extend(unit)
                held[i] += more
                break
        else:
            bins.append(list(unit))
            held.append(int(length[unit[0]]) + more - int(least[unit[0]]))
    return [sorted(one) for one in bins]


def _fits(shapes: Shapes, rows: list[int], budget: Budget, grid: bool) -> bool:
    length = (shapes.prompt + shapes.computed())[rows]
    if grid:
        return len(rows) * length.max() <= min(budget.tokens, budget.places)
    _, leaders = np.unique(shapes.group[rows], return_index=True)
    tokens = shapes.prompt[rows][leaders].sum() + shapes.computed()[rows].sum()
    places = sum(len(rows) * width for rows, width in _buckets(length))
    return tokens <= budget.tokens and places <= budget.places


def _buckets(length: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of similar length, longest first: (which, the longest of them)."""
    order = np.argsort(-length, kind="stable")
    while len(order):
        width = int(length[order[0]])
        count = int((length[order] > RAGGED * width).sum()) if width else len(order)
        yield order[:count], width
        order = order[count:]


def pack(rollouts: Rollouts, shapes: Shapes, rows: Sequence[int], *, grid: bool = False) -> Packing:
    """Lay out one forward over `rows`, ascending, of the rollouts that `shapes` describes."""
    device, width = rollouts.completion_ids.device, rollouts.completion_ids.shape[1]
    prompt, completion = shapes.prompt[rows], shapes.computed()[rows]
    lay = _grid if grid else _packed
    # of every row: where its tokens stand among the T
    tokens, size, attention, mask = lay(prompt, completion, shapes.group[rows], device)
    source, positions = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    predictors, places = [], []
    for i, row in enumerate(rows):
        p, c = int(prompt[i]), int(completion[i])
        first = i * (rollouts.prompt_ids.shape[1] + width)
        source[tokens[i][:p]] = first + shapes.start[row] + np.arange(p)
        source[tokens[i][p:]] = first + rollouts.prompt_ids.shape[1] + np.arange(c)
        positions[tokens[i]] = np.arange(p + c)
        n = int(shapes.completion[row])
        predictors.append(tokens[i][p - 1 : p - 1 + n])
        places.append(i * width + np.arange(n))
    return Packing(
        rows=_on(device, np.asarray(rows)),
        source=_on(device, source),
        positions=_on(device, positions),
        predictors=gather(np.concatenate(predictors), size, device),
        places=_on(device, np.concatenate(places)),
        attention=attention,
        mask=mask,
        tokens=size,
    )


def _packed(
    prompt: np.ndarray, completion: np.ndarray, group: np.ndarray, device: torch.device
) -> tuple[list[np.ndarray], int, AttentionRows, None]:
    leader = np.searchsorted(group, group, side="left")  # the first of the rows here that share a prompt
    leads = leader == np.arange(len(group))
    prompts = np.cumsum(prompt * leads) - prompt * leads
    completions = (prompt * leads).sum() + np.cumsum(completion) - completion
    tokens = [
        np.concatenate([prompts[leader[i]] + np.arange(prompt[i]), completions[i] + np.arange(completion[i])])
        for i in range(len(group))
    ]
    size = int((prompt * leads).sum() + completion.sum())
    places, buckets = [], []
    for which, width in _buckets(prompt + completion):
        table = np.full((len(which), width), -1)
        for line, i in zip(table, which, strict=True):
            line[: len(tokens[i])] = tokens[i]
        places.append(table.ravel())
        buckets.append((len(which), width))
    index = np.concatenate(places)
    back = np.empty(size, dtype=np.int64)
    back[index[index >= 0][::-1]] = np.flatnonzero(index >= 0)[::-1]  # the first place of each
    return tokens, size, AttentionRows(gather(index, size, device), tuple(buckets), _on(device, back)), None


def _grid(
    prompt: np.ndarray, completion: np.ndarray, group: np.ndarray, device: torch.device
) -> tuple[list[np.ndarray], int, None, Tensor]:
    length, width = prompt + completion, int((prompt + completion).max())
    tokens = [i * width + np.arange(length[i]) for i in range(len(group))]
    mask = np.arange(width) < length[:, None]
    return tokens, mask.size, None, _on(device, mask)


def gather(index: np.ndarray, size: int, device: torch.device) -> Gather:
    """The gathering x -> x[index] of `size` tokens; -1 reads anything and gets no gradient."""
    real = np.flatnonzero(index >= 0)
    order = real[np.argsort(index[real], kind="stable")]
    counts = np.bincount(index[real], minlength=size)
    starts = np.cumsum(counts) - counts
    once = np.flatnonzero(counts == 1)
    shared = []
    for times in np.unique(counts[counts > 1]):
        tokens = np.flatnonzero(counts == times)
        shared.append((_on(device, tokens), _on(device, order[starts[tokens][:, None] + np.arange(times)])))
    return Gather(
        index=_on(device, np.maximum(index, 0)),
        once=(_on(device, once), _on(device, order[starts[once]])),
        shared=tuple(shared),
        size=size,
    )


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    """To the device, without waiting for what runs there."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
