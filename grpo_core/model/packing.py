"""Divide the rows of a batch into forwards, and lay out each forward without padding and with every prompt once.

A packed forward is one long row of T tokens: first the prompts, each once for all consecutive rows that share it, then
the completions without their last tokens, which predict nothing. Tokens that an environment gave are computed as the
others are, but nothing is predicted for them. Only attention needs rows:

- layout "segments", for GPUs with a kernel for segments of any length: each completion gathers the keys and values of
  its prompt and of itself.
- layout "rows": queries, keys and values are gathered into buckets of rows of similar length.
- layout "grid" [R, L], padded on the right, for models whose attention cannot be packed.
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
from grpo_core.model.rotation import Rotations, split_by_rotation

Layout = Literal["segments", "rows", "grid"]
MIN_LENGTH_SHARE = 0.6  # rows shorter than this share of their bucket's longest row start another bucket


@dataclass(frozen=True)
class Budget:
    """The largest size of one forward."""

    tokens: float  # that are computed
    attention_tokens: float = float("inf")  # of the rows that attention sees, padding included; bounds a grid too


@dataclass(frozen=True)
class RowShapes:
    """The shape of every row of a batch, [B] arrays on the host."""

    start: np.ndarray  # first column of the prompt
    prompt: np.ndarray  # tokens of the prompt
    completion: np.ndarray  # tokens of the completion
    group: np.ndarray  # consecutive rows with the same prompt have the same number
    predicted: np.ndarray | None = None  # [B, C] bool, tokens that are predicted; None: all tokens of completions

    @cached_property
    def computed(self) -> np.ndarray:
        """The completion tokens that are computed: all but the last one, which predicts nothing."""
        return np.maximum(self.completion - 1, 0)

    @cached_property
    def length(self) -> np.ndarray:
        """The tokens of each row that attention sees."""
        return self.prompt + self.computed


@dataclass(frozen=True)
class Gather:
    """The operation x [T, ...] -> x[index] [M, ...]; its backward sums repeated tokens in a fixed order."""

    index: Tensor  # [M]
    single: tuple[Tensor, Tensor]  # tokens that are read once, and their places among the M, [K] each
    repeated: tuple[tuple[Tensor, Tensor], ...]  # for each S > 1: tokens read S times [K], and their places [K, S]
    size: int  # T

    def __call__(self, x: Tensor) -> Tensor:
        return _GatherFunction.apply(x, self)


class _GatherFunction(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, gather: Gather) -> Tensor:
        context.gather = gather
        return x.index_select(0, gather.index)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None]:
        gather = context.gather
        out = grad.new_zeros(gather.size, *grad.shape[1:])
        token, place = gather.single
        out.index_copy_(0, token, grad.index_select(0, place))
        for token, place in gather.repeated:
            parts = grad.index_select(0, place.flatten()).view(*place.shape, *grad.shape[1:])
            out.index_copy_(0, token, parts.sum(dim=1))
        return out, None


@dataclass(frozen=True)
class AttentionRows:
    """The padded rows that attention sees in the layout "rows": consecutive buckets [R, L], M places in total."""

    spread: Gather  # T tokens -> M places
    buckets: tuple[tuple[int, int], ...]  # (R, L)
    back: Tensor  # [T] the place of one copy of every token


@dataclass(frozen=True)
class Segments:
    """The segments that attention sees in the layout "segments".

    There are P prompts, each of which attends to itself, and R completions, each of which attends to its row: the
    prompt and the completion. A row without computed completion tokens has only its prompt's segment. Offsets are
    cumulative lengths, int32: segment i is the range offsets[i] : offsets[i + 1].
    """

    spread: Gather  # T tokens -> M keys: the prompt and the completion of every row
    prompt_offsets: Tensor  # [P + 1] among the T tokens
    completion_offsets: Tensor  # [R + 1] among the tokens after the prompts
    row_offsets: Tensor  # [R + 1] among the M keys
    max_lengths: tuple[int, int, int]  # of prompts, completions and rows
    num_prompt_tokens: int  # the first tokens of the T; all prompts together


@dataclass(frozen=True)
class Packing:
    """The layout of one forward over some rows of a batch: T tokens, of which n predict a token that was drawn."""

    rows: Tensor  # [b] indices of the rows in the batch
    source: Tensor  # [T] index of every token in the rows' [prompt_ids, completion_ids], flattened
    positions: Tensor  # [T]
    predictors: Gather  # T hidden states -> the n that predict a token that the policy drew
    predicted: Tensor  # [n] index of the predicted tokens in the rows' completion_ids [b, C], flattened
    attention: AttentionRows | Segments | None  # None: a grid
    mask: Tensor | None  # [R, L] bool of a grid
    tokens: int  # T
    row_tokens: tuple[np.ndarray, np.ndarray]  # every token of every row: which of the b rows, which of the T tokens
    predict_given: bool = True  # whether tokens that an environment gave are predicted too, if there are any

    def members(self) -> Tensor:
        """Return 1 where a token belongs to a row, else 0, [b, T] float32. Rows may share the tokens of a prompt."""
        members = np.zeros((len(self.rows), self.tokens), dtype=np.float32)
        members[self.row_tokens] = 1.0
        return _to_device(self.rows.device, members)


@dataclass(frozen=True)
class Plan:
    """The forwards into which rows of rollouts are divided. Iterating over a plan lays out one forward at a time."""

    rollouts: Rollouts
    shapes: RowShapes
    forwards: list[list[int]]  # row indices of each forward
    layout: Layout

    def __len__(self) -> int:
        return len(self.forwards)

    def __iter__(self) -> Iterator[Packing]:
        return (pack(self.rollouts, self.shapes, rows, self.layout) for rows in self.forwards)


def plan(
    rollouts: Rollouts,
    budget: Budget,
    rows: Sequence[int] | None = None,
    layout: Layout = "rows",
    rotations: Rotations | None = None,
    *,
    predict_given: bool = False,
) -> Plan:
    """Divide `rows` (default: all) into as few forwards as `budget` allows. Reads the device once.

    Rows with different `rotations` never share a forward. With `predict_given`, the tokens that an environment gave
    are predicted like those that the policy drew.
    """
    shapes, rows = measure_rows(rollouts, predict_given=predict_given), range(len(rollouts)) if rows is None else rows
    parts = split_by_rotation(rows, shapes.length, rotations.key) if rotations else [rows]
    forwards = [forward for part in parts for forward in divide_rows(shapes, part, budget, layout)]
    return Plan(rollouts, shapes, forwards, layout)


def measure_rows(rollouts: Rollouts, *, predict_given: bool = False) -> RowShapes:
    """Return the shapes of all rows, with one transfer from the device, or two if some of their tokens were given."""
    mask, ids = rollouts.prompt_mask, rollouts.prompt_ids
    same = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    same[1:] = ((ids[1:] == ids[:-1]) & (mask[1:] == mask[:-1])).all(dim=1)
    start = (mask.cumsum(dim=1) == 0).sum(dim=1)
    shapes = torch.stack([start, mask.sum(dim=1), rollouts.valid_lengths(), (~same).cumsum(dim=0)])
    has_given = rollouts.valid_mask is not None and not predict_given
    predicted = rollouts.completion_mask.cpu().numpy() if has_given else None
    start, prompts, completions, groups = shapes.cpu().numpy()
    return RowShapes(start, prompts, completions, groups, predicted)


def divide_rows(shapes: RowShapes, rows: Sequence[int], budget: Budget, layout: Layout = "rows") -> list[list[int]]:
    """Divide `rows` into as few forwards as the budget allows, longest rows first.

    A group stays together where it fits, so that its prompt is computed once. A row that exceeds the budget gets a
    forward of its own.
    """
    forwards: list[_Forward] = []
    units = _split_into_units(shapes, np.asarray(rows, dtype=np.int64), budget, layout)
    for unit in sorted(units, key=lambda unit: -shapes.length[unit].max()):
        if not any(forward.add_if_it_fits(unit) for forward in forwards):
            forwards.append(_Forward(shapes, budget, layout))
            forwards[-1].add(unit)
    return [sorted(forward.rows) for forward in forwards]


def _split_into_units(shapes: RowShapes, rows: np.ndarray, budget: Budget, layout: Layout) -> Iterator[np.ndarray]:
    """Yield the rows that stay together: single rows of a grid, otherwise groups, or as much of a group as fits."""
    if layout == "grid" or len(rows) == 0:
        yield from rows[:, None]
        return
    for group in np.split(rows, np.flatnonzero(np.diff(shapes.group[rows])) + 1):
        part = _Forward(shapes, budget, layout)
        if part.add_if_it_fits(group):
            yield group
            continue
        begin = 0
        for i in range(len(group)):
            if not part.add_if_it_fits(group[i : i + 1]):
                if i > begin:
                    yield group[begin:i]
                part, begin = _Forward(shapes, budget, layout), i
                part.add(group[i : i + 1])
        yield group[begin:]


class _Forward:
    """The rows of one forward, to which units are added, the longest first. The rows of a unit share one prompt."""

    def __init__(self, shapes: RowShapes, budget: Budget, layout: Layout) -> None:
        self.shapes, self.budget, self.layout = shapes, budget, layout
        self.rows: list[int] = []
        self.groups: set[int] = set()
        self.tokens = 0  # that are computed
        self.attention_tokens = 0  # without the padding of buckets

    def add_if_it_fits(self, unit: np.ndarray) -> bool:
        """Add `unit` if the budget allows it. Return whether it was added."""
        fits = self._fits_as_grid(unit) if self.layout == "grid" else self._fits_packed(unit)
        if fits:
            self.add(unit)
        return fits

    def add(self, unit: np.ndarray) -> None:
        """Add `unit` without asking the budget."""
        self.tokens += self._new_tokens(unit)
        self.attention_tokens += self.shapes.length[unit].sum()
        self.groups.add(self.shapes.group[unit[0]])
        self.rows += unit.tolist()

    def _fits_as_grid(self, unit: np.ndarray) -> bool:
        width = self.shapes.length[[*self.rows[:1], *unit]].max()  # the first row is the longest of the present ones
        return bool((len(self.rows) + 1) * width <= min(self.budget.tokens, self.budget.attention_tokens))

    def _fits_packed(self, unit: np.ndarray) -> bool:
        budget, length = self.budget, self.shapes.length
        attention_tokens = self.attention_tokens + length[unit].sum()
        if self.tokens + self._new_tokens(unit) > budget.tokens or attention_tokens > budget.attention_tokens:
            return False
        # padding multiplies the tokens of a bucket by at most 1 / MIN_LENGTH_SHARE
        if self.layout == "segments" or attention_tokens <= MIN_LENGTH_SHARE * budget.attention_tokens:
            return True
        padded = sum(len(rows) * width for rows, width in _divide_into_buckets(length[[*self.rows, *unit]]))
        return bool(padded <= budget.attention_tokens)

    def _new_tokens(self, unit: np.ndarray) -> int:
        """Return the tokens that `unit` adds: its completions, and its prompt unless the forward already has it."""
        computed = self.shapes.computed[unit].sum()
        return computed if self.shapes.group[unit[0]] in self.groups else computed + self.shapes.prompt[unit[0]]


def _divide_into_buckets(length: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Yield buckets of rows of similar length, longest rows first: (row indices, greatest length)."""
    order = np.argsort(-length, kind="stable")
    while len(order):
        width = int(length[order[0]])
        count = int((length[order] > MIN_LENGTH_SHARE * width).sum()) if width else len(order)
        yield order[:count], width
        order = order[count:]


