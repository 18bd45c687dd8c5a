"""ZeRO-2 on two processes against plain AdamW on one, written out by hand: same weights, any micro-batch split."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import child_environment, start_two_ranks, wait_for
from fakes import tiny_policy
from safetensors.torch import load_file
from test_policy import naive_logprobs
from workers import state
from workers.zero2 import (
    ALL_ROWS,
    CHOICE,
    CLIP,
    M2,
    PASSES,
    ROWS,
    STEPS,
    TAUGHT,
    TEACHER,
    TIES,
    make_teacher,
    run_config,
    step_data,
)

from grpo_core.distributed import ranks
from grpo_core.schema import ConfigError
from grpo_core.training.engine import Engine
from grpo_core.training.lr_schedule import learning_rate_schedule

WORKERS = Path(__file__).parent / "workers"


def naive_tables(policy, rollouts):
    """The log-probs of all next tokens, one row at a time."""
    found = []
    for i in range(len(rollouts)):
        prompt, ids = rollouts.prompt_ids[i][rollouts.prompt_mask[i]], rollouts.completion_ids[i][rollouts.completion_mask[i]]
        found.append(policy.model(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
    return found


def plain_adamw(average):
    """The same updates with nothing of grpo_core's trainer, losses, weights or engine in them."""
    policy = tiny_policy(lora_noise=0.1)
    parameters = policy.parameters()
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-2, weight_decay=0.1, eps=1e-6
    )  # 1e-8 would magnify rounding where a gradient is 0
    norms, losses, kl_coef = [], [], 0.0 if average in (TIES, ALL_ROWS, TAUGHT) else 0.5
    teacher = make_teacher().policy
    for step in range(STEPS):
        rollouts, advantages = step_data(step, average)
        mask, lengths = rollouts.completion_mask, rollouts.completion_mask.sum(1)
        with torch.no_grad():
            old = naive_logprobs(policy, rollouts)
            with policy.model.disable_adapter():
                ref = naive_logprobs(policy, rollouts)
            advantages = advantages[:, None].expand_as(old)
            if average == TAUGHT:
                advantages = advantages + TEACHER.coef * (naive_logprobs(teacher, rollouts) - old)
                their_tables = naive_tables(teacher, rollouts)
        step_norms, step_losses = [], []
        for _ in range(PASSES):
            new = naive_logprobs(policy, rollouts)
            terms, factor, tokens = [], torch.ones_like(new), int(mask.sum())
            own_tables = naive_tables(policy, rollouts) if average == TAUGHT else []
            if average == ALL_ROWS:
                factor, tokens = choose(new.detach(), old, rollouts.rollout_logprobs, advantages[:, 0], mask)
            for i in range(ROWS):
                n = int(lengths[i])
                a = advantages[i, :n]
                ratio = (new[i, :n] - old[i, :n]).exp()
                clipped = ratio.clamp(1 - CLIP["clip_low"], 1 + CLIP["clip_high"])
                d = ref[i, :n] - new[i, :n]
                per_token = -torch.min(ratio * a, clipped * a) + kl_coef * (d.exp() - d - 1)
                if average == TAUGHT:
                    per_token = per_token + TEACHER.kl_coef * (own_tables[i].exp() * (own_tables[i] - their_tables[i])).sum(-1)
                over = {"sequence": n * ROWS, "constant": ROWS * 9}.get(average, tokens)
                terms.append((per_token * factor[i, :n]).sum() / over)
            loss = torch.stack(terms).sum()
            loss.backward()
            step_norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 0.1)))
            step_losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
        norms.append(sum(step_norms) / PASSES)
        losses.append(sum(step_losses) / PASSES)
    return torch.cat([p.detach().flatten() for p in parameters]), norms, losses


def choose(new, old, sampled, advantages, mask):
    """The factor of each token's loss, by m2po, normalised truncated weights and clip_cov, and the tokens that count."""
    gap, factor = old - sampled, torch.zeros_like(old)
    weights = gap.exp().clamp(max=2)
    weights = weights / weights[mask].mean()
    places = sorted(mask.nonzero().tolist(), key=lambda place: float(gap[*place] ** 2))
    while sum(float(gap[*place] ** 2) for place in places) / len(places) >= M2:
        places.pop()
    assert len(places) < int(mask.sum())
    level, height = (sum(float(x[i, j]) for i, j in places) / len(places) for x in (advantages[:, None].expand_as(new), new))
    for i, j in places:
        ratio, a = float((new[i, j] - old[i, j]).exp()), float(advantages[i])
        clipped = (a > 0 and ratio > 1 + CLIP["clip_high"]) or (a < 0 and ratio < 1 - CLIP["clip_low"])
        is_chosen = CHOICE["cov_low"] < (a - level) * (float(new[i, j]) - height) < CHOICE["cov_high"] and not clipped
        factor[i, j] = 0.0 if is_chosen else weights[i, j]
    assert 0 < int((factor != 0).sum()) < len(places)
    return factor, len(places)


SIZES = {"sequence": (1, 30, 1000), "token": (30,), "constant": (40,), TIES: (1, 50), ALL_ROWS: (1, 50), TAUGHT: (1, 30, 1000)}


