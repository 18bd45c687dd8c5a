"""On-policy distillation against the plainest computation: whose log-probs, of which prompt, with which sign, and what stays fixed."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from fakes import VOCAB, Alphabet, ragged_rollouts, tiny_policy, with_objective
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file
from test_loop import make_run, rows

from grpo_core.batch import Rollouts
from grpo_core.config.files import load
from grpo_core.config.sections import DataConfig, RewardConfig, RunConfig, TeacherConfig, use_supervised_objective
from grpo_core.data.prompts import encode_teacher_prompts, make_tasks
from grpo_core.model.logprobs import TeacherStates
from grpo_core.model.memory import Budgets
from grpo_core.model.packing import Budget
from grpo_core.model.teacher import TEACHER_ADAPTER, Teacher, _check_same_vocabulary, load_teacher
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.kl import TEACHER_KLS, kl_exact, kl_forward
from grpo_core.objective.policy_loss import PolicyLoss
from grpo_core.objective.token_weights import Totals
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError
from grpo_core.scoring.scoring import score
from grpo_core.training import checkpoint
from grpo_core.training.distillation import add_teacher_advantages, ask_teacher, compute_teacher_states
from grpo_core.training.freeze import freeze
from grpo_core.training.prepare import build_objective
from grpo_core.training.trainer import train
from grpo_core.training.update import accumulate_gradients, rows_to_train

HINT = [3, 3, 14]  # what the teacher's prompts have in front


def saved_adapter(folder, seed=7, noise=0.3, targets=("q_proj", "v_proj", "up_proj", "down_proj"), rank=4):
    """The folder of an adapter of the tiny policy's base, with another rank than the policy's; and its plain PEFT model."""
    base = tiny_policy().model.unload()
    torch.manual_seed(seed)
    settings = PeftLoraConfig(r=rank, lora_alpha=8, lora_dropout=0.5, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(base, settings, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, noise)
    model.save_pretrained(folder)
    return model.eval()


def own_model(seed=3, **options):
    """A teacher with a model of its own."""
    policy = tiny_policy(seed, lora_noise=0.3, **options)
    policy.model.requires_grad_(False)
    return Teacher(policy, shares_policy=False)


def taught_run(folder, teacher=None, policy=None, settings=None, rewards=False, **options):
    """A run on fakes with a teacher; by default without rewards, and with a model of its own."""
    policy = policy or tiny_policy(lora_noise=0.1)
    settings = settings or TeacherConfig(path="another")

    def change(config):
        return replace(config, teacher=settings, rewards=config.rewards if rewards else [])

    run = make_run(folder, policy=policy, change=change, **options)
    budget = Budget(run.config.trainer.tokens_per_micro_batch)
    run = replace(run, teacher=teacher or own_model(temperature=policy.temperature), budgets=Budgets(*3 * [budget]))
    return run if rewards else replace(run, rewards=[])


def tables(model, prompts, rollouts, temperature=1.0):
    """The log-probs of every next token, row by row and without padding: one [n, V] tensor per row."""
    found = []
    for prompt, ids, mask in zip(prompts, rollouts.completion_ids, rollouts.completion_mask, strict=True):
        whole = torch.cat([torch.as_tensor(prompt), ids[mask]])
        logits = model(whole[None]).logits[0, len(prompt) - 1 : -1]
        found.append((logits / temperature).log_softmax(-1))
    return found


def own_prompts(rollouts):
    return [ids[mask] for ids, mask in zip(rollouts.prompt_ids, rollouts.prompt_mask, strict=True)]


def spread(values, rollouts):
    """Values of the tokens of each row as [B, C], 0 where masked."""
    out = torch.zeros(rollouts.completion_ids.shape)
    out[rollouts.completion_mask] = torch.cat(list(values))
    return out


def of_drawn(found, rollouts):
    ids = [row[mask] for row, mask in zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)]
    return spread([table.gather(1, i[:, None]).squeeze(1) for table, i in zip(found, ids, strict=True)], rollouts)


def sample(run, hint=False):
    """A step's tasks, with longer prompts for the teacher if `hint`, and rollouts of ragged lengths."""
    tasks = run.tasks.batch(0)
    if hint:
        tasks = [replace(task, teacher_prompt_ids=[*HINT, *task.prompt_ids]) for task in tasks]
    rollouts = run.sampler.generate(tasks, 8)
    assert len(set(rollouts.lengths().tolist())) > 1
    return tasks, rollouts