def pack(rollouts: Rollouts, shapes: RowShapes, rows: Sequence[int], layout: Layout) -> Packing:
    """Lay out one forward over `rows`, ascending, of the rollouts with these shapes."""
    device, width = rollouts.completion_ids.device, rollouts.completion_ids.shape[1]
    prompt, length, predicted = shapes.prompt[rows], shapes.length[rows], shapes.completion[rows]
    lay_out = {"grid": _lay_out_grid, "rows": _lay_out_rows, "segments": _lay_out_segments}[layout]
    row, place = _enumerate(length)  # of every token of every row
    token, size, attention, mask = lay_out(prompt, length, shapes.group[rows], row, place, device)
    source, positions = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    prompt_width = rollouts.prompt_ids.shape[1]
    completion_column = prompt_width + place - prompt[row]
    column = np.where(place < prompt[row], shapes.start[rows][row] + place, completion_column)
    source[token], positions[token] = row * (prompt_width + width) + column, place
    predicted_row, predicted_column = _enumerate(predicted)
    if shapes.predicted is not None:
        keep = shapes.predicted[rows][predicted_row, predicted_column]
        predicted_row, predicted_column = predicted_row[keep], predicted_column[keep]
    last_prompt_place = np.cumsum(length) - length + prompt - 1  # predicts the first completion token of each row
    return Packing(
        rows=_to_device(device, np.asarray(rows)),
        source=_to_device(device, source),
        positions=_to_device(device, positions),
        predictors=make_gather(token[last_prompt_place[predicted_row] + predicted_column], size, device),
        predicted=_to_device(device, predicted_row * width + predicted_column),
        attention=attention,
        mask=mask,
        tokens=size,
        row_tokens=(row, token),
        predict_given=shapes.predicted is None,
    )


