"""Mixture of experts: the routing of sampler and trainer is compared and replayed, and balanced by a loss."""

import copy
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from fakes import VOCAB, Alphabet, FixedTasks, TorchEngine, frozen_batch, tiny_policy
from test_loop import make_run, rows
from tiny_models import make_config, make_model
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from grpo_core.batch import replace_rows, take
from grpo_core.config.sections import LoraConfig, LossConfig, ModelConfig, RunConfig
from grpo_core.model.memory import Budgets
from grpo_core.model.packing import Budget, pack_routed_experts
from grpo_core.model.policy import Policy, enable_gradient_checkpointing, wrap
from grpo_core.model.routing import check_has_routers, find_routers
from grpo_core.monitor.aggregates import Stats
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError
from grpo_core.training import saved_batches, setup
from grpo_core.training.control import first_control
from grpo_core.training.distillation import show_teacher
from grpo_core.training.prepare import build_objective, check_routing
from grpo_core.training.trainer import train
from grpo_core.training.update import accumulate_gradients, count_over_ranks, rows_to_train, update_policy

sys.path.insert(0, str(ROOT / "benchmarks"))
from models import save_model

LAYERS, EXPERTS, TOP_K = 2, 4, 2  # of a tiny model


def moe(name="qwen3_moe"):
    return make_model(make_config(name, VOCAB, **({"norm_topk_prob": True} if name == "qwen3_moe" else {})))


def moe_policy(name="qwen3_moe", lora=None, **options):
    """A policy with an adapter that changes what the base computes; with `lora` r 0, one that trains all weights."""
    lora = lora or LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    policy = wrap(moe(name), ModelConfig(), lora, temperature=1.0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters() if lora.r else []:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    vars(policy).update(options)
    return policy


def draw(policy, group_size=4):
    sampler = Sampler(policy.causal_lm, Alphabet(), max_new_tokens=5, routers=policy.routers)
    return sampler.generate(FixedTasks().batch(0), group_size)


def moe_run(folder, policy, **options):
    """A run of test_loop whose sampler records its routing."""
    run = make_run(folder, policy=policy, **options)
    return replace(run, sampler=Sampler(policy.causal_lm, Alphabet(), max_new_tokens=5, routers=policy.routers))


@contextmanager
def perturbed(policy, layer=LAYERS - 1):
    """Let a router choose the experts after those that it would choose, for tokens whose first input is above 0.

    The gates are those of the experts that it goes to, as the trainer's router would have them.
    """
    (router,) = policy.routers.places[layer]

    def forward(hidden):
        hidden = hidden.reshape(-1, hidden.shape[-1])
        logits = F.linear(hidden, router.weight)
        scores = logits.softmax(dim=-1)
        experts = torch.topk(torch.where(hidden[:, :1] > 0, scores.roll(1, dims=-1), scores), TOP_K)[1]
        gates = scores.gather(1, experts)
        return logits, gates / gates.sum(dim=-1, keepdim=True), experts

    router.forward = forward
    try:
        yield
    finally:
        del router.forward


def each_row(rollouts):
    """Yield the tokens [1, T] of each row alone, the place of its first predictor, and its number of tokens."""
    for i, length in enumerate(rollouts.lengths().tolist()):
        prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i]]
        yield torch.cat([prompt, rollouts.completion_ids[i, : length - 1]])[None], len(prompt) - 1, length


def is_moved(policy, rollouts, layer=LAYERS - 1):
    """Whether `perturbed` moves the token that predicts each completion token, [B, C], from plain forwards."""
    inputs, (router,) = [], policy.routers.places[layer]
    hook = router.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
    moved = torch.zeros(rollouts.completion_ids.shape)
    with torch.no_grad():
        for i, (ids, first, length) in enumerate(each_row(rollouts)):
            policy.causal_lm(input_ids=ids)
            moved[i, :length] = (inputs[-1][first:, 0] > 0).float()
    hook.remove()
    return moved


