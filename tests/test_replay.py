"""A step's batch on disk, and the same batch under other losses."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from fakes import ragged_rollouts
from safetensors.torch import load_file, save_file
from test_loop import make_run, rows
from test_run import launch, overrides

from grpo_core.batch import TrainBatch
from grpo_core.cli import main
from grpo_core.commands.attribution import (
    Attribution,
    classify_tokens,
    compute_attribution,
    compute_gradient_shares,
    dot,
)
from grpo_core.commands.replay import (
    _choose_budget,
    _make_control,
    _rebuild_batch,
    list_objectives,
    open_weights,
    run_replay,
)
from grpo_core.config.files import load_run_config
from grpo_core.config.sections import DebugConfig, LoraConfig, LossConfig, ModelConfig, RewardConfig
from grpo_core.model.loading import load_tokenizer
from grpo_core.model.policy import load_policy
from grpo_core.schema import ConfigError
from grpo_core.scoring.scoring import Reward
from grpo_core.training import checkpoint, saved_batches
from grpo_core.training.freeze import forward_all
from grpo_core.training.prepare import build_objective
from grpo_core.training.trainer import train

GRPO = LossConfig(kl_coef=0.0)


def kinds(completions):
    """Different letters in a completion, which spread."""
    return [float(len(set(text))) for text in completions]


def train_dumped(folder, num_steps=2, every=1, loss=GRPO, lora=4, start_step=0, change=None, **trainer):
    """A run on builtin:tiny with plain AdamW, every batch of which is kept."""

    def settings(config):
        config = replace(
            config, lora=LoraConfig(r=lora), debug=DebugConfig(every), rewards=[RewardConfig("correct_answer")]
        )
        return change(config) if change else config

    torch.manual_seed(0)
    policy = load_policy(ModelConfig(), LoraConfig(r=lora), dtype=torch.float32, temperature=1.0)
    trainer = {"tokens_per_micro_batch": 48, **trainer}
    run = make_run(folder, num_steps, loss=loss, policy=policy, learning_rate=1e-2, change=settings, **trainer)
    run = replace(run, rewards=[Reward("correct_answer", 1.0, kinds)], start_step=start_step)
    train(run)
    return run


def replayed(batch, *overrides, loss=(), model=None):
    """What `replay` writes as JSON."""
    output = batch.parent / "out.json"
    assert run_replay(batch, overrides, loss=loss, model=model, output=output) == 0
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two dumped steps of a run without a KL."""
    folder = tmp_path_factory.mktemp("plain")
    train_dumped(folder)
    return folder / "batches"


