"""Group-relative advantages.

An advantage function maps rewards [N, G] to advantages [N, G]. Row n holds the G completions of prompt n, so a
statistic of the group is a reduction over dim 1. The rows are those of all ranks, so a statistic of the batch is a
reduction over both dimensions.

A reward of NaN stands for None, a completion that could not be scored. It is left out of means and standard deviations,
and its advantage is 0. A group whose rewards are all equal (a tied group) has advantage exactly 0, except in
reinforce_plus_plus, which has no groups. This is enforced, because the mean of equal floats is not always that float,
and dividing the rounding error by a small eps makes it large.

A function may also ask by name for the inputs of inputs.py: `lengths` [N, G] (tokens of each completion), `components`
[K, N, G] (the K rewards before they are summed), `weights` [K], `turn_rewards` [N, G, T] of completions of several
turns, and `turn_ids`, log-probs and other statistics of tokens [N, G, C]. One that asks for the latter may return a
value for each token, [N, G, C]. Where a function has the attribute `reads_components`, a group is tied only if it is
tied in every component.

All functions raise ConfigError unless rewards are [N, G] with G >= 2.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from grpo_core.objective.inputs import ADVANTAGE_INPUTS, OF_TOKENS
from grpo_core.objective.returns import (
    close_gaps,
    discounted_returns,
    open_gaps,
    place_at_end,
    token_baseline,
    turn_returns,
    whiten_tokens,
)
from grpo_core.registry import Registry
from grpo_core.schema import ConfigError

ADVANTAGES = Registry("advantage")

Over = Literal["completions", "tokens"]  # what the statistics of a batch are taken over

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
def reinforce_pp_baseline_advantages(
    rewards: Tensor, lengths: Tensor, *, eps: float = 1e-4, std_ddof: int = 1, over: Over = "completions"
) -> Tensor:
    """(d - mean(d)) / (std(d) + eps) over the batch (n - std_ddof), d = r - mean of the group

    REINFORCE++ with a group baseline, arXiv:2501.03262. Tied groups count in the batch's mean and standard deviation,
    and their advantages stay 0. `over` says whether n counts completions or tokens; verl counts tokens, which gives
    long completions more weight.
    """
    weights = _weigh(rewards, lengths, over)
    return _whiten(center(rewards)[0], rewards, _has_signal(rewards), eps, std_ddof, weights)


@ADVANTAGES.register(
    "reinforce_plus_plus",
    breaks={
        "groups": USES_BATCH,
        "ties": "it has no group: a tied group is compared with the batch",
        "zero_mean": "it has no group, and the batch's advantages have mean 0",
    },
)
def reinforce_plus_plus_advantages(
    rewards: Tensor,
    lengths: Tensor,
    completion_mask: Tensor,
    *,
    eps: float = 1e-4,
    std_ddof: int = 1,
    over: Over = "completions",
    gamma: float = 1.0,
) -> Tensor:
    """(r - mean(r)) / (std(r) + eps) over the batch (n - std_ddof)

    REINFORCE++, arXiv:2501.03262. There is no group, so tied groups are trained. `over` says whether n counts
    completions or tokens; verl counts tokens. With gamma below 1, r is the return of a token, the reward discounted by
    gamma for each token that follows, and n counts tokens.
    """
    if not 0 <= gamma <= 1:
        raise ConfigError(f"gamma is {gamma}; it must be from 0 to 1")
    _check_groups(rewards)
    _check_spread(eps, std_ddof)
    scored = ~rewards.isnan()
    if gamma == 1:
        return _whiten(rewards.nan_to_num(), rewards, scored, eps, std_ddof, _weigh(rewards, lengths, over))
    mask = completion_mask & scored[..., None]
    returns = discounted_returns(place_at_end(rewards.nan_to_num(), mask), mask, gamma)
    return whiten_tokens(returns, mask, eps=eps**2, std_ddof=std_ddof)


reinforce_plus_plus_advantages.learns_from_ties = True  # type: ignore[attr-defined]


@ADVANTAGES.register(
    "gdpo",
    reads_components=True,
    breaks={"groups": USES_BATCH, "order": "it orders by the sum of normalised rewards, not by r"},
)
def gdpo_advantages(
    rewards: Tensor,
    components: Tensor,
    weights: Tensor,
    lengths: Tensor,
    *,
    eps: float = 1e-4,
    std_ddof: int = 1,
    over: Over = "completions",
) -> Tensor:
    """(z - mean(z)) / (std(z) + eps) over the batch, z = sum_k w_k (r_k - mean_k) / (std_k + eps) in the group

    Each reward is normalised in its group before the sum, so that a reward of small spread still counts beside one of
    large spread. A group is tied only if it is tied in every reward with a weight: rewards can differ while their sum
    does not. `over` says whether the batch's n counts completions or tokens; verl counts tokens. arXiv:2601.05242.
    """
    _check_groups(rewards)
    normalised = torch.stack([grpo_advantages(component, eps=eps, std_ddof=std_ddof) for component in components])
    z = (normalised * weights.to(rewards.dtype).view(-1, 1, 1)).sum(dim=0)
    tied = torch.stack([tied_groups(component) for component in components[weights != 0]]).all(dim=0)
    signal = ~rewards.isnan() & ~tied[:, None]
    return _whiten(z, rewards, signal, eps, std_ddof, _weigh(rewards, lengths, over))


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


@ADVANTAGES.register(
    "optimal_token_baseline",
    breaks={"zero_mean": "its baseline weights the rewards", "order": "the baseline differs from token to token"},
)
def optimal_token_baseline_advantages(
    rewards: Tensor, completion_mask: Tensor, logprobs: Tensor, sum_p_squared: Tensor, rollout_weights: Tensor
) -> Tensor:
    """r - sum_i(r W_t) / sum_i(W_t) for token t, over the completions i of the group that have a token t

    W_t = sum over j <= t of w_j**2 (1 - 2 p_j + sum_v p_v**2), the expected squared norm of the gradient of the logits
    up to token t, w the weights of the rollout correction: the baseline with the least variance for each token,
    [N, G, C]. t counts the completion's own tokens. Where only the longest completion has a token t, it is compared
    with nothing, and its advantage is 0. arXiv:2602.07078.
    """
    signal = _has_signal(rewards)
    trained = completion_mask & signal[..., None]
    values = center(rewards)[0][..., None].to(logprobs.dtype) * trained  # a constant shift changes nothing
    closed = [close_gaps(x, trained) for x in (values, logprobs, sum_p_squared, rollout_weights, trained)]
    is_compared = closed[-1].sum(dim=1, keepdim=True) > 1
    baseline = token_baseline(*closed)
    return open_gaps(torch.where(is_compared, closed[0] - baseline, 0.0), trained)


OF_EACH_TURN = "every turn has a baseline of its own: the advantages of a turn sum to 0 over the group"


@ADVANTAGES.register("turn_level", breaks={"zero_mean": OF_EACH_TURN, "order": OF_EACH_TURN})
def turn_level_advantages(
    rewards: Tensor,
    turn_rewards: Tensor,
    turn_ids: Tensor,
    *,
    discount: float = 1.0,
    divide_by_std: bool = False,
    eps: float = 1e-4,
    std_ddof: int = 1,
) -> Tensor:
    """R_t - mean of the group for the tokens of turn t, R_t = sum over s >= t of discount**(s - t) r_s

    r_s is the part of the reward that came with turn s; what came with no turn, as the rewards of whole completions,
    came with the last one. The mean is over the completions of the group that have a turn t; a turn that only one of
    them has is compared with nothing, and its advantage is 0. With divide_by_std, the difference is divided by
    std + eps (n - std_ddof) of the same returns. As in arXiv:2505.11821, rewards of turns are credited to turns.
    """
    if not 0 <= discount <= 1:
        raise ConfigError(f"discount is {discount}; it must be from 0 to 1")
    _check_groups(rewards)
    returns = turn_returns(rewards, turn_rewards, turn_ids, discount)
    groups = returns.transpose(1, 2).flatten(0, 1)  # [N * T, G]
    centered, counts = center(groups)
    if divide_by_std:
        variance = centered.square().sum(dim=1, keepdim=True) / (counts - std_ddof).clamp(min=1)
        centered = _divide_by_std(centered, variance.sqrt(), eps, std_ddof)
    values = centered.unflatten(0, (len(rewards), -1)).transpose(1, 2)
    return values.gather(2, turn_ids.long().clamp(min=0)).masked_fill(turn_ids < 0, 0.0)


@ADVANTAGES.register("grpo_passk", breaks={"zero_mean": ONLY_THE_BEST, "order": ONLY_THE_BEST})
def grpo_passk_advantages(rewards: Tensor, *, eps: float = 1e-6, std_ddof: int = 1) -> Tensor:
    """(r_max - r_2nd) / (std + eps) for the best of the group, 0 for the others, std (n - std_ddof) of the group

    pass_at_k divided by the group's standard deviation, as in verl. arXiv:2503.19595.
    """
    centered, counts = center(rewards)
    variance = centered.square().sum(dim=1, keepdim=True) / (counts - std_ddof).clamp(min=1)
    return _divide_by_std(pass_at_k_advantages(rewards), variance.sqrt(), eps, std_ddof)


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
    **inputs: Tensor | None,  # by the names of ADVANTAGE_INPUTS.by_name; None stands for one that is not there
) -> Tensor:
    """Call an advantage function with the inputs that it asks for, and return the advantages, [N, G] or [N, G, C].

    Without "lengths" all completions have length 1; without "components" the rewards are the only component; without
    "weights" and "rollout_weights" every weight is 1; without "completion_mask" a completion is one token. Without
    "turn_ids" a completion is one turn, and without "turn_rewards" no reward came with a turn.

    Raises:
        ConfigError: rewards are not [N, G] with G >= 2; the function returned another shape, or a value that is not
            finite.
    """
    _check_groups(rewards)
    given = {name: value for name, value in inputs.items() if value is not None}
    given = {"lengths": torch.ones_like(rewards), "components": rewards[None], **given}
    given.setdefault("completion_mask", torch.ones_like(rewards, dtype=torch.bool)[..., None])
    given.setdefault("rollout_weights", torch.ones_like(given["completion_mask"], dtype=rewards.dtype))
    given.setdefault("turn_ids", given["completion_mask"].long() - 1)
    given.setdefault("turn_rewards", torch.zeros_like(rewards)[..., None])
    given.setdefault("weights", torch.ones(len(given["components"]), device=rewards.device))
    values = ADVANTAGE_INPUTS.call(function, {"rewards": rewards, **given})
    name = getattr(getattr(function, "func", function), "__name__", "function")
    if not isinstance(values, Tensor):
        raise ConfigError(f"advantage {name} returned {type(values).__name__}; it must return a tensor [N, G]")
    tokens = next((given[token] for token in OF_TOKENS if token in inputs), None)  # [N, G, C]
    if values.shape != rewards.shape and (tokens is None or values.shape != tokens.shape):
        expected = f"[N, G] = {tuple(rewards.shape)}"
        if tokens is not None:
            expected += f", or [N, G, C] = {tuple(tokens.shape)}"
        raise ConfigError(f"advantage {name} returned shape {tuple(values.shape)}; it must return {expected}")
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


def _weigh(rewards: Tensor, lengths: Tensor, over: Over) -> Tensor:
    """Return how often each completion counts in the batch's statistics, [N, G]: once, or once for each token."""
    counts = torch.ones_like(rewards) if over == "completions" else lengths.to(rewards.dtype)
    return counts.masked_fill(rewards.isnan(), 0.0)


