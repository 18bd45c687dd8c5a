"""Our losses and advantages are TRL 1.16's, to the last digits; where they differ on purpose, it is said here."""

import json
from pathlib import Path

import pytest
import torch
from trl_cases import advantage_case, loss_case

from grpo_core.objective.advantages import tied_groups
from grpo_core.objective.corrections import CORRECTIONS

FIXTURES = Path(__file__).parent / "fixtures"
LOSSES = json.loads((FIXTURES / "trl_1_16_losses.json").read_text())
ADVANTAGES = json.loads((FIXTURES / "trl_1_16_advantages.json").read_text())


def test_there_are_as_many_cases_as_promised():
    assert (len(LOSSES["cases"]), len(ADVANTAGES["cases"])) == (54, 18)


@pytest.mark.parametrize("name", LOSSES["cases"])
def test_loss_and_gradient_are_trls(name):
    case = LOSSES["cases"][name]
    loss, gradient = loss_case(case["config"], LOSSES["inputs"], LOSSES["meta"])
    assert loss == pytest.approx(case["loss"], abs=1e-10)
    torch.testing.assert_close(gradient, torch.tensor(case["grad"], dtype=torch.double), atol=1e-10, rtol=0)
    assert gradient.any()


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_rollout_corrections_are_trls(mode):
    case = LOSSES["cases"][f"dapo/rollout_is/{mode}/cmin0.9_cmax1.1"]
    old, rollout, mask = (
        torch.tensor(LOSSES["inputs"][n], dtype=torch.double) for n in ("old_logps", "sampling_logps", "mask")
    )
    ours = CORRECTIONS.build(mode, {"clip_min": 0.9, "clip_max": 1.1})(old, rollout, mask.bool())
    torch.testing.assert_close(ours, torch.tensor(case["config"]["vllm"], dtype=torch.double), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ADVANTAGES["cases"])
def test_advantages_are_trls(name):
    """They were computed in float32."""
    case = ADVANTAGES["cases"][name]
    torch.testing.assert_close(advantage_case(case), torch.tensor(case["advantages"]), atol=1e-5, rtol=0)


def test_ties_are_exactly_zero_on_purpose():
    """TRL's equal rewards of 0.3 leave a standard deviation of 3e-8, and only its eps of 1e-4 hides it."""
    case = ADVANTAGES["cases"]["all_equal/group"]
    assert case["metrics"]["reward_std"] > 0
    assert (advantage_case(case) == 0).all()


def test_the_tied_group_metric_differs_on_purpose():
    """With scale_rewards=batch TRL compares the batch's spread with 0, so half of the groups tied reads as none."""
    case = ADVANTAGES["cases"]["one_zero_std_group/batch"]
    rewards = torch.tensor(case["rewards"]).view(-1, case["num_generations"])
    assert case["metrics"]["frac_reward_zero_std"] == 0.0
    assert tied_groups(rewards).float().mean() == 0.5
    assert (advantage_case(case)[:4] == 0).all()
