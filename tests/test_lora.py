"""The section lora as PEFT has it: every option against plain transformers with PEFT, and what is refused."""

import copy
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
import yaml
from fakes import EOS, Alphabet
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from safetensors.torch import load_file
from test_faults_of_models import EXPERTS, SIZES, VOCAB
from test_packing import forwards, grouped_rollouts
from test_policy import naive_logprobs

from grpo_core.batch import Task
from grpo_core.commands.open_policy import open_source
from grpo_core.config.files import load, load_overrides
from grpo_core.config.lora_checks import PEFT_DEFAULTS, PEFT_NAMES, read_adapter, use_settings_of_adapter
from grpo_core.config.sections import DataConfig, LoraConfig, ModelConfig, RunConfig
from grpo_core.model.adapter import load_adapter
from grpo_core.model.adapter_check import check_targets
from grpo_core.model.lora_targets import describe_untied
from grpo_core.model.policy import Policy, load_policy, wrap
from grpo_core.model.teacher import TEACHER_ADAPTER
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError
from grpo_core.training.prepare import prepare

ALL = {"target_modules": "all-linear"}
VARIANTS = {  # name -> (keys of the section, whether the fused decoder serves it)
    "rslora": ({"use_rslora": True, **ALL}, True),
    "patterns": ({
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"v_proj": 5.0},
        "target_modules": ["q_proj", "v_proj", "up_proj"],
    }, True),
    "layers": ({"layers_to_transform": [1]}, True),
    "exclude": ({"exclude_modules": ["o_proj"], **ALL}, True),
    "parameters": ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, True),
    "gaussian": ({"init_lora_weights": "gaussian"}, True),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, True),
    "random": ({"init_lora_weights": False}, True),
    "dora": ({"use_dora": True}, False),
    "head": ({"modules_to_save": ["lm_head"]}, False),
    "modules": ({"modules_to_save": ["embed_tokens", "norm"]}, False),
    "attention": ({"modules_to_save": ["self_attn"], "target_modules": ["up_proj"]}, False),
    "tokens": ({"trainable_token_indices": [3, 5]}, False),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
}  # fmt: skip
TASKS = [Task(i, "p", ids, {}, seed=(0, 0, i)) for i, ids in enumerate([[5, 6, 7], [8, 9], [4]])]


def qwen(tied):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
    return transformers.Qwen2ForCausalLM(config).eval()