def prepared(run, hint=False, rewards=None, trained=None):
    """The batch that the loop would train, the frozen rollouts, and the step's metrics."""
    tasks, rollouts = sample(run, hint)
    stats = Stats()
    frozen = freeze(run.policy, run.objective, run.budgets.forward, rollouts, trained)
    frozen = ask_teacher(run, tasks, frozen, stats)
    advantages = add_teacher_advantages(run.objective, frozen, torch.zeros(4, 8) if rewards is None else rewards)
    return frozen.with_advantages(advantages), frozen, stats


def gradient(run, batch):
    """The gradient of one optimizer step over the batch, and its metrics."""
    collected, stats = [torch.zeros_like(p) for p in run.policy.parameters()], Stats()

    class Collect:
        def backward(self, loss):
            for total, part in zip(collected, torch.autograd.grad(loss, run.policy.parameters(), allow_unused=True), strict=True):
                if part is not None:
                    total.add_(part)

    totals = Totals(batch.loss_mask.sum(), torch.tensor(len(batch)), 5, batch.loss_mask.sum())
    with run.policy.training():
        plan = run.policy.plan(batch.rollouts, run.budgets.update)
        assert accumulate_gradients(replace(run, engine=Collect()), batch, plan, totals, run.control, stats)
    return torch.cat([x.flatten() for x in collected]), stats.reduce()


# --- whose log-probs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("kind", ["adapter", "model", "self"])
def test_the_teachers_log_probs_are_its_own_after_its_own_prompt(tmp_path, kind, hint):
    policy = tiny_policy(lora_noise=0.1, temperature=0.7, dropout=0.5)
    plain = copy.deepcopy(policy.model) if kind == "self" else saved_adapter(tmp_path / "adapter")
    teacher = Teacher(policy)
    if kind == "adapter":
        config = RunConfig(teacher=TeacherConfig(adapter=str(tmp_path / "adapter")))
        teacher = load_teacher(config, policy, torch.float32, torch.device("cpu"))
    elif kind == "model":
        own = tiny_policy(temperature=0.7)
        own.model = own.causal_lm = copy.deepcopy(plain).merge_and_unload().requires_grad_(False)
        teacher = Teacher(type(own)(own.model, temperature=0.7), shares_policy=False)
    run = taught_run(tmp_path / "run", teacher, policy)
    batch, frozen, stats = prepared(run, hint)
    with policy.training():  # no dropout in the teacher, whoever asks it and when
        again = ask_teacher(run, [replace(t, teacher_prompt_ids=[*HINT, *t.prompt_ids] if hint else None) for t in run.tasks.batch(0)], frozen, Stats())
        assert torch.equal(again.teacher_logprobs, frozen.teacher_logprobs)
    prompts = [torch.as_tensor([*HINT, *p] if hint else p) for p in map(list, own_prompts(batch.rollouts))]
    with torch.no_grad():
        wanted = of_drawn(tables(plain, prompts, batch.rollouts, 0.7), batch.rollouts)
        theirs = of_drawn(tables(policy.model, own_prompts(batch.rollouts), batch.rollouts, 0.7), batch.rollouts)
    torch.testing.assert_close(batch.teacher_logprobs, wanted, atol=2e-5, rtol=1e-5)
    if kind != "self" or hint:
        assert (wanted - theirs).abs().max() > 0.1
    mask = batch.rollouts.completion_mask
    torch.testing.assert_close(batch.advantages, (wanted - theirs) * mask, atol=4e-5, rtol=1e-4)
    assert stats.reduce()["teacher_kl"] == pytest.approx(float((theirs - wanted)[mask].mean()), abs=1e-5)
    assert not batch.advantages.requires_grad and not batch.teacher_logprobs.requires_grad


