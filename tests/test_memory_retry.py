"""Memory that runs out in a micro-batch: its rows once more in halves, with the same gradient; else a checkpoint."""

import pytest
import torch
from fakes import tiny_policy
from test_loop import make_run, rows

from grpo_core.distributed.signals import RunFailed
from grpo_core.training import checkpoint
from grpo_core.training.trainer import train


def run_out(run, *, where, calls=(), above=None):
    """Let `run` run out of memory at these calls of `where`, or whenever a forward has more than `above` tokens."""
    real, count = getattr(run.policy if where == "forward" else run.engine, where), [0]

    def wrapped(*args, **kwargs):
        count[0] += 1
        too_large = above is not None and len(args) > 1 and args[1].tokens > above
        if count[0] in calls or too_large:
            if where == "backward":
                torch.autograd.grad(args[0], run.policy.parameters(), retain_graph=True, allow_unused=True)
            raise torch.OutOfMemoryError("out of memory")
        return real(*args, **kwargs)

    setattr(run.policy if where == "forward" else run.engine, where, wrapped)
    return run


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


@pytest.mark.parametrize("where, calls", [("backward", (1, 7)), ("backward", (2,)), ("forward", (2,))])
def test_a_micro_batch_is_computed_in_halves_with_the_same_gradient(tmp_path, where, calls, capsys):
    options = {"num_steps": 2, "tokens_per_micro_batch": 200, "kl_coef": 0.1, "num_minibatches": 2}
    whole = make_run(tmp_path / "whole", **options, policy=tiny_policy(lora_noise=0.1))
    train(whole)
    cut = run_out(make_run(tmp_path / "cut", **options, policy=tiny_policy(lora_noise=0.1)), where=where, calls=calls)
    train(cut)
    torch.testing.assert_close(weights(cut), weights(whole), atol=2e-5, rtol=0)
    one, other = rows(tmp_path / "cut"), rows(tmp_path / "whole")
    if where == "backward":  # a forward before the update is no micro-batch of it
        assert sum(row.pop("memory_retries") for row in one) == len(calls)
        assert "step 1: memory ran out; 1 micro-batch was split into halves" in capsys.readouterr().out
    for row, row_ in zip(one, other, strict=True):
        for name in (
            "loss",
            "kl",
            "entropy",
            "ratio",
            "grad_norm",
            "logprob_gap",
            "clip_frac",
            "tokens_updated",
            "micro_batches",
        ):
            assert row[name] == pytest.approx(row_[name], abs=1e-4), name


def test_what_does_not_fit_in_halves_either_ends_the_run_with_a_checkpoint_of_before(tmp_path):
    run = make_run(tmp_path, num_steps=3, tokens_per_micro_batch=200)
    before = []
    real = run.engine.step
    run.engine.step = lambda: (real(), before.append(weights(run)))[0]
    run_out(run, where="backward", calls=range(2, 100))
    message = (
        r"a micro-batch of step 2 does not fit .* trainer.tokens_per_micro_batch or sampling.max_new_tokens, or switch"
    )
    with pytest.raises(RunFailed, match=message):
        train(run)
    (kept,) = checkpoint.list_checkpoints(tmp_path / "checkpoints")
    assert kept.name == "step-000001" and len(rows(tmp_path)) == len(before) == 1
    torch.testing.assert_close(weights(run), before[0], atol=0, rtol=0)


def test_no_checkpoint_is_made_of_half_a_step(tmp_path):
    run = run_out(
        make_run(tmp_path, num_steps=3, tokens_per_micro_batch=2000, num_minibatches=2),
        where="backward",
        calls=range(2, 100),
    )
    with pytest.raises(RunFailed, match="does not fit"):
        train(run)
    assert checkpoint.list_checkpoints(tmp_path / "checkpoints") == []


def test_a_micro_batch_that_is_too_long_is_halved_by_its_tokens(tmp_path):
    run = run_out(make_run(tmp_path, num_steps=2, tokens_per_micro_batch=100, kl_coef=0.1), where="forward", above=60)
    train(run)
    assert all(row["memory_retries"] >= 1 for row in rows(tmp_path))
