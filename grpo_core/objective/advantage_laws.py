"""Laws that every advantage function must obey; objective/laws.py has those of losses.

`check-advantage` applies them to a user's advantage function, and the tests to every registered one. The docstring of a
law is the statement that `check-advantage` prints beside the result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_core.objective.advantages import compute_advantages, tied_groups
from grpo_core.objective.laws import Outcome, run_laws

N, G, C = 5, 8, 6
NAN = float("nan")


def check_advantage(advantage_fn: Callable) -> list[Outcome]:
    """Check every law; takes less than a second."""
    return run_laws(advantage_fn, ADVANTAGE_LAWS)


def shape(advantage_fn: Callable) -> tuple[bool, str]:
    """rewards [N, G] give finite advantages [N, G], or [N, G, C] with a value for each token"""
    values = call(advantage_fn, rewards(), per_token=True)
    return values.shape in ((N, G), (N, G, C)) and bool(values.isfinite().all()), str(list(values.shape))


def ties(advantage_fn: Callable) -> tuple[bool, str]:
    """a group whose rewards are all equal has advantages of exactly 0, even where its mean is rounded"""
    largest = 0.0
    for value in (0.0, 0.1, 0.3, 1.1, -4.3):
        for size in (2, 8, 12, 55):
            tied = torch.full((3, size), value)
            mixed = torch.cat([tied, rewards(size).float()])
            for case in (tied, mixed):
                largest = max(largest, float(call(advantage_fn, case, per_token=True)[:3].abs().max()))
    return largest == 0, f"{largest:.1g}"


def unscored(advantage_fn: Callable) -> tuple[bool, str]:
    """a completion without a reward has advantage 0 and no effect on the other advantages of its group"""
    partly = torch.tensor([[1.0, NAN, 0.0, 0.5], [1.0, NAN, 0.0, 0.0]])
    scored = torch.tensor([0, 2, 3])
    values = call(advantage_fn, partly)
    gap = (values[:, scored] - call(advantage_fn, partly[:, scored], scored)).abs().max()
    none = call(advantage_fn, torch.full((2, 4), NAN)).abs().max() + values[:, 1].abs().max()
    alone = call(advantage_fn, torch.tensor([[NAN, NAN, NAN, 1.0]])).abs().max()
    return bool(gap < 1e-6 and none == 0 and alone == 0), f"{float(gap + none + alone):.1g}"


def zero_mean(advantage_fn: Callable) -> tuple[bool, str]:
    """the advantages of a group sum to 0"""
    largest = float(call(advantage_fn, rewards()).sum(dim=1).abs().max())
    return largest < 1e-10, f"{largest:.1g}"


def order(advantage_fn: Callable) -> tuple[bool, str]:
    """within a group a higher reward has a higher advantage"""
    values = call(advantage_fn, rewards(), components=components())
    wrong = int((values.argsort(dim=1) != rewards().argsort(dim=1)).sum())
    return wrong == 0, f"{wrong} of {N * G} not"


def shift(advantage_fn: Callable) -> tuple[bool, str]:
    """adding a constant to all rewards has no effect"""
    gap = float((call(advantage_fn, rewards() + 3) - call(advantage_fn, rewards())).abs().max())
    return gap < 1e-10, f"{gap:.1g}"


def places(advantage_fn: Callable) -> tuple[bool, str]:
    """the order of the completions in a group has no effect"""
    order = torch.randperm(G, generator=torch.Generator().manual_seed(1))
    gap = (call(advantage_fn, rewards()[:, order], order) - call(advantage_fn, rewards())[:, order]).abs().max()
    return bool(gap < 1e-10), f"{float(gap):.1g}"


def groups(advantage_fn: Callable) -> tuple[bool, str]:
    """a group's advantages do not depend on the other groups"""
    batch = torch.cat([rewards(), torch.full((1, G), 0.5, dtype=torch.double)])  # the last group is tied
    alone = torch.cat([call(advantage_fn, group[None]) for group in batch])
    gap = float((alone - call(advantage_fn, batch)).abs().max())
    return gap < 1e-10, f"{gap:.1g}"


ADVANTAGE_LAWS: dict[str, Callable[[Callable], tuple[bool, str]]] = {
    law.__name__: law for law in (shape, ties, unscored, zero_mean, order, shift, places, groups)
}


def rewards(size: int = G) -> Tensor:
    """Return rewards [5, size] in float64: no group is tied, and the groups have different spreads."""
    values = torch.rand(N, size, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    assert not tied_groups(values).any()
    return values * torch.tensor([[1.0], [0.5], [2.0], [1.0], [0.1]], dtype=torch.double)


def components() -> Tensor:
    """Return two rewards [2, 5, 8] with the sum `rewards()` whose orders within a group differ."""
    first = 2 * rewards().flip(dims=[1])
    return torch.stack([first, rewards() - first])


def call(
    advantage_fn: Callable,
    rewards: Tensor,  # [N, G]
    positions: Tensor | None = None,  # [G]; the completion in column i has positions[i] + 1 tokens; default: 0, 1, ...
    components: Tensor | None = None,
    per_token: bool = False,
) -> Tensor:
    """Return the advantages, [N, G], of completions of different lengths.

    What a function asks for by name is made up from the positions. Of advantages of tokens the sum over each completion
    is returned, or with `per_token` the advantages as they are, [N, G, C].
    """
    positions = torch.arange(rewards.shape[1]) if positions is None else positions
    lengths = (positions + 1).expand(rewards.shape)
    shape, place = (*rewards.shape, C), torch.arange(C)
    p = (0.2 + 0.6 * torch.sin(positions[:, None] + 2.0 * place).square()).to(rewards.dtype)  # [G, C]
    tokens = {
        "completion_mask": place < (positions + 1).clamp(max=C)[:, None],
        "logprobs": p.log(),
        "rollout_logprobs": p.log(),
        "ref_logprobs": (0.9 * p).log(),
        "teacher_logprobs": (0.8 * p).log(),
        "entropy": 2 * (1 - p),
        "sum_p_squared": p**2,
        "turn_ids": torch.where(place < (positions + 1).clamp(max=C)[:, None], place // 3, -1),  # of one or two turns
    }
    expanded = {name: values.expand(shape) for name, values in tokens.items()}
    values = compute_advantages(advantage_fn, rewards, lengths=lengths, components=components, **expanded)
    return values if per_token or values.dim() == 2 else (values * expanded["completion_mask"]).sum(dim=2)
