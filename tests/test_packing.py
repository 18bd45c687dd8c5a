"""Packed forwards against one row at a time: same log-probs, same gradient, however they are cut; and what they cost."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from fakes import TorchEngine, frozen_batch, ragged_rollouts, tiny_policy, with_objective
from test_loop import make_run
from test_policy import naive_logprobs
from test_sampler import MODELS
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from grpo_core.batch import Rollouts, take
from grpo_core.config.sections import LoraConfig, LossConfig, ModelConfig
from grpo_core.model import packed_attention
from grpo_core.model.memory import Budgets
from grpo_core.model.packing import Budget, Segments, make_gather, plan
from grpo_core.model.policy import Policy, wrap
from grpo_core.monitor.aggregates import Stats
from grpo_core.training.update import rows_to_train, update_policy


def grouped_rollouts(groups=4, group_size=3, prompt_width=7, width=9, vocabulary=16, side="left", seed=0) -> Rollouts:
    """Ragged completions of ragged prompts, group_size to a prompt; the last row has one token."""
    prompts = ragged_rollouts(groups, prompt_width, 1, seed, side)
    whole = ragged_rollouts(groups * group_size, 1, width, seed + 1)
    mask = whole.completion_mask.clone()
    mask[-1, 1:] = False
    ids = torch.randint(2, vocabulary, mask.shape, generator=torch.Generator().manual_seed(seed)) * mask
    spread = {name: getattr(prompts, name).repeat_interleave(group_size, 0) for name in ("prompt_ids", "prompt_mask")}
    return replace(whole, **spread, completion_ids=ids, completion_mask=mask)


def gradient(policy, logprobs, mask):
    weights = torch.cos(torch.arange(mask.numel(), device=mask.device).view(mask.shape))
    grads = torch.autograd.grad((logprobs * weights * mask).sum(), policy.parameters())
    return torch.cat([g.flatten() for g in grads])


def forwards(policy, rollouts, budget=None):
    """Log-probs [B, C] by as many forwards as the budget makes."""
    out = torch.zeros(rollouts.completion_ids.shape)
    for packing in policy.plan(rollouts, budget):
        out = out.index_copy(0, packing.rows, policy.forward(take(rollouts, packing.rows), packing).logprobs)
    return out


@pytest.fixture
def kernel(monkeypatch):
    """In flash attention's place, which needs a GPU: segment by segment, the last query sees the last key."""

    def segment_by_segment(query, key, value, of_queries, of_keys, most_queries, most_keys, dropout, scaling, window):
        out = []
        for (a, b), (c, d) in zip(pairwise(of_queries.tolist()), pairwise(of_keys.tolist()), strict=True):
            assert 0 < b - a <= most_queries and b - a <= d - c <= most_keys
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            if window is not None:
                mask = mask.triu(d - c - (b - a) - window + 1)
            q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
            how = {"attn_mask": mask, "dropout_p": dropout, "scale": scaling, "enable_gqa": len(q) != len(k)}
            out.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, **how).transpose(0, 1))
        assert b == len(query) and d == len(key)
        return torch.cat(out)

    monkeypatch.setattr(packed_attention, "_flash", segment_by_segment)
    monkeypatch.setattr(packed_attention, "supports_segments", lambda model: True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", [Budget(math.inf), Budget(30), Budget(1), Budget(60, 50)], ids=str)
def test_segments_change_nothing(budget, side, kernel):
    policy, rollouts = tiny_policy(lora_noise=0.1), grouped_rollouts(side=side)
    assert policy.layout == "segments"
    assert isinstance(next(iter(policy.plan(rollouts))).attention, Segments)
    ours, naive = forwards(policy, rollouts, budget), naive_logprobs(policy, rollouts)
    torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-5)
    mask = rollouts.completion_mask
    torch.testing.assert_close(gradient(policy, ours, mask), gradient(policy, naive, mask), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_segments_of_every_architecture(name, kernel):
    test_every_architecture(name, "segments")


def test_of_a_prompt_every_query_is_computed_once(kernel):
    rollouts = grouped_rollouts(groups=4, group_size=3)
    [packing] = plan(rollouts, Budget(math.inf), layout="segments")
    prompts, computed = rollouts.prompt_mask.sum(1), rollouts.lengths() - 1
    segments = packing.attention
    assert segments.num_prompt_tokens == prompts[::3].sum() and len(segments.prompt_offsets) == 5
    assert segments.prompt_offsets[-1] + segments.completion_offsets[-1] == packing.tokens
    real = computed > 0
    assert not real.all() and segments.row_offsets.diff().tolist() == (prompts + computed)[real].tolist()
    assert segments.max_lengths == (prompts.max(), computed.max(), (prompts + computed)[real].max())


def test_segments_fill_the_places_that_rows_would_pad():
    """Three rows of 9, 7 and 6 places are 22; in rows, padded to the longest, 27."""
    rollouts = grouped_rollouts(groups=1, prompt_width=1)
    lengths = torch.tensor([[9], [7], [6]])
    mask = torch.arange(rollouts.completion_mask.shape[1]) < lengths
    rollouts = replace(rollouts, completion_mask=mask, prompt_mask=torch.ones_like(rollouts.prompt_mask))
    counts = {
        layout: [len(plan(rollouts, Budget(99, places), layout=layout)) for places in (27, 26, 22, 21)]
        for layout in ("segments", "rows")
    }
    assert counts == {"segments": [1, 1, 1, 2], "rows": [1, 2, 2, 2]}


@pytest.mark.parametrize("capability, dtype, dim, there", [
    ((9, 0), torch.bfloat16, 64, True), ((8, 6), torch.float16, 128, True), ((8, 6), torch.bfloat16, 192, True),
    ((8, 6), torch.bfloat16, 256, False), ((8, 0), torch.bfloat16, 256, True),  # the backward of wide heads
    ((7, 5), torch.float16, 64, False), ((9, 0), torch.float32, 64, False),
])  # fmt: skip
def test_where_the_kernel_for_segments_is_looked_for(monkeypatch, capability, dtype, dim, there):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for config in (SimpleNamespace(head_dim=dim), SimpleNamespace(hidden_size=3 * dim, num_attention_heads=3)):
        model = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, config=config)
        assert packed_attention.supports_segments(model) is there
    assert not packed_attention.supports_segments(tiny_policy().causal_lm)


