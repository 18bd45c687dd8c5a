"""The numbers of verl 0.9.1, prime-rl and others, through the trainer's own functions."""

import json
from pathlib import Path

import pytest
import torch
from parity_cases import compute

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
