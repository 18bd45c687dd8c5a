"""The numbers of verl 0.9.1, prime-rl and others, through the trainer's own functions."""

import json
from pathlib import Path

import pytest
import torch
from parity_cases import compute

FIXTURES = Path(__file__).parent / "fixtures"
FILES = {name: json.loads((FIXTURES / f"{name}.json").read_text()) for name in ("verl_0_9_1", "prime_rl", "others")}
CASES = [(source, name) for source, content in FILES.items() for name in content["cases"]]


@pytest.mark.parametrize("source, name", CASES)
def test_equal(source, name):
    content = FILES[source]
    case = content["cases"][name]
    try:
        found = compute(source, case["config"], content["inputs"], content["meta"])
    except NotImplementedError:
        pytest.skip("not yet")
    assert found.keys() == case.keys() - {"config"}
    for key, value in found.items():
        torch.testing.assert_close(torch.as_tensor(value, dtype=torch.double), torch.tensor(case[key], dtype=torch.double), rtol=0, atol=1e-9)
