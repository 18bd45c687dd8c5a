"""model.revision, model.rope, data.chat_template and data.chat_template_kwargs: the same in every command."""

import json
import shutil

import pytest
import torch
import transformers
import yaml
from fakes import Alphabet
from test_faults_of_models import SIZES, VOCAB, grouped_rollouts
from test_policy import naive_logprobs

from grpo_core.batch import Task
from grpo_core.commands import open_policy
from grpo_core.commands.open_policy import open_source
from grpo_core.config.files import load_overrides
from grpo_core.config.sections import DataConfig, LoraConfig, ModelConfig, RunConfig
from grpo_core.model import loading
from grpo_core.model.base_model import load_base_model
from grpo_core.model.loading import load_model_config, load_tokenizer_of
from grpo_core.model.policy import Policy, load_policy
from grpo_core.model.rope_effect import check_rope_effect
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError
from grpo_core.training.prepare import prepare

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=128, rope_parameters=LLAMA3)
    transformers.LlamaForCausalLM(config).save_pretrained(path / "llama3")
    config = transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    transformers.Gemma3ForCausalLM(config).save_pretrained(path / "gemma3")
    config = transformers.Phi3Config(**SIZES, num_key_value_heads=2, max_position_embeddings=64)
    config.save_pretrained(path / "phi3")
    return path


