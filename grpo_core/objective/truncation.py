"""Treatment of truncated completions, those that reached sampling.max_new_tokens without an end-of-sequence token.

A truncation function is fn(rewards, lengths, truncated, max_new_tokens); the first three are [N, G]. It returns the
rewards from which the advantages are computed, [N, G], and the completions to train, [N, G] bool. A reward of NaN
leaves the completion out of its group's mean and standard deviation.
"""

import torch
from torch import Tensor

from grpo_core.registry import Registry
from grpo_core.schema import ConfigError

TRUNCATIONS = Registry("truncation")


@TRUNCATIONS.register("keep")
def keep(rewards: Tensor, lengths: Tensor, truncated: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """as any other completion"""
    return rewards, torch.ones_like(truncated)


@TRUNCATIONS.register("mask_loss")
def mask_loss(rewards: Tensor, lengths: Tensor, truncated: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """not trained; in its group's mean and spread

    DAPO's overlong filtering, arXiv:2503.14476. In the token weights, the completion's tokens are not counted, but the
    completion is.
    """
    return rewards, ~truncated


@TRUNCATIONS.register("mask_loss_and_baseline")
def mask_loss_and_baseline(
    rewards: Tensor, lengths: Tensor, truncated: Tensor, max_new_tokens: int
) -> tuple[Tensor, Tensor]:
    """not trained, and not in its group's mean and spread"""
    return rewards.masked_fill(truncated, torch.nan), ~truncated


@TRUNCATIONS.register("zero_reward", changes_reward=True)
def zero_reward(rewards: Tensor, lengths: Tensor, truncated: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """reward 0, whatever it was scored"""
    return rewards.masked_fill(truncated & ~rewards.isnan(), 0.0), torch.ones_like(truncated)


@TRUNCATIONS.register("soft_penalty", changes_reward=True)
def soft_penalty(
    rewards: Tensor, lengths: Tensor, truncated: Tensor, max_new_tokens: int, *, cache_share: float = 0.2
) -> tuple[Tensor, Tensor]:
    """reward + clip((max_new_tokens - cache - length) / cache, -1, 0), cache = cache_share * max_new_tokens

    The soft overlong penalty of DAPO, arXiv:2503.14476, where the cache is 4,096 of 20,480 tokens.
    """
    return rewards + soft_overlong_penalty(lengths, max_new_tokens, cache_share), torch.ones_like(truncated)


@TRUNCATIONS.register("length_penalty", changes_reward=True)
def length_penalty(
    rewards: Tensor, lengths: Tensor, truncated: Tensor, max_new_tokens: int, *, coef: float = 0.25
) -> tuple[Tensor, Tensor]:
    """reward - coef * mean(r) * length / longest, mean and longest of the group; for every completion

    Long completions are penalised where the group mostly succeeds, and left alone where it fails. As in prime-rl,
    https://github.com/PrimeIntellect-ai/prime-rl. A negative mean rewards length, so rewards should be 0 or above.
    """
    return penalize_length(rewards, lengths, coef), torch.ones_like(truncated)


def penalize_length(rewards: Tensor, lengths: Tensor, coef: float) -> Tensor:
    """Return rewards - coef * mean * length / longest, [N, G], mean (of scored completions) and longest of each group.

    Raises:
        ConfigError: coef is negative.
    """
    if not coef >= 0:
        raise ConfigError(f"coef is {coef}; it must be at least 0")
    counts = (~rewards.isnan()).sum(dim=1, keepdim=True).clamp(min=1)
    mean = rewards.nansum(dim=1, keepdim=True) / counts
    return rewards - coef * mean * lengths / lengths.amax(dim=1, keepdim=True).clamp(min=1)


def soft_overlong_penalty(lengths: Tensor, max_new_tokens: int, cache_share: float = 0.2) -> Tensor:
    """Return DAPO's penalty for long completions, in the shape of `lengths` (tokens). arXiv:2503.14476, equation 13.

    With cache = cache_share * max_new_tokens, the penalty is 0 up to max_new_tokens - cache tokens and then decreases
    linearly to -1 at max_new_tokens.

    Raises:
        ConfigError: cache_share is not above 0 and at most 1.
    """
    if not 0 < cache_share <= 1:
        raise ConfigError(f"cache_share is {cache_share}; it must be above 0 and at most 1")
    cache = cache_share * max_new_tokens
    return ((max_new_tokens - cache - lengths) / cache).clamp(-1.0, 0.0)
