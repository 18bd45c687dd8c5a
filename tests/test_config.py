from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from grpo_core.config.checks import prompts_per_rank
from grpo_core.config.files import dump, load
from grpo_core.config.sections import RunConfig
from grpo_core.training.deepspeed_config import deepspeed_config
from grpo_core.training.lr_schedule import learning_rate_schedule

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = CONFIGS / "tiny.yaml"
RUNS = [path for path in sorted(CONFIGS.glob("**/*.yaml")) if "\nvariants:" not in path.read_text()]  # those are studies


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_its_dump_is_equal(path, tmp_path):
    config = load(path)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config  # in another folder: it needs no file beside it
    deepspeed_config(config, torch.float32, 2)


@pytest.mark.parametrize("path, secret", [
    ("hf-internal-testing/tiny-random-LlamaForCausalLM", False), ("sk-learn-data/a-set-with-a-very-long-name-of-its-own", False),
    ("https://host/path/to/rows.jsonl", False), ("/data/hf_models_and_other_things_of_ours/qwen", False),
    ("https://me:word@host/rows.jsonl", True), ("ghp_" + 36 * "a", True), ("sk-proj-" + 40 * "b", True), ("x glpat-" + 20 * "c", True),
])  # fmt: skip
def test_what_looks_like_a_password_or_token(path, secret):
    if not secret:
        assert load(TINY, [f"data.path={path}"]).data.path == path
        return
    with pytest.raises(ValueError, match="data.path holds a password or token") as error:
        load(TINY, [f"data.path={path}"])
    assert path not in str(error.value)


