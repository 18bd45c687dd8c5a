"""What a user may get wrong: one sentence, exit code 2, no traceback, and nothing is loaded that need not be."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from grpo_core import verl_names
from grpo_core.cli import main
from grpo_core.config.nearest import list_keys
from grpo_core.config.sections import RunConfig
from grpo_core.objective.losses import LOSSES
from grpo_core.training import setup

ROOT = Path(__file__).parents[1]
BUILTIN = ROOT / "grpo_core" / "builtin" / "tiny"
ROW = {"question": "What is 1 + 1?", "answer": "2"}


class Loads(Exception):
    """The model's weights were about to be loaded."""


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """`train` with overrides, up to the moment at which the weights would be loaded; the lines on stderr."""
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "FOLDER_NOTE")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("grpo_core.distributed.ranks.die_with_launcher", lambda: None)

    def load_policy(*args, **kwargs):
        raise Loads

    monkeypatch.setattr(setup, "load_policy", load_policy)

    def call(*overrides, config="configs/tiny.yaml", code=2):
        small = (
            ["data.limit=20", "evaluation.num_tasks=2", "trainer.hang_timeout=0"]
            if config == "configs/tiny.yaml"
            else []
        )
        given = [f"output_dir={tmp_path / 'runs'}", *small, *overrides]
        assert main(["train", "--config", str(config), *map(str, given)]) == code
        err = capsys.readouterr().err
        assert "Traceback" not in err
        (line,) = [line for line in err.splitlines() if line.strip() and "WARNING" not in line]
        return line.removeprefix("grpo_core: ")

    return call


def test_the_control_loads(train):
    with pytest.raises(Loads):
        train()


