"""Group-relative advantages.

Every function maps rewards [N, G] to advantages [N, G]: row n holds the G completions of prompt n, so "relative to the
group" is a reduction over dim 1 and needs no group ids. It sees the groups of all ranks, so "over the batch" is a
reduction over both. A reward of NaN stands for None, a completion that could not be scored: it is left out of means and
spreads, and its advantage is 0. A group whose rewards are all equal has advantage exactly 0, because the mean of equal
floats is not always that float and rounding noise over a small eps is not small.

A function may also take, by these names: `lengths` [N, G] (completion tokens), `components` [K, N, G] (the single
rewards) and `weights` [K]. With the fact `reads_components` a group counts as tied only where every component is.

Raises (all): ConfigError, a ValueError, unless rewards are [N, G] with G >= 2.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from grpo_core.registry import Registry
from grpo_core.schema import ConfigError

ADVANTAGES = Registry("advantage")

BATCH = "it is relative to the whole batch, and is meant to be"


@ADVANTAGES.register("grpo")
def grpo_advantages(rewards: Tensor, *, eps: float = 1e-4, std_ddof: int = 1) -> Tensor:
    """(r - mean) / (std + eps), mean and std (n - std_ddof) of the group

    DeepSeekMath, arXiv:2402.03300.
    """
    centered, counts = center(rewards)
    variance = centered.square().sum(dim=1, keepdim=True) / (counts - std_ddof).clamp(min=1)
    return centered / (variance.sqrt() + eps)


@ADVANTAGES.register("dr_grpo")
def dr_grpo_advantages(rewards: Tensor) -> Tensor:
    """r - mean of the group

    Dividing by the spread up-weights prompts nearly solved or nearly hopeless. arXiv:2503.20783.
    """
    return center(rewards)[0]


ADVANTAGES.register("centered")(dr_grpo_advantages)


@ADVANTAGES.register("batch_std", breaks={"groups": BATCH})
def batch_std_advantages(rewards: Tensor, *, eps: float = 1e-4, std_ddof: int = 1) -> Tensor:
    """(r - mean of the group) / (std of the batch's rewards (n - std_ddof) + eps)

    arXiv:2508.08221 (Lite PPO).
    """
    centered, _ = center(rewards)
    return centered / (_batch_std(rewards, std_ddof) + eps)


@ADVANTAGES.register("rloo")
def rloo_advantages(rewards: Tensor) -> Tensor:
    """r - mean of the other rewards of the group

    arXiv:2402.14740.
    """
    centered, counts = center(rewards)
    return centered * counts / (counts - 1).clamp(min=1)


@ADVANTAGES.register("opo", breaks={"zero_mean": "its baseline weighs rewards by length"})
def opo_advantages(rewards: Tensor, lengths: Tensor) -> Tensor:
    """r - sum(length r) / sum(length), over the group

    The baseline of least variance where the squared norm of a completion's gradient grows with its length, as it does
    under every average but `sequence`. arXiv:2505.23585.
    """
    centered, _ = center(rewards)  # shifts r by a constant of the group, and makes ties exact
    weight = lengths.to(rewards.dtype) * ~rewards.isnan()
    baseline = (weight * centered).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(_signal(rewards), centered - baseline, 0.0)


@ADVANTAGES.register("reinforce_pp_baseline", breaks={"groups": BATCH})
def reinforce_pp_baseline_advantages(rewards: Tensor, *, eps: float = 1e-4, std_ddof: int = 1) -> Tensor:
    """(d - mean(d)) / (std(d) + eps) over the batch (n - std_ddof), d = r - mean of the group

    REINFORCE++ with a group baseline, arXiv:2501.03262. Tied groups count in the batch's spread and stay at 0. Over
    completions; implementations that whiten over tokens let long ones count more.
    """
    return _whiten(center(rewards)[0], rewards, _signal(rewards), eps, std_ddof)


@ADVANTAGES.register(
    "gdpo",
    reads_components=True,
    breaks={"groups": BATCH, "order": "it ranks by the sum of normalised rewards, not by r"},
)
def gdpo_advantages(
    rewards: Tensor, components: Tensor, weights: Tensor, *, eps: float = 1e-4, std_ddof: int = 1
) -> Tensor:
    """(z - mean(z)) / (std(z) + eps) over the batch, z = sum_k w_k (r_k - mean_k) / (std_k + eps) in the group

    Every reward is normalised by itself before they are added, so that none drowns in another's spread.
    A group is tied where all of them are: rewards that cancel in their sum may still differ. arXiv:2601.05242.
    """
    _check_groups(rewards)
    normalised = torch.stack([grpo_advantages(component, eps=eps, std_ddof=std_ddof) for component in components])
    z = (normalised * weights.to(rewards.dtype).view(-1, 1, 1)).sum(dim=0)
    signal = ~rewards.isnan() & ~torch.stack([tied_groups(c) for c in components[weights != 0]]).all(dim=0)[:, None]
    return _whiten(z, rewards, signal, eps, std_ddof)


@ADVANTAGES.register("pass_at_k", breaks={"zero_mean": "only the best of the group has any", "order": "as zero_mean"})
def pass_at_k_advantages(rewards: Tensor) -> Tensor:
    """r_max - r_2nd for the best of the group, 0 for the others

    What the best adds to max over the group: the gradient of pass@G. arXiv:2503.19595.
    """
    signal = _signal(rewards)
    best = rewards.masked_fill(rewards.isnan(), -torch.inf).topk(2, dim=1)
    is_best = torch.arange(rewards.shape[1], device=rewards.device) == best.indices[:, :1]
    return torch.where(signal & is_best, best.values[:, :1] - best.values[:, 1:], 0.0)


@ADVANTAGES.register("maxrl", breaks={"shift": "it divides by the mean: rewards are 0 or 1"})
def maxrl_advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / mean of the group, for rewards of 0 and 1

    The weight of a prompt falls with its pass rate, as in maximum likelihood. MaxRL, arXiv:2602.02710. Groups whose
    mean is not above 0 get 0.
    """
    centered, counts = center(rewards)
    mean = rewards.nansum(dim=1, keepdim=True) / counts.clamp(min=1)
    return torch.where(mean > 0, centered / mean.where(mean > 0, 1.0), 0.0)


@ADVANTAGES.register("gpg", breaks={"groups": BATCH})
def gpg_advantages(rewards: Tensor) -> Tensor:
    """(r - mean of the group) * completions / (completions in groups that are not tied)

    The factor makes up for the groups of the batch that pull nothing. arXiv:2504.02546.
    """
    return center(rewards)[0] * ((~rewards.isnan()).sum() / _signal(rewards).sum().clamp(min=1))


def compute_advantages(
    function: Callable,
    rewards: Tensor,  # [N, G]
    *,
    lengths: Tensor | None = None,  # [N, G]
    components: Tensor | None = None,  # [K, N, G]
    weights: Tensor | None = None,  # [K]
) -> Tensor:
    """Call an advantage function with what it takes, [N, G].

    Left out, lengths are equal and the rewards are their own only component.

    Raises:
        ConfigError: it returned another shape, or something that is not finite.
    """
    given = {
        "lengths": torch.ones_like(rewards) if lengths is None else lengths,
        "components": rewards[None] if components is None else components,
        "weights": torch.ones(1 if components is None else len(components)) if weights is None else weights,
    }
    taken = inspect.signature(function).parameters
    values = function(rewards, **{name: value for name, value in given.items() if name in taken})
    name = getattr(getattr(function, "func", function), "__name__", "the advantage")
    if not isinstance(values, Tensor) or values.shape != rewards.shape:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ConfigError(f"advantage {name} returned {shape}; it must return [N, G] = {tuple(rewards.shape)}")
    if not values.isfinite().all():
        raise ConfigError(f"advantage {name} returned a value that is not finite")
    return values


def tie_small_spreads(rewards: Tensor, min_group_std: float) -> Tensor:
    """Rewards [..., G] in which a group whose std (n - 1) is below `min_group_std` is tied exactly.

    Else a gap of 1e-3 in one of four rewards becomes an advantage of 1.25.
    """
    if min_group_std <= 0:
        return rewards
    counts = (~rewards.isnan()).sum(dim=-1, keepdim=True)
    mean = rewards.nansum(dim=-1, keepdim=True) / counts.clamp(min=1)
    variance = (rewards - mean).square().nansum(dim=-1, keepdim=True) / (counts - 1).clamp(min=1)
    return torch.where((variance.sqrt() < min_group_std) & ~rewards.isnan(), mean, rewards)


def tied_groups(rewards: Tensor) -> Tensor:
    """Groups without a signal, [N] bool: all (scored) rewards equal, or fewer than two scored."""
    highest = rewards.nan_to_num(nan=-torch.inf).amax(dim=1)
    lowest = rewards.nan_to_num(nan=torch.inf).amin(dim=1)
    return highest <= lowest


def _signal(rewards: Tensor) -> Tensor:
    """Where an advantage may differ from 0, [N, G] bool: scored, in a group that is not tied."""
    _check_groups(rewards)
    return ~rewards.isnan() & ~tied_groups(rewards)[:, None]


def _check_groups(rewards: Tensor) -> None:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ConfigError(f"rewards must be [N, G] with G >= 2, got {list(rewards.shape)}")


def center(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards minus their group's mean [N, G], exactly 0 where tied or unscored; scored rows of each group [N, 1]."""
    signal = _signal(rewards)
    counts = (~rewards.isnan()).sum(dim=1, keepdim=True)
    mean = rewards.nansum(dim=1, keepdim=True) / counts.clamp(min=1)
    return torch.where(signal, rewards - mean, 0.0), counts


def _batch_std(rewards: Tensor, ddof: int) -> Tensor:
    scored = rewards[~rewards.isnan()]
    return (scored - scored.mean()).square().sum().div(max(1, scored.numel() - ddof)).sqrt().nan_to_num()


def _whiten(values: Tensor, rewards: Tensor, signal: Tensor, eps: float, ddof: int) -> Tensor:
    """Zero mean and unit spread over the batch's scored completions; exactly 0 where there is no signal."""
    scored = torch.where(rewards.isnan(), torch.nan, values)
    centered = values - scored.nanmean().nan_to_num()
    return torch.where(signal, centered / (_batch_std(scored, ddof) + eps), 0.0)
