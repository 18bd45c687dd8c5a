"""Inputs that an objective's functions ask for by name, and advantages for each token, through the trainer's own steps."""

import json
from pathlib import Path

import pytest
import torch
from fakes import frozen_batch, ragged_rollouts, tiny_policy, with_objective
from test_loop import make_run, rows

from grpo_core.config.function_checks import check_functions, check_inputs
from grpo_core.data.forms import load_config
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.inputs import ADVANTAGE_INPUTS, LOSS_INPUTS
from grpo_core.objective.losses import LOSSES, PolicyLoss
from grpo_core.objective.token_weights import Totals
from grpo_core.schema import ConfigError
from grpo_core.training import rollouts as rollouts_module
from grpo_core.training import trainer
from grpo_core.training.control import first_control
from grpo_core.training.freeze import freeze
from grpo_core.training.rollouts import compute_step_advantages
from grpo_core.training.update import micro_loss, rows_to_train

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
NAMES = ("rollout_logprobs", "ref_logprobs", "entropy", "sum_p_squared", "rewards")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, num_steps=2, policy=tiny_policy(lora_noise=0.05))


def naive(policy, rollouts):
    """Log-probs, entropies and sums of squared probabilities of plain PEFT, row by row, [B, C]."""
    values = torch.zeros(3, *rollouts.completion_ids.shape)
    for i in range(len(rollouts)):
        prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i]]
        completion = rollouts.completion_ids[i][rollouts.completion_mask[i]]
        with torch.no_grad():
            logits = policy.model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        table = logits.log_softmax(-1)
        values[0, i, : len(completion)] = table.gather(1, completion[:, None]).squeeze(1)
        values[1, i, : len(completion)] = -(table.exp() * table).sum(-1)
        values[2, i, : len(completion)] = table.exp().square().sum(-1)
    return values


@pytest.mark.parametrize("names", [(), *((name,) for name in NAMES), NAMES])
def test_a_loss_gets_what_it_asks_for_and_no_forward_is_done_for_what_nobody_asks(run, names, monkeypatch):
    seen, forwards = {}, []

    def check(logprobs, old_logprobs, advantages, mask, **given):
        seen.update(given)
        return PolicyLoss(-advantages * logprobs)

    text = ", ".join(("logprobs", "old_logprobs", "advantages", "mask", *names))
    scope = {"check": check}
    exec(f"def loss({text}):\n    return check(logprobs, old_logprobs, advantages, mask, {', '.join(f'{n}={n}' for n in names)})", scope)
    run = with_objective(run, loss_fn=scope["loss"])
    rollouts, policy, forward = ragged_rollouts(), run.policy, run.policy.forward
    monkeypatch.setattr(policy, "forward", lambda *a, **k: forwards.append(1) or forward(*a, **k))
    frozen = freeze(policy, run.objective, run.budgets.forward, rollouts)
    assert bool(forwards) == ("ref_logprobs" in names)
    rewards = torch.arange(8.0).view(1, 8)
    batch = frozen.with_advantages(torch.ones(8, 1), rewards)
    totals = Totals(torch.tensor(8), torch.tensor(8), 5)
    micro_loss(run.objective, batch, forward(rollouts), totals, first_control(run.config.loss), Stats())
    assert seen.keys() == set(names)
    mask = rollouts.completion_mask
    _, entropy, squares = naive(policy, rollouts)
    with policy.reference():
        reference = naive(policy, rollouts)[0]
    wanted = {
        "rollout_logprobs": rollouts.rollout_logprobs, "ref_logprobs": reference, "entropy": entropy,
        "sum_p_squared": squares, "rewards": rewards.view(8, 1),
    }  # fmt: skip
    for name in names:
        torch.testing.assert_close(seen[name] * (mask if name != "rewards" else 1), wanted[name] * (mask if name != "rewards" else 1))
        assert not seen[name].requires_grad