def on_two(worker, *arguments):
    codes, written = wait_for(start_two_ranks(WORKERS / worker, *arguments, environment=child_environment()))
    assert codes == [0, 0], written


@pytest.fixture(scope="module")
def zero2(tmp_path_factory):
    """What two processes came to, for each average and size of a micro-batch."""
    out = tmp_path_factory.mktemp("zero2") / "out.pt"
    on_two("zero2.py", out, *(f"{average}={','.join(map(str, sizes))}" for average, sizes in SIZES.items()))
    return torch.load(out)


@pytest.mark.slow
@pytest.mark.parametrize("average", SIZES)
def test_zero2_on_two_processes_is_plain_adamw_on_one(zero2, average):
    parameters, norms, losses = plain_adamw(average)
    start = torch.cat([p.detach().flatten() for p in tiny_policy(lora_noise=0.1).parameters()])
    assert (parameters - start).abs().max() > 1e-2  # it moved, far more than the tolerance
    assert zero2[average].keys() == {*SIZES[average]}
    for size, result in zero2[average].items():
        assert (result["parameters"] - parameters).abs().max() <= 1e-5, f"micro-batches of {size} tokens"
        assert result["norms"] == pytest.approx(norms, rel=1e-4)
        assert result["losses"] == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert min(norms) > 0.1  # or clipping was not tested


@pytest.mark.slow
def test_state_goes_on_bitwise_and_on_another_number_of_processes(tmp_path, group):
    """Weights, both moments, the count of steps and the learning rate: all of them show in the steps that follow."""
    on_two("state.py", tmp_path)
    ranks.setup()
    state.run(tmp_path, "resume")
    whole, on_two_again, on_one = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("save-2", "resume-2", "resume-1")
    )
    assert {name.split("/")[0] for name in whole} == {"weight", "exp_avg", "exp_avg_sq"} and len(whole) == 3 * 16
    saved = load_file(tmp_path / "state.safetensors")
    assert all((whole[name] - saved[name]).abs().max() > 0 for name in whole)
    for name in whole:
        assert torch.equal(on_two_again[name], whole[name])
        assert (on_one[name] - whole[name]).abs().max() < 1e-6


def test_deepspeed_wraps_the_lora_model_itself(tmp_path, group):
    """Its module is the policy's model, whose trained parameters keep their names and are views of one flat parameter."""
    ranks.setup()
    policy = tiny_policy(lora_noise=0.1)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    engine = Engine(policy.model, run_config("token", 30), dtype=torch.float32, total_steps=1, world_size=1)
    assert engine.engine.module is policy.model
    after = dict(policy.model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    trained = [p for p in after.values() if p.requires_grad]
    assert len({p.untyped_storage().data_ptr() for p in trained}) == 1 < len(trained)


def test_n16_a_resumed_run_follows_the_schedule_of_its_own_length(group):
    """FAULTS N16: the first step after a resume took the learning rate of the schedule of the old number of steps."""
    ranks.setup()

    def make(total_steps, **settings):
        policy, config = tiny_policy(lora_noise=0.1), run_config("token", 30)
        config = replace(config, engine=replace(config.engine, schedule="cosine", warmup_steps=2, **settings))
        return policy, Engine(policy.model, config, dtype=torch.float32, total_steps=total_steps, world_size=1)

    def rates(policy, engine, steps):
        taken = []
        for _ in range(steps):
            engine.backward(sum(p.sum() for p in policy.parameters()))
            taken.append(engine.step().learning_rate)
        return taken

    policy, engine = make(8)
    rates(policy, engine, 3)
    tensors, numbers = dict(engine.tensors()), engine.numbers()
    on_and_on = rates(policy, engine, 5)
    for total_steps, settings in ((8, {}), (16, {}), (5, {}), (8, {"learning_rate": 3e-2})):
        policy, engine = make(total_steps, **settings)
        engine.load(tensors, numbers)
        factor = learning_rate_schedule("cosine", 2, total_steps)
        expected = [settings.get("learning_rate", 1e-2) * factor(step) for step in range(3, min(total_steps, 8))]
        assert rates(policy, engine, len(expected)) == expected, total_steps
        assert (expected == on_and_on) == (total_steps == 8 and not settings)


def test_state_of_other_weights_is_refused():
    """Before anything of it is taken over."""
    engine = object.__new__(Engine)
    engine.trained, engine.parameters = ["a", "b"], [torch.zeros(2, 3), torch.zeros(3)]
    right = {"weight/a": torch.zeros(2, 3), "weight/b": torch.zeros(3)}
    for wrong, message in (
        ({"weight/a": torch.zeros(2, 3)}, r"1 differ, the first is weight/b \(none in the checkpoint, \(3,\) in this run\)"),
        ({**right, "weight/a": torch.zeros(4, 3)}, r"weight/a \(\(4, 3\) in the checkpoint, \(2, 3\) in this run\)"),
        ({**right, "weight/c": torch.zeros(1)}, r"weight/c \(\(1,\) in the checkpoint, none in this run\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.load(wrong, {"adam_steps": 0})
