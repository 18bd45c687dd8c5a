"""The columns of a decoder's state whose rows have ended a turn: they wait for its answer, and then go on.

A column that waits keeps its place and its memory. It is done, so nothing is drawn for it; only recurrent states, which
a step changes although the column is done, are copied when it begins to wait, and put back when its answer comes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.sampling.computation import Computation
from grpo_core.sampling.decode_ops import DONE, DRAWN, GIVEN, LIMIT, ROW, SLOT, TOKEN, Tables
from grpo_core.sampling.turn_rows import TurnRows
from grpo_core.sampling.turns import Answer


class TurnColumns:
    """The columns of the state during one call. `state` is the state in use, `host` a copy of it on the CPU."""

    def __init__(self, rows: TurnRows, tables: Tables, computation: Computation, pad_id: int) -> None:
        self.rows, self.tables, self.computation, self.pad_id = rows, tables, computation, pad_id
        self._parked: dict[int, tuple[Any, int]] = {}  # row -> copies of the states of some rows, and its index in them

    def newest_turns(self, host: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return those of `columns` that have drawn a token of a turn, the ids [R, T] of the turns, and their lengths.

        Beyond its length a row has any ids.
        """
        starts = torch.tensor([self.rows.starts[row] for row in host[ROW, columns].tolist()], device="cpu")
        has_drawn = host[DRAWN, columns] > starts
        columns, starts = columns[has_drawn], starts[has_drawn]
        lengths, table = host[DRAWN, columns] - starts, self.tables.ids
        places = starts[:, None] + torch.arange(int(lengths.max()) if len(columns) else 0, device="cpu")
        places = places.clamp(max=table.shape[1] - 1).to(table.device)
        return columns, table[host[ROW, columns].to(table.device)].gather(1, places), lengths

    def report(self, state: Tensor, host: Tensor, done: Tensor) -> None:
        """Report the turns of columns that are done and neither wait nor are over."""
        known, row_of = self.rows.waiting | self.rows.over, host[ROW].tolist()
        places = {row_of[i]: i for i in done.nonzero().flatten().tolist() if row_of[i] not in known}
        rows = sorted(places)
        if not rows:
            return
        columns = torch.tensor([places[row] for row in rows], device="cpu")
        index = torch.tensor(rows, device=state.device)
        ids, has_eos = self.tables.ids[index].cpu(), self.tables.ended[index].tolist()
        drawn = host[DRAWN, columns].tolist()
        turns = [ids[i, self.rows.starts[row] : drawn[i]].tolist() for i, row in enumerate(rows)]
        self.rows.report(rows, turns, has_eos)
        cut = [i for i, row in enumerate(rows) if self.rows.places[row] < drawn[i]]
        if cut:  # tokens were drawn after a stop string that was not seen at once
            self._cut(state, columns[cut], [rows[i] for i in cut])
        if self.computation.has_states:
            parked = self.computation.park(state[SLOT, columns.to(state.device)])
            self._parked |= {row: (parked, i) for i, row in enumerate(rows)}

    def _cut(self, state: Tensor, columns: Tensor, rows: list[int]) -> None:
        """Forget the tokens of `rows` behind their turns. Their keys and values are overwritten by later tokens."""
        tables = self.tables
        columns, index, ends = (
            torch.as_tensor(values, device=state.device)
            for values in (columns, rows, [self.rows.places[row] for row in rows])
        )
        state[TOKEN, columns], state[DRAWN, columns] = tables.ids[index, ends - 1].to(state.dtype), ends.to(state.dtype)
        beyond = torch.arange(tables.ids.shape[1], device=state.device) >= ends[:, None]
        tables.ids[index] = tables.ids[index].masked_fill(beyond, self.pad_id)
        tables.logprobs[index] = tables.logprobs[index].masked_fill(beyond, 0.0)
        tables.lengths[index] = ends.to(tables.lengths.dtype)

    def take_answers(self, state: Tensor, host: Tensor, done: Tensor, *, wait: bool) -> None:
        """Put the answers that have come into the tables and the state; their columns are no longer `done`."""
        answers = [answer for answer in self.rows.take_answers(wait=wait) if answer.ids is not None]
        if not answers:
            return
        column_of = {row: i for i, row in enumerate(host[ROW].tolist())}
        columns = torch.tensor([column_of[answer.row] for answer in answers], device="cpu")
        self._write_ids(answers)
        limits = [self.rows.turn_limits(answer.turn_limit, [answer.row])[0] for answer in answers]
        starts, index = [self.rows.starts[answer.row] for answer in answers], columns.to(state.device)
        for values, field in ((starts, GIVEN), (limits, LIMIT)):
            host[field, columns] = torch.tensor(values, device="cpu")
            state[field, index] = host[field, columns].to(state.device)
        state[DONE, index] = 0
        done[columns] = False
        if self.computation.has_states:
            self._unpark([answer.row for answer in answers], state[SLOT, index])

    def _write_ids(self, answers: list[Answer]) -> None:
        """Write the tokens of answers into the tables."""
        entries = [
            (answer.row, self.rows.starts[answer.row] - len(answer.ids) + i, token)
            for answer in answers
            if answer.ids is not None
            for i, token in enumerate(answer.ids)
        ]
        if entries:
            row, place, token = torch.tensor(entries, device="cpu").t().to(self.tables.ids.device)
            self.tables.ids[row, place] = token

    def _unpark(self, rows: list[int], slots: Tensor) -> None:
        """Put the states of `rows` back into their slots."""
        copies = {id(self._parked[row][0]): self._parked[row][0] for row in rows}
        for key, parked in copies.items():
            members = [i for i, row in enumerate(rows) if id(self._parked[row][0]) == key]
            index = torch.tensor([self._parked[rows[i]][1] for i in members], device=slots.device)
            self.computation.unpark(slots[torch.tensor(members, device=slots.device)], parked, index)
        for row in rows:
            del self._parked[row]

    def are_over(self, host: Tensor) -> Tensor:
        """Return which columns have a row whose completion is over, [n] bool."""
        return torch.tensor([row in self.rows.over for row in host[ROW].tolist()], dtype=torch.bool, device="cpu")
