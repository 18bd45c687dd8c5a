"""Group-relative advantages.

An advantage function maps rewards [N, G] to advantages [N, G]. Row n holds the G completions of prompt n, so a
statistic of the group is a reduction over dim 1. The rows are those of all ranks, so a statistic of the batch is a
reduction over both dimensions.

A reward of NaN stands for None, a completion that could not be scored. It is left out of means and standard deviations,
and its advantage is 0. A group whose rewards are all equal (a tied group) has advantage exactly 0. This is enforced,
because the mean of equal floats is not always that float, and dividing the rounding error by a small eps makes it
large.

A function may also take arguments of these names: `lengths` [N, G] (tokens of each completion), `components` [K, N, G]
(the K rewards before they are summed) and `weights` [K]. Where a function has the attribute `reads_components`, a group
is tied only if it is tied in every component.

All functions raise ConfigError unless rewards are [N, G] with G >= 2.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from grpo_core.registry import Registry
from grpo_core.schema import ConfigError

ADVANTAGES = Registry("advantage")

USES_BATCH = "it uses a statistic of the whole batch on purpose"


@ADVANTAGES.register("grpo")
def grpo_advantages(rewards: Tensor, *, eps: float = 1e-4, std_ddof: int = 1) -> Tensor:
    """(r - mean) / (std + eps), mean and std (n - std_ddof) of the group

    DeepSeekMath, arXiv:2402.03300.
    """
    centered, counts = center(rewards)
    variance = centered.square().sum(dim=1, keepdim=True) / (counts - std_ddof).clamp(min=1)
    return _divide_by_std(centered, variance.sqrt(), eps, std_ddof)


@ADVANTAGES.register("dr_grpo")
def dr_grpo_advantages(rewards: Tensor) -> Tensor:
    """r - mean of the group

    Dividing by the standard deviation, as grpo does, gives more weight to prompts that are nearly always or nearly
    never solved. arXiv:2503.20783.
    """
    return center(rewards)[0]


ADVANTAGES.register("centered")(dr_grpo_advantages)


@ADVANTAGES.register("batch_std", breaks={"groups": USES_BATCH})
def batch_std_advantages(rewards: Tensor, *, eps: float = 1e-4, std_ddof: int = 1) -> Tensor:
    """(r - mean of the group) / (std of the batch's rewards (n - std_ddof) + eps)

    arXiv:2508.08221 (Lite PPO).
    """
    centered, _ = center(rewards)
    return _divide_by_std(centered, _batch_std(rewards, std_ddof), eps, std_ddof)


@ADVANTAGES.register("rloo")
def rloo_advantages(rewards: Tensor) -> Tensor:
    """r - mean of the other rewards of the group

    arXiv:2402.14740.
    """
    centered, counts = center(rewards)
    return centered * counts / (counts - 1).clamp(min=1)


@ADVANTAGES.register("opo", breaks={"zero_mean": "its baseline weights the rewards by length"})
def opo_advantages(rewards: Tensor, lengths: Tensor) -> Tensor:
    """r - sum(length r) / sum(length), over the group

    The baseline with the least variance if the squared norm of a completion's gradient is proportional to its length,
    which holds for every loss.average except `sequence`. arXiv:2505.23585.
    """
    centered, _ = center(rewards)  # the result does not change with a constant shift, and tied groups become exactly 0
    weight = lengths.to(rewards.dtype) * ~rewards.isnan()
    baseline = (weight * centered).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(_has_signal(rewards), centered - baseline, 0.0)


@ADVANTAGES.register("reinforce_pp_baseline", breaks={"groups": USES_BATCH})
def reinforce_pp_baseline_advantages(rewards: Tensor, *, eps: float = 1e-4, std_ddof: int = 1) -> Tensor:
    """(d - mean(d)) / (std(d) + eps) over the batch (n - std_ddof), d = r - mean of the group

    REINFORCE++ with a group baseline, arXiv:2501.03262. Tied groups count in the batch's mean and standard deviation,
    and their advantages stay 0. Both statistics are over completions; implementations that take them over tokens give
    long completions more weight.
    """
    return _whiten(center(rewards)[0], rewards, _has_signal(rewards), eps, std_ddof)


@ADVANTAGES.register(
    "gdpo",
    reads_components=True,
    breaks={"groups": USES_BATCH, "order": "it orders by the sum of normalised rewards, not by r"},
)
def gdpo_advantages(
    rewards: Tensor, components: Tensor, weights: Tensor, *, eps: float = 1e-4, std_ddof: int = 1
) -> Tensor:
    """(z - mean(z)) / (std(z) + eps) over the batch, z = sum_k w_k (r_k - mean_k) / (std_k + eps) in the group

    Each reward is normalised in its group before the sum, so that a reward of small spread still counts beside one of
    large spread. A group is tied only if it is tied in every reward with a weight: rewards can differ while their sum
    does not. arXiv:2601.05242.
    """
    _check_groups(rewards)
    normalised = torch.stack([grpo_advantages(component, eps=eps, std_ddof=std_ddof) for component in components])
    z = (normalised * weights.to(rewards.dtype).view(-1, 1, 1)).sum(dim=0)
    tied = torch.stack([tied_groups(component) for component in components[weights != 0]]).all(dim=0)
    return _whiten(z, rewards, ~rewards.isnan() & ~tied[:, None], eps, std_ddof)


ONLY_THE_BEST = "only the best completion of the group has an advantage"


@ADVANTAGES.register("pass_at_k", breaks={"zero_mean": ONLY_THE_BEST, "order": ONLY_THE_BEST})
def pass_at_k_advantages(rewards: Tensor) -> Tensor:
    """r_max - r_2nd for the best of the group, 0 for the others

    The best completion raises the group's maximum by this much, so the expected gradient is that of pass@G.
    arXiv:2503.19595.
    """
    signal = _has_signal(rewards)
    best = rewards.masked_fill(rewards.isnan(), -torch.inf).topk(2, dim=1)
    is_best = torch.arange(rewards.shape[1], device=rewards.device) == best.indices[:, :1]
    return torch.where(signal & is_best, best.values[:, :1] - best.values[:, 1:], 0.0)


@ADVANTAGES.register("maxrl", breaks={"shift": "it divides by the mean, which fits rewards of 0 and 1 only"})
def maxrl_advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / mean of the group, for rewards of 0 and 1

    A prompt's weight decreases with its pass rate, as in maximum likelihood. MaxRL, arXiv:2602.02710. The advantage is
    0 in a group whose mean is 0 or below.
    """
    centered, counts = center(rewards)
    mean = rewards.nansum(dim=1, keepdim=True) / counts.clamp(min=1)
    return torch.where(mean > 0, centered / mean.where(mean > 0, 1.0), 0.0)


@ADVANTAGES.register("gpg", breaks={"groups": USES_BATCH})
def gpg_advantages(rewards: Tensor) -> Tensor:
    """(r - mean of the group) * completions / (completions in groups that are not tied)

    The factor compensates for the groups of the batch that have no gradient. arXiv:2504.02546.
    """
    return center(rewards)[0] * ((~rewards.isnan()).sum() / _has_signal(rewards).sum().clamp(min=1))


def compute_advantages(
    function: Callable,
    rewards: Tensor,  # [N, G]
    *,
    lengths: Tensor | None = None,  # [N, G]
    components: Tensor | None = None,  # [K, N, G]
    weights: Tensor | None = None,  # [K]
) -> Tensor:
    """Call an advantage function with the arguments that it declares, and return the advantages, [N, G].

    Without `lengths` all completions have length 1; without `components` the rewards are the only component, and
    without `weights` every weight is 1.

    Raises:
        ConfigError: the function returned another shape than [N, G], or a value that is not finite.
    """
    if weights is None:
        weights = torch.ones(1 if components is None else len(components), device=rewards.device)
    optional = {
        "lengths": torch.ones_like(rewards) if lengths is None else lengths,
        "components": rewards[None] if components is None else components,
        "weights": weights,
    }
    parameters = inspect.signature(function).parameters
    values = function(rewards, **{name: value for name, value in optional.items() if name in parameters})
    name = getattr(getattr(function, "func", function), "__name__", "function")
    if not isinstance(values, Tensor):
        raise ConfigError(f"advantage {name} returned {type(values).__name__}; it must return a tensor [N, G]")
    if values.shape != rewards.shape:
        shape, expected = tuple(values.shape), tuple(rewards.shape)
        raise ConfigError(f"advantage {name} returned shape {shape}; it must return [N, G] = {expected}")
    if not values.isfinite().all():
        raise ConfigError(f"advantage {name} returned a value that is not finite; it must return finite values")
    return values


def tie_small_spreads(rewards: Tensor, min_group_std: float) -> Tensor:
    """Return rewards [..., G] in which every group with std (n - 1) below `min_group_std` is set to its mean.

    Otherwise dividing by the standard deviation turns a difference of 1e-3 in one of four rewards into an advantage of
    1.25.
    """
    if min_group_std <= 0:
        return rewards
    counts = (~rewards.isnan()).sum(dim=-1, keepdim=True)
    mean = rewards.nansum(dim=-1, keepdim=True) / counts.clamp(min=1)
    variance = (rewards - mean).square().nansum(dim=-1, keepdim=True) / (counts - 1).clamp(min=1)
    return torch.where((variance.sqrt() < min_group_std) & ~rewards.isnan(), mean, rewards)


def tied_groups(rewards: Tensor) -> Tensor:
    """Return the groups without a learning signal, [N] bool.

    In such a group all scored rewards are equal, or fewer than two completions are scored.
    """
    highest = rewards.nan_to_num(nan=-torch.inf).amax(dim=1)
    lowest = rewards.nan_to_num(nan=torch.inf).amin(dim=1)
    return highest <= lowest


def _has_signal(rewards: Tensor) -> Tensor:
    """Return the completions whose advantage may differ from 0, [N, G] bool: scored, in a group that is not tied."""
    _check_groups(rewards)
    return ~rewards.isnan() & ~tied_groups(rewards)[:, None]


def _check_groups(rewards: Tensor) -> None:
    if not isinstance(rewards, Tensor):
        raise ConfigError(f"rewards must be a tensor [N, G], got a {type(rewards).__name__}")
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ConfigError(f"rewards must be [N, G] with G >= 2, got {list(rewards.shape)}")


def center(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the group's mean from each reward.

    Returns:
        The centered rewards, [N, G], exactly 0 in a tied group and for an unscored completion.
        The number of scored completions of each group, [N, 1].
    """
    signal = _has_signal(rewards)
    counts = (~rewards.isnan()).sum(dim=1, keepdim=True)
    mean = rewards.nansum(dim=1, keepdim=True) / counts.clamp(min=1)
    return torch.where(signal, rewards - mean, 0.0), counts


def _batch_std(rewards: Tensor, ddof: int) -> Tensor:
    """Return the standard deviation (n - ddof) over the batch's scored completions, 0 where none is scored."""
    scored = rewards[~rewards.isnan()]
    return (scored - scored.mean()).square().sum().div(max(1, scored.numel() - ddof)).sqrt().nan_to_num()


def _whiten(values: Tensor, rewards: Tensor, signal: Tensor, eps: float, ddof: int) -> Tensor:
    """Standardise over the batch's scored completions; the result is exactly 0 where `signal` is false."""
    scored = torch.where(rewards.isnan(), torch.nan, values)
    centered = values - scored.nanmean().nan_to_num()
    return torch.where(signal, _divide_by_std(centered, _batch_std(scored, ddof), eps, ddof), 0.0)


def _divide_by_std(values: Tensor, std: Tensor, eps: float, ddof: int) -> Tensor:
    """Return values / (std + eps), and 0 where the divisor is 0.

    Raises:
        ConfigError: eps is negative, which would reverse the sign in groups of small spread, or infinite; or std_ddof
            is neither 0 nor 1.
    """
    if not 0 <= eps < math.inf:
        raise ConfigError(f"eps is {eps}; it must be at least 0")
    if ddof not in (0, 1):
        raise ConfigError(f"std_ddof is {ddof}; it must be 0 or 1")
    divisor = std + eps
    return torch.where(divisor == 0, 0.0, values / divisor)
