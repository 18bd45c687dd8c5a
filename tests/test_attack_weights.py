"""Files of models and adapters that lack weights, hold others, or name tokens that the model does not have."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_core.commands.open_policy import open_source
from grpo_core.config.sections import DataConfig, LoraConfig, ModelConfig, RunConfig
from grpo_core.model.adapter import load_adapter
from grpo_core.model.base_model import load_base_model
from grpo_core.model.loading import BUILTIN, load_model_config, load_tokenizer
from grpo_core.model.policy import load_policy
from grpo_core.model.quantized_loading import adopt
from grpo_core.sampling.end_of_sequence import find_eos_ids
from grpo_core.schema import ConfigError, first_line
from grpo_core.training.prepare import prepare


@pytest.fixture
def model(tmp_path):
    """Copy the built-in model; return its folder and a function that changes keys of one of its JSON files."""
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN / "tiny", folder)

    def change(file="config.json", **keys):
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **keys}))
        return ModelConfig(str(folder))

    return folder, change


def change_weights(folder, change, file="model.safetensors"):
    weights = load_file(folder / file)
    save_file({name: value.clone() for name, value in change(weights).items()}, folder / file, metadata={"format": "pt"})


def test_attack_1_weights_that_the_files_lack_are_never_random(model):
    folder, change = model
    start = f"model.path is {str(folder)!r}, and it cannot be loaded: its files lack the weight "
    with pytest.raises(ConfigError, match=re.escape(f"{start}lm_head.weight, which would be random numbers")):
        load_base_model(change(tie_word_embeddings=False), torch.float32)
    layers = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    with pytest.raises(ConfigError, match=re.escape(f"{start}model.layers.2.input_layernorm.weight and 11 others, which")):
        load_base_model(change(tie_word_embeddings=True, **layers), torch.float32)
    with pytest.raises(ConfigError, match="its files lack the weight"):
        open_source(str(folder))


@pytest.mark.parametrize("keys, sentence", [
    ({"vocab_size": 700}, "the weight model.embed_tokens.weight has the size [496, 192] in the model's files, but [700, 192] by its"),
    ({"intermediate_size": 64}, "and 5 others; use the config.json that belongs to the weights"),
    ({"pad_token_id": 9_999}, "Padding_idx must be within num_embeddings"),
    ({"hidden_act": "nope"}, "hidden_act in its config.json is 'nope', which transformers does not know"),
    ({"num_attention_heads": 0}, "ZeroDivisionError: integer division or modulo by zero"),
])  # fmt: skip
def test_attack_1_a_configuration_that_does_not_fit_the_weights_is_a_sentence(model, keys, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)) as error:
        load_base_model(model[1](**keys), torch.float32)
    assert str(error.value).startswith(f"model.path is {str(model[0])!r}, and it cannot be loaded: ")


ROPE = {"rope_theta": 1e4}
LONG = {**ROPE, "rope_type": "longrope", "original_max_position_embeddings": 64}
CONFIGS = {  # changes of config.json, and what is wrong
    "type of a number": ({"hidden_size": "32"}, "its config.json cannot be used: Validation error for field 'hidden_size'"),
    "dtype": ({"dtype": "float7"}, "dtype in its config.json is 'float7', which transformers does not know"),
    "layers": ({"num_hidden_layers": 0, "layer_types": []}, "num_hidden_layers in its config.json is 0; it must be at least 1"),
    "activation": ({"hidden_act": "nope"}, "hidden_act in its config.json is 'nope', which transformers does not know"),
    "rotation": ({"rope_parameters": {**ROPE, "rope_type": "weird"}}, "rope_parameters.rope_type in its config.json is 'weird'"),
    "no rotation": ({"rope_parameters": {**ROPE, "rope_type": None}}, "rope_parameters.rope_type in its config.json is None"),
    "factors": ({"rope_parameters": {**LONG, "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}}, "the rotary embedding has 3 numbers in short_factor and 3 in long_factor; both must have 16"),
    "a factor": ({"rope_parameters": {**LONG, "short_factor": [1.0] * 16, "long_factor": [1.0] * 3}}, "the rotary embedding has 16 numbers in short_factor and 3 in long_factor"),
    "kind": ({"model_type": "t5"}, "transformers has no causal language model of the type t5"),
    "quantisation": ({"quantization_config": "x"}, "quantization_config in its config.json is 'x'; it must be a mapping with a quant_method"),
    "no method": ({"quantization_config": {}}, "quantization_config in its config.json is {}; it must be a mapping with a quant_method"),
    "code": ({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}, "it has code of its own; set model.trust_remote_code to true"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fault_of_the_configuration_is_called_one_before_weights_load(model, name, monkeypatch):
    """Also where the tokenizer, which reads it too, is loaded first."""
    changes, sentence = CONFIGS[name]
    monkeypatch.setattr("grpo_core.model.base_model.AutoModelForCausalLM.from_pretrained", None)
    data = DataConfig(limit=20)
    with pytest.raises(ConfigError, match=f"^model.path is {str(model[0])!r}, and it cannot be loaded: {sentence}"):
        prepare(RunConfig(model=model[1](**changes), data=data))


def test_the_factors_of_the_key_are_named_by_the_key(model):
    rope = {**LONG, "short_factor": [1.0] * 16, "long_factor": [1.0] * 3}
    with pytest.raises(ConfigError, match="^model.rope is .*, with which the rotary embedding has 16 numbers in short_factor and 3"):
        prepare(RunConfig(model=ModelConfig(str(model[0]), rope=rope), data=DataConfig(limit=20)))


def test_weights_that_are_not_quantised_as_the_configuration_says_are_refused(model):
    pytest.importorskip("bitsandbytes")
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    sentence = "whose config.json has a quantization_config of bitsandbytes, but whose weights are not in 4 bits"
    config = model[1](quantization_config=stored)
    with pytest.raises(ConfigError, match=sentence):
        prepare(RunConfig(model=config, data=DataConfig(limit=20)))
    layer = torch.nn.Linear(2, 2)
    layer.__class__ = type("Linear4bit", (torch.nn.Linear,), {})
    network = torch.nn.Sequential(layer)
    network.hf_quantizer = object()  # as of a model of the hub
    with pytest.raises(ConfigError, match=f"model.path is 'me/model', {sentence}.* [(]0[)]"):
        adopt(network, "me/model")


class Other:
    """An object that is no weight."""


@pytest.mark.parametrize("content, sentence", [
    (lambda weights: [1, 2], "pytorch_model.bin holds a list and no mapping of names to weights"),
    (lambda weights: {**weights, "x": Other()}, "pytorch_model.bin is damaged, or holds objects other than weights"),
    (None, "pytorch_model.bin is damaged, or holds objects other than weights"),
])  # fmt: skip
def test_weights_in_the_older_format_that_cannot_be_read_are_named(model, content, sentence, tmp_path):
    folder, change = model
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    file.write_bytes(b"junk") if content is None else torch.save(content(weights), file)
    with pytest.raises(ConfigError, match=f"and it cannot be loaded: {sentence}") as error:
        load_base_model(change(), torch.float32)
    assert "weights_only" not in str(error.value)
    policy = load_policy(ModelConfig(), LoraConfig(target_modules=["q_proj"]), dtype=torch.float32, temperature=1.0)
    policy.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    shutil.copy(file, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ConfigError, match=f"does not fit the model a model: {sentence.replace('pytorch', 'adapter')}"):
        load_adapter(load_base_model(ModelConfig(), torch.float32), tmp_path / "adapter", "a model")


def test_attack_1_running_out_of_memory_is_no_mistake_of_the_configuration(model, monkeypatch):
    def refuse(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("grpo_core.model.base_model.AutoModelForCausalLM.from_pretrained", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        load_base_model(model[1](), torch.float32)


def test_attack_1_weights_that_are_not_used_and_heads_that_are_not_tied_are_named(model, capsys):
    folder, change = model
    load_base_model(change(), torch.float32)
    assert capsys.readouterr().out == ""
    load_base_model(change(num_hidden_layers=1, layer_types=["full_attention"]), torch.float32)
    assert "note: the model does not use 12 weights of its files, such as model.layers.1.input" in capsys.readouterr().out
    change(num_hidden_layers=2, layer_types=["full_attention"] * 2)
    change_weights(folder, lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] * 2})
    load_base_model(change(), torch.float32)
    assert "ties the head to the embeddings (tie_word_embeddings), but its files hold a head" in capsys.readouterr().out


@pytest.mark.parametrize("file, ids, bad", [
    ("config.json", -1, -1),
    ("config.json", [1, 99_999], 99_999),
    ("generation_config.json", 496, 496),
])  # fmt: skip
def test_attack_1_an_end_of_sequence_token_that_the_model_cannot_draw_is_refused(model, file, ids, bad):
    folder, change = model
    config = change(file, eos_token_id=ids)
    sentence = f"eos_token_id in the model's {file} is {bad}; the model's token ids are 0 to 495"
    if file == "config.json":
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            prepare(RunConfig(model=config))
    policy = load_policy(config, LoraConfig(r=0), dtype=torch.float32, temperature=1.0)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        find_eos_ids(policy.causal_lm, load_tokenizer(str(folder)))


def test_attack_1_a_tokenizer_with_more_tokens_than_embeddings_is_refused_for_a_sample_too(model):
    folder, _ = model
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="the tokenizer has token ids up to 496, but the model has only 496 embeddings"):
        open_source(str(folder))


def test_attack_1_an_error_whose_first_line_ends_with_a_colon_is_told_whole(model):
    with pytest.raises(ConfigError, match="Validation error for field 'hidden_size': .*'wide'"):
        load_model_config(model[1](hidden_size="wide"))
    assert first_line(ValueError("a:\n\n  b\nc")) == "a: b" and first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError()) == "ValueError"


FIRST = "model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("change, sentence", [
    (lambda weights: {}, f"its files lack the weight {FIRST} and 7 others"),
    (lambda weights: {k: v for k, v in weights.items() if FIRST not in k}, f"its files lack the weight {FIRST}"),
    (lambda weights: {k.replace("base_model.", "other."): v for k, v in weights.items()}, f"its files lack the weight {FIRST} and 7 others"),
    (lambda weights: {**weights, "base_model.model.model.layers.7.x.lora_A.weight": torch.ones(1)}, "the model has no place for the weight model.layers.7.x.lora_A.weight"),
], ids=["empty", "one", "names", "more"])  # fmt: skip
def test_attack_1_an_adapter_that_is_loaded_in_part_is_refused(tmp_path, change, sentence):
    folder, lora = tmp_path / "adapter", LoraConfig(target_modules=["q_proj", "v_proj"])
    policy = load_policy(ModelConfig(), lora, dtype=torch.float32, temperature=1.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_()
    policy.save(folder)
    restored = load_policy(ModelConfig(), lora, dtype=torch.float32, temperature=1.0, adapter=folder)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), restored.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in restored.parameters())
    change_weights(folder, change, "adapter_model.safetensors")
    whole = f"the adapter in {folder} does not fit the model builtin:tiny: {sentence}"
    with pytest.raises(ConfigError, match=re.escape(whole) + "$"):
        load_policy(ModelConfig(), lora, dtype=torch.float32, temperature=1.0, adapter=folder)


@pytest.fixture
def adapter(tmp_path):
    """Write an adapter of the built-in model; return its folder and a function that sets the base that it names."""
    folder = tmp_path / "adapter"
    load_policy(ModelConfig(), LoraConfig(target_modules=["q_proj"]), dtype=torch.float32, temperature=1.0).save(folder)

    def name_base(base):
        values = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": base}))

    return folder, name_base


def test_attack_1_an_adapter_of_a_built_in_model_opens_in_every_folder(adapter, tmp_path, monkeypatch):
    folder, name_base = adapter
    monkeypatch.chdir(tmp_path)
    for base in ("grpo_core/builtin/tiny", "/nowhere/grpo_core/builtin/tiny"):
        name_base(base)
        assert open_source(str(folder)).config.model.path == "builtin:tiny"
    name_base("elsewhere/tiny/model")
    with pytest.raises(ConfigError, match="model.path is 'elsewhere/tiny/model': there is no folder"):
        open_source(str(folder))
    assert open_source(str(folder), ["model.path=builtin:tiny"]).has_adapter


@pytest.mark.parametrize("base", [None, "", 3])
def test_attack_1_an_adapter_that_names_no_base_is_a_sentence(adapter, base):
    folder, name_base = adapter
    name_base(base)
    with pytest.raises(ConfigError, match="names no base model .base_model_name_or_path.; set model.path"):
        open_source(str(folder))
    assert open_source(str(folder), ["model.path=builtin:tiny"]).has_adapter


def test_attack_1_an_adapter_keeps_its_base_beside_a_configuration_file(adapter, model, tmp_path):
    folder, name_base = adapter
    name_base(str(model[0]))
    file = tmp_path / "other.yaml"
    file.write_text("model: {path: builtin:tiny}\nsampling: {max_new_tokens: 7}\n")
    opened = open_source(str(folder), config=file)
    assert opened.config.model.path == str(model[0]) and opened.config.sampling.max_new_tokens == 7
    assert open_source(str(folder), ["model.path=builtin:tiny"], config=file).config.model.path == "builtin:tiny"
