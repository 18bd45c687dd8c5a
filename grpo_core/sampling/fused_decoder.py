"""Decode with the fused model. On a GPU every token step is one captured graph; rows that end make room for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_core.counts import quantify
from grpo_core.sampling.decode_ops import DONE, DRAWN, FIELDS, LIMIT, PROMPT, ROW, SLOT, START, TOKEN, Tables, TorchOps
from grpo_core.sampling.draw import restrict
from grpo_core.sampling.fused_model import FusedModel, Unsupported, check_model, sliding_window
from grpo_core.sampling.request import DecodeRequest, Draws

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
MAX_FIRST_ROWS = 64  # rows whose first logits [rows, V] exist at once


class FusedDecoder:
    """A decoder that computes the model's live weights as few large products (fused_model.py).

    Terms: a row of the tables is a completion; a column of the state is a completion that is being decoded; a slot is
    the memory of a column's keys and values. With `compact`, columns whose row has ended are removed; without, they are
    computed until the end.

    Raises:
        Unsupported: the fused decoder does not support this model or this device.
    """

    def __init__(self, model: Any, pad_id: int, eos_ids: Sequence[int], *, compact: bool = True) -> None:
        self.causal_lm, self.pad_id, self.compact = model, pad_id, compact
        self.eos_ids = sorted(eos_ids)
        self._build()

    def _build(self) -> None:
        self.model = None  # freed first: two fused models would hold the weights twice
        self.ops = _make_ops(self.causal_lm.device)
        self.on_gpu = type(self.ops) is not TorchOps
        self.eos = torch.tensor(self.eos_ids, device=self.causal_lm.device)
        self.model = FusedModel(self.causal_lm, self.ops)
        self.cache = self.ops.make_cache(self.model.shape, self.model.dtype, self.model.device)
        self._addresses = self.model.addresses()
        self.release()

    def release(self) -> None:
        """Free the captured graphs, the tables and the state; the next call makes them again."""
        self._forget_graphs()
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
            Unsupported: prompts and completions could become longer than the model's sliding window.
        """
        prompts, rows, longest = request.prompts, len(request.limits), int(request.limits.max())
        width, slots = max(len(prompt) for prompt in prompts), min(max_rows, rows)
        window = sliding_window(self.causal_lm.config)
        if window is not None and width + longest > window:
            raise Unsupported(
                f"prompts and completions could become longer than its sliding window of {quantify(window, 'token')}"
            )
        self._settings, self._group_size, self._is_stopped = request.settings, request.group_size, request.is_stopped
        self._prepare(width + longest, slots, rows, longest)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device="cpu").repeat_interleave(request.group_size)
        self._bounds = torch.stack([lengths, request.limits.cpu()]).to(self.model.device)  # START and LIMIT of each row
        try:
            self.cache.allocate(len(prompts), width, slots, longest)
            self._prompt_hidden = self.model.prefill(prompts, self.cache)
            if request.noise is not None:
                self._tables.noise.copy_(request.noise()[:, :longest])
            self._decode_rows(rows, slots)
        finally:
            self._prompt_hidden = None
            self.cache.free()
        out, used = self._tables, int(self._tables.lengths.max())
        return Draws(out.ids[:, :used].clone(), out.logprobs[:, :used].clone(), out.lengths.clone(), out.ended.clone())

    def _prepare(self, positions: int, slots: int, rows: int, longest: int) -> None:
        """Allocate the state and the tables of a call, and take the weights as they are now.

        Memory that captured graphs read is kept if it is large enough; otherwise the graphs are forgotten.
        """
        check_model(self.causal_lm)
        if self.model is None or self.model.addresses() != self._addresses:
            self._build()  # the model's weights were moved or replaced
        self.model.refresh()
        rotations_moved = self.model.extend_rotations(positions)
        if self._state.shape[1] < self._step_rows(slots) or len(self._table_memory.get("ids", ())) < rows * longest:
            self.release()
            self._state = self.eos.new_zeros(FIELDS, self._step_rows(slots))
            count, device = rows * longest, self.eos.device
            self._table_memory = {
                name: torch.empty(count, dtype=dtype, device=device) for name, dtype in TABLE_DTYPES.items()
            }
        elif rotations_moved:
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
            done = self._mark_stopped(state, state[DONE] == 1)
            free = done.nonzero().squeeze(1)
            if started < rows and len(free):
                free = free[: rows - started]
                new = torch.arange(started, started + len(free), device="cpu")
                self._state[:, free.to(self._state.device)] = self._start_rows(new, state[SLOT, free])
                started += len(free)
                continue
            if bool(done.all()):
                return
            if self.compact and self._step_rows(int((~done).sum())) <= COMPACTION_SHARE * self._step_rows(n):
                index = (~done).nonzero().squeeze(1).to(self._state.device)
                n = len(index)
                self._state[:, :n] = self._state[:, index]
                self.cache.keep_rows(self._state[:, :n])
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
        ids = self._tables.ids[state[ROW, live].to(self._state.device)]
        stopped = live[self._is_stopped(ids, state[DRAWN, live]).cpu()]
        self._state[DONE, stopped.to(self._state.device)] = 1
        return done.index_fill(0, stopped, True)

    def _steps_between_checks(self, n: int) -> int:
        """Return the steps of n rows between two checks for rows that have ended.

        On a GPU a check waits for all queued steps, so it is rare, but less so where a step is long (many rows).
        """
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
        self.cache.add_rows(state)
        for part in state.split(MAX_FIRST_ROWS, dim=1):
            self._draw(self.model.logits(self._prompt_hidden[part[PROMPT]]), part)
        return state

    def _draw(self, logits: Tensor, state: Tensor) -> None:
        if self._settings.restricted:
            logits = restrict(logits, self._settings)
        self.ops.draw(logits, state, self._tables, self._settings)

    def _compute_step(self, size: int) -> None:
        """Compute one token of the first `size` columns."""
        state, model = self._state[:, :size], self.model
        self.cache.begin_step(state, model.cos, model.sin)
        hidden = model.hidden(
            model.embed(state[TOKEN]), lambda i, qkv, layer: self.cache.attend(i, qkv, *layer.head_norms)
        )
        self._draw(model.logits(hidden), state)

    def _step(self, size: int) -> None:
        """Compute one token of the first `size` columns; on a GPU by replaying a graph, captured when first needed."""
        if not self.on_gpu:
            self._compute_step(size)
            return
        key = (size, self._settings)
        if key not in self._graphs:
            self._graphs[key] = self._capture(size)
        self._graphs[key].replay()

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        """Capture `_compute_step` as a graph.

        Capturing requires one run before. In it all rows are marked as done, so it changes nothing.
        """
        done = self._state[DONE].clone()
        self._state[DONE] = 1
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compute_step(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._compute_step(size)
        self._state[DONE] = done
        return graph


def _make_ops(device: torch.device) -> TorchOps:
    if device.type == "cpu":
        return TorchOps()
    try:
        from grpo_core.sampling.decode_kernels import TritonOps
    except ImportError as error:
        raise Unsupported(f"triton cannot be imported: {error}") from error
    return TritonOps(device)