def moved(base, lora):
    """A policy whose trained weights are away from where they start."""
    policy = wrap(base, ModelConfig(), lora, temperature=1.0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return policy


def in_plain_peft(policy, base, folder):
    """Base and exported adapter as plain PEFT opens them."""
    policy.save(folder)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()
    trained = [p for p in plain.parameters() if p.requires_grad]
    assert [p.shape for p in trained] == [p.shape for p in policy.parameters()]
    return plain, trained


def check_gradient(policy, plain, trained, rollouts):
    mask = rollouts.completion_mask
    with policy.training():
        logprobs = forwards(policy, rollouts)
        ours = torch.autograd.grad((logprobs * mask).sum(), policy.parameters(), allow_unused=True)
    naive = naive_logprobs(Policy(plain), rollouts)
    theirs = torch.autograd.grad((naive * mask).sum(), trained, allow_unused=True)
    torch.testing.assert_close(logprobs, naive, atol=1e-4, rtol=0)
    for mine, want in zip(ours, theirs, strict=True):
        assert (mine is None) == (want is None)
        assert want is None or (mine - want).norm() <= 1e-5 * want.norm()


REPRESENTATIVES = {False: ("patterns", "parameters", "dora", "attention", "tokens"), True: ("rslora", "tokens", "head")}
PAIRS = [  # the soak suite has all
    pytest.param(name, tied, marks=[] if name in REPRESENTATIVES[tied] else pytest.mark.soak)
    for tied in (False, True)
    for name in VARIANTS
]


@pytest.mark.parametrize("name, tied", PAIRS)
def test_every_option_computes_what_plain_peft_computes(name, tied, tmp_path):
    """Log-probs of trainer, sampler and reference to 1e-4 nats, the gradient to 1e-5, greedy completions equal."""
    keys, is_fused = VARIANTS[name]
    base, lora = qwen(tied), LoraConfig(r=4, alpha=8, **keys)
    untouched = copy.deepcopy(base)
    check_targets(base.config, lora)
    policy = moved(base, lora)
    plain, trained = in_plain_peft(policy, untouched, tmp_path)
    rollouts = grouped_rollouts(vocabulary=VOCAB)
    check_gradient(policy, plain, trained, rollouts)

    want = naive_logprobs(Policy(untouched), rollouts)
    with torch.no_grad():
        for start in (lambda: None, policy.start_reference):  # switched off, and as a moving reference starts
            start()
            with policy.reference():
                torch.testing.assert_close(forwards(policy, rollouts), want, atol=1e-4, rtol=0)
        policy.move_reference()
        with policy.reference():
            torch.testing.assert_close(forwards(policy, rollouts), naive_logprobs(Policy(plain), rollouts), atol=1e-4, rtol=0)

    notes = []
    sampler = Sampler(policy.model, Alphabet(), max_new_tokens=8, notify=notes.append)
    drawn, greedy = sampler.generate(TASKS, 3), sampler.generate(TASKS, 1, greedy=True)
    assert (sampler.decoder_name == "fused", len(notes)) == (is_fused, 0 if is_fused else 1)
    naive = naive_logprobs(Policy(plain), drawn) * drawn.completion_mask
    torch.testing.assert_close(drawn.rollout_logprobs, naive, atol=1e-4, rtol=0)
    modules = Sampler(policy.model, Alphabet(), max_new_tokens=8, decoder="modules", notify=notes.append)
    again = modules.generate(TASKS, 3)
    assert modules.decoder_name == "modules" and torch.equal(again.completion_ids, drawn.completion_ids)
    torch.testing.assert_close(again.rollout_logprobs, drawn.rollout_logprobs, atol=1e-4, rtol=0)
    for i, task in enumerate(TASKS):
        ids, length = torch.tensor([task.prompt_ids]), int(greedy.lengths()[i])
        out = plain.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=EOS, pad_token_id=0)
        assert out[0, len(task.prompt_ids) :][:length].tolist() == greedy.completion_ids[i, :length].tolist()


OVERLAPPING = {  # patterns of which another one is first after PEFT has sorted them
    "alpha": {"alpha_pattern": {"q_proj": 64.0, "layers.0.*proj": 4.0}},
    "rank": {"rank_pattern": {"q_proj": 8, "layers.0.*proj": 3}},
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_the_first_pattern_of_several_counts_in_the_file_of_an_adapter_too(name, tmp_path):
    """PEFT takes the first pattern that matches a module, and sorts them when it writes adapter_config.json."""
    base, lora = qwen(False), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **OVERLAPPING[name])
    untouched = copy.deepcopy(base)
    check_targets(base.config, lora)
    policy = moved(base, lora)
    plain, _ = in_plain_peft(policy, untouched, tmp_path)
    rollouts = grouped_rollouts(vocabulary=VOCAB)
    torch.testing.assert_close(naive_logprobs(Policy(plain), rollouts), policy.logprobs(rollouts), atol=1e-4, rtol=0)
    file = tmp_path / "adapter_config.json"  # its own order counts for an adapter that another program wrote
    file.write_text(json.dumps({**json.loads(file.read_text()), **OVERLAPPING[name]}))
    loaded = load_adapter(copy.deepcopy(untouched), tmp_path, "a model")
    plain, _ = in_plain_peft(Policy(loaded), untouched, tmp_path / "again")
    torch.testing.assert_close(naive_logprobs(Policy(plain), rollouts), policy.logprobs(rollouts), atol=1e-4, rtol=0)


