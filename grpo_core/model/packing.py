"""Which rows share a forward, and where each of their tokens stands in it: no padding is computed, a prompt once.

A packed forward is one long row of tokens [T]: the prompts, each once for all the rows after one another that share it,
then every completion but its last token, which predicts nothing. Only attention sees rows. In the layout "segments",
which wants a kernel for it, it gathers the keys and values that each completion sees; in the layout "rows" it gathers
queries, keys and values, in buckets of rows of similar length. A model whose attention can do neither gets a "grid"
[R, L], padded on the right, of which the rest of the package notices nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from grpo_core.batch import Rollouts

Layout = Literal["segments", "rows", "grid"]
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

    @cached_property
    def computed(self) -> np.ndarray:
        """The completion tokens that are computed: the last one predicts nothing."""
        return np.maximum(self.completion - 1, 0)

    @cached_property
    def length(self) -> np.ndarray:
        """What attention sees of each."""
        return self.prompt + self.computed


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
class Segments:
    """What attention sees without padding: P prompts among themselves, then R completions with their rows before them.

    Rows that compute no completion token are in no segment but their prompt's.
    """

    spread: Gather  # T tokens -> M keys: of every row its prompt and its completion
    prompts: Tensor  # [P + 1] int32: where each begins among the tokens, and where the last ends
    completions: Tensor  # [R + 1] int32: among the tokens after the prompts
    rows: Tensor  # [R + 1] int32: among the M keys
    longest: tuple[int, int, int]  # of prompts, completions and rows
    shared: int  # tokens that are a prompt's


@dataclass(frozen=True)
class Packing:
    """One forward over some rows of a batch."""

    rows: Tensor  # [b] of the batch
    source: Tensor  # [T] where each token stands in the rows' prompt_ids | completion_ids, flattened
    positions: Tensor  # [T]
    predictors: Gather  # T hidden states -> the n that predict a completion token
    places: Tensor  # [n] of those in [b, C], flattened
    attention: AttentionRows | Segments | None  # None: a grid
    mask: Tensor | None  # [R, L] bool of a grid
    tokens: int  # T


@dataclass(frozen=True)
class Plan:
    """The forwards that some rows of rollouts divide into, each laid out when its turn comes."""

    rollouts: Rollouts
    shapes: Shapes
    forwards: list[list[int]]  # rows
    layout: Layout

    def __len__(self) -> int:
        return len(self.forwards)

    def __iter__(self) -> Iterator[Packing]:
        return (pack(self.rollouts, self.shapes, rows, self.layout) for rows in self.forwards)


def plan(rollouts: Rollouts, budget: Budget, rows: Sequence[int] | None = None, layout: Layout = "rows") -> Plan:
    """Divide `rows` (default: all) into as few forwards as `budget` allows. Reads the device once."""
    shapes = survey(rollouts)
    forwards = fill(shapes, range(len(rollouts)) if rows is None else rows, budget, layout)
    return Plan(rollouts, shapes, forwards, layout)


def survey(rollouts: Rollouts) -> Shapes:
    """The rows' shapes, in one transfer from the device."""
    mask, ids = rollouts.prompt_mask, rollouts.prompt_ids
    same = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    same[1:] = ((ids[1:] == ids[:-1]) & (mask[1:] == mask[:-1])).all(dim=1)
    start = (mask.cumsum(dim=1) == 0).sum(dim=1)
    rows = torch.stack([start, mask.sum(dim=1), rollouts.lengths(), (~same).cumsum(dim=0)])
    return Shapes(*rows.cpu().numpy())


def fill(shapes: Shapes, rows: Sequence[int], budget: Budget, layout: Layout = "rows") -> list[list[int]]:
    """Divide `rows` into as few forwards as the budget allows, longest first; a row that is too long gets its own.

    A group stays together where it fits, so that its prompt is computed once.
    """
    forwards: list[_Forward] = []
    units = _units(shapes, np.asarray(rows, dtype=np.int64), budget, layout)
    for unit in sorted(units, key=lambda unit: -shapes.length[unit].max()):
        if not any(one.takes(unit) for one in forwards):
            forwards.append(_Forward(shapes, budget, layout))
            forwards[-1].add(unit)
    return [sorted(one.rows) for one in forwards]


def _units(shapes: Shapes, rows: np.ndarray, budget: Budget, layout: Layout) -> Iterator[np.ndarray]:
    """What stays together: of a grid the single row, else a group, or as much of it as fits."""
    if layout == "grid" or len(rows) == 0:
        yield from rows[:, None]
        return
    for group in np.split(rows, np.flatnonzero(np.diff(shapes.group[rows])) + 1):
        part, begin = _Forward(shapes, budget, layout), 0
        for i in [] if part.takes(group) else range(len(group)):
            if not part.takes(group[i : i + 1]):
                yield from [group[begin:i]] if i > begin else []
                part, begin = _Forward(shapes, budget, layout), i
                part.add(group[i : i + 1])
        yield group[begin:]


