"""On a GPU: the embedded job in each precision and with each DeepSpeed JSON, and what only the sampler's graphs do."""

import math
from dataclasses import fields

import pytest
import torch
from fakes import Alphabet
from test_packing import gradient, grouped_rollouts
from test_run import launch, overrides, python, read
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_core.batch import Rollouts, Task
from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.model.policy import wrap
from grpo_core.sampling.graph_decoder import GraphDecoder
from grpo_core.sampling.sampler import Sampler

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
        "rewards": "num_unique_chars",  # so that no group is tied
    }
    done = launch(1, "--config", "configs/tiny.yaml", *overrides(tmp_path, **settings), environment=environment)
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "tiny" / "metrics.jsonl")
    for row in rows:
        assert all(math.isfinite(value) for value in row.values() if value is not None) and row["skipped"] == 0
        assert 0 < row["logprob_gap"] < gap
    assert rows[0]["grad_norm"] > 0 and rows[-1]["adapter_norm"] != rows[0]["adapter_norm"]


CAPPED = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]) * 1e9 / torch.cuda.get_device_properties(0).total_memory)
from grpo_core.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_memory_that_runs_out_for_real_is_halved_with_the_same_gradient(tmp_path, environment):
    """A fixed budget that holds all in one micro-batch, in a process that may have 80 % of what that takes."""
    settings = {
        "trainer__num_steps": 1,
        "model__precision": "fp32",
        "trainer__tokens_per_micro_batch": 10**6,
        "sampling__max_new_tokens": 48,
    }
    rows, cap = [], 30.0
    for name in ("free", "capped"):
        command = [
            "train",
            "--config",
            "configs/tiny.yaml",
            *overrides(tmp_path / name, **settings),
            "trainer.completions_per_step=512",
        ]
        done = python("-c", CAPPED, cap, *command, environment=environment)
        assert done.returncode == 0, done.stderr
        rows.append(read(tmp_path / name / "tiny" / "metrics.jsonl"))
        cap = 0.9 * rows[0][0]["memory_gb/update"]
    free, capped = (part[0] for part in rows)
    assert (
        free["memory_retries"] == 0
        and capped["memory_retries"] == 1
        and capped["memory_gb/update"] < 0.9 * free["memory_gb/update"]
    )
    assert capped["grad_norm"] == pytest.approx(free["grad_norm"], rel=1e-4)
    assert "step 1: memory ran out; 1 micro-batch was split into halves" in done.stdout
    never = overrides(
        tmp_path / "never", **settings
    )  # half of eight times as much is too much: a sentence, a checkpoint
    done = python("-c", CAPPED, cap, *command[:3], *never, "trainer.completions_per_step=4096", environment=environment)
    assert (
        done.returncode == 3
        and "lower trainer.tokens_per_micro_batch or sampling.max_new_tokens, or switch" in done.stderr
    ), done.stderr
    assert (
        tmp_path / "never" / "tiny" / "checkpoints" / "step-000000" / "SHA256SUMS"
    ).exists() and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.fixture
def decoder_policy():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    policy = wrap(Qwen2ForCausalLM(config), ModelConfig(), LoraConfig(), temperature=1.0)
    policy.model.to("cuda")
    return policy


def tasks(count, length=9):
    return [Task(i, "", [2 + (i + j) % 500 for j in range(length)], {}, (0, 0, i)) for i in range(count)]


def test_new_weights_need_no_new_graph_and_other_sizes_only_a_few(decoder_policy, monkeypatch):
    sampler, captured = Sampler(decoder_policy.causal_lm, Alphabet(), max_new_tokens=64), []
    capture = GraphDecoder._capture_token_step
    monkeypatch.setattr(GraphDecoder, "_capture_token_step", lambda self, size: (captured.append(size), capture(self, size))[1])
    first = sampler.generate(tasks(8), 8)
    count = len(captured)
    assert 1 <= count <= 4 and len(set(captured)) == count
    with torch.no_grad():
        for parameter in decoder_policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    second = sampler.generate(tasks(8), 8)
    assert first.completions != second.completions and len(captured) == count
    torch.testing.assert_close(decoder_policy.logprobs(second), second.rollout_logprobs, atol=1e-4, rtol=0)
    for prompts in (1, 3, 5, 7, 8):  # smaller calls, other prompt lengths: the cache lies elsewhere each time
        rollouts = sampler.generate(tasks(prompts, 5 + prompts), 8)
        torch.testing.assert_close(decoder_policy.logprobs(rollouts), rollouts.rollout_logprobs, atol=1e-4, rtol=0)
    assert len(captured) <= 4


def test_what_does_not_fit_is_halved_and_comes_out_the_same(decoder_policy):
    """512 rows of 2,048 tokens need 2 GiB of keys and values; the process may have 1 more than it has."""
    said, limits = [], torch.full((512,), 24)  # short, or a rounding now and then changes a draw
    limits[0] = 2048
    few = Sampler(decoder_policy.causal_lm, Alphabet(), max_new_tokens=2048, rows_at_once=32)
    want = few.generate(tasks(64), 8, limits=limits)
    sampler = Sampler(decoder_policy.causal_lm, Alphabet(), max_new_tokens=2048, notify=said.append)
    torch.cuda.empty_cache()
    used, whole = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((used + 2**30) / whole)
    try:
        rollouts = sampler.generate(tasks(64), 8, limits=limits)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= len(said) <= 4 and "do not fit" in said[0] and sampler.rows_at_once < 512
    assert torch.equal(rollouts.completion_ids[:, :24], want.completion_ids[:, :24])


def test_bf16_log_probs_are_near_the_trainers(decoder_policy):
    decoder_policy.model.to(torch.bfloat16)
    rollouts = Sampler(decoder_policy.causal_lm, Alphabet(), max_new_tokens=64).generate(tasks(8), 8)
    gap = (decoder_policy.logprobs(rollouts) - rollouts.rollout_logprobs).abs()[rollouts.completion_mask]
    assert gap.mean() < 0.03


@pytest.mark.parametrize("window", [None, 6])
def test_attention_in_segments_is_as_near_to_float32_as_in_padded_rows(decoder_policy, window):
    policy = decoder_policy
    rollouts = grouped_rollouts(groups=9, group_size=4, prompt_width=23, width=40, vocabulary=500)
    rollouts = Rollouts(*(x.to("cuda") for f in fields(rollouts) if isinstance(x := getattr(rollouts, f.name), torch.Tensor)))
    if window:
        for layer in policy.causal_lm.model.layers:
            layer.self_attn.sliding_window = window
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, 0.05)

    def computed(layout):
        policy.layout = layout
        out = policy.forward(rollouts).logprobs
        return out.detach(), gradient(policy, out.float(), rollouts.completion_mask)

    assert policy.layout == "rows"  # of float32; finding it installs the attention that takes either layout
    exact = computed("rows")
    policy.model.to(torch.bfloat16)
    del policy.layout
    assert policy.layout == "segments"
    rows, segments = (
        [(a.float() - b).norm() / b.norm() for a, b in zip(computed(x), exact, strict=True)] for x in ("rows", "segments")
    )
    assert all(b <= 1.3 * a < 0.1 for a, b in zip(rows, segments, strict=True))