def test_experts_are_adapted_by_the_names_of_their_weights(tmp_path):
    """lora.target_parameters reaches packed experts, on the plain path."""
    torch.manual_seed(0)
    base = EXPERTS["qwen3_moe"]().eval()
    untouched = copy.deepcopy(base)
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    check_targets(base.config, lora)
    policy = moved(base, lora)
    assert any("experts" in name for name, p in policy.model.named_parameters() if p.requires_grad)
    check_gradient(policy, *in_plain_peft(policy, untouched, tmp_path), grouped_rollouts(vocabulary=VOCAB))


@pytest.mark.parametrize("name", ["dora", "modules", "patterns"])
def test_a_teachers_adapter_computes_without_anything_that_the_policy_trains(name, tmp_path):
    """The teacher is the base with its own adapter: no copy of a module and no token of the policy's is in it."""
    base, other = qwen(True), moved(qwen(True), LoraConfig(r=2, target_modules=["v_proj"]))
    other.save(tmp_path)
    policy = moved(base, LoraConfig(r=4, alpha=8, **VARIANTS[name][0]))
    rollouts = grouped_rollouts(vocabulary=VOCAB)
    own, names = policy.logprobs(rollouts), [n for n, p in policy.model.named_parameters() if p.requires_grad]
    policy.model.load_adapter(tmp_path, TEACHER_ADAPTER, is_trainable=False, autocast_adapter_dtype=False)
    with policy.evaluating(TEACHER_ADAPTER):
        torch.testing.assert_close(policy.logprobs(rollouts), other.logprobs(rollouts), atol=1e-4, rtol=0)
    torch.testing.assert_close(policy.logprobs(rollouts), own)
    with policy.reference():
        pass
    assert [n for n, p in policy.model.named_parameters() if p.requires_grad] == names