class _Forward:
    """The rows of one forward, added unit by unit, the longest first. The rows of a unit share one prompt."""

    def __init__(self, shapes: Shapes, budget: Budget, layout: Layout) -> None:
        self.shapes, self.budget, self.layout = shapes, budget, layout
        self.rows: list[int] = []
        self.groups: set[int] = set()
        self.tokens = self.places = 0  # that are computed; of attention's rows, without their padding

    def takes(self, unit: np.ndarray) -> bool:
        """Add `unit` if it fits."""
        budget, length = self.budget, self.shapes.length
        if self.layout == "grid":
            fits = (len(self.rows) + 1) * length[[*self.rows[:1], *unit]].max() <= min(budget.tokens, budget.places)
        else:
            fits = self.tokens + self._tokens(unit) <= budget.tokens
            least = self.places + length[unit].sum()  # and in rows at most 1 / RAGGED of it
            fits = fits and least <= budget.places
            if fits and self.layout == "rows" and least > RAGGED * budget.places:
                fits = sum(len(rows) * width for rows, width in _buckets(length[[*self.rows, *unit]])) <= budget.places
        if fits:
            self.add(unit)
        return bool(fits)

    def add(self, unit: np.ndarray) -> None:
        self.tokens += self._tokens(unit)
        self.places += self.shapes.length[unit].sum()
        self.groups.add(self.shapes.group[unit[0]])
        self.rows += unit.tolist()

    def _tokens(self, unit: np.ndarray) -> int:
        """What it adds: its completions, and the prompt that it shares unless that is here."""
        own = self.shapes.computed[unit].sum()
        return own if self.shapes.group[unit[0]] in self.groups else own + self.shapes.prompt[unit[0]]


def _buckets(length: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of similar length, longest first: (which, the longest of them)."""
    order = np.argsort(-length, kind="stable")
    while len(order):
        width = int(length[order[0]])
        count = int((length[order] > RAGGED * width).sum()) if width else len(order)
        yield order[:count], width
        order = order[count:]


def pack(rollouts: Rollouts, shapes: Shapes, rows: Sequence[int], layout: Layout) -> Packing:
    """Lay out one forward over `rows`, ascending, of the rollouts that `shapes` describes."""
    device, width = rollouts.completion_ids.device, rollouts.completion_ids.shape[1]
    prompt, length, predicted = shapes.prompt[rows], shapes.length[rows], shapes.completion[rows]
    lay = _grid if layout == "grid" else _rows if layout == "rows" else _segments
    row, place = _counted(length)  # of every token of every row: its row and its place there
    token, size, attention, mask = lay(prompt, length, shapes.group[rows], row, place, device)
    source, positions = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    wide = rollouts.prompt_ids.shape[1]
    column = np.where(place < prompt[row], shapes.start[rows][row] + place, wide + place - prompt[row])
    source[token], positions[token] = row * (wide + width) + column, place
    which, nth = _counted(predicted)
    return Packing(
        rows=_on(device, np.asarray(rows)),
        source=_on(device, source),
        positions=_on(device, positions),
        predictors=gather(token[(np.cumsum(length) - length + prompt - 1)[which] + nth], size, device),
        places=_on(device, which * width + nth),
        attention=attention,
        mask=mask,
        tokens=size,
    )


def _counted(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0 for counts[0] times, 1 for counts[1] times, ...; and beside it 0, 1, ... anew for each."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - (np.cumsum(counts) - counts)[which]


def _packed(
    prompt: np.ndarray, length: np.ndarray, group: np.ndarray, row: np.ndarray, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which token each place of each row is; the prompts' tokens, 0 for a row that shares one; the completions'."""
    leader = np.searchsorted(group, group, side="left")  # the first of the rows here that share a prompt
    shared, completion = prompt * (leader == np.arange(len(group))), length - prompt
    prompts, completions = np.cumsum(shared) - shared, shared.sum() + np.cumsum(completion) - completion
    token = np.where(place < prompt[row], prompts[leader][row] + place, (completions - prompt)[row] + place)
    return token, shared, completion


def _segments(
    prompt: np.ndarray, length: np.ndarray, group: np.ndarray, row: np.ndarray, place: np.ndarray, device: torch.device
) -> tuple[np.ndarray, int, Segments, None]:
    token, shared, completion = _packed(prompt, length, group, row, place)
    size, real = int(shared.sum() + completion.sum()), completion > 0
    parts = shared[shared > 0], completion[real], length[real]
    prompts, completions, rows = (
        _on(device, np.concatenate([[0], np.cumsum(part)]).astype(np.int32)) for part in parts
    )
    longest = (int(parts[0].max(initial=0)), int(parts[1].max(initial=0)), int(parts[2].max(initial=0)))
    spread = gather(token[real[row]], size, device)
    return token, size, Segments(spread, prompts, completions, rows, longest, int(shared.sum())), None


def _rows(
    prompt: np.ndarray, length: np.ndarray, group: np.ndarray, row: np.ndarray, place: np.ndarray, device: torch.device
) -> tuple[np.ndarray, int, AttentionRows, None]:
    token, shared, completion = _packed(prompt, length, group, row, place)
    size, first, tables, buckets = int(shared.sum() + completion.sum()), np.cumsum(length) - length, [], []
    for which, width in _buckets(length):
        real = np.arange(width) < length[which][:, None]
        table = np.full(real.shape, -1)
        table[real] = token[(first[which][:, None] + np.arange(width))[real]]
        tables.append(table.ravel())
        buckets.append((len(which), width))
    index = np.concatenate(tables)
    back = np.empty(size, dtype=np.int64)
    back[index[index >= 0][::-1]] = np.flatnonzero(index >= 0)[::-1]  # the first place of each
    return token, size, AttentionRows(gather(index, size, device), tuple(buckets), _on(device, back)), None


def _grid(
    prompt: np.ndarray, length: np.ndarray, group: np.ndarray, row: np.ndarray, place: np.ndarray, device: torch.device
) -> tuple[np.ndarray, int, None, Tensor]:
    mask = np.arange(length.max()) < length[:, None]
    return row * mask.shape[1] + place, mask.size, None, _on(device, mask)


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
