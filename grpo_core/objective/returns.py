"""Returns of tokens: the rewards that come at a token or after it. [..., C] with a mask of the policy's own tokens."""

import torch
from torch import Tensor


def place_at_end(rewards: Tensor, completion_mask: Tensor) -> Tensor:
    """Return rewards [...] at the last token of each completion, [..., C]; a completion without tokens has none."""
    last = completion_mask & (completion_mask.flip(-1).cumsum(dim=-1).flip(-1) == 1)
    return rewards[..., None] * last


def discounted_returns(token_rewards: Tensor, completion_mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Return R_t = r_t + gamma R_(t+1) for tokens of the mask, [..., C], 0 elsewhere.

    Masked tokens are skipped: they are not discounted, and a reward at one is dropped.
    """
    returns, following = torch.zeros_like(token_rewards), torch.zeros_like(token_rewards[..., 0])
    for t in reversed(range(token_rewards.shape[-1])):
        own = completion_mask[..., t]
        following = torch.where(own, token_rewards[..., t] + gamma * following, following)
        returns[..., t] = torch.where(own, following, 0.0)
    return returns


def whiten_tokens(values: Tensor, completion_mask: Tensor, *, eps: float = 1e-8, std_ddof: int = 1) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) over all tokens of the mask (n - std_ddof), [..., C], 0 elsewhere.

    Without a spread and with an eps of 0 all are 0.
    """
    count = completion_mask.sum()
    centered = values - (values * completion_mask).sum() / count.clamp(min=1)
    variance = (centered.square() * completion_mask).sum() / (count - std_ddof).clamp(min=1)
    return torch.where(completion_mask & (variance + eps > 0), centered * (variance + eps).rsqrt(), 0.0)


def token_baseline(
    returns: Tensor,  # [N, G, C]
    logprobs: Tensor,  # [N, G, C]
    sum_p_squared: Tensor,  # [N, G, C]
    rollout_weights: Tensor,  # [N, G, C]
    completion_mask: Tensor,  # [N, G, C] bool
) -> Tensor:
    """Return the optimal token baseline, [N, 1, C]: sum_i(R W_t) / sum_i(W_t) over the group's rows with a token t.

    W_t = sum over j <= t of w_j**2 (1 - 2 p_j + sum_v p_v**2), the expected squared norm of the gradient of the logits
    up to token t, weighted. arXiv:2602.07078.
    """
    norms = (1 - 2 * logprobs.exp() + sum_p_squared) * rollout_weights.square() * completion_mask
    weights = norms.cumsum(dim=2) * completion_mask
    return (weights * returns).sum(dim=1, keepdim=True) / (weights.sum(dim=1, keepdim=True) + 1e-8)


def turn_returns(rewards: Tensor, turn_rewards: Tensor, turn_ids: Tensor, discount: float = 1.0) -> Tensor:
    """Return R_t = r_t + discount R_(t+1) of the turns of each completion, [N, G, T]; NaN where there is no such turn.

    r_t are `turn_rewards` [N, G, T]; what they leave of the reward [N, G] came with the last turn. A completion without
    a reward has no returns. `turn_ids` [N, G, C] say how many turns there are.
    """
    count = turn_ids.amax(dim=2, keepdim=True) + 1
    width = max(int(count.max()), 1)
    place = torch.arange(width, device=rewards.device)
    exists = place < count
    given = turn_rewards[..., :width].to(rewards.dtype)
    given = torch.nn.functional.pad(given, (0, width - given.shape[2])).nan_to_num() * exists
    rest = rewards[..., None] - given.sum(dim=2, keepdim=True)
    given, returns = given + rest * (place == count - 1), torch.full_like(given, torch.nan)
    following = torch.zeros_like(rewards)
    for t in reversed(range(width)):
        following = torch.where(exists[..., t], given[..., t] + discount * following, following)
        returns[..., t] = following.masked_fill(~exists[..., t] | rewards.isnan(), torch.nan)
    return returns


def close_gaps(values: Tensor, completion_mask: Tensor) -> Tensor:
    """Return `values` [..., C] with the tokens of the mask moved to the front, in their order."""
    order = (~completion_mask).to(torch.int8).sort(dim=-1, stable=True).indices
    return values.gather(-1, order)


def open_gaps(values: Tensor, completion_mask: Tensor) -> Tensor:
    """Return the inverse of `close_gaps`: the first values of each row at the places of the mask, 0 elsewhere."""
    places = (completion_mask.cumsum(dim=-1) - 1).clamp(min=0)
    return torch.where(completion_mask, values.gather(-1, places), 0.0)
