"""Checkpoints as files; test_faults.py has the real runs."""

import json
from dataclasses import replace

import pytest
import torch
from test_faults_of_models import EXPERTS
from test_loop import make_run

from grpo_core.config.sections import LoraConfig, ModelConfig, RewardConfig, SourceConfig
from grpo_core.model.policy import wrap
from grpo_core.schema import ConfigError
from grpo_core.training import checkpoint, run_dir


@pytest.fixture
def two(tmp_path):
    """A run with two checkpoints, and the configuration that goes on from it."""
    run = make_run(tmp_path / "out" / "run")
    for step in (1, 2):
        assert checkpoint.save(run, step, run.control)
    (run.folder / "config.yaml").touch()
    return run, replace(run.config, output_dir=str(tmp_path / "out"), name="run", resume="auto")


@pytest.mark.parametrize("file", ["tensors.safetensors", "meta.json", "SHA256SUMS"])
@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing", "empty"])
def test_damage_is_seen_and_the_one_before_is_taken(two, file, harm):
    run, config = two
    newest = run.folder / "checkpoints" / "step-000002"
    assert run_dir.find_run_folder(config) == (run.folder, newest, [])
    content = (newest / file).read_bytes()
    harmed = {"truncated": content[:-7], "flipped": content[:9] + bytes([content[9] ^ 1]) + content[10:], "empty": b""}
    (newest / file).unlink()
    if harm != "missing":
        (newest / file).write_bytes(harmed[harm])
    folder, found, (sentence,) = run_dir.find_run_folder(config)
    assert folder == run.folder and found.name == "step-000001" and sentence.startswith(f"{newest} is damaged (")


def test_where_all_are_damaged_the_run_is_refused(two):
    run, config = two
    for one in (run.folder / "checkpoints").iterdir():
        (one / "meta.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"every checkpoint in .* is damaged: meta.json does not match its checksum"):
        run_dir.find_run_folder(config)


def test_a_folder_can_be_named_and_a_new_run_never_takes_an_old_ones_unasked(two):
    run, config = two
    named = replace(config, resume=str(run.folder), name="other")
    assert run_dir.find_run_folder(named)[:2] == (run.folder, run.folder / "checkpoints" / "step-000002")
    with pytest.raises(ConfigError, match=r"run already holds a run; use resume=auto to continue it, overwrite=true"):
        run_dir.find_run_folder(replace(config, resume=None))
    assert run_dir.find_run_folder(replace(config, resume=None, overwrite=True)) == (run.folder, None, [])
    assert run_dir.find_run_folder(replace(config, resume=None, name="other")) == (
        run.folder.with_name("other"),
        None,
        [],
    )


def test_the_order_of_weights_is_no_difference(tmp_path):
    """PEFT's forward replaces the weights of lora.target_parameters, which are then the last of their module."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    policy = wrap(EXPERTS["qwen3_moe"]().eval(), ModelConfig(), lora, temperature=1.0)
    run = make_run(tmp_path / "run", policy=policy)
    names = [name for name, p in policy.model.named_parameters()]
    fresh, older = (checkpoint.compute_fingerprints(run, by_name=by_name) for by_name in (True, False))
    policy.causal_lm(torch.arange(4)[None])
    assert [name for name, p in policy.model.named_parameters()] != names
    assert checkpoint.compute_fingerprints(run) == fresh != older


def test_a_checkpoint_with_the_weights_in_another_order_is_resumed(two, monkeypatch):
    """As they were written before."""
    run, _ = two
    newest = run.folder / "checkpoints" / "step-000002"
    meta = json.loads((newest / checkpoint.META).read_text())
    older = checkpoint.compute_fingerprints(run, by_name=False)
    assert older != meta["fingerprints"]
    monkeypatch.setattr(run.engine, "load", lambda *arguments: None, raising=False)
    assert checkpoint.load(newest, {**meta, "fingerprints": older}, run) == []
    changed = {**older, "the weights of model.path": "0"}
    with pytest.raises(ConfigError, match="because the weights of model.path have changed"):
        checkpoint.load(newest, {**meta, "fingerprints": changed}, run)


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_behind(two, monkeypatch, capsys):
    run, _ = two

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "replace", full)
    assert not checkpoint.save(run, 3, run.control)
    assert "could not be written (No space left on device)" in capsys.readouterr().out
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_only_what_changes_no_number_may_differ(two):
    run, config = two
    newest = run.folder / "checkpoints" / "step-000002"
    trainer = replace(config.trainer, tokens_per_micro_batch=7, num_steps=99)
    assert checkpoint.read_meta(newest, replace(config, trainer=trainer))[1] == []
    other = replace(config, seed=5, trainer=replace(config.trainer, num_passes=2))
    with pytest.raises(ConfigError, match=r"seed \(0 in the checkpoint, 5 now\), trainer.num_passes \(1 in the checkpoint, 2 now\)"):
        checkpoint.read_meta(newest, other)
    meta, overridden = checkpoint.read_meta(newest, replace(other, resume="force"))
    assert meta["next_step"] == 2 and [key.split()[0] for key in overridden] == ["seed", "trainer.num_passes"]


def test_an_argument_that_was_set_differs_and_the_empty_mapping_around_it_does_not(two):
    run, config = two
    other = replace(config, loss=replace(config.loss, args={"clip_low": 0.1}))
    with pytest.raises(ConfigError, match=r"differs: loss.args.clip_low \(None in the checkpoint, 0.1 now\); start"):
        checkpoint.read_meta(run.folder / "checkpoints" / "step-000002", other)


def test_a_judge_may_be_reached_in_another_way_and_is_the_same_judge(two):
    run, config = two

    def read(change, **args):
        judge = RewardConfig("judge", args={"url": "http://a", "model": "m", **args})
        source = SourceConfig(path="x.jsonl", name="x", rewards=[judge] if change == "source" else [])
        data = replace(config.data, sources=[source])
        return replace(config, data=data, rewards=[judge] if change == "run" else config.rewards)

    for place in ("run", "source"):
        assert checkpoint.save(replace(run, config=read(place)), 3, run.control)
        newest = run.folder / "checkpoints" / "step-000003"
        assert checkpoint.read_meta(newest, read(place, url="http://b", budget=9.0, retries=1))[1] == []
        with pytest.raises(ConfigError, match="because the configuration differs: (rewards|data.sources) "):
            checkpoint.read_meta(newest, read(place, model="other"))
