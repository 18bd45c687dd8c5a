"""Every registered loss, present and future, is put before the laws; a hand table covers what laws cannot see."""

import math
import time

import pytest
import torch

from grpo_core.objective.inputs import LOSS_INPUTS
from grpo_core.objective.laws import (
    B,
    C,
    batch,
    call,
    check_loss,
    clip_table,
    default_average,
    loss_gradient,
    ranks,
    select,
    start_rank_gaps,
    weights,
)
from grpo_core.objective.losses import LOSSES, PolicyLoss
from grpo_core.objective.token_weights import AVERAGES, Totals, mean_weights, token_weights
from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError

LAW_ARGS = {"clip_cov": {"share": 0.05, "cov_low": 0.1}, "kl_cov": {"share": 0.3}}  # so that they choose tokens of 42


@pytest.fixture(scope="module")
def rank_gaps():
    names = sorted(LOSSES.functions)
    return dict(zip(names, start_rank_gaps([(name, LAW_ARGS.get(name, {})) for name in names])(), strict=True))


@pytest.mark.parametrize("name", sorted(LOSSES.functions))
def test_it_holds_the_laws_or_says_which_it_breaks(name):
    outcomes = check_loss(LOSSES.build(name, LAW_ARGS.get(name)))
    assert [o for o in outcomes if not o.ok] == []
    assert {o.law for o in outcomes if not o.holds} == (get_fact(LOSSES.get(name), "breaks") or {}).keys()
    assert len(outcomes) == 12
    assert {"ratio", "clip_frac"} <= call(LOSSES.get(name), *batch()).diagnostics.keys()


@pytest.mark.parametrize("name", sorted(LOSSES.functions))
def test_attack_9_advantages_without_a_second_dimension_are_refused(name):
    """As many completions as tokens: [B] would be spread over the columns, and nobody would see it."""
    logprobs, mask = torch.full((3, 3), -1.0), torch.ones(3, 3, dtype=torch.bool)
    for shape in ((3,), (1, 3), (3, 3, 1)):
        with pytest.raises(ConfigError, match=r"they must be \[B, 1\] = \[3, 1\] or \[B, C\] = \[3, 3\]"):
            inputs = dict.fromkeys([*LOSS_INPUTS.positional, *LOSS_INPUTS.by_name], logprobs)
            flags = {"completion_mask": mask, "selected": mask}
            LOSS_INPUTS.call(LOSSES.get(name), {**inputs, **flags, "advantages": torch.ones(shape)})


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LOSSES.functions))
def test_two_ranks_have_the_gradient_of_one(name, rank_gaps):
    assert ranks(rank_gaps[name])[0]


@pytest.mark.parametrize("average", sorted(AVERAGES.functions))
@pytest.mark.parametrize("name", sorted(LOSSES.functions))
def test_no_average_depends_on_how_the_step_is_cut(name, average):
    """Any split into micro-batches sums to the one-batch gradient, but with the average that is made to differ."""
    loss_fn, inputs = LOSSES.build(name, LAW_ARGS.get(name)), batch()
    whole, selected = loss_gradient(loss_fn, *inputs, w=weights(inputs[3], average)), select(loss_fn, *inputs)
    parts = []
    for *part, chosen in zip(*(x.split([1, 3, 2]) for x in (*inputs, selected)), strict=True):
        parts.append(loss_gradient(loss_fn, *part, w=weights(part[3], average, of=inputs[3]), selected=chosen))
    same = torch.allclose(torch.cat(parts), whole, atol=1e-14)
    assert same == ("splits" not in (get_fact(AVERAGES.get(average), "breaks") or {}))


