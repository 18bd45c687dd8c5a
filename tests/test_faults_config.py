"""FAULTS.md, the rows about a user's text: words, paths, names of keys, functions and DeepSpeed's JSON."""

import functools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from grpo_core.batch import Task
from grpo_core.commands.dry_run import describe_sizes
from grpo_core.commands.model_card import _describe_accuracy
from grpo_core.config.files import dump, load, load_run_config
from grpo_core.config.function_checks import check_inputs
from grpo_core.config.sections import DataConfig
from grpo_core.config.words import parse_arguments
from grpo_core.data.prompts import make_tasks
from grpo_core.data.rows import describe_eval_source, load_splits
from grpo_core.data.stream import TaskStream
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.rewards import REWARDS
from grpo_core.report.run_reader import read_run
from grpo_core.report.summary import summarize_run
from grpo_core.scoring.reward_call import attempt, find_missing_columns
from grpo_core.scoring.scoring import Reward, score
from grpo_core.training.deepspeed_config import deepspeed_config
from grpo_core.training.prepare import check_columns
from grpo_core.training.resume import RunStart, check_num_steps
from grpo_core.training.trainer import is_due

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
TEXTS = ["a ####.", "a # b", "key: value", "- item", "first\nsecond\n\n third", "{question}", "[x] y", "'tis", '"all"', "1:30", "007"]


def get(config, key):
    for part in key.split("."):
        config = config[int(part)] if part.isdigit() else config[part] if isinstance(config, dict) else getattr(config, part)
    return config


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["data.system", "data.template", "data.path", "data.eval_path", "model.path", "sft.output", "log.wandb"])
def test_n1_s5_a_key_of_type_text_takes_the_word_verbatim(key, text):
    assert get(load(TINY, [f"{key}={text}"]), key) == text


def test_n1_texts_in_lists_and_arguments_are_verbatim_too(tmp_path, monkeypatch):
    (tmp_path / "a #1").mkdir()
    file = tmp_path / "a #1" / "mine.py"
    file.write_text("def f(completions, *, label: str = '', n: int = 1):\n    return [0.0 for _ in completions]\n")
    config = load(TINY, [f"rewards={file}:f", "rewards[0].args.label=a # b: c", "rewards[0].args.n=3"])
    assert config.rewards[0].name == f"{file}:f" and config.rewards[0].args == {"label": "a # b: c", "n": 3}
    config = load(TINY, ["sft.targets=<think>{cot}</think>\n#### {answer}", "data.columns.question=the #1: text"])
    assert config.sft.targets[0].template == "<think>{cot}</think>\n#### {answer}"
    assert config.data.columns == {"question": "the #1: text"}
    config = load(TINY, ["rewards[1].weight=0.5", "sft.targets[0].template=a # b"])
    assert config.rewards[1].weight == 0.5 and config.sft.targets[0].template == "a # b"
    assert load(TINY, ["sft.targets={answer}"]).sft.targets[0].template == "{answer}"


def test_n1_arguments_of_check_loss_know_their_types(tmp_path):
    (tmp_path / "l.py").write_text("def f(a, b, c, d, *, label: str = 'x', power: float = 1.0):\n    return a\n")
    words = ["label=1 # 2", "power=5e-1"]
    assert parse_arguments(words, LOSSES, f"{tmp_path / 'l.py'}:f") == {"label": "1 # 2", "power": 0.5}


@pytest.mark.parametrize("word, sentence", [
    ("seed=1:30", "seed is '1:30'; it must be an integer"),
    ("seed=0x10", "seed is '0x10'; it must be an integer"),
    ("engine.learning_rate=1:30.5", "engine.learning_rate is '1:30.5'; it must be a number"),
    ("model.path=", "model.path is ''; it must not be empty"),
    ("rewards[7].weight=1", "rewards[7] does not exist; rewards has the items 0 to 1"),
    ("rewards=[{name: a, args: {x: b: c}}]", "which is not YAML"),
])  # fmt: skip
def test_n1_a_number_is_read_as_it_is_written(word, sentence):
    with pytest.raises(ValueError, match=".") as error:
        load(TINY, [word])
    assert sentence in str(error.value)
    assert load(TINY, ["seed=010", "engine.learning_rate=1e-4"]).seed == 10