REFUSED = {
    "lora.r=0 lora.use_dora=true": "lora.use_dora is True, but lora.r is 0, so there is no adapter",
    "lora.layers_to_transform=[0] lora.target_modules=all-linear": "lora.layers_to_transform is .0., but lora.target_modules is 'all-linear'",
    "lora.layers_to_transform=[]": "lora.layers_to_transform is ..; it must name at least one, or be null",
    "lora.layers_to_transform=[-1]": "lora.layers_to_transform names -1; layers are numbered from 0",
    "lora.target_modules=[]": "lora.target_modules is ..; it must name at least one module",
    "lora.exclude_modules=(": "lora.exclude_modules is '.'; it must be a list, or a regular expression",
    "lora.modules_to_save=[q_proj]": "lora.modules_to_save names 'q_proj', and so does lora.target_modules",
    "lora.rank_pattern={q_proj: 0}": "lora.rank_pattern.q_proj is 0; it must be at least 1",
    "lora.rank_pattern={q_proj: 2.5}": "lora.rank_pattern.q_proj is 2.5; it must be an integer",
    "lora.alpha_pattern={q_proj: 0}": "lora.alpha_pattern.q_proj is 0.0; it must be above 0",
    "lora.rank_pattern={'(?i)Q_PROJ': 2}": "lora.rank_pattern names '..i.Q_PROJ', which cannot be the end of a longer regular expression",
    "lora.rank_pattern={'(': 2}": "lora.rank_pattern is '.'; it must be a mapping of module names or regular expressions",
    "lora.init_lora_weights=pissa": "lora.init_lora_weights is 'pissa'; it must be true or false or one of gaussian, orthogonal",
    "lora.init_lora_weights=orthogonal lora.r=3": "lora.r is 3; with lora.init_lora_weights orthogonal it must be even",
    "lora.init_lora_weights=orthogonal lora.rank_pattern={q_proj: 3}": "lora.rank_pattern.q_proj is 3; with",
    "lora.target_parameters=[q_proj.weight] lora.dropout=0.1": "lora.dropout is 0.1 with lora.target_parameters",
    "lora.target_parameters=[q_proj.weight] lora.use_dora=true": "lora.use_dora is True with lora.target_parameters",
    "lora.target_parameters=[q_proj.weight] lora.init_lora_weights=orthogonal": "lora.init_lora_weights is 'orthogonal' with",
    "lora.trainable_token_indices=['<|im_start|>']": "lora.trainable_token_indices is .*; it must be a list of integers, a mapping or null",
    "lora.trainable_token_indices=[3, 3]": "lora.trainable_token_indices is .3, 3.; it must be token ids",
    "lora.trainable_token_indices={embed_tokens: []}": "lora.trainable_token_indices.embed_tokens is ..; it must name at least one",
    "lora.trainable_token_indices={}": "lora.trainable_token_indices is ..; it must name at least one",
    "lora.trainable_token_indices=[3] teacher.adapter=x": "teacher.adapter is 'x' with teacher.path null, but lora.trainable_token_indices",
    "lora.path=nowhere": "lora.path is 'nowhere': there is no folder nowhere",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_peft_refuses_or_ignores_is_refused_before_a_model_loads(words):
    """One sentence that names the key."""
    with pytest.raises(ConfigError, match=REFUSED[words]):
        load_overrides(re.findall(r"\S+=.+?(?= [a-z_.]+=|$)", words))


@pytest.mark.parametrize("names, sentence", [
    (["lm_head"], "lora.modules_to_save trains a copy of lm_head, which is then no longer tied to model.embed_tokens; that stays frozen"),
    (["embed_tokens"], "lora.modules_to_save trains a copy of model.embed_tokens, which is then no longer tied to lm_head; that stays frozen"),
    (["embed_tokens", "lm_head"], "lora.modules_to_save trains a copy of model.embed_tokens and one of lm_head, which are no longer tied"),
    (["norm"], None),
])  # fmt: skip
def test_a_copy_that_unties_the_head_is_said(names, sentence):
    """PEFT trains the copy apart from the weight that it was tied to."""
    assert describe_untied(moved(qwen(True), LoraConfig(r=2, modules_to_save=names)).model) == sentence
    assert describe_untied(moved(qwen(False), LoraConfig(r=2, modules_to_save=names)).model) is None


UNFIT = [
    ({"modules_to_save": ["lm_haed"]}, r"lora.modules_to_save names 'lm_haed', which the model does not have; known: .*did you mean lm_head"),
    ({"exclude_modules": ["p_proj"]}, "lora.exclude_modules names 'p_proj', which the model does not have"),
    ({"exclude_modules": "x.*"}, "lora.exclude_modules is 'x.*', which matches no module"),
    ({"target_parameters": ["q_proj.wieght"]}, "lora.target_parameters names 'q_proj.wieght', .*did you mean q_proj.weight"),
    ({"layers_to_transform": [1, 2]}, "lora.layers_to_transform names 2, but the model has no module to adapt in a layer"),
    ({"rank_pattern": {"up_proj": 2}}, "lora.rank_pattern names 'up_proj', which is the first match of no module with an adapter"),
    ({"alpha_pattern": {".*": 2.0, "q_proj": 3.0}}, "lora.alpha_pattern names 'q_proj', which is the first match of no"),
    ({"trainable_token_indices": [VOCAB]}, f"lora.trainable_token_indices names the token {VOCAB}, but the model has only {VOCAB} embeddings"),
    ({"trainable_token_indices": {"wte": [1]}}, "lora.trainable_token_indices names 'wte', which is no embedding; known: embed_tokens"),
    ({"trainable_token_indices": {"embed_tokens": [1]}, "modules_to_save": ["embed_tokens"]}, "lora.modules_to_save is"),
    ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "lora.trainable_token_indices trains tokens of model.embed_tokens, which lora.modules_to_save trains whole"),
    ({"modules_to_save": ["layers"]}, "lora.modules_to_save is"),
    ({"modules_to_save": ["norm", "rotary_emb"]}, "lora.modules_to_save names 'rotary_emb', but model.rotary_emb has no weights to train"),
    ({"exclude_modules": ["up_proj"]}, "lora.exclude_modules names 'up_proj', which leaves out no module that would get an adapter; known: k_proj, o_proj, q_proj, v_proj"),
    ({"exclude_modules": ["k_proj", "lm_head"], **ALL}, "lora.exclude_modules names 'lm_head', which leaves out no module"),
    ({"exclude_modules": ".*mlp.*"}, "lora.exclude_modules names '.*mlp.*', which leaves out no module"),
    ({"target_modules": ".*"}, "lora.target_modules is '..', which names the whole model, a Qwen2ForCausalLM; LoRA adapts linear layers"),
    ({"target_modules": ["q_proj", "model"]}, "lora.target_modules is .*, which names model, a Qwen2Model; LoRA adapts linear layers"),
    ({"target_modules": ["norm"]}, "lora.target_modules is .*, which names model.norm, a Qwen2RMSNorm; LoRA adapts linear layers"),
    ({"target_parameters": ["input_layernorm.weight"]}, "lora.target_parameters names 'input_layernorm.weight', but model.layers.0.input_layernorm.weight has 1 dimension"),
    ({"target_parameters": ["up_proj.weight"], **ALL}, "lora.target_parameters is .*, which names a weight of model.layers.0.mlp.up_proj, to which lora.target_modules"),
    ({"target_modules": ["embed_tokens"], "init_lora_weights": "orthogonal"}, "lora.init_lora_weights is 'orthogonal', which PEFT does not apply to"),
]  # fmt: skip