def pack_routed_experts(rollouts: Rollouts, packing: Packing) -> Tensor | None:
    """Return the experts that the sampler chose for the tokens of one forward, [T, L, k]; None if not recorded.

    `rollouts` are the rows of `packing`. A prompt that rows share has those of the first of them. Padding gets k
    different experts, because some experts' code relies on that.
    """
    prompt, completion = rollouts.prompt_routed_experts, rollouts.routed_experts
    if prompt is None or completion is None:
        return None
    experts = torch.cat([prompt, completion], dim=1).flatten(0, 1)[packing.source]
    if packing.mask is None:
        return experts
    any_experts = torch.arange(experts.shape[-1], dtype=experts.dtype, device=experts.device)
    return torch.where(packing.mask.flatten()[:, None, None], experts, any_experts)


def _enumerate(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of every item and its place in the group, where group i has counts[i] items.

    >>> _enumerate(np.array([2, 3]))
    (array([0, 0, 1, 1, 1]), array([0, 1, 0, 1, 2]))
    """
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - (np.cumsum(counts) - counts)[group]


def _number_tokens(
    prompt: np.ndarray, length: np.ndarray, group: np.ndarray, row: np.ndarray, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the index among the T tokens of every token of every row, and the number of tokens that each row adds.

    The latter are two arrays: prompt tokens, 0 for a row that shares an earlier row's prompt, and completion tokens.
    """
    leader = np.searchsorted(group, group, side="left")  # the first of these rows with the same prompt
    own_prompt, completion = prompt * (leader == np.arange(len(group))), length - prompt
    prompt_start = np.cumsum(own_prompt) - own_prompt
    completion_start = own_prompt.sum() + np.cumsum(completion) - completion
    token = np.where(place < prompt[row], prompt_start[leader][row] + place, (completion_start - prompt)[row] + place)
    return token, own_prompt, completion


def _lay_out_segments(
    prompt: np.ndarray, length: np.ndarray, group: np.ndarray, row: np.ndarray, place: np.ndarray, device: torch.device
) -> tuple[np.ndarray, int, Segments, None]:
    token, own_prompt, completion = _number_tokens(prompt, length, group, row, place)
    size, has_completion = int(own_prompt.sum() + completion.sum()), completion > 0
    prompts, completions, rows = own_prompt[own_prompt > 0], completion[has_completion], length[has_completion]
    segments = Segments(
        spread=make_gather(token[has_completion[row]], size, device),
        prompt_offsets=_offsets(prompts, device),
        completion_offsets=_offsets(completions, device),
        row_offsets=_offsets(rows, device),
        max_lengths=(int(prompts.max(initial=0)), int(completions.max(initial=0)), int(rows.max(initial=0))),
        num_prompt_tokens=int(own_prompt.sum()),
    )
    return token, size, segments, None


def _offsets(lengths: np.ndarray, device: torch.device) -> Tensor:
    return _to_device(device, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _lay_out_rows(
    prompt: np.ndarray, length: np.ndarray, group: np.ndarray, row: np.ndarray, place: np.ndarray, device: torch.device
) -> tuple[np.ndarray, int, AttentionRows, None]:
    token, own_prompt, completion = _number_tokens(prompt, length, group, row, place)
    size, row_start = int(own_prompt.sum() + completion.sum()), np.cumsum(length) - length
    tables, buckets = [], []
    for members, width in _divide_into_buckets(length):
        is_token = np.arange(width) < length[members][:, None]
        table = np.full(is_token.shape, -1)
        table[is_token] = token[(row_start[members][:, None] + np.arange(width))[is_token]]
        tables.append(table.ravel())
        buckets.append((len(members), width))
    index = np.concatenate(tables)
    back = np.empty(size, dtype=np.int64)
    back[index[index >= 0][::-1]] = np.flatnonzero(index >= 0)[::-1]  # reversed: the first copy is written last
    attention = AttentionRows(make_gather(index, size, device), tuple(buckets), _to_device(device, back))
    return token, size, attention, None


def _lay_out_grid(
    prompt: np.ndarray, length: np.ndarray, group: np.ndarray, row: np.ndarray, place: np.ndarray, device: torch.device
) -> tuple[np.ndarray, int, None, Tensor]:
    mask = np.arange(length.max()) < length[:, None]
    return row * mask.shape[1] + place, mask.size, None, _to_device(device, mask)


def make_gather(index: np.ndarray, size: int, device: torch.device) -> Gather:
    """Return the operation x -> x[index] for `size` tokens; -1 reads any token and passes no gradient."""
    places = np.flatnonzero(index >= 0)
    order = places[np.argsort(index[places], kind="stable")]
    counts = np.bincount(index[places], minlength=size)
    starts = np.cumsum(counts) - counts
    single = np.flatnonzero(counts == 1)
    repeated = []
    for times in np.unique(counts[counts > 1]):
        tokens = np.flatnonzero(counts == times)
        token_places = order[starts[tokens][:, None] + np.arange(times)]
        repeated.append((_to_device(device, tokens), _to_device(device, token_places)))
    return Gather(
        index=_to_device(device, np.maximum(index, 0)),
        single=(_to_device(device, single), _to_device(device, order[starts[single]])),
        repeated=tuple(repeated),
        size=size,
    )


def _to_device(device: torch.device, values: np.ndarray) -> Tensor:
    """Copy `values` to the device without waiting for the work that is queued on it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
