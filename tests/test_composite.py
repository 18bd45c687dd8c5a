"""The text model of a composite model: what a run saves opens in plain transformers and PEFT as a user opens the base."""

import re
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

from grpo_core.cli import main
from grpo_core.commands.open_policy import open_source
from grpo_core.config.files import load_job
from grpo_core.config.lora_checks import use_settings_of_adapter
from grpo_core.config.sections import LoraConfig, ModelConfig, RunConfig, TeacherConfig
from grpo_core.model.composite import _match_modules, find_auto_class, names_of
from grpo_core.model.loading import load_whole_config
from grpo_core.model.policy import load_policy
from grpo_core.model.quieten import quieten
from grpo_core.model.teacher import load_teacher
from grpo_core.schema import ConfigError
from grpo_core.training import job

sys.path.insert(0, str(ROOT / "benchmarks"))
import models

IDS = torch.arange(3, 40)[None]
OUTER = {  # the name of the text model, where the auto class of plain transformers loads the towers too
    "gemma3": "model.language_model", "gemma4": "model.language_model", "mistral3": "model.language_model", "smolvlm": "model.text_model",
}  # fmt: skip
SETTINGS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "a layer": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "exclude_modules": ["o_proj"]},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {r"model\.layers\.1\.self_attn\.v_proj": 32}, "use_dora": True},
    "overlapping patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "model.layers.*": 3},
        "alpha_pattern": {"q_proj": 64, "layers.0.*proj": 4}},
    "modules": {"target_modules": ["q_proj"], "modules_to_save": ["post_feedforward_layernorm", "model.norm"], "trainable_token_indices": {"embed_tokens": [5, 6]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of a tiny model of a type, which is made once."""
    quieten()
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            models.save_model(name, made[name])
        return made[name]

    return make


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def train(folder, **settings):
    """Return a policy with an adapter that has an effect."""
    policy = load_policy(ModelConfig(str(folder), precision="fp32"), LoraConfig(r=4, alpha=8, **settings), dtype=torch.float32, temperature=1.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return policy


def check_both(folder, saved, policy, has_effect=True):
    """Check that the saved adapter gives the policy's logits in plain PEFT, and when a run opens it."""
    expected = logits(policy.causal_lm)
    base = find_auto_class(load_whole_config(ModelConfig(str(folder)))).from_pretrained(folder, dtype=torch.float32)
    assert ((logits(base) - expected).abs().max() > 0.02) == has_effect
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")  # PEFT warns of weights that are missing
        plain = PeftModel.from_pretrained(base, saved)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    lora = use_settings_of_adapter(LoraConfig(path=str(saved)))
    again = load_policy(ModelConfig(str(folder), precision="fp32"), lora, dtype=torch.float32, temperature=1.0)
    assert torch.equal(logits(again.causal_lm), expected)
    assert [p.shape for p in again.parameters()] == [p.shape for p in policy.parameters()]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_adapter_opens_on_the_composite_model(folders, tmp_path, settings):
    policy = train(folders("gemma3"), **settings)
    policy.save(tmp_path / "adapter")
    check_both(folders("gemma3"), tmp_path / "adapter", policy)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "mistral3", "smolvlm", "qwen3_5", "llama4", "qwen3_5_moe"])