def test_a_teacher_that_is_the_policy_changes_nothing_to_the_last_bit(tmp_path):
    policy = tiny_policy(lora_noise=0.2, temperature=0.7)
    run = taught_run(tmp_path, Teacher(policy), policy, settings=TeacherConfig(prompt="{prompt}", kl="reverse"))
    batch, _, stats = prepared(run)
    assert not batch.advantages.any() and stats.reduce()["teacher_kl"] == 0
    assert not compute_teacher_states(run, batch).hidden.requires_grad
    found, metrics = gradient(run, batch)
    assert found.abs().max() < 1e-6 and abs(metrics["teacher_kl_exact"]) < 1e-6
    copied = replace(run, teacher=Teacher(copy.deepcopy(policy), shares_policy=False))
    assert prepared(copied)[0].advantages.abs().max() < 1e-5  # another model with equal weights: to rounding


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_model_of_its_own_is_loaded_frozen_at_the_policys_temperature(tmp_path, with_adapter):
    plain = saved_adapter(tmp_path / "adapter")
    base = tiny_policy().model.unload()
    base.save_pretrained(tmp_path / "base")
    settings = TeacherConfig(path=str(tmp_path / "base"), adapter=str(tmp_path / "adapter") if with_adapter else None)
    policy = tiny_policy(lora_noise=0.1, temperature=0.7)
    teacher = load_teacher(RunConfig(teacher=settings), policy, torch.float32, torch.device("cpu"))
    assert not teacher.shares_policy and not [name for name, p in teacher.own_parameters() if p.requires_grad]
    assert len(teacher.own_parameters()) == len([*teacher.policy.model.parameters()]) > 0
    run = taught_run(tmp_path / "run", teacher, policy, settings=replace(settings, kl="reverse"))
    batch, _, _ = prepared(run)
    with torch.no_grad():
        found = tables(plain if with_adapter else base, own_prompts(batch.rollouts), batch.rollouts, 0.7)
    torch.testing.assert_close(batch.teacher_logprobs, of_drawn(found, batch.rollouts), atol=2e-5, rtol=1e-5)
    states = compute_teacher_states(run, batch)
    again = (states.lm_head(states.hidden) / states.temperature).log_softmax(-1)
    torch.testing.assert_close(again[batch.rollouts.completion_mask], torch.cat(found), atol=2e-5, rtol=1e-5)
    assert not states.hidden.requires_grad


@pytest.mark.parametrize("token_advantages", [False, True])
def test_it_is_added_to_the_rewards_advantage_on_trained_tokens(tmp_path, token_advantages):
    run = taught_run(tmp_path, settings=TeacherConfig(path="x", coef=0.25))
    trained = torch.arange(32).view(4, 8) % 3 != 0
    rewards = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    alone, frozen, stats = prepared(run, trained=trained)
    of_rewards = rewards[..., None].expand(4, 8, alone.loss_mask.shape[1]) if token_advantages else rewards
    both = add_teacher_advantages(run.objective, frozen, of_rewards)
    mask = frozen.loss_mask
    assert mask.sum() < frozen.rollouts.completion_mask.sum()
    wanted = 0.25 * (frozen.teacher_logprobs - frozen.logprobs) * mask
    torch.testing.assert_close(alone.advantages, wanted)
    torch.testing.assert_close(both, rewards.reshape(32, 1) + wanted)
    assert stats.reduce()["teacher_kl"] == pytest.approx(float((frozen.logprobs - frozen.teacher_logprobs)[mask].mean()))


def test_with_coefficient_0_the_step_is_that_without_a_teacher(tmp_path):
    rewards = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    run = taught_run(tmp_path, settings=TeacherConfig(path="x", coef=0.0), rewards=True)
    batch, _, stats = prepared(run, rewards=rewards)
    assert "teacher_kl" in stats.reduce() and batch.advantages.shape == (32, 1)
    plain = make_run(tmp_path / "plain", policy=tiny_policy(lora_noise=0.1))
    other, _, nothing = prepared(plain, rewards=rewards)
    assert nothing.reduce() == {} and other.teacher_logprobs is None
    assert torch.equal(gradient(run, batch)[0], gradient(plain, other)[0])


# --- the full vocabulary --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHER_KLS)
def test_the_kl_over_the_vocabulary_is_the_plain_sum(name):
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 9, generator=generator, dtype=torch.double).softmax(-1)
    one, other = (p, q) if name == "reverse" else (q, p)  # reverse is KL(policy || teacher)
    wanted = torch.stack([sum(a * torch.log(a / b) for a, b in zip(*pair, strict=True)) for pair in zip(one, other, strict=True)])
    torch.testing.assert_close(TEACHER_KLS[name](p.log(), q.log()), wanted)
    assert (wanted > 0).all() and TEACHER_KLS[name](p.log(), p.log()).abs().max() == 0
    assert (kl_exact(p.log(), q.log()) - kl_forward(p.log(), q.log())).abs().min() > 1e-3