def gradients(policy, rollouts, weights):
    """The log-probs of all tokens in micro-batches, and the gradient of their weighted sum."""
    for parameter in policy.parameters():
        parameter.grad = None
    logprobs = torch.zeros_like(rollouts.rollout_logprobs)
    with policy.training():
        for packing in policy.plan(rollouts, Budget(30)):
            part = policy.forward(take(rollouts, packing.rows), packing)
            logprobs[packing.rows] = part.logprobs.detach()
            (part.logprobs * weights[packing.rows]).sum().backward()
    return logprobs, [p.grad for p in policy.parameters()]


@pytest.fixture(scope="module")
def policy():
    return moe_policy()


def test_without_a_difference_the_mismatch_is_0_and_routing_is_that_of_plain_forwards(policy):
    rollouts = draw(policy)
    assert rollouts.routed_experts.dtype == torch.uint8 and rollouts.routed_experts.shape[2:] == (LAYERS, TOP_K)
    assert policy.forward(rollouts).routing_mismatch.abs().max() == 0
    in_other_order = replace(rollouts, routed_experts=rollouts.routed_experts.flip(-1))
    assert policy.forward(in_other_order).routing_mismatch.abs().max() == 0  # a choice is a set
    plain = [[] for _ in range(LAYERS)]
    hooks = [place[0].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[2]))
             for place, seen in zip(policy.routers.places, plain, strict=True)]  # fmt: skip
    for i, (ids, _, length) in enumerate(each_row(rollouts)):
        policy.causal_lm(input_ids=ids)
        own = torch.cat([rollouts.prompt_routed_experts[i][rollouts.prompt_mask[i]], rollouts.routed_experts[i, : length - 1]])
        for layer in range(LAYERS):
            assert torch.equal(own[:, layer].sort().values, plain[layer][-1].sort().values.to(torch.uint8))
    [hook.remove() for hook in hooks]


def test_the_metric_counts_exactly_the_share_that_was_perturbed(tmp_path, policy):
    run = moe_run(tmp_path, policy)
    with perturbed(policy):
        rollouts = run.sampler.generate(run.tasks.batch(0), 8)
    moved = is_moved(policy, rollouts)
    share = float((moved * rollouts.completion_mask).sum() / rollouts.completion_mask.sum())
    assert 0.2 < share < 0.8
    for changes in ({}, {"trainer": replace(run.config.trainer, num_minibatches=2)}):
        batch = frozen_batch(run, rollouts, torch.ones(4, 8))
        stats = Stats()
        own = replace(run, config=replace(run.config, **changes), engine=TorchEngine(policy.parameters(), 0.0))
        update_policy(own, batch, 0, run.control, stats)
        assert stats.reduce()["routing_mismatch"] == pytest.approx(share / LAYERS, abs=1e-7)


def test_with_several_minibatches_the_metric_is_that_before_the_first_update(tmp_path):
    run = moe_run(tmp_path, moe_policy(), num_steps=2, num_minibatches=2, learning_rate=0.3)
    train(run)
    assert [row["routing_mismatch"] for row in rows(tmp_path)] == [0, 0]


def test_a_stop_string_cuts_the_routing_with_the_completion(policy):
    whole = draw(policy)
    texts = sorted({text[2] for text in whole.completions if len(text) > 2})
    sampler = Sampler(policy.causal_lm, Alphabet(), max_new_tokens=5, routers=policy.routers, stop=texts)
    cut = sampler.generate(FixedTasks().batch(0), 4)
    assert cut.lengths().max() <= 3 < whole.lengths().max()
    assert policy.forward(cut).routing_mismatch.max() == 0


