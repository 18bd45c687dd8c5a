"""Prompts to rollouts, from the live weights.

The noise of a row depends on its task's seed, its number in the group and the token's place, and on nothing else: not
on the rank, nor on the other rows, nor on how many of them are decoded at once. Two decoders draw the same completions
up to rounding: the fused one for the models that it knows, the plain one, the model's own forward, for all others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_core.batch import Rollouts, SamplingParams, Task
from grpo_core.distributed.ranks import draw_uniforms
from grpo_core.model.loading import check_lengths
from grpo_core.sampling.draw import Draws
from grpo_core.sampling.fused_decoder import FusedDecoder
from grpo_core.sampling.fused_model import Unsupported
from grpo_core.sampling.plain_decoder import PlainDecoder, left_padded
from grpo_core.schema import ConfigError

LOG = logging.getLogger("grpo_core")


class Sampler:
    """Draws completions at the temperature that the trainer's log-probs use.

    `decoder` is auto (fused where the model allows it) or plain. `rows_at_once` bounds the completions decoded at once;
    where the GPU's memory does not suffice for all, it halves by itself, and the completions stay the same.

    Raises:
        ValueError: another decoder, or rows_at_once below 1.
        ConfigError: no end-of-sequence token is known.
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
        say: Callable[[str], None] = LOG.warning,
    ) -> None:
        if decoder not in ("auto", "plain"):
            raise ValueError(f"decoder is {decoder!r}; it must be auto or plain")
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"rows_at_once is {rows_at_once}; it must be at least 1")
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's layers stay in it
        self.model, self.tokenizer, self.say = model, tokenizer, say
        self._said: set[str] = set()
        self.max_new_tokens, self.temperature, self.rows_at_once = max_new_tokens, temperature, rows_at_once
        self.device = model.device
        self.eos_ids = sorted(eos_ids(model, tokenizer))
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]
        self._plain = PlainDecoder(model, self.pad_id, self.eos_ids)
        self._decoder: PlainDecoder | FusedDecoder | None = self._plain if decoder == "plain" else None

    def generate(
        self,
        tasks: Sequence[Task],
        group_size: int,
        *,
        greedy: bool = False,
        settings: SamplingParams | None = None,
        limits: Tensor | None = None,
        watch: Callable[[list[int], list[int]], None] | None = None,
    ) -> Rollouts:
        """`group_size` completions of every task, B = N * G rows, prompt-major, none longer than max_new_tokens.

        Log-probs are those of the drawn tokens at the sampling temperature, greedy or not. `settings` takes the place
        of temperature and greedy; `limits` [B] int64, from 1 on, allows some rows fewer tokens. `watch` is told rows
        and their tokens as they are drawn, by the plain decoder.

        Raises:
            ConfigError: an empty prompt, or one that leaves no room for max_new_tokens.
        """
        settings = settings or SamplingParams(self.temperature, greedy)
        prompts = [task.prompt_ids for task in tasks]
        check_lengths(prompts, self.max_new_tokens, self.model.config)
        noise = None
        if not settings.greedy:
            keys = [(*task.seed, i) for task in tasks for i in range(group_size)]
            noise = cache(partial(draw_uniforms, keys, self.max_new_tokens))
        if limits is None:
            limits = torch.full((len(tasks) * group_size,), self.max_new_tokens)
        assert limits.shape == (len(tasks) * group_size,) and 1 <= limits.min() <= limits.max() <= self.max_new_tokens
        draws = self._decode(prompts, group_size, noise, limits, settings, watch)
        prompt_ids, prompt_mask = (
            x.repeat_interleave(group_size, dim=0) for x in left_padded(prompts, self.pad_id, self.device)
        )
        mask = torch.arange(draws.ids.shape[1], device=self.device) < draws.lengths[:, None]
        texts = self._texts(draws)
        return Rollouts(prompt_ids, prompt_mask, draws.ids, mask, draws.logprobs, ~draws.ended, texts)

    def release(self) -> None:
        """Give back all memory that is held between calls; the next one takes it again."""
        if self._decoder is not None:
            self._decoder.release()

    def _decode(
        self,
        prompts: list[list[int]],
        group_size: int,
        noise: Callable[[], Tensor] | None,
        limits: Tensor,
        settings: SamplingParams,
        watch: Callable[[list[int], list[int]], None] | None,
    ) -> Draws:
        """By the fused decoder, or by the plain one where that cannot: for good, or for this call."""
        how = (prompts, group_size, noise, limits, settings)
        self._plain.watch = watch
        try:
            if watch is not None:
                return self._fitting(self._plain, *how)
            if self._decoder is None:
                self._decoder = FusedDecoder(self.model, self.pad_id, self.eos_ids)
            return self._fitting(self._decoder, *how)
        except Unsupported as reason:
            self._decoder = self._decoder or self._plain
            if str(reason) not in self._said:
                self._said.add(str(reason))
                self.say(f"sampling by the model's own forward, which is slower: {reason}")
        return self._fitting(self._plain, *how)

    def _fitting(
        self,
        decoder: FusedDecoder | PlainDecoder,
        prompts: list[list[int]],
        group_size: int,
        noise: Callable[[], Tensor] | None,
        limits: Tensor,
        settings: SamplingParams,
    ) -> Draws:
        """Decode as many rows at once as fit, at most rows_at_once."""
        while True:
            rows = min(len(limits), self.rows_at_once or len(limits))
            try:
                return decoder.decode(prompts, group_size, noise, limits, settings, rows)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
            self.release()
            torch.cuda.empty_cache()
            self.rows_at_once = (rows + 1) // 2
            self.say(f"{rows} completions at once do not fit into the GPU's memory; going on with {self.rows_at_once}")

    def _texts(self, draws: Draws) -> tuple[str, ...]:
        kept = [row[:length] for row, length in zip(draws.ids.tolist(), draws.lengths.tolist(), strict=True)]
        return tuple(self.tokenizer.batch_decode(kept, skip_special_tokens=True))


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that ends a completion: the generation config's, the model config's and the tokenizer's.

    Raises:
        ConfigError: there is none, so no completion would ever end.
    """
    found = _ends(model.generation_config) | _ends(model.config) | _ends(tokenizer)
    if not found:
        raise ConfigError("the model and its tokenizer name no end-of-sequence token, so no completion would ever end")
    return found


def disagreement(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A sentence where the tokenizer ends a text otherwise than the model does, as after a conversion gone wrong."""
    models, own = _ends(model.generation_config) | _ends(model.config), _ends(tokenizer)
    if not models or not own or models & own:
        return None
    names = [", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(ids)))) for ids in (own, models)]
    return (
        f"the tokenizer's end-of-sequence token is {names[0]}, the model's {names[1]}: either ends a completion, and "
        f"what sft teaches ends with the tokenizer's"
    )


def _ends(source: object) -> set[int]:
    value = getattr(source, "eos_token_id", None)
    return {value} if isinstance(value, int) else set(value or ())