@pytest.mark.parametrize("keys, sentence", UNFIT)
def test_what_the_model_does_not_have_is_refused_before_its_weights_load(keys, sentence):
    """PEFT ignores a part of these, or warns."""
    with pytest.raises(ConfigError, match=sentence):
        check_targets(qwen(False).config, LoraConfig(r=4, **keys))


def test_modules_that_are_left_out_may_be_of_any_type():
    """PEFT leaves out what lora.exclude_modules and lora.modules_to_save name before it looks at a type."""
    for keys in (
        {"target_modules": ".*self_attn.*", "exclude_modules": ".*attn"},
        {"target_modules": ".*(proj|norm)", "modules_to_save": ["norm", "input_layernorm", "post_attention_layernorm"]},
        {"target_parameters": ["q_proj.weight"], "exclude_modules": ["q_proj"]},
    ):
        check_targets(qwen(False).config, LoraConfig(r=4, **keys))


@pytest.mark.parametrize("keys, sentence", [
    ({"modules_to_save": ["lm_head"]}, "trains tokens of lm_head, which lora.modules_to_save trains whole; take it out of one"),
    ({"target_modules": ["q_proj", "lm_head"]}, "trains tokens of lm_head, to which lora.target_modules gives an adapter"),
])  # fmt: skip
def test_the_tokens_of_a_tied_head_are_those_of_the_embeddings(keys, sentence):
    """PEFT trains them in both, beside what else the head is trained by: it then fails in the forward or the merge."""
    lora = LoraConfig(r=4, trainable_token_indices=[5], **keys)
    check_targets(qwen(False).config, lora)
    with pytest.raises(ConfigError, match=f"lora.trainable_token_indices {sentence}"):
        check_targets(qwen(True).config, lora)


