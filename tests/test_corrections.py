"""What is masked and weighed, truncation, and the coefficients that adapt: by hand."""

import math

import pytest
import torch

from grpo_core.config.sections import LossConfig
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.corrections import CORRECTIONS, corrected_old_logprobs, off_policy_mask, quantile
from grpo_core.objective.truncation import TRUNCATIONS, soft_overlong_penalty
from grpo_core.training.control import Control, adapt, first_control

MASK = torch.tensor([[True, True], [True, False]])
OLD = torch.tensor([[4.0, 0.5], [3.0, 9.0]]).log()  # ratios to a sampler's log-probs of 0; the last is padding
ZERO = torch.zeros(2, 2)


@pytest.mark.parametrize("name, weights", [
    ("token_truncate", [[2.0, 0.6], [2.0, 1.0]]),
    ("token_mask", [[0.0, 0.0], [0.0, 1.0]]),
    ("sequence_truncate", [[2.0], [2.0]]),
    ("sequence_mask", [[2.0], [0.0]]),
    ("geometric_truncate", [[math.sqrt(2.0)], [2.0]]),
    ("geometric_mask", [[math.sqrt(2.0)], [0.0]]),
])  # fmt: skip
def test_the_six_corrections(name, weights):
    correction = CORRECTIONS.build(name, {"clip_min": 0.6, "clip_max": 2.0})
    torch.testing.assert_close(correction(OLD, ZERO, MASK), torch.tensor(weights))


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_the_bounds_of_a_mask_are_kept_and_what_is_far_is_clamped(level):
    """v is 1/2, 2 and exp(-100) in rows of one token, so its product and its geometric mean are v."""
    old = torch.tensor([0.5, 2.0, 1.0]).log()[:, None] - torch.tensor([[0.0], [0.0], [100.0]])
    own = old.requires_grad_(), torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool)
    half, two, far = CORRECTIONS.build(f"{level}_truncate", {"clip_max": None})(*own).flatten().tolist()
    assert (half, two) == (pytest.approx(0.5), pytest.approx(2.0)) and far == pytest.approx(math.exp(-20.0))
    for args, expected in (
        ({"clip_min": half, "clip_max": two}, [half, two, 0.0]), ({"clip_min": two, "clip_max": two}, [0.0, two, 0.0]),
        ({"clip_min": 0.0, "clip_max": half}, [half, 0.0, far]), ({"clip_max": 1.9}, [half, 0.0, far]),
    ):  # fmt: skip
        weights = CORRECTIONS.build(f"{level}_mask", args)(*own)
        assert weights.flatten().tolist() == expected and not weights.requires_grad
    with pytest.raises(ValueError, match="clip_min is -1.0 and clip_max is 2.0; both must satisfy 0 <= clip_min"):
        CORRECTIONS.build(f"{level}_mask", {"clip_min": -1.0, "clip_max": 2.0})(*own)
    with pytest.raises(ValueError, match="clip_min is 3.0 and clip_max is 2.0; both must satisfy 0 <= clip_min"):
        CORRECTIONS.build(f"{level}_mask", {"clip_min": 3.0, "clip_max": 2.0})(*own)


@pytest.mark.parametrize("name", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate", "geometric_mask"])
def test_the_default_bounds_of_corrections(name):
    high = 3.0 if name == "sequence_mask" else 2.0
    v = torch.tensor([[0.01], [high - 0.1], [high + 0.1]])
    weights = CORRECTIONS.get(name)(v.log(), torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool))
    torch.testing.assert_close(weights, torch.tensor([[0.01], [high - 0.1], [0.0 if name.endswith("mask") else high]]))


def test_no_bounds_and_bounds_out_of_order():
    free = CORRECTIONS.build("token_truncate", {"clip_max": None})(OLD, ZERO, MASK)
    torch.testing.assert_close(free, torch.tensor([[4.0, 0.5], [3.0, 1.0]]))
    with pytest.raises(ValueError, match="clip_min is 3.0 and clip_max is 2.0"):
        CORRECTIONS.build("token_mask", {"clip_min": 3.0})(OLD, ZERO, MASK)
    assert CORRECTIONS.get("none")(OLD, ZERO, MASK) is None


def test_a_loss_with_the_correction_in_it_gets_it_through_the_old_logprobs():
    """sum_t(l - l_old) becomes sum_t(l - l_old) + sum_t log w."""
    for name in ("token_truncate", "sequence_truncate"):
        weights = CORRECTIONS.get(name)(OLD, ZERO, MASK)
        moved = ((OLD - corrected_old_logprobs(OLD, weights, MASK)) * MASK).sum(dim=1)
        wanted = weights.log().squeeze(1) if weights.shape[1] == 1 else (weights.log() * MASK).sum(dim=1)
        torch.testing.assert_close(moved, wanted)
    assert corrected_old_logprobs(OLD, torch.zeros(2, 2), MASK).isfinite().all()