def test_a_kernel_that_computes_something_else_is_not_used(kernel, monkeypatch):
    right = packed_attention._flash
    monkeypatch.setattr(packed_attention, "_flash", lambda *args: right(*args) * 1.3)
    policy, rollouts = tiny_policy(lora_noise=0.1), grouped_rollouts()
    assert policy.layout == "rows"
    torch.testing.assert_close(forwards(policy, rollouts), naive_logprobs(policy, rollouts), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", [Budget(math.inf), Budget(30), Budget(1), Budget(60, 50)], ids=str)
@pytest.mark.parametrize("grid", [False, True])
def test_log_probs_and_gradient_do_not_depend_on_the_packing(budget, grid, side):
    policy, rollouts = tiny_policy(lora_noise=0.1), grouped_rollouts(side=side)
    assert policy.layout == "rows"
    policy.layout = "grid" if grid else "rows"
    ours, naive = forwards(policy, rollouts, budget), naive_logprobs(policy, rollouts)
    torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-5)
    mask = rollouts.completion_mask
    ours, naive = gradient(policy, ours, mask), gradient(policy, naive, mask)
    assert naive.abs().max() > 1e-2
    torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name, layout="rows"):
    kind, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = kind(config)
    if name.startswith("gemma2"):
        model.config._attn_implementation = "eager"  # the only one that caps the scores
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj", "o_proj"]
    policy = wrap(model, ModelConfig(), LoraConfig(target_modules=targets), temperature=1.0)
    with torch.no_grad():
        for p in policy.parameters():
            p.normal_(0, 0.1)
    rollouts = grouped_rollouts(width=12, vocabulary=config.vocab_size)
    assert policy.layout == ("grid" if name.startswith(("gemma2", "gpt_oss")) else layout)  # caps and sinks cannot be packed
    ours, naive = forwards(policy, rollouts, Budget(80)), naive_logprobs(policy, rollouts)
    torch.testing.assert_close(ours, naive, atol=1e-4, rtol=1e-4)
    mask = rollouts.completion_mask
    torch.testing.assert_close(gradient(policy, ours, mask), gradient(policy, naive, mask), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model", [
    lambda: BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2)),
    lambda: MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=16, state_size=4, num_hidden_layers=1)),
    lambda: Starcoder2ForCausalLM(Starcoder2Config(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        sliding_window=8, bos_token_id=None, eos_token_id=1,
    )),
], ids=["positions in the attention's bias", "no attention", "a window that its mask may hold"])  # fmt: skip
def test_a_model_that_would_mix_rows_gets_a_grid(model):
    torch.manual_seed(0)
    policy = Policy(model())
    rollouts = grouped_rollouts()
    assert policy.layout == "grid"
    torch.testing.assert_close(forwards(policy, rollouts), naive_logprobs(policy, rollouts), atol=1e-5, rtol=1e-4)


