"""Group-relative advantages.

Every function maps rewards [N, G] to advantages [N, G]: row n holds the G completions of prompt n, so "relative to the
group" is a reduction over dim 1 and needs no group ids. A reward of NaN stands for None, a completion that could not be
scored: it is left out of means and spreads, and its advantage is 0. A group whose rewards are all equal has advantage
exactly 0, because the mean of equal floats is not always that float and rounding noise over a small eps is not small.

Raises (all): ValueError unless rewards are [N, G] with G >= 2.
"""

import torch
from torch import Tensor

from grpo_core.registry import Registry

ADVANTAGES = Registry("advantage")


@ADVANTAGES.register("grpo")
def grpo_advantages(rewards: Tensor, *, eps: float = 1e-4, std_ddof: int = 1) -> Tensor:
    """(r - mean) / (std + eps) within the group. DeepSeekMath, arXiv:2402.03300."""
    centered, counts = _center(rewards)
    variance = centered.square().sum(dim=1, keepdim=True) / (counts - std_ddof).clamp(min=1)
    return centered / (variance.sqrt() + eps)


@ADVANTAGES.register("dr_grpo")
def dr_grpo_advantages(rewards: Tensor) -> Tensor:
    """r - mean: dividing by the spread up-weights prompts nearly solved or nearly hopeless. arXiv:2503.20783."""
    return _center(rewards)[0]


@ADVANTAGES.register("rloo")
def rloo_advantages(rewards: Tensor) -> Tensor:
    """r - mean of the other G - 1 rewards of the group. arXiv:2402.14740."""
    centered, counts = _center(rewards)
    return centered * counts / (counts - 1).clamp(min=1)


def tied_groups(rewards: Tensor) -> Tensor:
    """Groups without a signal, [N] bool: all (scored) rewards equal, or fewer than two scored."""
    highest = rewards.nan_to_num(nan=-torch.inf).amax(dim=1)
    lowest = rewards.nan_to_num(nan=torch.inf).amin(dim=1)
    return highest <= lowest


def _center(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards minus their group's mean [N, G], exactly 0 where tied or unscored; scored rows of each group [N, 1]."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [N, G] with G >= 2, got {tuple(rewards.shape)}")
    scored = ~rewards.isnan()
    counts = scored.sum(dim=1, keepdim=True)
    mean = rewards.nansum(dim=1, keepdim=True) / counts.clamp(min=1)
    signal = scored & ~tied_groups(rewards)[:, None]
    return torch.where(signal, rewards - mean, 0.0), counts
