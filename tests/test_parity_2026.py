"""The numbers of verl 0.9.1, prime-rl and others, through the trainer's own functions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity_cases import compute, make_batch

from grpo_core.config.files import load
from grpo_core.model.policy import TokenStats
from grpo_core.monitor.aggregates import Stats
from grpo_core.random_keys import make_key
from grpo_core.training.control import first_control
from grpo_core.training.cross_row_masks import add_cross_row_masks
from grpo_core.training.prepare import build_objective
from grpo_core.training.update import count_over_ranks, micro_loss

FIXTURES = Path(__file__).parent / "fixtures"
FILES = {name: json.loads((FIXTURES / f"{name}.json").read_text()) for name in ("verl_0_9_1", "prime_rl", "others")}
WITH_EPS, FLOAT32 = 1e-7, 1e-6  # an eps that stands elsewhere; computed in float32 there
TOLERANCES = {  # beginnings of names; 1e-9 otherwise
    "adv_grpo_vectorized": FLOAT32, "adv_gdpo": FLOAT32, "adv_rloo_vectorized": FLOAT32, "adv_grpo_uneven": FLOAT32,
    "adv_reinforce_plus_plus_baseline": WITH_EPS, "is_": WITH_EPS, "nemo_": WITH_EPS, "areal_": FLOAT32,
    "adv_length_penalty": FLOAT32, "adv_max_rl": FLOAT32,
}  # fmt: skip
STAY_OUT = {
    "verl_0_9_1": {"adv_gpg", "adv_gpg_binary", "adv_remax"},
    "prime_rl": {
        *("ipo_v0_5_0_teacher", "adv_rae", "adv_hierarchical", "adv_v0_5_0_length_shaping", "adv_v0_6_0_linear"),
        *("adv_v0_6_0_linear_gated", "adv_v0_6_0_length_baseline", "adv_v0_6_0_linear_length_baseline"),
    },
    "others": {
        *("nemo_adv_loo_normalized", "nemo_adv_loo", "nemo_adv_mean_normalized", "nemo_adv_gdpo"),
        *("nemo_adv_reinforce_plus_plus_kl", "nemo_adv_reinforce_plus_plus"),
    },
}  # fmt: skip
CASES = [(source, name) for source, content in FILES.items() for name in content["cases"]]


@pytest.mark.parametrize("source, name", CASES)
def test_equal(source, name):
    content = FILES[source]
    case = content["cases"][name]
    arguments = source, case["config"], content["inputs"], content["meta"]
    if name in STAY_OUT[source]:
        with pytest.raises(NotImplementedError):
            compute(*arguments)
        return
    found = compute(*arguments)
    assert found.keys() == case.keys() - {"config"}
    tolerance = max([x for start, x in TOLERANCES.items() if name.startswith(start)], default=1e-9)
    for key, value in found.items():
        expected = case[key]
        if isinstance(value, dict):
            assert value.keys() == expected.keys()
            value, expected = [*value.values()], [expected[metric] for metric in value]
        torch.testing.assert_close(*(torch.as_tensor(x, dtype=torch.double) for x in (value, expected)), rtol=0, atol=tolerance)


PRESETS = {  # preset -> (overrides, file, case, changes to its config): the thresholds of the case, the rest is the preset's
    "prime_rl_default": ([], "prime_rl", "default", {}),
    "dppo": ([], "verl_0_9_1", "dppo_tv", {}),
    "m2po": (["loss.rejection.args={threshold: 0.1}"], "others", "areal_m2po", {}),
    "nemo_seq_mask_tis": (["loss.rejection.args={low: 0.9, high: 1.1}"], "others", "nemo_seq_mask_tis", {}),
    "verl_rollout_correction": (
        ["loss.args.clip_high=0.28", "loss.rollout_correction.args.clip_max=1.2", f"loss.rejection.args={{low: {1 / 1.2}, high: {1 / 0.9}}}"],
        "verl_0_9_1", "corrected_decoupled_geo_rs_token_tis", {"loss_agg_mode": "token-mean"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_as_the_trainer_whose_name_it_bears(preset):
    """From the configuration, through the loop's own stages: masks over all rows, counts, micro-loss."""
    overrides, source, name, changes = PRESETS[preset]
    content = FILES[source]
    expected = compute(source, content["cases"][name]["config"] | changes, content["inputs"], content["meta"])
    names = ("logps", "old_logps", "rollout_logps", "advantages", content["cases"][name]["config"]["mask"])
    tensors = {x: torch.tensor(content["inputs"].get(x, content["inputs"]["logps"]), dtype=torch.double) for x in names}
    leaf, old, rollout, advantages, mask = (tensors[x] for x in names)
    if preset == "dppo":
        rollout = old  # verl compares with the old policy
    config = load("configs/tiny.yaml", [f"preset={preset}", *overrides])
    objective = build_objective(config)
    batch = replace(make_batch(rollout, advantages, mask.bool(), old), frozen_logprobs=old)
    batch = add_cross_row_masks(None, objective, None, batch, make_key("selection", 0), Stats(), is_first=True)
    leaf.requires_grad_()
    totals = count_over_ranks(objective, batch, 1)
    loss = micro_loss(objective, batch, TokenStats(leaf, torch.zeros_like(old)), totals, first_control(config.loss), Stats())
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(torch.tensor(loss.item()).double(), torch.tensor(expected["loss"]).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient, expected["grad"], rtol=0, atol=1e-7)