def test_n1_integers_in_a_file_are_decimal(tmp_path):
    (tmp_path / "a.yaml").write_text("base: tiny\nname: 007\n")
    assert load(tmp_path / "a.yaml").name == "007"
    for line, sentence in (("seed: 1:30", "seed is '1:30'"), ("seed: 2026-01-01", "seed is 2026-01-01; it must be an integer")):
        (tmp_path / "a.yaml").write_text(f"base: tiny\n{line}\n")
        with pytest.raises(ValueError, match=sentence):
            load(tmp_path / "a.yaml")


# --- attack 5 ------------------------------------------------------------------------------------------------------


def load_text(folder, text, words=()):
    (folder / "a.yaml").write_text(text)
    return load(folder / "a.yaml", words)


@pytest.mark.parametrize("written", ["2024-01-05", "2024-01-05 10:00:00", "123", "007", "0x10", "1e3", "1.50", ".5", "1_000", "1:30", "on", "No", "true", "'true'"])
def test_attack_5_a_key_of_type_text_takes_what_is_written(tmp_path, written):
    right, sets = written.strip("'"), "" if ":" in written else f"evaluation: {{sets: [{written}], select: {written}}}\n"
    text = "name: {0}\nlora: {{target_modules: [{0}]}}\nsft: {{targets: {0}}}\ndata: {{split: {0}, columns: {{answer: {0}}}, system: {0}}}\n"
    config = load_text(tmp_path, text.format(written) + sets)
    texts = [config.name, *config.lora.target_modules, config.data.split, config.data.system, config.data.columns["answer"]]
    texts += [config.sft.targets[0].template, *([config.evaluation.sets[0].name, config.evaluation.select] if sets else [])]
    assert set(texts) == {right}


def test_attack_5_other_types_are_read_as_before(tmp_path):
    config = load_text(tmp_path, "seed: 5\noverwrite: yes\nresume: null\nengine: {learning_rate: 1e-4}\nlora: {target_modules: all-linear}\n")
    assert (config.seed, config.overwrite, config.resume, config.engine.learning_rate) == (5, True, None, 1e-4)
    with pytest.raises(ValueError, match="^seed is 2024-01-05; it must be an integer$"):
        load_text(tmp_path, "seed: 2024-01-05\n")
    letters = "rewards: [{name: choice_match, args: {letters: 2024-01-05}}]\n"
    with pytest.raises(ValueError, match=r"^rewards\[0\].args.letters is 2024-01-05; it must be text, so put quotes around it$"):
        load_text(tmp_path, letters)
    for word in ("true", "no"):
        with pytest.raises(ValueError, match=f"log.wandb is '{word}'; it must be the name of a project, or null"):
            load_text(tmp_path, f"log: {{wandb: {word}}}\n")
    with pytest.raises(ValueError, match="log.mlflow is 'on'; it must be the name of an experiment, or null"):
        load_text(tmp_path, "log: {mlflow: on}\n")


EMPTY = ["trainer:\n", "trainer: # nothing\n", "trainer: {}\n", "trainer: null\n", "data: {columns: }\n", "loss: {args: , rollout_correction: }\n",
         "engine: {deepspeed: }\n"]  # fmt: skip


@pytest.mark.parametrize("text", EMPTY)
def test_attack_5_an_empty_section_is_as_if_it_were_not_there(tmp_path, text):
    words = ["trainer.num_steps=2", "data.columns.answer=b", "loss.rollout_correction.name=none"]
    assert load_text(tmp_path, text) == load_text(tmp_path, "")
    assert load_text(tmp_path, text, words) == load_text(tmp_path, "", words)
    assert load_text(tmp_path, "base: tiny\n" + text, words) == load_text(tmp_path, "base: tiny\n", words)


def test_attack_5_an_empty_list_and_a_section_that_is_a_value_are_one_sentence(tmp_path):
    for text, words, sentence in (
        ("rewards:\n", [], "rewards is null; it must be a list, or be left out"),
        ("trainer: 3\n", ["trainer.num_steps=2"], "unknown key trainer.num_steps; trainer is a value and has no keys"),
        ("name:\n", [], "name is None; it must be text"),
        ("trainer:\ntrainer: {epochs: 1}\n", [], "the key 'trainer' is given twice"),
        ("rewards: [{name: correct_answer, args: &a {b: *a}}]\n", [], r"the alias \*a is inside what it stands for \(line 1, column 47\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_text(tmp_path, text, words)


@pytest.mark.parametrize("word, sentence", [
    ("[]", "is []; it must name at least one module, such as q_proj, or be all-linear (with lora.r=0 there is no adapter)"),
    ("", "is ''; it must name at least one module, such as q_proj, or be all-linear (with lora.r=0 there is no adapter)"),
    ("(", "is '('; it must be all-linear, a list, or a regular expression, and as the latter it has the fault: missing ), unterminated "
          "subpattern at position 0"),
])  # fmt: skip
def test_attack_5_target_modules_that_name_nothing_are_one_sentence_of_ours(word, sentence):
    with pytest.raises(ValueError) as error:
        load(TINY, [f"lora.target_modules={word}"])
    assert str(error.value) == f"lora.target_modules {sentence}"
    assert load(TINY, ["lora.target_modules=[]", "lora.r=0", "loss.kl_coef=0"]).lora.r == 0


# --- N11 -----------------------------------------------------------------------------------------------------------


class Characters:
    chat_template = None

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[ord(x) for x in text] for text in texts]}