def test_an_adapter_opens_on_every_kind_of_composite_model(folders, tmp_path, name):
    policy = train(folders(name), target_modules=["q_proj", "v_proj"])
    names = names_of(policy.causal_lm)
    assert names["model"] == OUTER.get(name, "model")
    policy.save(tmp_path / "adapter")
    check_both(folders(name), tmp_path / "adapter", policy)
    if name not in OUTER:  # and no weight is left out in silence where the names are others
        whole = AutoModelForMultimodalLM.from_pretrained(folders(name), dtype=torch.float32)
        with pytest.raises(ValueError, match="not found in the base model"):
            PeftModel.from_pretrained(whole, tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen3_5"])
def test_the_code_of_the_cards_opens_the_exports(folders, tmp_path, name, capsys, monkeypatch):
    """Of a run on the text model of a composite model, with a rotary embedding of its own."""
    rope = {"gemma3": "{full_attention: {rope_theta: 500.0}}"}.get(name, "{rope_theta: 500.0}")
    words = [
        f"model.path={folders(name)}", f"output_dir={tmp_path}", "name=run", "model.precision=fp32", f"model.rope={rope}", "lora.r=4",
        "lora.target_modules=[q_proj, v_proj]", "data.limit=40", "trainer.num_steps=1", "trainer.completions_per_step=8", "sampling.group_size=4",
        "sampling.max_new_tokens=6", "evaluation.num_tasks=0", "rewards=[{name: num_unique_chars}]", "engine.learning_rate=0.5",
        "engine.warmup_steps=0",
    ]  # fmt: skip
    job.train(load_job(ROOT / "configs" / "tiny.yaml", words))
    assert main(["export", str(tmp_path / "run"), "--adapter"]) == main(["export", str(tmp_path / "run")]) == 0
    opened = open_source(str(tmp_path / "run"), ["model.precision=fp32"])
    expected = logits(opened.policy.causal_lm)
    with opened.policy.model.disable_adapter():
        assert (logits(opened.policy.causal_lm) - expected).abs().max() > 1e-3
    for export in ("export-adapter", "export"):
        code = re.search("```python\n(.*?)```", (tmp_path / "run" / export / "README.md").read_text(), re.DOTALL)[1]
        code = code.replace(f'"{folders(name).name}"', f'"{folders(name)}"').replace('folder = "."', f'folder = "{tmp_path / "run" / export}"')
        values = {}
        exec(code, values)
        torch.testing.assert_close(logits(values["model"]), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(open_source(str(tmp_path / "run" / "export-adapter"), [f"model.path={folders(name)}", "model.precision=fp32",
        f"model.rope={rope}"]).policy.causal_lm), expected)  # fmt: skip


def test_a_teachers_adapter_has_the_names_of_the_composite_model_too(folders, tmp_path):
    policy = train(folders("gemma3"), target_modules=["q_proj"])
    expected = logits(policy.causal_lm)
    policy.save(tmp_path / "adapter")
    own = load_policy(ModelConfig(str(folders("gemma3"))), LoraConfig(r=2, target_modules=["v_proj"]), dtype=torch.float32, temperature=1.0)
    config = RunConfig(teacher=TeacherConfig(adapter=str(tmp_path / "adapter"), coef=1.0))
    teacher = load_teacher(config, own, torch.float32, torch.device("cpu"))
    with teacher.active() as active:
        assert torch.equal(logits(active.causal_lm), expected)
    own.save(tmp_path / "own")
    check_both(folders("gemma3"), tmp_path / "own", own, has_effect=False)


def test_a_teachers_adapter_that_lacks_a_weight_is_refused(folders, tmp_path):
    policy = train(folders("gemma3"), target_modules=["q_proj", "v_proj"])
    policy.save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = min(weights)
    save_file({key: x for key, x in weights.items() if key != name}, file)
    config = RunConfig(teacher=TeacherConfig(adapter=str(tmp_path / "adapter"), coef=1.0))
    with pytest.raises(ConfigError, match=r"\(teacher.adapter\) does not fit the model .*: its files lack the weight model.layers.0.self_attn.q_proj"):
        load_teacher(config, policy, torch.float32, torch.device("cpu"))


def test_an_adapter_in_the_names_of_the_text_model_opens_too(folders, tmp_path):
    """As runs wrote it before."""
    policy = train(folders("gemma3"), target_modules=["q_proj"])
    policy.model.save_pretrained(tmp_path / "adapter")
    again = load_policy(ModelConfig(str(folders("gemma3"))), LoraConfig(path=str(tmp_path / "adapter")), dtype=torch.float32, temperature=1.0)
    assert torch.equal(logits(again.causal_lm), logits(policy.causal_lm))


def test_a_list_of_targets_may_be_written_beside_the_adapter(folders, tmp_path):
    """As in a configuration file from which both runs start."""
    train(folders("gemma3"), target_modules=["q_proj", "v_proj", "lm_head"]).save(tmp_path / "adapter")
    lora = LoraConfig(path=str(tmp_path / "adapter"), r=4, alpha=8, dropout=0.0, target_modules=["v_proj", "self_attn.q_proj", "lm_head"])
    assert use_settings_of_adapter(lora, {"target_modules"}).target_modules != lora.target_modules
    for others in (["q_proj"], ["q_proj", "v_proj"], ["q_proj", "v_proj", "lm_head", "layers"]):
        with pytest.raises(ConfigError, match="lora.target_modules is .*, but the adapter"):
            use_settings_of_adapter(replace(lora, target_modules=others), {"target_modules"})


def test_the_expression_means_the_same_modules_in_both_models():
    inner = [f"model.layers.{i}.{x}" for i in (0, 1, 10) for x in ("mlp.up", "attn.q")] + ["model.layers.1.mlp.down", "lm_head", "model.norm"]
    pattern = _match_modules(inner, {"model": "model.text"})
    outer = [name.replace("model.", "model.text.", 1) for name in inner]
    for names in (inner, outer):
        assert all(re.fullmatch(pattern, name) for name in names)
    others = ["model.tower.layers.0.mlp.up", "model.layers.2.mlp.up", "model.layers.0.mlp.down", "text.layers.0.mlp.up", "model.layers.0.attn.qq"]
    assert not any(re.fullmatch(pattern, name) for name in others)
