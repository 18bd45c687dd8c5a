"""How much each token counts: one tensor, fixed once per optimizer step, so that no gradient depends on its pieces.

An average is fn(completion_mask [B, C] float, totals) -> weights [B, C]. n_i is the number of tokens of completion i.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.registry import Registry

AVERAGES = Registry("average")


@dataclass(frozen=True)
class Totals:
    """Counts over a whole optimizer step: all micro-batches, all ranks."""

    tokens: Tensor  # completion tokens that are trained
    completions: Tensor  # all of them, with or without a trained token
    max_new_tokens: int  # the configured length limit, not the longest row
    entropy_tokens: Tensor | None = None  # tokens that the entropy bonus acts on; None: all
    micro_batches: Tensor | int = 1


@AVERAGES.register("sequence")
def sequence_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / (n_i * completions)

    Every completion counts the same, long or short. arXiv:2402.03300.
    """
    lengths = completion_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return completion_mask / (lengths * totals.completions)


@AVERAGES.register("token")
def token_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / tokens

    Every token of the step counts the same: DAPO as verl and TRL run it. In the paper (arXiv:2503.14476) the
    denominator is that of one prompt's group, and prompts are averaged.
    """
    return completion_mask / _at_least_one(totals.tokens)


@AVERAGES.register("constant")
def constant_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / (completions * max_new_tokens)

    No length in it, so no length bias. Dr. GRPO, arXiv:2503.20783.
    """
    return completion_mask / (totals.completions * totals.max_new_tokens)


@AVERAGES.register("row_sum")
def row_sum_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / completions

    A row's tokens are summed. For sequence-level losses, LUSPO arXiv:2602.05261, or the log-prob of a whole
    completion, RLOO arXiv:2402.14740.
    """
    return completion_mask / totals.completions


@AVERAGES.register("micro_token", breaks={"splits": "it is a mean of means over micro-batches, and is meant to be"})
def micro_token_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / (tokens of this micro-batch * micro_batches)

    TRL's bnpo, for parity with it. It depends on how the step is cut into micro-batches.
    """
    return completion_mask / (completion_mask.sum().clamp(min=1) * totals.micro_batches)


def token_weights(completion_mask: Tensor, *, average: str, totals: Totals, dtype: torch.dtype | None = None) -> Tensor:
    """How much each token counts in the loss, [B, C] of `dtype` (float32); 0 where masked.

    Raises:
        ConfigError: `average` is not a known name.
    """
    return AVERAGES.get(average)(completion_mask.to(dtype or torch.float32), totals)


def entropy_weights(mask: Tensor, totals: Totals, dtype: torch.dtype | None = None) -> Tensor:
    """1 / (tokens that the bonus acts on) where `mask`, [B, C]: the bonus is a mean entropy, whatever the average."""
    tokens = totals.tokens if totals.entropy_tokens is None else totals.entropy_tokens
    return mask.to(dtype or torch.float32) / _at_least_one(tokens)


def _at_least_one(count: Tensor) -> Tensor:
    return torch.as_tensor(count).clamp(min=1)