def test_a_layer_that_mixes_tokens_is_noticed():
    """Attention is sdpa's, but something else looks at the token before, which in a packed row may be another row's."""
    policy, rollouts = tiny_policy(lora_noise=0.1), grouped_rollouts()
    layer = policy.causal_lm.model.layers[0].mlp
    own = layer.forward
    layer.forward = lambda x: own(torch.cat([x[:, :1], x[:, 1:] + x[:, :-1]], dim=1))
    assert policy.layout == "grid"
    torch.testing.assert_close(forwards(policy, rollouts), naive_logprobs(policy, rollouts), atol=1e-5, rtol=1e-4)


def test_the_models_own_scale_of_attention_counts():
    policy, rollouts = tiny_policy(lora_noise=0.1), grouped_rollouts()
    for layer in policy.causal_lm.model.layers:
        layer.self_attn.scaling *= 3
    assert policy.layout == "rows"
    torch.testing.assert_close(forwards(policy, rollouts), naive_logprobs(policy, rollouts), atol=1e-5, rtol=1e-4)


def test_prompts_that_differ_in_length_alone_are_not_shared():
    """The padding's id may be a token of the prompt."""
    rollouts = grouped_rollouts(groups=1, group_size=2, prompt_width=3)
    ids = torch.tensor([[0, 5, 6], [0, 5, 6]])
    rollouts = replace(rollouts, prompt_ids=ids, prompt_mask=torch.tensor([[False, True, True], [True, True, True]]))
    policy = tiny_policy(lora_noise=0.1)
    torch.testing.assert_close(forwards(policy, rollouts), naive_logprobs(policy, rollouts), atol=1e-5, rtol=1e-4)


def test_a_prompt_is_computed_once_and_no_padding_at_all():
    rollouts = grouped_rollouts()
    lengths, prompts = rollouts.lengths(), rollouts.prompt_mask.sum(1)
    [packing] = plan(rollouts, Budget(math.inf))
    assert packing.tokens == prompts[::3].sum() + (lengths - 1).sum() == len(packing.source)
    # the same prompt elsewhere in the batch is another one, and one row of a group alone has its own
    [part] = plan(rollouts, Budget(math.inf), rows=[0, 4, 5, 11])
    assert part.tokens == prompts[[0, 4, 11]].sum() + (lengths[[0, 4, 5, 11]] - 1).sum()
    [grid] = plan(rollouts, Budget(math.inf), layout="grid")
    assert grid.tokens == grid.mask.numel() == 12 * (prompts + lengths - 1).max()
    assert grid.mask.sum(dim=1).tolist() == (prompts + lengths - 1).tolist()


