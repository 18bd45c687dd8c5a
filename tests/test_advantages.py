"""Laws for every registered advantage, and a hand table for what laws cannot see."""

import pytest
import torch

from grpo_core.objective.advantage_laws import ADVANTAGE_LAWS, check_advantage
from grpo_core.objective.advantages import ADVANTAGES, compute_advantages, tie_small_spreads, tied_groups
from grpo_core.objective.inputs import ADVANTAGE_INPUTS
from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError

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


TWO_GROUPS = torch.tensor([[1.0, NAN, 0.0], [4.0, 4.0, 4.0]])  # the second is tied


@pytest.mark.parametrize("over, counted", [("completions", [1, 0, 4, 4, 4]), ("tokens", [1, 0, 0, 4, 4, 4, 4])])
@pytest.mark.parametrize("ddof", [0, 1])
def test_reinforce_plus_plus_compares_with_the_batch(over, counted, ddof):
    counted, lengths = torch.tensor(counted).float(), torch.tensor([[1, 9, 2], [1, 1, 2]])
    args = {"eps": 0.5, "std_ddof": ddof, "over": over}
    expected = (TWO_GROUPS - counted.mean()) / (counted.std(correction=ddof) + 0.5)
    close(values("reinforce_plus_plus", args=args, rewards=TWO_GROUPS, lengths=lengths), expected.nan_to_num(0.0))
    if over == "completions":  # the default
        del args["over"]
        close(values("reinforce_plus_plus", args=args, rewards=TWO_GROUPS, lengths=lengths), expected.nan_to_num(0.0))


@pytest.mark.parametrize("gamma, ddof", [(0.0, 1), (0.2, 0), (0.2, 1), (0.7, 1)])
def test_reinforce_plus_plus_with_a_discount_compares_tokens(gamma, ddof):
    """A token that the policy did not draw is no step of the discount, and a tied group is trained."""
    mask = torch.tensor([[[1, 0, 1], [1, 1, 1], [1, 1, 0]], [[1, 0, 0], [1, 1, 1], [0, 1, 1]]]).bool()
    following = torch.tensor([[[1, 0, 0], [9, 9, 9], [1, 0, 0]], [[0, 0, 0], [2, 1, 0], [0, 1, 0]]])  # drawn tokens after it
    drawn = mask & ~TWO_GROUPS.isnan()[..., None]
    returns = TWO_GROUPS.nan_to_num()[..., None] * gamma**following
    spread = (returns[drawn].var(correction=ddof) + 0.3**2).sqrt()
    args = {"gamma": gamma, "eps": 0.3, "std_ddof": ddof}
    close(values("reinforce_plus_plus", args=args, rewards=TWO_GROUPS, completion_mask=mask), (returns - returns[drawn].mean()) / spread * drawn)


def test_reinforce_plus_plus_of_two_scored_completions_of_one_and_of_none():
    for gamma in (1.0, 0.5):
        for rewards, expected in (([1.0, 0.0, NAN], [0.5**0.5, -(0.5**0.5), 0.0]), ([NAN, 3.0, NAN], [0.0] * 3), ([NAN] * 3, [0.0] * 3)):
            args, mask = {"eps": 0.0, "gamma": gamma}, torch.ones(1, 3, 1, dtype=torch.bool)
            found = values("reinforce_plus_plus", torch.tensor([rewards]), args=args, completion_mask=mask)
            close(found.view(1, 3), [expected])
    for gamma in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"gamma is {gamma}; it must be from 0 to 1"):
            values("reinforce_plus_plus", args={"gamma": gamma})


DIVIDES = [
    *((name, {}) for name in ("grpo", "batch_std", "reinforce_pp_baseline", "reinforce_plus_plus", "gdpo", "grpo_passk")),
    ("reinforce_plus_plus", {"gamma": 0.5}),
]


@pytest.mark.parametrize("name, args", DIVIDES)
def test_the_divisor_is_checked(name, args):
    for wrong, message in (({"eps": -0.1}, "eps is -0.1; it must be at least 0"), ({"std_ddof": 2}, "std_ddof is 2; it must be 0 or 1")):
        with pytest.raises(ValueError, match=message):
            values(name, args={**args, **wrong}, completion_mask=torch.ones(2, 4, 3, dtype=torch.bool))


