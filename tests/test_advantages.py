"""Laws for every registered advantage, and a hand table for what laws cannot see."""

import pytest
import torch

from grpo_core.objective.advantage_laws import ADVANTAGE_LAWS, check_advantage
from grpo_core.objective.advantages import ADVANTAGES, compute_advantages, tie_small_spreads, tied_groups
from grpo_core.registry import get_fact

NAN = float("nan")
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]])


def close(a, b, **kwargs):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), **kwargs)


def values(name, rewards=REWARDS, *, args=None, **given):
    return compute_advantages(ADVANTAGES.build(name, args), rewards, **given)


@pytest.mark.parametrize("name", sorted(ADVANTAGES.functions))
def test_it_holds_the_laws_or_says_which_it_breaks(name):
    outcomes = check_advantage(ADVANTAGES.get(name))
    assert [o for o in outcomes if not o.ok] == []
    assert {o.law for o in outcomes if not o.holds} == (get_fact(ADVANTAGES.get(name), "breaks") or {}).keys()


UNSOUND = {
    "ties": lambda r: (r - r.mean(dim=1, keepdim=True)) / 1e-9,
    "unscored": lambda r: r.nan_to_num(0.0) - r.nan_to_num(0.0).mean(dim=1, keepdim=True),
    "zero_mean": lambda r: r - r.amin(dim=1, keepdim=True),
    "order": lambda r: r.mean(dim=1, keepdim=True) - r,
    "shift": lambda r: r / r.mean(dim=1, keepdim=True) - 1,
    "places": lambda r: (r - r.mean(dim=1, keepdim=True)) * torch.arange(r.shape[1]),
    "groups": lambda r: r - r.mean(),
    "shape": lambda r: (r - r.mean(dim=1, keepdim=True)).flatten(),
}


@pytest.mark.parametrize("law", ADVANTAGE_LAWS)
def test_an_unsound_advantage_is_caught_by_its_law(law):
    assert law in {outcome.law for outcome in check_advantage(UNSOUND[law]) if not outcome.ok}


def test_by_hand():
    grpo = values("grpo", args={"eps": 0.0})
    close(grpo[0], [3**0.5 / 2, -(3**0.5) / 2, -(3**0.5) / 2, 3**0.5 / 2])  # std with ddof 1 is 1/sqrt(3)
    close(values("grpo", args={"eps": 0.0, "std_ddof": 0})[0], [1.0, -1.0, -1.0, 1.0])
    close(values("grpo", args={"eps": 1.0, "std_ddof": 0})[0], [1 / 3, -1 / 3, -1 / 3, 1 / 3])
    for name in ("dr_grpo", "centered"):
        close(values(name)[1], [1.5, -0.5, -0.5, -0.5])
    close(values("rloo")[1], [2.0, -2 / 3, -2 / 3, -2 / 3])
    close(values("maxrl")[1], [3.0, -1.0, -1.0, -1.0])
    close(values("pass_at_k"), [[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])  # the first group's best is shared
    close(values("pass_at_k", torch.tensor([[0.2, NAN, 0.9, 0.5]])), [[0.0, 0.0, 0.4, 0.0]])


def test_batch_statistics_by_hand():
    spread = 4**0.5 / 7**0.5  # rewards 1 0 0 1 2 0 0 0: mean 1/2, squares about it add up to 4
    close(values("batch_std", args={"eps": 0.0}), (REWARDS - REWARDS.mean(dim=1, keepdim=True)) / spread)
    centered = torch.tensor([0.5, -0.5, -0.5, 0.5, 1.5, -0.5, -0.5, -0.5])
    close(values("reinforce_pp_baseline", args={"eps": 0.0}).flatten(), centered / centered.std())
    tied = torch.cat([REWARDS, torch.ones(2, 4)])
    gpg = values("gpg", tied)
    close(gpg[:2], 2 * (REWARDS - REWARDS.mean(dim=1, keepdim=True)))  # half of the completions have an advantage
    assert (gpg[2:] == 0).all()
    at_its_mean = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])  # a completion at its group's mean is no tie
    close(values("gpg", at_its_mean)[0], [-1.0, 0.0, 1.0])