def test_forwards_keep_to_the_budget_and_groups_together():
    rollouts = grouped_rollouts(groups=8)
    forwards = plan(rollouts, Budget(64, 100))
    for tokens in range(40, 80):  # of 7 + 3 × 8 tokens at most is a group
        for rows in plan(rollouts, Budget(tokens)).forwards:
            assert len({row // 3 for row in rows}) * 3 == len(rows)
    cost = {tuple(rows): packing for rows, packing in zip(forwards.forwards, forwards, strict=True)}
    assert sorted(row for rows in cost for row in rows) == list(range(24))
    for rows, packing in cost.items():
        assert packing.tokens <= 64 and len(packing.attention.spread.index) <= 100
        assert len({row // 3 for row in rows}) * 3 == len(rows)
    assert len(cost) < 8
    assert len(plan(rollouts, Budget(1))) == 24  # a row that is too long gets a forward of its own


def test_of_a_group_that_does_not_fit_as_much_as_fits_shares_the_prompt():
    rollouts = grouped_rollouts(groups=1, group_size=6)
    prompt, computed = int(rollouts.prompt_mask[0].sum()), rollouts.lengths() - 1
    first, second = plan(rollouts, Budget(prompt + int(computed[:4].sum())))
    assert {tuple(first.rows.tolist()), tuple(second.rows.tolist())} == {(0, 1, 2, 3), (4, 5)}
    assert {first.tokens, second.tokens} == {prompt + int(computed[:4].sum()), prompt + int(computed[4:].sum())}


def test_what_is_tried_fits_its_own_budget():
    """The budget that one forward has is enough for the same forward."""
    rollouts = grouped_rollouts()
    [packing] = plan(rollouts, Budget(math.inf))
    assert len(plan(rollouts, Budget(packing.tokens, len(packing.attention.spread.index)))) == 1
    assert len(plan(rollouts, Budget(packing.tokens - 1))) == 2
    [grid] = plan(rollouts, Budget(math.inf), layout="grid")
    assert (
        len(plan(rollouts, Budget(grid.tokens), layout="grid"))
        == 1
        < len(plan(rollouts, Budget(grid.tokens - 1), layout="grid"))
    )


def test_gathering_adds_up_what_was_read_often():
    index = torch.randint(-1, 10, (40,), generator=torch.Generator().manual_seed(0))
    x, upstream = torch.randn(10, 3, 2, requires_grad=True), torch.randn(40, 3, 2) * (index >= 0).view(-1, 1, 1)
    ours = make_gather(index.numpy(), 10, x.device)(x)
    real = x[index.clamp(min=0)]
    assert torch.equal(ours, real) and (index < 0).any() and index[index >= 0].bincount().max() > 2
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in (ours, real)))


def test_gradient_checkpointing_recomputes_the_packed_forward():
    rollouts = grouped_rollouts()
    kept, again = tiny_policy(lora_noise=0.1), tiny_policy(lora_noise=0.1, gradient_checkpointing=True)
    with kept.training(), again.training():
        grads = [gradient(p, p.logprobs(rollouts), rollouts.completion_mask) for p in (kept, again)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


class Recorder(TorchEngine):
    """Keeps the gradient of every step."""

    def step(self):
        self.gradient = torch.cat(
            [(0 * p if p.grad is None else p.grad).detach().flatten().clone() for p in self.parameters]
        )
        return super().step()


def update(folder, advantages, learns_from_ties=False, **more):
    run = make_run(folder, policy=tiny_policy(lora_noise=0.1), **more)
    run = with_objective(replace(run, engine=Recorder(run.policy.parameters())), learns_from_ties=learns_from_ties)
    batch = frozen_batch(run, grouped_rollouts(groups=4, group_size=8), advantages)
    stats = Stats()
    update_policy(run, batch, 0, run.control, stats)
    return run.engine, stats.reduce()


def test_tied_groups_cost_nothing_and_change_nothing(tmp_path):
    advantages = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    advantages[1:] = 0
    skipping, _ = update(tmp_path / "a", advantages)
    computing, _ = update(tmp_path / "b", advantages, learns_from_ties=True)
    assert 1 <= skipping.backwards < computing.backwards
    assert skipping.gradient.abs().max() > 1e-4
    torch.testing.assert_close(skipping.gradient, computing.gradient, atol=1e-7, rtol=1e-4)
    with_kl, _ = update(tmp_path / "c", advantages, kl_coef=0.1)
    assert with_kl.backwards == computing.backwards  # a KL has a gradient at every token


@pytest.mark.parametrize("loss", [{"entropy_target": 0.5}, {"entropy_coef": 0.1}, {"kl_coef": 0.1}], ids=str)
def test_where_every_token_counts_none_is_skipped(tmp_path, loss):
    """A coefficient that is steered by the entropy of all tokens may be 0 now; a bonus or a KL has a gradient at all of them."""
    run = make_run(tmp_path, loss=LossConfig(kl_coef=loss.pop("kl_coef", 0.0), **loss))
    batch = frozen_batch(run, grouped_rollouts(groups=4, group_size=8), torch.zeros(4, 8))
    assert len(rows_to_train(run.objective, batch, run.control)) == 32
    plain = make_run(tmp_path, loss=LossConfig(kl_coef=0.0))
    assert rows_to_train(plain.objective, batch, plain.control) == []
    trained = torch.ones(4, 8, dtype=torch.bool)
    trained[1, 2:] = False
    masked = frozen_batch(run, batch.rollouts, torch.zeros(4, 8), trained)
    assert rows_to_train(run.objective, masked, run.control) == trained.flatten().nonzero().squeeze(1).tolist()


def test_what_depends_on_rows_without_an_advantage_skips_none():
    from grpo_core.objective.advantages import ADVANTAGES
    from grpo_core.objective.losses import LOSSES, PolicyLoss, grpo_loss
    from grpo_core.objective.objective import functions_learn_from_ties
    from grpo_core.registry import get_fact

    pulls = {name for name, loss_fn in LOSSES.functions.items() if "zero_advantage" in (get_fact(loss_fn, "breaks") or {})}
    assert {name for name in LOSSES.functions if functions_learn_from_ties("token", LOSSES.build(name))} == pulls
    assert {"dro", "prime_rl", "ipo", "kl_cov"} <= pulls and "grpo" not in pulls
    ties = {name for name in ADVANTAGES.functions if functions_learn_from_ties("token", LOSSES.build("grpo"), ADVANTAGES.build(name))}
    assert ties == {"reinforce_plus_plus"}
    assert functions_learn_from_ties("micro_token", LOSSES.build("grpo"))  # its micro-batches would be others
    assert functions_learn_from_ties("token", lambda logprobs, old, advantages, mask: PolicyLoss(logprobs * (advantages - 1)))

    def declared(*tensors):
        return grpo_loss(*tensors)

    declared.learns_from_ties = True
    assert functions_learn_from_ties("token", declared)  # whatever a probe of it shows
    assert functions_learn_from_ties("token", LOSSES.build("grpo"), declared)  # as one of the other functions


def test_a_term_that_learns_from_tied_groups_gets_them(tmp_path):
    """A term that is added to update.token_loss, which no probe of the loss function can see, declares it."""
    run = make_run(tmp_path)
    batch = frozen_batch(run, grouped_rollouts(groups=4, group_size=8), torch.zeros(4, 8))
    assert rows_to_train(run.objective, batch, run.control) == []
    declared = replace(run.objective, learns_from_ties=True)
    assert rows_to_train(declared, batch, run.control) == [*range(32)]


def test_n13_a_loss_of_a_users_file_that_declares_it_gets_the_tied_rows(tmp_path):
    """FAULTS N13: rows_to_train dropped the tied groups, so a new term missed a quarter of them."""
    from grpo_core.training.prepare import build_objective

    source = "from grpo_core.objective.losses import grpo_loss\n\ndef mine(l, old, A, mask):\n    return grpo_loss(l, old, A, mask)\n"
    (tmp_path / "silent.py").write_text(source)
    (tmp_path / "declared.py").write_text(f"{source}\nmine.learns_from_ties = True\n")
    advantages, run = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), make_run(tmp_path / "run")
    advantages[1] = 0.0  # a tied group of four
    batch = frozen_batch(run, ragged_rollouts(batch=32), advantages)
    for name, count in (("silent", 24), ("declared", 32)):
        config = replace(run.config, loss=LossConfig(name=f"{tmp_path}/{name}.py:mine", kl_coef=0.0))
        assert len(rows_to_train(build_objective(config), batch, run.control)) == count, name


def test_a_step_without_any_signal_has_a_gradient_of_zero(tmp_path):
    engine, row = update(tmp_path, torch.zeros(4, 8))
    assert engine.backwards == 0 and (engine.gradient == 0).all() and row["loss"] == 0.0
    assert {"ratio", "clip_frac", "entropy", "logprob_gap"} <= row.keys()


@pytest.mark.parametrize("average", ["sequence", "token", "constant", "row_sum"])
def test_the_gradient_does_not_depend_on_the_budget(tmp_path, average):
    advantages, seen = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), []
    for budget in (1, 40, 10_000):
        run = make_run(tmp_path / str(budget), policy=tiny_policy(lora_noise=0.1), kl_coef=0.1)
        run = replace(
            with_objective(run, average=average),
            engine=Recorder(run.policy.parameters()),
            budgets=Budgets(*2 * [Budget(budget)]),
        )
        batch = frozen_batch(run, grouped_rollouts(groups=4, group_size=8), advantages)
        update_policy(run, batch, 0, run.control, Stats())
        seen.append(run.engine.gradient)
    assert seen[0].abs().max() > 1e-3
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], atol=1e-6, rtol=1e-4)
