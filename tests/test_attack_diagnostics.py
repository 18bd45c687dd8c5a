"""What a loss returns to be logged: names that are no metric's, and tensors [B, C]."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from grpo_core.batch import Rollouts, TrainBatch
from grpo_core.commands.check_loss import run_check_loss
from grpo_core.config.checks import check
from grpo_core.config.files import load
from grpo_core.config.function_checks import try_loss
from grpo_core.config.sections import RewardConfig, RunConfig
from grpo_core.model.policy import TokenStats
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.laws import shape
from grpo_core.objective.losses import LOSSES, PolicyLoss
from grpo_core.objective.rewards import REWARDS
from grpo_core.schema import ConfigError
from grpo_core.training.prepare import build_objective
from grpo_core.training.update import token_loss

TINY = ROOT / "configs" / "tiny.yaml"


@pytest.fixture
def returning(monkeypatch):
    """Register the loss `mine`, which returns the diagnostics that the test gives: a dict, or a function of the ratio."""

    def register(diagnostics):
        def mine(logprobs, old_logprobs, advantages, completion_mask):
            ratio = (logprobs - old_logprobs).exp()
            return PolicyLoss(-ratio * advantages, diagnostics(ratio) if callable(diagnostics) else diagnostics)

        monkeypatch.setitem(LOSSES.functions, "mine", mine)
        return mine

    return register


def documented_metrics():
    text = (ROOT / "docs" / "metrics.md").read_text()
    tables = text[text.index("## metrics.jsonl, always") : text.index("## evaluation.jsonl")]
    rows = [line.split("|")[1] for line in tables.splitlines() if line.startswith("|")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


NAMES = [name for name in documented_metrics() if name not in ("ratio", "clip_frac")]


@pytest.mark.parametrize("name", [*NAMES, "rewards/mine", "failed/mine", "reward_square", "eval/a/accuracy"])
def test_attack_1_a_diagnostic_with_the_name_of_a_metric_is_refused_before_the_model_loads(returning, name):
    returning(lambda ratio: {"ratio": ratio.detach(), name: ratio.detach()})
    sentence = f"loss mine returned the diagnostic {name!r}, but the loop has a metric of that name; choose another name"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        load(TINY, ["loss.name=mine"])


def test_attack_1_the_documented_metrics_are_all_taken_and_no_others():
    from grpo_core.objective.diagnostics import METRICS, PREFIXES

    plain = {name for name in NAMES if "/" not in name}
    internal = {"reward_square", "rollout_weight_square"}  # become _std and _ess before a row is written
    assert plain == METRICS - internal
    assert all(name.startswith(PREFIXES) for name in NAMES if "/" in name)


def test_attack_1_check_loss_reports_it(returning):
    loss = returning(lambda ratio: {"kl": ratio.detach()})
    with pytest.raises(ConfigError, match="loss mine returned the diagnostic 'kl', but the loop has a metric"):
        run_check_loss("mine", {})
    holds, result = shape(loss)
    assert not holds and "'kl'" in result


@pytest.mark.parametrize("name", ["", "  ", "a\nb", 7, None])
def test_attack_1_a_diagnostic_needs_a_name(returning, name):
    returning(lambda ratio: {name: ratio.detach()})
    with pytest.raises(ConfigError, match=re.escape(f"returned the diagnostic {name!r}; its name must be a text")):
        try_loss("mine", {})


@pytest.mark.parametrize("name", ["ratio", "clip_frac", "mine", "mine/part", "reward_gap", "Größe"])
def test_attack_1_own_names_and_those_of_shipped_losses_are_accepted(returning, name):
    returning(lambda ratio: {name: ratio.detach()})
    try_loss("mine", {})


@pytest.mark.parametrize("suffix", ["_std", "_square"])
def test_attack_1_a_reward_whose_metric_is_another_rewards_is_refused(monkeypatch, suffix):
    for name in ("good", f"good{suffix}", f"other{suffix}"):
        monkeypatch.setitem(REWARDS.functions, name, lambda completions: [0.0 for _ in completions])
    check(RunConfig(rewards=[RewardConfig("good"), RewardConfig(f"other{suffix}")]))
    with pytest.raises(ConfigError, match=rf"rewards\[0\].name is 'good{suffix}', but rewards/good{suffix} is a metric"):
        check(RunConfig(rewards=[RewardConfig(f"good{suffix}"), RewardConfig("good")]))


WRONG = [
    ({"mine": torch.ones(3)}, "'mine' with the shape [3]; it must be [B, C] = [2, 3]"),
    ({"mine": torch.ones(2, 1)}, "'mine' with the shape [2, 1]; it must be [B, C]"),
    ({"mine": torch.tensor(1.0)}, "'mine' with the shape []; it must be [B, C]"),
    ({"mine": 1.0}, "'mine' of type float; it must be a tensor [B, C]"),
    ({"mine": [[1.0] * 3] * 2}, "'mine' of type list; it must be a tensor [B, C]"),
    ({"mine": torch.ones(2, 3, requires_grad=True)}, "'mine' with a gradient; it must be detached"),
    ({"mine": torch.ones(2, 3, dtype=torch.complex64)}, "it must be a dense tensor of real numbers"),
    ({"mine": torch.ones(2, 3).to_sparse()}, "it must be a dense tensor of real numbers"),
    ({"mine": torch.full((2, 3), math.nan)}, "'mine' with a value that is not finite"),
    ({"mine": torch.full((2, 3), math.inf)}, "'mine' with a value that is not finite"),
    ([torch.ones(2, 3)], "diagnostics of type list; they must be a dict of name: tensor"),
    (None, "diagnostics of type NoneType"),
]


@pytest.mark.parametrize("diagnostics, sentence", WRONG)
def test_attack_3_a_diagnostic_that_cannot_be_logged_is_refused_before_the_model_loads(returning, diagnostics, sentence):
    returning(diagnostics)
    with pytest.raises(ConfigError, match=re.escape(sentence)) as error:
        try_loss("mine", {})
    assert str(error.value).startswith("loss mine returned")


def test_attack_3_a_per_token_loss_that_is_no_tensor_is_refused(monkeypatch):
    monkeypatch.setitem(LOSSES.functions, "mine", lambda logprobs, old, A, mask: PolicyLoss(1.0, {}))
    with pytest.raises(ConfigError, match="loss mine returned per_token_loss of type float; it must be a tensor"):
        try_loss("mine", {})


def token_loss_of(loss_fn, rows, columns):
    """The statistics of a micro-batch of [rows, columns]."""
    zeros, mask = torch.zeros(rows, columns), torch.ones(rows, columns, dtype=torch.bool)
    mask[:, -1] = False
    prompt = torch.zeros(rows, 1, dtype=torch.long)
    rollouts = Rollouts(prompt, prompt.bool(), prompt.expand(rows, columns), mask, zeros, torch.zeros(rows, dtype=torch.bool))
    micro = TrainBatch(rollouts, torch.ones(rows, 1), mask)
    objective = replace(build_objective(RunConfig()), loss_fn=loss_fn)
    stats = Stats()
    tokens = TokenStats(zeros.clone().requires_grad_(), zeros, None)
    token_loss(objective, micro, tokens, zeros, SimpleNamespace(kl_coef=0.0), stats)
    return stats.reduce()


def test_attack_3_integers_and_bools_are_averaged_and_padding_may_be_nan(returning):
    flags = torch.tensor([[True, False, True], [True, True, True]])
    numbers = torch.tensor([[1, 2, 9], [3, 4, 9]])
    loss = returning({"flags": flags, "numbers": numbers, "padded": numbers.float().masked_fill(numbers == 9, math.nan)})
    row = token_loss_of(loss, 2, 3)
    assert row == {"flags": 0.75, "numbers": 2.5, "padded": 2.5}
    returning({"flags": flags, "numbers": numbers, "padded": numbers.float().masked_fill(flags.new_tensor([[0, 0, 0], [0, 1, 1]]), math.nan)})
    try_loss("mine", {})  # the last two tokens of the second row of the batch of two are padding


@pytest.mark.parametrize("diagnostics, sentence", [
    (lambda ratio: {"mine": torch.ones(2, 3)}, "'mine' with the shape [2, 3]; it must be [B, C] = [4, 5]"),
    (lambda ratio: {"reward" if len(ratio) > 2 else "mine": ratio.detach()}, "'reward', but the loop has a metric"),
])  # fmt: skip
def test_attack_3_what_only_a_larger_batch_shows_is_a_sentence_too(returning, diagnostics, sentence):
    loss = returning(diagnostics)
    try_loss("mine", {})
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        token_loss_of(loss, 4, 5)


@pytest.mark.parametrize("words, shape", [([], [64, 48]), (["trainer.num_minibatches=8", "sampling.max_new_tokens=9"], [16, 9])])
def test_attack_1_a_diagnostic_that_is_wrong_on_larger_batches_only_is_refused_before_the_run_starts(returning, words, shape):
    returning(lambda ratio: {"ratio": ratio.detach(), "mine": ratio.detach() if len(ratio) <= 8 else ratio.detach().mean()})
    try_loss("mine", {})
    sentence = f"loss mine returned the diagnostic 'mine' with the shape []; it must be [B, C] = {shape}"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        load(TINY, ["loss.name=mine", *words])


def test_attack_1_a_loss_that_fails_on_larger_batches_only_is_named_with_their_size(monkeypatch):
    def mine(logprobs, old_logprobs, advantages, completion_mask):
        if len(logprobs) > 8:
            raise RuntimeError("too many")
        return PolicyLoss(-(logprobs - old_logprobs).exp() * advantages)

    monkeypatch.setitem(LOSSES.functions, "mine", mine)
    with pytest.raises(ConfigError, match=r"loss mine fails on a batch of 64: RuntimeError: too many"):
        load(TINY, ["loss.name=mine"])
    assert load(TINY, ["loss.name=mine", "trainer.completions_per_step=8"]).loss.name == "mine"


@pytest.mark.parametrize("word", [
    "sampling.group_size=0", "trainer.num_minibatches=0", "sampling.max_new_tokens=0", "trainer.completions_per_step=-8",
    "sampling.group_size=-8", "trainer.num_minibatches=-1",
])  # fmt: skip
def test_attack_1_numbers_that_are_wrong_are_still_named(word):
    with pytest.raises(ConfigError, match=rf"{word.split('=')[0]} is {word.split('=')[1]}; it must be"):
        load(TINY, [word])


@pytest.mark.parametrize("name", sorted(LOSSES.functions))
def test_attack_1_every_loss_passes_on_the_larger_batch(name):
    try_loss(name, {}, (64, 64))
    try_loss(name, {}, (1, 1))