def test_opo_weighs_its_baseline_by_length():
    lengths = torch.tensor([[1, 1, 1, 1], [3, 1, 1, 1]])
    close(values("opo", lengths=lengths), [[0.5, -0.5, -0.5, 0.5], [1.0, -1.0, -1.0, -1.0]])


def test_gdpo_normalises_each_reward_by_itself():
    components = torch.tensor([[[1.0, 0.0, 0.0, 1.0]], [[10.0, 10.0, 30.0, 30.0]]])
    weights = torch.tensor([1.0, 0.5])
    ours = values("gdpo", components.sum(dim=0), args={"eps": 0.0}, components=components, weights=weights)
    one = 3**0.5 / 2
    summed = torch.tensor([[one - one / 2, -one - one / 2, -one + one / 2, one + one / 2]])
    close(ours, summed / summed.std())
    # rewards that cancel in their sum are no tie: w z = -z_1 + 2 z_2 = z_1 of the first group
    cancel = torch.tensor([[[0.0, 1.0, 0.0, 1.0], [1.0] * 4], [[1.0, 0.5, 1.0, 0.5], [2.0] * 4]])
    both = values(
        "gdpo",
        (cancel * torch.tensor([1.0, 2.0]).view(2, 1, 1)).sum(dim=0),
        components=cancel,
        weights=torch.tensor([1.0, 2.0]),
    )
    assert (both[0, [0, 2]] > 0.5).all() and (both[0, [1, 3]] < -0.5).all() and (both[1] == 0).all()
    scaled = components * torch.tensor([1.0, 100.0]).view(2, 1, 1)
    close(values("gdpo", scaled.sum(dim=0), args={"eps": 0.0}, components=scaled, weights=weights), ours)


def test_near_ties_are_levelled():
    """Without it a gap of 1e-3 is an advantage of 1.25."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.001], [1.0, 0.0, 0.0, NAN], [0.1, NAN, 0.1001, 0.1]])
    assert values("grpo", rewards)[0].max() > 1.2
    assert tied_groups(tie_small_spreads(torch.tensor([[0.0, 0.02]]), 0.01)).tolist() == [False]  # a std of 0.014
    assert tied_groups(tie_small_spreads(torch.tensor([[0.0, 0.013]]), 0.01)).tolist() == [True]  # 0.009
    levelled = tie_small_spreads(rewards, 0.01)
    assert tied_groups(levelled).tolist() == [True, False, True]
    assert (values("grpo", levelled)[[0, 2]] == 0).all() and (levelled.isnan() == rewards.isnan()).all()
    close(values("grpo", levelled)[1], values("grpo", rewards)[1])
    assert tie_small_spreads(rewards, 0.0) is rewards


@pytest.mark.parametrize("name", sorted(ADVANTAGES.functions))
@pytest.mark.parametrize("shape", [(16,), (4, 1), (2, 3, 4)])
def test_a_batch_without_groups_is_refused(name, shape):
    with pytest.raises(ValueError, match=r"\[N, G\] with G >= 2"):
        values(name, torch.rand(shape))


def test_tied_groups_with_unscored_rows():
    rewards = torch.tensor([[1.0, NAN, 0.0, 0.5], [NAN, NAN, NAN, 1.0], [0.3, 0.3, NAN, 0.3], [NAN] * 4])
    assert tied_groups(rewards).tolist() == [False, True, True, True]


def test_what_an_own_advantage_returns_is_checked():
    with pytest.raises(ValueError, match=r"advantage flat returned shape \(8,\); it must return \[N, G\] = \(2, 4\)"):

        def flat(rewards):
            return rewards.flatten()

        compute_advantages(flat, REWARDS)
    with pytest.raises(ValueError, match="advantage worse returned a value that is not finite"):

        def worse(rewards):
            return rewards / 0

        compute_advantages(worse, REWARDS)
