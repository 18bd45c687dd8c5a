"""A missing file of a checkpoint, an adapter, a model or a saved batch is named."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from test_loop import make_run

from grpo_core.commands.open_policy import _find_source
from grpo_core.config.files import dump, load
from grpo_core.config.lora_checks import check_adapter_weights
from grpo_core.config.sections import ModelConfig
from grpo_core.model.loading import load_model_config, load_tokenizer
from grpo_core.model.policy import load_policy
from grpo_core.schema import ConfigError
from grpo_core.training import checkpoint, run_dir, saved_batches

TINY = ROOT / "configs" / "tiny.yaml"
BUILTIN = ROOT / "grpo_core" / "builtin" / "tiny"
FILES = [checkpoint.SUMS, checkpoint.META, checkpoint.TENSORS]


@pytest.fixture
def newest(tmp_path):
    run = make_run(tmp_path / "runs" / "cc")
    assert checkpoint.save(run, 1, run.control)
    config = load(TINY, ["name=cc", f"output_dir={tmp_path}/runs"])
    (run.folder / "config.yaml").write_text(dump(config))
    return run.folder / "checkpoints" / "step-000001"


def find(path):
    return _find_source(str(path), [], None, lambda sentence: None)


@pytest.mark.parametrize("file", FILES)
def test_attack_6_a_missing_file_of_a_checkpoint_is_named(newest, file):
    (newest / file).unlink()
    assert checkpoint.describe_damage(newest) == f"{file} is missing"
    with pytest.raises(ConfigError, match=f"the checkpoint {newest} is damaged: {file} is missing"):
        find(newest)
    with pytest.raises(ConfigError, match=f"every checkpoint in .* is damaged: {file} is missing"):
        run_dir.find_run_folder(load(TINY, ["name=cc", f"output_dir={newest.parents[2]}", "resume=auto"]))


@pytest.mark.parametrize("missing, named", [(FILES, checkpoint.SUMS), (FILES[:2], checkpoint.SUMS), (FILES[1:], checkpoint.TENSORS)])
def test_attack_6_several_missing_files_are_damage_too(newest, missing, named):
    for file in missing:
        (newest / file).unlink()
    with pytest.raises(ConfigError, match=f"the checkpoint {newest} is damaged: {named} is missing"):
        find(newest)


def test_attack_6_the_link_best_is_a_checkpoint_without_its_metadata(newest):
    (newest.parent / "best").symlink_to(newest.name)
    assert find(newest.parent / "best").checkpoint == newest
    (newest / checkpoint.META).unlink()
    with pytest.raises(ConfigError, match="is damaged: meta.json is missing"):
        find(newest.parent / "best")


@pytest.mark.parametrize("harm, sentence", [
    (lambda path: path.mkdir(), "SHA256SUMS cannot be read: Is a directory"),
    (lambda path: path.write_bytes(b"\xff\xfe"), "SHA256SUMS is not UTF-8 text"),
])  # fmt: skip
def test_attack_6_a_file_that_cannot_be_read_is_named(newest, harm, sentence):
    (newest / checkpoint.SUMS).unlink()
    harm(newest / checkpoint.SUMS)
    assert checkpoint.describe_damage(newest) == sentence


@pytest.fixture
def adapter(newest):
    folder = newest.parents[1] / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(BUILTIN)}))
    save_file({"weight": torch.ones(9)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_attack_6_a_missing_file_of_an_adapter_is_named(adapter, tmp_path, file):
    assert find(adapter).adapter == adapter and find(adapter.parent).adapter == adapter
    (adapter / file).unlink()
    with pytest.raises(ConfigError, match=f"the adapter in {adapter} is incomplete: {file} is missing"):
        find(adapter)
    if file == "adapter_model.safetensors":
        with pytest.raises(ConfigError, match=f"the adapter in {adapter} is incomplete: {file} is missing"):
            find(adapter.parent)
    else:  # the export of the adapter was interrupted; the checkpoint has the weights
        assert find(adapter.parent).checkpoint is not None


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


@pytest.mark.parametrize("name, content, sentence", [
    ("adapter_model.safetensors", lambda whole: whole[:-4], "adapter_model.safetensors is cut off: it has "),
    ("adapter_model.safetensors", lambda whole: whole + b"x", "adapter_model.safetensors is damaged: it has "),
    ("adapter_model.safetensors", lambda whole: whole[:20], "adapter_model.safetensors is damaged or cut off: it does not have the header"),
    ("adapter_model.safetensors", lambda whole: b"", "adapter_model.safetensors is damaged or cut off"),
    ("adapter_model.safetensors", lambda whole: whole[:8] + b"[" + whole[9:], "adapter_model.safetensors is damaged: its header cannot be read"),
    ("adapter_model.safetensors", lambda whole: POINTER, "adapter_model.safetensors is a pointer of Git LFS in place of the file"),
    ("adapter_config.json", lambda whole: POINTER, "adapter_config.json is a pointer of Git LFS"),
    ("adapter_config.json", lambda whole: whole[:9], "adapter_config.json is not JSON"),
    ("adapter_config.json", lambda whole: b"", "adapter_config.json is not JSON"),
])  # fmt: skip
def test_a_damaged_file_of_an_adapter_is_named(adapter, name, content, sentence):
    (adapter / name).write_bytes(content((adapter / name).read_bytes()))
    with pytest.raises(ConfigError, match=f"the adapter in {adapter} is incomplete: {sentence}"):
        find(adapter)
    settings = json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]})
    if name != "adapter_config.json":
        (adapter / "adapter_config.json").write_text(settings)
        for key in ("lora.path", "teacher.adapter"):
            with pytest.raises(ConfigError, match=f"{key} is '{adapter}', whose adapter cannot be loaded: {sentence}"):
                check_adapter_weights(key, str(adapter))
        (adapter / name).rename(adapter / "adapter_model.bin")  # which PEFT takes where there is no other
        (adapter / "adapter_model.bin").write_bytes(POINTER)
        with pytest.raises(ConfigError, match="adapter_model.bin is a pointer of Git LFS"):
            check_adapter_weights("lora.path", str(adapter))


def test_attack_6_a_model_without_its_configuration_or_tokenizer(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(BUILTIN, model)
    (model / "config.json").unlink()
    sentence = f"model.path is '{model}', and it cannot be loaded: config.json is missing"
    with pytest.raises(ConfigError, match=sentence):
        load_model_config(ModelConfig(str(model)))
    with pytest.raises(ConfigError, match=sentence):
        load_policy(ModelConfig(str(model)), SimpleNamespace(r=0), dtype=None, temperature=1.0)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="the folder has no tokenizer files, such as tokenizer.json"):
        load_tokenizer(str(model))


def damage_model(folder, name, content):
    shutil.copytree(BUILTIN, folder)
    file = folder / name
    file.write_bytes(content(file.read_bytes() if file.exists() else b""))


INDEX = "model.safetensors.index.json"
MODEL_FILES = [
    ("model.safetensors", lambda whole: whole[:-4], "model.safetensors is cut off: it has "),
    ("model.safetensors", lambda whole: POINTER, "model.safetensors is a pointer of Git LFS"),
    (INDEX, lambda whole: b"{", f"{INDEX} is not JSON"),
    (INDEX, lambda whole: b"[]", f"{INDEX} has no mapping weight_map"),
    (INDEX, lambda whole: b'{"metadata": {}}', f"{INDEX} has no mapping weight_map"),
    (INDEX, lambda whole: b'{"weight_map": {"a": "one.safetensors"}}', "one.safetensors is missing"),
    ("config.json", lambda whole: whole[:9], "config.json is not JSON"),
    ("config.json", lambda whole: b"null", "config.json holds no mapping"),
    ("generation_config.json", lambda whole: b"{bad", "generation_config.json is not JSON: .*; correct it or delete it"),
    ("generation_config.json", lambda whole: b"[]", "generation_config.json holds no mapping; correct it or delete it"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, sentence", MODEL_FILES)
def test_a_damaged_file_of_a_model_is_named_before_weights_load(tmp_path, name, content, sentence):
    damage_model(tmp_path / "model", name, content)
    if name == INDEX:
        (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"model.path is '{tmp_path}/model', and it cannot be loaded: {sentence}"):
        load_model_config(ModelConfig(str(tmp_path / "model")))
    if name == "config.json":  # which is no fault of the tokenizer
        with pytest.raises(ConfigError, match=f"and it cannot be loaded: {sentence}"):
            load_tokenizer(str(tmp_path / "model"))


@pytest.mark.parametrize("name, content, sentence", [
    ("tokenizer.json", lambda whole: whole[:999], "tokenizer.json is not JSON"),
    ("tokenizer.json", lambda whole: POINTER, "tokenizer.json is a pointer of Git LFS"),
    ("tokenizer.json", lambda whole: b"[]", "tokenizer.json holds no mapping"),
    ("tokenizer_config.json", lambda whole: b"{", "tokenizer_config.json is not JSON"),
])  # fmt: skip
def test_a_damaged_file_of_a_tokenizer_is_named(tmp_path, name, content, sentence):
    damage_model(tmp_path / "model", name, content)
    with pytest.raises(ConfigError, match=f"model.path is '{tmp_path}/model', and its tokenizer cannot be loaded: {sentence}"):
        load_tokenizer(str(tmp_path / "model"))


def test_an_adapter_is_no_model_though_it_has_no_tokenizer(adapter):
    with pytest.raises(ConfigError, match=f"model.path is '{adapter}', which holds an adapter and not a model"):
        load_tokenizer(str(adapter))


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_attack_6_a_missing_file_of_a_saved_batch_is_named_once(tmp_path, suffix):
    folder = tmp_path / "batches"
    folder.mkdir()
    (folder / "step-000001-rank-0.safetensors").write_bytes(b"")
    (folder / "step-000001-rank-0.json").write_text(json.dumps({"ranks": 1}))
    (folder / f"step-000001-rank-0.{suffix}").unlink()
    with pytest.raises(ConfigError, match=f"step-000001-rank-0.{suffix}") as error:
        saved_batches.read_dump(folder / "step-000001")
    assert "None" not in str(error.value)