def test_n11_numbers_in_template_columns_are_text():
    rows = [{"a": 5, "b": 2.5}, {"a": -1, "b": 1e-3}]
    tasks, _ = make_tasks(rows, DataConfig(template="{a} + {b}"), Characters())
    assert [task.prompt for task in tasks] == ["5 + 2.5", "-1 + 0.001"] and tasks[0].columns == rows[0]
    for value in (True, None, math.nan, ["a"]):
        with pytest.raises(ValueError, match="row 1 of the data: column 'a'.*it must be text or a number"):
            make_tasks([{"a": value}], DataConfig(template="{a}"), Characters())


def write_project(folder, neighbour=1):
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps({"question": "x", "answer": "1"}) + "\n")
    (folder / "helper_of_mine.py").write_text(f"VALUE = {neighbour}\n")
    (folder / "mine.py").write_text("import helper_of_mine\n\ndef f(completions):\n    return [helper_of_mine.VALUE] * len(completions)\n")
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    keys = {"base": "tiny", "data": {"path": "rows.jsonl", "eval_path": "rows.jsonl"}, "rewards": ["mine.py:f"]}
    keys |= {"evaluation": {"reward": "mine.py:f"}, "engine": {"deepspeed": "ds.json"}}
    (folder / "c.yaml").write_text(yaml.safe_dump(keys))
    return folder


def test_n11_files_named_in_a_config_are_beside_it_and_on_the_command_line_in_the_shells_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(Path("d"))
    config = load("d/c.yaml")
    assert (config.data.path, config.data.eval_path, config.evaluation.reward) == ("d/rows.jsonl", "d/rows.jsonl", "d/mine.py:f")
    assert config.rewards[0].name == "d/mine.py:f" and config.engine.deepspeed["zero_optimization"]["stage"] == 1
    assert config.output_dir == "runs"  # what is written is in the shell's folder
    Path("ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    config = load("d/c.yaml", ["data.path=rows.jsonl", "engine.deepspeed=ds.json"])
    assert config.data.path == "rows.jsonl" and config.engine.deepspeed["zero_optimization"]["stage"] == 2
    Path("rows.jsonl").touch()
    assert load("d/c.yaml").data.path == "d/rows.jsonl"  # beside the file comes first
    Path("e").mkdir()
    Path("e/c.yaml").write_text("base: ../d/c.yaml\n")
    assert Path(load("e/c.yaml").data.path).resolve() == tmp_path / "d" / "rows.jsonl"


def test_n11_the_resolved_config_of_a_run_means_the_same_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    run = Path("runs/a")
    (run / "model").mkdir(parents=True)  # the run's own result has the name of the base model's folder
    (run / "config.yaml").write_text(dump(load(TINY, ["model.path=model"])))
    assert load(run / "config.yaml").model.path == load_run_config(run).model.path == "model"


def test_n11_a_tilde_is_the_home_folder_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = write_project(tmp_path / "d")
    for key in ("data.path", "data.eval_path", "model.path", "output_dir", "sft.output"):
        assert get(load(TINY, [f"{key}=~/d"]), key) == str(home)
    config = load("~/d/c.yaml", ["rewards=~/d/mine.py:f", "engine.deepspeed=~/d/ds.json"])
    assert config.rewards[0].name == f"{home}/mine.py:f" and config.engine.deepspeed["zero_optimization"]["stage"] == 1
    assert REWARDS.get("~/d/mine.py:f")(["a"]) == [1]


def test_n11_a_reward_file_imports_its_neighbours_and_each_its_own(tmp_path):
    (tmp_path / "wave.py").write_text("X = 0\n")
    first, second = write_project(tmp_path / "a", 1), write_project(tmp_path / "b", 2)
    (first / "wave.py").write_text("X = 1\n")  # the name of a module of the standard library
    (first / "mine.py").write_text((first / "mine.py").read_text() + "import wave\nassert wave.X == 1\n")
    sys.modules.pop("wave", None)
    one, two = (REWARDS.get(f"{folder / 'mine.py'}:f") for folder in (first, second))
    assert (one(["x"]), two(["x"])) == ([1], [2])
    import wave

    assert hasattr(wave, "open")


# --- N19 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word, sentence", [
    ("lr=1e-4", "did you mean engine.learning_rate?"),
    ("group_size=4", "did you mean sampling.group_size?"),
    ("max_new_token=4", "did you mean sampling.max_new_tokens?"),
    ("trainer.lr=1e-4", "did you mean engine.learning_rate?"),
    ("trainer.max_new_tokens=4", "did you mean sampling.max_new_tokens?"),
    ("clip_low=0.1", "did you mean loss.args.clip_low?"),
    ("optim=", "TRL's optim has no counterpart, because the optimizer is AdamW"),
    ("rewards=[correct_answer", "rewards is '[correct_answer', where the bracket [ is not closed"),
    ("rewards=[{name: correct_answer]", "is not closed"),
    ("data.columns={question: problem", "where the bracket { is not closed"),
    ("lora.target_modules=[q_proj, k_proj", "where the bracket [ is not closed"),
    ("rewards=[my #1.py:f]", "' #' begins a comment"),
])  # fmt: skip
def test_n19_the_nearest_key_at_any_depth(word, sentence):
    with pytest.raises(ValueError, match=".") as error:
        load(TINY, [word])
    assert sentence in str(error.value)