def test_users_losses_of_today_keep_working():
    for text in ("a, b, c, d", "logprobs, old, advantages, completion_mask, *, power=0.5", "*tensors, **others", "a, b, c, d, e=3"):
        scope = {}
        exec(f"def f({text}): return 0", scope)
        if text.endswith("e=3"):
            assert LOSS_INPUTS.requested(scope["f"]) == ()
        else:
            check_inputs("loss", "f", scope["f"])
            assert LOSS_INPUTS.call(scope["f"], dict.fromkeys(LOSS_INPUTS.positional)) == 0
    for fn in LOSSES.functions.values():
        assert set(LOSS_INPUTS.requested(fn)) <= {*NAMES, "selected"}


def test_an_unknown_input_is_refused_in_a_sentence_that_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"^loss f asks for entropies \(did you mean entropy\?\); .* by name rollout_logprobs, ref_logprobs, "):
        check_inputs("loss", "f", lambda a, b, c, d, entropies: 0)
    with pytest.raises(ConfigError, match=r"^loss f cannot be called: too many positional"):
        check_inputs("loss", "f", lambda a, b, c: 0)


def test_advantages_see_the_tokens_statistics_and_may_differ_from_token_to_token(run):
    seen = {}

    def advantage(rewards, completion_mask, logprobs, rollout_logprobs, ref_logprobs, entropy, sum_p_squared):
        seen.update({k: v for k, v in locals().items() if k not in ("seen", "rewards")})
        return rewards[..., None] * completion_mask - entropy

    run = with_objective(run, advantage_fn=advantage)
    assert run.objective.needs_reference
    rollouts = ragged_rollouts()
    frozen = freeze(run.policy, run.objective, run.budgets.forward, rollouts)
    assert frozen.old_logprobs is None  # on policy they are the detached forward, as ever
    logprobs, entropy, squares = naive(run.policy, rollouts)
    rewards = torch.rand(2, 4)
    scores = type("S", (), {"by_name": {"good": rewards}, "weights": (1.0,), "rewards": rewards})()
    values = compute_step_advantages(run.objective, rewards, rollouts, scores, Stats(), frozen)
    mask = rollouts.completion_mask
    for name, wanted in (("logprobs", logprobs), ("entropy", entropy), ("sum_p_squared", squares)):
        torch.testing.assert_close(seen[name].view(8, -1) * mask, wanted * mask)
    torch.testing.assert_close(seen["rollout_logprobs"].view(8, -1), rollouts.rollout_logprobs)
    assert seen["completion_mask"].shape == (2, 4, 6) and seen["completion_mask"].dtype == torch.bool
    assert values.shape == (2, 4, 6)
    batch = frozen.with_advantages(values, rewards)
    torch.testing.assert_close(batch.advantages, (rewards.view(8, 1) * mask - seen["entropy"].view(8, -1)))
    torch.testing.assert_close(batch.mean_advantages(), torch.stack([a[m].mean() for a, m in zip(batch.advantages, mask, strict=True)]))


def test_each_token_is_trained_by_its_own_advantage(run):
    """The gradient with respect to the log-probs is -A_t * weight_t on policy."""
    rollouts, generator = ragged_rollouts(), torch.Generator().manual_seed(3)
    advantages = torch.randn(8, 6, generator=generator)
    batch = frozen_batch(run, rollouts, advantages)
    tokens = run.policy.forward(rollouts)
    leaf = tokens.logprobs.detach().requires_grad_()
    totals = Totals(rollouts.completion_mask.sum(), torch.tensor(8), 5)
    loss = micro_loss(run.objective, batch, type(tokens)(leaf, tokens.entropy), totals, first_control(run.config.loss), Stats())
    (gradient,) = torch.autograd.grad(loss, leaf)
    weights = rollouts.completion_mask / rollouts.completion_mask.sum()  # loss.average is token
    torch.testing.assert_close(gradient, -advantages * weights)


