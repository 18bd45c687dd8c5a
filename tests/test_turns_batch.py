"""Batches of several turns: packed forwards see all tokens, and predict those that the policy drew."""

import math
from dataclasses import replace

import pytest
import torch
from fakes import ragged_rollouts, tiny_policy
from test_packing import forwards, gradient, grouped_rollouts, kernel  # noqa: F401
from test_policy import naive_logprobs
from turn_fakes import with_turns

from grpo_core.batch import TrainBatch, replace_rows, take
from grpo_core.commands.attribution import _find_end_tokens
from grpo_core.model.packing import Budget
from grpo_core.training.saved_batches import _concatenate, collect_tensors


def whole(rollouts):
    """The same tokens as one turn, all of them drawn."""
    return replace(rollouts, completion_mask=rollouts.valid, valid_mask=None, turn_ids=None)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", ["rows", "segments", "grid"])
@pytest.mark.parametrize("budget", [Budget(math.inf), Budget(30)], ids=str)
def test_drawn_tokens_have_the_log_probs_and_gradient_of_the_whole_row(layout, budget, side, request):
    if layout == "segments":
        request.getfixturevalue("kernel")
    policy, rollouts = tiny_policy(lora_noise=0.1), with_turns(grouped_rollouts(side=side))
    if layout == "grid":
        policy.layout = layout
    assert policy.layout == layout
    mask = rollouts.completion_mask
    assert (rollouts.valid & ~mask).sum() > 10 and torch.equal(mask, rollouts.turns >= 0)
    ours, naive = forwards(policy, rollouts, budget), naive_logprobs(policy, whole(rollouts))
    torch.testing.assert_close(ours, naive * mask, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient(policy, ours, mask), gradient(policy, naive, mask), atol=1e-5, rtol=1e-4)


def test_given_tokens_are_predicted_only_where_that_is_asked_for():
    policy, rollouts = tiny_policy(lora_noise=0.1), with_turns(grouped_rollouts())
    counts = {}
    for predict_given in (False, True):
        [packing] = policy.plan(rollouts, predict_given=predict_given)
        counts[predict_given] = len(packing.predicted)
        logprobs = policy.forward(take(rollouts, packing.rows), packing).logprobs
        expected = naive_logprobs(policy, whole(rollouts))
        expected = expected if predict_given else expected * rollouts.completion_mask
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    assert counts == {False: rollouts.lengths().sum(), True: rollouts.valid_lengths().sum()}


def test_rows_are_replaced_and_joined_with_their_turns():
    wide, narrow = with_turns(ragged_rollouts(width=9)), with_turns(ragged_rollouts(2, 7, 6, seed=3), seed=2)
    wide, narrow = replace(wide, completions=("",) * 8), replace(narrow, completions=("", ""))
    merged = replace_rows(wide, torch.tensor([5, 1]), narrow)
    for row, other in ((5, 0), (1, 1)):
        for name, padding in (("valid_mask", False), ("turn_ids", -1), ("completion_mask", False)):
            assert getattr(merged, name)[row, :6].tolist() == getattr(narrow, name)[other].tolist()
            assert set(getattr(merged, name)[row, 6:].tolist()) == {padding}
    assert torch.equal(merged.turn_ids[0], wide.turn_ids[0])
    joined = _concatenate("turn_ids", [wide.turn_ids, narrow.turn_ids])
    assert joined.shape == (10, 9) and (joined[8:, 6:] == -1).all()
    assert {"valid_mask", "turn_ids"} <= collect_tensors(wide).keys()


def test_the_ends_of_turns_are_the_last_tokens_of_each():
    rollouts = with_turns(grouped_rollouts())
    rollouts = replace(rollouts, truncated=torch.arange(len(rollouts)) % 2 == 0)
    batch = TrainBatch(rollouts, torch.ones(len(rollouts), 1), rollouts.completion_mask)
    ends, expected = _find_end_tokens(batch), torch.zeros_like(rollouts.completion_mask)
    for row, turns in enumerate(rollouts.turn_ids.tolist()):
        for number in range(max(turns) + 1 - int(rollouts.truncated[row])):
            expected[row, len(turns) - 1 - turns[::-1].index(number)] = True
    assert torch.equal(ends, expected)
    one = replace(batch, rollouts=whole(rollouts))
    assert torch.equal(_find_end_tokens(one).sum(dim=1), (~rollouts.truncated).long())
