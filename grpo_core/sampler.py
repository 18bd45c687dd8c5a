"""Prompts to rollouts: the model's own forward with a key-value cache, one token for all rows at a time.

Every prompt is prefilled once and its cache fanned out to the G rows of its group. A row that has ended leaves the
batch at once. The noise of a row depends on its task's seed, its number in the group and the token's place, and on
nothing else: not on the rank, nor on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from grpo_core.batch import Rollouts, Task
from grpo_core.distributed import uniforms


class Sampler:
    """Draws completions from the live weights, at the temperature that the trainer's log-probs use."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.device = model.device
        self.eos_ids = torch.tensor(sorted(eos_ids(model, tokenizer)), device=self.device)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(self.eos_ids[0])

    @torch.no_grad()
    def generate(self, tasks: Sequence[Task], group_size: int, *, greedy: bool = False) -> Rollouts:
        """`group_size` completions of every task, B = N * G rows, prompt-major.

        Log-probs are those of the drawn tokens at the sampling temperature, greedy or not.
        """
        prompt_ids, prompt_mask = self._pad([task.prompt_ids for task in tasks])
        keys = [(*task.seed, sample) for task in tasks for sample in range(group_size)]
        noise = None if greedy else uniforms(keys, self.max_new_tokens).to(self.device)
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(prompt_ids, prompt_mask, prompt_mask, cache).repeat_interleave(group_size, dim=0)
        cache.batch_repeat_interleave(group_size)
        prompt_ids, prompt_mask = (x.repeat_interleave(group_size, dim=0) for x in (prompt_ids, prompt_mask))

        shape = (len(keys), self.max_new_tokens)
        ids = torch.full(shape, self.pad_id, device=self.device)
        logprobs = torch.zeros(shape, device=self.device)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.device)
        rows = torch.arange(len(keys), device=self.device)  # the rows that have not ended
        for t in range(self.max_new_tokens):
            token, logprob = draw(logits, self.temperature, None if noise is None else noise[rows, t])
            ids[rows, t], logprobs[rows, t], mask[rows, t] = token, logprob, True
            going = ~torch.isin(token, self.eos_ids)
            if not going.all():
                rows, token = rows[going], token[going]
                cache.batch_select_indices(going.nonzero().squeeze(1))
            if len(rows) == 0 or t + 1 == self.max_new_tokens:
                break
            seen = torch.cat([prompt_mask[rows], mask[rows, : t + 1]], dim=1)
            logits = self._forward(token[:, None], seen[:, -1:], seen, cache)
        truncated = torch.zeros(len(keys), dtype=torch.bool, device=self.device)
        truncated[rows] = True
        ids, mask, logprobs = ids[:, : t + 1], mask[:, : t + 1], logprobs[:, : t + 1]
        return Rollouts(prompt_ids, prompt_mask, ids, mask, logprobs, truncated, self._decode(ids, mask))

    def _forward(self, ids: Tensor, new: Tensor, seen: Tensor, cache: DynamicCache) -> Tensor:
        """Next-token logits [rows, V] after `ids`; `seen` masks everything up to and including them."""
        positions = (seen.long().cumsum(dim=1) - 1).clamp(min=0)[:, -new.shape[1] :]
        return self.model(
            input_ids=ids,
            attention_mask=seen.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Left-padded ids and their mask, [N, P]."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        return ids, torch.arange(width, device=self.device) >= width - lengths[:, None]

    def _decode(self, ids: Tensor, mask: Tensor) -> tuple[str, ...]:
        kept = [row[: int(length)] for row, length in zip(ids.tolist(), mask.sum(dim=1), strict=True)]
        return tuple(self.tokenizer.batch_decode(kept, skip_special_tokens=True))


def draw(logits: Tensor, temperature: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row from logits [B, V] and its log-prob, both [B]: by inverse CDF, or the argmax without noise."""
    logprobs = (logits.float() / temperature).log_softmax(dim=-1)
    if uniform is None:
        token = logprobs.argmax(dim=-1, keepdim=True)
    else:
        cdf = logprobs.double().exp().cumsum(dim=-1)  # double: 150,000 terms, and tails that still can be drawn
        token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that ends a completion: the generation config's, the model config's and the tokenizer's."""
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found |= {value} if isinstance(value, int) else set(value or ())
    assert found, "the model names no end-of-sequence token"
    return found