def test_an_average_that_is_wrong_by_the_number_of_ranks_would_be_seen():
    """The totals of one rank in place of all ranks' double the gradient: the law has teeth."""
    logprobs, old, advantages, mask = batch()
    half = [x[::2] for x in (logprobs, old, advantages, mask)]
    wrong = loss_gradient(LOSSES.get("grpo"), *half, w=weights(half[3], "token"))
    right = loss_gradient(LOSSES.get("grpo"), logprobs, old, advantages, mask, w=weights(mask, "token"))[::2]
    assert (wrong - right).abs().max() > 1e-3


UNSOUND = {
    "shape": lambda x, o, a, m: PolicyLoss((-(x - o).exp() * a).sum(), {"ratio": x.detach(), "clip_frac": x.detach()}),
    "zero_advantage": lambda x, o, a, m: sound(-(x - o).exp() * (a + 0.1), x),
    "padding": lambda x, o, a, m: sound(-((x - o).mean(dim=1, keepdim=True)).exp().expand_as(x) * a, x),
    "splits": lambda x, o, a, m: sound(-(x - o).exp() * (a - a.mean()), x),
    "on_policy": lambda x, o, a, m: sound(-2 * (x - o).exp() * a, x),
    "gradcheck": lambda x, o, a, m: sound(-(x - o).exp().detach() * a * x, x),
    "clip": lambda x, o, a, m: sound((x - o).exp() * a, x),
    "learns": lambda x, o, a, m: sound((x - o).exp() * a, x),
    "finite": lambda x, o, a, m: sound(-(x - o).exp() * a, x),
    "pure": lambda x, o, a, m: sound(-(x.mul_(1 + 1e-9) - o).exp() * a if not x.requires_grad else -(x - o).exp() * a, x),
}  # fmt: skip


def sound(per_token_loss, like):
    return PolicyLoss(per_token_loss, {"ratio": like.detach(), "clip_frac": like.detach()})


@pytest.mark.parametrize("law", UNSOUND)
def test_an_unsound_loss_is_caught_by_its_law(law):
    assert law in {outcome.law for outcome in check_loss(UNSOUND[law]) if not outcome.ok}


def test_a_broken_law_can_be_declared_but_not_falsely():
    def doubled(logprobs, old_logprobs, advantages, completion_mask):
        return sound(-2 * (logprobs - old_logprobs).clamp(-20, 20).exp() * advantages, logprobs)

    assert [o.law for o in check_loss(doubled) if not o.ok] == ["on_policy"]
    doubled.breaks = {"on_policy": "twice as strong", "padding": "no reason"}
    assert [o.law for o in check_loss(doubled) if not o.ok] == ["padding"]


# ratio, advantage, does the token still have a gradient?   clip_low = 0.2, clip_high = 0.4
CLIP_TABLE = [(1.5, +1, False), (1.3, +1, True), (0.5, +1, True), (1.5, -1, True), (0.9, -1, True), (0.7, -1, False)]


@pytest.mark.parametrize("name", ["grpo", "gspo", "gspo_token", "luspo", "dual_clip"])
@pytest.mark.parametrize("ratio, advantage, has_gradient", CLIP_TABLE)
def test_clipping_only_ever_removes_incentive(name, ratio, advantage, has_gradient):
    loss_fn = LOSSES.build(name, {"clip_low": 0.2, "clip_high": 0.4})
    old = torch.full((1, 3), -1.0)
    logprobs = (old + math.log(ratio)).requires_grad_()
    out = loss_fn(logprobs, old, torch.tensor([[float(advantage)]]), torch.ones(1, 3, dtype=torch.bool))
    out.per_token_loss.sum().backward()
    assert (logprobs.grad != 0).all() == has_gradient and (logprobs.grad == 0).all() != has_gradient
    assert out.diagnostics["clip_frac"].mean() == (not has_gradient)