def test_no_deepspeed_json_is_zero2s():
    def settings(*given):
        filled = deepspeed_config(load(TINY, given), torch.float16, 2)
        always = {"allgather_partitions", "reduce_scatter", "contiguous_gradients"}  # DeepSpeed's own defaults
        return {
            **filled,
            "zero_optimization": {k: v for k, v in filled["zero_optimization"].items() if k not in always},
        }

    assert settings("engine.deepspeed={}") == settings("engine.deepspeed=configs/ds_zero2.json")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_deepspeed_json_is_filled(path):
    filled = deepspeed_config(load(TINY, [f"engine.deepspeed={path}"]), torch.bfloat16, 2)
    assert '"auto"' not in str(filled).replace("'", '"')
    assert filled["bf16"]["enabled"] is True and filled["fp16"]["enabled"] is False
    assert filled["zero_optimization"]["overlap_comm"] is False
    assert filled["train_micro_batch_size_per_gpu"] == 1 and filled["gradient_clipping"] == 1.0


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml"])
def test_a_shipped_config_is_found_by_its_name_and_a_file_of_that_name_comes_first(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(name) == load(TINY)
    (tmp_path / name).write_text("name: mine")
    assert load(name).name == "mine"


def test_a_file_of_ones_own_may_be_based_on_a_shipped_config_and_name_a_shipped_deepspeed_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("base: tiny\nname: mine\nengine: {deepspeed: ds_zero1.json}")
    config = load("tiny.yaml")
    assert config.name == "mine" and config.lora == load(TINY).lora
    assert config.engine.deepspeed["zero_optimization"]["stage"] == 1
    (tmp_path / "ds_zero1.json").write_text("{}")
    assert load("tiny.yaml").engine.deepspeed == {}


@pytest.mark.parametrize("path", ["configs/tniy.yaml", "tniy", 300 * "x"])
def test_a_config_that_is_nowhere_is_refused_with_the_shipped_names(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"cannot read {path}: No such file .* known: dapo, .*, tiny, tiny_sft") as error:
        load(path)
    assert ("did you mean tiny?" in str(error.value)) == ("tniy" in path)


def test_the_first_config_names_and_comments_every_key():
    """tiny.yaml is the reference: no section or key of the dataclasses is missing."""
    written, known = yaml.safe_load(TINY.read_text()), asdict(RunConfig())
    assert written.keys() == known.keys()
    for section, keys in known.items():
        if isinstance(keys, dict):
            assert written[section].keys() == keys.keys(), section


def test_the_real_job_is_the_published_recipe():
    c = load(CONFIGS / "gsm8k_qwen2.5_1.5b.yaml")
    assert c.model.path == "eagle0504/qwen-distilled-scout-1.5b-instruct-gen2"
    assert c.data.path == "eagle0504/openai-gsm8k-enhanced-using-together-ai-deepseek-train8k-test1k-v1"
    assert (c.lora.r, c.lora.alpha, c.lora.dropout) == (16, 32, 0.1)
    assert c.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (c.engine.learning_rate, c.engine.warmup_steps, c.engine.max_grad_norm) == (5e-5, 100, 1.0)
    assert (c.trainer.epochs, c.trainer.tokens_per_micro_batch, c.trainer.completions_per_step) == (3, "auto", 64)
    assert (c.sampling.group_size, c.sampling.max_new_tokens, c.sampling.temperature) == (8, 256, 1.0)
    assert (c.data.max_prompt_tokens, c.loss.kl_coef, c.log.every, c.checkpoint.every) == (512, 0.04, 10, "epoch")
    offload = {"device": "cpu", "pin_memory": True}
    assert c.engine.deepspeed["zero_optimization"]["offload_optimizer"] == offload


@pytest.mark.parametrize(
    "override, message",
    [
        ("trainer.num_step=3", r"unknown key trainer.num_step; known: .*did you mean num_steps\?"),
        ("lossy.name=grpo", r"unknown key lossy"),
        ("name.x=1", r"unknown key name.x; name is a value and has no keys"),
        ("seed", r"'seed' is not an override"),
        ("seed=one", r"seed is 'one'; it must be an integer"),
        ("seed=true", r"seed is True; it must be an integer"),
        ("engine.schedule=cosin", r"engine.schedule is 'cosin'; it must be one of cosine, linear, constant"),
        ("trainer.tokens_per_micro_batch=0", r"trainer.tokens_per_micro_batch is 0; it must be at least 1"),
        ("sampling.group_size=1", r"sampling.group_size is 1; it must be at least 2"),
        ("sampling.temperature=0", r"sampling.temperature is 0.0; it must be above 0"),
        (
            "sampling.top_p=0.9",
            r"unknown key sampling.top_p; training samples from the whole distribution.*evaluation.top_p",
        ),
        ("sampling.rows_at_once=0", r"sampling.rows_at_once is 0; it must be at least 1"),
        ("evaluation.top_k=3", r"evaluation.top_k is 3, but evaluation.temperature is 0"),
        ("evaluation={temperature: 1, top_p: 2}", r"evaluation.top_p is 2.0; it must be above 0 and at most 1"),
        ("evaluation.temperature=-1", r"evaluation.temperature is -1.0; it must be at least 0"),
        ("loss.name=gppo", r"unknown loss 'gppo'; known: cispo, .*did you mean gspo"),
        ("loss.average=mean", r"unknown average 'mean'; known: constant, micro_token, row_sum, sequence, token"),
        ("loss.args={clip: 1}", r"unknown key loss.args.clip; known: clip_high, clip_low, delta"),
        ("advantage={name: grpo, args: {eps: small}}", r"advantage.args.eps is 'small'; it must be a number"),
        ("rewards=corect_answer", r"unknown reward 'corect_answer'.*did you mean correct_answer\?"),
        ("rewards=[]", r"rewards must name at least one"),
        ("rewards=[{weight: 1}]", r"rewards\[0\].name is missing"),
        ("rewards=[{name: combined, weight: 0}]", r"every weight is 0"),
        ("lora.r=0", r"loss.kl_coef is 0.01, but lora.r is 0"),
        ("engine.deepspeed=nowhere.json", r"cannot read nowhere.json: No such file"),
        (
            "trainer.micro_batch_size=4",
            r"unknown key trainer.micro_batch_size; use trainer.tokens_per_micro_batch",
        ),
        ("resume=maybe", r"resume is 'maybe'; it must be auto, force, null, or the folder of a run"),
        ("trainer.num_minibatches=3", r"num_minibatches is 3; it must divide sampling.group_size \(8\)"),
        ("trainer.num_steps=-3", r"trainer.num_steps is -3; it must be at least 1"),
        ("trainer.epochs=0", r"trainer.epochs is 0.0; it must be above 0"),
        ("engine.learning_rate=.nan", r"engine.learning_rate is nan; it must be a number"),
        ("engine.warmup_steps=-1", r"engine.warmup_steps is -1; it must be at least 0"),
        ("lora.dropout=1", r"lora.dropout is 1.0"),
        ("data.limit=0", r"data.limit is 0; it must be at least 1"),
        ("checkpoint.every=-1", r"checkpoint.every is -1; it must be at least 0"),
        ("evaluation.num_tasks=-5", r"evaluation.num_tasks is -5"),
    ],
)
def test_a_mistake_is_one_sentence(override, message):
    with pytest.raises(ValueError, match=message) as error:
        load(TINY, [override])
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*nothing.yaml: No such file"):
        load(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(ValueError, match=r"bad.yaml is not YAML"):
        load(tmp_path / "bad.yaml")


def test_text_stays_text_on_the_command_line():
    c = load(TINY, ["data.template={question}", "name=1", "data.system=yes", "data.eval_path=null", "model.path=a b"])
    assert (c.data.template, c.name, c.data.system) == ("{question}", "1", "yes")
    assert c.data.eval_path is None and c.model.path == "a b"
    assert load(TINY, ["data.template={question}\n"]).data.template == "{question}\n"


def test_shorthands():
    c = load(
        TINY, ["rewards=combined", "engine.learning_rate=5e-5", "lora.target_modules=all-linear", "trainer.epochs=2"]
    )
    assert [(r.name, r.weight) for r in c.rewards] == [("combined", 1.0)]
    assert c.engine.learning_rate == 5e-5 and c.lora.target_modules == "all-linear"
    assert isinstance(c.trainer.epochs, float)


def test_batch_arithmetic():
    c = load(TINY)
    assert (prompts_per_rank(c, 1), prompts_per_rank(c, 2)) == (16, 8)
    with pytest.raises(ValueError, match=r"completions_per_step is 128; it must be a multiple of .* = 8 × 3 = 24"):
        prompts_per_rank(c, 3)


@pytest.mark.parametrize(
    "json, message",
    [
        (
            {"train_micro_batch_size_per_gpu": 8},
            r"train_micro_batch_size_per_gpu is 8; it must be .auto., .*trainer.tokens_per_micro_batch",
        ),
        ({"train_batch_size": 64}, r"train_batch_size is 64, .*completions_per_step.* makes it 128"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping is 0.5, .*engine.max_grad_norm makes it 1.0"),
        ({"gradient_accumulation_steps": 8}, r"gradient_accumulation_steps is 8; it must be .auto., .*trainer.tokens_per_micro_batch"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled is True, .*model.precision \(auto\) makes it False"),
        ({"zero_optimization": {"stage": 3}}, r"stage is 3; it must be 1 or 2"),
        ({"zero_optimization": {"stage": 0}}, r"stage is 0; it must be 1 or 2"),
        ({"zero_optimization": {"stage": "2"}}, r"stage is '2'; it must be 1 or 2"),
        ({"wall_clock_breakdown": True}, r"has wall_clock_breakdown, .* remove it"),
        ({"optimizer": {"type": "AdamW"}}, r"block 'optimizer'; remove it"),
        ({"scheduler": {}}, r"block 'scheduler'; remove it"),
    ],
)
def test_a_contradicting_deepspeed_json_names_both_sides(json, message):
    with pytest.raises(ValueError, match=message):
        deepspeed_config(
            load(TINY, [f"engine.deepspeed={yaml.safe_dump(json, default_flow_style=True).strip()}"]), torch.float32, 2
        )


def test_an_agreeing_deepspeed_json_is_fine():
    json = "{train_batch_size: 128, gradient_clipping: 1.0}"
    filled = deepspeed_config(load(TINY, [f"engine.deepspeed={json}"]), torch.float32, 2)
    assert filled["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert "train_batch_size" not in filled and filled["managed_gradient_accumulation"] is False


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_from_above_zero_and_never_stops_before_the_end(kind):
    factors = [learning_rate_schedule(kind, 4, 20)(k) for k in range(20)]
    assert factors[:4] == [0.2, 0.4, 0.6, 0.8] and factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True) and factors[-1] > 0
    assert (factors[12] == pytest.approx(0.5)) == (kind != "constant")
