"""On a GPU: the embedded job in each precision and with each DeepSpeed JSON, through launch.sh."""

import math

import pytest
from test_run import launch, overrides, read

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize(
    "precision, deepspeed, gap",
    [
        ("bf16", "ds_zero2_offload", 0.1),
        ("fp16", "ds_zero2", 0.02),
        ("fp32", "ds_zero1", 1e-3),
        ("fp16", "ds_zero2_offload", 0.02),
    ],
)
def test_it_trains_in_every_precision(tmp_path, environment, precision, deepspeed, gap):
    settings = {
        "trainer__num_steps": 3,
        "model__precision": precision,
        "engine__deepspeed": f"configs/{deepspeed}.json",
        "checkpoint__every": 2,
    }
    done = launch(1, "--config", "configs/tiny.yaml", *overrides(tmp_path, **settings), environment=environment)
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "tiny" / "metrics.jsonl")
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()) and row["skipped"] == 0
        assert 0 < row["logprob_gap"] < gap
    assert rows[0]["grad_norm"] > 0 and rows[-1]["adapter_norm"] != rows[0]["adapter_norm"]
