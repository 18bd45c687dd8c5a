"""Laws for every registered advantage, and a hand table for what laws cannot see."""

import pytest
import torch

from grpo_core.advantages import ADVANTAGES, tied_groups

NAN = float("nan")


@pytest.fixture(params=sorted(ADVANTAGES.functions))
def advantage_fn(request):
    return ADVANTAGES.build(request.param)


def close(a, b, **kwargs):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), **kwargs)


def test_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
    grpo = ADVANTAGES.build("grpo", {"eps": 0.0})(rewards)
    close(grpo[0], [3**0.5 / 2, -(3**0.5) / 2, -(3**0.5) / 2, 3**0.5 / 2])  # std with ddof 1 is 1/sqrt(3)
    close(ADVANTAGES.build("grpo", {"eps": 0.0, "std_ddof": 0})(rewards)[0], [1.0, -1.0, -1.0, 1.0])
    close(ADVANTAGES.build("grpo", {"eps": 1.0, "std_ddof": 0})(rewards)[0], [1 / 3, -1 / 3, -1 / 3, 1 / 3])
    close(ADVANTAGES.build("dr_grpo")(rewards)[1], [1.5, -0.5, -0.5, -0.5])
    close(ADVANTAGES.build("rloo")(rewards)[1], [2.0, -2 / 3, -2 / 3, -2 / 3])


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 0.7, 1.1, -4.3])
@pytest.mark.parametrize("group_size", [2, 8, 12, 16, 55])
def test_a_tied_group_is_exactly_zero(advantage_fn, value, group_size):
    """0.1 is no binary fraction: the mean of equal rewards leaves noise that a small eps would blow up."""
    rewards = torch.full((3, group_size), value)
    assert (advantage_fn(rewards) == 0).all() and tied_groups(rewards).all()


def test_groups_do_not_mix_and_order_does_not_matter(advantage_fn):
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    whole = advantage_fn(rewards)
    close(torch.cat([advantage_fn(row[None]) for row in rewards]), whole)
    shuffle = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    close(advantage_fn(rewards[:, shuffle]), whole[:, shuffle])


def test_zero_mean_order_preserving_and_shift_invariant(advantage_fn):
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    advantages = advantage_fn(rewards)
    close(advantages.mean(1), torch.zeros(5), atol=1e-12, rtol=0)
    assert (advantages.argsort(1) == rewards.argsort(1)).all()
    close(advantage_fn(rewards + 3), advantages)


def test_an_unscored_row_is_as_if_it_were_not_there(advantage_fn):
    rewards = torch.tensor([[1.0, NAN, 0.0, 0.5], [NAN, NAN, NAN, 1.0], [0.3, 0.3, NAN, 0.3]])
    advantages = advantage_fn(rewards)
    close(advantages[0, [0, 2, 3]], advantage_fn(torch.tensor([[1.0, 0.0, 0.5]]))[0])
    assert advantages[0, 1] == 0 and (advantages[1:] == 0).all()
    assert tied_groups(rewards).tolist() == [False, True, True]


@pytest.mark.parametrize("shape", [(16,), (4, 1), (2, 3, 4)])
def test_a_batch_without_groups_is_refused(advantage_fn, shape):
    with pytest.raises(ValueError, match=r"\[N, G\]"):
        advantage_fn(torch.rand(shape))