def _whiten(values: Tensor, rewards: Tensor, signal: Tensor, eps: float, ddof: int, weights: Tensor) -> Tensor:
    """Standardise over the batch's scored completions; the result is exactly 0 where `signal` is false."""
    total = weights.sum()
    scored = values.masked_fill(rewards.isnan(), 0.0)
    centered = values - (weights * scored).sum() / total.clamp(min=1)
    squares = (weights * (scored - (weights * scored).sum() / total.clamp(min=1)).square()).sum()
    std = (squares / (total - ddof).clamp(min=1)).sqrt()
    return torch.where(signal, _divide_by_std(centered, std, eps, ddof), 0.0)


def _divide_by_std(values: Tensor, std: Tensor, eps: float, ddof: int) -> Tensor:
    """Return values / (std + eps), and 0 where the divisor is 0.

    Raises:
        ConfigError: by `_check_spread`.
    """
    _check_spread(eps, ddof)
    divisor = std + eps
    return torch.where(divisor == 0, 0.0, values / divisor)


def _check_spread(eps: float, ddof: int) -> None:
    """Raise ConfigError if eps is negative, which would reverse signs, or infinite; or std_ddof is neither 0 nor 1."""
    if not 0 <= eps < math.inf:
        raise ConfigError(f"eps is {eps}; it must be at least 0")
    if ddof not in (0, 1):
        raise ConfigError(f"std_ddof is {ddof}; it must be 0 or 1")