def test_effective_sample_size():
    stats = Stats()
    stats.add_weights("w", torch.tensor([[1.0, 3.0], [2.0, 77.0]]), MASK)
    row = stats.reduce()
    assert row == {"w": pytest.approx(2.0), "w_ess": pytest.approx(4 / (14 / 3))}
    nothing = Stats()
    nothing.add_weights("w", torch.zeros(2, 2), MASK)
    assert nothing.reduce()["w_ess"] == 0.0


def test_the_off_policy_mask_drops_bad_completions_that_the_policy_has_left():
    logprobs = torch.tensor([[-2.0, -2.0], [-2.0, 0.0], [-2.0, -2.0], [-0.1, -0.1]])
    sampled = torch.tensor([[-1.0, -1.0], [-1.0, -9.0], [-1.0, -1.0], [-1.0, -1.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    kept = off_policy_mask(logprobs, sampled, torch.tensor([[-1.0], [-1.0], [0.0], [-1.0]]), mask, 0.9)
    assert kept.squeeze(1).tolist() == [False, False, True, True]
    assert off_policy_mask(logprobs, sampled, -torch.ones(4, 1), mask, 1.0).all()


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_quantile_is_torchs(q, count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quantile(values, q), torch.quantile(values, q))


REWARDS = torch.tensor([[1.0, float("nan"), 0.5, 1.0]])
LENGTHS, TRUNCATED = torch.tensor([[10, 10, 9, 4]]), torch.tensor([[True, True, False, False]])


@pytest.mark.parametrize("name, rewards, trained", [
    ("keep", [1.0, None, 0.5, 1.0], [True, True, True, True]),
    ("mask_loss", [1.0, None, 0.5, 1.0], [False, False, True, True]),
    ("mask_loss_and_baseline", [None, None, 0.5, 1.0], [False, False, True, True]),
    ("zero_reward", [0.0, None, 0.5, 1.0], [True, True, True, True]),
    ("soft_penalty", [0.0, None, 0.0, 1.0], [True, True, True, True]),
])  # fmt: skip
def test_truncation_in_five_modes(name, rewards, trained):
    """max_new_tokens 10, the last two of them penalised: 9 tokens cost 0.5, 10 cost 1."""
    ours, kept = TRUNCATIONS.get(name)(REWARDS, LENGTHS, TRUNCATED, 10)
    wanted = torch.tensor([[float("nan") if r is None else r for r in rewards]])
    torch.testing.assert_close(ours, wanted, equal_nan=True)
    assert kept.tolist() == [trained]


def test_the_soft_penalty_is_dapos():
    """L_max 20480, L_cache 4096."""
    lengths = torch.tensor([1, 16384, 18432, 20480])
    torch.testing.assert_close(soft_overlong_penalty(lengths, 20480), torch.tensor([0.0, 0.0, -0.5, -1.0]))
    with pytest.raises(ValueError, match="cache_share is 0.0"):
        soft_overlong_penalty(lengths, 100, 0.0)


def test_the_kl_coefficient_follows_its_target():
    config = LossConfig(kl_coef=0.1, kl_target=0.05, kl_horizon=1000)
    start = first_control(config)
    assert adapt(start, config, 0.055, 1.0, 100).kl_coef == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adapt(start, config, 5.0, 1.0, 100).kl_coef == pytest.approx(0.1 * (1 + 0.2 * 0.1))  # clipped
    assert adapt(start, config, 0.0, 1.0, 100).kl_coef == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert adapt(start, LossConfig(kl_coef=0.1), 5.0, 1.0, 100) == start


def test_the_entropy_bonus_is_on_only_below_its_target():
    config = LossConfig(entropy_coef=0.01, entropy_target=0.5, entropy_delta=0.004, entropy_max=0.02)
    control = first_control(config)
    assert control.active_entropy_coef == 0.01
    low = adapt(control, config, 0.0, 0.5, 64)
    assert (low.entropy_coef, low.entropy_on, low.active_entropy_coef) == (pytest.approx(0.014), True, pytest.approx(0.014))
    high = adapt(low, config, 0.0, 0.6, 64)
    assert (high.entropy_coef, high.active_entropy_coef) == (pytest.approx(0.01), 0.0)
    for _ in range(5):
        low, high = adapt(low, config, 0.0, 0.1, 64), adapt(high, config, 0.0, 9.0, 64)
    assert low.entropy_coef == 0.02 and high.entropy_coef == 0.0
    assert math.isclose(adapt(Control(0.0, 0.3), LossConfig(entropy_coef=0.3), 0.0, 0.0, 64).active_entropy_coef, 0.3)
