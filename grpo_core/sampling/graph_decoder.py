"""Decode with a computation of one token step. On a GPU every token step is one captured graph.

A new row takes the place of a row that has ended. A row that has ended a turn waits for its answer (turn_columns.py)
while others go on. The computation is a FusedModel or a ModuleModel (computation.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_core.sampling.computation import CallSize, Computation, Unsupported
from grpo_core.sampling.decode_ops import DONE, DRAWN, FIELDS, LIMIT, PROMPT, ROW, SLOT, START, Tables, TorchOps
from grpo_core.sampling.draw import restrict
from grpo_core.sampling.graph_capture import capture_graph
from grpo_core.sampling.request import DecodeRequest, Draws
from grpo_core.sampling.turn_columns import TurnColumns
from grpo_core.sampling.turn_rows import FindStop, TurnRows
from grpo_core.schema import first_line

# numbers of rows for which graphs are captured; above them, multiples of the last
GRAPH_ROWS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
COMPACTION_SHARE = 0.875  # rows that have ended are removed when this share of the graph's rows suffices, or less
TABLE_DTYPES = {
    "noise": torch.float64,
    "ids": torch.int64,
    "logprobs": torch.float32,
    "lengths": torch.int64,
    "ended": torch.bool,
}
STEPS_WITH_TURNS = 4  # between two checks for turns that have ended and answers that have come
MAX_FIRST_ROWS = 64  # rows whose first logits [rows, V] exist at once


class GraphDecoder:
    """A decoder that computes one token of all rows at a time, by a captured graph on a GPU.

    `make_computation` receives the operations for the model's device and returns the computation of the live weights.

    Terms: a row of the tables is a completion; a column of the state is a completion that is being decoded; a slot is
    the memory of a column's keys and values. With `compact`, columns whose row has ended are removed; without, they are
    computed until the end.

    Raises:
        Unsupported: the computation does not support this model or this device.
    """

    def __init__(
        self,
        make_computation: Callable[[TorchOps], Computation],
        device: torch.device,
        pad_id: int,
        eos_ids: Sequence[int],
        *,
        compact: bool = True,
    ) -> None:
        self.make_computation, self.device = make_computation, device
        self.pad_id, self.compact, self.eos_ids = pad_id, compact, sorted(eos_ids)
        self._obstacle = ""  # the reason why a graph could not be captured
        self._build()

    def _build(self) -> None:
        self.computation: Any = None  # freed first: two fused models would hold the weights twice
        self.ops = _make_ops(self.device)
        self.on_gpu = type(self.ops) is not TorchOps
        self.eos = torch.tensor(self.eos_ids, device=self.device)
        self.computation = self.make_computation(self.ops)
        self._addresses = self.computation.addresses()
        self.release()

    def release(self) -> None:
        """Free the captured graphs, the tables and the state; the next call makes them again."""
        self._forget_graphs()
        self.computation.release()
        self._tables: Tables | None = None
        self._table_memory: dict[str, Tensor] = {}
        self._state = self.eos.new_zeros(FIELDS, 0)

    def _forget_graphs(self) -> None:
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.on_gpu else None  # a pool is freed with its last graph

    @torch.no_grad()
    def decode(self, request: DecodeRequest, max_rows: int) -> Draws:
        """Draw the completions of `request`, at most `max_rows` at once; a row that waits starts when another ends.

        The noise is made while the GPU prefills the prompts.

        Raises:
            Unsupported: the computation does not support rows of this length.
        """
        if self._obstacle:
            raise Unsupported(self._obstacle)
        prompts, rows, longest = request.prompts, len(request.limits), int(request.limits.max())
        width, slots = max(len(prompt) for prompt in prompts), min(max_rows, rows)
        self._settings, self._group_size, self._is_stopped = request.settings, request.group_size, request.is_stopped
        self._on_ended, self._reported = request.on_ended, torch.zeros(rows, dtype=torch.bool, device="cpu")
        self._prepare(width + longest, slots, rows, longest)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device="cpu").repeat_interleave(request.group_size)
        self._turns, limits = self._begin_turns(request), request.limits.cpu()
        if self._turns is not None and (first := self._turns.rows.turns.first_limit) is not None:
            limits = limits.clamp(max=first)
        self._bounds = torch.stack([lengths, limits]).to(self.device)  # START and LIMIT of each row
        try:
            if self.computation.allocate(CallSize(len(prompts), width, rows, slots, self._step_rows(slots), longest)):
                self._forget_graphs()
            self.computation.prefill(prompts)
            if request.noise is not None:
                self._tables.noise.copy_(request.noise()[:, :longest])
            self._decode_rows(rows, slots)
            experts = self.computation.recorded_experts()
        finally:
            if self.computation.free():
                self._forget_graphs()
        out, used = self._tables, int(self._tables.lengths.max())
        if self._turns is not None:
            rows_of_turns = self._turns.rows
            out.ended.copy_(rows_of_turns.ended())
            experts["turn_ids"] = rows_of_turns.turn_ids(used).to(self.device)
        if "routed_experts" in experts:
            experts["routed_experts"] = experts["routed_experts"][:, :used].clone()
        tables = (out.ids[:, :used].clone(), out.logprobs[:, :used].clone(), out.lengths.clone(), out.ended.clone())
        return Draws(*tables, **experts)

    def _prepare(self, positions: int, slots: int, rows: int, longest: int) -> None:
        """Allocate the state and the tables of a call, and take the weights as they are now.

        Memory that captured graphs read is kept if it is large enough; otherwise the graphs are forgotten.
        """
        self.computation.check(positions)
        if self.computation.addresses() != self._addresses:
            self._build()  # the model's weights were moved or replaced
        is_moved = self.computation.refresh(positions)
        if self._state.shape[1] < self._step_rows(slots) or len(self._table_memory.get("ids", ())) < rows * longest:
            self.release()
            self._state = self.eos.new_zeros(FIELDS, self._step_rows(slots))
            count, device = rows * longest, self.eos.device
            self._table_memory = {
                name: torch.empty(count, dtype=dtype, device=device) for name, dtype in TABLE_DTYPES.items()
            }
        elif is_moved:
            self._forget_graphs()
        memory = self._table_memory
        self._tables = Tables(
            **{name: memory[name][: rows * longest].view(rows, longest) for name in ("noise", "ids", "logprobs")},
            **{name: memory[name][:rows] for name in ("lengths", "ended")},
            eos=self.eos,
        )
        self._tables.ids.fill_(self.pad_id)
        self._tables.logprobs.zero_()
        self.ops.set_table_width(longest)

    def _decode_rows(self, rows: int, slots: int) -> None:
        """Decode until all `rows` rows have ended, at most `slots` of them at once."""
        n = slots  # columns in use
        self._state[:, :n] = self._start_rows(torch.arange(n, device="cpu"), torch.arange(n, device="cpu"))
        started = n
        while True:
            state = self._state[:, :n].cpu()
            done = over = self._mark_stopped(state, state[DONE] == 1)
            if self._turns is not None:
                over = self._exchange_turns(state, done, can_start=started < rows)
            self._report_ended(state[ROW, over])
            free = over.nonzero().squeeze(1)
            if started < rows and len(free):
                free = free[: rows - started]
                new = torch.arange(started, started + len(free), device="cpu")
                self._state[:, free.to(self._state.device)] = self._start_rows(new, state[SLOT, free])
                started += len(free)
                continue
            if bool(over.all()):
                return
            if self.compact and self._step_rows(int((~over).sum())) <= COMPACTION_SHARE * self._step_rows(n):
                index = (~over).nonzero().squeeze(1).to(self._state.device)
                n = len(index)
                self._state[:, :n] = self._state[:, index]
                self.computation.keep_rows(self._state[:, :n])
            most_left = int((state[LIMIT] - state[DRAWN])[~done].max())
            size = self._step_rows(n)
            self._state[DONE, n:size] = 1
            for _ in range(min(self._steps_between_checks(n), most_left)):
                self._step(size)

    def _mark_stopped(self, state: Tensor, done: Tensor) -> Tensor:
        """Mark the columns of `state` as done in which a stop string is; return which are done, [n]."""
        live = (~done).nonzero().squeeze(1)
        if self._is_stopped is None or not len(live):
            return done
        if self._turns is None:
            ids, lengths = self._tables.ids[state[ROW, live].to(self._state.device)], state[DRAWN, live]
        else:
            live, ids, lengths = self._turns.newest_turns(state, live)
            if not len(live):
                return done
        stopped = live[self._is_stopped(ids, lengths).cpu()]
        self._state[DONE, stopped.to(self._state.device)] = 1
        return done.index_fill(0, stopped, True)

    def _begin_turns(self, request: DecodeRequest) -> TurnColumns | None:
        """Return the turns of a call; None for one without.

        Recurrent states cannot be set back, so there a turn ends where a stop string is seen, which is at once.
        """
        if request.turns is None:
            return None
        find_stop = _end_where_seen(request.find_stop) if self.computation.has_states else request.find_stop
        rows = TurnRows(request.turns, request.limits.tolist(), find_stop)
        return TurnColumns(rows, self._tables, self.computation, self.pad_id)

    def _exchange_turns(self, state: Tensor, done: Tensor, *, can_start: bool) -> Tensor:
        """Report turns that have ended, and take the answers that have come. Return which columns are over, [n].

        It waits for an answer only if nothing else can be done: no column draws, and no row can start.
        """
        assert self._turns is not None
        device_state = self._state[:, : state.shape[1]]
        self._turns.report(device_state, state, done)
        if self._turns.rows.waiting:
            self._turns.take_answers(device_state, state, done, wait=False)
        over = self._turns.are_over(state)
        while bool(done.all()) and not bool(over.all()) and not (can_start and bool(over.any())):
            self._turns.take_answers(device_state, state, done, wait=True)
            over = self._turns.are_over(state)
        return over

    def _report_ended(self, rows: Tensor) -> None:
        """Pass on those of the rows that have ended which were not passed on before."""
        if self._on_ended is None:
            return
        new = rows[~self._reported[rows]]
        self._reported[new] = True
        if len(new):
            index = new.to(self._state.device)
            self._on_ended(new, self._tables.ids[index], self._tables.lengths[index])

    def _steps_between_checks(self, n: int) -> int:
        """Return the steps of n rows between two checks for rows that have ended.

        On a GPU a check waits for all queued steps, so it is rare, but less so where a step is long (many rows), or
        where rows wait for answers. A recurrent state must be parked before the next step changes it.
        """
        if self._turns is not None:
            return 1 if self.computation.has_states else STEPS_WITH_TURNS
        if not self.on_gpu:
            return 2
        return 16 if n < GRAPH_ROWS[-1] else 4

    def _step_rows(self, n: int) -> int:
        """Return the number of rows for which a step of n rows is computed: on a GPU one of GRAPH_ROWS."""
        if not self.on_gpu:
            return n
        return next((size for size in GRAPH_ROWS if size >= n), -(-n // GRAPH_ROWS[-1]) * GRAPH_ROWS[-1])

    def _start_rows(self, rows: Tensor, slots: Tensor) -> Tensor:
        """Return the state's columns of rows that start, with their first tokens drawn."""
        state = torch.zeros(FIELDS, len(rows), dtype=torch.int64, device=self._state.device)
        rows = rows.to(state.device)
        state[START], state[LIMIT] = self._bounds[:, rows]
        state[PROMPT], state[ROW], state[SLOT] = rows // self._group_size, rows, slots.to(state.device)
        self.computation.add_rows(state)
        for part in state.split(MAX_FIRST_ROWS, dim=1):
            self._draw(self.computation.first_logits(part[PROMPT]), part)
        return state

    def _draw(self, logits: Tensor, state: Tensor) -> None:
        if self._settings.restricted:
            logits = restrict(logits, self._settings)
        self.ops.draw(logits, state, self._tables, self._settings)

    def _compute_step(self, size: int) -> None:
        """Compute one token of the first `size` columns."""
        state = self._state[:, :size]
        self._draw(self.computation.step(state), state)

    def _step(self, size: int) -> None:
        """Compute one token of the first `size` columns; on a GPU by replaying a graph, captured when first needed."""
        key = (size, self._settings)
        if not self.on_gpu:
            self._compute_step(size)
        elif key in self._graphs:
            self._graphs[key].replay()
        else:
            self._graphs[key] = self._capture_token_step(size)

    def _capture_token_step(self, size: int) -> torch.cuda.CUDAGraph:
        """Compute one token of the first `size` columns, and capture the computation as a graph for later tokens.

        The run that capturing requires is that token: one run more would change the states of recurrent layers.
        """
        try:
            return capture_graph(partial(self._compute_step, size), self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._obstacle = f"its forward cannot be captured as a graph: {first_line(error)}"
            raise Unsupported(self._obstacle) from error


def _end_where_seen(find_stop: FindStop | None) -> FindStop | None:
    """Return the function that ends a turn in which there is a stop string with its last token."""
    return None if find_stop is None else lambda ids: None if find_stop(ids) is None else len(ids)


def _make_ops(device: torch.device) -> TorchOps:
    if device.type == "cpu":
        return TorchOps()
    try:
        from grpo_core.sampling.kernels.decode_kernels import TritonOps
    except ImportError as error:
        raise Unsupported(f"triton cannot be imported: {error}") from error
    return TritonOps(device)