@pytest.mark.parametrize("overrides, sentence", [
    (["trainer.num_step=3"], "unknown key trainer.num_step; known: completions_per_step, early_stopping"),
    (["trainr.num_steps=3"], "(did you mean trainer?)"),
    (["sampling.top_p=0.9"], "unknown key sampling.top_p; training samples from the whole distribution"),
    (["seed"], "'seed' is not an override; write section.key=value"),
    (["configs/r1.yaml"], "'configs/r1.yaml' is not an override; to use a config file, write --config configs/r1.yaml"),
    (["seed.x=1"], "seed"),
    (["seed=one"], "seed is 'one'; it must be an integer"),
    (["trainer.num_steps=2.5"], "trainer.num_steps is 2.5; it must be an integer or null"),
    (["rewards=[]"], "rewards must name at least one reward"),
    (["rewards=[correct_anser]"], "did you mean correct_answer?"),
    (["model.precision=fp8"], "model.precision is 'fp8'; it must be one of auto, bf16, fp16, fp32"),
    (["sampling.group_size=1"], "sampling.group_size is 1; it must be at least 2"),
    (["sampling.group_size=0"], "sampling.group_size is 0"),
    (["sampling.max_new_tokens=-4"], "sampling.max_new_tokens is -4; it must be at least 1"),
    (["trainer.completions_per_step=20"], "trainer.completions_per_step is 20; it must be a multiple of sampling.group_size"),
    (["trainer.tokens_per_micro_batch=0"], "trainer.tokens_per_micro_batch is 0"),
    (["trainer.reward_timeout=0"], "trainer.reward_timeout is 0"),
    (["trainer.max_failed_rewards=1.5"], "trainer.max_failed_rewards is 1.5; it is a share"),
    (["engine.learning_rate=0"], "engine.learning_rate is 0.0; it must be above 0"),
    (["engine.learning_rate=nan"], "engine.learning_rate is nan"),
    (["sampling.temperature=0"], "sampling.temperature is 0.0; it must be above 0"),
    (["alerts=loud"], "alerts is 'loud'; it must be one of warn, stop"),
    (["name=../x"], "name is '../x'; it must be the name of one folder"),
    (["name="], "name is ''; it must be the name of one folder"),
    (["data.subset=main"], "data.subset is 'main', but builtin:word_problems has no subsets"),
    (["resume=auto", "overwrite=true"], "a run is continued or removed, not both"),
    (["resume=runs/none"], "resume is 'runs/none'; it must be auto, force, null, or the folder of a run"),
    (["engine.deepspeed={zero_optimization: {stage: 3}}"], "zero_optimization.stage is 3; it must be 1 or 2"),
    (["engine.deepspeed={gradient_clipping: 3.0}"], "gradient_clipping is 3.0, but the run config's engine.max_grad_norm"),
    (["engine.deepspeed={fp16: {enabled: true}}"], "the DeepSpeed JSON's fp16.enabled is True"),
    (["engine.deepspeed=none.json"], "cannot read none.json: No such file"),
    (["model.path=nowhere/at-all"], "if the hub cannot be reached, set model.path to a folder that holds the model"),
    (["model.path=builtin:big"], "model.path is 'builtin:big'; known: builtin:tiny"),
    (["data.path=no-one/no-data"], "without a network, set data.path to a file or folder of this machine"),
    (["data.path=rows.jsonl"], "data: there is no file rows.jsonl"),
    (["data.template={problem}"], "data.template uses {problem}, but the data has the columns question, cot, answer"),
    (["data.template={question:d}"], "data.template '{question:d}' cannot be filled in: Unknown format code"),
    (["data.template={question"], "is malformed"),
    (["data.template={}"], "data.template uses {}"),
    (["data.max_prompt_tokens=3"], "data.max_prompt_tokens is 3; every prompt is longer than that"),
    (["data.max_prompt_tokens=30", "data.long_prompts=error"], "tokens, more than data.max_prompt_tokens (30), as have"),
    (["sampling.max_new_tokens=5000"], "are together more than the model's"),
    (["lora.target_modules=[q_proj, qq_proj]"], "lora.target_modules names 'qq_proj', which the model does not have; known: "),
    (["lora.target_modules=[proj]"], "lora.target_modules names 'proj', which the model does not have"),
    (["rewards=['https://me:secret@host/f.py:f']"], "rewards[0].name holds a password or token"),
    (["lora.target_modules=qq.*"], "lora.target_modules is 'qq.*', which matches no module"),
    (["rewards=nowhere.py:f"], "reward 'nowhere.py:f': there is no file nowhere.py"),
    (["loss.name=nowhere.py:f"], "loss 'nowhere.py:f': there is no file nowhere.py"),
    (["evaluation.reward=tests/conftest.py:none"], "has no function none"),
    (["trainer.max_restarts=-1"], "trainer.max_restarts is -1; it must be at least 0"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")  # fmt: skip
def test_in_the_configuration(train, overrides, sentence):
    assert sentence in train(*overrides)


@pytest.mark.parametrize("word, sentence", [
    ("beta=0.04", "unknown key beta; instead of TRL's beta use loss.kl_coef"),
    ("loss.beta=0.04", "unknown key loss.beta; instead of TRL's beta use loss.kl_coef"),
    ("num_generations=8", "use sampling.group_size"),
    ("sampling.num_generations=8", "use sampling.group_size"),
    ("max_completion_length=64", "use sampling.max_new_tokens"),
    ("data.max_prompt_length=64", "use data.max_prompt_tokens; data.long_prompts decides"),
    ("trainer.per_device_train_batch_size=4", "use trainer.tokens_per_micro_batch, which counts tokens; the completions of a step"),
    ("gradient_accumulation_steps=4", "TRL's gradient_accumulation_steps has no counterpart, because a step has as many micro-batches as it needs"),
    ("epsilon=0.2", "use clip_low in loss.args"),
    ("loss.epsilon_high=0.28", "use clip_high in loss.args"),
    ("loss.args={epsilon: 0.2}", "unknown key loss.args.epsilon; instead of TRL's epsilon use clip_low in loss.args"),
    ("scale_rewards=false", "use advantage.name: grpo for group or true, batch_std for batch, dr_grpo for none or false"),
    ("advantage.name=batch", "unknown advantage 'batch'; TRL's scale_rewards=batch is advantage.name=batch_std"),
    ("trainer.max_steps=3", "use trainer.num_steps"),
    ("num_iterations=2", "use trainer.num_passes"),
    ("steps_per_generation=2", "use trainer.num_minibatches, which is steps_per_generation / gradient_accumulation_steps"),
    ("learning_rate=1e-6", "use engine.learning_rate"),
    ("engine.lr_scheduler_type=cosine", "use engine.schedule"),
    ("engine.schedule=constant_with_warmup", "engine.schedule is 'constant_with_warmup'; use constant, with engine.warmup_steps"),
    ("engine.schedule=greedy", "engine.schedule is 'greedy'; it must be one of cosine, linear, constant"),
    ("report_to=wandb", "use log.tensorboard=true, log.wandb=PROJECT, log.trackio=PROJECT or log.mlflow=EXPERIMENT"),
    ("use_vllm=true", "TRL's use_vllm has no counterpart, because the sampler"),
    ("peft_config.r=8", "use the section lora"),
    ("loss_type=dapo", "unknown key loss_type; TRL's dapo is loss.name=grpo with loss.average=token; preset=dapo sets the complete objective"),
    ("loss.loss_type=bnpo", "unknown key loss.loss_type; TRL's bnpo is loss.name=grpo with loss.average=micro_token"),
    ("loss_type=[x]", "use loss.name and loss.average"),
    ("loss.name=dapo", "unknown loss 'dapo'; TRL's dapo is loss.name=grpo with loss.average=token; preset=dapo sets the complete objective"),
    ("loss.name=bnpo", "unknown loss 'bnpo'; TRL's bnpo is loss.name=grpo with loss.average=micro_token"),
    ("loss.name=dr_grpo", "; preset=dr_grpo sets the complete objective"),
    ("loss.name=rloo", "unknown loss 'rloo'; preset=rloo sets the complete objective"),
    ("loss.name=dapoo", "unknown loss 'dapoo'; known: cispo, "),
    ("advantage.args={beta: 1}", "unknown key advantage.args.beta; known: eps, std_ddof"),
], ids=lambda value: value.split("; ")[0] if "=" in value else "")  # fmt: skip
def test_a_name_of_trls(train, word, sentence):
    assert sentence in train(word)


@pytest.mark.parametrize("word, sentence", [
    ("data.train_files=a.parquet", "unknown key data.train_files; instead of verl's data.train_files use data.path"),
    ("trainer.total_epochs=3", "use trainer.epochs"),
    ("actor_rollout_ref.rollout.n=5", "instead of verl's actor_rollout_ref.rollout.n use sampling.group_size"),
    ("algorithm.kl_ctrl.kl_coef=0.1", "use loss.kl_coef with loss.kl_in=reward"),
    ("actor_rollout_ref.rollout.name=vllm", "unknown key actor_rollout_ref; verl's actor_rollout_ref.rollout.name has no counterpart"),
    ("reward.custom_reward_function.path=my.py", "use rewards, as in rewards=my_rewards.py:my_reward"),
    ("data.shuffle=true", "verl's data.shuffle has no counterpart, because every epoch is a seeded permutation"),
    ("algorithm=grpo", "unknown key algorithm; known: advantage, "),
    ("data.training_files=a.parquet", "unknown key data.training_files; known: args, "),
])  # fmt: skip
def test_a_name_of_verls(train, word, sentence):
    assert sentence in train(word)


def test_every_hint_for_a_name_of_verls_has_a_key_and_hides_none():
    ours = {key.replace("[0]", "") for key in list_keys(RunConfig, "")}
    assert not ours & {*verl_names.KEY_HINTS, *verl_names.REASONS}
    for hint in verl_names.KEY_HINTS.values():
        named = re.findall(r"(?<![\w.])(?:[a-z_]+\.)+[a-z_]+", re.sub(r"data\.train_batch_size|my_rewards\.py\S*|launch\.sh", "", hint))
        assert named or hint.partition(",")[0].split()[0] in {*ours, "rewards='{name:", "args", "the", "torchrun", "clip_low"}, hint
        assert set(named) <= ours, hint


def test_a_name_of_trls_that_someone_has_given_to_a_loss_of_their_own_is_theirs(train, tmp_path, monkeypatch):
    text = "def dapo(logprobs, old_logprobs, advantages, completion_mask, *, epsilon: float = 0.2):\n"
    text += "    from grpo_core import PolicyLoss\n    return PolicyLoss(-advantages * logprobs, {})\n"
    (tmp_path / "mine.py").write_text(text)
    mine = f"{tmp_path / 'mine.py'}:dapo"
    monkeypatch.setitem(LOSSES.functions, "dapo", LOSSES.get(mine))
    for name in (mine, "dapo"):
        with pytest.raises(Loads):
            train(f"loss.name={name}", "loss.args={epsilon: 0.1}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_fp16_without_a_gpu(train):
    assert "model.precision is fp16, which needs a GPU" in train("model.precision=fp16")


@pytest.mark.parametrize("content, sentence", [
    ("", "it has no rows"),
    ("\n\n", "it has no rows"),
    ("[]", "it has no rows"),
    (json.dumps(ROW) + "\n{question: 1}\n", "rows.jsonl, line 2, is not JSON: Expecting property name"),
    (json.dumps(ROW) + "\n\n[1, 2]\n", "rows.jsonl, line 3, is [1, 2]; it must be an object"),
    (json.dumps(ROW) + "\n" + json.dumps(ROW)[:-3], "rows.jsonl, line 2, is not JSON"),
    (json.dumps(ROW) + json.dumps(ROW), "rows.jsonl, line 1, is not JSON: Extra data"),
    ("[" * 200_000, "is not JSON that can be read"),
    ('{"question": ' + "1" * 5000 + "}", "line 1, is not JSON that can be read"),
    (json.dumps([ROW, 3]), "rows.jsonl, item 2, is 3; it must be an object"),
    (json.dumps({**ROW, "question": None}), "row 1 of the data: column 'question', which data.template uses, is null"),
    ("\n".join(map(json.dumps, [ROW, ROW, {"answer": "2"}])), "row 3 of the data: column 'question', which data.template uses, is null"),
    (json.dumps({**ROW, "question": True}), "row 1 of the data: column 'question', which data.template uses, is 'True'; it must be text"),
    (json.dumps({**ROW, "question": ["a"]}), "it must be text"),
    (json.dumps({"question": "What?"}), "reward correct_answer needs the column 'answer', but the data has only the columns question"),
    ("\n".join(map(json.dumps, [ROW, {**ROW, "answer": None}])), "reward correct_answer needs a value in the column 'answer', which is null in row 2 of the data"),
    (b"\xff\xfe\x00", "is not UTF-8 text: byte 0 is 0xff"),
], ids=range(17))  # fmt: skip
def test_in_a_data_file(train, tmp_path, content, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert sentence in train(f"data.path={path}", "evaluation.num_tasks=0", "data.template={question}")


def test_a_row_that_is_too_long_may_be_cut_on_the_left(train, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({**ROW, "question": "Ada has 5 pens. " * n}) for n in (1, 30)))
    with pytest.raises(Loads):
        train(
            f"data.path={path}",
            "evaluation.num_tasks=0",
            "data.max_prompt_tokens=20",
            "data.long_prompts=truncate_left",
        )


@pytest.mark.parametrize("folder", ["/proc/none", "file/inside"])
def test_a_run_folder_that_cannot_be_written(train, tmp_path, folder):
    (tmp_path / "file").touch()
    given = Path(folder) if folder.startswith("/") else tmp_path / folder
    assert f"the run folder {given / 'tiny'} (output_dir and name) cannot be written: " in train(f"output_dir={given}")


def model(folder, **changes):
    shutil.copytree(BUILTIN, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_in_a_model_folder(train, tmp_path):
    small = model(tmp_path / "small", vocab_size=100)
    assert "but the model has only 100 embeddings" in train(f"model.path={small}")
    bare = model(tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    assert f"model.path is '{bare}', and its tokenizer cannot be loaded: the folder has no tokenizer files" in train(f"model.path={bare}")
    broken = model(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    assert f"model.path is '{broken}', and" in train(f"model.path={broken}")


@pytest.mark.parametrize("text, sentence", [
    ("- 1\n", "is not a mapping of sections and keys"),
    ("a: [1\n", "is not YAML"),
    ("name: a\nname: b\n", "is not YAML: the key 'name' is given twice"),
    ("trainer: 3\n", "trainer is 3; it must be a mapping"),
    ("? [a]\n: 1\n", "is not YAML"),
    ("name: \x07\n", "is not YAML"),
    ("model: {path: https://me:secret@host/model}\n", "model.path holds a password"),
    ("data: {path: hf_" + "a1" * 17 + "}\n", "data.path holds a password or token"),
    ("1: 2\n", "unknown key 1"),
    ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
    ("beta: 0.04\n", "unknown key beta; instead of TRL's beta use loss.kl_coef"),
    ("loss: {loss_type: dapo}\n", "unknown key loss.loss_type; TRL's dapo is loss.name=grpo"),
], ids=range(12))  # fmt: skip
def test_in_the_config_file(train, tmp_path, text, sentence):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    line = train(config=path)
    assert sentence in line and "secret" not in line and "a1a1" not in line


def test_what_is_quoted_cannot_move_the_cursor(train):
    assert train("name.\x1b[2J=1").startswith("unknown key name.\\x1b[2J; ")


def test_a_run_that_lies_there(train, tmp_path):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "tiny"}))
    with pytest.raises(Loads):
        train()  # no step was taken there
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    assert f"{folder} already holds a run; use resume=auto to continue it, overwrite=true" in train()
    for word in ("overwrite=true", "resume=auto", "name=other"):
        with pytest.raises(Loads):
            train(word)
    assert (folder / "metrics.jsonl").exists()  # nothing is removed before the run starts