@pytest.mark.parametrize("ddof", [0, 1])
def test_grpo_passk_by_hand(ddof):
    """The best of the scored completions of a group, divided by their own spread; a group of one has nothing to learn."""
    rewards = torch.tensor([[-1.0, -0.25, NAN, -2.0], [0.0, 3.0, 1.0, 1.0], [NAN, NAN, 1.0, NAN], [2.0, 2.0, 2.0, 2.0], [2.0, 0.0, 2.0, 1.0]])
    expected = torch.zeros(5, 4)
    expected[0, 1] = 0.75 / (torch.tensor([-1.0, -0.25, -2.0]).std(correction=ddof) + 0.5)
    expected[1, 1] = 2.0 / (rewards[1].std(correction=ddof) + 0.5)
    close(values("grpo_passk", rewards, args={"eps": 0.5, "std_ddof": ddof}), expected)
    close(values("pass_at_k", rewards)[:2], [[0.0, 0.75, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    close(values("grpo_passk", torch.tensor([[1e-3, 0.0]]).double()), [[1e-3 / (1e-3 * 0.5**0.5 + 1e-6), 0.0]])  # the defaults
    without_eps = values("grpo_passk", rewards, args={"eps": 0.0, "std_ddof": ddof})
    assert without_eps.isfinite().all() and (without_eps[2:] == 0).all()


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
    with pytest.raises(ValueError, match=r"\[N, G\] with G >= 2"):  # also where it is called by itself
        ADVANTAGE_INPUTS.call(ADVANTAGES.get(name), dict.fromkeys(ADVANTAGE_INPUTS.by_name) | {"rewards": torch.rand(shape)})


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


TURNS = torch.tensor([[[0, -1, 1, 1, -1, 2], [0, 0, 0, -1, 1, -1], [0, 0, -1, -1, -1, -1]]])  # three, two turns and one
TURN_REWARDS = torch.tensor([[[0.5, 0.0, 1.0], [0.0, NAN, NAN], [0.25, NAN, NAN]]])


@pytest.mark.parametrize("discount", [1.0, 0.5, 0.0])
def test_turn_level_by_hand(discount):
    """Rewards 3, 1 and 2, of which 1.5, 1 and 1.75 came with no turn."""
    got = values("turn_level", torch.tensor([[3.0, 1.0, 2.0]]), args={"discount": discount}, turn_ids=TURNS, turn_rewards=TURN_REWARDS)
    last = 1.0 + 1.5
    first = torch.tensor([0.5 + discount**2 * last, discount * 1.0, 2.0])
    second = torch.tensor([discount * last, 1.0])
    a, b = first - first.mean(), second - second.mean()
    expected = [[a[0], 0, b[0], b[0], 0, 0], [a[1], a[1], a[1], 0, b[1], 0], [a[2], a[2], 0, 0, 0, 0]]
    close(got, torch.tensor([expected]))  # nothing is compared with the only third turn
    scaled = values(
        "turn_level", torch.tensor([[3.0, 1.0, 2.0]]), turn_ids=TURNS, turn_rewards=TURN_REWARDS,
        args={"discount": discount, "divide_by_std": True, "eps": 0.1},
    )  # fmt: skip
    close(scaled[0, :, 0], a / (first.std() + 0.1))
    close(scaled[0, :2, 4], torch.tensor([0.0, b[1] / (second.std() + 0.1)]))


def test_turn_level_of_one_turn_is_the_groups_mean():
    ids = torch.zeros(*REWARDS.shape, 2, dtype=torch.long)
    for args, name in (({}, "dr_grpo"), ({"divide_by_std": True}, "grpo")):
        got = values("turn_level", args={**args, "discount": 0.5}, turn_ids=ids)
        close(got, values(name)[..., None].expand_as(got))


def test_turn_level_leaves_unscored_completions_out():
    rewards = torch.tensor([[3.0, NAN, 2.0]])
    got = values("turn_level", rewards, turn_ids=TURNS, turn_rewards=TURN_REWARDS)
    close(got[0, :, 0], torch.tensor([0.5, 0.0, -0.5]))
    assert (got[0, 1] == 0).all() and got[0, 0, 2] == 0  # no other completion with a second turn has a reward
    with pytest.raises(ConfigError, match=r"discount is 1\.5; it must be from 0 to 1"):
        values("turn_level", args={"discount": 1.5})
