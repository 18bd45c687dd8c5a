"""A run folder, a checkpoint, an adapter or a model, opened: the same weights whichever way one comes."""

import json
import shutil

import pytest
import torch
from conftest import ROOT

from grpo_core.batch import Task
from grpo_core.cli import main
from grpo_core.commands.open_policy import open_source
from grpo_core.schema import ConfigError

pytestmark = pytest.mark.slow


def greedy(
    opened, text="Question: Ada has 7 boxes with 6 pens each and 15 loose pens, and sells 20. How many pens are left?\n"
):
    task = Task(0, text, opened.tokenizer(text)["input_ids"], {})
    return opened.sampler.generate([task], 1, greedy=True)


def trained(opened):
    return {name: p.detach() for name, p in opened.policy.model.named_parameters() if "lora_" in name}


def test_a_run_its_adapter_and_its_last_checkpoint_are_the_same_policy(tiny_run):
    run = open_source(str(tiny_run))
    assert run.has_adapter and run.folder == tiny_run and run.weights == f"the adapter in {tiny_run / 'adapter'}"
    weights = trained(run)
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    for other in (tiny_run / "checkpoints" / "step-000012", tiny_run / "adapter"):
        opened = open_source(str(other))
        assert all(torch.equal(value, weights[name]) for name, value in trained(opened).items()) and weights
        assert torch.equal(greedy(opened).completion_ids, greedy(run).completion_ids)
    earlier = trained(open_source(str(tiny_run / "checkpoints" / "step-000006")))
    assert any(not torch.equal(value, weights[name]) for name, value in earlier.items())


def test_the_base_is_the_model_that_was_trained_from(tiny_run):
    run, base = open_source(str(tiny_run)), open_source("builtin:tiny")
    assert not base.has_adapter and base.folder is None
    ours = greedy(run)
    with run.policy.reference():
        before = greedy(run)
    assert torch.equal(before.completion_ids, greedy(base).completion_ids)
    torch.testing.assert_close(before.rollout_logprobs, greedy(base).rollout_logprobs)
    assert ours.completion_ids.shape != before.completion_ids.shape or not torch.equal(
        ours.rollout_logprobs, before.rollout_logprobs
    )


def test_a_run_that_was_killed_is_opened_at_its_newest_whole_checkpoint(tiny_run, tmp_path):
    killed = tmp_path / "killed"
    shutil.copytree(tiny_run, killed)
    shutil.rmtree(killed / "adapter")
    assert open_source(str(killed)).weights.endswith("step-000012")
    torn = killed / "checkpoints" / "step-000012" / "tensors.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    assert open_source(str(killed)).weights.endswith("step-000006")
    with pytest.raises(ConfigError, match="step-000012 is damaged"):
        open_source(str(torn.parent))
    shutil.rmtree(killed / "checkpoints")
    with pytest.raises(ConfigError, match="has written neither an adapter nor a checkpoint yet"):
        open_source(str(killed))


def test_keys_can_be_given_and_files_of_the_users_are_found_in_the_run(tiny_run, tmp_path):
    assert open_source(str(tiny_run), ["sampling.max_new_tokens=7"]).sampler.max_new_tokens == 7
    moved = tmp_path / "moved"
    shutil.copytree(tiny_run, moved)
    (moved / "code").mkdir()
    (moved / "code" / "mine.py").write_text("def f(completions):\n    return [1.0 for _ in completions]\n")
    text = (moved / "config.yaml").read_text().replace("name: has_think_tags", "name: gone/mine.py:f")
    (moved / "config.yaml").write_text(text)
    assert open_source(str(moved)).config.rewards[1].name == f"{moved / 'code' / 'mine.py'}:f"


def test_what_only_the_training_session_knew_is_left_out_and_told(tiny_run, tmp_path):
    """A reward, a loss and an advantage that were registered in a notebook: the weights are wanted all the same."""
    run = tmp_path / "registered"
    shutil.copytree(tiny_run, run)
    text = (run / "config.yaml").read_text()
    for key, name in (("- name: ", "has_think_tags"), ("loss:\n  name: ", "grpo"), ("advantage:\n  name: ", "grpo")):
        assert key + name in text
        text = text.replace(key + name, key + "mine", 1)
    (run / "config.yaml").write_text(text)
    told = []
    opened = open_source(str(run), notify=told.append)
    assert [reward.name for reward in opened.config.rewards] == ["correct_answer"] and opened.config.loss.name == "grpo"
    assert [sentence.removeprefix(f"{run}: ") for sentence in told] == [
        f"{what} mine is not registered here and is left out" for what in ("loss", "advantage", "reward")
    ]
    assert torch.equal(greedy(opened).completion_ids, greedy(open_source(str(tiny_run))).completion_ids)
    assert main(["sample", str(run), "What is 1 + 1?"]) == 0 and main(["export", str(run), "--dry-run"]) == 0


@pytest.mark.parametrize("source, sentence", [
    ("tests", "tests is a folder, but neither a run"),
    ("tests/fixtuers", r"there is no folder tests/fixtuers; known: .*fixtures.* \(did you mean fixtures\?\)"),
    ("/nothing/here", "there is no folder /nothing/here$"),
    ("runs/a/b", "there is no folder runs/a/b$"),
    ("builtin:none", "model.path is 'builtin:none'"),
    ("no-such-thing", "there is no folder no-such-thing, and it cannot be loaded as a hub model"),
])  # fmt: skip
def test_what_is_nothing_is_one_sentence(source, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "/" in source:  # no hub is asked for what can only be a folder
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    with pytest.raises(ConfigError, match=sentence):
        open_source(source)


@pytest.mark.parametrize("base", ["../models/gone", "tiny"])
def test_an_adapter_whose_base_is_elsewhere_names_it(tiny_run, tmp_path, base, monkeypatch):
    """The name of a folder alone, as exported adapters have it, is not taken for the run of this name."""
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_run / "adapter", adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    shutil.copy(tiny_run / "config.yaml", tmp_path / "runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^the base model of the adapter in .* is not at {base}; set model.path to its folder$"):
        open_source(str(adapter))
    assert open_source(str(adapter), ["model.path=builtin:tiny"]).has_adapter
