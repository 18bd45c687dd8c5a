"""Completions by the fused model: one captured graph a token step on a GPU, rows that end leave or make room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_core.batch import SamplingParams
from grpo_core.sampling.decode_ops import DONE, DRAWN, FIELDS, LIMIT, PROMPT, ROW, SLOT, START, TOKEN, Tables, TorchOps
from grpo_core.sampling.draw import Draws, restrict
from grpo_core.sampling.fused_model import FusedModel, Unsupported, check_model, norms, window

# A graph is captured for so many rows, or for multiples of the last.
ROWS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
KINDS = {  # of the tables
    "noise": torch.float64,
    "ids": torch.int64,
    "logprobs": torch.float32,
    "lengths": torch.int64,
    "ended": torch.bool,
}
AT_A_TIME = 64  # rows whose first logits are computed at once


class FusedDecoder:
    """Draws completions from `model`'s live weights.

    Without `compact`, rows that have ended are carried along. A column of the state is a row that is being decoded; a
    row of the tables is a completion; a slot is where a row's keys and values lie.

    Raises:
        Unsupported: the fast path does not know this model, or this device.
    """

    def __init__(self, model: Any, pad_id: int, eos_ids: Sequence[int], *, compact: bool = True) -> None:
        self.causal_lm, self.pad_id, self.compact = model, pad_id, compact
        self.eos_ids = sorted(eos_ids)
        self._build()

    def _build(self) -> None:
        self.model = None  # two would hold the weights twice
        self.ops = _ops(self.causal_lm.device)
        self.on_gpu = type(self.ops) is not TorchOps
        self.eos = torch.tensor(self.eos_ids, device=self.causal_lm.device)
        self.model = FusedModel(self.causal_lm, self.ops)
        self.cache = self.ops.cache(self.model.shape, self.model.dtype, self.model.device)
        self._addresses = self.model.addresses()
        self.release()

    def release(self) -> None:
        """Forget the graphs and what they hold; they are captured again when needed."""
        self._forget_graphs()
        self._tables: Tables | None = None
        self._flat: dict[str, Tensor] = {}
        self._state = self.eos.new_zeros(FIELDS, 0)

    def _forget_graphs(self) -> None:
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.on_gpu else None  # a pool ends with its last graph

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        noise: Callable[[], Tensor] | None,
        limits: Tensor,
        settings: SamplingParams,
        slots: int,
    ) -> Draws:
        """`group_size` completions of every prompt, at most limits [B] tokens each, B = N * G rows, prompt-major.

        noise() [B, T] float64 are the uniforms, None where settings.greedy; they are made while the GPU computes the
        prompts. At most `slots` rows are decoded at once; the others wait until one ends.

        Raises:
            Unsupported: the completions could outgrow a sliding window.
        """
        rows, longest, width = len(limits), int(limits.max()), max(len(prompt) for prompt in prompts)
        limited = window(self.causal_lm.config)
        if limited is not None and width + longest > limited:
            raise Unsupported(f"the completions could outgrow its sliding window of {limited} tokens")
        self._settings, self._group = settings, group_size
        self._prepare(width + longest, min(slots, rows), rows, longest)
        lengths = torch.tensor([len(prompt) for prompt in prompts]).repeat_interleave(group_size)
        self._bounds = torch.stack([lengths, limits.cpu()]).to(self.model.device)
        try:
            self.cache.take(len(prompts), width, min(slots, rows), longest)
            self._hidden = self.model.prefill(prompts, self.cache)
            if noise is not None:
                self._tables.noise.copy_(noise()[:, :longest])
            self._run(rows, min(slots, rows))
        finally:
            self._hidden = None
            self.cache.give_back()
        out, used = self._tables, int(self._tables.lengths.max())
        return Draws(out.ids[:, :used].clone(), out.logprobs[:, :used].clone(), out.lengths.clone(), out.ended.clone())

    def _prepare(self, positions: int, slots: int, rows: int, longest: int) -> None:
        """Room for this call, and the weights as they are now; what a graph reads stays where it is if it can."""
        check_model(self.causal_lm)
        if self.model is None or self.model.addresses() != self._addresses:
            self._build()  # somebody moved the model's weights
        self.model.refresh()
        grown = self.model.reach(positions)
        if self._state.shape[1] < self._bucket(slots) or len(self._flat.get("ids", ())) < rows * longest:
            self.release()
            self._state = self.eos.new_zeros(FIELDS, self._bucket(slots))
            count, device = rows * longest, self.eos.device
            self._flat = {name: torch.empty(count, dtype=kind, device=device) for name, kind in KINDS.items()}
        elif grown:
            self._forget_graphs()
        wide = {name: self._flat[name][: rows * longest].view(rows, longest) for name in ("noise", "ids", "logprobs")}
        self._tables = Tables(**wide, **{name: self._flat[name][:rows] for name in ("lengths", "ended")}, eos=self.eos)
        self._tables.ids.fill_(self.pad_id)
        self._tables.logprobs.zero_()
        self.ops.columns(longest)

    def _run(self, rows: int, slots: int) -> None:
        """Decode until all `rows` rows have ended."""
        n = slots
        self._state[:, :n] = self._enter(torch.arange(n), torch.arange(n))
        waiting = n  # rows from here on have not begun
        while True:
            now = self._state[:, :n].cpu()
            done = now[DONE] == 1
            free = done.nonzero().squeeze(1)
            if waiting < rows and len(free):
                free = free[: rows - waiting]
                new = torch.arange(waiting, waiting + len(free))
                self._state[:, free.to(self._state.device)] = self._enter(new, now[SLOT, free])
                waiting += len(free)
                continue
            if bool(done.all()):
                return
            if self.compact and self._bucket(int((~done).sum())) <= 0.875 * self._bucket(n):
                index = (~done).nonzero().squeeze(1).to(self._state.device)
                n = len(index)
                self._state[:, :n] = self._state[:, index]
                self.cache.keep(self._state[:, :n])
            left = int((now[LIMIT] - now[DRAWN])[~done].max())
            size = self._bucket(n)
            self._state[DONE, n:size] = 1
            for _ in range(min(self._between_looks(n), left)):
                self._step(size)

    def _between_looks(self, n: int) -> int:
        """Steps of n rows between looks at who has ended: on a GPU each look waits, and many rows' steps are long."""
        return 2 if not self.on_gpu else 16 if n < ROWS[-1] else 4

    def _bucket(self, n: int) -> int:
        """Rows that a step of n rows is computed for: on a GPU one of a few sizes, so that few graphs exist."""
        if not self.on_gpu:
            return n
        return next((size for size in ROWS if size >= n), -(-n // ROWS[-1]) * ROWS[-1])

    def _enter(self, rows: Tensor, slots: Tensor) -> Tensor:
        """The columns of rows that begin, their first token drawn."""
        state = torch.zeros(FIELDS, len(rows), dtype=torch.int64, device=self._state.device)
        rows = rows.to(state.device)
        state[START], state[LIMIT] = self._bounds[:, rows]
        state[PROMPT], state[ROW], state[SLOT] = rows // self._group, rows, slots.to(state.device)
        self.cache.admit(state)
        for part in state.split(AT_A_TIME, dim=1):
            self._draw(self.model.logits(self._hidden[part[PROMPT]]), part)
        return state

    def _draw(self, logits: Tensor, state: Tensor) -> None:
        if self._settings.restricted:
            logits = restrict(logits, self._settings)
        self.ops.draw(logits, state, self._tables, self._settings)

    def _body(self, size: int) -> None:
        """One token of the first `size` columns."""
        state, model = self._state[:, :size], self.model
        self.cache.begin(state, model.cos, model.sin)
        hidden = model.hidden(model.embed(state[TOKEN]), lambda i, qkv, layer: self.cache.attend(i, qkv, *norms(layer)))
        self._draw(model.logits(hidden), state)

    def _step(self, size: int) -> None:
        if not self.on_gpu:
            return self._body(size)
        key = (size, self._settings)
        if key not in self._graphs:
            self._graphs[key] = self._capture(size)
        self._graphs[key].replay()
        return None

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        """A graph of `_body`. It is run once before, with every row done: then it writes nothing that is read."""
        kept = self._state[DONE].clone()
        self._state[DONE] = 1
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._body(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._body(size)
        self._state[DONE] = kept
        return graph


def _ops(device: torch.device) -> TorchOps:
    if device.type == "cpu":
        return TorchOps()
    try:
        from grpo_core.sampling.decode_kernels import TritonOps
    except ImportError as error:
        raise Unsupported(f"there is no triton: {error}") from error
    return TritonOps(device)