def test_n19_a_regular_expression_may_begin_with_a_bracket():
    assert load(TINY, ["lora.target_modules=[qk]_proj"]).lora.target_modules == "[qk]_proj"


def test_n19_a_run_where_a_model_or_a_file_is_wanted(tmp_path, monkeypatch):
    from grpo_core.commands.open_policy import open_source
    from grpo_core.data.rows import load_rows
    from grpo_core.model.loading import load_tokenizer

    monkeypatch.chdir(tmp_path)
    run = Path("runs/a")
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/step-000002/meta.json"):
        (run / name).touch()
    for source in ("runs/a", "a", "runs/a/checkpoints/step-000002"):
        with pytest.raises(ValueError, match=f"model.path is '{source}', which is .*run.*did you mean runs/a/adapter"):
            load_tokenizer(source)
    with pytest.raises(ValueError, match="did you mean the run runs/a?"):
        open_source("a")
    with pytest.raises(ValueError, match="runs/a is the folder of a run; did you mean runs/a/config.yaml?"):
        load("runs/a")
    with pytest.raises(ValueError, match="runs/a is the folder of a run; did you mean runs/a/completions.jsonl?"):
        load_rows("runs/a", None, "train", None)


# --- #25 -----------------------------------------------------------------------------------------------------------


def check_json(text):
    from grpo_core.training.engine import check_deepspeed

    filled = deepspeed_config(load(TINY, [f"engine.deepspeed={text}"]), torch.float32, 1)
    check_deepspeed(filled)
    return filled


