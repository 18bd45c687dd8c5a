"""What every advantage holds; `check-advantage` runs it on yours, the tests on ours. As laws.py for losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_core.objective.advantages import compute_advantages, tied_groups
from grpo_core.objective.laws import Outcome, run_laws

N, G = 5, 8
NAN = float("nan")


def check_advantage(advantage_fn: Callable) -> list[Outcome]:
    """Every law, in a moment."""
    return run_laws(advantage_fn, ADVANTAGE_LAWS)


def shape(advantage_fn: Callable) -> tuple[bool, str]:
    """[N, G] in, [N, G] out, finite"""
    values = call(advantage_fn, rewards())
    return values.shape == (N, G) and bool(values.isfinite().all()), str(list(values.shape))


def ties(advantage_fn: Callable) -> tuple[bool, str]:
    """a group whose rewards are all equal has advantage exactly 0, however its mean is rounded"""
    largest = 0.0
    for value in (0.0, 0.1, 0.3, 1.1, -4.3):
        for size in (2, 8, 12, 55):
            tied = torch.full((3, size), value)
            mixed = torch.cat([tied, rewards(size).float()])
            for case in (tied, mixed):
                largest = max(largest, float(call(advantage_fn, case)[:3].abs().max()))
    return largest == 0, f"{largest:.1g}"


def unscored(advantage_fn: Callable) -> tuple[bool, str]:
    """a completion without a reward has advantage 0, and the others' are as if it were not there"""
    holed, there = torch.tensor([[1.0, NAN, 0.0, 0.5], [1.0, NAN, 0.0, 0.0]]), torch.tensor([0, 2, 3])
    gap = (call(advantage_fn, holed)[:, there] - call(advantage_fn, holed[:, there], there)).abs().max()
    none = call(advantage_fn, torch.full((2, 4), NAN)).abs().max() + call(advantage_fn, holed)[:, 1].abs().max()
    alone = call(advantage_fn, torch.tensor([[NAN, NAN, NAN, 1.0]])).abs().max()
    return bool(gap < 1e-6 and none == 0 and alone == 0), f"{float(gap + none + alone):.1g}"


def zero_mean(advantage_fn: Callable) -> tuple[bool, str]:
    """the advantages of a group add up to 0"""
    largest = float(call(advantage_fn, rewards()).sum(dim=1).abs().max())
    return largest < 1e-10, f"{largest:.1g}"


def order(advantage_fn: Callable) -> tuple[bool, str]:
    """within a group a higher reward has a higher advantage"""
    ours = call(advantage_fn, rewards(), components=components())
    wrong = int((ours.argsort(dim=1) != rewards().argsort(dim=1)).sum())
    return wrong == 0, f"{wrong} of {N * G} not"


def shift(advantage_fn: Callable) -> tuple[bool, str]:
    """a constant added to all rewards changes nothing"""
    gap = float((call(advantage_fn, rewards() + 3) - call(advantage_fn, rewards())).abs().max())
    return gap < 1e-10, f"{gap:.1g}"


def places(advantage_fn: Callable) -> tuple[bool, str]:
    """the order of the completions in their group does not matter"""
    mixed = torch.randperm(G, generator=torch.Generator().manual_seed(1))
    gap = (call(advantage_fn, rewards()[:, mixed], mixed) - call(advantage_fn, rewards())[:, mixed]).abs().max()
    return bool(gap < 1e-10), f"{float(gap):.1g}"


def groups(advantage_fn: Callable) -> tuple[bool, str]:
    """a group's advantages do not depend on the other groups"""
    given = torch.cat([rewards(), torch.full((1, G), 0.5, dtype=torch.double)])  # the last one is tied
    alone = torch.cat([call(advantage_fn, row[None]) for row in given])
    gap = float((alone - call(advantage_fn, given)).abs().max())
    return gap < 1e-10, f"{gap:.1g}"


ADVANTAGE_LAWS: dict[str, Callable[[Callable], tuple[bool, str]]] = {
    law.__name__: law for law in (shape, ties, unscored, zero_mean, order, shift, places, groups)
}


def rewards(size: int = G) -> Tensor:
    """[5, size] float64, the groups of different spread, none tied."""
    values = torch.rand(N, size, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    assert not tied_groups(values).any()
    return values * torch.tensor([[1.0], [0.5], [2.0], [1.0], [0.1]], dtype=torch.double)


def components() -> Tensor:
    """Two rewards [2, 5, 8] that add up to `rewards()`, the second against the first."""
    first = 2 * rewards().flip(dims=[1])
    return torch.stack([first, rewards() - first])


def call(
    advantage_fn: Callable,
    given: Tensor,
    places: Tensor | None = None,  # [G] which of the lengths they have
    components: Tensor | None = None,
) -> Tensor:
    """The advantages where completion i of a group has i + 1 tokens."""
    places = torch.arange(given.shape[1]) if places is None else places
    return compute_advantages(advantage_fn, given, lengths=(places + 1).expand(given.shape), components=components)