@pytest.mark.parametrize(
    "name, args",
    [
        ("grpo", {"delta": 2.0}),
        ("gspo", {"delta": 2.0}),
        ("dual_clip", {"c": 2.0}),
        ("dual_clip", {"c": 2.0, "clip_high": 1.5}),
    ],
)
def test_two_sided_clipping_lets_go_of_bad_tokens_that_grew(name, args):
    for ratio, has_gradient in ((1.9, True), (2.1, False)):
        old = torch.full((1, 2), -3.0)
        logprobs = (old + math.log(ratio)).requires_grad_()
        loss_fn = LOSSES.build(name, {"clip_low": 0.2, "clip_high": 0.4} | args)
        out = loss_fn(logprobs, old, torch.tensor([[-1.0]]), torch.ones(1, 2, dtype=torch.bool))
        out.per_token_loss.sum().backward()
        assert (logprobs.grad != 0).all() == has_gradient
        torch.testing.assert_close(out.per_token_loss[0, 0], torch.tensor(min(ratio, 2.0)))


def test_values_by_hand():
    """Two tokens with ratios 2 and 1/2, A = 1 and -1."""
    old, mask = torch.zeros(2, 2).double(), torch.ones(2, 2, dtype=torch.bool)
    logprobs = torch.tensor([[2.0, 0.5], [2.0, 0.5]]).double().log()
    advantages = torch.tensor([[1.0], [-1.0]]).double()

    def value(name, **args):
        return LOSSES.build(name, args)(logprobs, old, advantages, mask).per_token_loss

    def close(ours, by_hand):
        torch.testing.assert_close(ours, torch.tensor(by_hand).double())

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    close(value("grpo", clip_low=0.2, clip_high=0.3), [[-1.3, -0.5], [2.0, 0.8]])
    close(value("grpo", clip_low=0.2, clip_high=0.3, delta=1.5), [[-1.3, -0.5], [1.5, 0.8]])
    close(value("dual_clip", clip_low=0.2, clip_high=0.3, c=1.5), [[-1.3, -0.5], [1.5, 0.8]])
    for name in ("gspo", "gspo_token", "luspo"):
        close(value(name), [[-1.0, -1.0], [1.0, 1.0]])  # the ratios' geometric mean is 1
    close(value("cispo", cap=1.5), (torch.tensor([[-1.5, -0.5], [1.5, 0.5]]).double() * logprobs).tolist())
    close(value("reinforce"), (torch.tensor([[-1.0], [1.0]]).double() * logprobs).tolist())
    close(value("gpg"), value("reinforce").tolist())
    up, down = 4 * sigmoid(1.0), 4 * sigmoid(-0.5)
    close(value("sapo", tau_pos=1.0, tau_neg=1.0), [[-up, -down], [up, down]])
    close(value("sapo", tau_pos=1.0, tau_neg=2.0)[1], [2 * sigmoid(2.0), 2 * sigmoid(-1.0)])
    # gmpo: log 2 is cut to 0.4 where A > 0, -log 2 to -0.4 where A < 0; half their sum with the other is exponentiated
    close(value("gmpo")[0], [-math.exp((0.4 - math.log(2)) / 2)] * 2)
    close(value("gmpo", clip_low=0.1)[1], [math.exp((math.log(2) - 0.1) / 2)] * 2)
    close(value("gmpo", clip_high=0.1)[0], [-math.exp((0.1 - math.log(2)) / 2)] * 2)


def test_dro_by_hand():
    """Ratios 2 and 1/2, so d is log 2 and -log 2: -A l + beta d**2 / 2, with the gradient -A + beta d; beta is 0.5."""
    old, mask, log2 = torch.full((2, 2), -1.0).double(), torch.ones(2, 2, dtype=torch.bool), math.log(2)
    logprobs = (old + torch.tensor([[log2, -log2]] * 2)).requires_grad_()
    advantages = torch.tensor([[3.0], [-1.0]]).double()
    for args, beta in (({}, 0.5), ({"beta": 0.2}, 0.2), ({"beta": 0.0}, 0.0)):
        out = LOSSES.build("dro", args)(logprobs, old, advantages, mask)
        torch.testing.assert_close(out.per_token_loss, -advantages * logprobs + beta / 2 * log2**2)
        slope = torch.autograd.grad(out.per_token_loss.sum(), logprobs)[0]
        torch.testing.assert_close(slope, -advantages + beta * (logprobs - old))
    assert out.diagnostics.keys() == {"ratio", "clip_frac"} and (out.diagnostics["clip_frac"] == 0).all()
    torch.testing.assert_close(out.diagnostics["ratio"], torch.tensor([[2.0, 0.5]] * 2).double())