@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("name", TEACHER_KLS)
def test_value_and_gradient_of_the_kl_in_the_loss_are_the_naive_ones(tmp_path, name, hint):
    """Its own rank and hidden size, its own prompts; dropout of the policy in the update alone; coefficient 0.5."""
    settings = TeacherConfig(path="x", coef=0.0, kl=name, kl_coef=0.5)
    teacher = own_model(temperature=0.7, dropout=0.5)
    run = taught_run(tmp_path, teacher, tiny_policy(lora_noise=0.1, temperature=0.7), settings=settings)
    batch, frozen, _ = prepared(run, hint)
    assert frozen.teacher_logprobs is None and frozen.logprobs is None  # a KL alone needs no forward of either before
    found, metrics = gradient(run, batch)
    rollouts = batch.rollouts
    prompts = own_prompts(rollouts)
    shown = [torch.as_tensor([*HINT, *p.tolist()]) if hint else p for p in prompts]
    with torch.no_grad():
        theirs = tables(teacher.policy.model, shown, rollouts, 0.7)
    ours = tables(run.policy.model, prompts, rollouts, 0.7)
    pairs = [(a, b) if name == "reverse" else (b, a) for a, b in zip(ours, theirs, strict=True)]
    values = torch.cat([(one.exp() * (one - other)).sum(-1) for one, other in pairs])
    wanted = torch.autograd.grad(0.5 * values.mean(), run.policy.parameters())
    torch.testing.assert_close(found, torch.cat([x.flatten() for x in wanted]), atol=1e-6, rtol=1e-4)
    assert metrics["teacher_kl_exact"] == pytest.approx(float(values.detach().mean()), rel=1e-4) and values.min() > 0
    assert found.abs().max() > 1e-3


def test_the_expected_gradient_of_the_token_advantages_is_that_of_the_reverse_kl(tmp_path):
    """Every first token that there is, weighted by its probability: no sampling error is left."""
    policy, teacher = tiny_policy(lora_noise=0.1), own_model()
    ids, ones = torch.arange(VOCAB)[:, None], torch.ones(VOCAB, 1, dtype=torch.bool)
    prompt = torch.tensor([5, 6, 7]).expand(VOCAB, 3)
    rollouts = Rollouts(prompt, torch.ones_like(prompt, dtype=torch.bool), ids, ones, torch.zeros(VOCAB, 1), ones[:, 0])

    def gradient_of(settings, weights):
        run = taught_run(tmp_path / str(settings.kl), teacher, policy, settings=settings, loss="reinforce")
        stats = Stats()
        tasks = [replace(run.tasks.batch(0)[0], prompt_ids=[5, 6, 7])]
        frozen = ask_teacher(run, tasks, freeze(policy, run.objective, Budget(99), rollouts), stats)
        advantages = add_teacher_advantages(run.objective, frozen, torch.zeros(1, VOCAB))
        batch = frozen.with_advantages(advantages if weights is None else advantages * weights)
        return gradient(run, batch)[0]

    p = policy.logprobs(rollouts).detach().exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    sampled = gradient_of(TeacherConfig(path="x"), p * VOCAB)
    whole = gradient_of(TeacherConfig(path="x", coef=0.0, kl="reverse"), None)
    forward = gradient_of(TeacherConfig(path="x", coef=0.0, kl="forward"), None)
    torch.testing.assert_close(sampled, whole, atol=1e-6, rtol=1e-4)
    assert (sampled - forward).abs().max() > 1e-3


def test_logits_beyond_the_policys_vocabulary_are_left_out(tmp_path):
    run = taught_run(tmp_path, settings=TeacherConfig(path="x", kl="reverse"))
    batch, _, _ = prepared(run)
    narrow, own = compute_teacher_states(run, batch), run.teacher.policy.causal_lm.get_output_embeddings()
    wide = replace(narrow, lm_head=lambda h: torch.cat([own(h), torch.full((*h.shape[:-1], 3), 9.0)], dim=-1))
    packing = next(iter(run.policy.plan(batch.rollouts)))
    values = [run.policy.forward(batch.rollouts, packing, teacher=x).teacher_divergence for x in (narrow, wide)]
    assert torch.equal(*values)


def test_each_model_has_its_own_temperature():
    """Models whose logits are multiples of their head's output need one each for the same distribution."""
    head = torch.nn.Linear(4, 6, bias=False)
    hidden, other = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    states = TeacherStates(other, head, 0.5, kl_exact)
    places = torch.tensor([4, 1])
    values = states.divergence(hidden.flatten(0, 1)[places], head, places, temperature=0.7, chunk_size=1)
    p, q = (head(hidden) / 0.7).log_softmax(-1), (head(other) / 0.5).log_softmax(-1)
    torch.testing.assert_close(values, (p.exp() * (p - q)).sum(-1).flatten()[places])