def test_the_routing_of_ranks_is_joined_as_their_tokens_are():
    prompts, completions = (
        saved_batches._concatenate(name, [torch.ones(1, 2, 3, 2), torch.ones(2, 3, 3, 2)])[:, :, 0, 0].tolist()
        for name in ("prompt_routed_experts", "routed_experts")
    )
    assert prompts == [[0, 1, 1], [1, 1, 1], [1, 1, 1]] and completions == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("replays", [False, True])
def test_with_replay_the_log_probs_are_those_of_the_perturbed_sampler(policy, replays):
    with perturbed(policy):
        rollouts = draw(policy)
    own = Policy(policy.model, replays_routing=replays)
    stats = own.forward(rollouts)
    gap = (stats.logprobs - rollouts.rollout_logprobs).abs().max()
    assert gap < 1e-5 if replays else gap > 1e-2
    # the mismatch stays that of the routers' own choices, in the layer that is perturbed
    torch.testing.assert_close(stats.routing_mismatch, is_moved(policy, rollouts) / LAYERS * rollouts.completion_mask)


def test_with_replay_a_reference_that_is_the_policy_has_no_kl():
    policy = moe_policy(replays_routing=True)
    with perturbed(policy):
        rollouts = draw(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        own = policy.logprobs(rollouts)
        with policy.reference():
            assert (policy.logprobs(rollouts) - own).abs().max() < 1e-6
        kl = policy.forward(rollouts, divergence=lambda p, q: (p.exp() * (p - q)).sum(dim=-1)).divergence
    assert kl.abs().max() < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_under_replay_is_that_of_plain_transformers_with_these_experts(checkpointing):
    """All weights are trained, routers included; micro-batches share prompts, and the reference has one row at a time."""
    policy = moe_policy(lora=LoraConfig(r=0), replays_routing=True)
    if checkpointing:
        enable_gradient_checkpointing(policy.causal_lm)
    with perturbed(policy):
        rollouts = draw(policy)
    weights = torch.randn(rollouts.rollout_logprobs.shape, generator=torch.Generator().manual_seed(0))
    weights = weights * rollouts.completion_mask
    plain = moe()
    logprobs, grads = gradients(policy, rollouts, weights)
    experts = torch.zeros(0)

    def forced(router, layer):
        def forward(hidden):
            logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
            gates = logits.softmax(dim=-1).gather(1, experts[:, layer])
            return logits, gates / gates.sum(dim=-1, keepdim=True), experts[:, layer]

        return forward

    for layer in range(LAYERS):
        plain.model.layers[layer].mlp.gate.forward = forced(plain.model.layers[layer].mlp.gate, layer)
    for i, (ids, first, length) in enumerate(each_row(rollouts)):
        prompt = rollouts.prompt_routed_experts[i][rollouts.prompt_mask[i]]
        experts = torch.cat([prompt, rollouts.routed_experts[i, : length - 1]]).long()
        own = plain(input_ids=ids).logits[0, first:].log_softmax(dim=-1)
        own = own.gather(1, rollouts.completion_ids[i, :length, None]).squeeze(1)
        torch.testing.assert_close(logprobs[i, :length], own, atol=1e-5, rtol=0)
        (own * weights[i, :length]).sum().backward()
    routers = 0
    for (name, parameter), grad in zip(plain.named_parameters(), grads, strict=True):
        torch.testing.assert_close(grad, parameter.grad, atol=1e-5 * float(parameter.grad.norm()), rtol=0, msg=name)
        routers += "mlp.gate" in name and bool(grad.abs().max() > 0)
    assert routers == LAYERS


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "qwen3_next", "jetmoe"])
def test_routing_of_other_types_is_recorded_and_replayed(name):
    """A grid, groups of experts, recurrent layers, routers in the attention; benchmarks/models.py has all types."""
    policy = Policy(moe(name))
    rollouts = draw(policy, 2)
    own = policy.forward(rollouts)
    assert own.routing_mismatch.max() == 0
    layers = rollouts.routed_experts.shape[2]
    other = replace(rollouts, **{
        field: ((getattr(rollouts, field) + 1) % EXPERTS) for field in ("prompt_routed_experts", "routed_experts")
    })  # fmt: skip
    policy.replays_routing = True
    replayed, changed = policy.forward(rollouts), policy.forward(other)
    assert torch.equal(replayed.logprobs, own.logprobs)
    assert (changed.logprobs - own.logprobs).abs().max() > 1e-3
    assert (changed.routing_mismatch > 0.99 / layers).sum() == rollouts.completion_mask.sum()