def test_tokens_of_a_head_with_a_bias_are_refused():
    """PEFT computes such a head without its bias."""
    config = transformers.PhiConfig(**SIZES, num_key_value_heads=2)
    check_targets(config, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5]))
    with pytest.raises(ConfigError, match="trains tokens of lm_head, whose bias PEFT then leaves out"):
        check_targets(config, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": [5]}))


def test_an_adapter_to_start_from_brings_its_own_settings(tmp_path):
    """lora.path: the settings of its file fill in the section, and what contradicts them is refused by name."""
    base = qwen(True)
    base.save_pretrained(tmp_path / "model")
    policy = moved(base, LoraConfig(r=6, alpha=5, use_rslora=True, target_modules=["q_proj", "up_proj"], modules_to_save=["norm"]))
    policy.save(tmp_path / "adapter")
    rollouts, start = grouped_rollouts(vocabulary=VOCAB), f"lora.path={tmp_path}/adapter"
    lora = load_overrides([start, "lora.r=6"]).lora
    assert (lora.r, lora.alpha, lora.use_rslora, lora.modules_to_save) == (6, 5.0, True, ["norm"])
    assert sorted(lora.target_modules) == ["q_proj", "up_proj"]
    loaded = load_policy(ModelConfig(str(tmp_path / "model")), lora, dtype=torch.float32, temperature=1.0)
    torch.testing.assert_close(loaded.logprobs(rollouts), policy.logprobs(rollouts), atol=1e-5, rtol=0)
    with loaded.reference(), torch.no_grad():
        untouched = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(forwards(loaded, rollouts), naive_logprobs(Policy(untouched), rollouts), atol=1e-4, rtol=0)
    for word in ("lora.r=8", "lora.r=16", "lora.alpha=32", "lora.target_modules=[q_proj]", "lora.use_dora=true"):
        key = word.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"{key} is .*, but the adapter of lora.path .* has .*leave {key} out"):
            load_overrides([start, word])
    assert use_settings_of_adapter(LoraConfig(path=str(tmp_path / "adapter"))).r == 6
    (tmp_path / "own.yaml").write_text("lora: {r: 16, target_modules: all-linear}\nloss: {kl_coef: 0}\n")
    lora = load(tmp_path / "own.yaml", [start]).lora  # the file was written for another adapter
    assert (lora.r, sorted(lora.target_modules)) == (6, ["q_proj", "up_proj"])
    for words in (["lora.r=16"], ["lora.target_modules=all-linear"]):
        with pytest.raises(ConfigError, match="leave lora"):
            load(tmp_path / "own.yaml", [start, *words])
    (tmp_path / "own.yaml").write_text(f"lora: {{path: {tmp_path}/adapter, r: 16}}\n")
    with pytest.raises(ConfigError, match="leave lora.r out"):
        load(tmp_path / "own.yaml")
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    for changes, sentence in (
        ({"bias": "all"}, "cannot be trained here: its bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "its init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, "its peft_type is 'IA3', not LORA"),
    ):
        file.write_text(json.dumps(settings | changes))
        with pytest.raises(ConfigError, match=f"lora.path is .*{sentence}"):
            load_overrides([start])


def change_settings(folder, **changes):
    """Change settings in the file of an adapter; None takes one out."""
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_a_setting_that_an_adapters_file_lacks_is_pefts_default(tmp_path):
    """Also in the section that a checkpoint of the run is opened with."""
    lora = LoraConfig(r=8, alpha=8, dropout=0.0, target_modules=["q_proj"])
    base, policy = qwen(False), moved(qwen(False), lora)
    policy.save(tmp_path)
    change_settings(tmp_path, **dict.fromkeys([
        "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
    ]))  # fmt: skip
    read = use_settings_of_adapter(LoraConfig(path=str(tmp_path)))
    assert replace(read, path=None) == lora
    rollouts = grouped_rollouts(vocabulary=VOCAB)
    loaded, again = Policy(load_adapter(copy.deepcopy(base), tmp_path, "a model")), wrap(base, ModelConfig(), read, temperature=1.0)
    with torch.no_grad():
        for p, value in zip(again.parameters(), loaded.parameters(), strict=True):
            p.copy_(value)
    torch.testing.assert_close(again.logprobs(rollouts), loaded.logprobs(rollouts))
    own = {name for name in LoraConfig.__dataclass_fields__ if name not in ("path", "target_modules")}
    defaults = {name: PEFT_DEFAULTS.get(name, getattr(LoraConfig(), name)) for name in own}
    assert defaults == {name: getattr(PeftLoraConfig(), PEFT_NAMES.get(name, name)) for name in own}