@pytest.mark.parametrize("text, sentence", [
    ("{zero_optimization: true}", "zero_optimization is True; it must be a mapping"),
    ("{fp16: null}", "fp16 is None; it must be a mapping"),
    ("{bf16: [1]}", "bf16 is [1]; it must be a mapping"),
    ("{zero_optimization: {offload_optimizer: true}}", "zero_optimization.offload_optimizer is True; it must be a mapping"),
    ("{zero_optimization: {overlap_com: true}}", "zero_optimization.overlap_com is no key of DeepSpeed's zero_optimization"),
    ("{fp16: {loss_scales: 3}}", "fp16.loss_scales is no key"),
    ("{zero_optimization: {offload_optimizer: {device: gpu}}}", "zero_optimization.offload_optimizer.device is 'gpu'; input should be"),
    ("{zero_optimization: {reduce_bucket_size: big}}", "zero_optimization.reduce_bucket_size is 'big'; input should be"),
    ("{zero_optimization: {reduce_bucket_size: -1}}", "zero_optimization.reduce_bucket_size is -1; input should be greater"),
    ("{zero_optimisation: {stage: 2}}", "has zero_optimisation, which DeepSpeed does not read (did you mean zero_optimization?)"),
    ("{activation_checkpointing: {partition_activation: true}}", "did you mean partition_activations?"),
    ("{activation_checkpointing: true}", "activation_checkpointing is True; it must be a mapping"),
    ("{tensorboard: {enable: true}}", "tensorboard.enable is no key"),
    ("{amp: {enabled: true}}", "amp"),
])  # fmt: skip
def test_fault_25_a_block_of_the_deepspeed_json_that_deepspeed_would_refuse_is_one_sentence(text, sentence):
    with pytest.raises(ValueError, match="the DeepSpeed JSON") as error:
        check_json(text)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", [
    "{zero_optimization: {reduce_bucket_size: 2e8}}", "{zero_optimization: {offload_optimizer: null}}", "{}",
    "{activation_checkpointing: {partition_activations: false}, communication_data_type: fp32, zero_allow_untested_optimizer: true}",
    "{prescale_gradients: false, wall_clock_breakdown: false, data_types: {grad_accum_dtype: fp32}, comms_logger: {enabled: false}}",
])  # fmt: skip
def test_fault_25_what_deepspeed_takes_is_taken_and_2e8_is_a_number(text):
    filled = check_json(text)
    assert filled["zero_optimization"].get("reduce_bucket_size", 200_000_000) in (200_000_000, "auto")


@pytest.mark.parametrize("path", sorted(TINY.parent.glob("*.json")), ids=lambda path: path.stem)
def test_fault_25_the_shipped_files_are_taken(path):
    check_json(path)


# --- N8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["lora.r=0"], ["lora.r=0", "loss.kl_coef=0.1"], ["lora.r=0", "log.exact_kl_every=5"],
                                   ["lora.r=0", "reference.every=2"], ["loss.kl_coef=0", "reference.every=2"]])  # fmt: skip
def test_n8_sft_is_not_refused_because_of_the_objective_that_it_does_not_use(words, monkeypatch):
    from grpo_core.commands import sft

    configs = []
    monkeypatch.setattr(sft, "run_job", lambda job, config: configs.append(config) or 0)
    assert sft.run_sft(TINY, words) == 0 and configs[0].loss.kl_coef == 0
    with pytest.raises(ValueError, match="it must be 0|uses no reference"):
        load(TINY, words)


# --- N14 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, parameters, sentence", [
    ("loss", "logprobs, old_logprobs, advantages, completion_mask, ref_logprob", "asks for ref_logprob (did you mean ref_logprobs?); it is called with logprobs, old_logprobs, advantages, completion_mask, in this order, and by name rollout_logprobs, ref_logprobs, entropy, sum_p_squared, rewards,"),
    ("loss", "logprobs, old_logprobs, advantages, completion_mask, *, sampler", "asks for sampler; it"),
    ("loss", "logprobs, old_logprobs", "cannot be called: too many positional arguments; it is called with logprobs"),
    ("loss.kl", "logprobs, ref_logprobs, old_logprobs, advantages", "asks for advantages; it is called with logprobs, ref_logprobs"),
    ("loss.rollout_correction", "old, rollout, mask, lengths", "asks for lengths; it is called with old_logprobs, rollout_logprobs"),
    ("advantage", "rewards, lengths, prompts", "asks for prompts; it is called with rewards, in this order, and by name lengths, components"),
    ("truncation", "rewards, lengths, truncated, max_new_tokens, tasks", "asks for tasks; it is called with rewards, lengths"),
])  # fmt: skip
def test_n14_a_function_that_asks_for_more_than_there_is_says_what_there_is(key, parameters, sentence, tmp_path):
    (tmp_path / "mine.py").write_text(f"def f({parameters}):\n    return None\n")
    name = f"{tmp_path / 'mine.py'}:f"
    word = f"loss.kl={name}" if key == "loss.kl" else f"{key}.name={name}"
    with pytest.raises(ValueError, match=".") as error:
        load(TINY, [word])
    assert f"{key} {name} {sentence}" in str(error.value)


def test_n14_what_may_be_called_is():
    check_inputs("advantage", "x", lambda rewards, lengths, *, eps=1: 0)
    check_inputs("loss", "x", lambda *tensors, **others: 0)


# --- #23 and N22 ---------------------------------------------------------------------------------------------------