def test_a_row_is_left_out_only_if_every_token_has_advantage_0(run):
    advantages = torch.zeros(8, 6)
    advantages[2, 3], advantages[5, 0] = 1.0, -1.0
    batch = frozen_batch(run, ragged_rollouts(), advantages)
    assert rows_to_train(run.objective, batch, first_control(run.config.loss)) == [2, 5]


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 3), (8,)])
def test_advantages_of_another_shape_are_refused(run, shape):
    run = with_objective(run, advantage_fn=lambda rewards, rollout_logprobs: torch.zeros(shape))
    rollouts, rewards = ragged_rollouts(), torch.rand(2, 4)
    scores = type("S", (), {"by_name": {"good": rewards}, "weights": (1.0,), "rewards": rewards})()
    frozen = freeze(run.policy, run.objective, run.budgets.forward, rollouts)
    with pytest.raises(ConfigError, match=r"must return \[N, G\] = \(2, 4\), or \[N, G, C\] = \(2, 4, 6\)"):
        compute_step_advantages(run.objective, rewards, rollouts, scores, Stats(), frozen)


def test_a_run_trains_with_both(tmp_path):
    def advantage(rewards, logprobs, completion_mask):
        centred = rewards - rewards.mean(dim=1, keepdim=True)
        return centred[..., None] * (1 + 0.1 * logprobs) * completion_mask

    def loss(logprobs, old_logprobs, advantages, completion_mask, rollout_logprobs, entropy):
        ratio = (logprobs - old_logprobs).exp()
        return PolicyLoss(-ratio * advantages + 1e-3 * (logprobs - rollout_logprobs).square(), {"seen_entropy": entropy})

    run = with_objective(make_run(tmp_path, num_steps=12), loss_fn=loss, advantage_fn=advantage)
    trainer.train(run)
    metrics = rows(tmp_path)
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.5
    assert metrics[3]["seen_entropy"] == pytest.approx(metrics[3]["entropy"], rel=0.2)
    written = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert all(isinstance(row["advantage"], float) for row in written)


def test_groups_of_all_ranks_are_gathered_with_their_tokens_whose_number_may_differ(run, monkeypatch):
    """Another rank's completions are longer: tokens are padded to its width, and this rank takes its own columns."""
    seen = []

    def advantage(rewards, entropy):
        seen.append(entropy)
        return entropy + rewards[..., None]

    run = with_objective(run, advantage_fn=advantage)
    rollouts, rewards = ragged_rollouts(), torch.rand(2, 4)
    scores = type("S", (), {"by_name": {"good": rewards}, "weights": (1.0,), "rewards": rewards})()
    frozen = freeze(run.policy, run.objective, run.budgets.forward, rollouts)
    monkeypatch.setattr(rollouts_module.ranks, "all_max", lambda values: values + 3)
    monkeypatch.setattr(rollouts_module.ranks, "all_rows", lambda values: torch.cat([0 * values, values]))
    monkeypatch.setattr(rollouts_module.ranks, "rank", lambda: 1)
    values = compute_step_advantages(run.objective, rewards, rollouts, scores, Stats(), frozen)
    assert seen[0].shape == (4, 4, 9) and not seen[0][:, :, 6:].any() and not seen[0][:2].any()
    torch.testing.assert_close(values, frozen.entropy.view(2, 4, 6) + rewards[..., None])


def test_what_a_function_asks_for():
    assert ADVANTAGE_INPUTS.requested(lambda rewards, entropy, lengths=None, *, eps=1.0: 0) == ("entropy", "lengths")
    assert ADVANTAGE_INPUTS.requested(lambda rewards, *, weights=2.0: 0) == ()  # a YAML argument


def test_a_correction_and_an_advantage_that_each_need_the_other_first_are_refused(tmp_path):
    file = tmp_path / "c.py"
    for asked, is_late in (("rewards", True), ("advantages", True), ("ref_logprobs", False)):
        file.write_text(f"def f(old, rollout, mask, *, {asked}):\n    return (old - rollout).exp()\n")
        words = [f"loss.rollout_correction.name={file}:f", "sampling.group_size=4", "loss.kl_coef=0.1"]
        check_functions(load_config(TINY, words))  # whose advantage needs no weights
        words.append("advantage.name=optimal_token_baseline")
        if is_late:
            sentence = f"c.py:f needs {asked}, but advantage optimal_token_baseline needs the weights of the correction first"
            with pytest.raises(ConfigError, match=sentence):
                check_functions(load_config(TINY, words))
        else:
            check_functions(load_config(TINY, words))