# --- what stays fixed -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_steps_move_the_policy_towards_the_teacher_and_leave_the_teacher_alone(tmp_path, shared):
    policy = tiny_policy(lora_noise=0.1)
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    teacher = own_model(seed=0, dropout=0.5)
    if shared:
        saved_adapter(tmp_path / "adapter")
        config = RunConfig(teacher=TeacherConfig(adapter=str(tmp_path / "adapter")))
        teacher = load_teacher(config, policy, torch.float32, torch.device("cpu"))
    assert trained == [name for name, p in policy.model.named_parameters() if p.requires_grad]
    settings = TeacherConfig(path="x", kl="forward", kl_coef=0.3)
    run = taught_run(tmp_path / "run", teacher, policy, settings=settings, num_steps=8, num_minibatches=2, learning_rate=5e-3)
    fixed = {name: p.clone() for name, p in policy.model.named_parameters() if not p.requires_grad}
    fixed |= {f"teacher {name}": p.clone() for name, p in teacher.own_parameters()}
    assert any(".teacher." in name for name in fixed) == shared
    train(run)
    after = dict(policy.model.named_parameters()) | {f"teacher {name}": p for name, p in teacher.own_parameters()}
    assert all(torch.equal(after[name], value) and after[name].grad is None for name, value in fixed.items())
    metrics = rows(tmp_path / "run")
    assert sum(row["teacher_kl_exact"] for row in metrics[-3:]) < 0.9 * sum(row["teacher_kl_exact"] for row in metrics[:3])
    row = metrics[0]
    assert row["reward"] is None and "tied_groups" not in row and "no_reward" not in row and row["seconds/teacher"] > 0
    assert row["teacher_weights_gb"] == sum(p.numel() * 4 for _, p in teacher.own_parameters()) / 1e9 > 0
    completions = rows(tmp_path / "run", "completions")
    assert completions[0]["rewards"] == {} and completions[0]["reward"] is None and completions[0]["advantage"] != 0
    meta = json.loads((tmp_path / "run" / "checkpoints" / "step-000008" / "meta.json").read_text())
    assert "the weights of the teacher" in meta["fingerprints"] and meta["config"]["teacher"]["kl"] == "forward"


def test_only_the_policys_adapter_is_saved_and_the_teachers_counts_apart(tmp_path):
    saved_adapter(tmp_path / "adapter", targets=["q_proj", "o_proj"])
    alone = tiny_policy(lora_noise=0.1)
    alone.save(tmp_path / "alone")
    before = checkpoint.compute_fingerprints(make_run(tmp_path / "r", policy=alone))
    policy = tiny_policy(lora_noise=0.1)
    config = RunConfig(teacher=TeacherConfig(adapter=str(tmp_path / "adapter")))
    teacher = load_teacher(config, policy, torch.float32, torch.device("cpu"))
    policy.save(tmp_path / "both")
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == sorted(p.name for p in (tmp_path / "alone").iterdir())
    one, both = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "both"))
    assert one.keys() == both.keys() and all(torch.equal(one[name], both[name]) for name in one)
    run = taught_run(tmp_path / "run", teacher, policy)
    assert not [name for name, _ in run.engine.tensors() if "teacher" in name]
    assert len(policy.parameters()) == len(alone.parameters())
    digests = checkpoint.compute_fingerprints(run)
    assert digests.keys() - before.keys() == {"the weights of the teacher"}
    with torch.no_grad():
        teacher.own_parameters()[0][1].add_(1)
    again = checkpoint.compute_fingerprints(run)
    assert again.pop("the weights of the teacher") != digests.pop("the weights of the teacher") and again == digests


def test_completions_are_the_policys_and_never_the_teachers(tmp_path):
    """Also where the teacher's adapter is on layers that the policy's leaves alone; the fused decoder stays."""
    saved_adapter(tmp_path / "adapter", targets=["q_proj", "k_proj", "o_proj", "gate_proj"])
    said, drawn = [], []
    for with_teacher in (False, True):
        for decoder in ("auto", "plain"):
            policy = tiny_policy(lora_noise=0.1)
            if with_teacher:
                config = RunConfig(teacher=TeacherConfig(adapter=str(tmp_path / "adapter")))
                teacher = load_teacher(config, policy, torch.float32, torch.device("cpu"))
                with teacher.active():  # and after it has computed
                    policy.logprobs(ragged_rollouts())
            sampler = Sampler(policy.causal_lm, Alphabet(), max_new_tokens=5, decoder=decoder, notify=said.append)
            run = make_run(tmp_path / "run", policy=policy)
            drawn.append(sampler.generate(run.tasks.batch(0), 8))
    assert said == [] and (drawn[0].lengths() > 1).any()
    for other in drawn[1:]:
        assert torch.equal(drawn[0].completion_ids, other.completion_ids)
        torch.testing.assert_close(drawn[0].rollout_logprobs, other.rollout_logprobs, atol=1e-5, rtol=1e-5)