def test_vespo_by_hand():
    """Ratios 2 and 1.5, so s = log 3; (k, lambda) = (2, 3) for A >= 0, (3, 2) below."""
    old, mask = torch.zeros(2, 2).double(), torch.ones(2, 2, dtype=torch.bool)
    logprobs = torch.tensor([[2.0, 1.5]] * 2).double().log().requires_grad_()
    LOSSES.get("vespo")(logprobs, old, torch.tensor([[1.0], [-1.0]]), mask).per_token_loss.sum().backward()
    good, bad = 9 * math.exp(3 - 9), 27 * math.exp(2 - 6)
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-good] * 2, [bad] * 2]).double())


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "luspo", "gmpo"])
def test_a_sequence_ratio_is_over_the_rows_own_tokens(name):
    mask = torch.tensor([[True, True, False]])
    logprobs, old = torch.tensor([[0.2, 0.4, 9.0]]), torch.zeros(1, 3)
    args = {"clip_high": 0.9} if name != "gspo" else {"clip_high": 0.9, "delta": None}
    loss = LOSSES.build(name, args)(logprobs, old, torch.ones(1, 1), mask).per_token_loss
    torch.testing.assert_close(loss[0, 0], -torch.tensor(0.3).exp())


def test_the_six_regions_as_check_loss_draws_them():
    def table(name, **args):
        return [
            (sign, [round(value, 5) for value in row], where) for sign, row, where in clip_table(LOSSES.build(name, args))
        ]

    assert table("grpo", clip_low=0.1, clip_high=0.3) == [
        ("A > 0", [0.05, 0.5, 1.0, 0.0, 0.0], "nonzero from ratio 0 to 1.3"),
        ("A < 0", [0.0, 0.0, 1.0, 2.0, 20.0], "nonzero from ratio 0.9 to any"),
    ]
    assert [where for _, _, where in table("gspo")] == ["nonzero from ratio 0 to 1.0004", "nonzero from ratio 0.9997 to any"]
    assert [where for _, _, where in table("dual_clip")] == ["nonzero from ratio 0 to 1.2", "nonzero from ratio 0.8 to 3"]
    assert [where for _, _, where in table("cispo")] == ["nonzero everywhere"] * 2
    assert table("cispo")[0][1] == [0.05, 0.5, 1.0, 2.0, 5.0]


def test_a_push_the_wrong_way_at_any_ratio_is_seen():
    """A surrogate that is sound at 0.5, 1 and 2 and wrong between."""

    def kinked(logprobs, old_logprobs, advantages, completion_mask):
        ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
        return sound(-torch.where((ratio > 1.4) & (ratio < 1.6), -ratio, ratio) * advantages, logprobs)

    assert [o.law for o in check_loss(kinked) if not o.ok] == ["clip"]


def test_weights_by_hand():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    # another rank has as many of each; the bonus acts on 8 tokens
    totals = Totals(torch.tensor(12), torch.tensor(4), 10, entropy_tokens=torch.tensor(8), micro_batches=2)

    def close(average, by_hand):
        torch.testing.assert_close(token_weights(mask, average=average, totals=totals), torch.tensor(by_hand))

    close("sequence", [[1 / 8, 1 / 8, 0, 0], [1 / 16] * 4])
    close("token", [[1 / 12, 1 / 12, 0, 0], [1 / 12] * 4])
    close("constant", [[1 / 40, 1 / 40, 0, 0], [1 / 40] * 4])
    close("row_sum", [[1 / 4, 1 / 4, 0, 0], [1 / 4] * 4])
    close("micro_token", [[1 / 12, 1 / 12, 0, 0], [1 / 12] * 4])  # 6 tokens here, 2 micro-batches
    torch.testing.assert_close(mean_weights(mask, totals.entropy_tokens), mask / 8)