FILE = '''
import functools, asyncio

def base(completions, limit, answer):
    return [float(len(text) < limit) for text in completions]

partial = functools.partial(base, limit=3)

class Judge:
    def __init__(self, limit): self.limit = limit
    def __call__(self, completions, *, strict: bool = False):
        return [float(len(text) < self.limit) for text in completions]
    async def later(self, completions): return [0.0]

judge = Judge(3)
async def slow(completions): return [0.0 for _ in completions]
slow_partial = functools.partial(slow)
later = judge.later
class SlowJudge:
    async def __call__(self, completions): return [0.0]
slow_judge = SlowJudge()
async def stream(completions): yield 0.0
def hidden(completions): return slow(completions)
def untold(completions): return stream(completions)
def nothing(): return []
def odd(completions, *, limit: "Unknown" = 3): return [float(limit) for _ in completions]
builtin = max
'''  # fmt: skip


@pytest.fixture
def file(tmp_path):
    (tmp_path / "r.py").write_text(FILE)
    return str(tmp_path / "r.py")


def test_fault_23_partials_and_callable_objects_are_accepted(file):
    for name, args in (("partial", {}), ("partial", {"limit": 3}), ("judge", {"strict": True}), ("odd", {})):
        load(TINY, [f"rewards=[{{name: '{file}:{name}', args: {json.dumps(args)}}}]"])
        function = REWARDS.build(f"{file}:{name}", args)
        outcome = attempt(function, ["a", "abcd"], {"answer": ["1", "2"]})
        assert outcome.values == ([3.0, 3.0] if name == "odd" else [1.0, 0.0]) and outcome.why is None
    assert find_missing_columns(REWARDS.get(f"{file}:partial"), ["x"]) == ["answer"]
    with pytest.raises(ValueError, match=r"rewards\[0\].args.strict is 'x'; it must be true or false"):
        load(TINY, [f"rewards={file}:judge", "rewards[0].args.strict=x"])


@pytest.mark.parametrize("name", ["slow", "slow_partial", "later", "slow_judge"])
@pytest.mark.parametrize("key", ["rewards", "evaluation.reward"])
def test_n22_an_async_reward_is_taken(file, name, key):
    load(TINY, [f"{key}={file}:{name}"])
    assert attempt(REWARDS.build(f"{file}:{name}"), ["a"], {}).values == [0.0]


@pytest.mark.parametrize("word", ["rewards={}:stream", "evaluation.reward={}:stream", "loss.name={}:slow", "advantage.name={}:slow"])
def test_n22_an_async_generator_and_other_async_functions_are_refused_at_load(file, word):
    with pytest.raises(ValueError, match=r"is an async (function|generator), which is not supported$"):
        load(TINY, [word.format(file)])


@pytest.mark.parametrize("name, sentence", [
    ("Judge", "is a class; name a function, or an object of the class"),
    ("nothing", "takes no completions; its first parameter must be the list of completions"),
    ("builtin", "has no signature that can be read"),
])  # fmt: skip
def test_fault_23_what_is_no_reward_is_refused_at_load(file, name, sentence):
    with pytest.raises(ValueError, match=".") as error:
        load(TINY, [f"rewards={file}:{name}"])
    assert sentence in str(error.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("result, sentence", [
    ({"a": 1.0, "b": 2.0}, "returned a dict, {'a': 1.0"), ({1.0, 2.0}, "returned a set, {1.0"), (frozenset([1, 2]), "returned a frozenset"),
    ({1: 0, 2: 0}.keys(), "it must return a list"), (bytearray(b"ab"), "it must return a list"), ("ab", "it must return a list"),
])  # fmt: skip
def test_fault_23_a_result_without_an_order_is_no_list(result, sentence):
    outcome = attempt(lambda completions: result, ["a", "b"], {})
    assert all(outcome.failed) and sentence in outcome.why


@pytest.mark.filterwarnings("error")
def test_n22_a_function_that_returns_a_coroutine_is_awaited(file):
    assert attempt(REWARDS.get(f"{file}:hidden"), ["a"], {}).values == [0.0]
    outcome = attempt(REWARDS.get(f"{file}:untold"), ["a"], {})
    assert all(outcome.failed) and "it must return a list with a number for each" in outcome.why


def test_fault_23_a_reward_that_changes_its_inputs_changes_nothing_else():
    def greedy(completions, prompts, notes):
        prompts.clear()
        notes[0].append("changed")
        result = [1.0] * len(completions)
        completions.clear()
        return result

    def after(completions, notes):
        return [float(len(note)) for note in notes]

    task = Task(0, "p", [1], {"notes": ["x"]})
    texts = ["a", "b"]
    scores = score([Reward("greedy", 1.0, greedy), Reward("after", 1.0, after)], [task], texts, 2)
    assert scores.by_name["after"].tolist() == [[1.0, 1.0]] and scores.failures == ()
    assert texts == ["a", "b"] and task.columns == {"notes": ["x"]}


def test_fault_23_a_partial_has_the_formula_of_its_function():
    from grpo_core.config.formula import get_formula

    assert get_formula(functools.partial(LOSSES.get("grpo"))) == get_formula(LOSSES.get("grpo"))


# --- S2, N4, N16 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, per_step, epochs, ends", [
    (100, 64, [0.64, 1.28, 1.92, 2.56], [2, 4]), (8, 4, [0.5, 1.0, 1.5, 2.0], [2, 4]), (2, 4, [2.0, 4.0, 6.0, 8.0], [1, 2, 3, 4]),
    (3, 1, [1 / 3, 2 / 3, 1.0, 4 / 3], [3]),
])  # fmt: skip
def test_s2_an_epoch_is_rows_seen_over_rows_and_ends_with_its_last_row(rows, per_step, epochs, ends):
    tasks = [Task(i, "p", [1], {}) for i in range(rows)]
    run = SimpleNamespace(steps_per_epoch=TaskStream(tasks, per_step, 0).steps_per_epoch)
    assert [float(step / run.steps_per_epoch) for step in (1, 2, 3, 4)] == epochs
    assert [step for step in (1, 2, 3, 4) if is_due("epoch", step, run)] == ends
    assert [step for step in (1, 2, 3, 4) if is_due(2, step, run)] == [2, 4] and not is_due(0, 1, run)