def test_the_reference_and_the_policy_are_as_before_after_the_teacher(tmp_path):
    saved_adapter(tmp_path / "adapter")
    policy, rollouts = tiny_policy(lora_noise=0.1), ragged_rollouts()
    with torch.no_grad():
        own = policy.logprobs(rollouts)
        with policy.reference():
            base = policy.logprobs(rollouts)
    config = RunConfig(teacher=TeacherConfig(adapter=str(tmp_path / "adapter")))
    teacher = load_teacher(config, policy, torch.float32, torch.device("cpu"))
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(policy.logprobs(rollouts), own)
            with policy.reference():
                assert torch.equal(policy.logprobs(rollouts), base)
        with pytest.raises(KeyError), teacher.active():
            raise KeyError
    assert policy.logprobs(rollouts).requires_grad


# --- the loop -------------------------------------------------------------------------------------------------------


def test_tied_groups_are_trained(tmp_path):
    run = taught_run(tmp_path, rewards=True)
    assert run.objective.learns_from_ties
    batch, _, _ = prepared(run)  # advantages of the rewards: 0 throughout
    assert rows_to_train(run.objective, batch, run.control) == list(range(32))
    quiet = taught_run(tmp_path / "kl", settings=TeacherConfig(path="x", coef=0.0, kl="reverse"), rewards=True)
    assert rows_to_train(quiet.objective, prepared(quiet)[0], quiet.control) == list(range(32))
    plain = make_run(tmp_path / "plain", policy=tiny_policy(lora_noise=0.1))
    assert not plain.objective.learns_from_ties and not build_objective(use_supervised_objective(run.config)).has_teacher