def test_a_dump_says_what_the_update_did_to_every_token(plain):
    """Step 1's weights are those after step 0."""
    told, tensors = (
        json.loads((plain / "step-000000-rank-0.json").read_text()),
        load_file(plain / "step-000000-rank-0.safetensors"),
    )
    first, later = saved_batches.read_dump(plain / "step-000000"), saved_batches.read_dump(plain / "step-000001-rank-0.safetensors")
    config = load_run_config(plain.parent)
    policy = open_weights(later, config, None).policy
    with torch.no_grad():
        ratio = (forward_all(policy, _choose_budget(config), first.batch.rollouts).logprobs - tensors["old_logprobs"]).exp()
    assert told["step"] == told["rank"] == 0 and len(told["completions"]) == 32
    written = rows(plain.parent)[0]
    assert told["row"] == {name: written[name] for name in told["row"]} and told["row"].keys() == written.keys()
    assert (ratio[first.batch.loss_mask] - 1).abs().max() > 0.02
    for i, completion in enumerate(told["completions"]):
        kept = tensors["completion_mask"][i]
        assert completion.keys() == {"task", "sample", "advantage", "tokens", "logprobs", "ratio"}
        assert (completion["task"], completion["sample"]) == (i // 8, i % 8)
        assert completion["advantage"] == pytest.approx(float(tensors["advantages"][i]), abs=1e-5)
        assert completion["tokens"] == [chr(97 + token) for token in tensors["completion_ids"][i][kept].tolist()]
        assert completion["logprobs"] == pytest.approx(tensors["old_logprobs"][i][kept].tolist(), abs=1.1e-5)
        assert completion["ratio"] == pytest.approx(ratio[i][kept].tolist(), abs=2e-5)
    assert tensors["rewards"].shape == tensors["rewards/correct_answer"].shape == (4, 8)


def test_the_steps_that_are_dumped_and_no_other_effect(tmp_path):
    dumped, without = train_dumped(tmp_path / "a", 6, 2, start_step=1), train_dumped(tmp_path / "b", 6, 0, start_step=1)
    assert sorted({path.name[:11] for path in (tmp_path / "a" / "batches").iterdir()}) == [
        "step-000001",
        "step-000002",
        "step-000004",
    ]
    assert not (tmp_path / "b" / "batches").exists()
    for one, other in zip(dumped.policy.parameters(), without.policy.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("loss, change", [
    pytest.param(LossConfig(kl_coef=0.3), None, marks=pytest.mark.soak),
    (LossConfig(kl_coef=0.3, kl="exact", entropy_coef=0.05, average="token", top_entropy=0.5), None),
    (LossConfig(name="gspo", kl_coef=0.2, kl_in="reward"), None),
    pytest.param(LossConfig(name="reinforce", kl_coef=0.1, kl_target=0.001, kl_horizon=50, average="constant"), lambda c: replace(c, reference=replace(c.reference, every=1, mixing=0.5)), marks=pytest.mark.soak),
], ids=["kl", "switches", "kl in reward", "moving reference"])  # fmt: skip
def test_the_runs_own_objective_is_the_runs_and_the_shares_of_the_gradient_add_up(tmp_path, loss, change):
    train_dumped(tmp_path, 3, 2, loss, change=change)
    summary = replayed(tmp_path / "batches" / "step-000002", loss=["cispo"])
    own, row = summary["objectives"][0], rows(tmp_path)[2]
    assert own["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    assert own["loss"] == pytest.approx(row["loss"], rel=1e-4, abs=1e-7)
    assert loss.kl_in == "reward" or abs(row["loss"]) > 1e-4  # else it is the mean advantage, 0 up to rounding
    assert own["cosine"] == pytest.approx(1, abs=1e-6) == own["norm_ratio"] and summary["logprob_gap_max"] < 1e-5
    for one in summary["objectives"]:
        assert one["classes"].keys() == {"advantage", "length", "clip", "end"}
        for labels in one["classes"].values():
            assert sum(found["gradient_share"] for found in labels.values()) == pytest.approx(1, abs=1e-5)
            assert sum(found["share"] for found in labels.values()) == pytest.approx(1, abs=1e-6)
            assert all(0 <= found["share"] <= 1 + 1e-9 for found in labels.values())
            assert sum(found["tokens"] for found in labels.values()) == row["tokens"]
    bonus = loss.entropy_coef * row["entropy"] if loss.top_entropy == 1 else None
    if bonus is not None:
        assert sum(map(sum, own["tokens"]["loss"])) == pytest.approx(own["loss"] + bonus, abs=1e-6)


def test_cosines_and_ratios_of_a_loss_with_itself_its_negative_and_its_triple(plain, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from grpo_core.objective.losses import PolicyLoss, grpo_loss\n\n"
        "def negative(l, old, A, mask):\n    return PolicyLoss(-grpo_loss(l, old, A, mask).per_token_loss)\n\n"
        "def triple(l, old, A, mask):\n    return PolicyLoss(3 * grpo_loss(l, old, A, mask).per_token_loss)\n"
    )
    found = replayed(
        plain / "step-000001", loss=["grpo", *(f"{tmp_path}/mine.py:{name}" for name in ("negative", "triple"))]
    )
    cosines, ratios = zip(*((one["cosine"], one["norm_ratio"]) for one in found["objectives"]), strict=True)
    assert cosines == pytest.approx([1, 1, -1, 1], abs=1e-6) and ratios == pytest.approx([1, 1, 1, 3], rel=1e-5)
    own, _, negative, _ = (one["tokens"]["weight"] for one in found["objectives"])
    heaviest = max((abs(x), i, t) for i, row in enumerate(own) for t, x in enumerate(row))
    assert all(x == -y for one, other in zip(own, negative, strict=True) for x, y in zip(one, other, strict=True))
    for completion, row in zip(found["objectives"][0]["advantages"], own, strict=True):  # average token: -A / tokens
        assert row == pytest.approx([-completion / 32 / len(row)] * len(row), abs=1e-6)
    shown = capsys.readouterr().out
    assert f"{heaviest[0]:.4g}" in shown and repr(found["completions"][heaviest[1]]["tokens"][heaviest[2]]) in shown


def test_a_class_has_the_share_of_the_gradient_that_the_batch_has_without_the_others(plain):
    """Rows whose advantage is set to 0 leave the gradient, and every other token keeps its weight."""
    dumped, config = saved_batches.read_dump(plain / "step-000001"), load_run_config(plain.parent)
    weights = open_weights(dumped, config, None)
    objective = replace(build_objective(config), steps_per_batch=1, learns_from_ties=True)
    budget, control = _choose_budget(config), _make_control(dumped, config, config)
    batch = _rebuild_batch(dumped, weights, objective, budget, config, config)
    computed = (weights.policy, objective, budget)
    whole = compute_attribution(*computed, batch, control)
    classes = classify_tokens(batch, whole)
    found = compute_gradient_shares(*computed, batch, control, whole.gradient, classes)["advantage"]
    for label, sign in (("A > 0", 1), ("A < 0", -1)):
        alone = compute_attribution(*computed, replace(batch, advantages=batch.advantages * (batch.advantages * sign > 0)), control)
        assert found[label] == pytest.approx(dot(alone.gradient, whole.gradient) / whole.norm() ** 2, abs=1e-6)
    assert found["A > 0"] > 0.02 and found.keys() <= {"A > 0", "A < 0", "A = 0"}


def test_other_advantages_are_made_of_the_stored_rewards(plain):
    rewards = load_file(plain / "step-000001-rank-0.safetensors")["rewards"]
    again = replayed(plain / "step-000001", "advantage.min_group_std=1.0e-9")["objectives"]
    assert again[1]["advantages"] == pytest.approx(again[0]["advantages"], abs=1e-6) and again[1][
        "cosine"
    ] == pytest.approx(1)
    other = replayed(plain / "step-000001", "loss.average=constant", loss=["dr_grpo"])["objectives"][1]
    assert other["advantages"] == pytest.approx(
        (rewards - rewards.mean(dim=1, keepdim=True)).flatten().tolist(), abs=1e-6
    )
    assert other["cosine"] < 0.9999 and other["name"] == "dr_grpo"


def test_a_name_is_a_loss_before_it_is_a_preset(plain):
    (_, own), (_, gspo), (_, dapo) = list_objectives(plain.parent, ["loss.kl_coef=0.5"], ["gspo", "dapo"])
    assert own.loss == GRPO
    assert (gspo.loss.name, gspo.loss.args, gspo.loss.kl_coef, gspo.loss.average) == ("gspo", {}, 0.5, own.loss.average)
    assert (dapo.truncation.name, dapo.loss.average, dapo.loss.kl_coef) == ("soft_penalty", "token", 0.5)


def test_a_run_may_go_on_with_other_dumps(plain):
    config = load_run_config(plain.parent, ["debug.dump_batches=7"])
    assert checkpoint.read_meta(plain.parent / "checkpoints" / "step-000002", config)[1] == []


def test_two_ranks_are_one(plain, tmp_path):
    """The same batch cut into two ranks' files, each as wide as its own rows need."""
    shutil.copy(plain.parent / "config.yaml", tmp_path)
    (tmp_path / "batches").mkdir()
    told, tensors = (
        json.loads((plain / "step-000001-rank-0.json").read_text()),
        load_file(plain / "step-000001-rank-0.safetensors"),
    )
    for rank in range(2):
        part = {
            name: value[len(value) // 2 * rank :][: len(value) // 2].clone()
            for name, value in tensors.items()
            if "weight/" not in name
        }
        empty = int((~part["prompt_mask"]).all(dim=0).sum())  # padded on the left
        part |= {name: part[name][:, empty:].clone() for name in ("prompt_ids", "prompt_mask")}
        width = int(part["completion_mask"].sum(dim=1).max())
        part |= {
            name: x[:, :width].clone() for name, x in part.items() if x.shape[1:] == tensors["completion_ids"].shape[1:]
        }
        part |= {name: value for name, value in tensors.items() if "weight/" in name and rank == 0}
        save_file(part, tmp_path / "batches" / f"step-000001-rank-{rank}.safetensors")
        half = told["completions"][16 * rank :][:16]
        (tmp_path / "batches" / f"step-000001-rank-{rank}.json").write_text(
            json.dumps({**told, "rank": rank, "ranks": 2, "completions": half})
        )
    two, one = (replayed(folder / "step-000001", loss=["gspo", "dapo"]) for folder in (tmp_path / "batches", plain))
    assert (two["ranks"], one["ranks"]) == (2, 1) and two["completions"] == one["completions"]
    for left, right in zip(two["objectives"], one["objectives"], strict=True):
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-5) and left["cosine"] == pytest.approx(
            right["cosine"], abs=1e-5
        )
        for a, b in zip(left["tokens"]["weight"], right["tokens"]["weight"], strict=True):
            assert a == pytest.approx(b, abs=1e-6)
    (tmp_path / "batches" / "step-000001-rank-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot read the batch .*step-000001"):
        run_replay(tmp_path / "batches" / "step-000001", [])


def test_the_classes_of_a_batch_made_by_hand():
    rollouts = ragged_rollouts(4, width=6)
    lengths = torch.tensor([6, 1, 3, 3])
    mask = torch.arange(6) < lengths[:, None]
    truncated = torch.tensor([True, False, False, False])
    rollouts = replace(rollouts, completion_mask=mask, truncated=truncated)
    trained, acting = mask.clone(), torch.ones_like(mask)
    trained[3] = False  # a row that is left out
    acting[0, 5] = False
    surrogate = torch.ones(4, 6)
    surrogate[0, :2] = 0.0
    surrogate[1] = 0.0
    batch = TrainBatch(rollouts, torch.tensor([[1.0], [0.0], [-2.0], [5.0]]), trained, acting)
    zeros = torch.zeros(4, 6)
    classes = classify_tokens(batch, Attribution(0.0, [], zeros, zeros, zeros, surrogate))
    places = {
        name: {label: where.nonzero().tolist() for label, where in labels.items()} for name, labels in classes.items()
    }
    first, second, third = [[0, t] for t in range(6)], [[1, 0]], [[2, 0], [2, 1], [2, 2]]
    assert places["advantage"] == {"A > 0": first, "A < 0": third, "A = 0": second}
    assert places["length"] == {"1 token": second, "2 to 3 tokens": third, "4 to 6 tokens": first}
    assert places["clip"] == {
        "kept": first[2:5] + third,
        "clipped": first[:2],
        "A = 0": second,
        "entropy too low": first[5:],
    }
    assert places["end"] == {"end of sequence": [*second, third[2]], "other tokens": first + third[:2]}


@pytest.mark.parametrize("n, ends", [(20, range(2, 21, 2)), (25, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25])])
def test_deciles_hold_a_tenth_each(n, ends):
    """Of n completions of 1 to n tokens; the i-th decile ends at the ceil(i n / 10)-th."""
    mask = torch.arange(n) < torch.arange(1, n + 1)[:, None]
    rollouts, zeros = replace(ragged_rollouts(n, width=n), completion_mask=mask), torch.zeros(n, n)
    found = classify_tokens(TrainBatch(rollouts, torch.ones(n, 1), mask), Attribution(0.0, [], zeros, zeros, zeros, zeros))[
        "length"
    ]
    assert list(found) == [f"{start + 1} to {end} tokens" for start, end in zip([0, *ends], ends, strict=False)]


def test_several_minibatches_are_said(tmp_path, capsys):
    train_dumped(tmp_path, 1, num_minibatches=2)
    run_replay(tmp_path / "batches" / "step-000000", [])
    shown = capsys.readouterr().out
    assert "The run took 2 optimizer steps on this batch, each on one minibatch; metrics.jsonl has their means." in shown
    assert "Every ratio is 1" in shown and "lora.dropout" not in shown


def test_without_an_adapter_the_newest_model_is_taken_and_said(tmp_path, capsys):
    run = train_dumped(tmp_path, 1, lora=0)
    with pytest.raises(ConfigError, match="neither an adapter nor a checkpoint|do not fit"):
        run_replay(tmp_path / "batches" / "step-000000", [])
    run.policy.save(tmp_path / "adapter")
    load_tokenizer("builtin:tiny").save_pretrained(tmp_path / "adapter")
    newest = replayed(tmp_path / "batches" / "step-000000")
    assert (
        f"the model in {tmp_path / 'adapter'} (the newest weights: with lora.r 0 a batch is saved without its weights)"
        in capsys.readouterr().out
    )
    assert newest["logprob_gap_max"] > 1e-3 and not newest["ratio_is_1"]
    began = replayed(tmp_path / "batches" / "step-000000", model="builtin:tiny")
    assert began["logprob_gap_max"] < 1e-5
    assert began["objectives"][0]["grad_norm"] == pytest.approx(rows(tmp_path)[0]["grad_norm"], rel=1e-4)


def test_a_disk_that_takes_no_batch_ends_no_run(tmp_path, capsys):
    (tmp_path / "batches").write_text("a file where the folder would be")
    train_dumped(tmp_path, 3)
    assert len(rows(tmp_path)) == 3
    assert (
        capsys.readouterr().out.count(f"warning: a batch could not be written to {tmp_path / 'batches'} (File exists)")
        == 1
    )


def test_what_a_disk_takes_in_part_is_not_there(tmp_path, monkeypatch):
    def torn(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_batches, "save_file", torn)
    assert saved_batches.write_files(tmp_path / "batches", 3, {}, {}) == "No space left on device"
    assert list((tmp_path / "batches").iterdir()) == []


@pytest.mark.parametrize("words, said", [
    (["step-000001", "engine.learning_rate=1"], "engine.learning_rate=1 has no effect on a replay; only these keys have: loss, advantage"),
    (["step-000001", "--loss", "nothing"], "unknown loss or preset 'nothing'; losses: cispo, "),
    (["step-000001", "--loss", "nothing"], "presets: cispo, dapo, "),
    (["step-000001", "--model", "builtin:tiny"], "builtin:tiny does not have the parameters that"),
    (["step-000007"], "step-000007 is not among the saved batches in {plain}: step-000000, step-000001\n"),
    (["step-000007-rank-0.json"], "step-000007 is not among the saved batches in {plain}: step-000000, step-000001\n"),
    (["empty/batches/step-000001"], "empty has no saved batches; debug.dump_batches=N saves the batch of every N-th step\n"),
    (["many/batches/step-000001"], "is not among the saved batches in {plain}/many/batches: step-000100, step-000101, step-000102, step-000103, step-000104, step-000105, step-000106, step-000107, step-000108, step-000109, ..., step-000149\n"),
    (["nowhere/batches/step-000001"], "there is no run folder {plain}/nowhere\n"),
    (["metrics.jsonl"], "does not name a batch; use <run folder>/batches/step-000012"),
    (["torn/step-000001"], "is damaged, or was not saved by debug.dump_batches"),
    (["step-000001", "--output", "/nowhere/a.json"], "--output /nowhere/a.json cannot be written"),
])  # fmt: skip
def test_what_cannot_be_replayed_is_one_sentence(plain, capsys, words, said):
    torn, many = plain / "torn", plain / "many" / "batches"
    for folder in (torn, plain / "empty", many):
        folder.mkdir(exist_ok=True, parents=True)
    for step in range(100, 150):
        (many / f"step-{step:06d}-rank-0.json").touch()
    shutil.copy(plain / "step-000001-rank-0.json", torn)
    (torn / "step-000001-rank-0.safetensors").write_bytes(b"half of it")
    assert main(["replay", str(plain / words[0]), *words[1:]]) == 2
    error = capsys.readouterr().err
    assert said.replace("{plain}", str(plain)) in error and error.count("\n") == 1


@pytest.mark.slow
def test_two_processes_and_a_later_checkpoint(tmp_path, environment):
    """The row's loss and norm over both ranks; at the weights after the step, clipping is where its ratios say."""
    more = {"trainer__num_steps": 2, "debug__dump_batches": 1, "checkpoint__every": 1, "evaluation__num_tasks": 0}
    more |= {"engine__learning_rate": 0.02, "engine__warmup_steps": 0, "engine__deepspeed": "{}", "rewards": "num_unique_chars"}
    done = launch(2, *overrides(tmp_path, **more), environment=environment)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny"
    names = [
        f"step-00000{step}-rank-{rank}.{kind}" for step in (0, 1) for rank in (0, 1) for kind in ("json", "safetensors")
    ]
    assert sorted(path.name for path in (folder / "batches").iterdir()) == names
    for step, row in enumerate(rows(folder)):
        own = replayed(folder / "batches" / f"step-00000{step}")["objectives"][0]
        assert own["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
        assert own["loss"] == pytest.approx(row["loss"], abs=1e-6)
    assert not any("weight/" in name for name in load_file(folder / "batches" / "step-000001-rank-1.safetensors"))

    found = replayed(folder / "batches" / "step-000000-rank-1.json", model=str(folder / "checkpoints" / "step-000001"))
    told = [
        one
        for rank in (0, 1)
        for one in json.loads((folder / "batches" / f"step-000000-rank-{rank}.json").read_text())["completions"]
    ]
    outside = sum(
        r > 1.2 if one["advantage"] > 0 else r < 0.8 for one in told if one["advantage"] for r in one["ratio"]
    )
    clipped = found["objectives"][0]["classes"]["clip"]["clipped"]
    assert outside > 10 and clipped["tokens"] == outside


def test_n15_a_loss_that_cannot_differ_is_named_and_later_weights_show_the_difference(plain, capsys):
    """FAULTS N15: with the weights before the step every ratio is 1, so gspo's gradient is grpo's, and nothing said so."""
    before = replayed(plain / "step-000000", loss=["gspo", "dr_grpo"])
    sentence = "The gradient of gspo is the run's own on this batch: every ratio is 1 before the first optimizer step"
    assert before["objectives"][1]["cosine"] == pytest.approx(1, abs=1e-6)
    assert sentence in capsys.readouterr().out


def test_n15_with_later_weights_the_losses_differ(tmp_path, capsys):
    """FAULTS N15: what the documented example shows: ratios that are not 1."""
    run = train_dumped(tmp_path, 1, lora=0)
    run.policy.save(tmp_path / "adapter")
    load_tokenizer("builtin:tiny").save_pretrained(tmp_path / "adapter")
    after = replayed(tmp_path / "batches" / "step-000000", loss=["gspo", "grpo"])
    assert abs(after["objectives"][1]["cosine"] - 1) > 1e-4
    said = capsys.readouterr().out
    assert "The gradient of grpo is the run's own on this batch." in said and "gspo is" not in said


def test_n15_the_documented_example_names_later_weights():
    """FAULTS N15: the example of docs/commands.md printed cosine 1.0 for every loss."""
    page = (ROOT / "docs" / "commands.md").read_text()
    commands = [line.split() for line in page.splitlines() if line.startswith("    python -m grpo_core replay")]
    assert commands and all("--model" in words for words in commands)