def test_n4_the_evaluation_data_is_called_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("test.jsonl").touch()
    Path("train.jsonl").touch()
    for config, source in (
        (DataConfig(path="train.jsonl", eval_path="test.jsonl"), ("test.jsonl", "the whole file")),
        (DataConfig(path="train.jsonl"), ("train.jsonl", "held out of train")),
        (DataConfig(path="a/b", eval_path="c/d"), ("c/d", "train")),
        (DataConfig(path="a/b", eval_split="validation"), ("a/b", "validation")),
        (DataConfig(path="a/b"), ("a/b", "held out of train")),
        (DataConfig(), ("builtin:word_problems", "test")),
    ):
        assert describe_eval_source(config) == source
    card = _describe_accuracy(
        replace(load(TINY), data=DataConfig(path="train.jsonl", eval_path="test.jsonl")), tmp_path,
        SimpleNamespace(evaluation=[{"step": 0, "accuracy": 0.5, "correct": 1, "n": 2, "ci_low": 0.1, "ci_high": 0.9, "failed": 0}]),
    )  # fmt: skip
    assert "On test.jsonl (the whole file):" in card


@pytest.mark.parametrize("rates, base, num_steps, refused", [
    ([0.0], [1e-4], 14, "14, but the run in runs/a has finished its 10 steps"), ([0.0], [1e-4], 10, None), ([1e-4], [1e-4], 14, None),
    ([1e-4], [1e-4], 10, None), ([0.0], [0.0], 14, None),  # engine.learning_rate is 0, and the schedule has not ended
    ([1e-4], [1e-4], 9, "9, but the run in runs/a has taken 10 steps; it must be at least 10"),
])  # fmt: skip
def test_n16_a_finished_run_does_not_go_on_at_learning_rate_0(rates, base, num_steps, refused):
    meta = {"next_step": 10, "engine": {"schedule": {"_last_lr": rates, "base_lrs": base}}}
    start = RunStart(Path("runs/a"), Path("runs/a/checkpoints/step-000010"), meta, [], [])
    if not refused:
        return check_num_steps(start, num_steps)
    with pytest.raises(ValueError, match=f"trainer.num_steps is {refused}"):
        check_num_steps(start, num_steps)


def test_a_finished_sft_run_names_its_model_where_there_is_one(tmp_path):
    meta = {"next_step": 10, "engine": {"schedule": {"_last_lr": [0.0], "base_lrs": [1e-4]}}}
    start = RunStart(tmp_path, tmp_path / "checkpoints", meta, [], [])
    with pytest.raises(ValueError, match=f"from its exported model .python -m grpo_core export {tmp_path}., or"):
        check_num_steps(start, 14)
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=f"start a new run from its model .{tmp_path}/model., or"):
        check_num_steps(start, 14)