@pytest.mark.parametrize("average", sorted(AVERAGES.functions))
def test_weights_of_a_step_without_a_token_are_zero(average):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    totals = Totals(tokens=torch.tensor(0), completions=torch.tensor(2), max_new_tokens=3)
    assert (token_weights(mask, average=average, totals=totals) == 0).all()


@pytest.mark.parametrize("name", ["token", "sequence", "micro_token"])
def test_weights_of_a_whole_step_sum_to_one(name):
    assert float(weights(batch()[3], name).sum()) == pytest.approx(1.0)


def test_names_and_arguments_are_checked():
    with pytest.raises(ValueError, match="unknown key loss.args.clip; known: clip_high, clip_low, delta"):
        LOSSES.build("grpo", {"clip": 0.2})
    with pytest.raises(ValueError, match="loss.args.clip_low is 'wide'; it must be a number"):
        LOSSES.build("grpo", {"clip_low": "wide"})
    with pytest.raises(ValueError, match="unknown loss 'grpoo'.*did you mean grpo"):
        LOSSES.get("grpoo")


@pytest.mark.parametrize("name, args, message", [
    ("grpo", {"clip_low": -0.1}, "clip_low is -0.1"),
    ("grpo", {"clip_low": 1.5}, "clip_low at most 1"),
    ("gspo", {"clip_high": -1.0}, "clip_high is -1.0"),
    ("gmpo", {"clip_low": -0.4}, "clip_low is -0.4"),
    ("grpo", {"delta": 1.1}, "delta is 1.1; it must be above 1"),
    ("dual_clip", {"c": 1.0}, "c is 1.0; it must be above 1"),  # 1 < c < 1 + clip_high is the paper's
    ("cispo", {"cap": 0.0}, "cap is 0.0"),
    ("sapo", {"tau_neg": 0.0}, "both must be above 0"),
    ("vespo", {"lambda_pos": -1.0}, "both must be above 0"),
    ("dppo_tv", {"delta_low": -0.1}, "delta_low is -0.1; it must be at least 0"),
    ("dppo_kl", {"cap": 0.0}, "cap is 0.0; it is a bound on the ratio"),
    ("prime_rl", {"delta_high": -1.0}, "delta_high is -1.0; it must be at least 0"),
    ("ipo", {"threshold": -1.0}, "threshold is -1.0; it must be at least 0"),
    ("dro", {"beta": -0.1}, "beta is -0.1; it must be at least 0"),
])  # fmt: skip
def test_bounds_out_of_order_are_refused(name, args, message):
    with pytest.raises(ValueError, match=message):
        call(LOSSES.build(name, args), *batch())


@pytest.mark.parametrize("name", sorted(LOSSES.functions))
def test_a_loss_is_cheap_and_knows_no_vocabulary(name):
    """[64, 1024] float32, forward: 5 ms in benchmarks/losses.py; ten times that here, where tests run side by side."""
    shape, loss_fn = (64, 1024), LOSSES.get(name)
    old, mask, advantages = -torch.rand(shape), torch.ones(shape, dtype=torch.bool), torch.randn(64, 1)
    logprobs, seconds = old + 0.1 * torch.randn(shape), []
    for _ in range(5):
        start = time.perf_counter()
        call(loss_fn, logprobs, old, advantages, mask)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def test_averages_and_rank_counts_of_the_laws_are_the_batch_of_the_laws():
    logprobs, old, advantages, mask = batch()
    assert logprobs.shape == old.shape == mask.shape == (B, C) and advantages.shape == (B, 1)
    assert default_average(LOSSES.get("luspo")) == "row_sum"