@pytest.mark.parametrize("changes, sentence", [
    ({"lora_alpha": "8"}, "lora_alpha in the adapter .* is '8'; it must be a number, and not text"),
    ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern in the adapter .* is {'q_proj': '8'}; it must be a number, and not text"),
    ({"r": "4"}, "r in the adapter .* is '4'; it must be an integer"),
    ({"rank_pattern": []}, r"rank_pattern in the adapter .* is \[\]; it must be a mapping"),
])  # fmt: skip
def test_a_setting_of_a_wrong_type_is_refused_wherever_an_adapter_is_read(tmp_path, changes, sentence):
    moved(qwen(False), LoraConfig(r=4, target_modules=["q_proj"])).save(tmp_path)
    change_settings(tmp_path, **changes)
    for read in (
        lambda: load_overrides([f"lora.path={tmp_path}"]),
        lambda: read_adapter("teacher.adapter", str(tmp_path)),
        lambda: open_source(str(tmp_path), ["model.path=builtin:tiny"]),
    ):
        with pytest.raises(ConfigError, match=sentence):
            read()
    with pytest.raises(ConfigError, match="the adapter in .* does not fit the model a model: "):
        load_adapter(qwen(False), tmp_path, "a model")


@pytest.mark.parametrize("base, is_other", [
    ("Qwen/Qwen2.5-7B", True), ("elsewhere/grpo_core/builtin/tiny", False), ("builtin:tiny", False), ("", False), (None, False), (3, False),
])  # fmt: skip
def test_an_adapter_of_another_base_is_named(tmp_path, base, is_other):
    moved(qwen(False), LoraConfig(r=4, target_modules=["q_proj"])).save(tmp_path)
    change_settings(tmp_path, base_model_name_or_path=base)
    config = RunConfig(lora=LoraConfig(path=str(tmp_path)), data=DataConfig(limit=20))
    sentence = f"lora.path is {str(tmp_path)!r}, an adapter of the model {base}, and it is used with builtin:tiny"
    assert (sentence in prepare(config).warnings) == is_other


SHORT = [
    "evaluation.num_tasks=8", "data.limit=100", "trainer.completions_per_step=16", "sampling.max_new_tokens=16",
    "reference.every=1", "reference.mixing=0.5", "engine.learning_rate=1e-3", "engine.warmup_steps=0",
]  # fmt: skip
WIDE = [
    "lora.use_dora=true", "lora.use_rslora=true", "lora.modules_to_save=[norm]", "lora.trainable_token_indices=[5, 6]",
    "lora.rank_pattern={q_proj: 4}", "lora.target_modules=[q_proj, up_proj]",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_with_all_of_them_resumes_bitwise_exports_and_is_started_from(tmp_path, here):
    """Checkpoint, resume, moving reference, merged export, and another run from its adapter."""
    words = ["train", "--config", "tiny", *SHORT, *WIDE, f"output_dir={tmp_path}"]
    whole = [*words, "name=whole", "trainer.num_steps=2", "checkpoint.every=1"]
    assert here(*whole).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in ("checkpoints/step-000002", "adapter"):
        shutil.rmtree(tmp_path / "cut" / folder)
    assert here("train", f"resume={tmp_path}/cut").returncode == 0
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {name.rpartition(".")[2] for name in one} >= {"trainable_tokens_delta", "lora_magnitude_vector", "weight"}
    exported = here("export", tmp_path / "whole")
    assert exported.returncode == 0, exported.stderr
    again = here(*words[:3], *SHORT, f"output_dir={tmp_path}", "name=next", "trainer.num_steps=2", "checkpoint.every=1", f"lora.path={tmp_path}/whole/adapter",
                 "lora.target_modules=[q_proj, up_proj]")  # fmt: skip
    assert again.returncode == 0, again.stderr
    section = yaml.safe_load((tmp_path / "next" / "config.yaml").read_text())["lora"]
    assert section["use_dora"] and section["rank_pattern"] == {"q_proj": 4} and section["trainable_token_indices"] == [5, 6]
    shutil.rmtree(tmp_path / "whole")  # neither a resumed run nor a look at it needs the adapter that it started from
    trained = load_file(tmp_path / "next" / "adapter" / "adapter_model.safetensors")
    for folder in ("checkpoints/step-000002", "adapter"):
        shutil.rmtree(tmp_path / "next" / folder)
    assert here("train", f"resume={tmp_path}/next").returncode == 0
    resumed = load_file(tmp_path / "next" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
    assert here("evaluate", tmp_path / "next", "--limit", "2").returncode == 0