def split_gradient(run, batch, tokens, stats=None):
    """The gradient of a minibatch in micro-batches of so many tokens."""
    policy, control = run.policy, first_control(run.config.loss)
    for parameter in policy.parameters():
        parameter.grad = None
    plan = policy.plan(batch.rollouts, Budget(tokens), rows_to_train(run.objective, batch, control))
    totals = count_over_ranks(run.objective, batch, len(plan))
    with policy.training():
        accumulate_gradients(run, batch, plan, totals, control, stats or Stats())
    return len(plan), torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_neither_replay_nor_balance_depends_on_the_micro_batches(tmp_path, name):
    policy = moe_policy(name, replays_routing=True)
    run = moe_run(tmp_path, policy, loss=LossConfig(kl_coef=0.0, router_aux_coef=0.5))
    rollouts = run.sampler.generate(run.tasks.batch(0), 8)
    batch = frozen_batch(run, rollouts, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    whole, many = Stats(), Stats()
    one, gradient = split_gradient(run, batch, 10_000, whole)
    if name == "qwen3_moe":
        enable_gradient_checkpointing(policy.causal_lm)  # the layers are computed again in the backward
    several, split = split_gradient(run, batch, 24, many)
    assert one == 1 and several > 3
    torch.testing.assert_close(split, gradient, atol=1e-5 * float(gradient.norm()), rtol=0)
    assert whole.reduce()["router_aux_loss"] == pytest.approx(many.reduce()["router_aux_loss"], rel=1e-6)
    run = replace(run, objective=replace(run.objective, router_aux_coef=0.0))
    assert (split_gradient(run, batch, 24)[1] - split).norm() > 1e-3 * gradient.norm()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_balance_of_a_row_is_transformers_load_balancing_loss_of_its_layers(name):
    policy = Policy(moe(name))
    rollouts = draw(policy, 3)
    balance = policy.forward(rollouts, router_balance=True).router_balance
    for i, (ids, _, _) in enumerate(each_row(rollouts)):
        logits = policy.causal_lm(input_ids=ids, output_router_logits=True).router_logits
        each = [load_balancing_loss_func((layer,), EXPERTS, TOP_K) for layer in logits]
        torch.testing.assert_close(balance[i, 0], torch.stack(each).mean())


def test_the_load_under_replay_is_that_of_the_replayed_experts(policy):
    own, replaying = Policy(policy.model), Policy(policy.model, replays_routing=True)
    rollouts = draw(policy)
    only = torch.tensor([0, 1], dtype=torch.uint8)
    rollouts = replace(rollouts, **{
        field: only.expand_as(getattr(rollouts, field)).clone() for field in ("prompt_routed_experts", "routed_experts")
    })  # fmt: skip
    stats = replaying.forward(rollouts, router_balance=True)
    assert not torch.equal(stats.router_balance, own.forward(rollouts, router_balance=True).router_balance)
    choices = []
    begin = replaying._begin_routing
    replaying._begin_routing = lambda *args: choices.append(begin(*args)) or choices[-1]
    replaying.forward(rollouts, router_balance=True)
    members = next(iter(policy.plan(rollouts))).members()
    shares = [c.probabilities().flatten(0, -2)[:, :2].sum(dim=1) for c in choices[-1].choices.values()]
    means = torch.stack([(members / members.sum(1, keepdim=True)) @ share for share in shares]).mean(dim=0)
    torch.testing.assert_close(stats.router_balance.squeeze(1), EXPERTS * means)


def test_the_balance_of_a_sigmoid_router_has_its_normalised_scores():
    """DeepSeek-V3's sequence-wise balance, arXiv:2412.19437, equations 17 to 20, without its factor 1 / k."""
    policy = Policy(moe("deepseek_v3"))
    rollouts, outputs = draw(policy, 3), []
    balance = policy.forward(rollouts, router_balance=True).router_balance
    policy.routers.places[0][0].register_forward_hook(lambda _, __, out: outputs.append(out))
    for i, (ids, _, _) in enumerate(each_row(rollouts)):
        policy.causal_lm(input_ids=ids)
        scores, experts = outputs[-1][0].sigmoid(), outputs[-1][2]
        load = F.one_hot(experts, EXPERTS).sum(dim=1).float().mean(dim=0)
        torch.testing.assert_close(balance[i, 0], EXPERTS * (load * (scores / scores.sum(1, keepdim=True)).mean(0)).sum())


def test_balance_alone_trains_rows_without_an_advantage_and_evens_the_load(tmp_path):
    policy = moe_policy(lora=LoraConfig(r=0))
    run = moe_run(tmp_path, policy, loss=LossConfig(kl_coef=0.0, router_aux_coef=0.5))
    run.engine.by_gradient_descent(1e-3)
    rollouts, stats = run.sampler.generate(run.tasks.batch(0), 8), Stats()
    before = policy.forward(rollouts, router_balance=True).router_balance.detach()
    update_policy(run, frozen_batch(run, rollouts, torch.zeros(4, 8)), 0, run.control, stats)
    row = stats.reduce()
    assert row["router_aux_loss"] == pytest.approx(float(before.mean()), rel=1e-6)
    assert row["loss"] == pytest.approx(0.5 * float(before.mean()), rel=1e-5)
    after = policy.forward(rollouts, router_balance=True).router_balance
    assert 1e-4 < before.mean() - after.mean() < 0.5 and before.min() >= 0.9 * TOP_K


def test_padding_of_a_grid_has_different_experts():
    policy = Policy(moe("gpt_oss"))
    rollouts = draw(policy, 2)
    rollouts = replace(rollouts, prompt_routed_experts=rollouts.prompt_routed_experts * rollouts.prompt_mask[..., None, None])
    (packing,) = policy.plan(rollouts)
    experts = pack_routed_experts(rollouts, packing)
    assert policy.layout == "grid" and not packing.mask.all() and (experts[..., 0] != experts[..., 1]).all()


def test_rows_of_other_widths_take_their_routing_along(policy):
    rollouts = draw(policy)
    short = take(rollouts, torch.tensor([8, 9, 10, 11]))
    short = replace(short, prompt_ids=short.prompt_ids[:, -1:], prompt_mask=short.prompt_mask[:, -1:],
                    prompt_routed_experts=short.prompt_routed_experts[:, -1:])  # fmt: skip
    merged = replace_rows(rollouts, torch.tensor([0, 1, 2, 3]), short)
    mismatch = policy.forward(merged).routing_mismatch
    assert mismatch.max() == 0 and merged.routed_experts.shape == rollouts.routed_experts.shape


def test_a_run_replays_what_its_sampler_recorded_and_resumes_bitwise(here, tmp_path, monkeypatch):
    """The command train: its sampler records, its policy replays, and a resumed step is the one that it was."""
    model, policies, load_policy = tmp_path / "model", [], setup.load_policy
    save_model("qwen3_moe", model)
    monkeypatch.setattr(setup, "load_policy", lambda *args, **more: policies.append(load_policy(*args, **more)) or policies[-1])
    keys = (
        f"model.path={model}", f"output_dir={tmp_path}", "name=moe", "trainer.num_steps=2", "trainer.completions_per_step=8",
        "sampling.group_size=4", "sampling.max_new_tokens=4", "sampling.replay_routing=true", "loss.router_aux_coef=0.1",
        "checkpoint.every=1", "evaluation.num_tasks=0", "data.limit=8", "lora.target_modules=[q_proj]",
    )  # fmt: skip
    out = here("train", "--config", "tiny", *keys)
    assert out.returncode == 0 and policies[0].replays_routing and "model.layers.0.mlp.experts and 1 more" in out.stdout
    folder = tmp_path / "moe"
    before = rows(folder)
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    assert here("train", "--config", "tiny", *keys, "resume=force").returncode == 0
    timed = ("seconds", "tokens_per_second", "peak", "memory")
    for row, again in zip(before, rows(folder), strict=True):
        assert {k: v for k, v in row.items() if not k.startswith(timed)}.items() <= again.items()
        assert row["routing_mismatch"] == 0 and row["router_aux_loss"] > 1


def test_a_rank_without_rows_adds_the_names_that_others_add(tmp_path, policy):
    run = moe_run(tmp_path, policy, loss=LossConfig(kl_coef=0.0, router_aux_coef=0.1))
    rollouts = run.sampler.generate(run.tasks.batch(0), 8)
    names = []
    for trained in (torch.ones(4, 8, dtype=torch.bool), torch.zeros(4, 8, dtype=torch.bool)):
        stats = Stats()
        update_policy(run, frozen_batch(run, rollouts, torch.ones(4, 8), trained), 0, run.control, stats)
        names.append({*stats._sums, *stats._maxima} - {"memory_retries", "tokens_updated"})
    assert names[0] == names[1] | names[0] and {"routing_mismatch", "router_aux_loss"} <= names[1]


def test_a_teacher_chooses_its_own_experts(policy):
    with perturbed(policy):
        batch = frozen_batch(SimpleNamespace(
            policy=policy, objective=build_objective(RunConfig(loss=LossConfig(kl_coef=0.0))), budgets=Budgets(Budget(100), Budget(100)),
        ), draw(policy), torch.ones(4, 4))  # fmt: skip
    assert batch.rollouts.routed_experts is not None and show_teacher(batch).routed_experts is None


def test_a_trained_copy_of_a_router_is_one_router_with_its_original():
    policy = moe_policy(lora=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"]))
    rollouts = draw(policy)
    assert len(policy.routers) == LAYERS and [len(place) for place in policy.routers.places] == [2, 2]
    with policy.reference():
        assert policy.forward(rollouts).routing_mismatch.max() > 0  # the adapter is off


def test_a_dense_model_has_no_routing():
    policy = tiny_policy()
    rollouts = draw(policy)
    assert policy.routers is None and rollouts.routed_experts is None
    assert policy.forward(rollouts).routing_mismatch is None


def test_models_without_routers_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(ConfigError) as error:
        check_has_routers(tiny_policy().causal_lm.config, "sampling.replay_routing", True)
    assert str(error.value) == (
        "sampling.replay_routing is true, but the qwen2 model at model.path has no routers; set it to false"
    )
    check_has_routers(moe().config, "sampling.replay_routing", True)
    config = make_run(tmp_path, loss=LossConfig(router_aux_coef=0.1)).config
    with pytest.raises(ConfigError, match="loss.router_aux_coef is 0.1, but the phimoe model at model.path has routers"):
        check_routing(config, Policy(moe("phimoe")))
    assert (find_routers(moe("longcat_flash")).dtype, find_routers(moe()).dtype) == (torch.int16, torch.uint8)
    with pytest.raises(ConfigError, match="inkling_text model at model.path has routers whose probabilities of experts are"):
        check_routing(config, Policy(moe("inkling_text")))
    check_routing(config, Policy(moe()))


def test_finding_routers_leaves_no_trace():
    model = moe()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert len(find_routers(model)) == LAYERS
    assert not any("forward" in vars(module) for module in model.modules()) and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
