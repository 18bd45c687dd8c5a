"""Sample rollouts from the live weights of a model.

The noise of a token depends only on its task's key, the number of its completion in the group, and its place in the
completion: not on the rank, the other rows, or how many rows are decoded at once. Three decoders draw the same
completions up to rounding: "fused" for a few model types, "modules" for all whose own modules a GPU can capture as a
graph, and "plain" for every model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_core.batch import Rollouts, SamplingParams, Task
from grpo_core.counts import quantify
from grpo_core.distributed.ranks import draw_uniforms
from grpo_core.model.loading import check_lengths
from grpo_core.model.routing import Routers
from grpo_core.sampling.cache_check import find_method
from grpo_core.sampling.computation import Computation, Unsupported
from grpo_core.sampling.decode_ops import TorchOps
from grpo_core.sampling.end_of_sequence import find_eos_ids
from grpo_core.sampling.finished_groups import FinishedGroups, OnGroup
from grpo_core.sampling.fused_model import FusedModel
from grpo_core.sampling.graph_decoder import GraphDecoder
from grpo_core.sampling.live_rows import pad_left
from grpo_core.sampling.modules.module_model import ModuleModel
from grpo_core.sampling.plain_decoder import PlainDecoder
from grpo_core.sampling.request import DecodeRequest, Draws, Watch
from grpo_core.sampling.stop_strings import StopStrings
from grpo_core.sampling.texts import decode_completions, find_hidden_ids
from grpo_core.sampling.turn_rows import WatchedTurns
from grpo_core.sampling.turns import Turns
from grpo_core.schema import ConfigError

LOG = logging.getLogger("grpo_core")
DECODERS = {
    "auto": ("fused", "modules", "plain"),
    "modules": ("modules", "plain"),
    "plain": ("plain",),
}  # in order of use


class Sampler:
    """A sampler that draws completions at the temperature of the trainer's log-probs.

    `decoder` is auto (the first of fused, modules and plain that supports the model; modules needs a GPU), or one of
    modules and plain, where modules gives way to plain if it does not support the model. `rows_at_once` bounds the
    completions that are decoded at once. If the GPU's memory does not suffice, `rows_at_once` is halved, and the
    completions stay the same. `stop` are texts that end a completion and stay in it. `notify` receives a message when
    memory does not suffice, and when a decoder does not support the model. The experts that `routers` choose are
    recorded with the completions. `decoder_name` is the decoder of the last call.

    Raises:
        ValueError: `decoder` has another value, or rows_at_once is below 1.
        ConfigError: no end-of-sequence token is known, or a stop string can never be in a completion's text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        decoder: str = "auto",
        rows_at_once: int | None = None,
        stop: Sequence[str] = (),
        notify: Callable[[str], None] = LOG.warning,
        routers: Routers | None = None,
    ) -> None:
        if decoder not in DECODERS:
            raise ValueError(f"decoder is {decoder!r}; it must be {', '.join(DECODERS)}")
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"rows_at_once is {rows_at_once}; it must be at least 1")
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # keeps the adapter's layers
        self.model, self.tokenizer, self.notify = model, tokenizer, notify
        self._reported: set[str] = set()  # reasons for a slower decoder, each reported once
        self.max_new_tokens, self.temperature, self.rows_at_once = max_new_tokens, temperature, rows_at_once
        self.device = model.device
        self.eos_ids = sorted(find_eos_ids(model, tokenizer))
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]
        self._hidden_ids = find_hidden_ids(tokenizer, self.eos_ids)
        self._stop = self._make_stop(stop)
        self._plain = PlainDecoder(model, self.pad_id, self.eos_ids, routers=routers)
        self._is_checked = False
        self._names = list(DECODERS[decoder])  # of the decoders that may support the model
        if decoder == "auto" and self.device.type != "cuda":
            self._names.remove("modules")
        self._decoders: dict[str, PlainDecoder | GraphDecoder] = {"plain": self._plain}
        self.decoder_name = ""

    def check_model(self) -> None:
        """Find out once how the model can be sampled. `generate` does it before its first completion.

        Raises:
            ConfigError: the model is not causal.
        """
        if not self._is_checked:
            self._plain.method = find_method(self.model, self.pad_id)
            self._is_checked = True
            if self._plain.method == "uncached":
                self.notify(
                    f"sampling computes whole rows again for every token, which is slow, because the "
                    f"{self.model.config.model_type} model's cache cannot be used"
                )

    def generate(
        self,
        tasks: Sequence[Task],
        group_size: int,
        *,
        greedy: bool = False,
        settings: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        limits: Tensor | None = None,
        watch: Watch | None = None,
        on_group: OnGroup | None = None,
        turns: Turns | None = None,
    ) -> Rollouts:
        """Draw `group_size` completions of every task: B = N * G rows, prompt-major, of at most max_new_tokens tokens.

        `settings` replaces the sampler's temperature and `greedy`, and `max_new_tokens` its own. `limits` [B] int64, at
        least 1, lowers max_new_tokens for single rows. `watch` receives row indices and their tokens as they are drawn,
        which needs the plain decoder. `on_group` receives the texts of a group as soon as all of its completions have
        ended (finished_groups.py); it must return at once. The log-probs are those of the drawn tokens at the sampling
        temperature, greedy or not.

        With `turns`, an end-of-sequence token or a stop string ends a turn, which is answered (turns.py).
        max_new_tokens bounds drawn and given tokens together, and a completion is truncated if it has no room for
        another token, and its last turn no end-of-sequence token or stop string. Texts are those of all tokens of a
        completion.

        Raises:
            ConfigError: a prompt is empty, or too long for max_new_tokens to follow it; the memory does not suffice,
                and turns were answered; see also `check_model`.
        """
        self.check_model()
        settings = settings or SamplingParams(self.temperature, greedy)
        longest = max_new_tokens or self.max_new_tokens
        prompts = [task.prompt_ids for task in tasks]
        check_lengths([len(prompt) for prompt in prompts], longest, self.model.config)
        if limits is None:
            limits = torch.full((len(tasks) * group_size,), longest, device="cpu")
        assert limits.shape == (len(tasks) * group_size,) and 1 <= limits.min() <= limits.max() <= longest
        keys = [(*task.seed, i) for task in tasks for i in range(group_size)]
        noise = None if settings.greedy else cache(partial(draw_uniforms, keys, longest))
        ends = self._describe_ends(group_size, on_group, turns)
        request = DecodeRequest(prompts, group_size, limits, settings, noise, watch, **ends)
        draws = self._decode(request)
        if self._stop and turns is None:
            draws = self._stop.cut(draws, self.pad_id)
        return self._make_rollouts(prompts, group_size, draws)

    def _make_rollouts(self, prompts: Sequence[Sequence[int]], group_size: int, draws: Draws) -> Rollouts:
        prompt_ids, prompt_mask = (
            x.repeat_interleave(group_size, dim=0) for x in pad_left(prompts, self.pad_id, self.device)
        )
        mask, valid = torch.arange(draws.ids.shape[1], device=self.device) < draws.lengths[:, None], None
        if draws.turn_ids is not None:
            mask, valid = draws.turn_ids >= 0, mask
        texts = self._decode_texts(draws)
        rest = draws.prompt_routed_experts, draws.routed_experts, valid, draws.turn_ids
        return Rollouts(prompt_ids, prompt_mask, draws.ids, mask, draws.logprobs, ~draws.ended, texts, *rest)

    def _describe_ends(self, group_size: int, on_group: OnGroup | None, turns: Turns | None) -> dict[str, Any]:
        """Return the fields of a request by which a turn ends, and what receives turns and completions that ended.

        Where there are turns, the decoder cuts them at their stop strings.
        """
        decode = self._decode_stopped_rows if turns is None else self._decode_rows
        return {
            "is_stopped": self._stop and self._stop.are_in,
            "find_stop": self._stop and self._stop.find,
            "on_ended": None if on_group is None else FinishedGroups(group_size, decode, on_group).add,
            "turns": None if turns is None else WatchedTurns(turns),
        }

    def release(self) -> None:
        """Free all memory that is held between calls; the next call allocates it again."""
        for decoder in self._decoders.values():
            decoder.release()

    def _decode(self, request: DecodeRequest) -> Draws:
        """Decode with the first decoder that supports the model and the request."""
        for name in self._names if request.watch is None else ("plain",):
            try:
                if name not in self._decoders:
                    self._decoders[name] = self._make_decoder(name)
                self.decoder_name = name
                return self._decode_within_memory(self._decoders[name], request)
            except Unsupported as reason:
                problem = f"sampling cannot use the {name} decoder, because {reason}"
                _check_can_begin_again(request, problem, "set sampling.decoder to plain")
                if name not in self._decoders:
                    self._names = [other for other in self._names if other != name]
                if str(reason) not in self._reported:
                    self._reported.add(str(reason))
                    self.notify(f"sampling does not use the {name} decoder, which is faster, because {reason}")
        raise AssertionError("the plain decoder supports every request")

    def _make_decoder(self, name: str) -> GraphDecoder:
        def make_computation(ops: TorchOps) -> Computation:
            if name == "fused":
                return FusedModel(self.model, ops, self._plain.routers)
            return ModuleModel(self.model, self._plain.method, self.pad_id, ops, self._plain.routers)

        return GraphDecoder(make_computation, self.device, self.pad_id, self.eos_ids)

    def _decode_within_memory(self, decoder: GraphDecoder | PlainDecoder, request: DecodeRequest) -> Draws:
        """Decode at most rows_at_once rows at once, and halve rows_at_once for good when memory runs out."""
        while True:
            rows = min(len(request.limits), self.rows_at_once or len(request.limits))
            try:
                return decoder.decode(request, rows)
            except torch.OutOfMemoryError:
                problem = f"{quantify(rows, 'completion')} at once do not fit into the GPU's memory"
                _check_can_begin_again(request, problem, "lower sampling.rows_at_once")
                if rows == 1:
                    raise
            self.release()
            torch.cuda.empty_cache()
            self.rows_at_once = (rows + 1) // 2
            self.notify(
                f"{quantify(rows, 'completion')} at once do not fit into the GPU's memory; continuing with "
                f"{self.rows_at_once}"
            )

    def _make_stop(self, stop: Sequence[str]) -> StopStrings | None:
        for text in stop:
            for i in self._hidden_ids:
                if (hidden := self.tokenizer.batch_decode([[i]], skip_special_tokens=False)[0]) and hidden in text:
                    raise ConfigError(
                        f"sampling.stop has {text!r}, but the token {hidden} is never in a completion's text; leave it "
                        f"out: an end-of-sequence token ends a completion by itself"
                    )
        decode = partial(decode_completions, self.tokenizer, hidden=self._hidden_ids)
        return StopStrings(stop, decode) if stop else None

    def _decode_stopped_rows(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of completions as they were drawn, which end with the first stop string."""
        return self._decode_rows([self._stop.cut_row(row) for row in rows] if self._stop else rows)

    def _decode_rows(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return decode_completions(self.tokenizer, rows, self._hidden_ids)

    def _decode_texts(self, draws: Draws) -> tuple[str, ...]:
        ids = [row[:length] for row, length in zip(draws.ids.tolist(), draws.lengths.tolist(), strict=True)]
        return tuple(self._decode_rows(ids))


def _check_can_begin_again(request: DecodeRequest, problem: str, remedy: str) -> None:
    """Raise ConfigError if turns of the request were reported: a turn is answered once."""
    if isinstance(request.turns, WatchedTurns) and request.turns.any_reported:
        raise ConfigError(f"{problem}, and it cannot begin again, because turns have been answered; {remedy}")
