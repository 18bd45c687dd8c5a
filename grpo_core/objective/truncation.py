"""Completions that were cut off at the length limit: the sampler states the fact, one of these says what follows.

A mode is fn(rewards, lengths, truncated, max_new_tokens), the first three [N, G], and returns the rewards that the
advantages are computed from, NaN for "not in the baseline", and which completions are trained, [N, G] bool.
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

    DAPO's overlong filtering, arXiv:2503.14476. Its tokens leave the denominators, the completion itself does not.
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

    The soft overlong penalty of arXiv:2503.14476, there with 4,096 of 20,480 tokens.
    """
    return rewards + soft_overlong_penalty(lengths, max_new_tokens, cache_share), torch.ones_like(truncated)


def soft_overlong_penalty(lengths: Tensor, max_new_tokens: int, cache_share: float = 0.2) -> Tensor:
    """0 up to L_max - L_cache tokens, then linearly down to -1 at L_max; L_cache = cache_share * L_max.

    `lengths` of any shape, in tokens. DAPO, arXiv:2503.14476, equation 13.

    Raises:
        ConfigError: cache_share is not above 0 and at most 1.
    """
    if not 0 < cache_share <= 1:
        raise ConfigError(f"cache_share is {cache_share}; it must be above 0 and at most 1")
    cache = cache_share * max_new_tokens
    return ((max_new_tokens - cache - lengths) / cache).clamp(-1.0, 0.0)