@pytest.mark.parametrize("rope, whole", [
    (YARN, {**YARN, "rope_theta": 1e4, "original_max_position_embeddings": 64}),
    ({"rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e6}),
    ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
])  # fmt: skip
def test_rope_is_laid_over_the_models_own(folder, rope, whole):
    """Log-probs are those of plain transformers with the whole mapping, in trainer and sampler; plain ones differ."""
    model = ModelConfig(str(folder), rope=rope)
    policy = load_policy(model, LoraConfig(r=2), dtype=torch.float32, temperature=1.0)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, rope_parameters=dict(whole)).eval()
    rollouts = grouped_rollouts(vocabulary=VOCAB)
    want = naive_logprobs(Policy(plain), rollouts)
    torch.testing.assert_close(policy.logprobs(rollouts), want, atol=1e-4, rtol=0)
    sampler = Sampler(policy.model, Alphabet(), max_new_tokens=20)
    drawn = sampler.generate([Task(0, "p", [5, 6, 7], {}, seed=(0, 0, 0))], 4)
    assert sampler.decoder_name == "fused"
    naive = naive_logprobs(Policy(plain), drawn) * drawn.completion_mask
    torch.testing.assert_close(drawn.rollout_logprobs, naive, atol=1e-4, rtol=0)
    other = Policy(load_base_model(ModelConfig(str(folder)), torch.float32))
    assert not torch.allclose(other.logprobs(rollouts), want, atol=1e-3)
    assert load_model_config(model).max_position_embeddings == int(64 * rope.get("factor", 1))


def test_another_type_drops_the_old_types_parameters_and_the_same_keeps_them(folder):
    """llama3's frequencies are nothing to yarn."""
    config = load_model_config(ModelConfig(str(folder / "llama3"), rope=YARN))
    assert config.rope_parameters == {**YARN, "rope_theta": 5e5, "original_max_position_embeddings": 16}
    config = load_model_config(ModelConfig(str(folder / "llama3"), rope={"factor": 4.0}))
    assert config.rope_parameters == {**LLAMA3, "factor": 4.0} and config.max_position_embeddings == 128
    config = load_model_config(ModelConfig(str(folder / "gemma3"), rope={"full_attention": {"rope_type": "linear", "factor": 8.0}}))
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"


REFUSED = {
    "model.rope={rope_type: yarm, factor: 2.0}": "model.rope.rope_type is 'yarm'; known: .*did you mean yarn",
    "model.rope={rope_type: yarn, faktor: 2.0}": "unknown key model.rope.faktor, which rope_type yarn does not use; known: .*did you mean factor",
    "model.rope={factor: two}": "model.rope.factor is 'two'; it must be a number",
    "model.rope={factor: 0.5}": "model.rope.factor is 0.5; it must be at least 1",
    "model.rope={rope_theta: 0}": "model.rope.rope_theta is 0; it must be above 0",
    "model.rope={full_attention: {rope_type: yarn, low_freq_factor: 1.0}}": "unknown key model.rope.full_attention.low_freq_factor",
    "data.prompt=chat data.chat_template=nowhere.jinja": "data.chat_template is 'nowhere.jinja': there is no such file",
    "data.chat_template={{x}}": "data.chat_template is set, but data.prompt is template, which uses no chat template",
    "data.chat_template_kwargs={enable_thinking: false}": "data.chat_template_kwargs is .*, but data.prompt is template",
    "data.prompt=chat data.chat_template_kwargs={tokenize: true}": "data.chat_template_kwargs has 'tokenize', which is set by the prompt",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_mistakes_are_refused_before_a_model_loads(words):
    """One sentence that names the key."""
    *first, last = words.split(" data.chat") if words.startswith("data.prompt") else [words]
    given = [*first, f"data.chat{last}"] if first else [last]
    with pytest.raises(ConfigError, match=REFUSED[words]):
        load_overrides(given)


def test_what_does_not_fit_the_model_is_refused_before_its_weights_load(folder):
    """A missing parameter, a layer type, a model without rotary embeddings, a folder's revision."""
    for path, rope, sentence in (
        (folder, {"rope_type": "llama3", "factor": 2.0}, "model.rope.rope_type is 'llama3', which needs low_freq_factor"),
        (folder / "gemma3", YARN, "model.rope has 'rope_type', but this model has parameters for each type of layer"),
        (folder / "gemma3", {"global": YARN}, "model.rope has 'global', .*known: full_attention, sliding_attention"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load_model_config(ModelConfig(str(path), rope=rope))
    with pytest.raises(ConfigError, match="model.revision is 'main', but model.path is .*, a folder, which has no revisions"):
        load_model_config(ModelConfig(str(folder), revision="main"))
    with pytest.raises(ConfigError, match="but the gpt2 model has no rotary embedding"):
        loading.override_rope(transformers.GPT2Config(), YARN)


HALF = {"partial_rotary_factor": 0.5}
IGNORED = "is 0.5, which changes nothing in this .* model; leave it out"


@pytest.mark.parametrize("name, rope, sentence", [
    ("", HALF, f"model.rope.partial_rotary_factor {IGNORED}"),
    ("", {**HALF, "rope_theta": 50.0}, f"model.rope.partial_rotary_factor {IGNORED}"),
    ("gemma3", {"full_attention": HALF}, f"model.rope.full_attention.partial_rotary_factor {IGNORED}"),
    ("", {**HALF, "rope_type": "linear", "factor": 2.0}, "model.rope is .*, with which the llama model fails: RuntimeError: "),
    ("phi3", HALF, None), ("", {"rope_theta": 1e4}, None), ("", {"rope_theta": 50.0, "partial_rotary_factor": 1.0}, None), ("", {}, None),
    ("", {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}, None), ("gemma3", {"sliding_attention": {"rope_theta": 50.0}}, None),
], ids=str)  # fmt: skip
def test_a_rotary_parameter_that_the_models_code_ignores_is_refused(folder, name, rope, sentence):
    """transformers takes it for every model; one with its own value is no mistake."""
    model = ModelConfig(str(folder / name), rope=rope)
    if sentence is None:
        check_rope_effect(model)
        return
    with pytest.raises(ConfigError, match=sentence):
        check_rope_effect(model)


def test_an_ignored_rotary_parameter_is_refused_before_weights_load():
    with pytest.raises(ConfigError, match=f"model.rope.partial_rotary_factor {IGNORED}"):
        prepare(RunConfig(model=ModelConfig(rope=HALF), data=DataConfig(limit=20)))


def test_the_commands_that_open_a_policy_refuse_it_too(monkeypatch):
    monkeypatch.setattr(open_policy, "load_policy", lambda *given, **options: pytest.fail("the weights were loaded"))
    with pytest.raises(ConfigError, match=f"model.rope.partial_rotary_factor {IGNORED}"):
        open_source("builtin:tiny", ["model.rope={partial_rotary_factor: 0.5}"])


def test_the_revision_reaches_every_file_of_the_model(monkeypatch):
    """Configuration, tokenizer and weights are asked for at the same revision."""
    asked = []

    def refuse(path, **options):
        asked.append(options.get("revision"))
        raise OSError("not here")

    for kind in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(getattr(loading, kind), "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    config = load_overrides(["model.path=org/name", "model.revision=v2"])
    for load in (lambda: load_tokenizer_of(config), lambda: load_model_config(config.model), lambda: load_base_model(config.model, torch.float32)):
        with pytest.raises(ConfigError):
            load()
    assert asked == ["v2"] * 3


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% if not thinks %}<quiet>{% endif %}{% endif %}"
SHORT = [
    "evaluation.num_tasks=4", "data.limit=50", "trainer.completions_per_step=16", "sampling.max_new_tokens=8", "data.template='{question}'",
]  # fmt: skip


@pytest.mark.slow
def test_every_command_renders_the_same_prompt(tmp_path, here):
    """train, dry run, sample, evaluate, sft, generate and export use the file's template with its variables."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "own.yaml").write_text(
        "base: tiny\ndata: {prompt: chat, chat_template: chat.jinja, chat_template_kwargs: {thinks: false}}\n"
        "model: {rope: {rope_type: yarn, factor: 2.0}}\n"
    )
    words = ["--config", tmp_path / "own.yaml", *SHORT, f"output_dir={tmp_path}", "trainer.num_steps=1"]
    preview = here("train", *words, "--dry-run")
    assert preview.returncode == 0 and "<me><quiet>" in preview.stdout, preview.stderr
    assert here("train", *words).returncode == 0
    (tmp_path / "chat.jinja").unlink()  # the run's own configuration has its content
    run = tmp_path / "tiny"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["chat_template"] == TEMPLATE
    row = json.loads((run / "completions.jsonl").read_text().splitlines()[0])
    assert row["prompt"].startswith("<user>") and row["prompt"].endswith("<me><quiet>")
    sampled = here("sample", run, "What is 1 + 1?")
    evaluated = here("evaluate", run, "--limit", "2")
    assert (sampled.returncode, evaluated.returncode) == (0, 0), sampled.stderr + evaluated.stderr
    opened = open_source(str(run))
    assert opened.policy.causal_lm.config.rope_parameters["rope_type"] == "yarn"
    prompts = []
    generate = Sampler.generate
    opened.sampler.generate = lambda tasks, *args, **kwargs: prompts.extend(tasks) or generate(opened.sampler, tasks, *args, **kwargs)
    opened.generate([[{"role": "user", "content": "x"}]], max_new_tokens=2)
    assert prompts[0].prompt == "<user>x<me><quiet>"
    assert here("export", run).returncode == 0
    exported = transformers.AutoConfig.from_pretrained(run / "export")
    assert exported.rope_parameters["rope_type"] == "yarn"
    assert transformers.AutoTokenizer.from_pretrained(run / "export").chat_template == TEMPLATE
    shutil.rmtree(run / "export")
    assert here("export", run, "--adapter").returncode == 0
    card = (run / "export-adapter" / "README.md").read_text()
    assert "'rope_type': 'yarn'" in card and "<me><quiet>" in card
    refused = here(
        "train", "--config", "tiny", f"output_dir={tmp_path}", "name=refused", "data.prompt=chat", "data.chat_template={{ messages }}",
        "data.chat_template_kwargs={x: 1}",
    )  # fmt: skip
    assert "data.chat_template_kwargs has 'x', which the model's chat template does not read" in refused.stderr
