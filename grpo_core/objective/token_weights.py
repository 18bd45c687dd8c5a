"""Token weights: the weight of every token in the loss, one tensor fixed once per optimizer step.

Because the weights are fixed for the whole step, the gradient does not depend on how the step is cut into
micro-batches. loss.average names the function: fn(completion_mask [B, C] float, totals) -> weights [B, C]. n_i is the
number of tokens of completion i.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.registry import Registry

AVERAGES = Registry("average")


@dataclass(frozen=True)
class Totals:
    """Counts over one optimizer step: all micro-batches of all ranks."""

    tokens: Tensor  # completion tokens that are trained
    completions: Tensor  # all completions, also those without a trained token
    max_new_tokens: int  # sampling.max_new_tokens, not the length of the longest row
    entropy_tokens: Tensor | None = None  # tokens that the entropy bonus acts on; None: `tokens`
    micro_batches: Tensor | int = 1
    positive_tokens: Tensor | int = 0  # tokens of completions that are positive examples
    given_tokens: Tensor | int = 0  # tokens that environments gave


@AVERAGES.register("sequence")
def sequence_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / (n_i * completions)

    Every completion has the same weight, whatever its length. arXiv:2402.03300.
    """
    lengths = completion_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return completion_mask / (lengths * totals.completions)


@AVERAGES.register("token")
def token_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / tokens

    Every token of the step has the same weight, as in verl's and TRL's implementations of DAPO. In the paper
    (arXiv:2503.14476) the denominator is the number of tokens in a prompt's group, and the prompts are averaged.
    """
    return completion_mask / _at_least_one(totals.tokens)


@AVERAGES.register("constant")
def constant_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / (completions * max_new_tokens)

    The weight does not depend on the completion's length, so there is no length bias. Dr. GRPO, arXiv:2503.20783.
    """
    return completion_mask / (totals.completions * totals.max_new_tokens)


@AVERAGES.register("row_sum")
def row_sum_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / completions

    The tokens of a completion are summed and the completions averaged. For losses with a ratio of the whole completion
    (LUSPO, arXiv:2602.05261) and for REINFORCE on the log-prob of a whole completion (RLOO, arXiv:2402.14740).
    """
    return completion_mask / totals.completions


@AVERAGES.register("micro_token", breaks={"splits": "it is a mean of means over micro-batches on purpose"})
def micro_token_average(completion_mask: Tensor, totals: Totals) -> Tensor:
    """1 / (tokens of this micro-batch * micro_batches)

    Called bnpo in TRL, and here for comparison with it. The gradient depends on how the step is cut into micro-batches.
    """
    return completion_mask / (completion_mask.sum().clamp(min=1) * totals.micro_batches)


def token_weights(completion_mask: Tensor, *, average: str, totals: Totals, dtype: torch.dtype | None = None) -> Tensor:
    """Return the token weights, [B, C] of `dtype` (default float32), 0 where masked.

    Raises:
        ConfigError: no function of the name `average` is registered.
    """
    return AVERAGES.get(average)(completion_mask.to(dtype or torch.float32), totals)


def mean_weights(mask: Tensor, tokens: Tensor | int, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weights of a mean over `tokens` tokens, [B, C]: 1 / tokens where `mask`, else 0.

    The entropy bonus and the likelihoods of positive examples and of given tokens are such means, whatever loss.average
    is.
    """
    return mask.to(dtype or torch.float32) / _at_least_one(tokens)


def _at_least_one(count: Tensor | int) -> Tensor:
    return torch.as_tensor(count).clamp(min=1)