# --- N3 ------------------------------------------------------------------------------------------------------------


def test_n3_a_task_and_a_message_have_the_row_of_the_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"question": f"q{i}", "answer": "1"} for i in range(70)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(path=str(file), template="{question}", max_prompt_tokens=9)
    for part in load_splits(config, 6):
        tasks, _ = make_tasks(part, config, Characters())
        assert [task.prompt for task in tasks] == [f"q{task.index}" for task in tasks]
    rows[60]["question"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = load_splits(config, 6)
    with pytest.raises(ValueError, match=f"{file}, row 61 of the data: column 'question'"):
        make_tasks(train if 60 in train.numbers else held_out, config, Characters())


def test_n3_every_message_about_a_row_names_its_file(tmp_path):
    """FAULTS N3, N4: with data.eval_path a row's number alone does not say in which file it is."""
    files = [tmp_path / name for name in ("train.jsonl", "test.jsonl")]
    files[0].write_text("".join(json.dumps({"question": f"q{i}", "answer": "1"}) + "\n" for i in range(5)))
    config = DataConfig(path=str(files[0]), eval_path=str(files[1]), template="{question}", max_prompt_tokens=9, long_prompts="error")
    for question, problem in ((None, "column 'question'"), ("", "the prompt is empty"), ("long" * 9, "the prompt has 36"), ("\ud83d", "column")):
        files[1].write_text(json.dumps({"question": "q"}) + "\n" + json.dumps({"question": question}) + "\n")
        train, held_out = load_splits(config, 6)
        make_tasks(train, config, Characters())
        with pytest.raises(ValueError, match=f"^{files[1]}, row 2 of the data: {problem}"):
            make_tasks(held_out, config, Characters())
    assert load_splits(replace(config, path="builtin:word_problems", eval_path=None), 3)[1].source == "builtin:word_problems (test)"
    assert load_splits(replace(config, eval_path=None), 2)[1].source == str(files[0])  # held out, and numbered as in the file


@pytest.mark.parametrize("reward", ["rewards", "evaluation.reward"])
def test_n3_a_null_answer_is_named_with_its_file(tmp_path, reward):
    tasks = [Task(index, "q", [1], {"answer": "1" if index else None}) for index in (4, 0)]
    config = replace(load(TINY), data=DataConfig(path="a/b", eval_path="c/d", eval_split="dev"))
    arguments, source = ((tasks, []), r"a/b \(train\)") if reward == "rewards" else ((tasks[:1], tasks), r"c/d \(dev\)")
    with pytest.raises(ValueError, match=f"'answer', which is null in row 1 of the data, {source}; correct the row, or leave such rows out with data.bad_rows: drop$"):
        check_columns(config, *arguments)


@pytest.mark.parametrize("data, source", [
    ({"path": "train.jsonl", "eval_path": "test.jsonl"}, "test.jsonl (the whole file)"),
    ({"path": "train.jsonl"}, "train.jsonl (held out of train)"), ({}, "builtin:word_problems (test)"),
    ({"path": "a/b", "split": "dev", "eval_split": "test"}, "a/b (test)"), ({"path": "a: b.jsonl"}, "a: b.jsonl (held out of train)"),
])  # fmt: skip
def test_n4_dry_run_and_report_name_the_evaluation_rows(tmp_path, monkeypatch, data, source):
    """FAULTS N4: the rows that the accuracy is measured on, in the same words as the model card's."""
    monkeypatch.chdir(tmp_path)
    Path("test.jsonl").touch()
    config = load(TINY)
    config = replace(config, data=replace(config.data, **data))
    tasks = [Task(0, "q", [1], {})]
    sizes = describe_sizes(config, SimpleNamespace(tasks=tasks, eval_tasks=7 * tasks, num_too_long=0), 1, 16)
    assert f"7 evaluation problems from {source}, evaluated before and after training" in sizes
    assert "0 evaluation problems, evaluated never" in describe_sizes(config, SimpleNamespace(tasks=tasks, eval_tasks=[], num_too_long=0), 1, 16)
    Path("run").mkdir()
    Path("run/config.yaml").write_text(dump(config))
    assert "Evaluated on" not in {key for key, text in summarize_run(read_run(Path("run")), 0).items() if text}
    Path("run/evaluation.jsonl").write_text('{"step": 0, "accuracy": 0.5, "correct": 1, "n": 2}\n')
    assert summarize_run(read_run(Path("run")), 0)["Evaluated on"] == source