@pytest.mark.slow
def test_the_split_into_micro_batches_changes_nothing(tmp_path, monkeypatch):
    """Several minibatches and passes, prompts of the teacher's own, an adapter on the head, advantages and a KL."""
    results = []
    for size in (1, 1000):
        settings = TeacherConfig(path="x", kl="reverse", kl_coef=0.3)
        policy = tiny_policy(lora_noise=0.1)
        run = taught_run(
            tmp_path / str(size), policy=policy, settings=settings, num_steps=2, num_minibatches=2, num_passes=2,
            tokens_per_micro_batch=size, rewards=True,
        )  # fmt: skip
        hinted = [replace(task, teacher_prompt_ids=[*HINT, *task.prompt_ids]) for task in run.tasks.batch(0)]
        monkeypatch.setattr(run.tasks, "batch", lambda step, hinted=hinted: hinted)
        run.engine.by_gradient_descent()
        before = torch.cat([p.detach().flatten() for p in policy.parameters()])
        train(run)
        results.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert (results[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=0)


def test_losses_and_advantages_may_ask_for_the_teachers_log_probs(tmp_path):
    seen = {}

    def loss(logprobs, old_logprobs, advantages, completion_mask, teacher_logprobs):
        seen["loss"] = teacher_logprobs
        return PolicyLoss(-advantages * logprobs)

    def advantage(rewards, teacher_logprobs):
        seen["advantage"] = teacher_logprobs
        return torch.zeros_like(teacher_logprobs)

    run = taught_run(tmp_path, settings=TeacherConfig(path="x", coef=0.0, kl="reverse"))
    assert not run.objective.needs_teacher
    run = with_objective(run, loss_fn=loss, advantage_fn=advantage)
    assert run.objective.needs_teacher
    train(replace(run, num_steps=1))
    assert seen["advantage"].shape[:2] == (4, 8) and seen["advantage"].mean() < -1
    assert seen["loss"].shape[1] == seen["advantage"].shape[2]


def test_without_rewards_a_score_is_none(tmp_path):
    tasks = make_run(tmp_path).tasks.batch(0)
    scores = score([], tasks, 8 * 4 * ["x"], 8)
    assert scores.rewards.shape == (4, 8) and scores.rewards.isnan().all() and scores.by_name == {}


@pytest.mark.parametrize("kind", ["template", "chat"])
def test_the_teachers_prompt_is_made_from_the_rows_columns(kind):
    class Words:
        chat_template, bos_token, bos_token_id = "yes", None, None

        def apply_chat_template(self, messages, **options):
            return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"

        def __call__(self, texts, **options):
            return {"input_ids": [list(map(ord, text)) for text in texts]}

    data = DataConfig(prompt=kind, template="Q: {question}\n", system="Think.")
    tasks, _ = make_tasks([{"question": "1 + 1", "answer": 2}, {"question": "2 + 2", "answer": 4}], data, Words())
    taught = encode_teacher_prompts(tasks, "It is {answer}. {prompt}", data, Words())
    text = "It is 4. Q: 2 + 2\n"
    wanted = text if kind == "template" else f"<system>Think.<user>{text}<assistant>"
    assert "".join(map(chr, taught[1].teacher_prompt_ids)) == wanted and taught[1].prompt_ids == tasks[1].prompt_ids
    with pytest.raises(ConfigError, match=r"^teacher.prompt uses \{hint\}, but the data has the columns question, answer, prompt$"):
        encode_teacher_prompts(tasks, "{hint}", data, Words())


# --- configuration --------------------------------------------------------------------------------------------------

DISTILL = ["teacher.adapter=runs/tiny/adapter"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["teacher.kl=reverse"], "teacher.kl is reverse, but there is no teacher; set teacher.path, teacher.adapter or teacher.prompt"),
        (["rewards=[]"], "rewards must name at least one reward, and none of them twice; only with a teacher or an environment that gives rewards there may be none"),
        (["rewards=[]", *DISTILL, "teacher.coef=0"], "rewards must name at least one reward"),
        (["rewards=[]", *DISTILL, "sampling.dynamic_attempts=1"], "sampling.dynamic_attempts is 1, but no reward has a weight"),
        (["rewards=[]", *DISTILL, "loss.kl_in=reward"], "loss.kl_in is reward, but no reward has a weight"),
        (["rewards=[]", *DISTILL, "advantage.name=gdpo"], "advantage.name is gdpo, but no reward has a weight"),
        ([*DISTILL, "lora.r=0", "loss.kl_coef=0"], "teacher.adapter is 'runs/tiny/adapter' with teacher.path null, but lora.r is 0"),
        ([*DISTILL, "teacher.coef=-1"], "teacher.coef is -1.0; it must be at least 0"),
        ([*DISTILL, "teacher.kl=both"], "teacher.kl is 'both'; it must be one of"),
        (["teacher.path="], "teacher.path"),
        (["loss.name={file}:asks"], "loss {file}:asks asks for teacher_logprobs, but there is no teacher; set teacher.path"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(tmp_path, words, sentence):
    file = tmp_path / "my.py"
    file.write_text(
        "from grpo_core import PolicyLoss\n"
        "def asks(logprobs, old, advantages, mask, teacher_logprobs):\n"
        "    return PolicyLoss(-advantages * logprobs + 0 * teacher_logprobs)\n"
    )
    words = [word.replace("{file}", str(file)) for word in words]
    if words == ["teacher.path="]:
        assert load("tiny", words).teacher == TeacherConfig()
        return
    with pytest.raises(ConfigError) as error:
        load("tiny", words)
    assert str(error.value).startswith(sentence.replace("{file}", str(file)).partition("; it must be one")[0])
    if "my.py" in words[0]:
        assert load("tiny", [*words, *DISTILL]).loss.name == words[0].removeprefix("loss.name=")


def test_rewards_of_weight_0_are_only_logged_beside_a_teacher():
    assert load("tiny", ["rewards=[{name: correct_answer, weight: 0}]", *DISTILL]).rewards == [RewardConfig("correct_answer", 0.0)]


def test_the_shipped_example_needs_the_adapter_of_the_embedded_run(here, tmp_path, monkeypatch):
    words = ["train", "--config", "distill", f"output_dir={tmp_path}", "trainer.num_steps=1", "data.limit=4", "evaluation.num_tasks=4"]
    monkeypatch.chdir(tmp_path)
    done = here(*words)
    assert done.returncode == 2 and not (tmp_path / "distill").exists()
    assert done.stderr.strip().endswith(
        "teacher.adapter is 'runs/tiny/adapter': there is no folder runs/tiny/adapter; a run writes its adapter at its "
        "end, to adapter/ in its run folder"
    )
    (tmp_path / "runs/tiny/adapter").mkdir(parents=True)
    assert "which holds no adapter: it has no adapter_config.json" in here(*words).stderr
    (tmp_path / "runs/tiny/adapter/adapter_config.json").write_text('{"peft_type": "LORA", "modules_to_save": ["lm_head"]}')
    assert "is not LoRA alone (modules_to_save), so it cannot share the policy's base; set teacher.path" in here(*words).stderr
    for prompt, sentence in (("{hint}", "teacher.prompt uses {hint}, but the data has"), ("{", "teacher.prompt '{' is malformed")):
        assert sentence in here(*words, "teacher.adapter=null", f"teacher.prompt={prompt}").stderr
    assert "teacher.prompt is" in (
        long := here(*words, "teacher.adapter=null", f"teacher.prompt={600 * 'x y '}{{prompt}}").stderr
    ) and "positions" in long


def test_another_vocabulary_is_refused_by_a_token_that_differs():
    _check_same_vocabulary("x", {"a": 0, "b": 1}, {"b": 1, "a": 0})
    with pytest.raises(ConfigError, match="teacher.path is 'x', whose vocabulary .* the token 'a' has the id 1 there and has the id 0 here"):
        _check_same_vocabulary("x", {"a": 1, "b": 0}, {"a": 0, "b": 1})
    with pytest.raises(ConfigError, match="the token 'c' is missing there and has the id 2 here"):
        _check_same_vocabulary("x", {"a": 0}, {"a": 0, "c": 2})


@pytest.mark.slow
def test_a_run_with_a_teacher_goes_on_bitwise_and_shows_what_it_minimises(tiny_run, tmp_path, here):
    adapter = tiny_run / "adapter"
    words = [
        "train", "--config", "distill", f"teacher.adapter={adapter}", "evaluation.num_tasks=0", "data.limit=40", "trainer.num_steps=2",
        "trainer.completions_per_step=16", "sampling.max_new_tokens=12", "checkpoint.every=1", "teacher.kl=reverse", "lora.dropout=0.1",
        "teacher.prompt=The answer is {answer}. {prompt}",
    ]  # fmt: skip
    assert here(*words, f"output_dir={tmp_path}/whole").returncode == 0
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "distill" / "checkpoints" / "step-000002")
    done = here(*words, f"output_dir={cut}", "resume=auto")
    assert done.returncode == 0 and "after 1 step" in done.stdout, done.stderr
    whole, again = (load_file(tmp_path / name / "distill/adapter/adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert not (cut / "distill" / "adapter" / TEACHER_ADAPTER).exists()
    head = (cut / "distill" / "config.yaml").read_text()
    for line in ("A          1 (l_teacher - l_old) of each token", "KL_teacher  sum_v p_v", f"base with the adapter {adapter}"):
        assert line in head, head[:1500]
    shutil.copytree(adapter, tmp_path / "other")
    done = here(*words, f"output_dir={cut}", f"teacher.adapter={tmp_path}/other", "resume=auto")
    assert done.returncode == 2 and "teacher.adapter" in done.stderr


@pytest.mark.slow
def test_a_saved_batch_has_the_teachers_part(tiny_run, tmp_path, here):
    words = [
        "train", "--config", "distill", f"teacher.adapter={tiny_run / 'adapter'}", "evaluation.num_tasks=0", "data.limit=200",
        "trainer.num_steps=1", "trainer.completions_per_step=32", "sampling.max_new_tokens=24", "debug.dump_batches=1", f"output_dir={tmp_path}",
    ]  # fmt: skip
    assert here(*words).returncode == 0
    row = rows(tmp_path / "distill")[0]
    out = tmp_path / "replay.json"
    done = here("replay", tmp_path / "distill/batches/step-000000", "--loss", "dr_grpo", "--output", out)
    assert done.returncode == 0, done.stderr
    own, other = json.loads(out.read_text())["objectives"]
    assert own["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4) and own["grad_norm"] > 0
    assert other["advantages"] == pytest.approx(own["advantages"], abs=1e-5)  # computed again, from the saved log-probs


@pytest.mark.slow
def test_a_dry_run_shows_the_teachers_prompt_and_memory(tiny_run, tmp_path, here):
    done = here(
        "train", "--config", "distill", "--dry-run", f"teacher.adapter={tiny_run / 'adapter'}", f"output_dir={tmp_path}",
        "teacher.prompt=Its answer is {answer}. {prompt}", "data.limit=50",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "The same prompt, as the teacher receives it\n  Its answer is #### " in done.stdout
    assert "0.47 MB weights of the teacher (116,736 parameters)" in done.stdout and "nan" not in done.stdout
    assert "4.39 MB weights (1,098,432 parameters" in done.stdout
